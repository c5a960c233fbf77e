"""Runs that outlive their terminal, and those that end with it: real terminals, pipes and signals; the log file."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import transformers

import mmq.cli.session
import mmq.stages.pipeline
from cli.test_cli import cli, refused, succeed
from conftest import digests
from mmq.cli.app import app
from mmq.cli.errors import handled
from stages.test_resume import FORK

FOLDERS = ("bf16", "awq", "hybrid")
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (INFO|WARNING|ERROR) (.+)")


def lines(log: Path) -> list[tuple[str, str]]:
    """Level and text of each line."""
    found = [LINE.fullmatch(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert all(found), log.read_text(encoding="utf-8")
    return [(match[1], match[2]) for match in found if match]


def _child(arguments: list[str], stdin: str, stdout: str, stderr: str, leads: bool) -> None:
    """Run a command with other standard streams; it leads a session, of the terminal it opens unless told not to."""
    os.setsid()
    for number, path in enumerate((stdin, stdout, stderr)):
        flags = os.O_RDWR if path == stdin else os.O_WRONLY | os.O_CREAT
        os.dup2(os.open(path, flags if leads else flags | os.O_NOCTTY), number)
    app(arguments)


@contextmanager
def process(
    *arguments: object, stdin: str, stdout: str, stderr: Path | str, leads: bool = True
) -> Iterator[BaseProcess]:
    """A command in a process of its own; it does not outlive the block."""
    child = FORK.Process(target=_child, args=(list(map(str, arguments)), stdin, stdout, str(stderr), leads))
    child.start()
    try:
        yield child
    finally:
        child.kill()
        child.join()


def close_terminal(master: int, child: BaseProcess) -> None:
    """Shut the window when a unit is done. The process stands still meanwhile, so that it does not end before."""
    seen = b""
    while b"(1/4)" not in seen:
        seen += os.read(master, 4096)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGSTOP)
    os.close(master)
    os.kill(child.pid, signal.SIGCONT)
    child.join(120)


def assert_whole(project: Path, finished: Path) -> None:
    """All stages' weights are as in the undisturbed run."""
    for folder in FOLDERS:
        found, wanted = (digests(root / "run" / folder) for root in (project, finished))
        assert {name: found.get(name) for name in wanted} == wanted


@pytest.fixture
def terminal() -> Iterator[tuple[int, str]]:
    """A terminal: the side of its window, to be closed, and the name of the other one."""
    master, slave = pty.openpty()
    name = os.ttyname(slave)
    with os.fdopen(slave):
        # Open until the command has it, or the window would have nobody to show.
        yield master, name


def test_with_a_log_file_a_run_outlives_its_terminal(project: Path, finished: Path, terminal: tuple[int, str]) -> None:
    log, (master, tty) = project / "run.log", terminal
    arguments = ["run", project / "recipe.yaml", "--log-file", log]
    with process(*arguments, stdin=tty, stdout=tty, stderr=tty) as child:
        close_terminal(master, child)
        assert child.exitcode == 0
    assert_whole(project, finished)
    found = [text for _, text in lines(log)]
    assert found[-1] == "done"
    assert {"dequant is complete", "awq is complete", "restore is complete"} <= set(found)
    assert 1 <= sum("is closed" in text for text in found) <= 2
    assert len(found) < 40, "a dead terminal must not fill the log"
    assert json.loads((project / "run" / "verify.json").read_text(encoding="utf-8"))["ok"] is True


def test_without_one_the_closed_terminal_ends_the_run_in_order(
    project: Path, finished: Path, terminal: tuple[int, str]
) -> None:
    recipe, stderr, (master, tty) = project / "recipe.yaml", project / "stderr", terminal
    with process("run", recipe, stdin=tty, stdout=tty, stderr=stderr) as child:
        close_terminal(master, child)
        assert child.exitcode == 128 + signal.SIGHUP
    message = stderr.read_text(encoding="utf-8")
    assert message == f"stopped: finished shards and layers are safe; go on with: mmq run {recipe}\n"
    assert not list((project / "run").rglob("*.mmq-tmp"))
    succeed("run", recipe, "--quiet")
    assert_whole(project, finished)


def test_a_terminal_that_closes_without_a_signal_ends_nothing(
    project: Path, finished: Path, terminal: tuple[int, str]
) -> None:
    """As after `setsid` or `disown`: no SIGHUP, but every write to the terminal fails."""
    master, tty = terminal
    with process("dequant", project / "recipe.yaml", stdin=tty, stdout=tty, stderr=tty, leads=False) as child:
        close_terminal(master, child)
        assert child.exitcode == 0
    assert digests(project / "run" / "bf16") == digests(finished / "run" / "bf16")


@pytest.mark.parametrize("mode", [["--json"], []])
def test_a_pipe_without_a_reader_ends_the_run_in_order(project: Path, mode: list[str]) -> None:
    """`mmq dequant recipe.yaml | head -1`."""
    recipe = project / "recipe.yaml"
    code, stderr = piped(project, "dequant", recipe, *mode)
    assert code == 128 + signal.SIGPIPE, stderr
    assert stderr == f"stopped: finished shards and layers are safe; go on with: mmq dequant {recipe}\n"


def test_with_a_log_file_a_pipe_without_a_reader_ends_nothing(project: Path, finished: Path) -> None:
    log = project / "run.log"
    assert piped(project, "dequant", project / "recipe.yaml", "--log-file", log) == (0, "")
    assert lines(log)[-1] == ("INFO", "done")
    assert digests(project / "run" / "bf16") == digests(finished / "run" / "bf16")


def test_a_short_command_whose_reader_had_enough_is_silent(project: Path) -> None:
    code, stderr = piped(project, "status", project / "recipe.yaml")
    assert (code, stderr) in ((128 + signal.SIGPIPE, ""), (0, "")), "0 where all was written at once"


def piped(project: Path, *arguments: object) -> tuple[int | None, str]:
    """Exit code and standard error of a command of whose output one line is read."""
    pipe, stderr = project / "pipe", project / "stderr"
    os.mkfifo(pipe)
    with process(*arguments, stdin=os.devnull, stdout=str(pipe), stderr=stderr) as child:
        with open(pipe, encoding="utf-8") as reader:
            reader.readline()
        child.join(120)
        return child.exitcode, stderr.read_text(encoding="utf-8")


def test_nohup_stays_in_force() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handled("mmq run"):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_does_not_cut_the_end_short(capfd: pytest.CaptureFixture[str]) -> None:
    """The system and the shell may both send SIGHUP."""
    tidied = []
    with pytest.raises(SystemExit) as stop, handled("mmq run"):
        try:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGHUP)
            tidied.append(True)
    assert stop.value.code == 128 + signal.SIGHUP
    assert tidied
    assert capfd.readouterr().err.count("\n") == 1
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


HALF_MADE = """
import os, signal, time
import mmq.cli.app as command
from mmq.cli.errors import handled

class Half:
    def __init__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        self.whole = True

    def __del__(self):
        assert self.whole

def app():
    with handled("mmq awq recipe.yaml"):
        Half()

command.app = app
command.main()
"""


def test_a_signal_amid_the_making_of_an_object_is_one_sentence() -> None:
    """As of llvmlite's, whose end stumbles over what its beginning had not come to, and the interpreter tells of it."""
    ended = subprocess.run([sys.executable, "-c", HALF_MADE], capture_output=True, text=True, check=False)
    assert ended.returncode == 128 + signal.SIGTERM
    assert ended.stderr == "stopped: finished shards and layers are safe; go on with: mmq awq recipe.yaml\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_a_library_turns_into_an_error_is_still_one(
    project: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """As safetensors does when it comes in the midst of a tensor: "could not determine the shape of object"."""

    def fail(*_: object) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        except BaseException:
            raise ValueError("could not determine the shape") from None

    monkeypatch.setattr(mmq.stages.pipeline, "run_stages", fail)
    result = cli("awq", project / "recipe.yaml")
    assert result.exit_code == 128 + number
    assert result.stderr.startswith("stopped: ")
    with pytest.raises(ValueError, match="a fault"):
        monkeypatch.setattr(mmq.stages.pipeline, "run_stages", _faulty)
        cli("awq", project / "recipe.yaml")


def _faulty(*_: object) -> None:
    raise ValueError("a fault of mmq's own")


def test_the_log_says_what_happened(project: Path) -> None:
    recipe, log = project / "recipe.yaml", project / "mmq.log"
    handlers, hangup = list(logging.getLogger().handlers), signal.getsignal(signal.SIGHUP)
    succeed("dequant", recipe, "--quiet", "--log-file", log)
    found = lines(log)
    assert found[0][1].startswith(
        f"mmq dequant {recipe} --log-file {log}: mmq {mmq.__version__}, process {os.getpid()}"
    )
    units = [text for _, text in found if text.startswith("dequant: model-")]
    assert [re.findall(r"\((\d)/4\)", text) for text in units] == [["1"], ["2"], ["3"], ["4"]]
    assert found[-2:] == [("INFO", "dequant is complete"), ("INFO", "done")]

    message = refused("restore", recipe, "--log-file", log)
    assert lines(log)[: len(found)] == found, "a log is appended to"
    assert lines(log)[-1] == ("ERROR", f"error: {message}")
    assert logging.getLogger().handlers == handlers
    assert signal.getsignal(signal.SIGHUP) is hangup


def test_a_verification_is_logged_with_its_problems(finished_copy: Path) -> None:
    recipe, log = finished_copy / "recipe.yaml", finished_copy / "mmq.log"
    succeed("verify", recipe, "--quiet", "--log-file", log)
    assert any(text.startswith("verified: ") for _, text in lines(log))
    (finished_copy / "run" / "hybrid" / "config.json").write_text("{}", encoding="utf-8")
    log.unlink()
    assert cli("verify", recipe, "--quiet", "--log-file", log).exit_code == 1
    text = log.read_text(encoding="utf-8")
    assert "ERROR error: " in text
    assert "is not what it must be" in text
    assert "  - " in text


@pytest.mark.parametrize("propagate", [False, True], ids=["transformers-apart", "transformers-propagates"])
def test_unforeseen_errors_warnings_and_records_of_libraries_are_logged(
    project: Path, monkeypatch: pytest.MonkeyPatch, propagate: bool
) -> None:
    logger = transformers.utils.logging.get_logger("transformers")
    monkeypatch.setattr(logger, "propagate", propagate)

    def fail(*_: object) -> None:
        warnings.warn("a warning", stacklevel=1)
        logging.getLogger("a.library").warning("a record")
        logging.getLogger("transformers.models").error("a record that stays in its library")
        logging.getLogger("a.library").info("chatter")
        raise RuntimeError("a fault of mmq's own")

    monkeypatch.setattr(mmq.stages.pipeline, "run_stages", fail)
    log = project / "mmq.log"
    with pytest.raises(RuntimeError):
        cli("run", project / "recipe.yaml", "--log-file", log)
    text = log.read_text(encoding="utf-8")
    for part in (
        "UserWarning: a warning",
        "a record\n",
        "a record that stays",
        "Traceback",
        "in fail\n",
        "\nRuntimeError: ",
    ):
        assert text.count(part) == 1, text
    assert "chatter" not in text


def test_control_characters_stay_out_of_the_log(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(workspace: Any, *_: object) -> None:
        workspace.reporter.note("red \x1b[31m alert")

    monkeypatch.setattr(mmq.stages.pipeline, "run_stages", fail)
    succeed("dequant", project / "recipe.yaml", "--quiet", "--log-file", project / "mmq.log")
    assert ("INFO", r"red \x1b[31m alert") in lines(project / "mmq.log")


def test_the_log_rotates(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmq.cli.session, "LOG_BYTES", 1000)
    log = project / "log" / "mmq.log"
    log.parent.mkdir()
    for _ in range(20):
        succeed("dequant", project / "recipe.yaml", "--quiet", "--log-file", log)
    names = {path.name for path in log.parent.iterdir()}
    assert names == {"mmq.log", *(f"mmq.log.{number}" for number in range(1, 6))}
    assert all(path.stat().st_size <= 1000 for path in log.parent.iterdir())
    assert lines(log)[-1] == ("INFO", "done")


@pytest.mark.parametrize("place", ["source/mmq.log", "run/hybrid/mmq.log", "run/state/deep/mmq.log"])
@pytest.mark.parametrize("command", ["dequant", "awq", "restore", "run", "verify", "eval"])
def test_a_log_among_the_models_files_is_refused(finished_copy: Path, command: str, place: str) -> None:
    before = digests(finished_copy)
    assert str(finished_copy / place) in refused(
        command, finished_copy / "recipe.yaml", "--log-file", finished_copy / place
    )
    assert digests(finished_copy) == before


def test_a_link_into_the_source_is_seen_through(project: Path) -> None:
    (project / "mmq.log").symlink_to(project / "source" / "mmq.log")
    assert str(project / "source" / "mmq.log") in refused(
        "dequant", project / "recipe.yaml", "--log-file", project / "mmq.log"
    )


def test_a_log_that_cannot_be_opened_is_refused(project: Path) -> None:
    for place in (project, project / "no-such-folder" / "mmq.log"):
        message = refused("run", project / "recipe.yaml", "--log-file", place)
        assert message.startswith(f"--log-file: {place} can't be opened: ")
    assert not (project / "run").exists()


def test_a_dry_run_writes_no_log(project: Path) -> None:
    succeed("run", project / "recipe.yaml", "--dry-run", "--log-file", project / "mmq.log")
    assert not (project / "mmq.log").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_logs_disk_ends_nothing(project: Path, finished: Path) -> None:
    (project / "mmq.log").symlink_to("/dev/full")
    result = cli("dequant", project / "recipe.yaml", "--quiet", "--log-file", project / "mmq.log")
    assert (result.exit_code, result.stderr) == (0, "")
    assert digests(project / "run" / "bf16") == digests(finished / "run" / "bf16")
