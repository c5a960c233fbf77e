"""Kills ranks at any moment, goes on with another number of them, and compares: python scripts/crash_ranks.py

A round runs `mmq run --devices N` on a synthetic model and, after a random delay, kills a random rank with SIGKILL, or
stops the launcher by SIGTERM or Ctrl-C; then goes on with another number of ranks, up to four times, until the run
comes to its end. Whoever is killed, all must end soon, with one sentence that names the rank, and in the end every byte
must be as one undisturbed process writes it. Exits with 1 where anything was not as it must be.
"""

from __future__ import annotations

import argparse
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from conftest import write_recipe
from faults.harness import FOLDERS, differences, leftovers
from mmq.source.synth import Sizes, write_checkpoint, write_samples

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT}
# Longer than any end may take once a rank has died.
LIMIT = 60.0


def start(recipe: Path, work_dir: str, ranks: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mmq", "run", str(recipe), "--quiet", "--set", f"work_dir={work_dir}"]
    several = ["--devices", str(ranks)] if ranks > 1 else []
    return subprocess.Popen([*command, *several], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def ranks_of(launcher: int) -> dict[int, int]:
    """Processes of a launcher's ranks, by rank."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if rank := next((entry for entry in environment if entry.startswith(b"RANK=")), None):
            found[int(rank.partition(b"=")[2])] = int(child)
    return found


def disturb(process: subprocess.Popen[str], what: str, draw: random.Random, delay: float) -> int | None:
    """Kill a rank, which is returned, or stop the launcher; None where it had ended."""
    try:
        process.wait(delay)
        return None
    except subprocess.TimeoutExpired:
        pass
    if what != "kill":
        process.send_signal(SIGNALS[what])
        return -1
    found = ranks_of(process.pid)
    if not found:
        process.kill()
        return -1
    rank = draw.choice(sorted(found))
    os.kill(found[rank], signal.SIGKILL)
    return rank


def one_round(recipe: Path, draw: random.Random, whole: float, counts: Counter[str]) -> list[str]:
    """What was wrong in a round."""
    run, problems = recipe.parent / "run", []
    shutil.rmtree(run, ignore_errors=True)
    for turn in range(5):
        ranks = draw.choice((2, 3)) if turn < 4 else draw.choice((1, 2, 3))
        what = draw.choice(("kill", "kill", "term", "interrupt")) if turn < 4 else "nothing"
        delay = draw.uniform(0.1, 1.0) * whole
        process = start(recipe, "run", ranks)
        begin = time.monotonic()
        hit = disturb(process, what, draw, delay) if what != "nothing" else None
        begin = begin if hit is None else time.monotonic()
        try:
            _, stderr = process.communicate(timeout=LIMIT if hit is not None else 20 * LIMIT)
        except subprocess.TimeoutExpired:
            for own in ranks_of(process.pid).values():
                os.kill(own, signal.SIGKILL)
            process.kill()
            _, stderr = process.communicate()
            return [f"{what} of rank {hit} of {ranks} after {delay:.1f} s: no end within {LIMIT} s: {stderr}"]
        if process.returncode == 0:
            break
        where = f"{what} of rank {hit} of {ranks} after {delay:.1f} s ({time.monotonic() - begin:.1f} s to the end)"
        print(where, process.returncode, stderr.strip(), file=sys.stderr)
        counts[what if hit != 0 else "kill of the leading rank"] += 1
        lines = [line for line in stderr.splitlines() if line]
        wanted = {"kill": f"rank {hit}", "term": "stopped", "interrupt": "stopped"}.get(what, "nothing at all")
        if (
            len(lines) > 1
            or (lines and wanted not in lines[0] and hit != -1)
            or (not lines and what == "kill" and hit != -1)
        ):
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
    given = parser.parse_args()
    draw, counts, failures, done = random.Random(given.seed), Counter[str](), [], 0
    with tempfile.TemporaryDirectory(prefix="crash-ranks-") as name:
        folder = Path(name).resolve()
        write_checkpoint(folder / "source", Sizes(layers=3, hidden=256, experts=11), shards=6, shuffle=True)
        write_samples(folder / "samples.jsonl", 12)
        recipe = write_recipe(folder)
        begin = time.monotonic()
        if start(recipe, "wanted", 1).wait():
            sys.exit("the undisturbed run failed")
        whole = 2 * (time.monotonic() - begin)
        begin = time.monotonic()
        while done < given.rounds and time.monotonic() - begin < 60 * given.minutes:
            problems = one_round(recipe, draw, whole, counts)
            done += 1
            failures += [f"round {done}: {problem}" for problem in problems]
            print(f"round {done} is over", *problems, sep="\n", file=sys.stderr)
    print(json.dumps({"rounds": done, "stops": dict(counts), "failures": failures}, indent=1))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
