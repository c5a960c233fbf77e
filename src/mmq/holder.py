"""Who holds a work_dir's lock, seen without touching it: a test lock would be in the way of a run that begins."""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from mmq.journal import LOCK_NAME


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
