"""How far each stage of a run is, who is at work on it, and what comes next; read without a lock."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

from mmq.prove import evaluate
from mmq.prove.verify import read_report
from mmq.stages import restore
from mmq.stages.pipeline import STAGES, plans, stages_of
from mmq.workdir.journal import Journal, StageJournal
from mmq.workdir.lock import Holder, lock_holder
from mmq.workdir.progress import percent_of, seconds_left
from mmq.workdir.workspace import HYBRID, Workspace


def status(workspace: Workspace) -> dict[str, Any]:
    """How far each stage is, and the evaluation once it has begun; who is at work; which command is next.

    Reads the journal, the lock file and the source's headers, takes no lock.

    Returns:
        `stages`; `running`: None, or the process that holds the work_dir and its `Progress`, with an estimate of the
        seconds to the stage's end; `next`: None when the result is complete and verified.
    """
    journal, holder = Journal(workspace.work_dir), lock_holder(workspace.work_dir)
    weights = _unit_weights(workspace, journal)
    unfinished = [name for name in weights if not journal.stage(name).complete]
    at_work = unfinished[0] if holder and unfinished else None
    following = next((name for name in unfinished if name in STAGES), None) or _after_stages(workspace)
    stages = [
        _stage_status(journal.stage(name), units, bool(holder and holder.seen and name == at_work))
        for name, units in weights.items()
    ]
    running = None
    if holder and holder.progress:
        running = _told(holder, holder.progress)
        for stage in stages:
            # Parts of units too, which the journal does not know.
            if stage["stage"] == running["stage"] and stage["state"] == "at work":
                stage["percent"] = running["percent"]
    elif holder:
        running = _guessed(holder, journal.stage(at_work) if at_work else None, weights)
    return {"work_dir": str(workspace.work_dir), "stages": stages, "running": running, "next": following}


def _after_stages(workspace: Workspace) -> str | None:
    """The command for a complete result: verify, until it has passed on the files that are there."""
    record, _ = read_report(workspace)
    return None if record and record.get("ok") is True else "verify"


def _unit_weights(workspace: Workspace, journal: Journal) -> dict[str, dict[str, int]]:
    """How much work each unit of each stage is; in the evaluation of this result 1 each."""
    found = plans(workspace, stages_of(workspace.recipe))
    weights = {plan.stage: {unit.name: unit.weight for unit in plan.units} for plan in found}
    record = journal.stage(evaluate.name)
    if record.begun and record.fingerprint.get(evaluate.RESULT_FIELD) == journal.stage(restore.name).digest(HYBRID):
        weights[evaluate.name] = dict.fromkeys(evaluate.units_of(workspace.source), 1)
    return weights


def _stage_status(record: StageJournal, weights: dict[str, int], at_work: bool) -> dict[str, Any]:
    state = "complete" if record.complete else "at work" if at_work else "begun" if record.begun else "not begun"
    done = sum(weights.get(unit, 0) for unit in record.units)
    return {
        "stage": record.name,
        "state": state,
        "done": len(record.units),
        "units": len(weights),
        "percent": percent_of(done, sum(weights.values())),
        "last": record.units[-1] if record.units else None,
    }


def _told(holder: Holder, progress: dict[str, Any]) -> dict[str, Any]:
    """Who is at work, and the figures that the process tells of itself, the time since then taken off what is left."""
    left, since = progress["eta_seconds"], max(0.0, time.time() - progress["told"])
    return _who(holder) | progress | {"eta_seconds": None if left is None else max(0.0, round(left - since, 1))}


def _guessed(holder: Holder, record: StageJournal | None, weights: dict[str, dict[str, int]]) -> dict[str, Any]:
    """The same, as far as the journal knows, of a process that has told nothing yet; no stage where it does something
    else."""
    stage = unit = left = None
    if record is not None:
        stage, mine = record.name, weights[record.name]
        unit = next((unit for unit in mine if unit not in record.units), None)
        left = _eta(record, mine, holder.since)
    return _who(holder) | {"stage": stage, "unit": unit, "part": "", "at": "", "eta_seconds": left}


def _who(holder: Holder) -> dict[str, Any]:
    return {
        "process": holder.process,
        "host": holder.host,
        "since": holder.since.isoformat(" "),
        "seen": holder.seen,
    }


def _eta(record: StageJournal, weights: dict[str, int], since: datetime) -> float | None:
    """Seconds to the stage's end at the pace of its latest run, over or not; None where none is known.

    Args:
        since: when the present run took the lock.
    """
    run = record.runs[-1] if record.runs else {}
    if not run.get("units") or not run.get("seconds"):
        return None
    done = sum(weights.get(unit, 0) for unit in record.units[-run["units"] :])
    left = seconds_left(
        done, sum(weight for unit, weight in weights.items() if unit not in record.units), run["seconds"]
    )
    if left is None:
        return None
    last_unit = datetime.fromisoformat(run["began"]).timestamp() + run["seconds"]
    # What is done of the unit at work is not journalled: the time since it was begun counts for it.
    waited = time.time() - max(last_unit, since.timestamp())
    return max(0.0, round(left - max(0.0, waited), 1))
