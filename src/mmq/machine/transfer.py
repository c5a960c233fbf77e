"""Copies between the host and a GPU that run beside the computations, each direction a stream of its own.

A GPU copies at its full rate, and while it computes, only from and to memory that is pinned. Pinning a layer would take
its size of the host's memory, so two pinned buffers are filled and emptied in turns. On a CPU a copy is a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

BUFFER_BYTES = 64 * 2**20


class Lane:
    """One direction. Only one thread at a time may use it.

    Attributes:
        device: the device at its other end.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._turn = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """What the block computes runs on the lane's stream, after its copies; what it allocates is the lane's."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    def follow(self) -> None:
        """The lane's copies to come wait for all that was computed so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def lead(self, tensors: Iterable[torch.Tensor]) -> None:
        """What is computed from now on waits for the lane, whose tensors live until that is done."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            for tensor in tensors:
                if tensor.is_cuda:
                    tensor.record_stream(current)

    def to_device(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy a host tensor into one of the same size and dtype on the device; either lies contiguous in memory.

        The source may be changed or unmapped as soon as this returns.
        """
        if self._stream is None:
            target.copy_(source)
            return
        given, wanted = _bytes(source), _bytes(target)
        with torch.cuda.stream(self._stream):
            for start in range(0, given.numel(), BUFFER_BYTES):
                part = slice(start, start + BUFFER_BYTES)
                buffer, free = self._next()
                free.synchronize()
                own = buffer[: given[part].numel()].copy_(given[part])
                wanted[part].copy_(own, non_blocking=True)
                free.record(self._stream)

    def to_host(self, source: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor on the host; on a CPU the tensor itself."""
        if self._stream is None or source.device.type == "cpu":
            return source
        source = source.contiguous()
        result = torch.empty(source.shape, dtype=source.dtype)
        given, wanted = _bytes(source), _bytes(result)
        waiting: list[tuple[slice, torch.Tensor, torch.cuda.Event]] = []
        with torch.cuda.stream(self._stream):
            for start in range(0, given.numel(), BUFFER_BYTES):
                part = slice(start, start + BUFFER_BYTES)
                buffer, done = self._next()
                own = buffer[: given[part].numel()].copy_(given[part], non_blocking=True)
                done.record(self._stream)
                waiting.append((part, own, done))
                if len(waiting) > 1:
                    _take(wanted, *waiting.pop(0))
        for parts in waiting:
            _take(wanted, *parts)
        return result

    def _next(self) -> tuple[torch.Tensor, torch.cuda.Event]:
        """The buffer whose turn it is, and the event of its last copy."""
        if not self._buffers:
            for _ in range(2):
                buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
                self._buffers.append((buffer, torch.cuda.Event()))
        self._turn = 1 - self._turn
        return self._buffers[self._turn]


def _take(target: torch.Tensor, part: slice, buffer: torch.Tensor, done: torch.cuda.Event) -> None:
    done.synchronize()
    target[part].copy_(buffer)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
