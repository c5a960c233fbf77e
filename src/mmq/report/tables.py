"""The tables of the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from mmq.report.facts import RunFacts, loss_share
from mmq.text import bytes_text, duration_text, plain_number, short_count

NOTHING = "-"


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


def components_table(facts: RunFacts) -> Table | None:
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
    return {"component": name, "parameters": short_count(parameters), "before": before, "after": after}


def layers_table(facts: RunFacts) -> Table | None:
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


def checks_table(facts: RunFacts) -> Table | None:
    if facts.verify is None or not facts.verify["checks"]:
        return None
    checks = facts.verify["checks"].items()
    return Table("checks", [{"check": name, "looked at": f"{count:,}"} for name, count in checks], long=("check",))


def ranks_table(facts: RunFacts) -> Table | None:
    """What each of several ranks took for the awq stage's layers, and how long it stood still for the others."""
    layers = [layer["ranks"] for layer in facts.all_layers if "ranks" in layer]
    if not layers:
        return None
    rows = []
    for number in range(max(map(len, layers))):
        own = [ranks[number] for ranks in layers if number < len(ranks)]
        seconds = sum(rank["seconds"] for rank in own)
        rows.append(
            {
                "rank": str(number),
                "host": str(own[-1]["host"]),
                "layers": str(len(own)),
                "time": duration_text(seconds),
                "waited": f"{sum(rank['waited'] for rank in own) / seconds:.1%}" if seconds else NOTHING,
                "peak host": _bytes(max(rank["peak_host_bytes"] for rank in own)),
                "peak device": _bytes(max(rank["peak_device_bytes"] for rank in own)),
            }
        )
    return Table("ranks", rows, words=("host",))


def stages_table(facts: RunFacts) -> Table:
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


def fingerprints_table(facts: RunFacts) -> Table:
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
