"""mmq verify and status."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmq.cli.errors import handled
from mmq.cli.options import Devices, Json, LogFile, Quiet, RecipePath, Set, mode, quiet_libraries, recipe_arguments
from mmq.cli.output import Output, Rows, make_output, show_checked
from mmq.cli.session import session
from mmq.errors import RecipeError
from mmq.recipe import load
from mmq.text import duration_text

if TYPE_CHECKING:
    from mmq.workdir.workspace import Workspace


def verify(
    recipe: RecipePath,
    set_: Set = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check what would be refused, and say what would be compared. Touches nothing."),
    ] = False,
    devices: Devices = None,
    json: Json = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
) -> None:
    """Prove that the finished checkpoint is what it must be; exit code 1 and a list when something is off."""
    # Checks touch nothing, a log file neither.
    written, ranks = (None, None) if dry_run else (log_file, devices)
    with session("verify", recipe, set_, mode(json, quiet), written, devices=ranks) as run:
        from mmq.machine.team import Team
        from mmq.prove.verify import checked
        from mmq.workdir.workspace import Workspace

        if dry_run:
            show_checked(run.output, checked(Workspace.of(run.recipe, run.output, offline=True)))
            return
        with run.output.live():
            team = Team.join("cpu")
            verify_and_report(Workspace.of(run.recipe, run.output, team=team), run.output)
            team.close()


def verify_and_report(workspace: Workspace, output: Output) -> None:
    """Verify, write verify.json, show the outcome. Raises VerifyError when something is off."""
    from mmq.prove.verify import verify_checkpoint

    report = verify_checkpoint(workspace)
    output.result(report.as_json(), "Verification", report.rows())
    report.require_ok()
    output.note(f"verified: {report.folder} (details in {report.path})")


def status(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="The recipe; without one, all runs below this folder.")
    ] = None,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Show how far each stage is, which process is at work, and what the next command is; or which runs there are."""
    with handled():
        output = make_output(mode(json, False))
        if recipe is None:
            _list_runs(output, set_)
            return
        loaded = load(recipe, set_)
        quiet_libraries()
        from mmq.report.status import status as read_status
        from mmq.workdir.workspace import Workspace

        found = read_status(Workspace.of(loaded, output, offline=True))
        again = recipe_arguments(recipe, set_)
        if found["next"]:
            found["next"] = shlex.join(["mmq", found["next"], *again])
        output.result(found, found["work_dir"], _rows(found["stages"]))
        removed = [f"{folder}/" for stage in found["stages"] for folder in stage["removed"]]
        if removed and not json:
            output.note(f"removed by mmq clean: {', '.join(removed)}")
        if found["running"] and not json:
            output.note(_at_work(found["running"]))
            for rank, where in enumerate(found["running"].get("ranks", [])):
                output.note(f"rank {rank}: {where or 'has said nothing yet'}")
        evaluated = any(stage["stage"] == "eval" and stage["state"] == "complete" for stage in found["stages"])
        further = "" if evaluated else f"; {shlex.join(['mmq', 'eval', *again])} compares it with its source"
        output.hint(found["next"] or f"nothing, the result is verified{further}")


def _list_runs(output: Output, set_: list[str] | None) -> None:
    """The runs at the current folder and below."""
    quiet_libraries()
    from mmq.report.status import find_runs

    if set_:
        raise RecipeError("--set changes a recipe, and none was named")
    found = find_runs(Path())
    output.result({"runs": found}, "Runs below this folder", [_run_row(run) for run in found])
    first = next((run["recipe"] for run in found if run["recipe"]), None)
    output.hint(shlex.join(["mmq", "status", first or "RECIPE"]) if found else "mmq recipe init mine.yaml")


def _run_row(run: dict[str, Any]) -> dict[str, str]:
    row = {"work_dir": run["work_dir"], "recipe": run["recipe"] or "-"}
    if "fault" in run:
        return row | {"stage": "-", "state": run["fault"], "done": "-", "left": "-", "result": "-"}
    percent = "" if run["percent"] is None else f", {run['percent']} %"
    verified = {True: "verified", False: "not right", None: "-"}[run["verified"]]
    left = "-" if run["eta_seconds"] is None else duration_text(run["eta_seconds"])
    done = f"{run['done']}{percent}"
    return row | {"stage": run["stage"] or "-", "state": run["state"], "done": done, "left": left, "result": verified}


def _rows(stages: Rows) -> Rows:
    shown = [stage | {"percent": f"{stage['percent']} %", "last": stage["last"] or "-"} for stage in stages]
    return [{key: value for key, value in stage.items() if key != "removed"} for stage in shown]


def _at_work(running: dict[str, Any]) -> str:
    """Who holds the work_dir, where it is and how long it will take, in a sentence."""
    who = f"process {running['process']} on {running['host']} since {running['since']}"
    if not running["seen"]:
        return f"at work, or stopped without a trace: {who}; whether it lives can't be seen from here"
    doing = ", ".join(filter(None, (running["unit"] or "ending", running["part"], running["at"])))
    what = f", {running['stage']}: {doing}" if running["stage"] else ""
    eta = running["eta_seconds"]
    return f"at work: {who}{what}" + ("" if eta is None else f", {duration_text(eta)} left of this stage")
