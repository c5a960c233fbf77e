"""The `mmq` command."""

from __future__ import annotations

from typing import Annotated

import typer

import mmq
from mmq.cli.calibration import calibration
from mmq.cli.doctor import doctor
from mmq.cli.evaluate import evaluate
from mmq.cli.plan import plan
from mmq.cli.push import push
from mmq.cli.recipe import recipe_app
from mmq.cli.report import report
from mmq.cli.stages import HELP, stage_command
from mmq.cli.synth import synth
from mmq.cli.verify import status, verify

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize very large mixture-of-experts models: experts to AWQ int4, attention in its original fp8, a"
    " calibrated fp8 KV cache. Three resumable stages: dequant, awq, restore.",
)
for name, text in HELP.items():
    app.command(name, help=text)(stage_command(name))
for command in (plan, calibration, verify, status, report, push, synth, doctor):
    app.command()(command)
app.command("eval")(evaluate)
app.add_typer(recipe_app, name="recipe")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mmq {mmq.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of mmq itself."""


def main() -> None:
    """Entry point."""
    app()
