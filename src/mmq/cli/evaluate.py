"""mmq eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmq.cli.options import Json, LogFile, Quiet, RecipePath, Restart, Set, mode
from mmq.cli.session import session
from mmq.shipped import is_builtin


def evaluate(
    recipe: RecipePath,
    data: Annotated[
        Path | None,
        typer.Option(help="Held-out JSONL, as for calibration. [default: builtin:eval, which mmq ships]"),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Lines from the top. [default: all]")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens kept of each sample. [default: as many as calibration keeps]")
    ] = None,
    set_: Set = None,
    restart: Restart = False,
    json: Json = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
) -> None:
    """Compare the hybrid checkpoint with its source on held-out text: perplexity, KL, top-1 agreement."""
    given = {"--data": data, "--samples": samples, "--sequence-length": sequence_length}
    options = [part for key, value in given.items() if value is not None for part in (key, str(value))]
    with session("eval", recipe, set_, mode(json, quiet), log_file, options) as run:
        from mmq.prove.evaluate import DEFAULT_DATA, REPORT_NAME, EvalSettings, evaluate_checkpoint, rows
        from mmq.workdir.workspace import Workspace

        # A path on the command line starts from the current folder, one in a recipe from the project's.
        path = DEFAULT_DATA if data is None else str(data)
        if not is_builtin(path):
            path = str(Path(path).expanduser().resolve())
        settings = EvalSettings(path, samples, sequence_length)
        with run.output.live():
            report = evaluate_checkpoint(Workspace.of(run.recipe, run.output), settings, restart)
        tokens = report["tokens"]
        title = f"{tokens['predicted']:,} tokens of {tokens['samples']} held-out samples"
        run.output.result(report, title, rows(report))
        run.output.note(f"evaluated: details in {run.recipe.work_path / REPORT_NAME}")
        run.hint("report")
