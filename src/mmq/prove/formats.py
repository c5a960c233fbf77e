"""bf16, block fp8 and packed int4 read by numpy, from the formats' definitions."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

from mmq.errors import CheckpointError

Array = np.ndarray[Any, np.dtype[Any]]


def raw(tensor: torch.Tensor) -> Array:
    """The bytes of a tensor: uint8 [n]."""
    array: Array = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return array


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(raw(tensor).data).hexdigest()


def float32(tensor: torch.Tensor) -> Array:
    """bf16, fp16 or fp32 -> fp32: a bf16 is the upper half of a float."""
    bits = raw(tensor)
    if tensor.dtype == torch.bfloat16:
        return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
    if tensor.dtype == torch.float32:
        return bits.view(np.float32).reshape(tensor.shape)
    if tensor.dtype == torch.float16:
        return bits.view(np.float16).astype(np.float32).reshape(tensor.shape)
    raise CheckpointError(f"a tensor of dtype {tensor.dtype} stands where bf16 or fp32 must be")


def float64(tensor: torch.Tensor) -> Array:
    return float32(tensor).astype(np.float64)


def _e4m3_table() -> Array:
    """The 256 values of e4m3 (sign, 4 exponent bits of bias 7, 3 mantissa bits; no infinities)."""
    values = []
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        value = 2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8)
        values.append(float("nan") if code & 127 == 127 else -value if code & 128 else value)
    return np.array(values, dtype=np.float32)


E4M3 = _e4m3_table()


def fp8_values(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] = (128, 128)) -> Array:
    """float32 [out, in]: value times its block's scale.

    Args:
        block: rows and columns that share a scale; 0 stands for all of them.
    """
    rows, columns = weight.shape
    high, wide = block[0] or rows, block[1] or columns
    blocks = np.repeat(np.repeat(float32(scale), high, axis=0)[:rows], wide, axis=1)[:, :columns]
    return E4M3[raw(weight)].reshape(rows, columns) * blocks


def int4_codes(packed: torch.Tensor, scale: torch.Tensor) -> tuple[Array, Array]:
    """float32 [out, in] codes and the step of each, from int32 words of eight codes, lowest bits first, each plus 8."""
    words = raw(packed).view(np.uint32).reshape(packed.shape)
    codes = (words[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
    values = codes.reshape(words.shape[0], -1).astype(np.float32) - 8
    scales = float32(scale)
    return values, np.repeat(scales, values.shape[1] // scales.shape[1], axis=1)
