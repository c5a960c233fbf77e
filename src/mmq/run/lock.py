"""A work_dir's lock, and who holds it: seen without touching it, since a test lock would be in the way of a run that
begins."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from mmq.errors import LockedError
from mmq.storage.atomic import make_folder, naming, write_all


@dataclass(frozen=True)
class Holder:
    """The process that a lock file names.

    Attributes:
        since: local time of its host.
        seen: it lives; False on another host, where that can't be seen.
    """

    process: int
    host: str
    since: datetime
    seen: bool


def lock_holder(work_dir: Path) -> Holder | None:
    """The process that holds the work_dir, or on another host may hold it; None where there is none."""
    path = work_dir / LOCK_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.fullmatch(r"process (\d+) on (\S+) since (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)", text)
    if match is None:
        return None
    process, host = int(match[1]), match[2]
    here = host == socket.gethostname()
    if here and not _has_open(process, path):
        return None
    return Holder(process, host, datetime.fromisoformat(match[3]), here)


def _has_open(process: int, path: Path) -> bool:
    """Whether a process has a file open. A dead run's number may be another process's by now, so that being alive says
    too little; it must do where the system shows no more."""
    try:
        held, files = path.stat(), list(Path(f"/proc/{process}/fd").iterdir())
    except OSError:
        return _is_alive(process)
    for file in files:
        with suppress(OSError):
            if os.path.samestat(held, file.stat()):
                return True
    return False


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


LOCK_NAME = "lock"


@contextmanager
def lock(work_dir: Path) -> Iterator[None]:
    """Hold the work_dir for this process. The system releases the lock of a dead one.

    Raises:
        LockedError: a living process holds it.
    """
    make_folder(work_dir)
    path = work_dir / LOCK_NAME
    with open(path, "ab+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "another process"
            raise LockedError(f"{work_dir} is in use by {holder}; wait for it or stop it") from None
        owner = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        with naming(path):
            file.truncate(0)
            write_all(file, owner.encode())
        try:
            yield
        finally:
            with naming(path):
                file.truncate(0)
