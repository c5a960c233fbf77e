"""Reading a checkpoint folder in the hub's layout: config.json, safetensors shards, an index, and the small files.

Opening a folder reads headers only. It checks that what the index promises is there and whole, so that a stage can plan
on it; tensor bytes are mapped when asked for.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from mmq.errors import CheckpointError, one_line, shown
from mmq.storage.atomic import TEMPORARY_SUFFIX, copy_file, naming, write_json
from mmq.storage.shards import DTYPES, TensorSpec

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
# Weights in other formats, and what a download leaves: never carried to an output folder.
NOT_CARRIED = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".onnx", ".h5", ".msgpack", ".lock", ".incomplete",
}  # fmt: skip


# config.json and the index; safetensors takes headers up to the same size.
LARGEST_JSON = 100 * 10**6
DEEPEST_JSON = 100
LONGEST_NAME = 1000
# Bytes in the name of a shard: what Linux's file systems take, with the ending of one that is being written.
LONGEST_FILE = 255 - len(TEMPORARY_SUFFIX)


@dataclass(frozen=True)
class Part:
    """A tensor that a file holds as a part of a larger one: some rows of one of a stack's matrices.

    Attributes:
        whole: the tensor in the file, [n, rows, columns].
        index: which of its matrices.
        first, last: which rows of it.
    """

    whole: TensorSpec
    index: int
    first: int
    last: int

    @property
    def skipped(self) -> int:
        """Bytes of the whole before it."""
        _, rows, _ = self.whole.shape
        count = self.whole.shape[0] * rows
        return self.whole.nbytes // count * (self.index * rows + self.first)


class TensorReader:
    """Hands out tensors of a checkpoint as views of mapped files; use through `Checkpoint.reader`."""

    def __init__(self, checkpoint: Checkpoint, stack: ExitStack) -> None:
        self.names = checkpoint.specs.keys()
        self._checkpoint = checkpoint
        self._stack = stack
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        shard = self._checkpoint.shard_of(name)
        if shard not in self._open:
            self._open[shard] = self._stack.enter_context(_open_shard(self._checkpoint.folder / shard))
        part = self._checkpoint.parts.get(name)
        tensor: torch.Tensor = self._open[shard].get_tensor(part.whole.name if part else name)
        return tensor[part.index, part.first : part.last] if part else tensor


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose headers were read.

    Attributes:
        folder: where it lies.
        config: the content of config.json.
        shards: tensors of each shard, by shard name, in the order of the names.
        parts: of these, what the files hold as parts of larger tensors.
    """

    folder: Path
    config: dict[str, Any]
    shards: dict[str, dict[str, TensorSpec]]
    parts: dict[str, Part] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers of a checkpoint folder.

        Raises:
            CheckpointError: something is missing, truncated, contradictory or outside the folder.
        """
        if not folder.is_dir():
            raise CheckpointError(f"there is no checkpoint folder {folder}")
        for name in (CONFIG_NAME, INDEX_NAME):
            _check_inside(folder, folder / name)
        config = read_json(folder / CONFIG_NAME)
        weight_map = _weight_map(folder)
        shards = {name: _read_header(folder, name) for name in sorted(set(weight_map.values()))}
        for tensor, shard in weight_map.items():
            if tensor not in shards[shard]:
                raise CheckpointError(f"{folder / INDEX_NAME} puts {tensor} in {shard}, which does not hold it")
        for shard, specs in shards.items():
            for tensor in specs:
                if weight_map.get(tensor) != shard:
                    raise CheckpointError(f"{folder / shard} holds {tensor}, which the index does not name there")
        return cls(folder, config, shards)

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """All tensors by name."""
        return {name: spec for specs in self.shards.values() for name, spec in specs.items()}

    @cached_property
    def _shard_of(self) -> dict[str, str]:
        return {name: shard for shard, specs in self.shards.items() for name in specs}

    def shard_of(self, name: str) -> str:
        """The shard that holds a tensor.

        Raises:
            CheckpointError: no shard does.
        """
        try:
            return self._shard_of[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} has no tensor {name}") from None

    @contextmanager
    def reader(self) -> Iterator[TensorReader]:
        """Map shards as their tensors are asked for; they are unmapped when the block ends and no view is left."""
        with ExitStack() as stack:
            yield TensorReader(self, stack)

    def read_ahead(self, names: Iterable[str], stop: threading.Event | None = None) -> None:
        """Bring tensors into the system's page cache; it takes none of this process's memory but a small buffer.

        Args:
            stop: give up once it is set.
        """
        scratch = bytearray(1 << 20)
        by_shard: dict[str, list[str]] = {}
        for name in names:
            by_shard.setdefault(self.shard_of(name), []).append(name)
        for shard, wanted in by_shard.items():
            with naming(self.folder / shard), open(self.folder / shard, "rb", buffering=0) as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                for begin, end in sorted(self._span(header, name) for name in wanted):
                    file.seek(8 + length + begin)
                    left = end - begin
                    while left > 0 and (count := file.readinto(memoryview(scratch)[:left])):
                        if stop is not None and stop.is_set():
                            return
                        left -= count

    def _span(self, header: dict[str, Any], name: str) -> tuple[int, int]:
        """Where a tensor's bytes begin and end by its shard's header."""
        part = self.parts.get(name)
        begin, end = header[part.whole.name if part else name]["data_offsets"]
        if part is None:
            return begin, end
        return begin + part.skipped, begin + part.skipped + self.specs[name].nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs.values())

    def fingerprint(self) -> str:
        """A hash of what can be known without reading the weights: config, names, dtypes, shapes and shard sizes."""
        hasher = xxhash.xxh3_128(json.dumps(self.config, sort_keys=True).encode())
        for shard, specs in self.shards.items():
            hasher.update(f"{shard} {(self.folder / shard).stat().st_size}\n".encode())
            hasher.update("".join(f"{s.name} {s.dtype} {s.shape}\n" for s in specs.values()).encode())
        return hasher.hexdigest()

    def carried_files(self) -> list[Path]:
        """Tokenizer, chat template, generation config, code, licence: all plain files that hold no weights.

        Not the model card, which describes this checkpoint and no other.

        Raises:
            CheckpointError: one is a link that leads out of the folder.
        """
        paths = sorted(
            path
            for path in self.folder.iterdir()
            if path.is_file()
            and not path.name.startswith(".")
            and path.name not in (CONFIG_NAME, INDEX_NAME, CARD_NAME)
            and not path.name.endswith(".index.json")
            and path.suffix not in NOT_CARRIED
        )
        for path in paths:
            _check_inside(self.folder, path)
        return paths


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a size, depth and content that can be written again.

    Raises:
        CheckpointError: it is missing or no such JSON object.
    """
    if not path.is_file():  # a pipe would never end
        raise CheckpointError(f"{path} is {'no plain file' if path.exists() else 'missing'}")
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it is larger than {LARGEST_JSON // 10**6} MB")
        value = json.loads(path.read_text(encoding="utf-8"))
        _check_json(value)
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def _check_json(value: Any) -> None:
    """Python reads more than JSON can say. Raises ValueError for NaN, infinity, half a character, and absurd depth."""
    pending = [(value, 0)]
    while pending:
        part, depth = pending.pop()
        if depth > DEEPEST_JSON:
            raise ValueError(f"it is nested more than {DEEPEST_JSON} levels deep")
        if isinstance(part, str):
            part.encode()
        elif isinstance(part, float) and not math.isfinite(part):
            raise ValueError(f"{part} is no JSON number")
        elif isinstance(part, dict):
            pending += ((inner, depth + 1) for entry in part.items() for inner in entry)
        elif isinstance(part, list):
            pending += ((inner, depth + 1) for inner in part)


def finish_folder(source: Checkpoint, folder: Path, config: dict[str, Any], shards: Iterable[str]) -> None:
    """Complete an output folder whose shards are written: carried files, config.json and, last, the index.

    Raises:
        CheckpointError: a shard is missing or damaged.
    """
    for path in source.carried_files():
        copy_file(path, folder / path.name)
    write_json(folder / CONFIG_NAME, config)
    headers = {name: _read_header(folder, name) for name in sorted(shards)}
    weight_map = {tensor: name for name, specs in headers.items() for tensor in specs}
    total = sum(spec.nbytes for specs in headers.values() for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX_NAME, index)


def _weight_map(folder: Path) -> dict[str, str]:
    index_path = folder / INDEX_NAME
    if not index_path.exists():
        if not (folder / SINGLE_NAME).exists():
            raise CheckpointError(f"{folder} holds neither {INDEX_NAME} nor {SINGLE_NAME}; only safetensors are read")
        return dict.fromkeys(_read_header(folder, SINGLE_NAME), SINGLE_NAME)
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has no weight_map")
    for tensor, shard in weight_map.items():
        _check_name(index_path, tensor)
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard:
            raise CheckpointError(
                f"{index_path} puts {tensor} in {shown(shard)}, which is no safetensors file of that folder"
            )
        _check_name(index_path, shard)
        if len(os.fsencode(shard)) > LONGEST_FILE:
            raise CheckpointError(f"{index_path} names the shard {shown(shard)}; no file here has so long a name")
    return weight_map


def _check_name(path: Path, name: str) -> None:
    """Tensors' and shards' names go into messages, journals and new headers."""
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise CheckpointError(
            f"{path} holds the name {shown(name)}; names are 1 to {LONGEST_NAME} printable characters"
        )


def _read_header(folder: Path, shard: str) -> dict[str, TensorSpec]:
    path = folder / shard
    if not path.is_file():
        raise CheckpointError(f"the shard {path} is missing")
    _check_inside(folder, path)
    specs = {}
    with _open_shard(path) as file:
        for name in file.offset_keys():
            _check_name(path, name)
            view = file.get_slice(name)
            spec = TensorSpec(name, view.get_dtype(), tuple(view.get_shape()))
            if spec.dtype not in DTYPES:
                raise CheckpointError(f"{path}: {name} has the dtype {spec.dtype}, which is not supported")
            specs[name] = spec
    return specs


@contextmanager
def _open_shard(path: Path) -> Iterator[Any]:
    try:
        handle = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"the shard {path} is damaged or truncated: {one_line(error)}") from None
    with handle as file:
        yield file


def _check_inside(folder: Path, path: Path) -> None:
    """A link must not lead out of the folder, but for the hub's cache, whose snapshots link to blobs beside them."""
    root = folder.resolve()
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        root = root.parent.parent
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        target = None
    if target is None or not target.is_relative_to(root):
        raise CheckpointError(f"{path} is a link that leads out of its folder")
