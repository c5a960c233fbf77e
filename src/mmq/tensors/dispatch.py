"""Which of three ways of computing the same is taken: torch's, numba's on a CPU or Triton's on a GPU.

What each operation computes is said, and computed by torch, in `int4`, `experts`, `rounding` and `fp8`; these ask here,
and import `compiled` or a module of `fused` where that is the faster way and works. No room above this knows of it.
"""

from __future__ import annotations

import logging
from enum import Enum
from functools import cache

import torch

log = logging.getLogger(__name__)

# Numbers at one time from which on the second that a function takes to compile is well spent; of stacked matrices, in
# one of them. How many are given at a time must not decide: sums of two ways differ in their last bits.
COMPILED_FROM, COMPILED_MATRIX = 2**18, 2**15
# What kernels of one pass take.
_ONE_PASS = (torch.bfloat16, torch.float8_e4m3fn)


class Way(Enum):
    TORCH = "torch"
    NUMBA = "numba"
    TRITON = "triton"


def way(tensor: torch.Tensor, whole: int | None = None) -> Way:
    """How an operation on such a tensor is best computed, if it has more forms than torch's.

    Args:
        whole: numbers in all, where the tensor is a part of them whose size may be any.

    A module that is not taken is not imported either: numba takes a second, and Triton need not be there.
    """
    if not (tensor.numel() if whole is None else whole):
        return Way.TORCH
    if worth_compiling(tensor, whole):
        return Way.NUMBA
    return Way.TRITON if tensor.dtype in _ONE_PASS and triton_works(tensor.device) else Way.TORCH


def way_of_products(rows: torch.Tensor) -> Way:
    """How rows are multiplied with their experts' matrices: by Triton's kernel where there is one, which loads sixteen
    bytes at a time; otherwise by torch, in one product or in one an expert."""
    aligned = rows.shape[1] % 8 == 0 and rows.data_ptr() % 16 == 0
    return Way.TRITON if aligned and way(rows) is Way.TRITON else Way.TORCH


def torch_multiplies_faster(rows: torch.Tensor) -> bool:
    """Whether torch's grouped product is the better one where rows lie together already and the result may lie
    anywhere: on a CPU, and on cards that torch has a kernel for. On an H200 that makes 620 to 710 TFLOP/s of it,
    Triton's 480 to 540."""
    if not grouped_mm_works(rows.device, rows.dtype):
        return False
    return rows.device.type == "cuda" or way_of_products(rows) is Way.TORCH


def worth_compiling(tensor: torch.Tensor, whole: int | None = None) -> bool:
    """Whether a function of `compiled` is the faster way."""
    if tensor.device.type != "cpu" or tensor.dtype not in _ONE_PASS:
        return False
    return _is_large(tensor) if whole is None else whole >= COMPILED_FROM


def way_of_columns(weight: torch.Tensor, whole: int | None = None) -> Way:
    """How stacked fp32 weights are rounded column by column, and their group scales searched.

    Args:
        whole: numbers of one of the matrices, where these are some of their rows.
    """
    if weight.device.type == "cpu" and (_is_large(weight) if whole is None else whole >= COMPILED_MATRIX):
        return Way.NUMBA
    return Way.TRITON if weight.numel() and triton_works(weight.device) else Way.TORCH


def _is_large(tensor: torch.Tensor) -> bool:
    if tensor.dim() < 3:
        return tensor.numel() >= COMPILED_FROM
    return tensor.shape[0] > 0 and tensor[0].numel() >= COMPILED_MATRIX


def triton_works(device: torch.device) -> bool:
    """Whether Triton compiles for a device, found out by a small kernel."""
    return device.type == "cuda" and _compiles(_index(device))


def grouped_mm_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies all experts' rows in one kernel: on a CPU, and on the cards that it has a kernel for. On
    others its `grouped_mm` asks the device for the rows' ends, and takes a product an expert."""
    if device.type != "cuda":
        return device.type == "cpu"
    return dtype == torch.bfloat16 and _multiplies(_index(device))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def _compiles(index: int) -> bool:
    # Triton's kernels of bf16 want Ampere or later.
    if torch.version.cuda is None or torch.cuda.get_device_capability(index) < (8, 0):
        return False
    try:
        from mmq.tensors.fused.probe import double

        numbers = torch.arange(100, device=f"cuda:{index}", dtype=torch.bfloat16)
        works = torch.equal(double(numbers), numbers * 2)
    # Whatever keeps it from compiling: no Triton, no C compiler, a card that it does not know.
    except Exception as error:
        log.warning("Triton's kernels don't compile here, torch's operations take longer: %s", error)
        return False
    if not works:
        log.warning("a kernel of Triton's computed something wrong here; torch's operations take longer")
    return works


@cache
def _multiplies(index: int) -> bool:
    """Cards of compute capability 10 are said to fail with some versions of torch: a small product tells."""
    if torch.cuda.get_device_capability(index)[0] not in (9, 10):
        return False
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in ((48, 64), (3, 32, 64)))
    ends = torch.tensor([16, 16, 48], dtype=torch.int32)
    expected = torch.cat([rows[:16] @ weight[0].T, rows[16:] @ weight[2].T])
    try:
        rows, weight, ends = (tensor.to(f"cuda:{index}") for tensor in (rows, weight, ends))
        found = torch.nn.functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends).cpu()
    except RuntimeError as error:
        log.warning("torch's grouped products fail on this card: %s", error)
        return False
    return torch.allclose(found.float(), expected.float(), rtol=2**-6, atol=2**-4)
