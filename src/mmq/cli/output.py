"""The only place that writes to the terminal: a Reporter for people, one for machines, one for silence, and one that
sends a log file what another is told."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from mmq.cli.streams import Stream
from mmq.errors import printable
from mmq.run.progress import Silent
from mmq.text import bytes_text

Rows = list[dict[str, Any]]

log = logging.getLogger(__name__)


class Mode(Enum):
    """For whom the output is."""

    HUMAN = "human"
    JSON = "json"
    QUIET = "quiet"


class Output(Silent):
    """A Reporter, and the sink for results: tables for people, one JSON object a line for machines."""

    def result(self, value: dict[str, Any], title: str = "", rows: Rows | None = None) -> None:
        """A command's result: `value` for machines, `rows` as a table for people."""

    def hint(self, message: str) -> None:
        """What to do next."""

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show progress while the block runs."""
        yield


class HumanOutput(Output):
    """Rich progress on a terminal, plain lines elsewhere."""

    def __init__(self, stream: Stream) -> None:
        # File names may hold what rich would read as markup.
        self.console = Console(file=cast(IO[str], stream), markup=False, emoji=False, highlight=False)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[at]}", markup=False),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task: Any = None
        self._units = [0, 0]

    @contextmanager
    def live(self) -> Iterator[None]:
        with self._progress:
            yield

    def start(self, stage: str, total_units: int, total_bytes: int) -> None:
        self._units = [0, total_units]
        self._task = self._progress.add_task(stage, total=total_bytes, at="")
        self.console.print(_start_line(stage, total_units, total_bytes), style="bold")

    def advance(self, nbytes: int) -> None:
        self._progress.advance(self._task, nbytes)

    def item(self, label: str) -> None:
        self._progress.update(self._task, at=printable(label))

    def unit(self, name: str, **facts: Any) -> None:
        self._units[0] += 1
        self.console.print(printable(f"  {_unit_line(name, self._units, facts)}"), soft_wrap=True)

    def note(self, message: str, **facts: Any) -> None:
        self.console.print(printable(message), soft_wrap=True)

    def finish(self, stage: str) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        self.console.print(f"{stage} is complete", style="green")

    def result(self, value: dict[str, Any], title: str = "", rows: Rows | None = None) -> None:
        if rows is None:
            for key, item in value.items():
                self.console.print(printable(f"{key}: {item}"), soft_wrap=True)
            return
        table = Table(title=Text(printable(title)), title_justify="left")
        for column in rows[0] if rows else []:
            table.add_column(column)
        for row in rows:
            table.add_row(*(Text(printable(str(cell))) for cell in row.values()))
        self.console.print(table)

    def hint(self, message: str) -> None:
        self.console.print(printable(f"next: {message}"), soft_wrap=True)


class JsonOutput(Output):
    """One JSON object a line on standard output: events while a stage runs, then the result."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._mutex = threading.Lock()
        self._stage = ""
        self._begin = 0.0
        self._done = 0
        self._total = 0

    def start(self, stage: str, total_units: int, total_bytes: int) -> None:
        self._stage, self._begin, self._done, self._total = stage, time.monotonic(), 0, total_bytes
        self._event("start", units=total_units, bytes=total_bytes)

    def advance(self, nbytes: int) -> None:
        with self._mutex:
            self._done += nbytes

    def unit(self, name: str, **facts: Any) -> None:
        seconds = max(time.monotonic() - self._begin, 1e-9)
        rate = self._done / seconds
        eta = round((self._total - self._done) / rate, 1) if rate else None
        self._event("unit", unit=name, bytes_done=self._done, bytes_per_second=round(rate), eta_seconds=eta, **facts)

    def note(self, message: str, **facts: Any) -> None:
        self._event("note", message=message, **facts)

    def finish(self, stage: str) -> None:
        self._event("finish", seconds=round(time.monotonic() - self._begin, 3))

    def result(self, value: dict[str, Any], title: str = "", rows: Rows | None = None) -> None:
        self._print({"event": "result"} | value)

    def _event(self, event: str, **facts: Any) -> None:
        self._print({"event": event, "stage": self._stage} | facts)

    def _print(self, value: dict[str, Any]) -> None:
        with self._mutex:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
            # Half a character, as a file's name may hold, is written as JSON's escape.
            self._stream.write(text.encode(errors="backslashreplace").decode() + "\n")
            self._stream.flush()


class Logged(Output):
    """Shows what another Output does, and has it in the log as plain lines; progress within a unit and tables are for
    the terminal alone."""

    def __init__(self, shown: Output) -> None:
        self._shown = shown
        self._stage = ""
        self._units = [0, 0]

    @contextmanager
    def live(self) -> Iterator[None]:
        with self._shown.live():
            yield

    def start(self, stage: str, total_units: int, total_bytes: int) -> None:
        self._stage, self._units = stage, [0, total_units]
        log.info("%s", _start_line(stage, total_units, total_bytes))
        self._shown.start(stage, total_units, total_bytes)

    def advance(self, nbytes: int) -> None:
        self._shown.advance(nbytes)

    def item(self, label: str) -> None:
        self._shown.item(label)

    def unit(self, name: str, **facts: Any) -> None:
        self._units[0] += 1
        log.info("%s: %s", self._stage, _unit_line(name, self._units, facts))
        self._shown.unit(name, **facts)

    def note(self, message: str, **facts: Any) -> None:
        log.info("%s", f"{self._stage}: {message}" if self._stage else message)
        self._shown.note(message, **facts)

    def finish(self, stage: str) -> None:
        self._stage = ""
        log.info("%s is complete", stage)
        self._shown.finish(stage)

    def result(self, value: dict[str, Any], title: str = "", rows: Rows | None = None) -> None:
        self._shown.result(value, title, rows)

    def hint(self, message: str) -> None:
        self._shown.hint(message)


def make_output(mode: Mode, needed: bool = True) -> Output:
    """The sink for a mode. `needed`: the command ends when the pipe on standard output loses its reader."""
    if mode is Mode.QUIET:
        return Output()
    stream = Stream(sys.stdout, needed)
    return HumanOutput(stream) if mode is Mode.HUMAN else JsonOutput(stream)


def _start_line(stage: str, total_units: int, total_bytes: int) -> str:
    return f"{stage}: {total_units} to do, {bytes_text(total_bytes)} to read and write"


def _unit_line(name: str, units: list[int], facts: dict[str, Any]) -> str:
    text = ", ".join(f"{key} {value}" for key, value in facts.items())
    return f"{name} ({units[0]}/{units[1]}) {text}".rstrip()
