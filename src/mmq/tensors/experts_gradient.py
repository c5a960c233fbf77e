"""The gradient of a mixture-of-experts block by its inputs and by the router's weights; its own weights are constants.

A router's choice is a step, whose gradient is zero: that a small error sends a token to another expert, which costs
most of what rounding leaves (docs/quality.md), no gradient tells. Taken as errors in the scores would have it, the
choice is a slope instead (`contested`).

Shapes as in `experts`: T tokens, k experts a token, R = T*k rows, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from typing import Any

import torch

from mmq.tensors.experts import Activation, Rows, combine, gated, grouped_back, grouped_linear

# How far scores are thought to err: this share of a sequence's mean margin between its last choice and its runner-up.
# On the trained model it is 0.7 of the standard deviation that compensated rounding gives a margin.
ERRING = 1 / 12


def contested(
    score: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, runner_up: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A router's choice, with the runner-up as one more of weight zero, for a gradient that knows of the choice.

    With m the margin by which the last choice is ahead and s what it errs by, they change places with probability
    Phi(-m / s): so much of the last one's weight is the runner-up's. The values are those of the choice as it is; what
    `block_output` makes of them is the same number, and its gradient by the scores that of this mean.

    Args:
        score: float32 [T, E], by which experts are chosen.
        weight, index: float32 and int64 [T, k].
        runner_up: int64 [T, 1].
        length: tokens of each of the sequences, which follow one another.

    Returns:
        weights and choices [T, k + 1], sorted by expert.
    """
    chosen = score.gather(1, index)
    last = chosen.detach().argmin(1, keepdim=True)
    margin = chosen.gather(1, last) - score.gather(1, runner_up)
    known = margin.detach().view(-1, length)
    known = torch.where(torch.isfinite(known), known, torch.nan)
    # Of margins that are all zero, or no numbers, nothing is known, and nothing changes places.
    errs = known.nanmean(1, keepdim=True) * ERRING
    errs = torch.where(errs > 0, errs, torch.inf).expand_as(known).reshape(-1, 1)
    lost = torch.special.ndtr(-margin / errs)
    lost = (lost - lost.detach()) * weight.gather(1, last).detach()
    is_last = torch.arange(weight.shape[1], device=weight.device) == last
    weight = torch.cat([weight - lost * is_last, lost], 1)
    index, order = torch.cat([index, runner_up], 1).sort(1)
    return weight.gather(1, order), index


def block_output(
    x: torch.Tensor,
    weight: torch.Tensor,
    index: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: Activation,
) -> torch.Tensor:
    """The block's output, float32 [T, H], which autograd can follow.

    Args:
        x: bfloat16 [T, H].
        weight: float32 [T, k], the router's.
        index: int64 [T, k], its choices.
        gate_up, down: bfloat16 [E, 2I, H] and [E, H, I].
    """
    output: torch.Tensor = _RoutedExperts.apply(x, weight, Rows.of(index, gate_up.shape[0]), gate_up, down, activation)
    return output


class _RoutedExperts(torch.autograd.Function):
    """Keeps the inputs alone; what lies between them and the output is computed again on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        rows: Rows,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        activation: Activation,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rows, ctx.experts, ctx.activation = rows, (gate_up, down), activation
        ends = _ends(rows)
        middle = gated(grouped_linear(x[rows.token], gate_up, ends), activation)
        outputs = grouped_linear(middle, down, ends)
        return combine(outputs, rows.place, weight, x.new_zeros(x.shape, dtype=torch.float32))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Args: gradient: float32 [T, H]."""
        (x, weight), rows, (gate_up, down) = ctx.saved_tensors, ctx.rows, ctx.experts
        ends, flat = _ends(rows), rows.place.reshape(-1)
        share = torch.empty_like(weight.reshape(-1))
        share[flat] = weight.reshape(-1)
        with torch.enable_grad():
            both = grouped_linear(x[rows.token], gate_up, ends).requires_grad_()
            middle = gated(both, ctx.activation)
        # By what an expert puts out, were it taken whole; its share of the output is worth <output, gradient>.
        back = grouped_back(gradient.to(x.dtype)[rows.token], down, ends).float()
        by_weight = (back * middle.detach()).sum(1)[flat].view_as(weight)
        (by_both,) = torch.autograd.grad(middle, both, (back * share.unsqueeze(1)).to(x.dtype))
        del back
        by_rows = grouped_back(by_both, gate_up, ends)
        by_x = combine(by_rows, rows.place, torch.ones_like(weight), torch.zeros_like(gradient))
        return by_x.to(x.dtype), by_weight, None, None, None, None


def _ends(rows: Rows) -> torch.Tensor:
    return torch.tensor(rows.ends, dtype=torch.int32, device=rows.token.device)
