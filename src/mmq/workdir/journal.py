"""The journal of a work_dir: which units of which stage are whole on disk, and from which inputs they were made.

It is one JSON file, replaced atomically after every unit, so it never names a unit whose files are not in place. It
knows files, fingerprints and what each run of a stage took, not tensors.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xxhash

from mmq.errors import JournalError
from mmq.storage.atomic import FileRecord, file_digest, write_json

JOURNAL_NAME = "journal.json"
FORMAT = 3
# Fields of a fingerprint that end so tell of what an earlier stage made.
OUTPUT_OF = "(its output)"
# What a fingerprint that lacks a field says of it.
UNSAID = {"restore.expert_targets": "hub"}

Facts = dict[str, Any]


class StageJournal:
    """One stage's part of the journal.

    Attributes:
        fingerprint: the inputs that decide the stage's bytes, by the name a user knows them by.
        complete: the stage has ended.
        removed: folders of its files that were removed on purpose; their records stay, for what was made from them.
        runs: what each run that finished something took, in order: `began`, `seconds`, `units`, and what `begin_run`
            was told to note.
    """

    def __init__(self, journal: Journal, name: str, record: dict[str, Any] | None) -> None:
        self._journal = journal
        self.name = name
        self.begun = record is not None
        record = record or {}
        self.fingerprint: dict[str, Any] = dict(record.get("fingerprint", {}))
        self.complete: bool = record.get("complete", False) is True
        self.runs: list[Facts] = list(record.get("runs", []))
        self.removed: list[str] = list(record.get("removed", []))
        self._units: dict[str, dict[str, list[Any]]] = dict(record.get("units", {}))
        self._note_run: Callable[[], None] = lambda: None
        self._checked: set[str] = set()

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
        self.check_fingerprint(fingerprint)
        self.check_files()

    def said(self, field: str) -> Any:
        """What the stage was begun with, of one field; None for nothing."""
        return self.fingerprint.get(field, UNSAID.get(field))

    def check_fingerprint(self, fingerprint: dict[str, Any]) -> None:
        """Compare with what the stage was begun with.

        Raises:
            JournalError: something else.
        """
        # What there is now first, in its order: of a choice and what comes with it, the choice.
        for field in {**fingerprint, **self.fingerprint}:
            then, now = self.said(field), fingerprint.get(field, UNSAID.get(field))
            if then != now:
                raise JournalError(
                    f"{self.name} was begun with {field} = {_show(then)}, now it is {_show(now)}: going on would mix"
                    f" two runs; set it back, or run `mmq {self.name} --restart` to begin {self.name} anew"
                )

    def check_files(self, folder: str = "") -> None:
        """Look at a finished stage's files: all that were not removed on purpose, or those below `folder`.

        Raises:
            JournalError: one is gone or has another size, or the folder was removed on purpose.
        """
        if folder in self.removed:
            raise JournalError(
                f"{self._journal.work_dir / folder} was removed by `mmq clean`; run `mmq {self.name} --restart` to make"
                " it anew"
            )
        for unit in self._units:
            for path, record in self.files(unit).items():
                inside = path.partition("/")[0]
                if inside in self.removed or (folder and inside != folder):
                    continue
                file = self._journal.work_dir / path
                size = file.stat().st_size if file.is_file() else None
                if size != record.size:
                    found = "is gone" if size is None else f"has {size} bytes instead of {record.size}"
                    raise JournalError(
                        f"{file} {found} since {self.name} wrote it; run `mmq {self.name} --restart` to make it anew"
                    )

    def check_content(self, path: str) -> bool:
        """Read a finished unit's file, by path relative to the work_dir, and compare its hash; once in a process.

        Returns:
            whether the file was read now.

        Raises:
            JournalError: it is not what the stage wrote.
        """
        if path in self._checked:
            return False
        file, record = self._journal.work_dir / path, self._records().get(path)
        if record is None or file_digest(file) != record.digest:
            raise JournalError(
                f"{file} is not what {self.name} wrote, its content has changed; run `mmq {self.name} --restart` to"
                " make it anew"
            )
        self._checked.add(path)
        return True

    def begin_run(self, facts: Facts, measure: Callable[[], Facts]) -> None:
        """Time what is done from now on.

        Args:
            facts: of the run as a whole.
            measure: called whenever a unit is finished; the last answer stays.
        """
        begin = time.monotonic()
        run = {"began": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": 0.0, "units": 0, **facts}
        before = len(self._units)

        def note() -> None:
            run.update(measure(), seconds=round(time.monotonic() - begin, 3), units=len(self._units) - before)
            if not self.runs or self.runs[-1] is not run:
                self.runs.append(run)

        self._note_run = note

    def finish_unit(self, unit: str, files: dict[str, FileRecord]) -> None:
        """Note that a unit's files, by path relative to the work_dir, are in place."""
        with self._journal.mutex:
            self._units[unit] = {path: [record.size, record.digest] for path, record in files.items()}
            self._note_run()
            self._journal.save()

    def forget_files(self, unit: str, paths: list[str]) -> None:
        """A unit's file is no longer needed and may be removed."""
        for path in paths:
            self._units[unit].pop(path, None)

    def note_removed(self, folder: str) -> None:
        """The stage's files below a folder are not needed any more, and may be gone from now on."""
        with self._journal.mutex:
            self.removed = [*self.removed, folder] if folder not in self.removed else self.removed
            self._journal.save()

    def save(self) -> None:
        """Write the journal as it is now."""
        self._journal.save()

    def finish(self) -> None:
        """The stage is complete."""
        self.complete = True
        self._note_run()
        self._journal.save()

    def reset(self) -> None:
        """Forget all of the stage."""
        self.begun, self.complete, self.fingerprint, self._units, self.runs = False, False, {}, {}, []
        self.removed = []
        self._checked.clear()
        self._journal.save()

    def digest(self, folder: str) -> str:
        """One value for all bytes that the stage wrote below `folder`."""
        files = self._records().items()
        digests = sorted((path, record.digest) for path, record in files if path.startswith(f"{folder}/"))
        return xxhash.xxh3_128(json.dumps(digests).encode()).hexdigest()

    def _records(self) -> dict[str, FileRecord]:
        """All files of all units."""
        return {path: record for unit in self._units for path, record in self.files(unit).items()}

    def as_json(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "complete": self.complete,
            "runs": self.runs,
            "units": self._units,
        } | ({"removed": self.removed} if self.removed else {})


class Journal:
    """The journal of a work_dir. Open it for writing only under `lock`.

    Args:
        writes: it is kept up to date on the disk; it has one writer.
    """

    def __init__(self, work_dir: Path, writes: bool = True) -> None:
        self.work_dir, self._writes = work_dir, writes
        self.mutex = threading.RLock()
        self._stages: dict[str, StageJournal] = {}
        path = work_dir / JOURNAL_NAME
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["format"]
            self.take(_MIGRATIONS[version](content["stages"]) if version in _MIGRATIONS else {})
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise JournalError(f"the journal {path} can't be read ({type(error).__name__}: {error})") from None
        if version not in _MIGRATIONS:
            raise JournalError(f"the journal {path} has format {version!r}; this mmq reads formats 1 to {FORMAT}")

    def stage(self, name: str) -> StageJournal:
        return self._stages.setdefault(name, StageJournal(self, name, None))

    def save(self) -> None:
        if self._writes:
            with self.mutex:
                write_json(self.work_dir / JOURNAL_NAME, {"format": FORMAT, "stages": self.as_json()})

    def as_json(self) -> dict[str, Facts]:
        """Its stages."""
        return {name: stage.as_json() for name, stage in self._stages.items() if stage.begun}

    def take(self, stages: dict[str, Facts]) -> None:
        """Stages as `as_json` had them, in place of those that it has of these names."""
        for name, record in stages.items():
            stage = StageJournal(self, name, record)
            for unit in stage.units:
                stage.files(unit)
            self._stages[name] = stage


def _from_format_1(stages: dict[str, Facts]) -> dict[str, Facts]:
    """Format 2 has `runs`, which may be missing, and fields in awq's fingerprint whose values were fixed before."""
    return _from_format_2(_with_fixed(stages, {"seed": 0}))


def _from_format_2(stages: dict[str, Facts]) -> dict[str, Facts]:
    return _with_fixed(stages, {"awq.search": "full"})


def _with_fixed(stages: dict[str, Facts], values: Facts) -> dict[str, Facts]:
    """Fields in awq's fingerprint whose values were fixed before there was a choice."""
    if "awq" in stages and stages["awq"]["fingerprint"]:
        stages["awq"]["fingerprint"] |= values
    return stages


# From each format that can be read to the present one; a journal is written in that at its next save.
_MIGRATIONS: dict[Any, Callable[[dict[str, Facts]], dict[str, Facts]]] = {
    1: _from_format_1,
    2: _from_format_2,
    FORMAT: lambda stages: stages,
}


def _show(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)
