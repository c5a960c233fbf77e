"""A work_dir's lock, who holds it and how far that process is: seen without touching it, since a test lock would be in
the way of a run that begins.

The lock file's first line names the process, its second holds the figures of its progress as JSON. They lie here
because they are worth nothing without their process, and because the file is open already: the run makes no file for
them that a full disk could refuse.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mmq.errors import LockedError
from mmq.storage.atomic import make_folder, naming, write_all
from mmq.workdir.progress import Progress, Reporter


@dataclass(frozen=True)
class Holder:
    """The process that a lock file names.

    Attributes:
        since: local time of its host.
        seen: it lives; False on another host, where that can't be seen.
        progress: `Progress` as it told it last, and `told`, seconds since the epoch; None where it has told none. Of
            several ranks, `ranks` too: where each of them said last that it is.
    """

    process: int
    host: str
    since: datetime
    seen: bool
    progress: dict[str, Any] | None = None


def lock_holder(work_dir: Path) -> Holder | None:
    """The process that holds the work_dir, or on another host may hold it; None where there is none."""
    path = work_dir / LOCK_NAME
    try:
        owner, _, told = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, ValueError):
        return None
    match = re.fullmatch(r"process (\d+) on (\S+) since (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)", owner)
    if match is None:
        return None
    process, host = int(match[1]), match[2]
    here = host == socket.gethostname()
    if here and not _has_open(process, path):
        return None
    return Holder(process, host, datetime.fromisoformat(match[3]), here, _progress(told))


def _progress(text: str) -> dict[str, Any] | None:
    """The figures of a lock file's second line; None where it is not whole."""
    try:
        found = json.loads(text)
        Progress(**{key: value for key, value in found.items() if key not in ("told", "ranks")})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return found if isinstance(found.get("told"), float) else None


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
def lock(work_dir: Path, reporter: Reporter | None = None, ranks: Callable[[], list[str]] = list) -> Iterator[None]:
    """Hold the work_dir for this process. The system releases the lock of a dead one.

    Args:
        reporter: its progress is to be seen in the lock file meanwhile.
        ranks: where each of several processes says that it is, to be seen there too; nothing of one.

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
            holder = file.read().decode(errors="replace").partition("\n")[0].strip() or "another process"
            raise LockedError(f"{work_dir} is in use by {holder}; wait for it or stop it") from None
        owner = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        with naming(path):
            file.truncate(0)
            write_all(file, owner.encode())
        # Opened to append, so that it is made where it is not there; progress is written over what was told before.
        descriptor = file.fileno()
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_APPEND)
        try:
            with (reporter or Reporter()).recorded(_Line(descriptor, len(owner.encode()), ranks)):
                yield
        finally:
            with naming(path):
                file.truncate(0)


class _Line:
    """Writes progress over an open file's end, from `start` on."""

    def __init__(self, descriptor: int, start: int, ranks: Callable[[], list[str]]) -> None:
        self._descriptor, self._start, self._length, self._ranks = descriptor, start, 0, ranks

    def __call__(self, progress: Progress) -> None:
        ranks = {"ranks": known} if (known := self._ranks()) else {}
        text = json.dumps(progress.as_json() | ranks | {"told": time.time()}).encode()
        self._length = max(self._length, len(text))
        # A disk that is full or failing ends the run where that matters.
        with suppress(OSError):
            os.pwrite(self._descriptor, text.ljust(self._length), self._start)
