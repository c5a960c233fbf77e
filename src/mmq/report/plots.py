"""The plots of the page, in its order: where each stands, what it says, what draws it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from mmq.report import cost_plots, layer_plots, quality_plots
from mmq.report.facts import RunFacts
from mmq.report.style import png


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


def _of_layers(
    draw: Callable[[list[dict[str, Any]]], Figure], report: dict[str, Any] | None, key: str
) -> Figure | None:
    """A plot of those of a report's layers that say something of `key`."""
    layers = [layer for layer in (report or {}).get("layers", []) if key in layer]
    return draw(layers) if layers else None


PLOTS = (
    Plot(
        "sizes",
        "size",
        "Bytes of the tensors, scales beside their weights.",
        lambda facts: cost_plots.component_sizes(facts.components) if facts.components else None,
    ),
    Plot(
        "expert-tokens",
        "tokens",
        "Calibration tokens that the router sent to each expert. A white dot: fewer than min_tokens, so the expert was"
        " topped up with the tokens that its router score ranks highest, which are not counted here.",
        lambda facts: layer_plots.expert_tokens(facts.layers) if facts.layers else None,
        lambda facts: layer_plots.expert_tokens(facts.layers, upright=True),
    ),
    Plot(
        "token-range",
        "tokens",
        "The busiest, the median and the least used expert of each layer.",
        lambda facts: (
            layer_plots.token_range(facts.layers, facts.recipe["awq"]["min_tokens"]) if facts.layers else None
        ),
    ),
    Plot(
        "kv-scales",
        "tokens",
        "Scales of keys after rotary and of values; a cached number is stored as fp8 after division by its scale.",
        lambda facts: (
            layer_plots.kv_scales(facts.all_layers) if any(layer["kv_scales"] for layer in facts.layers) else None
        ),
    ),
    Plot(
        "block-loss",
        "scales",
        "Mean squared change of the expert block's output on the calibration tokens. Served: through the smoothed norm"
        " and router, in the precision of the checkpoint.",
        lambda facts: layer_plots.block_loss(facts.layers) if facts.layers else None,
    ),
    Plot(
        "ratios",
        "scales",
        "AWQ's exponent as the search found it: for each layer's norm, and for up into down of each expert.",
        lambda facts: layer_plots.chosen_ratios(facts.layers) if facts.layers else None,
    ),
    Plot(
        "hidden-errors",
        "result",
        "Norm of the difference to the source's hidden states, relative to their norm, on held-out text.",
        lambda facts: quality_plots.hidden_errors(facts.evaluation["layers"]) if facts.evaluation else None,
    ),
    Plot(
        "other-experts",
        "result",
        "Share of each router's choices that are none of the source's for the same token, on held-out text.",
        lambda facts: _of_layers(quality_plots.other_experts, facts.evaluation, "other_experts"),
    ),
    Plot(
        "layer-kl",
        "result",
        "KL to the source with one layer as the result has it and all others the source's, on held-out text; the bars"
        " are standard errors over samples.",
        lambda facts: quality_plots.layer_kl(facts.by_layer["layers"]) if facts.by_layer else None,
    ),
    Plot(
        "weight-errors",
        "result",
        "Root mean square of the rounding of each layer's expert weights, relative to the weights, found by verify.",
        lambda facts: _of_layers(quality_plots.weight_errors, facts.verify, "expert_error"),
    ),
    Plot(
        "stage-costs",
        "stages",
        "All runs of a stage taken together, interrupted ones included.",
        lambda facts: cost_plots.stage_costs(facts.stages),
    ),
    Plot(
        "layer-seconds",
        "costs",
        "Parts of the awq stage. Reading is what the computation waited for; writing goes on beside the next layer.",
        lambda facts: cost_plots.layer_seconds(facts.all_layers) if facts.layers else None,
    ),
    Plot(
        "layer-memory",
        "costs",
        "Resident memory of the process, and memory allocated on the device.",
        lambda facts: cost_plots.layer_memory(facts.all_layers) if facts.layers else None,
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
        return cls(plot, figure.get_suptitle(), png(figure), png(upright) if upright else None)
