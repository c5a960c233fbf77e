"""`int4.fake_quantize_scaled` in one pass: two bytes of a weight read, two written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmq.tensors.codes import HALF_RANGE, Q_MAX, Q_MIN
from mmq.tensors.fused.launch import INTERPRETED, programs, to_bf16, to_fp32

# Weights of a program: neighbouring groups of some rows, 16 weights to a thread.
TILE, COLUMNS, WARPS = 2048, 512, 4
_BF16 = torch.finfo(torch.bfloat16)


@triton.jit
def _rint(value):
    """To the nearest integer, half to even, with the sign of a zero kept; for magnitudes below 2^22."""
    # Beyond 1.5 * 2^23 floats are the integers.
    rounded = (value + 12582912.0) - 12582912.0
    sign = value.to(tl.uint32, bitcast=True) & 0x80000000
    return (rounded.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _fake_quantize(
    weight,
    scales,
    inverse,
    out,
    rows,
    groups,
    row_blocks,
    column_blocks,
    weight_expert,
    weight_row,
    out_expert,
    out_row,
    scale_expert,
    EPSILON: tl.constexpr,
    TINY: tl.constexpr,
    HALF: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    CHANGE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """ROWS rows of GROUPS neighbouring groups of one expert: a line for each group of each row."""
    program = tl.program_id(0)
    column_block = program % column_blocks
    row_block = (program // column_blocks) % row_blocks
    expert = (program // column_blocks // row_blocks).to(tl.int64)
    first = row_block * ROWS
    start = first.to(tl.int64)

    line = tl.arange(0, ROWS * GROUPS)[:, None]
    row = line // GROUPS
    group = column_block * GROUPS + line % GROUPS
    column = group * GROUP + tl.arange(0, GROUP)[None, :]
    # Of the tile's shape, so that scales lie in the threads that have their weights.
    inside = (first + row < rows) & (group < groups) & (column >= 0)

    value = to_fp32(
        tl.load(
            weight + (expert * weight_expert + start * weight_row) + (row * weight_row + column), mask=inside, other=0.0
        )
    )
    scale = tl.load(scales + expert * scale_expert + column, mask=inside, other=1.0)
    scaled = value * scale

    # As integers, magnitudes have the order of floats; infinity is larger than all, and NaN larger still.
    magnitude = scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.max(magnitude, axis=1)[:, None]
    step = to_fp32(to_bf16(tl.div_rn(bits.to(tl.float32, bitcast=True), HALF), INTERPRETED))
    step = tl.where(step == 0.0, EPSILON, tl.maximum(step, TINY))
    step = tl.where(bits >= 0x7F800000, float("nan"), step)

    code = _rint(tl.div_rn(scaled, tl.broadcast_to(step, (ROWS * GROUPS, GROUP))))
    # Where this drops a NaN, the step is one.
    code = tl.minimum(tl.maximum(code, LOWEST), HIGHEST)
    unscaled = tl.load(inverse + expert * scale_expert + column, mask=inside, other=1.0)
    result = to_bf16(code * step * unscaled, INTERPRETED)
    if CHANGE:
        result = to_bf16(to_fp32(result) - value, INTERPRETED)
    tl.store(out + (expert * out_expert + start * out_row) + (row * out_row + column), result, mask=inside)


def fake_quantize_scaled(
    weight: torch.Tensor, scales: torch.Tensor, group_size: int, out: torch.Tensor, change: bool
) -> None:
    """`int4.fake_quantize_scaled`, bit for bit; a group's size is a power of two, neighbouring columns lie together."""
    experts, rows, columns = weight.shape
    by_channel = scales.expand(*scales.shape[:-1], columns).contiguous()
    inverse = by_channel.reciprocal()
    groups = columns // group_size
    together = min(max(1, COLUMNS // group_size), triton.next_power_of_2(groups))
    tall = max(1, TILE // (together * group_size))
    row_blocks, column_blocks = programs(rows, tall), programs(groups, together)
    with torch.cuda.device_of(weight):
        _fake_quantize[(experts * row_blocks * column_blocks,)](
            weight,
            by_channel,
            inverse,
            out,
            rows,
            groups,
            row_blocks,
            column_blocks,
            weight.stride(0),
            weight.stride(1),
            out.stride(0),
            out.stride(1),
            columns if by_channel.numel() > columns else 0,
            EPSILON=_BF16.eps,
            TINY=_BF16.tiny,
            HALF=HALF_RANGE,
            LOWEST=float(Q_MIN),
            HIGHEST=float(Q_MAX),
            CHANGE=change,
            ROWS=tall,
            GROUPS=together,
            GROUP=group_size,
            INTERPRETED=INTERPRETED,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
