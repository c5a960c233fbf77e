"""The `mmq` command."""

from __future__ import annotations

from typing import Annotated

import typer

import mmq
from mmq.cli.calibration import calibration
from mmq.cli.clean import clean
from mmq.cli.doctor import doctor
from mmq.cli.errors import end_process
from mmq.cli.evaluate import evaluate
from mmq.cli.output import Mode, make_output
from mmq.cli.plan import plan
from mmq.cli.push import push
from mmq.cli.recipe import recipe_app
from mmq.cli.report import report
from mmq.cli.stages import HELP, run, stage_command
from mmq.cli.synth import synth
from mmq.cli.verify import status, verify
from mmq.workdir.versions import installed_versions

app = typer.Typer(
    no_args_is_help=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    help="Quantize very large mixture-of-experts models: experts to AWQ int4, attention in its original fp8, a"
    " calibrated fp8 KV cache. Three resumable stages: dequant, awq, restore.",
)
for name, text in HELP.items():
    app.command(name, help=text)(stage_command(name))
for command in (run, plan, calibration, verify, status, clean, report, push, synth, doctor):
    app.command()(command)
app.command("eval")(evaluate)
app.add_typer(recipe_app, name="recipe")


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    json: Annotated[bool, typer.Option("--json", help="With --version: the packages' versions too, as JSON.")] = False,
) -> None:
    """Options of mmq itself."""
    if version and json:
        make_output(Mode.JSON).result(installed_versions())
    elif version:
        typer.echo(f"mmq {mmq.__version__}")
    elif json:
        raise typer.BadParameter("it goes with --version, or after a command", param_hint="--json")
    elif context.invoked_subcommand is None:
        context.fail("Missing command.")
    if version:
        raise typer.Exit


def main() -> None:
    """Entry point."""
    try:
        app()
    except SystemExit as end:
        end_process(end.code if isinstance(end.code, int) else bool(end.code))
        raise
