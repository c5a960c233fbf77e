"""Symmetric group int4: what AWQ's search sees, and what is packed.

Scales, rounding and packing are those of compressed-tensors, written for stacks of matrices: on a CPU the library's
packing takes 40 times as long. Tests hold the results to be equal, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType

from mmq.tensors.codes import HALF_RANGE, Q_MAX, Q_MIN, SMALLEST_GROUP
from mmq.tensors.dispatch import Way, way

# On a CPU, weights rounded at one time: a dozen passes over them stay in the cache.
CPU_TILE = 2**18
# On a GPU, so many that copies of them in fp32 are small beside a layer.
GPU_TILE = 2**27


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
        """value * scale, rounded once: [n, out, in]."""
        groups = self.values.float().unflatten(-1, (-1, self.group_size))
        return groups.mul_(self.scale.float().unsqueeze(-1)).flatten(-2).to(dtype)

    def pack(self) -> torch.Tensor:
        """int32 [n, out, in/8], eight codes to a word, lowest bits first, each the value plus 8."""
        pairs = self.values.add(-Q_MIN).view(torch.uint8).unflatten(-1, (-1, 2))
        return pairs[..., 1].bitwise_left_shift(4).bitwise_or_(pairs[..., 0]).view(torch.int32)

    @classmethod
    def unpack(cls, packed: torch.Tensor, scale: torch.Tensor, group_size: int) -> QuantizedStack:
        """The stack that `pack` gave int32 [n, out, in/8] of."""
        pairs = packed.view(torch.uint8).unsqueeze(-1)
        codes = torch.cat([pairs.bitwise_and(15), pairs.bitwise_right_shift(4)], -1).view(torch.int8)
        return cls(codes.flatten(-2).add_(Q_MIN), scale, group_size)


def quantize_stack(weight: torch.Tensor, group_size: int) -> QuantizedStack:
    """Round to nearest.

    Args:
        weight: float32 [n, out, in], in divisible by the group size; overwritten.
    """
    groups = weight.unflatten(-1, (-1, group_size))
    # The stored scale is bf16; the integers are chosen for the value that will be read back.
    scale = _scale(groups, torch.bfloat16)
    values = groups.div_(scale.float().unsqueeze(-1)).round_().clamp_(Q_MIN, Q_MAX).to(torch.int8)
    return QuantizedStack(values.view(weight.shape), scale, group_size)


def quantize_in_place(
    weight: torch.Tensor, factors: torch.Tensor, divisors: torch.Tensor | None, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round W * factors / divisors to nearest; the weight becomes what will be read back.

    Args:
        weight: bfloat16 [n, out, in], overwritten.
        factors: float32, broadcastable to [n, 1, in].
        divisors: float32 [n, out, 1].

    Returns:
        int32 [n, out, in/8], packed, and bfloat16 [n, out, in/group], the scales.
    """
    if way(weight) is Way.TRITON and group_size & (group_size - 1) == 0:
        from mmq.tensors.fused import quantize

        return quantize.quantize_in_place(weight, factors, divisors, group_size)
    count, rows, columns = weight.shape
    most = CPU_TILE if weight.device.type == "cpu" else GPU_TILE
    step = max(1, most // (count * columns))
    packed, scale = [], []
    for tile in (slice(first, first + step) for first in range(0, rows, step)):
        wide = weight[:, tile].float().mul_(factors)
        if divisors is not None:
            wide.div_(divisors[:, tile])
        stack = quantize_stack(wide, group_size)
        weight[:, tile] = stack.dequantize(weight.dtype)
        packed.append(stack.pack())
        scale.append(stack.scale)
    return torch.cat(packed, 1), torch.cat(scale, 1)


def fits(scale: torch.Tensor) -> bool:
    """Whether every code, -8 included, times its group's scale is finite in the scale's dtype."""
    return bool(torch.isfinite(scale * Q_MIN).all())


def working_bytes(weight: torch.Tensor) -> int:
    """What `fake_quantize_scaled` takes for each weight, its result included."""
    width = weight.element_size()
    # In one pass; else an fp32 copy that is worked on, and room for what one of its steps makes.
    return width if way(weight) is Way.TRITON else width + 6


def fake_quantize_scaled(
    weight: torch.Tensor, scales: torch.Tensor, group_size: int, out: torch.Tensor | None = None, change: bool = False
) -> torch.Tensor:
    """Q(W * s) / s with a scale per input channel, as AWQ's search measures it.

    Args:
        weight: [n, out, in] of any float dtype; the group scales are rounded to it.
        scales: float32, broadcastable to [n, 1, in].
        out: where to put the result, of the weight's shape and dtype.
        change: give the result less W, rounded once more.

    Source: AWQ (arXiv 2306.00978), equation 4; rounding as in compressed-tensors.
    """
    if out is None:
        out = torch.empty_like(weight)
    match way(weight):
        case Way.NUMBA:
            from mmq.tensors import compiled

            compiled.fake_quantize_scaled(weight, scales, group_size, out, change)
            return out
        case Way.TRITON if group_size & (group_size - 1) == 0:
            from mmq.tensors.fused import quantize

            quantize.fake_quantize_scaled(weight, scales, group_size, out, change)
            return out
    work = weight.to(torch.float32, copy=True)
    work.mul_(scales)
    groups = work.unflatten(-1, (-1, group_size))
    step = _scale(groups, weight.dtype).float().unsqueeze(-1)
    groups.div_(step).round_().clamp_(Q_MIN, Q_MAX).mul_(step)
    out.copy_(work.mul_(scales.reciprocal()))
    return out.sub_(weight) if change else out


def normalized_mean(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Sum over rows of |w| / max|w| of its group: float64 [n, in], to be divided by the number of rows.

    Args:
        weight: [n, out, in]; computed in its own dtype, as `AWQModifier._compute_layer_means` does.
    """
    match way(weight):
        case Way.NUMBA:
            from mmq.tensors import compiled

            return compiled.normalized_mean(weight, group_size)
        case Way.TRITON if group_size & (group_size - 1) == 0:
            from mmq.tensors.fused import quantize

            return quantize.normalized_mean(weight, group_size)
    groups = weight.abs().unflatten(-1, (-1, group_size))
    # A tensor again: CPUs round a plain number to the weights' dtype before it is added, CUDA does not.
    groups.div_(groups.amax(-1, keepdim=True) + weight.new_full((), SMALLEST_GROUP))
    return groups.flatten(-2).sum(1, dtype=torch.float64)


def _scale(groups: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """max|w| / 7.5 of each group [..., group] in the dtype it is stored in; a group of zeros gets its epsilon.

    It is never denormal: such a number has too few bits to divide by, and devices that flush it read a zero.
    """
    largest = torch.maximum(groups.amax(-1), groups.amin(-1).neg_())
    # By a tensor: for a plain number CUDA's division multiplies by the reciprocal, which is not what a CPU computes.
    return stored_scale(largest.div_(largest.new_full((), HALF_RANGE)), dtype)


def stored_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales of no sign as they are stored: rounded to a dtype, epsilon for zero, and never denormal."""
    info = torch.finfo(dtype)
    scale = scale.to(dtype)
    return torch.where(scale == 0, info.eps, scale.clamp_(min=info.tiny))
