"""`rounding.searched_scale` and the columns of `rounding.round_compensated`, each in one kernel.

Torch takes some ten passes over the weights for each share of a scale, and launches some seven kernels for each column.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmq.tensors.fused.launch import FUSED, INTERPRETED, UNFUSED, programs, to_bf16, to_fp32
from mmq.tensors.fused.quantize import _FORMAT, _rint

# Rows of a program.
SEARCHED_ROWS, ROUNDED_ROWS, WARPS = 16, 32, 4


@triton.jit
def _searched_scale(
    weight,
    factors,
    shares,
    found,
    rows,
    groups,
    count,
    EPSILON: tl.constexpr,
    TINY: tl.constexpr,
    HALF: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One group of ROWS rows of an expert."""
    expert = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) % groups
    row = (tl.program_id(0) // groups) * ROWS + tl.arange(0, ROWS)
    column = group * GROUP + tl.arange(0, GROUP)
    there = row < rows
    place = weight + expert * rows * groups * GROUP + row.to(tl.int64)[:, None] * (groups * GROUP) + column[None, :]
    value = tl.load(place, mask=there[:, None] & (column[None, :] >= 0), other=0.0)
    factor = tl.load(factors + expert * groups * GROUP + column)
    largest = tl.div_rn(tl.max(tl.abs(value), axis=1), HALF)
    best = tl.full([ROWS], float("inf"), tl.float32)
    chosen = tl.zeros([ROWS], tl.float32)
    for number in range(0, count):
        step = to_fp32(to_bf16(largest * tl.load(shares + number), INTERPRETED))
        step = tl.where(step == 0.0, EPSILON, tl.maximum(step, TINY))
        code = _rint(tl.div_rn(value, tl.broadcast_to(step[:, None], (ROWS, GROUP))))
        code = tl.minimum(tl.maximum(code, LOWEST), HIGHEST)
        change = code * step[:, None] - value
        error = tl.sum(change * change * factor[None, :], axis=1)
        chosen = tl.where((error < best) | (number == 0), step, chosen)
        best = tl.minimum(best, error)
    # Where no share gives a number, the scale of the whole range.
    whole = to_fp32(to_bf16(largest, INTERPRETED))
    whole = tl.where(whole == 0.0, EPSILON, tl.maximum(whole, TINY))
    chosen = tl.where(best < float("inf"), chosen, whole)
    tl.store(found + (expert * rows + row) * groups + group, to_bf16(chosen, INTERPRETED), mask=there)


def searched_scale(
    weight: torch.Tensor, importance: torch.Tensor, group_size: int, shares: tuple[float, ...]
) -> torch.Tensor:
    """`rounding.searched_scale`; a group's size is a power of two."""
    experts, rows, columns = weight.shape
    groups = columns // group_size
    found = torch.empty(experts, rows, groups, dtype=torch.bfloat16, device=weight.device)
    with torch.cuda.device_of(weight):
        _searched_scale[(programs(rows, SEARCHED_ROWS) * groups, experts)](
            weight.contiguous(),
            importance.contiguous(),
            torch.tensor(shares, device=weight.device),
            found,
            rows,
            groups,
            len(shares),
            **_FORMAT,
            ROWS=SEARCHED_ROWS,
            GROUP=group_size,
            INTERPRETED=INTERPRETED,
            num_warps=WARPS,
            **FUSED,
        )
    return found


@triton.jit
def _round_columns(
    aim,
    lower,
    scale,
    left,
    codes,
    rows,
    columns,
    aim_expert,
    aim_row,
    lower_expert,
    lower_row,
    lower_column,
    scale_expert,
    scale_row,
    left_expert,
    left_row,
    codes_expert,
    codes_row,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """All columns of ROWS rows of an expert."""
    expert = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    here = aim + expert * aim_expert + row * aim_row + column
    there = left + expert * left_expert + row * left_row + column
    aims = tl.load(here, mask=inside, other=0.0)
    steps = tl.load(scale + expert * scale_expert + row * scale_row + column, mask=inside, other=1.0)
    lefts = tl.load(there, mask=inside, other=0.0)
    found = tl.zeros([ROWS, COLUMNS], tl.float32)
    for passed in range(0, columns):
        now = columns - 1 - passed
        own = column == now
        # Of one number and zeros, the sum is the number.
        step = tl.sum(tl.where(own, steps, 0.0), axis=1)
        code = _rint(tl.div_rn(tl.sum(tl.where(own, aims, 0.0), axis=1), step))
        code = tl.minimum(tl.maximum(code, LOWEST), HIGHEST)
        error = tl.sum(tl.where(own, lefts, 0.0), axis=1) - code * step
        found = tl.where(own, code[:, None], found)
        lefts = tl.where(own, error[:, None], lefts)
        factors = lower + expert * lower_expert + now * lower_row + column * lower_column
        passing = tl.load(factors, mask=column < now, other=0.0)
        aims += error[:, None] * passing
    tl.store(here, aims, mask=inside)
    tl.store(there, lefts, mask=inside)
    tl.store(codes + expert * codes_expert + row * codes_row + column, found.to(tl.int8), mask=inside)


def round_columns(
    aim: torch.Tensor, lower: torch.Tensor, scale: torch.Tensor, left: torch.Tensor, codes: torch.Tensor
) -> None:
    """`rounding._round_columns`, bit for bit; columns lie together, those of `lower` as a factorization leaves them."""
    experts, rows, columns = aim.shape
    with torch.cuda.device_of(aim):
        _round_columns[(programs(rows, ROUNDED_ROWS), experts)](
            aim,
            lower,
            scale,
            left,
            codes,
            rows,
            columns,
            *aim.stride()[:2],
            *lower.stride(),
            *scale.stride()[:2],
            *left.stride()[:2],
            *codes.stride()[:2],
            LOWEST=_FORMAT["LOWEST"],
            HIGHEST=_FORMAT["HIGHEST"],
            ROWS=ROUNDED_ROWS,
            COLUMNS=triton.next_power_of_2(columns),
            num_warps=WARPS,
            **UNFUSED,
        )
