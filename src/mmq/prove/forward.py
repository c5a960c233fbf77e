"""The forward that eval measures: one decoder layer, and the head.

Weights are dequantized and activations are bf16, as a weight-only kernel computes.
"""

from __future__ import annotations

from typing import Any

import torch

from mmq.families.table import Architecture
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
) -> torch.Tensor:
    """One decoder layer on bfloat16 [T, H] of concatenated sequences: bfloat16 [T, H].

    Args:
        content: of several ranks, with this one's experts.
    """
    residual = decoder.attend(hidden, lengths, team)
    if not decoder.has_experts:
        return residual
    x = decoder.block_input(residual)
    residual = decoder.add_shared(residual, x)
    _, weight, index = decoder.route(x)
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


class Head:
    """Final norm and head: hidden states to logits in fp32.

    Args:
        norm: the final norm's weight [H].
        head: [V, H].
    """

    def __init__(self, arch: Architecture, config: Any, norm: torch.Tensor, head: torch.Tensor) -> None:
        with torch.device("meta"):
            layer = arch.transformers_class(arch.layer_class)(config, 0)
        # The final norm is of the kind that the layers have.
        self.norm = layer.get_submodule(arch.module_name(arch.smooth_norm).removesuffix(".weight"))
        self.norm.weight = torch.nn.Parameter(norm, requires_grad=False)
        self.weight = head if head.device.type == "cuda" else head.float()

    @torch.no_grad()
    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """bfloat16 [n, H] -> float32 [n, V]; the logits are not rounded to bf16 on the way."""
        x = self.norm(hidden)
        if x.device.type == "cuda" and x.dtype == self.weight.dtype == torch.bfloat16:
            logits = torch.mm(x, self.weight.T, out_dtype=torch.float32)
        else:
            logits = x.float() @ self.weight.T.float()
        return logits.log_softmax(-1)
