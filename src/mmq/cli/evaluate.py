"""mmq eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmq.cli.options import Devices, Json, LogFile, Quiet, RecipePath, Restart, Set, mode
from mmq.cli.output import show_checked
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
    against: Annotated[
        Path | None,
        typer.Option(help="Another recipe of the same source: evaluate its result as well, and compare the two."),
    ] = None,
    by_layer: Annotated[
        bool,
        typer.Option(
            "--by-layer",
            help="Evaluate each layer by itself as well, quantized alone: as many forwards as half the square of the"
            " number of layers.",
        ),
    ] = False,
    set_: Set = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check what would be refused: result, samples, disk. Touches nothing."),
    ] = False,
    restart: Restart = False,
    devices: Devices = None,
    json: Json = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
) -> None:
    """Compare the hybrid checkpoint with its source on held-out text: perplexity, KL, top-1 agreement."""
    given = {"--against": against, "--data": data, "--samples": samples, "--sequence-length": sequence_length}
    options = [part for key, value in given.items() if value is not None for part in (key, str(value))]
    options += ["--by-layer"] if by_layer else []
    # Checks touch nothing, a log file neither.
    written, ranks = (None, None) if dry_run else (log_file, devices)
    with session("eval", recipe, set_, mode(json, quiet), written, options, ranks) as run:
        from mmq.machine.team import Team
        from mmq.prove.compare import COMPARISON_NAME, cache_share, compare, compared, sentence
        from mmq.prove.evaluate import (
            REPORT_NAME,
            brought,
            checked,
            evaluate_checkpoint,
            kind_rows,
            rows,
            told_by_layer,
            told_routing,
            worst,
        )
        from mmq.prove.streamed import DEFAULT_DATA, EvalSettings
        from mmq.recipe import load
        from mmq.storage.atomic import write_json
        from mmq.workdir.workspace import Workspace

        # A path on the command line starts from the current folder, one in a recipe from the project's.
        path = DEFAULT_DATA if data is None else str(data)
        if not is_builtin(path):
            path = str(Path(path).expanduser().resolve())
        settings = EvalSettings(path, samples, sequence_length)
        if dry_run:
            found = checked(Workspace.of(run.recipe, run.output, offline=True), settings, restart, by_layer)
            show_checked(run.output, found)
            return
        team = Team.join(run.recipe.awq.device)
        with run.output.live():
            report = evaluate_checkpoint(Workspace.of(run.recipe, run.output, team=team), settings, restart, by_layer)
            if against is not None:
                rival = load(against)
                other = evaluate_checkpoint(Workspace.of(rival, run.output, team=team), settings, restart)
            team.close()
            if not team.leads:
                return
            if against is not None:
                report |= {"against": [compare(report, other, variant) for variant in compared(report, other)]}
                write_json(run.recipe.work_path / COMPARISON_NAME, {"recipe": str(against), "found": report["against"]})
        tokens = report["tokens"]
        title = f"{tokens['predicted']:,} tokens of {tokens['samples']} held-out samples"
        run.output.result(report, title, rows(report))
        for share in (brought(report), cache_share(report), told_routing(report)):
            if share is not None:
                run.output.note(share)
        if by_layer:
            run.output.note(told_by_layer(report["by_layer"], report))
        for row in kind_rows(report):
            kinds = (f"{kind} {kl}" for kind, kl in list(row.items())[1:])
            run.output.note(f"KL of {row['KL by kind of text']}: {', '.join(kinds)}")
        run.output.note("farthest from the source: " + "; ".join(map(_place, worst(report))))
        for found in report.get("against", []):
            run.output.note(sentence(found, recipe.stem, against.stem if against else ""))
        run.output.note(f"evaluated: details in {run.recipe.work_path / REPORT_NAME}")
        run.hint("report")


def _place(sample: dict[str, Any]) -> str:
    """A sample and its KL in a few words."""
    name = f" ({sample['name']})" if sample["name"] else ""
    return f"sample {sample['sample']}{name}, KL {sample['KL (nats)']}"
