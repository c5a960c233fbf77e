"""What the folders of a work_dir hold, and removing those that a verified result no longer needs."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmq.errors import VerifyError
from mmq.prove.verify import read_report
from mmq.stages import awq, dequant
from mmq.workdir.workspace import AWQ, BF16, HYBRID, STATE, Workspace

# What may go, and the stage that wrote it.
REMOVABLE = {BF16: dequant.name, AWQ: awq.name}
HOLDS = {
    BF16: "the dequantized checkpoint",
    AWQ: "experts in int4, attention in bf16",
    HYBRID: "the result",
    STATE: "statistics, calibration tokens, hidden states of an unfinished stage",
    "report": "the page and its plots",
}


@dataclass(frozen=True)
class Held:
    """One folder of a work_dir.

    Attributes:
        files, nbytes: what lies in it.
        kept: why it stays, as a clause; "" where it may be removed.
    """

    name: str
    path: Path
    what: str
    files: int
    nbytes: int
    kept: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}


def held(workspace: Workspace, wanted: Iterable[str] = REMOVABLE) -> list[Held]:
    """The folders that are there.

    Args:
        wanted: those of REMOVABLE that are to go.

    Raises:
        MmqError: the journal or the source can't be read.
    """
    doubt, chosen = _doubt(workspace), set(wanted)
    found = []
    for name, what in HOLDS.items():
        path = workspace.folder(name)
        if not path.is_dir():
            continue
        sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
        kept = "" if name in chosen else "not asked for"
        if name not in REMOVABLE:
            kept = {HYBRID: "it is what was made"}.get(name, "small, and what report and resume read")
        elif not kept:
            kept = doubt
        found.append(Held(name, path, what, len(sizes), sum(sizes), kept))
    return found


def remove(workspace: Workspace, folders: Iterable[Held]) -> None:
    """Remove folders that may go; call under the work_dir's lock. The journal knows it before the first file is gone.

    Raises:
        VerifyError: the result is not verified, so that they may still be needed.
    """
    if doubt := _doubt(workspace):
        raise VerifyError(f"nothing is removed: {doubt}")
    for folder in folders:
        workspace.journal.stage(REMOVABLE[folder.name]).note_removed(folder.name)
        shutil.rmtree(folder.path.resolve())
        if folder.path.is_symlink():
            folder.path.unlink()


def _doubt(workspace: Workspace) -> str:
    """Why the result may not be what it must be, as a clause; "" where it is verified as it is."""
    if not workspace.journal.stage("restore").complete:
        return "the result is not complete"
    record, reason = read_report(workspace)
    if record is None:
        return f"the result: {reason}"
    return "" if record.get("ok") is True else "the result is not what it must be"
