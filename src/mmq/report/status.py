"""How far each stage of a run is, who is at work on it, and what comes next; read without a lock."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mmq.errors import CheckpointError, JournalError, RecipeError
from mmq.prove import evaluate
from mmq.prove.verify import REPORT_NAME, read_report
from mmq.recipe import load
from mmq.stages import restore
from mmq.stages.pipeline import STAGES, plans, stages_of
from mmq.storage.checkpoint import read_json
from mmq.workdir.journal import JOURNAL_NAME, Journal, StageJournal
from mmq.workdir.lock import Holder, lock_holder
from mmq.workdir.progress import percent_of, seconds_left
from mmq.workdir.workspace import AWQ, BF16, HYBRID, STATE, Workspace

# Folders below the one where runs are looked for.
DEPTH = 4


def status(workspace: Workspace) -> dict[str, Any]:
    """How far each stage is, and the evaluations that have begun; who is at work; which command is next.

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


def find_runs(folder: Path) -> list[dict[str, Any]]:
    """The work_dirs at a folder and below it, from their journals and lock files alone; nothing is locked or changed.

    Returns:
        an entry each: `work_dir`; the recipe that names it, where one is found near; the stage that is at work or was
        last begun, its state, finished units, percent and time left where a process tells them; whether verify.json
        says that the result is right; or `fault`, why the journal can't be read.
    """
    found, recipes = [], _recipes_below(folder)
    for path in _files_below(folder, JOURNAL_NAME):
        entry: dict[str, Any] = {"work_dir": str(path.parent), "recipe": recipes.get(path.parent.resolve())}
        try:
            found.append(entry | _of_journal(path.parent))
        except JournalError as error:
            found.append(entry | {"fault": str(error)})
    return found


def _of_journal(work_dir: Path) -> dict[str, Any]:
    journal, holder = Journal(work_dir), lock_holder(work_dir)
    begun = [stage for name in (*STAGES, *evaluate.WORK) if (stage := journal.stage(name)).begun]
    record = next((one for one in begun if not one.complete), begun[-1] if begun else None)
    progress = (holder.progress if holder else None) or {}
    name = progress.get("stage") or (record.name if record else None)
    state = "not begun" if record is None else "complete" if record.complete else "begun"
    if holder:
        state = "at work" if holder.seen else "at work, or stopped elsewhere"
    return {
        "stage": name,
        "state": state,
        "done": len(journal.stage(name).units) if name else 0,
        "percent": progress.get("percent"),
        "eta_seconds": _told(holder, progress)["eta_seconds"] if holder and progress else None,
        "verified": _says_verified(work_dir / REPORT_NAME),
    }


def _says_verified(path: Path) -> bool | None:
    """What a verify.json says, whatever has become of the files since; None where there is none."""
    try:
        return bool(read_json(path).get("ok")) if path.is_file() else None
    except CheckpointError:
        return None


def _recipes_below(folder: Path) -> dict[Path, str]:
    """work_dirs by the recipes that name them."""
    found: dict[Path, str] = {}
    for pattern in ("*.yaml", "*.yml"):
        for path in _files_below(folder, pattern):
            try:
                found.setdefault(load(path).work_path, str(path))
            except RecipeError:
                continue
    return found


def _files_below(folder: Path, pattern: str, depth: int = DEPTH) -> Iterator[Path]:
    """Files of a name, this folder's first; hidden folders and what a run writes are not entered."""
    try:
        with os.scandir(folder) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
        files = [entry.name for entry in inside if entry.is_file()]
        folders = [entry.name for entry in inside if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    yield from (folder / name for name in files if fnmatch(name, pattern))
    skipped = (BF16, AWQ, HYBRID, STATE) if JOURNAL_NAME in files else ()
    for name in folders:
        if depth and not name.startswith(".") and name not in skipped:
            yield from _files_below(folder / name, pattern, depth - 1)


def _after_stages(workspace: Workspace) -> str | None:
    """The command for a complete result: verify, until it has passed on the files that are there."""
    record, _ = read_report(workspace)
    return None if record and record.get("ok") is True else "verify"


def _unit_weights(workspace: Workspace, journal: Journal) -> dict[str, dict[str, int]]:
    """How much work each unit of each stage is; evaluations are of this result."""
    found = plans(workspace, stages_of(workspace.recipe))
    weights = {plan.stage: {unit.name: unit.weight for unit in plan.units} for plan in found}
    for name, work_of in evaluate.WORK.items():
        record = journal.stage(name)
        if record.begun and record.fingerprint.get(evaluate.RESULT_FIELD) == journal.stage(restore.name).digest(HYBRID):
            weights[name] = work_of(workspace.source)
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
        "removed": record.removed,
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
