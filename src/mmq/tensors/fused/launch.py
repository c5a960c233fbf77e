"""What all kernels share: numbers of programs, rounding, and the card that a tensor is on."""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Kernels run on a CPU then, one program after the other.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Whether a product and the sum after it may be rounded once. Every kernel says it: Triton's own choice changes with its
# version.
FUSED, UNFUSED = {"enable_fp_fusion": True}, {"enable_fp_fusion": False}


def programs(size: int, block: int) -> int:
    """How many blocks cover a size."""
    return -(-size // block)


def large_shared_memory(capability: tuple[int, int]) -> bool:
    """Whether a program may have 160 KiB: on an A100, Hopper and data-centre Blackwell; other cards give it 99."""
    return capability == (8, 0) or capability[0] in (9, 10)


@triton.jit
def to_fp32(value):
    """bf16 to fp32, by bits: Triton's interpreter loses denormal numbers where a GPU does not."""
    return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def to_bf16(value, INTERPRETED: tl.constexpr):
    """fp32 to bf16, to nearest even; Triton's interpreter would cut bits off, so that there it is done by them."""
    if INTERPRETED:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, 0x7FC0)
        result = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(tl.bfloat16)
    return result


@triton.jit
def dot(left, right, total, INTERPRETED: tl.constexpr):
    """total + left @ right of bf16, in fp32; Triton's interpreter would multiply bf16's bits as integers."""
    if INTERPRETED:
        total = total + tl.dot(to_fp32(left), to_fp32(right), input_precision="ieee")
    else:
        total = tl.dot(left, right, total)
    return total
