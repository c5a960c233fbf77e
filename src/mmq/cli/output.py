"""The only place that writes to the terminal: a listener for people, one for machines, one for silence, and one that
sends a log file what another is told."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import IO, TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from mmq.cli.streams import Stream
from mmq.errors import printable
from mmq.text import bytes_text, duration_text
from mmq.workdir.progress import Listener, Progress

if TYPE_CHECKING:
    from mmq.stages.preflight import Passed

Rows = list[dict[str, Any]]

log = logging.getLogger(__name__)


class Mode(Enum):
    """For whom the output is."""

    HUMAN = "human"
    JSON = "json"
    QUIET = "quiet"


class Output(Listener):
    """A run's listener, and the sink for results: tables for people, one JSON object a line for machines."""

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
        self._progress = RichProgress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:.1f} %"),
            TextColumn("{task.fields[left]}", markup=False),
            TextColumn("{task.fields[doing]}", markup=False),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task: Any = None

    @contextmanager
    def live(self) -> Iterator[None]:
        with self._progress:
            yield

    def start(self, progress: Progress, nbytes: int) -> None:
        self._task = self._progress.add_task(progress.stage, total=100, left="", doing="")
        self.step(progress)
        self.console.print(_start_line(progress, nbytes), style="bold")

    def step(self, progress: Progress) -> None:
        left = "" if progress.eta_seconds is None else f"{duration_text(progress.eta_seconds)} left"
        self._progress.update(self._task, completed=progress.percent, left=left, doing=printable(progress.doing))

    def unit(self, progress: Progress, facts: Mapping[str, Any]) -> None:
        self.step(progress)
        self.console.print(printable(f"  {_unit_line(progress, facts)}"), soft_wrap=True)

    def note(self, message: str, **facts: Any) -> None:
        self.console.print(printable(message), soft_wrap=True)

    def finish(self, progress: Progress) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        self.console.print(f"{progress.stage} is complete", style="green")

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

    def start(self, progress: Progress, nbytes: int) -> None:
        self._stage = progress.stage
        self._print({"event": "start"} | progress.as_json() | {"bytes": nbytes})

    def step(self, progress: Progress) -> None:
        self._print({"event": "progress"} | progress.as_json())

    def unit(self, progress: Progress, facts: Mapping[str, Any]) -> None:
        self._print({"event": "unit"} | progress.as_json() | dict(facts))

    def note(self, message: str, **facts: Any) -> None:
        self._print({"event": "note", "stage": self._stage, "message": message} | facts)

    def finish(self, progress: Progress) -> None:
        self._print({"event": "finish"} | progress.as_json())

    def result(self, value: dict[str, Any], title: str = "", rows: Rows | None = None) -> None:
        self._print({"event": "result"} | value)

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

    @contextmanager
    def live(self) -> Iterator[None]:
        with self._shown.live():
            yield

    def start(self, progress: Progress, nbytes: int) -> None:
        self._stage = progress.stage
        log.info("%s", _start_line(progress, nbytes))
        self._shown.start(progress, nbytes)

    def step(self, progress: Progress) -> None:
        self._shown.step(progress)

    def unit(self, progress: Progress, facts: Mapping[str, Any]) -> None:
        log.info("%s: %s", self._stage, _unit_line(progress, facts))
        self._shown.unit(progress, facts)

    def note(self, message: str, **facts: Any) -> None:
        log.info("%s", f"{self._stage}: {message}" if self._stage else message)
        self._shown.note(message, **facts)

    def finish(self, progress: Progress) -> None:
        self._stage = ""
        log.info("%s is complete", progress.stage)
        self._shown.finish(progress)

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


def checks(found: Iterable[Passed]) -> Rows:
    """What was looked at, for people and machines."""
    return [{"stage": one.stage or "all", "checked": one.check, "found": one.found} for one in found]


def show_checked(output: Output, found: Iterable[Passed]) -> None:
    """A dry run's result, where there is nothing but checks."""
    looked_at = checks(found)
    output.result({"checks": looked_at}, "Checked (nothing was touched)", looked_at)


def _start_line(progress: Progress, nbytes: int) -> str:
    return f"{progress.stage}: {progress.units - progress.done} to do, {bytes_text(nbytes)} to read and write"


def _unit_line(progress: Progress, facts: Mapping[str, Any]) -> str:
    text = ", ".join(f"{key} {value}" for key, value in facts.items())
    return f"{progress.unit} ({progress.done}/{progress.units}) {text}".rstrip()
