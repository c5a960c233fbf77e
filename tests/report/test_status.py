"""`mmq status` while another process is at work, after it, and when all is done."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cli.test_cli import events, refused, succeed
from conftest import digests, edit_json
from mmq.cli.app import app
from mmq.recipe import load
from mmq.stages.pipeline import plans
from mmq.workdir.lock import lock
from mmq.workdir.progress import Reporter
from mmq.workdir.workspace import Workspace
from stages.test_resume import FORK


def status(recipe: Path) -> dict[str, Any]:
    """What `mmq status --json` says; it must change nothing."""
    before = digests(recipe.parent / "run")
    (found,) = events(succeed("status", recipe, "--json"))
    assert digests(recipe.parent / "run") == before
    return found


def _child(arguments: list[str], renames: int) -> None:
    """Run a command that stops, alive, at its `renames`-th rename."""
    seen = [0]

    def counted(original: Callable[..., None]) -> Callable[..., None]:
        def function(*args: Any) -> None:
            seen[0] += 1
            if seen[0] == renames:
                os.kill(os.getpid(), signal.SIGSTOP)
            original(*args)

        return function

    os.replace = counted(os.replace)
    app(arguments)


@contextmanager
def halted(*arguments: object, renames: int) -> Iterator[int]:
    """The number of a process that stands still in the midst of its work."""
    process = FORK.Process(target=_child, args=(list(map(str, arguments)), renames))
    process.start()
    try:
        assert process.pid is not None
        state = Path(f"/proc/{process.pid}/stat")
        deadline = time.monotonic() + 120
        while state.read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process.pid
    finally:
        process.kill()
        process.join()


def test_who_is_at_work_and_at_what(project: Path) -> None:
    recipe = project / "recipe.yaml"
    # One worker: the second shard's rename comes after the journal's for the first.
    with halted("run", recipe, "--quiet", "--set", "workers=1", renames=4) as process:
        found = status(recipe)
        running, stage = found["running"], found["stages"][0]
        assert (running["process"], running["host"], running["seen"]) == (process, socket.gethostname(), True)
        assert abs(datetime.now() - datetime.fromisoformat(running["since"])) < timedelta(minutes=5)
        assert (running["stage"], running["unit"]) == ("dequant", "model-00002-of-00004.safetensors")
        assert running["eta_seconds"] >= 0
        assert (stage["state"], stage["done"], stage["units"]) == ("at work", 1, 4)
        assert 0 < stage["percent"] < 100
        shown = succeed("status", recipe)
        assert f"at work: process {process} on {socket.gethostname()}" in shown
        assert "dequant: model-00002-of-00004.safetensors" in shown
        assert os.kill(process, 0) is None
    found = status(recipe)
    assert (project / "run" / "lock").read_text(encoding="utf-8").startswith(f"process {process} on ")
    assert found["running"] is None
    assert found["stages"][0]["state"] == "begun"


def test_an_evaluation_at_work(finished_copy: Path) -> None:
    recipe = finished_copy / "recipe.yaml"
    # The journal, then hidden states, record and journal of the first layer, then hidden states of the second.
    arguments = ["eval", recipe, "--quiet", "--data", finished_copy / "samples.jsonl", "--samples", 2]
    with halted(*arguments, renames=5):
        found = status(recipe)
        assert (found["running"]["stage"], found["running"]["unit"]) == ("eval", "layer-00001")
        # The source's half of the second of three layers and a head.
        assert found["stages"][-1] == {
            "stage": "eval", "state": "at work", "done": 1, "units": 3, "percent": 50.0, "last": "layer-00000",
            "removed": [],
        }  # fmt: skip
        assert found["next"] == f"mmq verify {recipe}"


def test_a_lock_file_of_a_dead_process_says_nothing(finished_copy: Path) -> None:
    """Its number may be another process's by now: here it is this one's."""
    recipe, file = finished_copy / "recipe.yaml", finished_copy / "run" / "lock"
    for process in (os.getpid(), os.getppid(), 2**22 + 1, 10**30):
        file.write_text(f"process {process} on {socket.gethostname()} since 2026-01-02 03:04:05", encoding="utf-8")
        assert status(recipe)["running"] is None
    for content in ("", "process x", "a\x00b"):
        file.write_text(content, encoding="utf-8")
        assert status(recipe)["running"] is None
    with lock(finished_copy / "run"):
        assert status(recipe)["running"]["process"] == os.getpid()


def test_another_hosts_process_cannot_be_seen(finished_copy: Path) -> None:
    recipe = finished_copy / "recipe.yaml"
    text = "process 7 on elsewhere since 2026-01-02 03:04:05"
    (finished_copy / "run" / "lock").write_text(text, encoding="utf-8")
    edit_json(
        finished_copy / "run" / "journal.json", lambda journal: journal["stages"]["restore"].update(complete=False)
    )
    found = status(recipe)
    assert found["running"] | {"eta_seconds": None} == {
        "process": 7, "host": "elsewhere", "since": "2026-01-02 03:04:05", "seen": False, "stage": "restore",
        "unit": None, "part": "", "at": "", "eta_seconds": None,
    }  # fmt: skip
    assert found["stages"][-1]["state"] == "begun"
    assert f"{text}; whether it lives can't be seen from here" in succeed("status", recipe)


def test_the_time_left_follows_the_pace_of_the_last_run(project: Path, finished: Path) -> None:
    """One of three layers' units took 100 seconds and ended now."""
    recipe, run = project / "recipe.yaml", project / "run"
    shutil.copytree(finished / "run", run)
    began = datetime.now(UTC) - timedelta(seconds=100)

    def one_layer(journal: dict[str, Any]) -> None:
        awq = journal["stages"]["awq"]
        awq["complete"] = False
        awq["units"] = {"layer-00000": awq["units"]["layer-00000"]}
        awq["runs"] = [{"began": began.isoformat(timespec="seconds"), "seconds": 100.0, "units": 1}]

    edit_json(run / "journal.json", one_layer)
    (plan,) = plans(Workspace.of(load(recipe)), ["awq"])
    first, *others = (unit.weight for unit in plan.units)
    with lock(run):
        found = status(recipe)
    wanted = 100 * sum(others) / first
    assert wanted - 30 < found["running"]["eta_seconds"] <= wanted + 2
    assert found["stages"][1]["percent"] == round(100 * first / (first + sum(others)), 1)


def test_after_a_passed_verification_nothing_is_left(finished_copy: Path) -> None:
    recipe = finished_copy / "recipe.yaml"
    assert status(recipe)["next"] == f"mmq verify {recipe}"
    succeed("verify", recipe, "--quiet")
    assert status(recipe)["next"] is None
    shown = succeed("status", recipe)
    assert "next: nothing, the result is verified" in shown
    assert f"mmq eval {recipe}" in shown
    edit_json(finished_copy / "run" / "verify.json", lambda report: report.update(ok=False))
    assert status(recipe)["next"] == f"mmq verify {recipe}"


def test_a_result_that_changed_is_to_be_verified_again(finished_copy: Path) -> None:
    recipe = finished_copy / "recipe.yaml"
    succeed("verify", recipe, "--quiet")
    edit_json(finished_copy / "run" / "hybrid" / "config.json", lambda config: config.update(rope_theta=1))
    assert status(recipe)["next"] == f"mmq verify {recipe}"


def test_the_next_command_repeats_the_overrides(project: Path) -> None:
    shown = succeed("status", project / "recipe.yaml", "--set", "work_dir=else where")
    assert f"next: mmq dequant {project / 'recipe.yaml'} --set 'work_dir=else where'" in shown


def test_runs_are_found_without_a_recipe(finished_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished and verified one with its recipe, one that is at work, one whose journal can't be read."""
    monkeypatch.chdir(finished_copy)
    recipe, other, broken = (finished_copy / name for name in ("recipe.yaml", "deep/er/other", "broken"))
    succeed("verify", recipe, "--quiet")
    shutil.copytree(finished_copy / "run", other)
    (other / "verify.json").unlink()
    broken.mkdir()
    (broken / "journal.json").write_text("{", encoding="utf-8")
    edit_json(other / "journal.json", lambda journal: journal["stages"]["restore"].update(complete=False))
    (finished_copy / "no-recipe.yaml").write_text("- 1\n", encoding="utf-8")
    reporter = Reporter()
    with lock(other, reporter):
        reporter.start("restore", {"a": 1, "b": 3})
        reporter.step("a", "copying", 1, 2)
        (found,) = events(succeed("status", "--json"))
        shown = succeed("status")
    mine, running, unreadable = (
        next(run for run in found["runs"] if run["work_dir"] == name) for name in ("run", "deep/er/other", "broken")
    )
    assert len(found["runs"]) == 3
    assert (mine["recipe"], mine["stage"], mine["state"], mine["verified"]) == (
        "recipe.yaml", "restore", "complete", True,
    )  # fmt: skip
    assert (running["recipe"], running["stage"], running["state"]) == (None, "restore", "at work")
    assert (running["percent"], running["verified"]) == (12.5, None)
    assert "can't be read" in unreadable["fault"]
    assert all(name in shown for name in ("recipe.yaml", "verified", "at work", "12.5 %"))
    assert "next: mmq status recipe.yaml" in shown
    assert "none was named" in refused("status", "--set", "awq.n_grid=3")


def test_where_there_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert events(succeed("status", "--json")) == [{"event": "result", "runs": []}]
    assert "mmq recipe init" in succeed("status")
