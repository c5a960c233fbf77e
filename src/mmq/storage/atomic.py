"""Files that appear whole or not at all: written beside their place, flushed to the disk, renamed into it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from mmq.errors import CheckpointError, DiskSpaceError

TEMPORARY_SUFFIX = ".mmq-tmp"


@dataclass(frozen=True)
class FileRecord:
    """A finished file: its name, size in bytes and xxh3-128 of its content."""

    name: str
    size: int
    digest: str


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing; it takes its name only when the block ends without an error and the bytes are on disk.

    Raises:
        DiskSpaceError: the disk is full. Nothing is left behind, whatever the error.
        CheckpointError: bytes that were to be written could not be had from the mapped file that they lie in.
    """
    temporary = temporary_path(path)
    try:
        with named_errors(path):
            with open(temporary, "wb", buffering=0) as file:
                yield file
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_path(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """What goes wrong while `path` is written, as `atomic_file` raises it."""
    try:
        with naming(path):
            yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskSpaceError(
                f"the disk is full: {path} could not be written; free some room and run again"
            ) from error
        if error.errno == errno.EFAULT:
            raise CheckpointError(
                f"what belongs into {path} could not be read: the file that it comes from was cut short meanwhile, or"
                " its disk failed"
            ) from error
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of reading or writing an open file does not say which file it was: add that."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_all(file: BinaryIO, data: memoryview | bytes) -> None:
    """Write all of `data` to an unbuffered file; the system may take it in pieces."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def write_bytes(path: Path, data: bytes) -> FileRecord:
    """Write a small file atomically."""
    with atomic_file(path) as file:
        write_all(file, data)
    return FileRecord(path.name, len(data), xxhash.xxh3_128_hexdigest(data))


def copy_file(origin: Path, target: Path) -> None:
    """Copy a file's content atomically."""
    with atomic_file(target) as file, open(origin, "rb", buffering=0) as source:
        while True:
            with naming(origin):
                data = source.read(1 << 20)
            if not data:
                return
            write_all(file, data)


def write_json(path: Path, value: Any) -> FileRecord:
    """Write `value` as indented JSON, atomically. Raises ValueError for NaN and infinity, which JSON lacks."""
    return write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def file_digest(path: Path) -> str:
    """xxh3-128 of a file's content, as in its FileRecord."""
    with naming(path), open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, durably."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed writer left in `folder`. Only for the holder of the work_dir's lock."""
    for leftover in folder.glob("*" + TEMPORARY_SUFFIX):
        leftover.unlink(missing_ok=True)
