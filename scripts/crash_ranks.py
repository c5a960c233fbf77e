"""Kills ranks at any moment, goes on with another number of them, and compares: python scripts/crash_ranks.py

A round runs `mmq run --devices N` on a synthetic model and, after a random delay, kills a random rank with SIGKILL, or
stops the launcher by SIGTERM or Ctrl-C; then goes on with another number of ranks, up to twice, until the run
comes to its end. Whoever is killed, all must end soon, with one sentence that names the rank, and in the end every byte
must be as one undisturbed process writes it. Exits with 1 where anything was not as it must be.

Importing torch and transformers takes most of such a run. `--forked` forks launchers and ranks from one process that
has imported all, with the same launcher, signals and ends, for several times as many rounds in the same time.
"""

from __future__ import annotations

import argparse
import concurrent.futures.thread
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch.distributed.launcher.api as launcher

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from cli.test_ranks import children_of, ranks_of
from conftest import write_recipe
from faults.harness import FOLDERS, differences, leftovers
from mmq.cli.app import app
from mmq.source.synth import Sizes, write_checkpoint, write_samples

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT}
# Longer than any end may take once a rank has died.
LIMIT = 60.0
# Starts of a round; the last is left alone.
TURNS = 3


class Started:
    """A command that runs, as a process of its own."""

    def __init__(self, recipe: Path, work_dir: str, ranks: int, forked: bool) -> None:
        arguments = ["run", str(recipe), "--quiet", "--set", f"work_dir={work_dir}"]
        arguments += ["--devices", str(ranks)] if ranks > 1 else []
        self.ranks, self.forked = ranks, forked
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        if not forked:
            command = [sys.executable, "-m", "mmq", *arguments]
            process = subprocess.Popen(command, stderr=self._stderr, stdout=subprocess.DEVNULL)
            self.pid, self._ended = process.pid, process.poll
            return
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(self._stderr.fileno(), 2)
            os.setsid()
            os._exit(command_line(arguments))
        self._code: int | None = None
        self._ended = self._waited

    def _waited(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def end(self, seconds: float) -> int | None:
        """The exit code; None where it goes on after so many seconds."""
        until = time.monotonic() + seconds
        while (code := self._ended()) is None and time.monotonic() < until:
            time.sleep(0.02)
        return code

    def said(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read()

    def processes(self) -> dict[int, int]:
        """The ranks' processes, by rank."""
        try:
            # Forked ones have no environment of their own; they come one after the other, as the launcher counts them.
            return dict(enumerate(children_of(self.pid))) if self.forked else ranks_of(self.pid)
        except OSError:
            return {}


def command_line(arguments: list[str]) -> int:
    """`mmq` with these arguments, in this process; its exit code."""
    sys.argv = ["mmq", *arguments]
    try:
        app(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


class ForkingLaunch(launcher.elastic_launch):
    """torch's launcher of processes that are forked and not started anew."""

    def __init__(self, config: launcher.LaunchConfig, _command: str) -> None:
        super().__init__(replace(config, start_method="fork"), rank_main)

    def __call__(self, *arguments: str) -> Any:
        return super().__call__(list(arguments[2:]))


def rank_main(arguments: list[str]) -> None:
    # What multiprocessing puts there would be the launcher's handlers.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The launcher's thread, which this process can't wait for, as it has become its own main one.
    concurrent.futures.thread._threads_queues.clear()
    if code := command_line(arguments):
        os._exit(code)
    # It waits for the others here, where a process of its own would have ended.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def disturb(started: Started, what: str, draw: random.Random, delay: float) -> int | None:
    """Kill a rank, which is returned, or stop the launcher, which is -1; None where all had ended."""
    if started.end(delay) is not None:
        return None
    if what != "kill":
        os.kill(started.pid, SIGNALS[what])
        return -1
    found = started.processes()
    if len(found) < started.ranks:
        os.kill(started.pid, signal.SIGTERM)
        return -1
    rank = draw.choice(sorted(found))
    os.kill(found[rank], signal.SIGKILL)
    return rank


def one_round(
    recipe: Path, draw: random.Random, whole: float, counts: Counter[str], slowest: list[float], forked: bool
) -> list[str]:
    """What was wrong in a round."""
    run, problems = recipe.parent / "run", []
    shutil.rmtree(run, ignore_errors=True)
    for turn in range(TURNS):
        ranks = draw.choice((2, 3)) if turn < TURNS - 1 else draw.choice((1, 2, 3))
        what = draw.choice(("kill", "kill", "term", "interrupt")) if turn < TURNS - 1 else "nothing"
        delay = draw.uniform(0.0, 1.0) * whole
        started = Started(recipe, "run", ranks, forked)
        hit = disturb(started, what, draw, delay) if what != "nothing" else None
        begin = time.monotonic()
        code = started.end(LIMIT if hit is not None else 20 * LIMIT)
        stderr = started.said()
        if code is None:
            for own in (*started.processes().values(), started.pid):
                os.kill(own, signal.SIGKILL)
            started.end(LIMIT)
            return [f"{what} of rank {hit} of {ranks} after {delay:.1f} s: no end within {LIMIT} s: {stderr}"]
        if code == 0:
            break
        seconds = time.monotonic() - begin
        where = f"{what} of rank {hit} of {ranks} after {delay:.1f} s ({seconds:.1f} s to the end)"
        print(where, code, stderr.strip(), file=sys.stderr)
        counts[what if hit != 0 else "kill of the leading rank"] += 1
        slowest.append(seconds)
        lines = [line for line in stderr.splitlines() if line]
        wanted = f"rank {hit}" if what == "kill" and hit != -1 else "stopped"
        # A launcher that is stopped before it has set its handlers has nothing to say.
        if len(lines) > 1 or not all(wanted in line for line in lines) or (not lines and wanted != "stopped"):
            problems.append(f"{where}: it said {stderr!r}")
    else:
        problems.append("it did not come to its end")
    problems += differences(run, recipe.parent / "wanted", FOLDERS)
    return problems + [f"{name} is left" for name in leftovers(run)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no round after these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forked", action="store_true", help="fork all processes from one that has imported all")
    given = parser.parse_args()
    draw, counts, failures, done = random.Random(given.seed), Counter[str](), [], 0
    slowest: list[float] = []
    if given.forked:
        launcher.elastic_launch = ForkingLaunch  # type: ignore[misc]
    with tempfile.TemporaryDirectory(prefix="crash-ranks-") as name:
        folder = Path(name).resolve()
        write_checkpoint(
            folder / "source", Sizes(layers=2, hidden=128, intermediate=128, experts=11), shards=4, shuffle=True
        )
        write_samples(folder / "samples.jsonl", 12)
        recipe = write_recipe(folder, rounding="compensated", fisher_tokens=400)
        begin = time.monotonic()
        if Started(recipe, "wanted", 1, given.forked).end(20 * LIMIT) != 0:
            sys.exit("the undisturbed run failed")
        whole = 1.5 * (time.monotonic() - begin)
        begin = time.monotonic()
        while done < given.rounds and time.monotonic() - begin < 60 * given.minutes:
            problems = one_round(recipe, draw, whole, counts, slowest, given.forked)
            done += 1
            failures += [f"round {done}: {problem}" for problem in problems]
            print(f"round {done} is over", *problems, sep="\n", file=sys.stderr)
    seconds = {"seconds to the end": [round(f(slowest), 1) for f in (min, max)] if slowest else []}
    print(json.dumps({"rounds": done, "stops": dict(counts), **seconds, "failures": failures}, indent=1))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
