"""Plots of how far the result is from its source."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from mmq.report.style import (
    BLUE,
    GREY,
    LINES,
    PERCENT,
    Layers,
    add_legend,
    layer_axis,
    marker,
    new_figure,
    scale_axis,
    styled,
)
from mmq.text import range_text


@styled
def hidden_errors(layers: Layers) -> Figure:
    """Relative error of the hidden states after each layer on held-out text, a line a variant.

    Args:
        layers: eval.json's `layers`.
    """
    variants = _variants(layers, "relative_error")
    title = "Error of the hidden states after each layer"
    if variants:
        last = layers[-1]["relative_error"][variants[0]]
        title = f"{variants[0]}: hidden states {last:.1%} off after the last layer"
    return _lines_of_variants(layers, "relative_error", variants, title, "error relative to the source")


@styled
def other_experts(layers: Layers) -> Figure:
    """Share of each layer's routing that goes to other experts than the source's on held-out text, a line a variant.

    Args:
        layers: those of eval.json's `layers` that have `other_experts`.
    """
    variants = _variants(layers, "other_experts")
    title = "Every token goes to the source's experts"
    if variants:
        mean = float(np.mean([layer["other_experts"][variants[0]] for layer in layers]))
        title = f"{variants[0]}: {mean:.1%} of the choices are other experts"
    return _lines_of_variants(layers, "other_experts", variants, title, "choices that are not the source's")


def _variants(layers: Layers, key: str) -> list[str]:
    """Those that differ from the source somewhere."""
    return [name for name in layers[-1][key] if any(layer[key][name] for layer in layers)]


def _lines_of_variants(layers: Layers, key: str, variants: list[str], title: str, label: str) -> Figure:
    """Shares of each layer in percent, a line a variant."""
    figure, axes = new_figure(title)
    x = layer_axis(axes, layers)
    handles = []
    values = 100 * np.array([[layer[key][name] for layer in layers] for name in variants], dtype=float)
    for colour, name, own in zip(LINES, variants, values, strict=False):
        handles.append((axes.plot(x, own, color=colour, marker=marker(x))[0], name))
    scale_axis(axes, values)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.set_ylabel(label)
    add_legend(figure, handles)
    return figure


@styled
def layer_kl(layers: Layers) -> Figure:
    """KL to the source of each layer quantized alone, with the standard error over samples.

    Args:
        layers: by_layer.json's `layers`.
    """
    values = np.array([layer["kl"] for layer in layers], dtype=float)
    errors = np.array([layer["kl_standard_error"] or 0 for layer in layers], dtype=float)
    figure, axes = new_figure(f"One quantized layer: layer {layers[int(values.argmax())]['layer']} costs most")
    x = layer_axis(axes, layers)
    axes.errorbar(x, values, errors, color=BLUE, marker=marker(x), ecolor=GREY, elinewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("KL to the source (nats)")
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
    figure, axes = new_figure(f"int4 weights of the experts are off by {found}")
    x = layer_axis(axes, layers)
    handles = []
    for colour, name, own in zip(LINES, linears, values, strict=False):
        handles.append((axes.plot(x, own, color=colour, marker=marker(x))[0], name))
    axes.yaxis.set_major_formatter(PERCENT)
    axes.set_ylabel("relative error of the weights")
    add_legend(figure, handles)
    return figure
