"""The journal of a work_dir: which units of which stage are whole on disk, and from which inputs they were made.

It is one JSON file, replaced atomically after every unit, so it never names a unit whose files are not in place. It
knows files and fingerprints, not tensors.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from mmq.errors import JournalError, LockedError
from mmq.storage.atomic import FileRecord, write_json

JOURNAL_NAME = "journal.json"
LOCK_NAME = "lock"
FORMAT = 1


class StageJournal:
    """One stage's part of the journal.

    Attributes:
        fingerprint: the inputs that decide the stage's bytes, by the name a user knows them by.
        complete: the stage has ended.
    """

    def __init__(self, journal: Journal, name: str, record: dict[str, Any] | None) -> None:
        self._journal = journal
        self.name = name
        self.begun = record is not None
        record = record or {}
        self.fingerprint: dict[str, Any] = dict(record.get("fingerprint", {}))
        self.complete: bool = record.get("complete", False) is True
        self._units: dict[str, dict[str, list[Any]]] = dict(record.get("units", {}))

    @property
    def units(self) -> list[str]:
        """Finished units in the order they were finished."""
        return list(self._units)

    def files(self, unit: str) -> dict[str, FileRecord]:
        """What a finished unit wrote, by path relative to the work_dir."""
        return {path: FileRecord(Path(path).name, *entry) for path, entry in self._units[unit].items()}

    def begin(self, fingerprint: dict[str, Any]) -> None:
        """Begin or resume the stage.

        Raises:
            JournalError: it was begun with other inputs, or a finished unit's file is gone or has another size.
        """
        if not self._units and not self.complete:
            # Nothing was finished yet, so nothing can be mixed.
            self.begun, self.fingerprint = True, fingerprint
            self._journal.save()
            return
        for field in sorted(set(fingerprint) | set(self.fingerprint)):
            then, now = self.fingerprint.get(field), fingerprint.get(field)
            if then != now:
                raise JournalError(
                    f"{self.name} was begun with {field} = {_show(then)}, now it is {_show(now)}: going on would mix"
                    f" two runs; set it back, or run `mmq {self.name} --restart` to begin {self.name} anew"
                )
        self.check_files()

    def check_files(self, folder: str = "") -> None:
        """Raises JournalError where a finished unit's file, below `folder` if given, is gone or has another size."""
        for unit in self._units:
            for path, record in self.files(unit).items():
                if folder and not path.startswith(f"{folder}/"):
                    continue
                file = self._journal.work_dir / path
                size = file.stat().st_size if file.is_file() else None
                if size != record.size:
                    found = "is gone" if size is None else f"has {size} bytes instead of {record.size}"
                    raise JournalError(
                        f"{file} {found} since {self.name} wrote it; run `mmq {self.name} --restart` to make it anew"
                    )

    def finish_unit(self, unit: str, files: dict[str, FileRecord]) -> None:
        """Note that a unit's files, by path relative to the work_dir, are in place."""
        with self._journal.mutex:
            self._units[unit] = {path: [record.size, record.digest] for path, record in files.items()}
            self._journal.save()

    def forget_files(self, unit: str, paths: list[str]) -> None:
        """A unit's file is no longer needed and may be removed."""
        for path in paths:
            self._units[unit].pop(path, None)

    def save(self) -> None:
        """Write the journal as it is now."""
        self._journal.save()

    def finish(self) -> None:
        """The stage is complete."""
        self.complete = True
        self._journal.save()

    def reset(self) -> None:
        """Forget all of the stage."""
        self.begun, self.complete, self.fingerprint, self._units = False, False, {}, {}
        self._journal.save()

    def digest(self, folder: str) -> str:
        """One value for all bytes that the stage wrote below `folder`."""
        files = {path: record for unit in self._units for path, record in self.files(unit).items()}
        digests = sorted((path, record.digest) for path, record in files.items() if path.startswith(f"{folder}/"))
        return xxhash.xxh3_128(json.dumps(digests).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "complete": self.complete, "units": self._units}


class Journal:
    """The journal of a work_dir. Open it for writing only under `lock`."""

    def __init__(self, work_dir: Path) -> None:
        self.work_dir = work_dir
        self.mutex = threading.RLock()
        self._stages: dict[str, StageJournal] = {}
        path = work_dir / JOURNAL_NAME
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["format"]
            if version == FORMAT:
                for name, record in content["stages"].items():
                    stage = StageJournal(self, name, record)
                    for unit in stage.units:
                        stage.files(unit)
                    self._stages[name] = stage
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise JournalError(f"the journal {path} can't be read ({type(error).__name__}: {error})") from None
        if version != FORMAT:
            raise JournalError(f"the journal {path} has format {version!r}; this mmq writes format {FORMAT}")

    def stage(self, name: str) -> StageJournal:
        return self._stages.setdefault(name, StageJournal(self, name, None))

    def save(self) -> None:
        with self.mutex:
            stages = {name: stage.as_json() for name, stage in self._stages.items() if stage.begun}
            write_json(self.work_dir / JOURNAL_NAME, {"format": FORMAT, "stages": stages})


@contextmanager
def lock(work_dir: Path) -> Iterator[None]:
    """Hold the work_dir for this process. The system releases the lock of a dead one.

    Raises:
        LockedError: a living process holds it.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    with open(work_dir / LOCK_NAME, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise LockedError(f"{work_dir} is in use by {holder}; wait for it or stop it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _show(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)
