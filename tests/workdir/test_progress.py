"""The figures of progress: their sums, how often they are told, and that everybody is told the same."""

from __future__ import annotations

import errno
import io
import json
import os
import random
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mmq.cli.output import HumanOutput, JsonOutput
from mmq.cli.streams import Stream
from mmq.recipe import load
from mmq.stages.pipeline import run_stages
from mmq.workdir.lock import lock, lock_holder
from mmq.workdir.progress import EVERY, Listener, Progress, Reporter
from mmq.workdir.workspace import Workspace


class Clock:
    """A clock that is set by hand; with `tick` it goes on by itself at every look."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 1000.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


class Told(Listener):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.all: list[Progress] = []

    def start(self, progress: Progress, nbytes: int) -> None:
        self.all.append(progress)

    def step(self, progress: Progress) -> None:
        self.all.append(progress)

    def unit(self, progress: Progress, facts: Mapping[str, Any]) -> None:
        self.all.append(progress)


def test_the_sums() -> None:
    """Of five units of weight 1, 2, 3, 4 and 10 the first two were done before."""
    told, clock = Told(), Clock()
    reporter = Reporter(told, clock)
    reporter.start("awq", {"a": 1, "b": 2, "c": 3, "d": 4, "e": 10}, ["a", "b"])
    first = told.all[-1]
    assert (first.done, first.units, first.percent, first.eta_seconds) == (2, 5, 15.0, None)
    clock.now += 30
    reporter.step("c", "searching", 1, 3)
    at = told.all[-1]
    # One of 17 was done in 30 seconds.
    assert (at.unit, at.part, at.share, at.percent) == ("c", "searching", 0.3333, 20.0)
    assert (at.elapsed_seconds, at.eta_seconds) == (30, 16 * 30)
    # Two at a time: half of d as well.
    reporter.step("d", "reading", 2, 4)
    assert told.all[-1].percent == 30.0
    clock.now += 30
    reporter.unit("c", seconds=3)
    at = told.all[-1]
    assert (at.done, at.unit, at.part, at.share) == (3, "c", "", 1.0)
    assert at.percent == 40.0
    assert at.eta_seconds == pytest.approx(60 * 12 / 5)
    for unit in ("d", "e"):
        reporter.unit(unit)
    assert (told.all[-1].percent, told.all[-1].eta_seconds) == (100.0, 0)


def test_the_time_left_is_right_at_a_steady_pace() -> None:
    """Whatever the units' sizes and however they overlap, work done at a steady pace leads to the true end."""
    draw = random.Random(0)
    weights = {f"unit {number}": draw.uniform(0.1, 5) for number in range(40)}
    order = list(weights)
    told, clock = Told(), Clock()
    reporter = Reporter(told, clock)
    reporter.start("restore", weights, order[:10])
    total = sum(weights[unit] for unit in order[10:])
    for left, right in zip(order[10::2], order[11::2], strict=True):
        for quarter in (1, 2, 3, 4):
            for unit in (left, right):
                clock.now += weights[unit] / 4
                reporter.step(unit, f"quarter {quarter}", quarter, 4)
                at = told.all[-1]
                assert at.eta_seconds is not None
                assert at.elapsed_seconds + at.eta_seconds == pytest.approx(total, abs=0.1)
        reporter.unit(left)
        reporter.unit(right)


def test_a_part_is_told_at_its_beginning_and_then_once_a_second() -> None:
    told, clock = Told(), Clock()
    reporter = Reporter(told, clock)
    reporter.start("awq", {"a": 1, "b": 1})
    for step in range(100):
        reporter.step("a", "searching", step, 200, f"point {step}")
        reporter.step("b", "reading", step, 100)
        clock.now += EVERY / 10
    for unit in "ab":
        mine = [at for at in told.all if at.unit == unit]
        assert 9 <= len(mine) <= 11
    reporter.step("a", "rounding", 1, 2)
    assert told.all[-1].part == "rounding"


def test_people_machines_and_the_lock_file_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, clock = io.StringIO(), Clock()
    machine = Reporter(JsonOutput(Stream(lines, needed=False)), clock)
    monkeypatch.setenv("FORCE_COLOR", "1")
    human = HumanOutput(Stream(io.StringIO(), needed=False))
    person = Reporter(human, clock)
    with lock(tmp_path, machine):
        assert (lock_holder(tmp_path) or pytest.fail()).progress is None
        for reporter in (machine, person):
            reporter.start("awq", {"layer-00000": 5, "layer-00001": 5})
        clock.now += 12.5
        for reporter in (machine, person):
            reporter.step("layer-00000", "searching", 1, 4, "norm, point 3 of 20")
        event = json.loads(lines.getvalue().splitlines()[-1])
        holder = lock_holder(tmp_path)
        assert holder is not None
        assert holder.progress is not None
        assert {"event": "progress"} | {k: v for k, v in holder.progress.items() if k != "told"} == event
        assert (event["percent"], event["eta_seconds"]) == (12.5, 87.5)
        (task,) = human._progress.tasks
        assert task.percentage == 12.5
        assert task.fields["left"] == "1 min 28 s left"
        assert task.fields["doing"] == "layer-00000: searching, norm, point 3 of 20"
        # A shorter line than the one before leaves nothing of it.
        machine.unit("layer-00000")
        holder = lock_holder(tmp_path)
        assert holder is not None
        assert holder.progress is not None
        assert (holder.progress["done"], holder.progress["part"]) == (1, "")
    assert (tmp_path / "lock").read_bytes() == b""
    assert lock_holder(tmp_path) is None


@pytest.mark.parametrize("line", ["", "{", "[]", "7", '{"stage": "awq"}', "null", '{"told": 1.0}', "[" * 10_000])
def test_a_torn_line_is_no_progress(tmp_path: Path, line: str) -> None:
    with lock(tmp_path):
        path = tmp_path / "lock"
        path.write_text(path.read_text(encoding="utf-8") + line, encoding="utf-8")
        holder = lock_holder(tmp_path)
        assert holder is not None
        assert holder.progress is None


def test_a_disk_that_takes_no_progress_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    told = Told()
    reporter = Reporter(told, Clock())
    with lock(tmp_path, reporter):
        monkeypatch.setattr(os, "pwrite", full)
        reporter.start("awq", {"a": 1})
        reporter.unit("a")
        assert (lock_holder(tmp_path) or pytest.fail()).progress is None
    assert [at.percent for at in told.all] == [0.0, 100.0]


def test_a_layer_tells_of_its_parts(project: Path) -> None:
    """Every step is told where the clock goes fast. Shares never go back, and the search tells where it is."""
    told = Told()
    recipe = load(project / "recipe.yaml", ["awq.source=fp8"])
    workspace = Workspace(recipe, Reporter(told, Clock(tick=EVERY)))
    run_stages(workspace, ["awq"])
    layers: dict[str, list[Progress]] = defaultdict(list)
    for at in told.all:
        layers[at.unit].append(at)
    for unit in ("layer-00000", "layer-00001"):
        assert list(dict.fromkeys(at.part for at in layers[unit])) == [
            "reading", "attention", "searching", "quantizing", "propagating", "",
        ]  # fmt: skip
        shares = [at.share for at in layers[unit]]
        assert all(before <= after for before, after in pairwise(shares))
        assert shares[0] == 0
        assert shares[-1] == 1
        where = [at.at for at in layers[unit] if at.part == "searching"]
        assert sum("point" in text for text in where) > 3
        assert any("experts" in text for text in where)
    percent = [at.percent for at in told.all]
    assert all(before <= after for before, after in pairwise(percent))
    assert percent[-1] == 100
