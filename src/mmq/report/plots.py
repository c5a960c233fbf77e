"""The report's plots: one function each, from what a run measured to a figure. The title says what is to be seen.

Figures are made without pyplot, which would keep them in a global list. Colours are Okabe and Ito's, and viridis: both
can be told apart by colour-blind readers.
"""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mmq.report.facts import Component, StageFacts
from mmq.report.text import UNITS_OF_BYTES, UNITS_OF_TIME, bytes_text, duration_text, plain_number, range_text, unit_for

Layers = Sequence[dict[str, Any]]
Array = np.ndarray[Any, np.dtype[Any]]

ORANGE, SKY, GREEN, BLUE, RED, PINK, GREY = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#777777"
LINES = (BLUE, ORANGE, GREEN, PINK, SKY, RED)
PART_COLOURS = {
    "reading": ORANGE,
    "attention": PINK,
    "searching": BLUE,
    "quantizing": GREEN,
    "propagating": SKY,
    "writing": "#BBBBBB",
}
STYLE: Any = {
    "font.size": 9.5,
    "figure.titlesize": 10.5,
    "figure.titleweight": "bold",
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.06,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    # Labels are text, whatever signs they hold.
    "text.parse_math": False,
}
# Inches. A plot fills half the page's width on a desk, or all of a telephone's, where its text is still legible.
WIDTH, HEIGHT, TALL = 4.9, 3.3, 4.3
WIDE, NARROW = 10.2, 3.9
DPI = 190
TITLE_CHARACTERS = 11.6  # in an inch
PERCENT = FuncFormatter(lambda value, _: f"{value:.4g}%")


P = ParamSpec("P")
T = TypeVar("T")


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Draw in this module's style; matplotlib reads it whenever something is made."""

    @functools.wraps(draw)
    def within(*args: P.args, **kwargs: P.kwargs) -> T:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return within


@styled
def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


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
    figure, axes = _figure(title, size)
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
    _plain_log_axis(bar.ax.xaxis if upright else bar.ax.yaxis, low, high)
    bar.set_label("tokens")
    dot = Line2D([], [], marker="o", markersize=5, linestyle="", markerfacecolor="white", markeredgecolor="black")
    handles: list[tuple[Any, str]] = [(dot, "topped up")] if topped.any() else []
    handles += [(Patch(color=RED), "no tokens")] if empty.any() else []
    _legend(figure, handles)
    return figure


@styled
def token_range(layers: Layers, minimum: int) -> Figure:
    """Fewest, median and most tokens of an expert, by layer."""
    tokens = np.array([layer["tokens_per_expert"] for layer in layers])
    fewest, median, most = tokens.min(1), np.median(tokens, 1), tokens.max(1)
    title = f"An expert of a layer gets {range_text(f'{fewest.min():,}', f'{most.max():,}')} tokens"
    figure, axes = _figure(title)
    x = _layer_axis(axes, layers)
    spread = axes.fill_between(x, fewest, most, color=SKY, alpha=0.3, linewidth=0)
    (high,) = axes.plot(x, most, color=SKY, marker=_marker(x))
    (middle,) = axes.plot(x, median, color=BLUE, marker=_marker(x))
    (low,) = axes.plot(x, fewest, color=RED, marker=_marker(x))
    handles: list[tuple[Any, str]] = [((spread, high), "most"), (middle, "median"), (low, "fewest")]
    if minimum:
        handles.append((axes.axhline(minimum, color="black", linewidth=1, linestyle="--"), f"min_tokens = {minimum:,}"))
    if fewest.min() > 0:
        _scale(axes, np.concatenate([fewest, most, [minimum or fewest.min()]]))
    else:
        axes.set_yscale("symlog", linthresh=1)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))
        axes.set_ylim(-0.15, 1.6 * most.max())
    axes.set_ylabel("tokens of an expert")
    _legend(figure, handles)
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
    figure = _empty_figure(f"AWQ leaves {found} of plain rounding's block loss", (WIDTH, TALL))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    x = _layer_axis(lower, layers)
    handles: list[tuple[Any, str]] = []
    for values, colour, label in (
        (before, GREY, "round-to-nearest (before)"),
        (chosen, BLUE, "chosen scales (after)"),
        (served, ORANGE, "after, as it is served"),
    ):
        handles += [(upper.plot(x, values, color=colour, marker=_marker(x))[0], label)]
    lower.axhline(100, color=GREY)
    for values, colour in zip(shares, (BLUE, ORANGE), strict=True):
        lower.plot(x, values, color=colour, marker=_marker(x))
    kept = np.array([layer["identity_kept"] for layer in layers])
    if kept.any():
        marks = upper.scatter(x[kept], chosen[kept], marker="x", color=RED, s=26, zorder=3)
        handles.append((marks, f"no scales were better ({kept.sum()})"))
    _scale(upper, np.concatenate([before, chosen, served]))
    _scale(lower, np.concatenate([*shares, [100.0]]))
    lower.yaxis.set_major_formatter(PERCENT)
    upper.set_ylabel("mean squared error")
    lower.set_ylabel("share of before")
    _legend(figure, handles, columns=2)
    return figure


@styled
def chosen_ratios(layers: Layers) -> Figure:
    """The grid's ratio that each layer's norm got, over how many experts' w3 got which."""
    norm = np.array([_one(layer["norm"]["ratio"]) for layer in layers])
    experts = np.array([layer["down"]["ratio"] for layer in layers])
    values = np.unique(np.concatenate([norm, experts.ravel()]).round(4))
    step = float(np.diff(values).min()) if len(values) > 1 else 0.05
    bins = round((values.max() - values.min()) / step) + 1
    bottom = values.min() - step / 2
    numbers = np.rint((experts - values.min()) / step).astype(int)
    counts = np.stack([np.bincount(row, minlength=bins) for row in numbers], axis=1)
    norms, median = range_text(f"{norm.min():.2f}", f"{norm.max():.2f}"), float(np.median(experts))
    figure, axes = _figure(f"Chosen ratios: norms {norms}, median expert {median:.2f}", (WIDTH, TALL))
    x = _layer_axis(axes, layers)
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
    _legend(figure, [(line, "the layer's norm"), (Patch(color="#6baed6"), "its experts")])
    return figure


@styled
def kv_scales(layers: Layers) -> Figure:
    """The fp8 KV cache's scales: the largest key and value of each layer, divided by e4m3's 448."""
    figure, axes = _figure("KV cache scales: the range that fp8 must cover")
    x = _layer_axis(axes, layers)
    names = {"k_scale": "keys (k_scale)", "v_scale": "values (v_scale)"}
    everything = []
    handles = []
    for colour, (name, label) in zip((BLUE, ORANGE), names.items(), strict=True):
        values = np.array([layer["kv_scales"].get(name, np.nan) for layer in layers], dtype=float)
        everything.append(values)
        handles.append((axes.plot(x, values, color=colour, marker=_marker(x))[0], label))
    _scale(axes, np.concatenate(everything))
    axes.set_ylabel("scale")
    _legend(figure, handles)
    return figure


@styled
def component_sizes(components: Sequence[Component]) -> Figure:
    """Bytes before and after, a line a component; logarithmic, since the experts are nearly all."""
    shown = [part for part in components if part.bytes_before or part.bytes_after]
    before, after = (sum(part.bytes_before for part in shown), sum(part.bytes_after for part in shown))
    share = f"{after / before:.0%}" if before else "-"
    title = f"{bytes_text(before)} become {bytes_text(after)}, {share} of what it was"
    figure, axes = _figure(title, (WIDTH, 1.2 + 0.38 * len(shown)))
    rows = np.arange(len(shown))
    sizes = np.array([[max(part.bytes_before, 1), max(part.bytes_after, 1)] for part in shown], dtype=float)
    # What did not exist before has no dot there.
    had = np.array([part.bytes_before > 0 for part in shown])
    axes.hlines(rows[had], sizes[had].min(1), sizes[had].max(1), color="#b5b5b5", linewidth=2)
    old = axes.scatter(sizes[had, 0], rows[had], color=GREY, s=44, zorder=3)
    new = axes.scatter(sizes[:, 1], rows, color=BLUE, s=22, zorder=4)
    axes.set_xscale("log")
    axes.set_yticks(rows, [part.name.replace("_", " ") for part in shown])
    axes.set_ylim(len(shown) - 0.5, -0.6)
    least, most = sizes[:, 1].min(), sizes.max()
    # Room for the longest label, which stands right of the largest part.
    axes.set_xlim(least / 4, most * (most / least) ** 0.55)
    for row, part in zip(rows, shown, strict=True):
        text = bytes_text(part.bytes_after)
        if part.bytes_before and part.bytes_before != part.bytes_after:
            text = f"{bytes_text(part.bytes_before)} \u2192 {text}"
        axes.annotate(text, (sizes[row].max(), row), xytext=(8, 0), textcoords="offset points", va="center", size=8.5)
    axes.xaxis.set_major_locator(LogLocator(numticks=7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value).replace(".0", "")))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("size, logarithmic")
    axes.grid(False, axis="y")
    _legend(figure, [(old, "before"), (new, "after")])
    return figure


@styled
def stage_costs(stages: Sequence[StageFacts]) -> Figure:
    """Seconds and peak memory of each stage, all its runs taken together."""
    longest = max(stages, key=lambda stage: stage.seconds)
    total = sum(stage.seconds for stage in stages)
    title = (
        f"{duration_text(total)} in all, {longest.seconds / total:.0%} of it in {longest.name}"
        if total
        else "Time was not measured"
    )
    figure = _empty_figure(title, (WIDTH, 1.35 + 0.42 * len(stages)))
    left, right = figure.subplots(1, 2, sharey=True)
    rows = np.arange(len(stages))
    time, time_name = unit_for(max(stage.seconds for stage in stages), UNITS_OF_TIME)
    bars = left.barh(rows, [stage.seconds / time for stage in stages], color=BLUE, height=0.6)
    left.bar_label(bars, [duration_text(stage.seconds) for stage in stages], padding=3, size=8.5)
    left.set_xlabel(f"time ({time_name})")
    left.set_yticks(rows, [stage.name for stage in stages])
    left.set_ylim(len(stages) - 0.4, -0.6)
    gpu = any(stage.peak_device_bytes for stage in stages)
    largest = max(max(stage.peak_host_bytes, stage.peak_device_bytes) for stage in stages)
    memory, memory_name = unit_for(largest, UNITS_OF_BYTES)
    height = 0.34 if gpu else 0.6
    handles = []
    for offset, colour, label, values in (
        (-height / 2 if gpu else 0, ORANGE, "host", [stage.peak_host_bytes for stage in stages]),
        (height / 2, GREEN, "device", [stage.peak_device_bytes for stage in stages]),
    ):
        if label == "device" and not gpu:
            continue
        bars = right.barh(rows + offset, [value / memory for value in values], color=colour, height=height)
        right.bar_label(bars, [bytes_text(value) if value else "" for value in values], padding=3, size=8.5)
        handles.append((bars, label))
    right.set_xlabel(f"peak memory ({memory_name})")
    for axes in (left, right):
        axes.grid(False, axis="y")
        axes.set_xlim(0, axes.get_xlim()[1] * 1.42)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    if gpu:
        _legend(figure, handles)
    return figure


@styled
def layer_seconds(layers: Layers) -> Figure:
    """What each layer took, by part; writing goes on while the next layer computes."""
    parts = list(dict.fromkeys(part for layer in layers for part in layer["seconds"]))
    values = {part: np.array([layer["seconds"].get(part, 0.0) for layer in layers]) for part in parts}
    totals = {part: float(own.sum()) for part, own in values.items()}
    most = max(totals, key=lambda part: totals[part])
    everything = sum(totals.values())
    share = f", {totals[most] / everything:.0%} of it {most}" if everything else ""
    figure, axes = _figure(f"A layer takes {duration_text(everything / len(layers))} on average{share}")
    x = _layer_axis(axes, layers)
    size, name = unit_for(float(sum(values.values()).max()), UNITS_OF_TIME)  # type: ignore[union-attr]
    bottom = np.zeros(len(layers))
    handles = []
    for part in parts:
        height = values[part] / size
        bars = axes.bar(x, height, bottom=bottom, width=0.85, color=PART_COLOURS.get(part, "black"))
        handles.append((bars, part))
        bottom = bottom + height
    axes.grid(False, axis="x")
    axes.set_ylabel(f"time ({name})")
    _legend(figure, handles, columns=3)
    return figure


@styled
def layer_memory(layers: Layers) -> Figure:
    """Memory of the process and of the device, by layer."""
    curves: list[tuple[str, str, str]] = [
        ("peak_host_bytes", "host, peak so far", ORANGE),
        ("host_bytes", "host, after the layer", BLUE),
        ("peak_device_bytes", "device, peak of the layer", GREEN),
    ]
    found = {
        key: np.array([layer.get(key) or np.nan for layer in layers], dtype=float)
        for key, _, _ in curves
        if any(layer.get(key) for layer in layers)
    }
    largest = max(float(np.nanmax(values)) for values in found.values())
    figure, axes = _figure(f"Memory by layer: {bytes_text(largest)} at most")
    x = _layer_axis(axes, layers)
    size, name = unit_for(largest, UNITS_OF_BYTES)
    handles = [
        (axes.plot(x, found[key] / size, color=colour, marker=_marker(x))[0], label)
        for key, label, colour in curves
        if key in found
    ]
    axes.set_ylim(0, largest / size * 1.08)
    axes.set_ylabel(f"memory ({name})")
    _legend(figure, handles, columns=2)
    return figure


@styled
def hidden_errors(layers: Layers) -> Figure:
    """Relative error of the hidden states after each layer on held-out text, a line a variant.

    Args:
        layers: eval.json's `layers`.
    """
    variants = [name for name in layers[-1]["relative_error"] if any(layer["relative_error"][name] for layer in layers)]
    title = "Error of the hidden states after each layer"
    if variants:
        last = layers[-1]["relative_error"][variants[0]]
        title = f"{variants[0]}: hidden states {last:.1%} off after the last layer"
    figure, axes = _figure(title)
    x = _layer_axis(axes, layers)
    handles = []
    values = 100 * np.array([[layer["relative_error"][name] for layer in layers] for name in variants], dtype=float)
    for colour, name, own in zip(LINES, variants, values, strict=False):
        handles.append((axes.plot(x, own, color=colour, marker=_marker(x))[0], name))
    _scale(axes, values)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.set_ylabel("error relative to the source")
    _legend(figure, handles)
    return figure


@styled
def weight_errors(layers: Layers) -> Figure:
    """Relative error of the experts' int4 weights, a line a matrix.

    Args:
        layers: verify.json's `layers`.
    """
    linears = list(layers[0]["expert_error"])
    values = np.array([[layer["expert_error"][name] for layer in layers] for name in linears], dtype=float) * 100
    found = range_text(f"{np.nanmin(values):.1f}%", f"{np.nanmax(values):.1f}%")
    figure, axes = _figure(f"int4 weights of the experts are off by {found}")
    x = _layer_axis(axes, layers)
    handles = []
    for colour, name, own in zip(LINES, linears, values, strict=False):
        handles.append((axes.plot(x, own, color=colour, marker=_marker(x))[0], name))
    axes.yaxis.set_major_formatter(PERCENT)
    axes.set_ylabel("relative error of the weights")
    _legend(figure, handles)
    return figure


def _empty_figure(title: str, size: tuple[float, float]) -> Figure:
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(textwrap.fill(title, int(TITLE_CHARACTERS * size[0])), x=0.012, horizontalalignment="left")
    return figure


def _figure(title: str, size: tuple[float, float] = (WIDTH, HEIGHT)) -> tuple[Figure, Axes]:
    figure = _empty_figure(title, size)
    return figure, figure.add_subplot()


def _layer_axis(axes: Axes, layers: Layers) -> Array:
    """The layers' numbers, with the axis set up for them."""
    x = np.array([layer["layer"] for layer in layers])
    axes.set_xlabel("decoder layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.set_xlim(x[0] - 0.6, x[-1] + 0.6)
    return x


def _marker(x: Array) -> str:
    """Few points need marks to be seen; many are a line."""
    return "o" if len(x) <= 40 else ""


def _scale(axes: Axes, values: Array) -> None:
    """Logarithmic where values differ by more than ten times, else from zero."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low > 0 and high / low > 10:
        axes.set_yscale("log")
        _plain_log_axis(axes.yaxis, low, high)
    else:
        axes.set_ylim(min(0.0, low), high * 1.08 or 1.0)


def _plain_log_axis(axis: Any, low: float, high: float) -> None:
    """Ticks at 1, 2 and 5 over few decades, else at powers of ten; plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, handles: Sequence[tuple[Any, str]], columns: int = 4) -> None:
    """Below the plot, where nothing is covered."""
    if handles:
        figure.legend(*zip(*handles, strict=True), loc="outside lower center", ncols=min(columns, len(handles)))


def _within(low: float, value: float, high: float) -> float:
    return min(max(low, value), high)


def _extend(values: Any, low: float, high: float) -> str:
    """Which ends of a colour bar stand for more than they say."""
    below, above = bool((values < low).any()), bool((values > high).any())
    return {(True, True): "both", (True, False): "min", (False, True): "max"}.get((below, above), "neither")


def _one(value: Any) -> float:
    """A number, or a list with one."""
    return float(value[0] if isinstance(value, list) else value)
