"""fp8 e4m3 weights with one fp32 scale per 128x128 block."""

from __future__ import annotations

import torch

from mmq.tensors.dispatch import Way, way

BLOCK = 128
# float8_e4m3fn has no infinities; 0x7f and 0xff are NaN.
_MAGNITUDE, _NAN = 0x7F, 0x7F
# Bits of e4m3 moved to where bf16 has them read as the value times 2^-120: the exponent biases are 7 and 127.
_BIAS = 2.0**120
_LARGEST_FOLDED_SCALE = 2.0**7
# Rows at a time: the intermediate tensors of a 128-row strip stay in the processor's cache.
_STRIP = 128


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """[out, in] of a weight -> [ceil(out/128), ceil(in/128)] of its block scales."""
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def dequantize_block(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """value * scale of its block, computed in fp32 and rounded once to bf16.

    Args:
        weight: float8_e4m3fn [out, in].
        scale: float32 [ceil(out/128), ceil(in/128)].

    Returns:
        bfloat16 [out, in], on the weight's device.

    torch's own cast from fp8 takes a value at a time on CPUs; shifting the bits into bf16's places takes vectors.
    """
    if way(weight) is Way.TRITON:
        return dequantize_blocks(weight.unsqueeze(0), scale.unsqueeze(0))[0]
    rows, columns = weight.shape
    per_column = scale.repeat_interleave(BLOCK, dim=1)[:, :columns]
    if weight.device.type != "cpu" or bool(scale.abs().max() >= _LARGEST_FOLDED_SCALE):
        per_row = per_column.repeat_interleave(BLOCK, dim=0)[:rows]
        return (weight.float() * per_row).to(torch.bfloat16)
    per_column = per_column * _BIAS
    result = torch.empty(rows, columns, dtype=torch.bfloat16)
    bits = torch.empty(min(_STRIP, rows), columns, dtype=torch.int16)
    values = torch.empty(min(_STRIP, rows), columns, dtype=torch.float32)
    raw = weight.view(torch.int8)
    for block, start in enumerate(range(0, rows, _STRIP)):
        strip = raw[start : start + _STRIP]
        height = strip.shape[0]
        # Sign extension puts e4m3's sign where bf16 has it; the mask drops the copies between.
        moved = bits[:height].copy_(strip).bitwise_left_shift_(4).bitwise_and_(-0x7810)
        values[:height].copy_(moved.view(torch.bfloat16)).mul_(per_column[block])
        result[start : start + height].copy_(values[:height])
    return result


def dequantize_blocks(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`dequantize_block` of stacked matrices, each with its own blocks.

    Args:
        weight: float8_e4m3fn [n, out, in].
        scale: float32 [n, ceil(out/128), ceil(in/128)].

    Returns:
        bfloat16 [n, out, in], on the weight's device.
    """
    result = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
    if way(weight) is Way.TRITON:
        from mmq.tensors.fused import dequantize

        dequantize.dequantize_blocks(weight, scale, result, BLOCK)
        return result
    for matrix, own, target in zip(weight, scale, result, strict=True):
        target.copy_(dequantize_block(matrix, own))
    return result


def has_nan(weight: torch.Tensor) -> bool:
    """Whether a float8_e4m3fn tensor holds a NaN."""
    if weight.numel() == 0:
        return False
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
