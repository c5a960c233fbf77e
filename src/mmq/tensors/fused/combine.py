"""`experts.combine` and `experts.token_losses`: each output of an expert is read once, and sums stay in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmq.tensors.fused.launch import FUSED, programs, to_fp32

# Columns at a time, eight for each of a program's threads.
COLUMNS, WARPS = 1024, 4


@triton.jit
def _weighted(total, outputs, place, weights, token, column, hidden, first, rows, output_row, TOP_K: tl.constexpr):
    """total + the sum over the token's experts of weight * output, in the experts' order, of rows that are there."""
    for j in tl.static_range(TOP_K):
        row = tl.load(place + token * TOP_K + j).to(tl.int64) - first
        weight = tl.load(weights + token * TOP_K + j)
        width = tl.where((row >= 0) & (row < rows), hidden, 0)
        total += weight * to_fp32(tl.load(outputs + row * output_row + column, mask=column < width, other=0.0))
    return total


# Compiled once for all batches of rows.
@triton.jit(do_not_specialize=["first", "rows"])
def _combine(
    outputs,
    place,
    weights,
    start,
    hidden,
    first,
    rows,
    output_row,
    start_row,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """COLUMNS channels of a token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    # Most tokens have no row in a small batch, and needn't be read and written for it.
    found = tl.zeros([], dtype=tl.int32)
    for j in tl.static_range(TOP_K):
        row = tl.load(place + token * TOP_K + j).to(tl.int64) - first
        found += ((row >= 0) & (row < rows)).to(tl.int32)
    inside = column < tl.where(found > 0, hidden, 0)
    own = start + token * start_row + column
    total = tl.load(own, mask=inside, other=0.0)
    total = _weighted(total, outputs, place, weights, token, column, hidden, first, rows, output_row, TOP_K)
    tl.store(own, total, mask=inside)


@triton.jit(do_not_specialize=["first", "rows"])
def _token_losses(
    outputs,
    place,
    weights,
    reference,
    losses,
    first,
    rows,
    output_row,
    reference_row,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """All channels of a token, COLUMNS at a time."""
    token = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([COLUMNS], dtype=tl.float32)
    for begin in range(0, HIDDEN, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        inside = column < HIDDEN
        total = -tl.load(reference + token * reference_row + column, mask=inside, other=0.0)
        total = _weighted(total, outputs, place, weights, token, column, HIDDEN, first, rows, output_row, TOP_K)
        squares += total * total
    tl.store(losses + token, tl.sum(squares, axis=0))


def combine(outputs: torch.Tensor, place: torch.Tensor, weights: torch.Tensor, start: torch.Tensor, first: int) -> None:
    """`experts.combine`, with sums in the same order."""
    (tokens, top_k), hidden = place.shape, outputs.shape[1]
    columns = min(COLUMNS, triton.next_power_of_2(hidden))
    with torch.cuda.device_of(outputs):
        _combine[(tokens, programs(hidden, columns))](
            outputs,
            place.contiguous(),
            weights.contiguous(),
            start,
            hidden,
            first,
            outputs.shape[0],
            outputs.stride(0),
            start.stride(0),
            TOP_K=top_k,
            COLUMNS=columns,
            num_warps=WARPS,
            **FUSED,
        )


def token_losses(
    outputs: torch.Tensor, place: torch.Tensor, weights: torch.Tensor, reference: torch.Tensor, first: int
) -> torch.Tensor:
    """`experts.token_losses`, with a token's sum in an order that depends on the number of channels alone."""
    (tokens, top_k), hidden = place.shape, outputs.shape[1]
    losses = torch.empty(tokens, dtype=torch.float32, device=outputs.device)
    with torch.cuda.device_of(outputs):
        _token_losses[(tokens,)](
            outputs,
            place.contiguous(),
            weights.contiguous(),
            reference,
            losses,
            first,
            outputs.shape[0],
            outputs.stride(0),
            reference.stride(0),
            HIDDEN=hidden,
            TOP_K=top_k,
            COLUMNS=min(COLUMNS, triton.next_power_of_2(hidden)),
            num_warps=WARPS,
            **FUSED,
        )
    return losses
