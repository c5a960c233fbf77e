"""The device that a recipe names, and the memory that a run takes there and on the host."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch

from mmq.errors import RecipeError

# Blocks that grow instead of pieces that don't fit: layers of one size come and go beside chunks of many. Read by torch
# at its first allocation.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
# Products that come out the same every time: cuBLAS's own workspaces, not whichever is free.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def named_device(name: str) -> torch.device:
    """The device of `awq.device`, there or not. Raises RecipeError when it is none that mmq runs on."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise RecipeError(f"awq.device is {name!r}; it must be auto, cpu, cuda or cuda:N")
    return torch.device(name)


def present_device(name: str) -> torch.device:
    """Raises RecipeError when this machine lacks the device."""
    device = named_device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(f"awq.device is {name!r}; this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type == "cuda":
        # Parts of a sum in bf16 would cost more precision than they save time.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


@contextmanager
def same_bits(device: torch.device) -> Iterator[None]:
    """On a GPU, torch's deterministic algorithms: gradients of attention are summed in one order then.

    What has none raises RuntimeError.
    """
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def tensor_cores(device: torch.device) -> Iterator[None]:
    """On a GPU, fp32 products of factors in TF32, which keeps ten bits of each, where no more is needed of them."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def free_device(device: torch.device) -> int:
    """Bytes that a GPU has left, those that torch holds without using them included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def total_device(device: torch.device) -> int | None:
    """Bytes of a GPU's memory, whoever holds them; None for a CPU."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None


def total_host() -> int | None:
    """Bytes of memory and swap that this machine, or this process's control group, has; None where it isn't said."""
    known = []
    with suppress(OSError, ValueError, LookupError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        known.append(sizes["MemTotal"] + sizes.get("SwapTotal", 0))
    with suppress(OSError, ValueError):  # `max` where there is no limit
        known.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return min(known, default=None)


def release_memory() -> None:
    """Free the last layer now: its hooks make reference cycles, and the C library keeps freed blocks for later."""
    gc.collect()
    _spare_libraries()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _spare_libraries() -> None:
    """What is alive after the first layer is mostly what the libraries' imports made: to search it for cycles again
    after every layer would take longer than a small layer. At the end they are let go of again: libraries that watch
    for objects left over (triton 3.9, by nanobind) tell of each on stderr."""
    gc.freeze()
    atexit.register(gc.unfreeze)


def peak_host() -> int:
    """The process's largest resident size so far, in bytes. Linux's getrusage would tell of the parent's as well."""
    peak = _proc_status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if peak is None else peak


def resident_host() -> int | None:
    """The process's resident size now, in bytes; None on a system without /proc."""
    return _proc_status("VmRSS")


def open_files() -> int | None:
    """How many files, pipes and sockets the process holds open; None on a system without /proc."""
    try:
        # One of them is the listing's own.
        return len(list(Path("/proc/self/fd").iterdir())) - 1
    except OSError:
        return None


def _proc_status(field: str) -> int | None:
    """A size from Linux's account of this process, in bytes."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition(f"{field}:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return None


def reset_peak_device(device: torch.device) -> None:
    """Begin a new measurement of `peak_device`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_device(device: torch.device) -> int:
    """Largest memory allocated on a GPU, in bytes; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def peak_reserved(device: torch.device) -> int:
    """Largest memory of a GPU that torch held, used or not, in bytes; 0 on a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
