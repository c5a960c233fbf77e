"""Writing one safetensors file tensor by tensor, so that memory holds one tensor and not the file.

The safetensors library writes only what is in memory all at once; the format itself (an 8-byte length, a JSON header,
the bytes in header order) lets the header be written first when names, dtypes and shapes are known.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash

from mmq.storage.atomic import (
    FileRecord,
    atomic_file,
    file_digest,
    named_errors,
    sync_folder,
    temporary_path,
    write_all,
)

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Name, safetensors dtype and shape of a tensor in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


def file_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The order of tensors in a file: widest dtype first, then by name, so that every tensor is aligned."""
    return sorted(specs, key=lambda spec: (-spec.itemsize, spec.name))


class ShardWriter:
    """Takes the tensors of one file in `specs` order. Use through `write_shard`."""

    def __init__(self, file: BinaryIO, specs: Iterable[TensorSpec]) -> None:
        self.specs = file_order(specs)
        self._file = file
        self._next = 0
        self._size = 0
        self._hash = xxhash.xxh3_128()
        self._put(_header(self.specs))

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor.

        Raises:
            ValueError: it is not the next one of `specs`, or differs from it in dtype or shape.
        """
        spec = self.specs[self._next] if self._next < len(self.specs) else None
        found = TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        if found != spec:
            raise ValueError(f"the shard's next tensor is {spec}, not {found}")
        self._next += 1
        self._put(_raw(tensor))

    def record(self, name: str) -> FileRecord:
        if self._next != len(self.specs):
            raise ValueError(f"the shard still lacks {self.specs[self._next].name}")
        return FileRecord(name, self._size, self._hash.hexdigest())

    def _put(self, data: memoryview | bytes) -> None:
        write_all(self._file, data)
        self._hash.update(data)
        self._size += len(data)


class PendingShard:
    """What `write_shard` yields: the writer, and the record once the file is in place."""

    def __init__(self, writer: ShardWriter) -> None:
        self.specs = writer.specs
        self.add = writer.add
        self._record: FileRecord | None = None

    @property
    def record(self) -> FileRecord:
        if self._record is None:
            raise ValueError("the shard is not finished")
        return self._record


@contextmanager
def write_shard(path: Path, specs: Iterable[TensorSpec]) -> Iterator[PendingShard]:
    """Write a safetensors file atomically; `add` each tensor of `.specs` in that order. See `atomic_file`."""
    with atomic_file(path) as file:
        writer = ShardWriter(file, specs)
        pending = PendingShard(writer)
        yield pending
        record = writer.record(path.name)
    pending._record = record


def begin_shard(path: Path, specs: Iterable[TensorSpec]) -> None:
    """Make the file that several processes fill with `fill_shard`, under its temporary name: header and size."""
    with named_errors(path), open(temporary_path(path), "wb", buffering=0) as file:
        write_all(file, _header(file_order(specs)))
        file.truncate(shard_size(specs))


@contextmanager
def fill_shard(path: Path, specs: Iterable[TensorSpec]) -> Iterator[Callable[[str, torch.Tensor], None]]:
    """Put some of the tensors of a begun shard in their places; on disk when the block ends."""
    ordered = file_order(specs)
    ends = accumulate((spec.nbytes for spec in ordered), initial=len(_header(ordered)))
    places = {spec.name: (spec, start) for spec, start in zip(ordered, ends, strict=False)}
    with named_errors(path), open(temporary_path(path), "rb+", buffering=0) as file:

        def put(name: str, tensor: torch.Tensor) -> None:
            spec, start = places[name]
            if TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) != spec:
                raise ValueError(f"the shard holds {spec}, not {tensor.dtype} {tuple(tensor.shape)}")
            file.seek(start)
            write_all(file, _raw(tensor))

        yield put
        os.fsync(file.fileno())


def finish_shard(path: Path) -> FileRecord:
    """All has been put into a begun shard: give it its name."""
    with named_errors(path):
        temporary = temporary_path(path)
        record = FileRecord(path.name, temporary.stat().st_size, file_digest(temporary))
        os.replace(temporary, path)
        sync_folder(path.parent)
    return record


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> FileRecord:
    """Write the tensors as one safetensors file, atomically."""
    specs = [TensorSpec(name, DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
    with write_shard(path, specs) as shard:
        for spec in shard.specs:
            shard.add(spec.name, tensors[spec.name])
    return shard.record


def shard_size(specs: Iterable[TensorSpec]) -> int:
    """Bytes of the file that `write_shard` would make."""
    ordered = file_order(specs)
    return len(_header(ordered)) + sum(spec.nbytes for spec in ordered)


def _raw(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(specs: list[TensorSpec]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.nbytes
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
