"""mmq clean."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from mmq.cli.errors import handled
from mmq.cli.options import Json, RecipePath, Set, mode, quiet_libraries
from mmq.cli.output import make_output
from mmq.errors import MmqError
from mmq.recipe import load
from mmq.text import bytes_text

if TYPE_CHECKING:
    from mmq.report.folders import Held


class Folder(Enum):
    """What may go."""

    BF16 = "bf16"
    AWQ = "awq"


def clean(
    recipe: RecipePath,
    only: Annotated[
        list[Folder] | None, typer.Option("--only", help="Remove this folder alone. Repeatable. [default: both]")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Show what each work folder holds, and remove bf16/ and awq/ once the result is verified. Asks first."""
    with handled():
        output = make_output(mode(json, False))
        loaded = load(recipe, set_)
        quiet_libraries()
        from mmq.report.folders import REMOVABLE, held, remove
        from mmq.workdir.lock import lock
        from mmq.workdir.workspace import Workspace

        workspace = Workspace.of(loaded, output, offline=True)
        if not workspace.work_dir.is_dir():
            raise MmqError(f"there is no {workspace.work_dir}: nothing was begun")
        with lock(workspace.work_dir):
            folders = held(workspace, [folder.value for folder in only] if only else REMOVABLE)
            going = [folder for folder in folders if not folder.kept]
            size = bytes_text(sum(folder.nbytes for folder in going))
            rows = [
                {
                    "folder": f"{folder.name}/",
                    "holds": folder.what,
                    "files": folder.files,
                    "size": bytes_text(folder.nbytes),
                    "": folder.kept or "may be removed",
                }
                for folder in folders
            ]
            if not json:
                output.result({}, str(workspace.work_dir), rows)
            removed = bool(going) and (yes or (not json and _agreed(f"Remove {_names(going)}, {size}?")))
            if removed:
                remove(workspace, going)
            if json:
                value = {"folders": [folder.as_json() for folder in folders]}
                output.result(value | {"removed": [folder.name for folder in going] if removed else []})
            else:
                output.note(f"removed {_names(going)}: {size} are free again" if removed else "nothing was removed")


def _names(folders: list[Held]) -> str:
    return " and ".join(f"{folder.name}/" for folder in folders)


def _agreed(question: str) -> bool:
    """Ask. Raises MmqError where nobody can answer."""
    try:
        return typer.confirm(question)
    except typer.Abort:
        raise MmqError("nobody answered, so nothing was removed; --yes removes without asking") from None
