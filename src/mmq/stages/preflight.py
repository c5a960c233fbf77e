"""What a command will read, use or refuse, looked at before its first byte is written.

`run`, each stage's command and `--dry-run` share it, so that all of them refuse the same input with the same sentence.
Each stage brings its own checks; those that all have are here. What only the tensors' bytes can tell comes later.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmq.errors import CheckpointError, DiskSpaceError, RecipeError
from mmq.stages.base import Check, Plan, Stage, disk_of, existing_part, free_disk
from mmq.storage.checkpoint import Checkpoint
from mmq.text import bytes_text
from mmq.workdir.journal import JOURNAL_NAME, OUTPUT_OF
from mmq.workdir.lock import LOCK_NAME
from mmq.workdir.workspace import STATE, Workspace

# What a whole run leaves in its work_dir besides the stages' folders.
REPORT, FILES = "report", (JOURNAL_NAME, LOCK_NAME, "verify.json")


@dataclass(frozen=True)
class Passed:
    """A check and what it found.

    Attributes:
        stage: whose check it is; empty for those of the command as a whole.
    """

    stage: str
    check: str
    found: str


def preflight(
    workspace: Workspace, stages: Sequence[Stage], earlier: Iterable[str] = (), restart: bool = False
) -> list[Passed]:
    """Run the checks of all stages that have work left.

    Args:
        stages: in their order.
        earlier: stages before these that are taken to have run.
        restart: they begin anew, whatever the journal says.

    Returns:
        what was looked at, in the order in which it was.

    Raises:
        MmqError: the sentence that the first stage to meet the fault would end with.
    """
    journal = workspace.journal
    pending = [stage for stage in stages if restart or not journal.stage(stage.name).complete]
    if not pending:
        return []
    checks = [
        ("", Check("outputs", lambda w: check_outputs(w, pending), weights=False)),
        ("", Check("source", _source)),
        ("", Check("journal", lambda w: _journal(w, stages, restart))),
    ]
    before = {name for name in earlier if not journal.stage(name).complete}
    for stage in pending:
        checks += ((stage.name, check) for check in stage.checks(workspace, before))
        before.add(stage.name)
    checks.append(("", Check("disk", lambda w: _disk(w, pending, restart))))
    if not workspace.has_source:
        # What can be looked at first is, before the weights are fetched for the rest.
        checks.sort(key=lambda entry: entry[1].weights)
    return [Passed(stage, check.name, check.look(workspace)) for stage, check in checks]


def check_outputs(workspace: Workspace, stages: Sequence[Stage], files: Sequence[str] = ()) -> str:
    """The folders that will be written are folders, or can become some, and the files no folders; those that a run
    writes at its end as well, and further `files` of the work_dir. Raises RecipeError."""
    written = (workspace.work_dir, workspace.folder(STATE), *(workspace.folder(stage.output) for stage in stages))
    for folder in (*written, workspace.folder(REPORT)):
        existing = existing_part(folder)
        if not existing.is_dir():
            raise RecipeError(f"work_dir: {existing} is no folder, {folder} is to be written")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise RecipeError(f"work_dir: {folder} can't be written: no permission to write into {existing}")
    for path in map(workspace.folder, (*FILES, *files)):
        if path.is_dir():
            raise RecipeError(f"work_dir: {path} is a folder, a file of that name is to be written")
    return str(workspace.work_dir)


def _source(workspace: Workspace) -> str:
    """All that the headers of the shards and config.json say."""
    return contents(workspace.source.checkpoint)


def contents(checkpoint: Checkpoint) -> str:
    """What a checkpoint holds, in a few words."""
    return f"{len(checkpoint.specs):,} tensors in {len(checkpoint.shards)} shards, {bytes_text(checkpoint.nbytes)}"


def _journal(workspace: Workspace, stages: Sequence[Stage], restart: bool) -> str:
    """What was begun was begun with these inputs; what a stage before it is yet to make may come out as it was."""
    begun, remade = [], False
    for stage in stages if not restart else ():
        own = workspace.journal.stage(stage.name)
        if own.units or own.complete:
            fingerprint = stage.fingerprint(workspace)
            if remade:
                fingerprint |= {field: own.fingerprint.get(field) for field in fingerprint if field.endswith(OUTPUT_OF)}
            own.check_fingerprint(fingerprint)
            begun.append(f"{stage.name}: {'complete' if own.complete else f'{len(own.units)} units done'}")
        remade = remade or not own.complete
    return ", ".join(begun) or "nothing was begun"


def _disk(workspace: Workspace, stages: Sequence[Stage], restart: bool) -> str:
    """What all stages together write on each disk, and the names that they write it under."""
    needed: dict[int, dict[Path, int]] = {}
    for stage in stages:
        plan = stage.plan(workspace)
        _check_names(plan)
        done = [] if restart else workspace.journal.stage(stage.name).units
        written = sum(unit.written for unit in plan.units if unit.name not in done)
        for folder, size in ((plan.folder, written), (workspace.folder(STATE), plan.state)):
            if size:
                folders = needed.setdefault(disk_of(folder), {})
                folders[folder] = folders.get(folder, 0) + size
    found = []
    for folders in needed.values():
        first, *others = folders
        total, free = sum(folders.values()), free_disk(first)
        if total > free:
            names = f"{', '.join(map(str, [first, *others[:-1]]))} and {others[-1]}" if others else str(first)
            verb, whose = ("need", " together, their") if others else ("needs", ", its")
            raise DiskSpaceError(f"{names} {verb} {bytes_text(total)}{whose} disk has {bytes_text(free)} free")
        found.append(f"{bytes_text(total)} needed, {bytes_text(free)} free")
    return "; ".join(found)


def _check_names(plan: Plan) -> None:
    """Raises CheckpointError where two tensors or two files would have one name."""
    for names in ([unit.name for unit in plan.units], plan.tensors):
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise CheckpointError(f"{plan.folder} would hold {name} twice: the source has a tensor of that name")
            seen.add(name)
