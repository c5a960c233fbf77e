"""Stops runs at any moment, goes on, and compares the bytes: python scripts/crash_test.py [--rounds 20] [--json]

A round runs `mmq run` on a synthetic model as a real process and stops it up to eight times, by SIGKILL, SIGTERM or
Ctrl-C, after a random delay or at a random system call that changes the disk, and then lets it come to its end. Every
byte must then be as in an undisturbed run, with no temporary file left. `--enumerate` instead has every signal and
every disk error at every such call of every stage of a tiny model. Exits with 1 where anything was not as it must be.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from conftest import write_recipe
from faults.harness import FOLDERS, Matrix, Tiny, differences, everywhere, leftovers, problems_of_state
from faults.inject import TAKES_ROOM, Fault, Injector
from mmq.source.synth import Sizes, write_checkpoint, write_samples

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
# How this script starts itself as a process that will stop itself.
ARMED = "armed"
# Longer than any end in good order may take.
LIMIT = 60.0
# More than the run of the small model can take.
UNDISTURBED = 3600.0


def main() -> None:
    if sys.argv[1:2] == [ARMED]:
        at, sent, root, *arguments = sys.argv[2:]
        run_armed(at, sent, root, arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no round after these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--enumerate", action="store_true", help="all calls of all stages of a tiny model")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="crash-test-") as name:
        folder = Path(name).resolve()
        result = enumerate_all(folder) if options.enumerate else many_rounds(folder, options)
    print(json.dumps(result) if options.json else table(result))
    sys.exit(1 if result["failures"] else 0)


def enumerate_all(folder: Path) -> dict[str, Any]:
    """Every fault at every call of every stage."""
    matrix = Matrix(Tiny.make(folder))
    counts: Counter[str] = Counter()
    failures: list[str] = []
    longest = 0.0
    begin = time.monotonic()
    for stage in FOLDERS:
        calls = matrix.calls(stage)
        faults = [fault for sent in SIGNALS for fault in everywhere(calls, sent == signal.SIGKILL, sent=sent)]
        faults += everywhere(calls, error=errno.EIO)
        full = everywhere(calls, error=errno.ENOSPC, lasting=True)
        faults += [fault for fault in full if calls[fault.at - 1].kind in TAKES_ROOM]
        for fault, problems, seconds in matrix.examine(stage, faults):
            counts[f"{stage} {name_of(fault)}"] += 1
            failures += problems
            longest = max(longest, seconds)
    matrix.close()
    seconds = round(time.monotonic() - begin)
    return {"faults": dict(counts), "longest_run": round(longest, 2), "seconds": seconds, "failures": failures}


def name_of(fault: Fault) -> str:
    return fault.sent.name if fault.sent else errno.errorcode[fault.error]


@dataclass
class Tally:
    """What happened in all rounds."""

    rounds: int = 0
    stops: Counter[str] = field(default_factory=Counter)
    in_stage: Counter[str] = field(default_factory=Counter)
    early: int = 0
    resumes: list[int] = field(default_factory=list)
    seconds_to_end: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def many_rounds(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds at random moments, with the real command."""
    draw = random.Random(options.seed)
    sizes = Sizes(layers=options.layers, hidden=options.hidden, experts=options.experts)
    write_checkpoint(folder / "source", sizes, shards=6, shuffle=True)
    write_samples(folder / "samples.jsonl", 12)
    recipe = write_recipe(folder, rounding="compensated", fisher_tokens=400)
    begin = time.monotonic()
    undisturbed = subprocess.run(command(recipe, "wanted"), capture_output=True, text=True, check=False)
    if undisturbed.returncode:
        sys.exit(f"the undisturbed run failed: {undisturbed.stderr}")
    whole = time.monotonic() - begin
    calls = calls_of_a_run(folder, recipe)
    tally = Tally()
    while tally.rounds < options.rounds and (time.monotonic() - begin) / 60 < options.minutes:
        known = len(tally.failures)
        one_round(folder, recipe, draw, whole, calls, tally)
        tally.rounds += 1
        print(f"round {tally.rounds} is over", *tally.failures[known:], sep="\n", file=sys.stderr)
    return {
        "rounds": tally.rounds,
        "seed": options.seed,
        "stops": dict(tally.stops),
        "stopped_in": dict(tally.in_stage),
        "before_the_command_began": tally.early,
        "mean_resumes": round(statistics.fmean(tally.resumes), 2) if tally.resumes else 0,
        "longest_seconds_to_end": round(max(tally.seconds_to_end, default=0), 2),
        "seconds_of_a_run": round(whole, 1),
        "seconds": round(time.monotonic() - begin),
        "failures": tally.failures,
    }


def command(recipe: Path, work_dir: str, at: int = 0, sent: signal.Signals = signal.SIGKILL) -> list[str]:
    """`mmq run`, as a user starts it, or armed to stop itself at a call."""
    mmq = ["run", str(recipe), "--quiet", "--set", f"work_dir={work_dir}"]
    if not at:
        return [sys.executable, "-m", "mmq", *mmq]
    return [sys.executable, __file__, ARMED, str(at), sent.name, str(recipe.parent / work_dir), *mmq]


def run_armed(at: str, sent: str, root: str, arguments: list[str]) -> None:
    """`mmq ARGUMENTS` in this process, with a signal at its `at`-th call below `root`; does not return."""
    from mmq.cli.app import app

    sys.argv[1:] = arguments
    Injector.flushes = True
    injector = Injector(Path(root), Fault(int(at), sent=signal.Signals[sent])).arm()
    try:
        app(arguments)
    finally:
        if trace := os.environ.get("CRASH_TEST_TRACE"):
            Path(trace).write_text(str(len(injector.calls)), encoding="utf-8")


def calls_of_a_run(folder: Path, recipe: Path) -> int:
    """How many calls a whole run makes."""
    trace = folder / "trace"
    armed = command(recipe, "counted", at=10**9)
    subprocess.run(armed, env=os.environ | {"CRASH_TEST_TRACE": str(trace)}, capture_output=True, check=True)
    shutil.rmtree(folder / "counted")
    return int(trace.read_text(encoding="utf-8"))


def one_round(folder: Path, recipe: Path, draw: random.Random, whole: float, calls: int, tally: Tally) -> None:
    """Stop a run up to eight times, let it come to its end, and compare."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    resumes, most = 0, draw.randint(1, 8)
    while True:
        sent, by_call = draw.choice(SIGNALS), draw.random() < 0.5
        # Resumed runs are shorter; of those that come to their end first there must not be too many.
        at = draw.randint(1, max(2, calls // (1 + resumes))) if by_call else 0
        delay = draw.uniform(0.2, 1.0) * whole
        if resumes == most:
            at, by_call, delay = 0, False, UNDISTURBED
        before = leftovers(run)
        code, stderr, seconds = stop(command(recipe, "run", at, sent), sent, None if by_call else delay)
        tally.failures += [f"round {tally.rounds}: {problem}" for problem in problems_of_state(run)]
        if code == 0:
            break
        where = f"round {tally.rounds}, {sent.name} {f'at call {at}' if by_call else f'after {delay:.2f} s'}"
        tally.stops[f"{sent.name} {'at a call' if by_call else 'after a delay'}"] += 1
        tally.in_stage[stage_of(run)] += 1
        resumes += 1
        if not by_call and sent != signal.SIGKILL and before_the_command(code, stderr):
            tally.early += 1
        elif code != CODES[sent]:
            tally.failures.append(f"{where}: ended with {code}: {stderr}")
        elif sent != signal.SIGKILL:
            if seconds is not None:
                tally.seconds_to_end.append(seconds)
            # A process that is stopped before its stage begins has not yet removed what a killed one left.
            tally.failures += [f"{where}: {name} was left" for name in leftovers(run) if name not in before]
            if "go on with: mmq run" not in stderr or len(stderr.splitlines()) != 1:
                tally.failures.append(f"{where}: it said {stderr!r}")
        if resumes > most:
            return
    tally.resumes.append(resumes)
    wrong = differences(run, folder / "wanted", FOLDERS) + [f"{name} is left" for name in leftovers(run)]
    tally.failures += [f"round {tally.rounds}: {problem}" for problem in wrong]


def before_the_command(code: int | None, stderr: str) -> bool:
    """Whether the interpreter was still starting, and nothing of mmq had begun."""
    return code in (-signal.SIGTERM, -signal.SIGINT) or (code == 1 and stderr.strip() == "Aborted.")


def stop(arguments: list[str], sent: signal.Signals, delay: float | None) -> tuple[int | None, str, float | None]:
    """Exit code and standard error of a process that gets a signal after a delay, and the seconds that it then took.

    Without a delay it stops itself, and how long it took is not known. The code is None where it did not end.
    """
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    begin = None
    try:
        if delay is not None:
            try:
                process.wait(delay)
            except subprocess.TimeoutExpired:
                begin = time.monotonic()
                process.send_signal(sent)
        _, stderr = process.communicate(timeout=LIMIT if begin else 20 * LIMIT)
        return process.returncode, stderr, time.monotonic() - begin if begin else None
    except subprocess.TimeoutExpired:
        process.kill()
        _, stderr = process.communicate()
        return None, stderr, None


def stage_of(run: Path) -> str:
    """The stage that is at work by what the journal says."""
    path = run / "journal.json"
    stages = json.loads(path.read_text(encoding="utf-8"))["stages"] if path.exists() else {}
    return next((stage for stage in FOLDERS if not stages.get(stage, {}).get("complete")), "verify")


def table(result: dict[str, Any]) -> str:
    """The result as lines of name and value, failures last."""
    lines = []
    for name, value in result.items():
        if isinstance(value, dict):
            lines += [f"{name.replace('_', ' ')}, {key}: {count}" for key, count in sorted(value.items())]
        elif name != "failures":
            lines.append(f"{name.replace('_', ' ')}: {value}")
    return "\n".join([*lines, f"failures: {len(result['failures'])}", *result["failures"]])


if __name__ == "__main__":
    main()
