"""mmq verify and status."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from mmq.cli.errors import handled
from mmq.cli.options import Json, LogFile, Quiet, RecipePath, Set, mode, quiet_libraries, recipe_arguments
from mmq.cli.output import Output, Rows, make_output
from mmq.cli.session import session
from mmq.errors import VerifyError
from mmq.recipe import load
from mmq.text import duration_text

if TYPE_CHECKING:
    from mmq.run.workspace import Workspace

SHOWN_PROBLEMS = 20


def verify(
    recipe: RecipePath, set_: Set = None, json: Json = False, quiet: Quiet = False, log_file: LogFile = None
) -> None:
    """Prove that the finished checkpoint is what it must be; exit code 1 and a list when something is off."""
    with session("verify", recipe, set_, mode(json, quiet), log_file) as run:
        from mmq.run.workspace import Workspace

        with run.output.live():
            verify_and_report(Workspace.of(run.recipe, run.output), run.output)


def verify_and_report(workspace: Workspace, output: Output) -> None:
    """Verify, write verify.json, show the outcome. Raises VerifyError when something is off."""
    from mmq.prove.verify import verify_checkpoint

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
    """Show how far each stage is, which process is at work, and what the next command is."""
    with handled():
        output = make_output(mode(json, False))
        loaded = load(recipe, set_)
        quiet_libraries()
        from mmq.report.status import status as read_status
        from mmq.run.workspace import Workspace

        found = read_status(Workspace.of(loaded, output, offline=True))
        again = recipe_arguments(recipe, set_)
        if found["next"]:
            found["next"] = shlex.join(["mmq", found["next"], *again])
        output.result(found, found["work_dir"], _rows(found["stages"]))
        if found["running"] and not json:
            output.note(_at_work(found["running"]))
        evaluated = any(stage["stage"] == "eval" and stage["state"] == "complete" for stage in found["stages"])
        further = "" if evaluated else f"; {shlex.join(['mmq', 'eval', *again])} compares it with its source"
        output.hint(found["next"] or f"nothing, the result is verified{further}")


def _rows(stages: Rows) -> Rows:
    return [stage | {"percent": f"{stage['percent']} %", "last": stage["last"] or "-"} for stage in stages]


def _at_work(running: dict[str, Any]) -> str:
    """Who holds the work_dir, where it is and how long it will take, in a sentence."""
    who = f"process {running['process']} on {running['host']} since {running['since']}"
    if not running["seen"]:
        return f"at work, or stopped without a trace: {who}; whether it lives can't be seen from here"
    what = f", {running['stage']}: {running['unit'] or 'ending'}" if running["stage"] else ""
    eta = running["eta_seconds"]
    return f"at work: {who}{what}" + ("" if eta is None else f", {duration_text(eta)} left of this stage")
