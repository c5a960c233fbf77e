"""Symmetric group int4: what AWQ's search sees, and what is packed.

The search's fake quantization is written here for speed; the final integers come from compressed-tensors, and a test
holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams

Q_MIN, Q_MAX = -8, 7
# Half of the 16 codes on either side of zero: compressed-tensors' symmetric scale is max|w| / 7.5.
HALF_RANGE = 7.5


def weight_args(group_size: int) -> QuantizationArgs:
    """compressed-tensors' description of the experts' weights."""
    return QuantizationArgs(
        num_bits=4,
        type=QuantizationType.INT,
        strategy=QuantizationStrategy.GROUP,
        group_size=group_size,
        symmetric=True,
        dynamic=False,
    )


@dataclass(frozen=True)
class QuantizedStack:
    """Stacked int4 weights.

    Attributes:
        values: int8 [n, out, in], each in -8..7.
        scale: bfloat16 [n, out, in/group].
    """

    values: torch.Tensor
    scale: torch.Tensor
    group_size: int

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """value * scale: [n, out, in]."""
        values, scale = self.values, self.scale
        flat = dequantize(
            values.flatten(0, 1), scale.flatten(0, 1), args=weight_args(self.group_size), dtype=scale.dtype
        )
        return flat.view(values.shape).to(dtype)

    def pack(self) -> torch.Tensor:
        """int32 [n, out, in/8], eight codes to a word, lowest bits first."""
        return pack_to_int32(self.values.flatten(0, 1), 4).view(*self.values.shape[:2], -1)


def quantize_stack(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to nearest, by compressed-tensors.

    Args:
        weight: float32 [n, out, in], in divisible by the group size.

    Returns:
        int8 [n, out, in] and bfloat16 scales [n, out, in/group].
    """
    args = weight_args(group_size)
    flat = weight.flatten(0, 1)
    groups = flat.unflatten(-1, (-1, group_size))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    # The stored scale is bf16; the integers are chosen for the value that will be read back.
    scale = _nonzero(scale.to(torch.bfloat16))
    values = quantize(flat, scale.float(), None, args, dtype=torch.int8)
    shape = weight.shape
    return values.view(shape), scale.view(*shape[:-1], -1)


def fake_quantize_scaled(
    weight: torch.Tensor, scales: torch.Tensor, group_size: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Q(W * s) / s with a scale per input channel, as AWQ's search measures it.

    Args:
        weight: [n, out, in] of any float dtype; the group scales are rounded to it.
        scales: float32, broadcastable to [n, 1, in].
        out: where to put the result, of the weight's shape and dtype.

    Source: AWQ (arXiv 2306.00978), equation 4; rounding as in compressed-tensors.
    """
    if out is None:
        out = torch.empty_like(weight)
    work = weight.to(torch.float32, copy=True)
    work.mul_(scales)
    groups = work.unflatten(-1, (-1, group_size))
    largest = torch.maximum(groups.amax(-1), groups.amin(-1).neg_())
    step = _nonzero(largest.div_(HALF_RANGE).to(weight.dtype)).float().unsqueeze(-1)
    groups.div_(step).round_().clamp_(Q_MIN, Q_MAX).mul_(step)
    return out.copy_(work.div_(scales))


def normalized_mean(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Sum over rows of |w| / max|w| of its group: float64 [n, in], to be divided by the number of rows.

    Args:
        weight: [n, out, in]; computed in its own dtype, as `AWQModifier._compute_layer_means` does.
    """
    groups = weight.abs().unflatten(-1, (-1, group_size))
    groups.div_(groups.amax(-1, keepdim=True) + 1e-6)
    return groups.flatten(-2).sum(1, dtype=torch.float64)


def _nonzero(scale: torch.Tensor) -> torch.Tensor:
    """A group of zeros gets compressed-tensors' epsilon instead of a scale that divides by zero."""
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
