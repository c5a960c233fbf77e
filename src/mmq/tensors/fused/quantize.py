"""`int4.fake_quantize_scaled` and `int4.normalized_mean` in one pass: a weight is read once, and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmq.tensors.codes import HALF_RANGE, Q_MAX, Q_MIN, SMALLEST_GROUP
from mmq.tensors.fused.launch import INTERPRETED, UNFUSED, programs, to_bf16, to_fp32

# Weights of a program: neighbouring groups of some rows, 16 weights to a thread.
TILE, COLUMNS, WARPS = 2048, 512, 4
# Rows at a time where they are summed.
SUMMED_ROWS = 16
_BF16 = torch.finfo(torch.bfloat16)
# What the kernels know of int4.
_FORMAT = {
    "EPSILON": _BF16.eps,
    "TINY": _BF16.tiny,
    "HALF": HALF_RANGE,
    "LOWEST": float(Q_MIN),
    "HIGHEST": float(Q_MAX),
}
_SMALLEST = torch.tensor(SMALLEST_GROUP, dtype=torch.bfloat16).item()


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


def _tiles(rows: int, groups: int, group_size: int) -> tuple[int, int, int, int]:
    """Rows and groups of a program, and how many programs cover a matrix's rows and its groups."""
    together = min(max(1, COLUMNS // group_size), triton.next_power_of_2(groups))
    tall = max(1, TILE // (together * group_size))
    return tall, together, programs(rows, tall), programs(groups, together)


def fake_quantize_scaled(
    weight: torch.Tensor, scales: torch.Tensor, group_size: int, out: torch.Tensor, change: bool
) -> None:
    """`int4.fake_quantize_scaled`, bit for bit; a group's size is a power of two, neighbouring columns lie together."""
    experts, rows, columns = weight.shape
    by_channel = scales.expand(*scales.shape[:-1], columns).contiguous()
    inverse = by_channel.reciprocal()
    groups = columns // group_size
    tall, together, row_blocks, column_blocks = _tiles(rows, groups, group_size)
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
            **_FORMAT,
            CHANGE=change,
            ROWS=tall,
            GROUPS=together,
            GROUP=group_size,
            INTERPRETED=INTERPRETED,
            num_warps=WARPS,
            **UNFUSED,
        )


@triton.jit
def _quantize_in_place(
    weight,
    factors,
    divisors,
    packed,
    steps,
    rows,
    groups,
    row_blocks,
    column_blocks,
    weight_expert,
    weight_row,
    factor_expert,
    EPSILON: tl.constexpr,
    TINY: tl.constexpr,
    HALF: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    DIVIDED: tl.constexpr,
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
    line = tl.arange(0, ROWS * GROUPS)[:, None]
    row = row_block * ROWS + line // GROUPS
    group = column_block * GROUPS + line % GROUPS
    column = group * GROUP + tl.arange(0, GROUP)[None, :]
    there = (row < rows) & (group < groups)
    inside = there & (column >= 0)

    place = weight + expert * weight_expert + row.to(tl.int64) * weight_row + column
    scaled = to_fp32(tl.load(place, mask=inside, other=0.0))
    scaled = scaled * tl.load(factors + expert * factor_expert + column, mask=inside, other=1.0)
    if DIVIDED:
        divisor = tl.load(divisors + expert * rows + row, mask=there, other=1.0)
        scaled = tl.div_rn(scaled, tl.broadcast_to(divisor, (ROWS * GROUPS, GROUP)))
    bits = tl.max(scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)[:, None]
    rounded = to_bf16(tl.div_rn(bits.to(tl.float32, bitcast=True), HALF), INTERPRETED)
    step = to_fp32(rounded)
    step = tl.where(step == 0.0, EPSILON, tl.maximum(step, TINY))
    step = tl.where(bits >= 0x7F800000, tl.where(bits > 0x7F800000, float("nan"), float("inf")), step)
    # It has no more bits than a bf16 has: nothing is rounded.
    tl.store(steps + (expert * rows + row) * groups + group, to_bf16(step, INTERPRETED), mask=there)

    code = _rint(tl.div_rn(scaled, tl.broadcast_to(step, (ROWS * GROUPS, GROUP))))
    code = tl.minimum(tl.maximum(code, LOWEST), HIGHEST)
    # Eight codes to a word, lowest bits first, each less the least.
    number = (code - LOWEST).to(tl.int32)
    # From integers again, among which zero has no sign.
    tl.store(place, to_bf16((number.to(tl.float32) + LOWEST) * step, INTERPRETED), mask=inside)
    shift = (tl.arange(0, GROUP) % 8)[None, :] * 4
    words = tl.sum(tl.reshape(number << shift, (ROWS * GROUPS, GROUP // 8, 8)), axis=2)
    at = (expert * rows + row) * (groups * (GROUP // 8)) + group * (GROUP // 8) + tl.arange(0, GROUP // 8)[None, :]
    tl.store(packed + at, words, mask=there & (at >= 0))


def quantize_in_place(
    weight: torch.Tensor, factors: torch.Tensor, divisors: torch.Tensor | None, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`int4.quantize_in_place`, bit for bit where weights are finite; a group's size is a power of two."""
    experts, rows, columns = weight.shape
    groups = columns // group_size
    by_channel = factors.expand(*factors.shape[:-1], columns).contiguous()
    packed = torch.empty(experts, rows, columns // 8, dtype=torch.int32, device=weight.device)
    steps = torch.empty(experts, rows, groups, dtype=torch.bfloat16, device=weight.device)
    tall, together, row_blocks, column_blocks = _tiles(rows, groups, group_size)
    with torch.cuda.device_of(weight):
        _quantize_in_place[(experts * row_blocks * column_blocks,)](
            weight,
            by_channel,
            by_channel if divisors is None else divisors.contiguous(),
            packed,
            steps,
            rows,
            groups,
            row_blocks,
            column_blocks,
            weight.stride(0),
            weight.stride(1),
            columns if by_channel.numel() > columns else 0,
            **_FORMAT,
            DIVIDED=divisors is not None,
            ROWS=tall,
            GROUPS=together,
            GROUP=group_size,
            INTERPRETED=INTERPRETED,
            num_warps=WARPS,
            **UNFUSED,
        )
    return packed, steps


@triton.jit
def _normalized_mean(
    weight,
    sums,
    rows,
    columns,
    weight_expert,
    weight_row,
    SMALLEST: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A group of all rows of an expert, ROWS at a time."""
    expert = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    total = tl.zeros([ROWS, GROUP], dtype=tl.float64)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        place = weight + expert * weight_expert + row.to(tl.int64)[:, None] * weight_row + column[None, :]
        value = tl.abs(to_fp32(tl.load(place, mask=(row[:, None] < rows) & (column[None, :] >= 0), other=0.0)))
        largest = tl.max(value.to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)
        unit = to_fp32(to_bf16(largest + SMALLEST, INTERPRETED))
        share = tl.div_rn(value, tl.broadcast_to(unit[:, None], (ROWS, GROUP)))
        total += to_fp32(to_bf16(share, INTERPRETED)).to(tl.float64)
    tl.store(sums + expert * columns + column, tl.sum(total, axis=0))


def normalized_mean(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """`int4.normalized_mean`; a group's size is a power of two."""
    experts, rows, columns = weight.shape
    sums = torch.empty(experts, columns, dtype=torch.float64, device=weight.device)
    with torch.cuda.device_of(weight):
        _normalized_mean[(columns // group_size, experts)](
            weight,
            sums,
            rows,
            columns,
            weight.stride(0),
            weight.stride(1),
            SMALLEST=_SMALLEST,
            ROWS=SUMMED_ROWS,
            GROUP=group_size,
            INTERPRETED=INTERPRETED,
            num_warps=WARPS,
            **UNFUSED,
        )
    return sums
