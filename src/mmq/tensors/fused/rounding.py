"""`rounding.searched_scale`, the columns of `rounding.round_compensated` and a group of `rounding.descend`, each in one
kernel.

Torch takes some ten passes over the weights for each share of a scale, and launches some seven kernels for each column,
for a group thirty beside them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmq.tensors.fused.launch import FUSED, INTERPRETED, UNFUSED, programs, to_bf16, to_fp32
from mmq.tensors.fused.quantize import _FORMAT, _rint

# Rows of a program.
SEARCHED_ROWS, ROUNDED_ROWS, WARPS = 16, 16, 4
# Rows of H at a time.
DEPTH = 16


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


@triton.jit
def _gains(slope, code, least, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """Of moving each code as its slope has it."""
    after = code + _way(slope)
    return tl.where((after >= LOWEST) & (after <= HIGHEST), 2.0 * tl.abs(slope) - least[None, :], float("-inf"))


@triton.jit
def _way(slope):
    return tl.where(slope < 0.0, -1.0, 1.0)


@triton.jit
def _move(slope, code, place, column, allowed, of_columns, own_row, own_column):
    """Move one code of each row, where that is allowed: slope and code then, of what `rounding._settle` has of them."""
    mine = column[None, :] == place[:, None]
    # Of one number and zeros, the sum is the number.
    way = tl.where(allowed, _way(tl.sum(tl.where(mine, slope, 0.0), axis=1)), 0.0)
    of_place = tl.load(of_columns + place.to(tl.int64)[:, None] * own_row + column[None, :] * own_column)
    return slope - way[:, None] * of_place, code + tl.where(mine, way[:, None], 0.0)


@triton.jit
def _descend_group(
    slope,
    own,
    error,
    codes,
    scale,
    rows,
    tries,
    slack,
    slope_expert,
    slope_row,
    own_expert,
    own_row,
    own_column,
    error_expert,
    error_row,
    codes_expert,
    codes_row,
    scale_expert,
    scale_row,
    TINY: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    DEPTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The scales of ROWS rows of an expert, then their codes."""
    expert = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, GROUP)
    there = row < rows
    inside = there[:, None] & (column[None, :] >= 0)
    places = codes + expert * codes_expert + row[:, None] * codes_row + column[None, :]
    code = tl.load(places, mask=inside, other=0).to(tl.float32)
    slopes = tl.load(slope + expert * slope_expert + row[:, None] * slope_row + column[None, :], mask=inside, other=0.0)
    steps = scale + expert * scale_expert + row * scale_row
    step = to_fp32(tl.load(steps, mask=there, other=1.0))
    part = own + expert * own_expert
    # A few of H's rows at a time: all of them would not fit into registers.
    curved = tl.zeros([ROWS, GROUP], tl.float32)
    reach = tl.zeros([GROUP], tl.float32)
    for begin in range(0, GROUP, DEPTH):
        some = begin + tl.arange(0, DEPTH)
        block = tl.load(part + some[:, None] * own_row + column[None, :] * own_column)
        few = codes + expert * codes_expert + row[:, None] * codes_row + some[None, :]
        few = tl.load(few, mask=there[:, None] & (some[None, :] >= 0), other=0).to(tl.float32)
        curved = tl.dot(few, block, curved, input_precision="ieee")
        others = tl.where(some[:, None] == column[None, :], 0.0, tl.abs(block))
        reach = tl.maximum(reach, 2.0 * tl.max(others, axis=0))
    by_scale = tl.sum(slopes * code, axis=1)
    curvature = tl.sum(curved * code, axis=1)
    found = to_fp32(to_bf16(step + tl.div_rn(by_scale, curvature), INTERPRETED))
    change = found - step
    # NaN, of a group of zeros, is no gain.
    gain = (found >= TINY) & (change * (2 * by_scale - change * curvature) > 0)
    change = tl.where(gain, change, 0.0)
    step = tl.where(gain, found, step)
    tl.store(steps, to_bf16(step, INTERPRETED), mask=there)
    slopes = tl.div_rn(slopes - change[:, None] * curved, tl.broadcast_to(step[:, None], (ROWS, GROUP)))
    place = error + expert * error_expert + row[:, None] * error_row + column[None, :]
    weight = tl.load(place, mask=inside, other=0.0) + code * (step - change)[:, None]
    least = (1.0 + slack) * tl.load(part + column * (own_row + own_column))
    left, moving = GROUP, 1
    while moving > 0:
        gains = _gains(slopes, code, least, LOWEST, HIGHEST)
        better = tl.max(gains, axis=1) > 0.0
        one = tl.argmax(gains, axis=1)
        slopes, code = _move(slopes, code, one, column, better, part, own_row, own_column)
        left -= 1
        moving = tl.where(left > 0, tl.max(better.to(tl.int32), axis=0), 0)
    tried = tl.zeros([ROWS, GROUP], tl.int1)
    left, moving = tries, tries
    while moving > 0:
        gains = _gains(slopes, code, least, LOWEST, HIGHEST)
        gains = tl.where(tried | (gains + reach[None, :] <= 0.0), float("-inf"), gains)
        first = tl.max(gains, axis=1)
        one = tl.argmax(gains, axis=1)
        mine = column[None, :] == one[:, None]
        tried |= mine
        possible = first > float("-inf")
        on, beyond = _move(slopes, code, one, column, possible, part, own_row, own_column)
        gains = tl.where(mine, float("-inf"), _gains(on, beyond, least, LOWEST, HIGHEST))
        better = possible & (first + tl.max(gains, axis=1) > 0.0)
        on, beyond = _move(on, beyond, tl.argmax(gains, axis=1), column, better, part, own_row, own_column)
        slopes = tl.where(better[:, None], on, slopes)
        code = tl.where(better[:, None], beyond, code)
        left -= 1
        moving = tl.where(left > 0, tl.max(possible.to(tl.int32), axis=0), 0)
    tl.store(places, code.to(tl.int8), mask=inside)
    tl.store(place, weight - code * step[:, None], mask=inside)


def descend_group(
    slope: torch.Tensor,
    own: torch.Tensor,
    error: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    tries: int,
    slack: float,
) -> None:
    """`rounding._descend_group`; a group's size is a power of two, and sixteen at least."""
    experts, rows, group = slope.shape
    with torch.cuda.device_of(slope):
        _descend_group[(programs(rows, ROUNDED_ROWS), experts)](
            slope,
            own,
            error,
            codes,
            scale,
            rows,
            min(tries, group),
            slack,
            *slope.stride()[:2],
            *own.stride(),
            *error.stride()[:2],
            *codes.stride()[:2],
            *scale.stride(),
            TINY=_FORMAT["TINY"],
            LOWEST=_FORMAT["LOWEST"],
            HIGHEST=_FORMAT["HIGHEST"],
            ROWS=ROUNDED_ROWS,
            GROUP=group,
            DEPTH=DEPTH,
            INTERPRETED=INTERPRETED,
            num_warps=WARPS,
            **UNFUSED,
        )
