"""The report as one HTML file that needs nothing else, and its plots as PNG files beside it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

import mmq
from mmq.prove import evaluate
from mmq.report import plots
from mmq.report.facts import RunFacts, StageFacts, loss_share
from mmq.report.text import UNITS_OF_COUNTS, bytes_text, count_text, duration_text, plain_number, unit_for
from mmq.storage.atomic import write_bytes

FOLDER = "report"
PAGE_NAME = "report.html"
TEMPLATE = "page.html.j2"
NOTHING = "-"
SLOWEST = 4
SHOWN_PROBLEMS = 100


@dataclass(frozen=True)
class Plot:
    """A plot of the page.

    Attributes:
        name: of its file and its place in the page.
        section: the part of the page that it belongs to.
        draw: the figure, or None where the run has nothing to show.
        draw_upright: the same for narrow screens, where the first would be too small to read.
    """

    name: str
    section: str
    caption: str
    draw: Callable[[RunFacts], Figure | None]
    draw_upright: Callable[[RunFacts], Figure | None] | None = None


PLOTS = (
    Plot(
        "sizes",
        "size",
        "Bytes of the tensors, scales beside their weights.",
        lambda facts: plots.component_sizes(facts.components) if facts.components else None,
    ),
    Plot(
        "expert-tokens",
        "tokens",
        "Calibration tokens that the router sent to each expert. A white dot: fewer than min_tokens, so the expert was"
        " topped up with the tokens that its router score ranks highest, which are not counted here.",
        lambda facts: plots.expert_tokens(facts.layers) if facts.layers else None,
        lambda facts: plots.expert_tokens(facts.layers, upright=True),
    ),
    Plot(
        "token-range",
        "tokens",
        "The busiest, the median and the least used expert of each layer.",
        lambda facts: plots.token_range(facts.layers, facts.recipe["awq"]["min_tokens"]) if facts.layers else None,
    ),
    Plot(
        "kv-scales",
        "tokens",
        "Scales of keys after rotary and of values; a cached number is stored as fp8 after division by its scale.",
        lambda facts: plots.kv_scales(facts.layers) if any(layer["kv_scales"] for layer in facts.layers) else None,
    ),
    Plot(
        "block-loss",
        "scales",
        "Mean squared change of the expert block's output on the calibration tokens. Served: through the smoothed norm"
        " and router, in the precision of the checkpoint.",
        lambda facts: plots.block_loss(facts.layers) if facts.layers else None,
    ),
    Plot(
        "ratios",
        "scales",
        "AWQ's exponent as the search found it: for the norm before each block, and for w3 into w2 of each expert.",
        lambda facts: plots.chosen_ratios(facts.layers) if facts.layers else None,
    ),
    Plot(
        "hidden-errors",
        "result",
        "Norm of the difference to the source's hidden states, relative to their norm, on held-out text.",
        lambda facts: plots.hidden_errors(facts.evaluation["layers"]) if facts.evaluation else None,
    ),
    Plot(
        "weight-errors",
        "result",
        "Root mean square of the rounding of each layer's expert weights, relative to the weights, found by verify.",
        lambda facts: plots.weight_errors(facts.verify["layers"]) if facts.verify and facts.verify["layers"] else None,
    ),
    Plot(
        "stage-costs",
        "stages",
        "All runs of a stage taken together, interrupted ones included.",
        lambda facts: plots.stage_costs(facts.stages),
    ),
    Plot(
        "layer-seconds",
        "costs",
        "Parts of the awq stage. Reading is what the computation waited for; writing goes on beside the next layer.",
        lambda facts: plots.layer_seconds(facts.layers) if facts.layers else None,
    ),
    Plot(
        "layer-memory",
        "costs",
        "Resident memory of the process, and memory allocated on the device.",
        lambda facts: plots.layer_memory(facts.layers) if facts.layers else None,
    ),
)


@dataclass(frozen=True)
class Drawn:
    """A plot as PNG files, and its title as text."""

    plot: Plot
    title: str
    image: bytes
    upright: bytes | None

    @classmethod
    def of(cls, plot: Plot, facts: RunFacts) -> Drawn | None:
        figure = plot.draw(facts)
        if figure is None:
            return None
        upright = plot.draw_upright(facts) if plot.draw_upright else None
        return cls(plot, figure.get_suptitle(), plots.png(figure), plots.png(upright) if upright else None)


@dataclass(frozen=True)
class Table:
    """A table of the page; columns hold numbers unless they are named.

    Attributes:
        words, long: columns of short text, and of text that may be broken.
        total: the last row sums up the others.
    """

    name: str
    rows: list[dict[str, str]]
    words: tuple[str, ...] = ()
    long: tuple[str, ...] = ()
    total: bool = False

    @property
    def columns(self) -> list[str]:
        return list(self.rows[0])

    def kind(self, column: str) -> str:
        return "long" if column in self.long else "word" if column in self.words else "number"


@dataclass(frozen=True)
class Tile:
    """A line of the summary at the top; `mood` is "good", "bad" or nothing."""

    name: str
    value: str
    detail: str
    mood: str = ""


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
    return template.render(
        source=facts.source,
        subtitle=f"{'Finished' if facts.complete else 'Not finished yet'}: {facts.work_dir}",
        tiles=tiles(facts),
        missing=[*facts.missing, *_left_out(facts.layers)],
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
        components=_components(facts),
        layers=_layers(facts),
        evaluation=Table("evaluation", evaluate.rows(evaluation), words=("variant",)) if evaluation else None,
        evaluated=_evaluated(evaluation) if evaluation else "",
        checks=_checks(facts),
        stages=_stages(facts),
        fingerprints=_fingerprints(facts),
        versions=Table(
            "versions",
            [{"package": package, "version": version} for package, version in facts.versions.items()],
            words=("package", "version"),
        ),
        recipe=yaml.safe_dump(facts.recipe, sort_keys=False, allow_unicode=True),
        footer=f"Written by mmq {mmq.__version__} at {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
    )


def tiles(facts: RunFacts) -> list[Tile]:
    """The summary."""
    found = [_size_tile(facts), _verify_tile(facts), _evaluation_tile(facts), _time_tile(facts)]
    if facts.layers:
        found += [_loss_tile(facts.layers), _tokens_tile(facts)]
    return [*found, _memory_tile(facts.stages), _slowest_tile(facts)]


def slowest(facts: RunFacts) -> list[tuple[str, float]]:
    """Stages, and of awq its layers' parts instead, by seconds, the longest first."""
    seconds: dict[str, float] = {}
    for layer in facts.layers:
        for part, spent in layer["seconds"].items():
            seconds[f"awq: {part}"] = seconds.get(f"awq: {part}", 0.0) + spent
    seconds |= {stage.name: stage.seconds for stage in facts.stages if not (stage.name == "awq" and facts.layers)}
    return sorted(seconds.items(), key=lambda entry: -entry[1])


def _size_tile(facts: RunFacts) -> Tile:
    if not facts.components:
        return Tile("Size", "not known", "the source can't be read")
    change = f"{facts.bytes_after / facts.bytes_before:.0%} of the source; {_short(facts.parameters)} parameters"
    origin = "" if facts.sizes_measured else "; computed, not written yet"
    # A line may end before the arrow, not inside a number.
    before, after = (bytes_text(size).replace(" ", "\u00a0") for size in (facts.bytes_before, facts.bytes_after))
    return Tile("Size", f"{before} \u2192\u00a0{after}", change + origin)


def _verify_tile(facts: RunFacts) -> Tile:
    if facts.verify is None:
        return Tile("Verification", "not there", "mmq verify compares the result with its source")
    looked = f"{sum(facts.verify['checks'].values()):,} things looked at"
    if facts.verify["ok"]:
        return Tile("Verification", "passed", looked, "good")
    return Tile("Verification", "failed", f"{count_text(len(facts.verify['problems']), 'problem')}; {looked}", "bad")


def _evaluation_tile(facts: RunFacts) -> Tile:
    if facts.evaluation is None:
        return Tile("Evaluation", "not there", "mmq eval compares the result with its source on held-out text")
    variants = {entry["variant"]: entry for entry in facts.evaluation["variants"]}
    truth, result = variants[evaluate.SOURCE.name], variants[evaluate.HYBRID_MODEL.name]
    return Tile(
        "Evaluation",
        f"KL {plain_number(result['kl'], 3)} nats",
        f"to the source; perplexity {plain_number(truth['perplexity'])} \u2192 {plain_number(result['perplexity'])},"
        f" same top-1 token {result['top1_agreement']:.1%}",
    )


def _time_tile(facts: RunFacts) -> Tile:
    runs = [run for stage in facts.stages for run in stage.runs]
    if not runs:
        return Tile("Time", "not measured", "the journal tells of no run")
    began = min(run["began"] for run in runs)[:16].replace("T", " ")
    return Tile("Time", duration_text(facts.seconds), f"since {began} UTC, {count_text(len(runs), 'run')} of stages")


def _loss_tile(layers: list[dict[str, Any]]) -> Tile:
    shares = {layer["layer"]: share for layer in layers if (share := loss_share(layer)) is not None}
    if not shares:
        return Tile("AWQ against plain rounding", "no figure", "no layer's loss before and after is known")
    worst = max(shares, key=lambda layer: shares[layer])
    kept = sum(layer["identity_kept"] for layer in layers)
    return Tile(
        "AWQ against plain rounding",
        f"{median(shares.values()):.0%} of the loss",
        f"median of {count_text(len(layers), 'layer')}; at worst {shares[worst]:.0%}, layer {worst};"
        f" {kept} kept as they were",
    )


def _tokens_tile(facts: RunFacts) -> Tile:
    tokens = [count for layer in facts.layers for count in layer["tokens_per_expert"]]
    topped = sum(count > 0 for layer in facts.layers for count in layer["topped_up"])
    return Tile(
        "Experts topped up",
        f"{topped:,} of {len(tokens):,}",
        f"those below {facts.recipe['awq']['min_tokens']:,} tokens; fewest {min(tokens):,}, median"
        f" {median(tokens):,.0f}, most {max(tokens):,}",
    )


def _memory_tile(stages: list[StageFacts]) -> Tile:
    largest = max(stages, key=lambda stage: stage.peak_host_bytes)
    device = max(stage.peak_device_bytes for stage in stages)
    where = f"in {largest.name}; " if largest.peak_host_bytes else ""
    on_device = f"{bytes_text(device)} on the device" if device else "no device"
    return Tile("Peak memory", bytes_text(largest.peak_host_bytes), where + on_device)


def _slowest_tile(facts: RunFacts) -> Tile:
    found = slowest(facts)[:SLOWEST]
    names = [name for name, _ in found]
    others = [f"{name} {duration_text(seconds)}" for name, seconds in found[1:]]
    return Tile("Slowest part", names[0], "; ".join([duration_text(found[0][1]), *others]))


def _components(facts: RunFacts) -> Table | None:
    rows = [
        _component_row(
            part.name.replace("_", " "),
            part.parameters,
            (part.bytes_before, part.dtype_before),
            (part.bytes_after, part.dtype_after),
        )
        for part in facts.components
    ]
    if not rows:
        return None
    rows.append(_component_row("total", facts.parameters, (facts.bytes_before, ""), (facts.bytes_after, "")))
    return Table("components", rows, words=("component",), long=("before", "after"), total=True)


def _component_row(name: str, parameters: int, *sides: tuple[int, str]) -> dict[str, str]:
    before, after = (f"{bytes_text(size)}, {dtypes}".removesuffix(", ") if size else NOTHING for size, dtypes in sides)
    return {"component": name, "parameters": _short(parameters), "before": before, "after": after}


def _layers(facts: RunFacts) -> Table | None:
    if not facts.layers:
        return None
    # Columns that no layer has anything in are left out.
    optional: dict[str, Callable[[dict[str, Any]], str]] = {
        "k_scale": lambda layer: _number(layer["kv_scales"].get("k_scale")),
        "v_scale": lambda layer: _number(layer["kv_scales"].get("v_scale")),
        "host after": lambda layer: _bytes(layer.get("host_bytes")),
        "device peak": lambda layer: _bytes(layer.get("peak_device_bytes")),
        "open files": lambda layer: _number(layer.get("open_files")),
        "samples left out": lambda layer: _number(len(layer.get("excluded_samples", [])) or None),
    }
    shown = [name for name, cell in optional.items() if any(cell(layer) != NOTHING for layer in facts.layers)]
    rows = []
    for layer in facts.layers:
        tokens = layer["tokens_per_expert"]
        row = {
            "layer": str(layer["layer"]),
            "fewest tokens": f"{min(tokens):,}",
            "median": f"{median(tokens):,.0f}",
            "most": f"{max(tokens):,}",
            "topped up": str(sum(count > 0 for count in layer["topped_up"])),
            "loss before": _loss(layer["loss_round_to_nearest"]),
            "loss after": _loss(layer["loss_chosen"]),
            "of before": NOTHING if (share := loss_share(layer)) is None else f"{share:.1%}",
            "as served": _loss(layer["loss_propagated"]),
            "norm's ratio": f"{layer['norm']['ratio']:.2f}",
            "experts' ratio": f"{median(layer['down']['ratio']):.2f}",
            "scales used": "no" if layer["identity_kept"] else "yes",
        }
        row |= {name: optional[name](layer) for name in shown}
        row["host peak"] = _bytes(layer.get("peak_host_bytes"))
        row |= {f"{part} (s)": plain_number(seconds) for part, seconds in layer["seconds"].items()}
        row["all (s)"] = plain_number(sum(layer["seconds"].values()))
        rows.append(row)
    return Table("layers", rows)


def _checks(facts: RunFacts) -> Table | None:
    if facts.verify is None or not facts.verify["checks"]:
        return None
    checks = facts.verify["checks"].items()
    return Table("checks", [{"check": name, "looked at": f"{count:,}"} for name, count in checks], long=("check",))


def _problems(facts: RunFacts) -> list[str]:
    found: list[str] = facts.verify["problems"] if facts.verify else []
    more = len(found) - SHOWN_PROBLEMS
    return [*found[:SHOWN_PROBLEMS], *([f"and {more:,} more, in verify.json"] if more > 0 else [])]


def _evaluated(evaluation: dict[str, Any]) -> str:
    tokens = evaluation["tokens"]
    return f"{tokens['predicted']:,} predicted tokens of {count_text(tokens['samples'], 'held-out sample')}"


def _stages(facts: RunFacts) -> Table:
    rows = [
        {
            "stage": stage.name,
            "units": f"{len(stage.units)}" + (f" of {stage.planned}" if stage.planned is not None else ""),
            "runs": str(len(stage.runs)),
            "time": duration_text(stage.seconds),
            "peak host": _bytes(stage.peak_host_bytes),
            "peak device": _bytes(stage.peak_device_bytes),
        }
        for stage in facts.stages
    ]
    return Table("stages", rows, words=("stage",))


def _fingerprints(facts: RunFacts) -> Table:
    rows = [
        {
            "stage": stage.name,
            "input": name,
            "value": _value(value),
        }
        for stage in facts.stages
        for name, value in stage.fingerprint.items()
    ]
    return Table("fingerprints", rows, words=("stage", "input"), long=("value",))


def _value(value: Any) -> str:
    """JSON for people: 'num_bits: 8, type: float'."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_value(part)}" for key, part in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _bytes(count: int | None) -> str:
    return bytes_text(count) if count else NOTHING


def _loss(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3e}"


def _number(value: float | None) -> str:
    return NOTHING if value is None else plain_number(value)


def _left_out(layers: list[dict[str, Any]]) -> list[str]:
    """A sentence for every layer that could not use all calibration samples."""
    found = {layer["layer"]: layer["excluded_samples"] for layer in layers if layer.get("excluded_samples")}
    return [
        f"Layer {layer} left out the calibration samples {', '.join(map(str, samples))}: NaN or infinite values."
        for layer, samples in found.items()
    ]


def _short(count: int) -> str:
    """228700000000 -> '228.7B', 2234384 -> '2.2M', 512 -> '512'."""
    size, name = unit_for(count, UNITS_OF_COUNTS)
    return f"{count / size:.1f}{name}" if name else str(count)


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
