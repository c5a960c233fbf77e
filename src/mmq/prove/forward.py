"""The forward that eval measures: one decoder layer.

Weights are dequantized and activations are bf16, as a weight-only kernel computes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mmq.machine.team import ALONE, Team
from mmq.quantize.decoder_layer import DecoderLayer
from mmq.quantize.layer import LayerContent
from mmq.quantize.routed_experts import ExpertBlock, Smoothed, Weights


@torch.no_grad()
def run_layer(
    decoder: DecoderLayer,
    content: LayerContent,
    hidden: torch.Tensor,
    lengths: list[int],
    group_size: int,
    round_to_nearest: bool = False,
    budget: int | None = None,
    team: Team = ALONE,
    routed: Callable[[torch.Tensor], None] = lambda _: None,
) -> torch.Tensor:
    """One decoder layer on bfloat16 [T, H] of concatenated sequences: bfloat16 [T, H].

    Args:
        content: of several ranks, with this one's experts.
        routed: told the router's choices, int64 [T, k], of a layer that has experts.
    """
    residual = decoder.attend(hidden, lengths, team)
    if not decoder.has_experts:
        return residual
    x = decoder.block_input(residual)
    residual = decoder.add_shared(residual, x)
    _, weight, index = decoder.route(x)
    routed(index)
    block = ExpertBlock(
        x, index, weight, content.gate_up, content.down, decoder.activation, group_size, budget=budget,
        team=team,
    )  # fmt: skip
    weights = Weights(block)
    if round_to_nearest:
        experts, width, inner = content.down.shape
        weights = Smoothed(block, x.new_ones(width).float(), x.new_ones(experts, inner).float())
    outputs = [part.to(residual.dtype) for part in block.outputs(weights)]
    return residual + block.in_order(outputs)
