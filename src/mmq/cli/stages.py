"""mmq dequant, awq, restore and run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmq.cli.options import Devices, DryRun, GpusOption, Json, LogFile, Quiet, RecipePath, Restart, Set, mode
from mmq.cli.output import Mode, Output, checks
from mmq.cli.session import session
from mmq.text import bytes_text

if TYPE_CHECKING:
    from mmq.workdir.workspace import Workspace


HELP = {
    "dequant": "Stage 1: dequantize the fp8 checkpoint to bf16.",
    "awq": "Stage 2: AWQ the experts to int4 and calibrate the KV cache's scales, layer by layer.",
    "restore": "Stage 3: put the original fp8 attention back.",
}


def stage_command(name: str) -> Callable[..., None]:
    """The command of one stage."""

    def command(
        recipe: RecipePath,
        set_: Set = None,
        dry_run: DryRun = False,
        restart: Restart = False,
        devices: Devices = None,
        json: Json = False,
        quiet: Quiet = False,
        log_file: LogFile = None,
    ) -> None:
        _run(name, recipe, set_, dry_run, restart, mode(json, quiet), log_file, devices=devices)

    return command


def run(
    recipe: RecipePath,
    gpus: GpusOption = None,
    set_: Set = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    devices: Devices = None,
    json: Json = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
) -> None:
    """All stages in order, then verify and a report. Resumes where it was stopped."""
    _run("run", recipe, set_, dry_run, restart, mode(json, quiet), log_file, gpus, devices)


def _run(
    command: str,
    path: Path,
    overrides: list[str] | None,
    dry_run: bool,
    restart: bool,
    shown: Mode,
    log_file: Path | None,
    gpus: str | None = None,
    devices: int | None = None,
) -> None:
    options = ["--gpus", gpus] if gpus else []
    # A plan touches nothing, a log file neither.
    with session(
        command, path, overrides, shown, None if dry_run else log_file, options, None if dry_run else devices
    ) as run:
        from mmq.machine.team import Team
        from mmq.serve.memory import Gpus
        from mmq.stages.pipeline import run_stages, stages_of
        from mmq.workdir.workspace import Workspace

        whole = command == "run"
        machines = Gpus.parse(gpus) if gpus else None
        names = stages_of(run.recipe) if whole else [command]
        if dry_run:
            _show_plans(Workspace.of(run.recipe, run.output, offline=True), names, run.output, restart, shown)
            return
        team = Team.join(run.recipe.awq.device)
        workspace = Workspace.of(run.recipe, run.output, team=team)
        with run.output.live():
            run_stages(workspace, names, restart)
            if whole:
                from mmq.cli.report import write_and_note
                from mmq.cli.verify import verify_and_report

                verify_and_report(workspace, run.output)
            team.close()
            if not team.leads:
                return
            if whole:
                facts, _ = write_and_note(workspace, run.output)
        if whole:
            from mmq.report.summary import summarize

            summary = summarize(workspace, facts, machines)
            run.output.result({"summary": summary.as_json()}, "What was made", summary.rows())
            for warning in summary.warnings:
                run.output.note(f"warning: {warning}")
            run.output.hint(summary.serve)
        else:
            run.hint({"dequant": "awq", "awq": "restore", "restore": "verify"}[command])


def _show_plans(workspace: Workspace, names: list[str], output: Output, restart: bool, shown: Mode) -> None:
    from mmq.stages.pipeline import checked, describe, plans

    looked_at = checks(checked(workspace, names, restart))
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
    if shown is not Mode.JSON:
        output.result({}, "Checked", looked_at)
    output.result({"plan": described, "checks": looked_at}, "Plan (nothing was touched)", rows)
