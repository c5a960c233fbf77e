"""How far each stage of a run is, who is at work on it, and what comes next; read without a lock."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import datetime
from typing import Any

from mmq.prove import evaluate
from mmq.prove.verify import read_report
from mmq.run.journal import Journal, StageJournal
from mmq.run.lock import Holder, lock_holder
from mmq.run.workspace import HYBRID, Workspace
from mmq.stages import restore
from mmq.stages.pipeline import STAGES, plans, stages_of


def status(workspace: Workspace) -> dict[str, Any]:
    """How far each stage is, and the evaluation once it has begun; who is at work; which command is next.

    Reads the journal, the lock file and the source's headers, takes no lock.

    Returns:
        `stages`; `running`: None, or the process that holds the work_dir, the stage and unit that it is at and an
        estimate of the seconds to the stage's end; `next`: None when the result is complete and verified.
    """
    journal, holder = Journal(workspace.work_dir), lock_holder(workspace.work_dir)
    sizes = _unit_sizes(workspace, journal)
    unfinished = [name for name in sizes if not journal.stage(name).complete]
    at_work = unfinished[0] if holder and unfinished else None
    following = next((name for name in unfinished if name in STAGES), None) or _after_stages(workspace)
    return {
        "work_dir": str(workspace.work_dir),
        "stages": [
            _stage_status(journal.stage(name), units, bool(holder and holder.seen and name == at_work))
            for name, units in sizes.items()
        ],
        "running": _running(holder, journal.stage(at_work) if at_work else None, sizes) if holder else None,
        "next": following,
    }


def _after_stages(workspace: Workspace) -> str | None:
    """The command for a complete result: verify, until it has passed on the files that are there."""
    record, _ = read_report(workspace)
    return None if record and record.get("ok") is True else "verify"


def _unit_sizes(workspace: Workspace, journal: Journal) -> dict[str, dict[str, int]]:
    """What each unit of each stage weighs in its progress: bytes, and in the evaluation of this result 1 each."""
    found = plans(workspace, stages_of(workspace.recipe))
    sizes = {plan.stage: {unit.name: unit.read + unit.written for unit in plan.units} for plan in found}
    record = journal.stage(evaluate.name)
    if record.begun and record.fingerprint.get(evaluate.RESULT_FIELD) == journal.stage(restore.name).digest(HYBRID):
        sizes[evaluate.name] = dict.fromkeys(evaluate.units_of(workspace.source), 1)
    return sizes


def _stage_status(record: StageJournal, sizes: dict[str, int], at_work: bool) -> dict[str, Any]:
    state = "complete" if record.complete else "at work" if at_work else "begun" if record.begun else "not begun"
    done = sum(sizes.get(unit, 0) for unit in record.units)
    return {
        "stage": record.name,
        "state": state,
        "done": len(record.units),
        "units": len(sizes),
        "percent": round(100 * done / sum(sizes.values()), 1),
        "last": record.units[-1] if record.units else None,
    }


def _running(holder: Holder, record: StageJournal | None, sizes: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Who is at work, and at what; no stage where the lock's holder does something else, such as an upload."""
    found = asdict(holder) | {"since": holder.since.isoformat(" ")}
    if record is None:
        return found | {"stage": None, "unit": None, "eta_seconds": None}
    mine = sizes[record.name]
    unit = next((unit for unit in mine if unit not in record.units), None)
    return found | {"stage": record.name, "unit": unit, "eta_seconds": _eta(record, mine, holder.since)}


def _eta(record: StageJournal, sizes: dict[str, int], since: datetime) -> int | None:
    """Seconds to the stage's end at the pace of its latest run, over or not; None where none is known.

    Args:
        since: when the present run took the lock.
    """
    run = record.runs[-1] if record.runs else {}
    if not run.get("units") or not run.get("seconds"):
        return None
    pace = sum(sizes.get(unit, 0) for unit in record.units[-run["units"] :]) / run["seconds"]
    left = sum(size for unit, size in sizes.items() if unit not in record.units)
    last_unit = datetime.fromisoformat(run["began"]).timestamp() + run["seconds"]
    # What is done of the unit at work is not journalled: the time since it was begun counts for it.
    waited = time.time() - max(last_unit, since.timestamp())
    return max(0, round(left / pace - max(0.0, waited))) if pace else None
