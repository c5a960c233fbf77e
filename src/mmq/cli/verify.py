"""mmq verify and status."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmq.cli.errors import handled
from mmq.cli.options import Json, Quiet, RecipePath, Set, mode, quiet_libraries
from mmq.cli.output import Output, make_output
from mmq.errors import VerifyError
from mmq.recipe import load

if TYPE_CHECKING:
    from mmq.workspace import Workspace

SHOWN_PROBLEMS = 20


def verify(recipe: RecipePath, set_: Set = None, json: Json = False, quiet: Quiet = False) -> None:
    """Prove that the finished checkpoint is what it must be; exit code 1 and a list when something is off."""
    with handled():
        output = make_output(mode(json, quiet))
        quiet_libraries()
        from mmq.workspace import Workspace

        with output.live():
            verify_and_report(Workspace.of(load(recipe, set_), output), output)


def verify_and_report(workspace: Workspace, output: Output) -> None:
    """Verify, write verify.json, show the outcome. Raises VerifyError when something is off."""
    from mmq.verify import verify_checkpoint

    report = verify_checkpoint(workspace)
    output.result(report.as_json(), "Verification", report.rows())
    if report.problems:
        shown = "\n".join(f"  - {problem}" for problem in report.problems[:SHOWN_PROBLEMS])
        more = len(report.problems) - SHOWN_PROBLEMS
        raise VerifyError(
            f"{report.folder} is not what it must be:\n{shown}" + (f"\n  and {more} more" if more > 0 else "")
        )
    output.note(f"verified: {report.folder} (details in {report.path})")


def status(recipe: RecipePath, set_: Set = None, json: Json = False) -> None:
    """Show which stage and unit each is at, and what the next command is."""
    with handled():
        output = make_output(mode(json, False))
        loaded = load(recipe, set_)
        quiet_libraries()
        from mmq.pipeline import status as read_status
        from mmq.workspace import Workspace

        found = read_status(Workspace.of(loaded, output, offline=True))
        found["next"] = f"mmq {found['next']} {recipe}"
        output.result(found, found["work_dir"], found["stages"])
        output.hint(found["next"])
