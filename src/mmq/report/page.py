"""The report as one HTML file that needs nothing else, and its plots as PNG files beside it."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

import mmq
from mmq.prove import by_layer, evaluate
from mmq.report.facts import RunFacts
from mmq.report.plots import PLOTS, Drawn
from mmq.report.tables import (
    Table,
    checks_table,
    components_table,
    fingerprints_table,
    layers_table,
    ranks_table,
    stages_table,
)
from mmq.report.tiles import tiles
from mmq.storage.atomic import write_bytes
from mmq.text import count_text

FOLDER = "report"
PAGE_NAME = "report.html"
TEMPLATE = "page.html.j2"
SHOWN_PROBLEMS = 100


@dataclass(frozen=True)
class Written:
    """What was written, and what the run still lacks, a sentence each."""

    page: Path
    plots: list[Path]
    missing: list[str]


def write_report(facts: RunFacts) -> Written:
    """Write the page and the plots into `report/` of the work_dir.

    Raises:
        DiskSpaceError: the disk is full.
    """
    drawn = [found for plot in PLOTS if (found := Drawn.of(plot, facts)) is not None]
    page = render(facts, drawn)
    folder = facts.work_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for found in drawn:
        written.append(folder / f"{found.plot.name}.png")
        write_bytes(written[-1], found.image)
    for plot in PLOTS:
        # What an earlier report showed and this one does not.
        if (stale := folder / f"{plot.name}.png") not in written:
            stale.unlink(missing_ok=True)
    write_bytes(folder / PAGE_NAME, page.encode())
    return Written(folder / PAGE_NAME, written, facts.missing)


def render(facts: RunFacts, drawn: list[Drawn]) -> str:
    """The page. What the run's files say is text and never markup."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))
    evaluation = facts.evaluation
    kinds, worst = (evaluate.kind_rows(evaluation), evaluate.worst(evaluation)) if evaluation else ([], [])
    return template.render(
        source=facts.source,
        subtitle=f"{'Finished' if facts.complete else 'Not finished yet'}: {facts.work_dir}",
        tiles=tiles(facts),
        missing=[*facts.missing, *_left_out(facts.all_layers)],
        problems=_problems(facts),
        plots=[
            {
                "name": found.plot.name,
                "section": found.plot.section,
                "caption": found.plot.caption,
                "title": found.title,
                "image": _data(found.image),
                "upright": _data(found.upright) if found.upright else "",
            }
            for found in drawn
        ],
        components=components_table(facts),
        layers=layers_table(facts),
        evaluation=Table("evaluation", evaluate.rows(evaluation), words=("variant",)) if evaluation else None,
        brought=evaluate.brought(evaluation) if evaluation else None,
        by_layer=Table("by-layer", by_layer.rows(facts.by_layer)) if facts.by_layer else None,
        by_layer_told=evaluate.told_by_layer(facts.by_layer, evaluation) if facts.by_layer else "",
        kinds=Table("kinds", kinds, words=("KL by kind of text",)) if kinds else None,
        worst=Table("worst", worst, words=("name",)) if worst else None,
        evaluated=_evaluated(evaluation) if evaluation else "",
        checks=checks_table(facts),
        stages=stages_table(facts),
        ranks=ranks_table(facts),
        fingerprints=fingerprints_table(facts),
        versions=Table(
            "versions",
            [{"package": package, "version": version} for package, version in facts.versions.items()],
            words=("package", "version"),
        ),
        recipe=yaml.safe_dump(facts.recipe, sort_keys=False, allow_unicode=True),
        footer=f"Written by mmq {mmq.__version__} at {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
    )


def _problems(facts: RunFacts) -> list[str]:
    found: list[str] = facts.verify["problems"] if facts.verify else []
    more = len(found) - SHOWN_PROBLEMS
    return [*found[:SHOWN_PROBLEMS], *([f"and {more:,} more, in verify.json"] if more > 0 else [])]


def _evaluated(evaluation: dict[str, Any]) -> str:
    tokens = evaluation["tokens"]
    return f"{tokens['predicted']:,} predicted tokens of {count_text(tokens['samples'], 'held-out sample')}"


def _left_out(layers: list[dict[str, Any]]) -> list[str]:
    """A sentence for every layer that could not use all calibration samples."""
    found = {layer["layer"]: layer["excluded_samples"] for layer in layers if layer.get("excluded_samples")}
    return [
        f"Layer {layer} left out the calibration samples {', '.join(map(str, samples))}: NaN or infinite values."
        for layer, samples in found.items()
    ]


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
