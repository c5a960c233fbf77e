"""fp8 e4m3 weights with one fp32 scale per 128x128 block, or one per row."""

from __future__ import annotations

import torch

from mmq.tensors.dispatch import Way, way

BLOCK = 128
# Numbers that are fp32 at one time where rows have scales.
ROW_NUMBERS = 2**24
LARGEST = 448.0
# float8_e4m3fn has no infinities; 0x7f and 0xff are NaN.
_MAGNITUDE, _NAN = 0x7F, 0x7F


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """[out, in] of a weight -> [ceil(out/128), ceil(in/128)] of its block scales."""
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def dequantize_block(weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """value * scale of its block, computed in fp32 and rounded once to bf16.

    Args:
        weight: float8_e4m3fn [out, in].
        scale: float32 [ceil(out/128), ceil(in/128)], or [out, 1] of rows.
        out: bfloat16 [out, in], contiguous and on the weight's device, to write to.

    Returns:
        bfloat16 [out, in], on the weight's device.
    """
    rows, columns = weight.shape
    result = torch.empty(rows, columns, dtype=torch.bfloat16, device=weight.device) if out is None else out
    if scale.shape == (rows, 1) and scale_shape((rows, columns)) != (rows, 1):
        step = max(1, ROW_NUMBERS // columns)
        for first in range(0, rows, step):
            part = slice(first, first + step)
            result[part] = weight[part].float() * scale[part]
        return result
    match way(weight):
        case Way.TRITON:
            from mmq.tensors.fused import dequantize

            dequantize.dequantize_blocks(weight.unsqueeze(0), scale.unsqueeze(0), result.unsqueeze(0), BLOCK)
        case Way.NUMBA:
            from mmq.tensors import compiled

            compiled.dequantize_block(weight, scale, result)
        case Way.TORCH:
            per_row = scale.repeat_interleave(BLOCK, dim=0)[:rows]
            result.copy_(weight.float() * per_row.repeat_interleave(BLOCK, dim=1)[:, :columns])
    return result


def dequantize_blocks(weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`dequantize_block` of stacked matrices, each with its own blocks.

    Args:
        weight: float8_e4m3fn [n, out, in].
        scale: float32 [n, ceil(out/128), ceil(in/128)], or [n, out, 1] of rows.
        out: where to put the result.

    Returns:
        bfloat16 [n, out, in], on the weight's device.
    """
    result = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device) if out is None else out
    if way(weight) is Way.TRITON and tuple(scale.shape[1:]) == scale_shape(tuple(weight.shape[1:])):
        from mmq.tensors.fused import dequantize

        dequantize.dequantize_blocks(weight, scale, result, BLOCK)
        return result
    for matrix, own, target in zip(weight, scale, result, strict=True):
        dequantize_block(matrix, own, target)
    return result


def block_scales(weight: torch.Tensor, block: tuple[int, int] = (BLOCK, BLOCK)) -> torch.Tensor:
    """The scales that bring each block's largest magnitude to fp8's: float32 [blocks of rows, blocks of columns].

    Args:
        weight: [out, in].
        block: rows and columns that share a scale; 0 stands for all of them.
    """
    largest = _in_blocks(weight.float(), block).abs().amax((1, 3))
    return (largest / LARGEST).clamp(min=1e-12)


def quantize_block(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] = (BLOCK, BLOCK)) -> torch.Tensor:
    """weight / scale of its block, to the nearest fp8: float8_e4m3fn [out, in]."""
    blocks = _in_blocks(weight.float(), block) / scale[:, None, :, None]
    rows, columns = weight.shape
    whole = blocks.reshape(blocks.shape[0] * blocks.shape[1], -1)
    return whole[:rows, :columns].to(torch.float8_e4m3fn).contiguous()


def round_block(weight: torch.Tensor) -> torch.Tensor:
    """bfloat16 [out, in] rounded to fp8 in blocks, as it is read back: bfloat16 [out, in]."""
    scale = block_scales(weight)
    return dequantize_block(quantize_block(weight, scale), scale)


def _in_blocks(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[out, in] padded with zeros: [blocks of rows, rows, blocks of columns, columns]."""
    high, wide = (share or size for size, share in zip(weight.shape, block, strict=True))
    rows, columns = (-(-size // share) for size, share in zip(weight.shape, (high, wide), strict=True))
    padded = weight.new_zeros(rows * high, columns * wide)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    return padded.view(rows, high, columns, wide)


def broken_matrices(weight: torch.Tensor) -> torch.Tensor:
    """Which of stacked matrices [n, out, in], float8_e4m3fn or bfloat16, hold NaN or infinity: bool [n]."""
    if weight.dtype == torch.float8_e4m3fn:
        return (weight.view(torch.uint8).bitwise_and(_MAGNITUDE) == _NAN).flatten(1).any(1)
    return ~torch.isfinite(weight).flatten(1).all(1)


def has_nan(weight: torch.Tensor) -> bool:
    """Whether a float8_e4m3fn tensor holds a NaN."""
    if weight.numel() == 0:
        return False
    if way(weight) is Way.NUMBA:
        from mmq.tensors import compiled

        return compiled.has_nan(weight)
    return bool(weight.view(torch.uint8).bitwise_and(_MAGNITUDE).max() == _NAN)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a float tensor of any dtype holds neither NaN nor infinity; integers are always finite."""
    if tensor.dtype == torch.float8_e4m3fn:
        return not has_nan(tensor)
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype == torch.float8_e5m2:
        tensor = tensor.to(torch.bfloat16)
    # A NaN or an infinity survives the sum; fp64 keeps a sum of large finite values finite.
    total = tensor.sum(dtype=torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())
