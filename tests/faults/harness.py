"""A project small enough to be stopped everywhere, stages as forked processes, and what must hold after a stop.

A process that has everything loaded forks a child for each run, so a run costs about a tenth of a second, and is
a process with its own signals and locks all the same.
"""

from __future__ import annotations

import gc
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import redirect_stderr
from dataclasses import astuple, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LLM_COMPRESSOR_LOG_DISABLED", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A tokenizer's own threads would not be there in a forked child.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer.main
import xxhash
import yaml

from conftest import digests
from faults.inject import Call, Fault, Injector
from mmq.cli.app import app
from mmq.source.synth import TRAINING_TEXT, Sizes, write_checkpoint

FOLDERS = {"dequant": "bf16", "awq": "awq", "restore": "hybrid"}
# The least that has two layers, two shards and scales apart from their weights.
TINY = Sizes(layers=2, hidden=32, intermediate=32, experts=1, top_k=1, heads=1, kv_heads=1, head_dim=16, vocabulary=260)
LIMIT = 30.0
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["mmq.stages.pipeline", "mmq.cli.app", "llmcompressor", "transformers", "pytest"])
# Differ from run to run: times, memory, and what is computed from files that hold them.
VARIES = {"seconds", "peak_host_bytes", "peak_device_bytes", "host_bytes", "open_files", "runs", "ranks"}


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code (-n after signal n, None past the limit), standard error, the calls that were met,
    the files that were opened for reading, and seconds."""

    code: int | None
    stderr: str
    calls: list[Call]
    read: list[str]
    seconds: float


@dataclass(frozen=True)
class Tiny:
    """The tiny project in `folder`, its undisturbed run in `folder/wanted`."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Tiny:
        write_checkpoint(folder / "source", TINY, shards=2, shuffle=True)
        # Texts alone: rendering chats takes a process of its own, and longer than all the rest.
        lines = [json.dumps({"text": text}) + "\n" for text in TRAINING_TEXT[:2]]
        (folder / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
        recipe = {
            "model": {"source": "source"},
            "work_dir": "wanted",
            "awq": {
                "calibration": {"files": [{"path": "samples.jsonl", "samples": 2}], "sequence_length": 16},
                "source": "bf16",
                "rounding": "nearest",
                "min_tokens": 0,
                "n_grid": 3,
                "group_size": 32,
                "device": "cpu",
            },
            "workers": 1,
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return cls(folder)

    @property
    def wanted(self) -> Path:
        return self.folder / "wanted"

    def command(self, stage: str, work_dir: Path, *options: str) -> list[str]:
        return [stage, str(self.folder / "recipe.yaml"), "--quiet", "--set", f"work_dir={work_dir}", *options]


def stages_to(stage: str) -> list[str]:
    """A stage and all before it; `run` is all."""
    return [name for name in FOLDERS if stage == "run" or list(FOLDERS).index(name) <= list(FOLDERS).index(stage)]


def up_to(done: Path, stage: str, work_dir: Path) -> Path:
    """Make a work_dir that holds of a finished one what the stages before `stage` made; before `run` there is none."""
    before = stages_to(stage)[:-1] if stage in FOLDERS else []
    if not before:
        return work_dir
    work_dir.mkdir()
    for name in before:
        shutil.copytree(done / FOLDERS[name], work_dir / FOLDERS[name])
    if "awq" in before:
        shutil.copytree(done / "state", work_dir / "state")
    journal = json.loads((done / "journal.json").read_text(encoding="utf-8"))
    journal["stages"] = {name: journal["stages"][name] for name in before}
    (work_dir / "journal.json").write_text(json.dumps(journal), encoding="utf-8")
    return work_dir


def run_forked(
    arguments: list[str],
    scratch: Path,
    root: Path,
    fault: Fault | None = None,
    first: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run a command in a child of this process, which has loaded what the command needs.

    Args:
        scratch: where the child's standard error and calls go.
        root: calls below it are counted and can be met by the fault.
        first: called in the child before the command.
    """
    stderr, trace = scratch / "stderr", scratch / "calls"
    for path in (stderr, trace):
        path.unlink(missing_ok=True)
    begin = time.monotonic()
    child = os.fork()
    if not child:
        _run(arguments, stderr, trace, Injector(root, fault), first)
    code = _wait(child)
    *calls, (_, *read) = json.loads(trace.read_text()) if trace.exists() else [["read"]]
    text = stderr.read_text(encoding="utf-8") if stderr.exists() else ""
    return Outcome(code, text, [Call(*call) for call in calls], read, time.monotonic() - begin)


def _run(arguments: list[str], stderr: Path, trace: Path, injector: Injector, first: Callable[[], None]) -> None:
    """The child's life."""
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(os.open(stderr, os.O_CREAT | os.O_WRONLY), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        first()
        injector.arm()
        try:
            code = call_command(arguments)
        finally:
            # As an interpreter does before it ends.
            for thread in threading.enumerate():
                if thread is not threading.current_thread() and not thread.daemon:
                    thread.join()
            trace.write_text(json.dumps([[*astuple(call)] for call in injector.calls] + [["read", *injector.opened]]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def call_command(arguments: list[str]) -> int:
    """Exit code of `mmq ARGUMENTS` in this process."""
    try:
        _command().main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@cache
def _command() -> Any:
    """Typer would build it anew at each call, which takes longer than a stage here."""
    return typer.main.get_command(app)


def _wait(child: int) -> int | None:
    deadline = time.monotonic() + LIMIT
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.001)


def everywhere(calls: list[Call], halves: bool = True, **options: Any) -> list[Fault]:
    """A fault at every call, and, with `halves`, one inside every write of more than a byte."""
    return [
        Fault(at, half=half, **options)
        for at, call in enumerate(calls, start=1)
        for half in (False, True)
        if not half or (halves and call.kind == "write" and call.size > 1)
    ]


def problems_of_state(work_dir: Path) -> list[str]:
    """What the journal says that the disk does not bear out. Whatever happened, this must be empty."""
    path = work_dir / "journal.json"
    if not path.exists():
        return []
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
    except (ValueError, KeyError) as error:
        return [f"the journal can't be read: {error}"]
    found = []
    for record in stages.values():
        for unit, files in record["units"].items():
            for name, (size, digest) in files.items():
                file = work_dir / name
                data = file.read_bytes() if file.is_file() else None
                if data is None:
                    found.append(f"{unit}: {name} is in the journal and not on the disk")
                elif (len(data), xxhash.xxh3_128_hexdigest(data)) != (size, digest):
                    found.append(f"{unit}: {name} is not what the journal says")
    return found


def leftovers(work_dir: Path) -> list[str]:
    """Temporary files."""
    return [str(path.relative_to(work_dir)) for path in work_dir.rglob("*.mmq-tmp")]


def content(work_dir: Path, stages: Iterable[str]) -> dict[str, Any]:
    """All that a work_dir holds of some stages but times and memory."""
    found: dict[str, Any] = {}
    journal = json.loads((work_dir / "journal.json").read_text(encoding="utf-8"))["stages"]
    for stage in stages:
        found |= {f"{FOLDERS[stage]}/{name}": digest for name, digest in digests(work_dir / FOLDERS[stage]).items()}
        found |= {
            f"journal: {stage}, {unit}": {
                name: None if name.endswith(".json") else entry for name, entry in files.items()
            }
            for unit, files in journal[stage]["units"].items()
        }
        # The model card tells how long the stages took.
        found.pop("hybrid/README.md", None)
        found[f"journal: {stage}"] = {
            key: value for key, value in journal[stage].items() if key not in VARIES | {"units"}
        }
    if "awq" in stages:
        for path in sorted((work_dir / "state").rglob("*")):
            if path.suffix == ".json":
                found[str(path.relative_to(work_dir))] = _steady(json.loads(path.read_text(encoding="utf-8")))
            elif path.is_file():
                found[str(path.relative_to(work_dir))] = path.read_bytes()
    top = {"journal.json", "lock", "state", *FOLDERS.values()}
    found["besides"] = sorted(path.name for path in work_dir.iterdir() if path.name not in top)
    return found


def differences(work_dir: Path, wanted: Path, stages: Iterable[str]) -> list[str]:
    """What differs from the undisturbed run."""
    stages = list(stages)
    ours, theirs = content(work_dir, stages), content(wanted, stages)
    return [f"{name} differs" for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(item) for key, item in value.items() if key not in VARIES}
    return [_steady(item) for item in value] if isinstance(value, list) else value


def begin(tiny: Tiny, stage: str, restart: bool) -> tuple[Path, Path]:
    """A fresh folder of this process, and in it a work_dir: all before the stage, for a restart the stage as well."""
    scratch = tiny.folder / f"at-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    work_dir = scratch / "run"
    if restart:
        shutil.copytree(tiny.wanted, work_dir)
    else:
        up_to(tiny.wanted, stage, work_dir)
    return scratch, work_dir


def examine(tiny: Tiny, stage: str, options: list[str], fault: Fault) -> tuple[Fault, list[str], float]:
    """One fault in one stage: how it ends, what it leaves, and where the same command comes to after it.

    Returns:
        the fault, what is wrong, and the seconds until the process had ended.
    """
    scratch, work_dir = begin(tiny, stage, "--restart" in options)
    command = tiny.command(stage, work_dir, *options)
    stopped = run_forked(command, scratch, work_dir, fault)
    found = _problems_of_end(stopped, fault, stage, work_dir)
    found += problems_of_state(work_dir)
    if fault.sent != signal.SIGKILL:
        found += [f"{name} was left" for name in leftovers(work_dir)]
    # In this process: a second fork would take as long as the stage itself.
    with redirect_stderr(io.StringIO()) as stderr:
        code = call_command(command)
    if code != 0:
        found.append(f"the same command then ends with {code}: {stderr.getvalue()}")
    else:
        found += differences(work_dir, tiny.wanted, stages_to(stage)) + problems_of_state(work_dir)
        found += [f"{name} is left in the end" for name in leftovers(work_dir)]
    shutil.rmtree(scratch)
    return fault, [f"{stage}, {fault}: {problem}" for problem in found], stopped.seconds


def _problems_of_end(stopped: Outcome, fault: Fault, stage: str, work_dir: Path) -> list[str]:
    lines = stopped.stderr.splitlines()
    if fault.sent == signal.SIGKILL:
        return [] if stopped.code == -signal.SIGKILL else [f"ended with {stopped.code}: {stopped.stderr}"]
    code = {signal.SIGTERM: 143, signal.SIGINT: 130}[fault.sent] if fault.sent else 2
    if stopped.code != code or len(lines) != 1:
        return [f"ended with {stopped.code} instead of {code}: {stopped.stderr}"]
    if fault.sent:
        parts = ["stopped: ", " safe", f"mmq {stage} ", f"--set work_dir={work_dir}"]
    else:
        parts = ["error: ", str(work_dir)]
    return [f"{part!r} is not in the message: {lines[0]}" for part in parts if part not in lines[0]]


class Matrix:
    """Processes that examine faults of a project's stages, one for each processor that falls to this one of pytest's
    workers."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny = tiny
        workers = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
        self._pool = ProcessPoolExecutor(workers, mp_context=FORK, initializer=_load, initargs=(tiny,))
        # The first one makes what all others are compared with.
        self._pool.submit(_make_wanted, tiny).result()

    def close(self) -> None:
        self._pool.shutdown()

    def calls(self, stage: str, *options: str) -> list[Call]:
        """The calls of an undisturbed run of a stage."""
        return self.submit(traced, self.tiny, stage, list(options))

    def examine(self, stage: str, faults: Iterable[Fault], *options: str) -> list[tuple[Fault, list[str], float]]:
        """Examine all; see `examine`."""
        return list(self._pool.map(partial(examine, self.tiny, stage, list(options)), faults))

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in one of the processes."""
        return self.begin(function, *arguments).result()

    def begin(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Begin to call it."""
        return self._pool.submit(function, *arguments)


def _load(tiny: Tiny) -> None:
    """Run everything once in this process, so that its children need not load anything."""
    work_dir = tiny.folder / f"loading-{os.getpid()}"
    for stage in FOLDERS:
        assert call_command(tiny.command(stage, work_dir)) == 0
    shutil.rmtree(work_dir)
    # Collecting a library's objects again takes each child longer than its work.
    gc.collect()
    gc.freeze()


def _make_wanted(tiny: Tiny) -> None:
    for stage in FOLDERS:
        assert call_command(tiny.command(stage, tiny.wanted)) == 0


def traced(tiny: Tiny, stage: str, options: list[str]) -> list[Call]:
    """The calls of an undisturbed run of a stage, with paths relative to the work_dir."""
    scratch, work_dir = begin(tiny, stage, "--restart" in options)
    outcome = run_forked(tiny.command(stage, work_dir, *options), scratch, work_dir)
    assert outcome.code == 0, outcome.stderr
    shutil.rmtree(scratch)
    return [Call(call.kind, os.path.relpath(call.path, work_dir), call.size) for call in outcome.calls]
