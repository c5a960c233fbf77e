"""`fp8.dequantize_blocks` in one pass: a byte of a weight read, two written, the matrices of a layer in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmq.tensors.fused.launch import INTERPRETED, UNFUSED, programs, to_bf16

# A program's rows and columns, within a block that shares a scale.
ROWS, COLUMNS, WARPS = 32, 128, 4


@triton.jit
def _dequantize(
    weight,
    scale,
    out,
    rows,
    columns,
    row_blocks,
    column_blocks,
    weight_matrix,
    weight_row,
    scale_matrix,
    scale_row,
    out_matrix,
    out_row,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """ROWS x COLUMNS weights of a matrix, all of one block."""
    program = tl.program_id(0)
    column_block = program % column_blocks
    row_block = (program // column_blocks) % row_blocks
    matrix = (program // column_blocks // row_blocks).to(tl.int64)
    first = row_block * ROWS
    start = first.to(tl.int64)

    row = tl.arange(0, ROWS)[:, None]
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (first + row < rows) & (column < columns)
    code = tl.load(
        weight + (matrix * weight_matrix + start * weight_row) + (row * weight_row + column), mask=inside, other=0
    ).to(tl.uint32)
    # e4m3's sign, exponent and mantissa, where fp32 has them, read as the value times 2^-120: its exponents are biased
    # by 7, fp32's by 127. There is no infinity, and one NaN of either sign.
    bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    value = tl.where((code & 0x7F) == 0x7F, float("nan"), value)
    own = tl.load(scale + matrix * scale_matrix + (first // BLOCK) * scale_row + column_block * COLUMNS // BLOCK)
    result = to_bf16(value * own, INTERPRETED)
    tl.store(out + (matrix * out_matrix + start * out_row) + (row * out_row + column), result, mask=inside)


def dequantize_blocks(weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, block: int) -> None:
    """`fp8.dequantize_blocks`, bit for bit; `block` is a multiple of ROWS and of COLUMNS."""
    matrices, rows, columns = weight.shape
    weight, scale = weight.contiguous(), scale.contiguous()
    row_blocks, column_blocks = programs(rows, ROWS), programs(columns, COLUMNS)
    with torch.cuda.device_of(weight):
        _dequantize[(matrices * row_blocks * column_blocks,)](
            weight.view(torch.uint8),
            scale,
            out,
            rows,
            columns,
            row_blocks,
            column_blocks,
            weight.stride(0),
            weight.stride(1),
            scale.stride(0),
            scale.stride(1),
            out.stride(0),
            out.stride(1),
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            BLOCK=block,
            INTERPRETED=INTERPRETED,
            num_warps=WARPS,
            **UNFUSED,
        )
