"""mmq dequant, awq, restore and run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmq.cli.options import DryRun, Json, LogFile, Quiet, RecipePath, Restart, Set, mode
from mmq.cli.output import Mode, Output
from mmq.cli.session import session
from mmq.text import bytes_text

if TYPE_CHECKING:
    from mmq.run.workspace import Workspace


HELP = {
    "dequant": "Stage 1: dequantize the fp8 checkpoint to bf16.",
    "awq": "Stage 2: AWQ the experts to int4 and calibrate the KV cache's scales, layer by layer.",
    "restore": "Stage 3: put the original fp8 attention back.",
    "run": "All stages in order, then verify and a report. Resumes where it was stopped.",
}


def stage_command(name: str) -> Callable[..., None]:
    """The command of one stage, or of all of them for `run`."""

    def command(
        recipe: RecipePath,
        set_: Set = None,
        dry_run: DryRun = False,
        restart: Restart = False,
        json: Json = False,
        quiet: Quiet = False,
        log_file: LogFile = None,
    ) -> None:
        _run(name, recipe, set_, dry_run, restart, mode(json, quiet), log_file)

    return command


def _run(
    command: str,
    path: Path,
    overrides: list[str] | None,
    dry_run: bool,
    restart: bool,
    shown: Mode,
    log_file: Path | None,
) -> None:
    # A plan touches nothing, a log file neither.
    with session(command, path, overrides, shown, None if dry_run else log_file) as run:
        from mmq.run.workspace import Workspace
        from mmq.stages.pipeline import run_stages, stages_of

        whole = command == "run"
        names = stages_of(run.recipe) if whole else [command]
        workspace = Workspace.of(run.recipe, run.output, offline=dry_run)
        if dry_run:
            _show_plans(workspace, names, run.output)
            return
        with run.output.live():
            run_stages(workspace, names, restart)
            if whole:
                from mmq.cli.report import write_and_note
                from mmq.cli.verify import verify_and_report

                verify_and_report(workspace, run.output)
                write_and_note(workspace, run.output)
        if not whole:
            run.hint({"dequant": "awq", "awq": "restore", "restore": "verify"}[command])


def _show_plans(workspace: Workspace, names: list[str], output: Output) -> None:
    from mmq.stages.pipeline import describe, plans

    described = [describe(workspace, plan) for plan in plans(workspace, names)]
    rows: list[dict[str, Any]] = [
        {
            "stage": plan["stage"],
            "output": plan["folder"],
            "files": plan["files"],
            "read": bytes_text(plan["bytes_read"]),
            "written": bytes_text(plan["bytes_written"]),
            "peak memory": bytes_text(plan["host_memory"]),
            "on the device": bytes_text(plan["device_memory"]) if plan["device_memory"] else "-",
            "free disk": bytes_text(plan["free_disk"]),
        }
        for plan in described
    ]
    output.result({"plan": described}, "Plan (nothing was touched)", rows)
