"""How far a run is. The stages tell a Reporter what they do; it turns that once into the figures that the bar, JSON
lines, `mmq status` and callers of the API show."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

# Seconds between two signs of life from one part of the work.
EVERY = 1.0


@dataclass(frozen=True)
class Progress:
    """Where a stage stands.

    Attributes:
        unit: the shard or layer that was last heard of; "" before the first.
        part: what is being done to it, "searching"; "" once it is whole on disk.
        at: where in that part, "norm, point 7 of 20"; may be empty.
        share: of the unit that is done, 0 to 1.
        done, units: finished units and all units of the stage, those of earlier runs included.
        percent: of the stage's work that is done, parts of units included.
        elapsed_seconds: since this run of the stage began.
        eta_seconds: an estimate of the seconds to the stage's end; None while nothing is known of the pace.
    """

    stage: str
    unit: str
    part: str
    at: str
    share: float
    done: int
    units: int
    percent: float
    elapsed_seconds: float
    eta_seconds: float | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def doing(self) -> str:
        """What is being done in words: 'layer-00003: searching, norm, point 7 of 20'."""
        return f"{self.unit}: " + ", ".join(filter(None, (self.part, self.at))) if self.part else self.unit


class Listener:
    """Whoever is told how a run goes on. These methods do nothing; all may be called from worker threads."""

    def start(self, progress: Progress, nbytes: int) -> None:
        """A stage begins; `nbytes` are left to be read and written."""

    def step(self, progress: Progress) -> None:
        """A part of a unit goes on: told where a unit's part begins, and then once a second at most."""

    def unit(self, progress: Progress, facts: Mapping[str, Any]) -> None:
        """A unit is whole on disk and in the journal; `facts` are worth showing of it."""

    def note(self, message: str, **facts: Any) -> None:
        """Something worth a line."""

    def finish(self, progress: Progress) -> None:
        """The stage is complete."""


class Reporter:
    """What the stages call. All methods may be called from worker threads.

    Args:
        clock: seconds of a clock that never goes back.
    """

    def __init__(self, listener: Listener | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._listener, self._clock = listener or Listener(), clock
        self._mutex = threading.RLock()
        self._record: Callable[[Progress], None] = lambda _: None
        self._begin("", {}, ())

    def start(self, stage: str, weights: Mapping[str, float], finished: Collection[str] = (), nbytes: int = 0) -> None:
        """A stage begins.

        Args:
            weights: all its units, in order, and how much work each is, in any one measure.
            finished: those that earlier runs have done.
            nbytes: to be read and written by this run.
        """
        with self._mutex:
            self._begin(stage, weights, finished)
            progress = self._progress("", "", "")
            self._record(progress)
            self._listener.start(progress, nbytes)

    def step(self, unit: str, part: str, done: float, total: float, at: str = "") -> None:
        """A unit is being worked on.

        Args:
            part: what is being done: "reading", "searching".
            done, total: how much of the whole unit is done, in any measure.
            at: where in the part: a tensor, a point of a grid.
        """
        with self._mutex:
            self._shares[unit] = min(1.0, done / total) if total else 0.0
            now, (told_part, told) = self._clock(), self._told.get(unit, ("", 0.0))
            if part == told_part and now - told < EVERY:
                return
            self._told[unit] = part, now
            progress = self._progress(unit, part, at)
            self._record(progress)
            self._listener.step(progress)

    def unit(self, name: str, **facts: Any) -> None:
        """A unit is whole on disk and in the journal."""
        with self._mutex:
            self._shares.pop(name, None)
            self._told.pop(name, None)
            self._finished.add(name)
            progress = self._progress(name, "", "")
            self._record(progress)
            self._listener.unit(progress, facts)

    def note(self, message: str, **facts: Any) -> None:
        """Something worth a line."""
        self._listener.note(message, **facts)

    def finish(self, stage: str) -> None:
        """The stage is complete."""
        with self._mutex:
            if self._stage != stage:  # all was done by earlier runs, and nothing was begun
                self._begin(stage, {}, ())
            progress = self._progress("", "", "")
            self._record(progress)
            self._listener.finish(progress)

    @contextmanager
    def recorded(self, record: Callable[[Progress], None]) -> Iterator[None]:
        """While the block runs, hand what a listener is told of progress to `record` as well, after others'."""
        before = self._record

        def both(progress: Progress) -> None:
            before(progress)
            record(progress)

        self._record = both
        try:
            yield
        finally:
            self._record = before

    def _begin(self, stage: str, weights: Mapping[str, float], finished: Collection[str]) -> None:
        self._stage, self._weights = stage, dict(weights)
        self._finished, self._earlier = set(finished), frozenset(finished)
        self._shares: dict[str, float] = {}
        self._told: dict[str, tuple[str, float]] = {}
        self._start = self._clock()

    def _progress(self, unit: str, part: str, at: str) -> Progress:
        weights, seconds = self._weights, self._clock() - self._start
        total = sum(weights.values())
        finished = sum(weights.get(name, 0.0) for name in self._finished)
        earlier = sum(weights.get(name, 0.0) for name in self._earlier)
        parts = sum(weights.get(name, 0.0) * share for name, share in self._shares.items())
        done = finished + parts
        return Progress(
            stage=self._stage,
            unit=unit,
            part=part,
            at=at,
            share=round(self._shares.get(unit, float(unit in self._finished)), 4),
            done=len(self._finished),
            units=len(weights),
            percent=percent_of(done, total),
            elapsed_seconds=round(seconds, 3),
            eta_seconds=seconds_left(done - earlier, total - done, seconds),
        )


def percent_of(done: float, total: float) -> float:
    """Rounded to a tenth; of nothing all is done."""
    return round(100 * done / total, 1) if total else 100.0


def seconds_left(done: float, left: float, seconds: float) -> float | None:
    """Seconds that the work left will take at the pace of that done; None where nothing was."""
    return round(left * seconds / done, 1) if done > 0 and seconds > 0 else None
