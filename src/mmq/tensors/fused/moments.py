"""Sums over each expert's rows: `experts.squares_by_expert`, `experts.magnitude_sums` and `experts.second_moments`.

An element of a result is one program's, which takes its rows in their order: the same bits every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from mmq.tensors.fused.launch import FUSED, INTERPRETED, dot, large_shared_memory, programs, to_fp32

# Rows and columns at a time, eight numbers to a thread.
ROWS, COLUMNS, WARPS = 8, 128, 4
# Rows' sums added at a time, for an expert.
SUMS = 1024


@triton.jit
def _row_squares(rows, squares, row_stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of a row's squares."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for first in range(0, WIDTH, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        value = to_fp32(tl.load(rows + row * row_stride + column, mask=column < WIDTH, other=0.0))
        total += value * value
    tl.store(squares + row, tl.sum(total, axis=0))


@triton.jit
def _row_products(one, other, sums, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of a row of products."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for first in range(0, WIDTH, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < WIDTH
        a = to_fp32(tl.load(one + row * WIDTH + column, mask=inside, other=0.0))
        total += a * to_fp32(tl.load(other + row * WIDTH + column, mask=inside, other=0.0))
    tl.store(sums + row, tl.sum(total, axis=0))


@triton.jit
def _sums_by_expert(numbers, ends, sums, ROWS: tl.constexpr):
    """The sum of an expert's rows' numbers, in fp64."""
    expert = tl.program_id(0)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    stop = tl.load(ends + expert)
    total = tl.zeros([ROWS], dtype=tl.float64)
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        total += tl.load(numbers + row, mask=row < stop, other=0.0).to(tl.float64)
    tl.store(sums + expert, tl.sum(total, axis=0))


@triton.jit
def _magnitude_sums(rows, ends, sums, width, row_stride, sum_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS channels of an expert."""
    expert = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    stop = tl.load(ends + expert)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        place = rows + row.to(tl.int64)[:, None] * row_stride + column[None, :]
        inside = (row[:, None] < stop) & (column[None, :] < width)
        total += tl.abs(to_fp32(tl.load(place, mask=inside, other=0.0)))
    own = sums + expert.to(tl.int64) * sum_stride + column
    tl.store(own, tl.load(own, mask=column < width, other=0.0) + tl.sum(total, axis=0), mask=column < width)


@triton.jit
def _second_moments(
    rows,
    ends,
    moments,
    width,
    row_stride,
    moment_expert,
    moment_row,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A SIDE x SIDE tile of an expert's X^T X on or below the diagonal, and its mirror above."""
    expert = tl.program_id(2)
    upper, lower = tl.program_id(0), tl.program_id(1)
    if upper > lower:
        return
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    stop = tl.load(ends + expert)
    if start == stop:
        return
    one = lower * SIDE + tl.arange(0, SIDE)
    other = upper * SIDE + tl.arange(0, SIDE)
    depth = tl.arange(0, DEPTH)
    total = tl.zeros([SIDE, SIDE], dtype=tl.float32)
    for first in range(start, stop, DEPTH):
        row = (first + depth).to(tl.int64) * row_stride
        inside = first + depth < stop
        a = tl.load(rows + row[None, :] + one[:, None], mask=inside[None, :] & (one[:, None] < width), other=0.0)
        b = tl.load(rows + row[:, None] + other[None, :], mask=inside[:, None] & (other[None, :] < width), other=0.0)
        total = dot(a, b, total, INTERPRETED)
    own = moments + expert.to(tl.int64) * moment_expert
    place = own + one[:, None] * moment_row + other[None, :]
    inside = (one[:, None] < width) & (other[None, :] < width)
    total += tl.load(place, mask=inside, other=0.0)
    tl.store(place, total, mask=inside)
    if upper < lower:
        # What was there before is symmetric too.
        tl.store(own + other[None, :] * moment_row + one[:, None], total, mask=inside)


def squares_by_expert(rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`experts.squares_by_expert`."""
    count, width = rows.shape
    squares = torch.empty(count, dtype=torch.float32, device=rows.device)
    sums = torch.empty(ends.shape[0], dtype=torch.float64, device=rows.device)
    with torch.cuda.device_of(rows):
        columns = min(1024, triton.next_power_of_2(width))
        _row_squares[(count,)](rows, squares, rows.stride(0), WIDTH=width, COLUMNS=columns, num_warps=WARPS, **FUSED)
        _sums_by_expert[(ends.shape[0],)](squares, ends, sums, ROWS=SUMS, num_warps=WARPS, **FUSED)
    return sums


def magnitude_sums(rows: torch.Tensor, ends: torch.Tensor, out: torch.Tensor) -> None:
    """`experts.magnitude_sums`."""
    width = rows.shape[1]
    with torch.cuda.device_of(rows):
        _magnitude_sums[(programs(width, COLUMNS), ends.shape[0])](
            rows, ends, out, width, rows.stride(0), out.stride(0), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS, **FUSED
        )


@dataclass(frozen=True)
class Tiles:
    """Sides of a program's tile, how many rows it loads at a time and how far ahead."""

    side: int
    depth: int
    stages: int
    warps: int


LARGE, SMALL, LEAST = Tiles(128, 64, 4, 8), Tiles(128, 32, 3, 8), Tiles(32, 16, 1, 1)


@cache
def _tiles(device: torch.device) -> Tiles:
    if device.type != "cuda":
        return LEAST
    return LARGE if large_shared_memory(torch.cuda.get_device_capability(device)) else SMALL


def second_moments(rows: torch.Tensor, ends: torch.Tensor, out: torch.Tensor) -> None:
    """`experts.second_moments`."""
    width = rows.shape[1]
    tiles = _tiles(rows.device)
    side = programs(width, tiles.side)
    with torch.cuda.device_of(rows):
        _second_moments[(side, side, ends.shape[0])](
            rows,
            ends,
            out,
            width,
            rows.stride(0),
            out.stride(0),
            out.stride(1),
            SIDE=tiles.side,
            DEPTH=tiles.depth,
            INTERPRETED=INTERPRETED,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **FUSED,
        )


def row_products(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Sums over the last dimension of the products of two bfloat16 tensors [..., n] that lie contiguous: float32."""
    sums = torch.empty(one.shape[:-1], dtype=torch.float32, device=one.device)
    width = one.shape[-1]
    with torch.cuda.device_of(one):
        _row_products[(sums.numel(),)](
            one, other, sums, WIDTH=width, COLUMNS=min(1024, triton.next_power_of_2(width)), num_warps=WARPS, **FUSED
        )
    return sums
