"""Options that several commands share. Nothing heavy is imported here: `mmq --help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmq.cli.output import Mode

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field of the recipe, e.g. awq.n_grid=10. Repeatable."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan: files, bytes, memory, disk. Touches nothing.")]
Restart = Annotated[bool, typer.Option("--restart", help="Begin the stage anew instead of resuming it.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]
LogFile = Annotated[
    Path | None,
    typer.Option(
        "--log-file",
        metavar="PATH",
        help="Append to this file what happens (10 MB, five older ones kept), and go on when the terminal closes.",
    ),
]
GpusOption = Annotated[
    str | None,
    typer.Option("--gpus", metavar="NxSIZE", help="Say how the result fits on N GPUs of SIZE each, e.g. 4x48GiB."),
]
Devices = Annotated[
    int | None,
    typer.Option(
        "--devices",
        metavar="N",
        min=1,
        help="Work with N processes on this machine, each on a GPU of its own, or on a CPU's cores; as `torchrun"
        " --nproc-per-node N -m mmq ...` does.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def mode(json: bool, quiet: bool) -> Mode:
    """The output mode that the flags ask for."""
    if json:
        return Mode.JSON
    return Mode.QUIET if quiet else Mode.HUMAN


def recipe_arguments(recipe: Path, overrides: list[str] | None) -> list[str]:
    """The recipe and its overrides as a command line names them."""
    return [str(recipe), *(part for override in overrides or [] for part in ("--set", override))]


def quiet_libraries() -> None:
    """llmcompressor and transformers log on their own; what matters of it mmq reports itself."""
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("LLM_COMPRESSOR_LOG_DISABLED", "true")
