"""Plots of what the run took and what it saved: bytes, time, memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mmq.report.facts import Component, StageFacts
from mmq.report.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    WIDTH,
    Layers,
    add_legend,
    empty_figure,
    layer_axis,
    marker,
    new_figure,
    styled,
)
from mmq.text import UNITS_OF_BYTES, UNITS_OF_TIME, bytes_text, duration_text, unit_for

PART_COLOURS = {
    "reading": ORANGE,
    "attention": PINK,
    "searching": BLUE,
    "quantizing": GREEN,
    "propagating": SKY,
    "writing": "#BBBBBB",
}


@styled
def component_sizes(components: Sequence[Component]) -> Figure:
    """Bytes before and after, a line a component; logarithmic, since the experts are nearly all."""
    shown = [part for part in components if part.bytes_before or part.bytes_after]
    before, after = (sum(part.bytes_before for part in shown), sum(part.bytes_after for part in shown))
    share = f"{after / before:.0%}" if before else "-"
    title = f"{bytes_text(before)} become {bytes_text(after)}, {share} of what it was"
    figure, axes = new_figure(title, (WIDTH, 1.2 + 0.38 * len(shown)))
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
    add_legend(figure, [(old, "before"), (new, "after")])
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
    figure = empty_figure(title, (WIDTH, 1.35 + 0.42 * len(stages)))
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
        add_legend(figure, handles)
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
    figure, axes = new_figure(f"A layer takes {duration_text(everything / len(layers))} on average{share}")
    x = layer_axis(axes, layers)
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
    add_legend(figure, handles, columns=3)
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
    figure, axes = new_figure(f"Memory by layer: {bytes_text(largest)} at most")
    x = layer_axis(axes, layers)
    size, name = unit_for(largest, UNITS_OF_BYTES)
    handles = [
        (axes.plot(x, found[key] / size, color=colour, marker=marker(x))[0], label)
        for key, label, colour in curves
        if key in found
    ]
    axes.set_ylim(0, largest / size * 1.08)
    axes.set_ylabel(f"memory ({name})")
    add_legend(figure, handles, columns=2)
    return figure
