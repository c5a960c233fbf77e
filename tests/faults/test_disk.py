"""Full, failing, read-only and tampered disks: one sentence, exit code 2, and the same bytes once the cause is gone."""

from __future__ import annotations

import builtins
import ctypes
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cli.test_cli import refused, succeed
from conftest import digests
from faults.harness import (
    FOLDERS,
    Matrix,
    Outcome,
    Tiny,
    begin,
    differences,
    leftovers,
    problems_of_state,
    run_forked,
    stages_to,
    up_to,
)
from faults.inject import Fault, Injector
from faults.test_crash import none_wrong
from mmq.storage.checkpoint import Checkpoint


@pytest.mark.parametrize("stage", FOLDERS)
def test_an_error_at_every_call_costs_only_the_time(matrix: Matrix, stage: str) -> None:
    """The disk is full from a call on, or the call fails once: writes by turns, flushes, renames and removals always
    the latter. `scripts/crash_test.py --enumerate` has both for all."""
    faults = [
        Fault(at, error=errno.ENOSPC, lasting=True)
        if call.kind in ("open", "mkdir") or (call.kind == "write" and at % 2)
        else Fault(at, error=errno.EIO)
        for at, call in enumerate(matrix.calls(stage), start=1)
    ]
    none_wrong(matrix, stage, faults)


def one_run(
    tiny: Tiny, stage: str, fault: Fault | None, root: str = "", first: Any = None
) -> tuple[Outcome, list[str]]:
    """A run of a stage, and what differs after it from the undisturbed run."""
    scratch, work_dir = begin(tiny, stage, False)
    command = tiny.command(stage, work_dir)
    outcome = run_forked(
        command,
        scratch,
        tiny.folder / root if root else work_dir,
        fault,
        partial(first, tiny, work_dir) if first else _nothing,
    )
    found = problems_of_state(work_dir)
    if outcome.code == 0:
        found += differences(work_dir, tiny.wanted, stages_to(stage))
    else:
        found += [f"{name} is left" for name in leftovers(work_dir)]
    shutil.rmtree(scratch)
    return outcome, found


def _nothing() -> None:
    pass


@pytest.mark.parametrize("most", [7, 4096])
@pytest.mark.parametrize("stage", FOLDERS)
def test_short_writes_are_continued(matrix: Matrix, stage: str, most: int) -> None:
    """The system may take less than it was given; all that counts is what it says it took."""
    plain = matrix.calls(stage)
    outcome, wrong = matrix.submit(one_run, matrix.tiny, stage, Fault(0, most=most))
    assert (outcome.code, wrong) == (0, []), outcome.stderr
    assert len(outcome.calls) > len(plain)


@pytest.mark.parametrize("stage", FOLDERS)
def test_the_source_is_only_read(matrix: Matrix, stage: str) -> None:
    source = matrix.tiny.folder / "source"
    before = witnessed(source)
    outcome, wrong = matrix.submit(one_run, matrix.tiny, stage, None, "source")
    assert (outcome.code, wrong) == (0, []), outcome.stderr
    assert outcome.calls == []
    assert outcome.read
    assert witnessed(source) == before


def witnessed(folder: Path) -> dict[str, Any]:
    """Contents, and the times that any change of a file or folder would set."""
    times = {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in [folder, *folder.rglob("*")]}
    return {"content": digests(folder), "times": times}


CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18


def mount_read_only(folder: Path) -> None:
    """Make a folder read-only for this process and its children. Raises OSError where the system does not let it."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    check(libc.unshare(CLONE_NEWNS if os.geteuid() == 0 else CLONE_NEWNS | CLONE_NEWUSER))
    path = os.fsencode(folder)
    check(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
    check(libc.mount(path, path, None, MS_BIND, None))
    check(libc.mount(None, path, None, MS_REMOUNT | MS_BIND | MS_RDONLY, None))


def can_mount(folder: Path) -> bool:
    """Whether a child of this process may."""
    child = os.fork()
    if not child:
        try:
            mount_read_only(folder)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def _source_read_only(tiny: Tiny, work_dir: Path) -> None:
    mount_read_only(tiny.folder / "source")


def _work_dir_read_only(tiny: Tiny, work_dir: Path) -> None:
    work_dir.mkdir(exist_ok=True)
    mount_read_only(work_dir)


@pytest.mark.parametrize("stage", FOLDERS)
def test_a_source_on_a_read_only_disk_is_enough(matrix: Matrix, stage: str) -> None:
    if not matrix.submit(can_mount, matrix.tiny.folder / "source"):
        pytest.skip("mounting is not allowed here")
    outcome, wrong = matrix.submit(one_run, matrix.tiny, stage, None, "", _source_read_only)
    assert (outcome.code, wrong) == (0, []), outcome.stderr


@pytest.mark.parametrize("stage", FOLDERS)
def test_a_read_only_work_dir_is_refused(matrix: Matrix, stage: str) -> None:
    if not matrix.submit(can_mount, matrix.tiny.folder / "source"):
        pytest.skip("mounting is not allowed here")
    outcome, wrong = matrix.submit(one_run, matrix.tiny, stage, None, "", _work_dir_read_only)
    (line,) = outcome.stderr.splitlines()
    assert outcome.code == 2
    # Before the first byte, the lock's included.
    assert re.fullmatch(r"error: work_dir: .*/run can't be written: no permission to write into .*", line)
    assert wrong == []


@pytest.mark.parametrize("stage", FOLDERS)
def test_a_work_dir_that_turns_read_only_is_named(matrix: Matrix, stage: str) -> None:
    """As a disk does after errors: from some rename on."""
    fault = Fault(2, error=errno.EROFS, kind="replace", lasting=True)
    outcome, wrong = matrix.submit(one_run, matrix.tiny, stage, fault)
    (line,) = outcome.stderr.splitlines()
    assert outcome.code == 2
    assert line.startswith("error: ")
    assert "Read-only file system" in line
    assert f"/run/{FOLDERS[stage]}" in line or "/run/state" in line
    assert wrong == []


@pytest.fixture
def work_dir(matrix: Matrix, tmp_path: Path) -> Callable[[str], Path]:
    """A work_dir in which all before a stage is done."""

    def make(stage: str) -> Path:
        return up_to(matrix.tiny.wanted, stage, tmp_path / "run")

    return make


def flip(path: Path) -> None:
    """Change one bit of a file, in what the next stage takes from it; the size and the times stay."""
    times = path.stat()
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if re.search(r"experts\.|model\.norm|hidden_states", name))
    data[8 + length + header[name]["data_offsets"][0]] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def cut(path: Path) -> None:
    """Take the last byte away."""
    os.truncate(path, path.stat().st_size - 1)


READ = [("awq", "dequant", number) for number in (0, 1)] + [("restore", "awq", number) for number in (0, 1, 2)]


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize(("stage", "before", "number"), READ)
def test_a_shard_that_changed_between_stages_is_refused(
    matrix: Matrix,
    work_dir: Callable[[str], Path],
    stage: str,
    before: str,
    number: int,
    damage: Callable[[Path], None],
) -> None:
    run = work_dir(stage)
    shard = sorted((run / FOLDERS[before]).glob("*.safetensors"))[number]
    whole = shard.read_bytes()
    damage(shard)
    message = refused(*matrix.tiny.command(stage, run))
    assert str(shard) in message
    assert f"mmq {before} --restart" in message
    assert not leftovers(run)
    assert not (run / FOLDERS[stage] / "model.safetensors.index.json").exists()
    shard.write_bytes(whole)
    succeed(*matrix.tiny.command(stage, run))
    assert differences(run, matrix.tiny.wanted, [before, stage]) == []


@pytest.mark.parametrize("damage", [flip, cut])
def test_damaged_hidden_states_are_refused(
    matrix: Matrix, work_dir: Callable[[str], Path], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """The activations after a layer, from which the next one goes on."""
    run = work_dir("awq")
    at = next(at for at, call in enumerate(matrix.calls("awq"), start=1) if "awq/model-00002" in call.path)
    command = matrix.tiny.command("awq", run)
    stopped = matrix.submit(run_forked, command, tmp_path, run, Fault(at, sent=signal.SIGKILL), _nothing)
    assert stopped.code == -signal.SIGKILL
    (hidden,) = (run / "state" / "awq").glob("hidden-00000.safetensors")
    whole = hidden.read_bytes()
    damage(hidden)
    message = refused(*command)
    assert str(hidden) in message
    assert "mmq awq --restart" in message
    assert not leftovers(run)
    hidden.write_bytes(whole)
    succeed(*command)
    assert differences(run, matrix.tiny.wanted, ["dequant", "awq"]) == []


@pytest.mark.parametrize("stage", ["awq", "restore"])
def test_a_damaged_journal_is_refused_wherever_it_is_cut(
    matrix: Matrix, work_dir: Callable[[str], Path], stage: str
) -> None:
    """At its beginning, inside it, and zeroed as file systems leave what a power cut caught."""
    run = work_dir(stage)
    journal, command = run / "journal.json", matrix.tiny.command(stage, run)
    whole = journal.read_bytes()
    for damaged in [whole[:size] for size in range(0, len(whole) - 2, 97)] + [b"\0" * len(whole), whole[1:]]:
        journal.write_bytes(damaged)
        assert str(journal) in refused(*command)
        assert journal.read_bytes() == damaged
        assert not (run / FOLDERS[stage]).exists()
    journal.write_bytes(whole)
    succeed(*command)
    assert differences(run, matrix.tiny.wanted, stages_to(stage)) == []


@pytest.mark.parametrize(
    ("stage", "file", "options"),
    [
        ("awq", "run/bf16/model-00002-of-00002.safetensors", []),
        ("awq", "source/model-00002-of-00002.safetensors", ["--set", "awq.source=fp8"]),
        ("restore", "run/awq/model-00002-of-00003.safetensors", []),
        ("restore", "source/model-00001-of-00002.safetensors", []),
        ("restore", "source/tokenizer.json", []),
        ("dequant", "source/model-00002-of-00002.safetensors", []),
        ("dequant", "source/config.json", []),
        ("dequant", "run/journal.json", []),
    ],
)
def test_an_error_of_reading_is_named(
    matrix: Matrix,
    work_dir: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    file: str,
    options: list[str],
) -> None:
    run = work_dir(stage)
    run.mkdir(exist_ok=True)
    command = [*matrix.tiny.command(stage, run), *options]
    broken = (run.parent if file.startswith("run") else matrix.tiny.folder) / file
    if not broken.exists():
        broken.write_text('{"format": 2, "stages": {}}')

    class Broken(io.FileIO):
        def readinto(self, _buffer: Any) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def read(self, _size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        readall = read

    original = open

    def opening(path: Any, mode: str = "r", buffering: int = -1, *more: Any, **others: Any) -> Any:
        if isinstance(path, int) or Path(os.fsdecode(path)) != broken:
            return original(path, mode, buffering, *more, **others)
        raw = Broken(path, "r")
        buffered = raw if buffering == 0 else io.BufferedReader(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *more, **others)

    monkeypatch.setattr(builtins, "open", opening)
    monkeypatch.setattr(io, "open", opening)
    message = refused(*command)
    assert str(broken) in message
    assert os.strerror(errno.EIO) in message
    monkeypatch.undo()
    assert not leftovers(run)
    succeed(*command)
    assert digests(run / FOLDERS[stage]) == digests(matrix.tiny.wanted / FOLDERS[stage])


def test_reading_ahead_gives_up_when_told(matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that is stopped does not wait until the next layer was read from the disk."""
    checkpoint = Checkpoint.open(matrix.tiny.folder / "source")
    stop, reads = threading.Event(), [0]

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            reads[0] += 1
            return super().readinto(buffer)

    monkeypatch.setattr(builtins, "open", lambda path, *_, **__: Counted(path, "r"))
    checkpoint.read_ahead(checkpoint.specs, stop)
    assert reads[0] >= len(checkpoint.specs)
    reads[0] = 0
    stop.set()
    checkpoint.read_ahead(checkpoint.specs, stop)
    assert reads[0] <= 1


def _shorten(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("stage", ["dequant", "restore"])
def test_a_source_that_fails_while_it_is_mapped_is_as_a_kill(matrix: Matrix, tmp_path: Path, stage: str) -> None:
    """Mapped bytes that the disk can't give end a process by SIGBUS, without a word, or fail the call that copies
    them. Nothing is lost by it."""
    project = tmp_path / "project"
    shutil.copytree(matrix.tiny.folder / "source", project / "source")
    for name in ("recipe.yaml", "samples.jsonl"):
        shutil.copy(matrix.tiny.folder / name, project / name)
    tiny = Tiny(project)
    run = up_to(matrix.tiny.wanted, stage, project / "run")
    shard = project / "source" / "model-00001-of-00002.safetensors"
    whole = shard.read_bytes()
    # The third write: the header and a tensor are written, the shard is mapped.
    at = [at for at, call in enumerate(matrix.calls(stage), 1) if "/model-00001" in call.path and call.kind == "write"][
        2
    ]
    fault = Fault(at, act=partial(_shorten, shard))
    outcome = matrix.submit(run_forked, tiny.command(stage, run), project, run, fault, _nothing)
    assert outcome.code in (-signal.SIGBUS, 2), outcome
    assert outcome.code != 2 or re.match(r"error: .*(could not be read|damaged or truncated)", outcome.stderr)
    assert problems_of_state(run) == []
    shard.write_bytes(whole)
    succeed(*tiny.command(stage, run))
    assert digests(run / FOLDERS[stage]) == digests(matrix.tiny.wanted / FOLDERS[stage])


SYSTEM_CALLS = {
    "fsync": "fsync", "fdatasync": "fsync", "rename": "replace", "renameat": "replace", "renameat2": "replace",
    "unlink": "unlink", "unlinkat": "unlink", "rmdir": "rmdir", "mkdir": "mkdir", "mkdirat": "mkdir",
    "write": "write", "pwrite64": "write", "writev": "write", "ftruncate": "truncate", "truncate": "truncate",
    "fallocate": "write", "copy_file_range": "write", "sendfile": "write", "link": "link", "linkat": "link",
    "symlink": "symlink", "symlinkat": "symlink", "chmod": "chmod", "fchmod": "chmod", "fchmodat": "chmod",
    "utimensat": "utime", "open": "open", "openat": "open", "creat": "open",
}  # fmt: skip


def _await_tracer(ready: Path) -> None:
    """Let another process trace this one, and wait until it does."""
    any_process, set_tracer = ctypes.c_ulong(-1), 0x59616D61
    ctypes.CDLL(None).prctl(set_tracer, any_process, 0, 0, 0)
    ready.write_text(str(os.getpid()))
    status = Path("/proc/self/status")
    while "TracerPid:\t0\n" in status.read_text():
        time.sleep(0.01)
    # strace counts flushes that reach the kernel.
    Injector.flushes = True


def test_the_set_of_calls_is_whole(matrix: Matrix, tmp_path: Path) -> None:
    """What `inject` meets in a whole run is what the kernel saw of it, and the source was opened for reading only."""
    strace = shutil.which("strace")
    if not strace or subprocess.run([strace, "-qq", "-o", os.devnull, "true"], check=False).returncode:
        pytest.skip("strace is not installed or not allowed here")
    log, ready, run, source = tmp_path / "strace", tmp_path / "ready", tmp_path / "run", matrix.tiny.folder / "source"
    command = matrix.tiny.command("run", run)
    running = matrix.begin(run_forked, command, tmp_path, run, None, partial(_await_tracer, ready))
    deadline = time.monotonic() + 30
    while not ready.exists() or not ready.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    follow = ["-f", "-qq", "-y", "-s", "0", "-o", str(log), "-e", f"trace={','.join(SYSTEM_CALLS)}"]
    tracer = subprocess.Popen([strace, *follow, "-p", ready.read_text()])
    outcome = running.result()
    assert tracer.wait(30) == 0
    assert outcome.code == 0, outcome.stderr
    seen: Counter[tuple[str, str]] = Counter()
    opened = set()
    begun: dict[str, str] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        thread, _, text = line.partition(" ")
        if text.endswith(" <unfinished ...>"):
            begun[thread] = text.removesuffix(" <unfinished ...>")
            continue
        text = re.sub(r"^ *<\.\.\. \w+ resumed>", begun.pop(thread, ""), text)
        found = re.match(r" *(\w+)\((.*)\) += (\S+)", text)
        if not found or found[3].startswith("-"):
            continue
        call, arguments = SYSTEM_CALLS[found[1]], found[2]
        paths = [first or second for first, second in re.findall(r'<(/[^>]*)>|"(/[^"]*)"', arguments)]
        if call == "open" and not re.search("O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_APPEND", arguments):
            opened |= {*paths}
            continue
        assert not [path for path in paths if path.startswith(str(source))], line
        ours = [path for path in paths if f"{path}/".startswith(f"{run}/")]
        # Progress, over the lock file's end: how often depends on time, and its failing is no fault of a run.
        if ours and not (found[1] == "pwrite64" and ours[-1] == str(run / "lock")):
            seen[call, ours[-1]] += 1
    assert {str(path) for path in source.glob("*.safetensors")} <= opened
    assert seen == Counter((call.kind, call.path) for call in outcome.calls)
