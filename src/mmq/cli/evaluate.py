"""mmq eval."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from mmq.cli.errors import handled
from mmq.cli.options import Json, Quiet, RecipePath, Restart, Set, mode, quiet_libraries
from mmq.cli.output import make_output
from mmq.recipe import load


def evaluate(
    recipe: RecipePath,
    data: Annotated[
        Path | None,
        typer.Option(help="Held-out JSONL, as for calibration. [default: calibration_data/eval.jsonl of the project]"),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Lines from the top. [default: all]")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens kept of each sample. [default: as many as calibration keeps]")
    ] = None,
    set_: Set = None,
    restart: Restart = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare the hybrid checkpoint with its source on held-out text: perplexity, KL, top-1 agreement."""
    options = {"--data": data, "--samples": samples, "--sequence-length": sequence_length}
    again = [str(recipe), *(part for override in set_ or [] for part in ("--set", override))]
    again += [part for key, value in options.items() if value is not None for part in (key, str(value))]
    with handled(shlex.join(["mmq", "eval", *again])):
        output = make_output(mode(json, quiet))
        loaded = load(recipe, set_)
        quiet_libraries()
        from mmq.evaluate import DEFAULT_DATA, REPORT_NAME, EvalSettings, evaluate_checkpoint, rows
        from mmq.workspace import Workspace

        # A path on the command line starts from the current folder, the default one from the project's.
        path = str(data.expanduser().resolve()) if data else DEFAULT_DATA
        settings = EvalSettings(path, samples, sequence_length)
        with output.live():
            report = evaluate_checkpoint(Workspace.of(loaded, output), settings, restart)
        tokens = report["tokens"]
        title = f"{tokens['predicted']:,} tokens of {tokens['samples']} held-out samples"
        output.result(report, title, rows(report))
        output.note(f"evaluated: details in {loaded.work_path / REPORT_NAME}")
