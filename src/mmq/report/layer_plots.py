"""Plots of what the awq stage found in each layer: tokens of the experts, losses, ratios, KV scales.

One function each, from what a run measured to a figure. The title says what is to be seen.
"""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mmq.report.style import (
    BLUE,
    GREY,
    NARROW,
    ORANGE,
    PERCENT,
    RED,
    SKY,
    TALL,
    WIDE,
    WIDTH,
    Layers,
    add_legend,
    empty_figure,
    layer_axis,
    marker,
    new_figure,
    plain_log_axis,
    scale_axis,
    styled,
)
from mmq.text import plain_number, range_text


@styled
def expert_tokens(layers: Layers, upright: bool = False) -> Figure:
    """Heat map of the tokens that the router sent to each expert of each layer; topped up experts have a dot.

    Args:
        upright: experts go down instead of across, for narrow screens.
    """
    tokens = np.array([layer["tokens_per_expert"] for layer in layers])
    topped = np.array([layer["topped_up"] for layer in layers]) > 0
    empty = tokens == 0
    first = layers[0]["layer"]
    found = f"{topped.sum():,} of {topped.size:,} topped up, {empty.sum():,} without any"
    title = f"Tokens per expert: {found}"
    count, experts = tokens.shape
    if upright:
        size = (NARROW, 1.7 + _within(min(0.2 * experts, 1.6), 0.031 * experts, 10))
        cell = 72 * min(0.8 * size[0] / count, (size[1] - 1.6) / experts)
        tokens, topped = tokens.T, topped.T
    else:
        size = (WIDE, 1.5 + _within(min(0.4 * count, 1.2), 0.088 * count, 10))
        cell = 72 * min(0.85 * size[0] / experts, (size[1] - 1.4) / count)
    figure, axes = new_figure(title, size)
    seen = np.ma.masked_equal(tokens, 0)
    # A few experts that are far from all others must not take the contrast from these.
    some = seen.compressed() if seen.count() else np.array([1])
    low = float(np.percentile(some, 0.5, method="lower"))
    high = max(2 * low, float(np.percentile(some, 99.5, method="higher")))
    begin, end = first - 0.5, first + count - 0.5
    extent = (begin, end, experts - 0.5, -0.5) if upright else (-0.5, experts - 0.5, end, begin)
    image = axes.imshow(
        seen,
        cmap=matplotlib.colormaps["viridis"].with_extremes(bad=RED),
        norm=LogNorm(low, high),
        aspect="auto",
        interpolation="nearest",
        extent=extent,
    )
    rows, columns = np.nonzero(topped)
    x, y = (columns + first, rows) if upright else (columns, rows + first)
    edge = 0.8 if cell > 8 else 0
    axes.scatter(x, y, s=_within(1.2, 0.62 * cell, 7) ** 2, c="white", edgecolors="black", linewidths=edge)
    axes.grid(False)
    axes.set_xlabel("decoder layer" if upright else "expert")
    axes.set_ylabel("expert" if upright else "decoder layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=9 if upright else 16))
    place: dict[str, Any] = {"location": "top", "aspect": 34} if upright else {"aspect": 5 * size[1]}
    bar = figure.colorbar(image, ax=axes, pad=0.01, extend=_extend(seen, low, high), **place)
    plain_log_axis(bar.ax.xaxis if upright else bar.ax.yaxis, low, high)
    bar.set_label("tokens")
    dot = Line2D([], [], marker="o", markersize=5, linestyle="", markerfacecolor="white", markeredgecolor="black")
    handles: list[tuple[Any, str]] = [(dot, "topped up")] if topped.any() else []
    handles += [(Patch(color=RED), "no tokens")] if empty.any() else []
    add_legend(figure, handles)
    return figure


@styled
def token_range(layers: Layers, minimum: int) -> Figure:
    """Fewest, median and most tokens of an expert, by layer."""
    tokens = np.array([layer["tokens_per_expert"] for layer in layers])
    fewest, median, most = tokens.min(1), np.median(tokens, 1), tokens.max(1)
    title = f"An expert of a layer gets {range_text(f'{fewest.min():,}', f'{most.max():,}')} tokens"
    figure, axes = new_figure(title)
    x = layer_axis(axes, layers)
    spread = axes.fill_between(x, fewest, most, color=SKY, alpha=0.3, linewidth=0)
    (high,) = axes.plot(x, most, color=SKY, marker=marker(x))
    (middle,) = axes.plot(x, median, color=BLUE, marker=marker(x))
    (low,) = axes.plot(x, fewest, color=RED, marker=marker(x))
    handles: list[tuple[Any, str]] = [((spread, high), "most"), (middle, "median"), (low, "fewest")]
    if minimum:
        handles.append((axes.axhline(minimum, color="black", linewidth=1, linestyle="--"), f"min_tokens = {minimum:,}"))
    if fewest.min() > 0:
        scale_axis(axes, np.concatenate([fewest, most, [minimum or fewest.min()]]))
    else:
        axes.set_yscale("symlog", linthresh=1)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))
        axes.set_ylim(-0.15, 1.6 * most.max())
    axes.set_ylabel("tokens of an expert")
    add_legend(figure, handles)
    return figure


@styled
def block_loss(layers: Layers) -> Figure:
    """Mean squared change of each block's output: plain rounding, with the chosen scales, and as it will be served."""
    before, chosen, served = (
        np.array([layer[key] for layer in layers], dtype=float)
        for key in ("loss_round_to_nearest", "loss_chosen", "loss_propagated")
    )
    shares = [100 * np.divide(own, before, out=np.ones_like(own), where=before > 0) for own in (chosen, served)]
    # A loss that was too large for a number leaves a gap.
    known = shares[0][np.isfinite(shares[0])]
    found = range_text(f"{known.min():.0f}%", f"{known.max():.0f}%") if known.size else "an unknown share"
    figure = empty_figure(f"{found[:1].upper()}{found[1:]} of plain rounding's block loss is left", (WIDTH, TALL))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    x = layer_axis(lower, layers)
    handles: list[tuple[Any, str]] = []
    for values, colour, label in (
        (before, GREY, "round-to-nearest (before)"),
        (chosen, BLUE, "chosen scales (after)"),
        (served, ORANGE, "after, as it is served"),
    ):
        handles += [(upper.plot(x, values, color=colour, marker=marker(x))[0], label)]
    lower.axhline(100, color=GREY)
    for values, colour in zip(shares, (BLUE, ORANGE), strict=True):
        lower.plot(x, values, color=colour, marker=marker(x))
    kept = np.array([layer["identity_kept"] for layer in layers])
    if kept.any():
        marks = upper.scatter(x[kept], chosen[kept], marker="x", color=RED, s=26, zorder=3)
        handles.append((marks, f"no scales were better ({kept.sum()})"))
    scale_axis(upper, np.concatenate([before, chosen, served]))
    scale_axis(lower, np.concatenate([*shares, [100.0]]))
    lower.yaxis.set_major_formatter(PERCENT)
    upper.set_ylabel("mean squared error")
    lower.set_ylabel("share of before")
    add_legend(figure, handles, columns=2)
    return figure


@styled
def chosen_ratios(layers: Layers) -> Figure:
    """The grid's ratio that each layer's norm got, over how many experts' up got which."""
    norm = np.array([_one(layer["norm"]["ratio"]) for layer in layers])
    experts = np.array([layer["down"]["ratio"] for layer in layers])
    values = np.unique(np.concatenate([norm, experts.ravel()]).round(4))
    step = float(np.diff(values).min()) if len(values) > 1 else 0.05
    bins = round((values.max() - values.min()) / step) + 1
    bottom = values.min() - step / 2
    numbers = np.rint((experts - values.min()) / step).astype(int)
    counts = np.stack([np.bincount(row, minlength=bins) for row in numbers], axis=1)
    norms, median = range_text(f"{norm.min():.2f}", f"{norm.max():.2f}"), float(np.median(experts))
    figure, axes = new_figure(f"Chosen ratios: norms {norms}, median expert {median:.2f}", (WIDTH, TALL))
    x = layer_axis(axes, layers)
    edges = np.append(x - 0.5, x[-1] + 0.5)
    mesh = axes.pcolormesh(
        edges, bottom + step * np.arange(bins + 1), np.ma.masked_equal(counts, 0), cmap="Blues", vmin=0
    )
    line = axes.plot(x, norm, color=ORANGE, marker="o", markersize=4, markeredgecolor="black", markeredgewidth=0.5)[0]
    axes.set_ylabel("ratio (0: weights alone)")
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=30)
    bar.locator = MaxNLocator(integer=True, nbins=6)
    bar.update_ticks()
    bar.set_label("experts with this ratio")
    add_legend(figure, [(line, "the layer's norm"), (Patch(color="#6baed6"), "its experts")])
    return figure


@styled
def kv_scales(layers: Layers) -> Figure:
    """The fp8 KV cache's scales: the largest key and value of each layer, divided by e4m3's 448."""
    figure, axes = new_figure("KV cache scales: the range that fp8 must cover")
    x = layer_axis(axes, layers)
    names = {"k_scale": "keys (k_scale)", "v_scale": "values (v_scale)"}
    everything = []
    handles = []
    for colour, (name, label) in zip((BLUE, ORANGE), names.items(), strict=True):
        values = np.array([layer["kv_scales"].get(name, np.nan) for layer in layers], dtype=float)
        everything.append(values)
        handles.append((axes.plot(x, values, color=colour, marker=marker(x))[0], label))
    scale_axis(axes, np.concatenate(everything))
    axes.set_ylabel("scale")
    add_legend(figure, handles)
    return figure


def _within(low: float, value: float, high: float) -> float:
    return min(max(low, value), high)


def _extend(values: Any, low: float, high: float) -> str:
    """Which ends of a colour bar stand for more than they say."""
    below, above = bool((values < low).any()), bool((values > high).any())
    return {(True, True): "both", (True, False): "min", (False, True): "max"}.get((below, above), "neither")


def _one(value: Any) -> float:
    """A number, or a list with one."""
    return float(value[0] if isinstance(value, list) else value)
