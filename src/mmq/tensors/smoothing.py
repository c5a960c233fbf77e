"""Moving scales from a norm into the layers that read it, and from one expert layer into the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def candidate_scales(
    activations: torch.Tensor, weights: torch.Tensor, grid: Sequence[tuple[float, bool]]
) -> torch.Tensor:
    """The points of AWQ's grid.

    Args:
        activations: float32 [..., in], mean |x| of each input channel.
        weights: float32 [..., in], mean normalized |w| of each input channel, for duo scaling.
        grid: ratio and whether to scale by both, of each point.

    Returns:
        float32 [points, ..., in]: x^ratio, over w^(1-ratio) with duo scaling, normalized so that max * min = 1.

    Source: `AWQModifier._compute_best_scale` of llmcompressor, for any number of leading dimensions.
    """
    shape = (-1,) + (1,) * activations.ndim
    ratio = torch.tensor([ratio for ratio, _ in grid], dtype=torch.float64).view(shape)
    duo = torch.tensor([duo for _, duo in grid], device=activations.device).view(shape)
    scales = activations.pow(ratio.to(activations))
    scales = torch.where(duo, scales / (weights.pow((1 - ratio).to(weights)) + 1e-4), scales)
    scales = scales.clamp(min=1e-4)
    scales = scales / (scales.amax(-1, keepdim=True) * scales.amin(-1, keepdim=True)).sqrt()
    return torch.where(torch.isfinite(scales), scales, 1.0)


def nearest_power_of_two(scales: torch.Tensor) -> torch.Tensor:
    """Positive float32 scales of any shape, each rounded to a power of two by its logarithm."""
    return scales.log2().round().exp2()


def smooth_norm(norm: torch.Tensor, scales: torch.Tensor, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide a norm's weight by the scales and say what scale the rounded result really applies.

    Args:
        norm: [hidden], usually bfloat16.
        scales: float32 [hidden], positive.
        offset: what the norm adds to its weight.

    Returns:
        norm' = round((offset + norm) / scales - offset) in the norm's dtype, and float32 of
        (offset + norm) / (offset + norm'). Multiplying the columns of every
        layer that reads the norm by the latter leaves the function as it was, to fp32 rounding. Channels whose norm is
        zero, or would become zero or infinite, keep their value and get 1.
    """
    original = norm.float() + offset
    smoothed = (original / scales - offset).to(norm.dtype)
    multiplies = smoothed.float() + offset
    applied = original / multiplies
    keep = (multiplies == 0) | ~torch.isfinite(applied) | (applied == 0)
    return torch.where(keep, norm, smoothed), torch.where(keep, 1.0, applied)


def applied_scale(norm: torch.Tensor, smoothed: torch.Tensor, offset: float = 0.0) -> torch.Tensor:
    """What `smooth_norm` says that its result applies, found again from both norms: float32 [hidden]."""
    applied = (norm.float() + offset) / (smoothed.float() + offset)
    return torch.where(torch.isfinite(applied) & (applied != 0), applied, 1.0)
