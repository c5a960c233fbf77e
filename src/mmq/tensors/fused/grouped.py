"""Products of sorted rows with their experts' matrices, in one launch: `experts.grouped_rows`, and `experts.gated_rows`
with the rows gathered before it and the gate applied after it.

Which expert and rows a program has, it finds from where experts' rows end: the host is asked nothing, so that it runs
ahead of the device. No sum is split, so results do not depend on the order of programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from mmq.tensors.fused.launch import FUSED, INTERPRETED, dot, large_shared_memory, programs, to_bf16, to_fp32


@dataclass(frozen=True)
class Tiles:
    """A program's rows and columns, how much of the inner dimension it loads at a time and how far ahead."""

    height: int
    width: int
    depth: int
    stages: int
    warps: int


# 192 KiB of shared memory, on an A100 144, since it needs a buffer less; 48 where there are 99, for two programs.
LARGE, SMALL = Tiles(128, 256, 64, 4, 8), Tiles(128, 128, 32, 4, 4)
# For the interpreter.
LEAST = Tiles(16, 32, 32, 1, 1)
# Row tiles of an expert that go through its columns side by side, so that its weights are read once from memory.
BAND = 16


@triton.jit
def _grouped_product(
    rows,
    token,
    weight,
    ends,
    out,
    experts,
    columns,
    column_blocks,
    row_stride,
    weight_expert,
    weight_row,
    out_stride,
    INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    GATHERED: tl.constexpr,
    GATED: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """HEIGHT rows of an expert times WIDTH of its matrix's rows; gated, times WIDTH/2 of gate's and of up's.

    `columns` is what `out` has; EXPERTS, a power of two, is no less than `experts`.
    """
    program = tl.program_id(0)
    index = tl.arange(0, EXPERTS)
    stops = tl.load(ends + index, mask=index < experts, other=0)
    starts = tl.load(ends + index - 1, mask=(index > 0) & (index < experts), other=0)
    blocks = tl.cumsum((stops - starts + (HEIGHT - 1)) // HEIGHT, axis=0) * column_blocks
    expert = tl.sum((blocks <= program).to(tl.int32), axis=0)
    if expert >= experts:
        return
    before = tl.sum(tl.where(index == expert - 1, blocks, 0), axis=0)
    start = tl.sum(tl.where(index == expert, starts, 0), axis=0)
    stop = tl.sum(tl.where(index == expert, stops, 0), axis=0)

    own = program - before
    in_band = BAND * column_blocks
    band = (own // in_band) * BAND
    tall = tl.minimum((stop - start + (HEIGHT - 1)) // HEIGHT - band, BAND)
    row_tile = band + (own % in_band) % tall
    column_tile = (own % in_band) // tall

    row = start + row_tile * HEIGHT + tl.arange(0, HEIGHT)
    present = row < stop
    # Loads need no mask: what they read instead is stored nowhere.
    row = tl.where(present, row, start)
    source = tl.load(token + row).to(tl.int64) if GATHERED else row.to(tl.int64)
    wide = tl.arange(0, WIDTH)
    if GATED:
        # Gate and up in turns, so that a thread has both of a pair.
        column = column_tile * (WIDTH // 2) + wide // 2
        line = tl.where(column < columns, column + (wide % 2) * columns, 0)
    else:
        column = column_tile * WIDTH + wide
        line = tl.where(column < columns, column, 0)
    depth = tl.arange(0, DEPTH)
    left = rows + source[:, None] * row_stride + depth[None, :]
    right = weight + expert.to(tl.int64) * weight_expert + (line.to(tl.int64)[None, :] * weight_row + depth[:, None])
    total = tl.zeros([HEIGHT, WIDTH], dtype=tl.float32)
    for first in range(0, INNER, DEPTH):
        if INNER % DEPTH == 0:
            a = tl.load(left)
            b = tl.load(right)
        else:
            a = tl.load(left, mask=depth[None, :] < INNER - first, other=0.0)
            b = tl.load(right, mask=depth[:, None] < INNER - first, other=0.0)
        total = dot(a, b, total, INTERPRETED)
        left += DEPTH
        right += DEPTH

    if GATED:
        gate, up = tl.split(tl.reshape(total, [HEIGHT, WIDTH // 2, 2]))
        # Rounded where torch rounds: the products, silu, and what is gated.
        gate = to_fp32(to_bf16(gate, INTERPRETED))
        up = to_fp32(to_bf16(up, INTERPRETED))
        gate = to_fp32(to_bf16(gate / (1.0 + tl.exp(-gate)), INTERPRETED))
        result = to_bf16(gate * up, INTERPRETED)
        target = column_tile * (WIDTH // 2) + tl.arange(0, WIDTH // 2)
    else:
        result = to_bf16(total, INTERPRETED)
        target = column_tile * WIDTH + tl.arange(0, WIDTH)
    place = out + row.to(tl.int64)[:, None] * out_stride + target[None, :]
    tl.store(place, result, mask=present[:, None] & (target[None, :] < columns))


def gated_rows(x: torch.Tensor, token: torch.Tensor | None, gate_up: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`experts.gated_rows` with silu."""
    out = x.new_empty(x.shape[0] if token is None else token.shape[0], gate_up.shape[1] // 2)
    _launch(x, token, gate_up, ends, out, gated=True)
    return out


def grouped_rows(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, out: torch.Tensor) -> None:
    """`experts.grouped_rows`."""
    _launch(rows, None, weight, ends, out, gated=False)


def _launch(
    rows: torch.Tensor,
    token: torch.Tensor | None,
    weight: torch.Tensor,
    ends: torch.Tensor,
    out: torch.Tensor,
    gated: bool,
) -> None:
    count, columns = out.shape
    experts, _, inner = weight.shape
    tiles = _tiles(rows.device)
    column_blocks = programs(columns, tiles.width // 2 if gated else tiles.width)
    # No expert has more than one tile that is not full.
    most = count // tiles.height + min(experts, count)
    with torch.cuda.device_of(rows):
        _grouped_product[(most * column_blocks,)](
            rows,
            ends if token is None else token,
            weight,
            ends,
            out,
            experts,
            columns,
            column_blocks,
            rows.stride(0),
            weight.stride(0),
            weight.stride(1),
            out.stride(0),
            INNER=inner,
            EXPERTS=triton.next_power_of_2(experts),
            GATHERED=token is not None,
            GATED=gated,
            HEIGHT=tiles.height,
            WIDTH=tiles.width,
            DEPTH=tiles.depth,
            BAND=BAND,
            INTERPRETED=INTERPRETED,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **FUSED,
        )


@cache
def _tiles(device: torch.device) -> Tiles:
    if device.type != "cuda":
        return LEAST
    return LARGE if large_shared_memory(torch.cuda.get_device_capability(device)) else SMALL
