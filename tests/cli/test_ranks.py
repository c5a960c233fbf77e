"""Several real processes on one run: the same bytes, whoever is killed, and one sentence."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import SAMPLES, cpu_only, write_recipe
from faults.harness import FOLDERS, differences, leftovers
from mmq.errors import RecipeError
from mmq.machine.team import Team
from mmq.recipe import load
from mmq.source.synth import Sizes, write_checkpoint, write_samples
from mmq.stages.pipeline import STAGES
from mmq.workdir.lock import lock_holder
from mmq.workdir.workspace import Workspace

# Experts and sequences that don't divide by the ranks.
ODD = Sizes(layers=2, hidden=128, intermediate=128, experts=11, top_k=2, heads=2, kv_heads=1, head_dim=64)
MMQ = [sys.executable, "-m", "mmq"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
# Without --multi_gpu it starts one process, on a CPU too.
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port=0"]
ACCELERATE += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--num_processes"]
# More than any of these runs can take, however busy the machine.
LIMIT = 300


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a finished run of one process in `wanted`."""
    folder = tmp_path_factory.mktemp("odd")
    write_checkpoint(folder / "source", ODD, shards=3, shuffle=True)
    write_samples(folder / "samples.jsonl", SAMPLES)
    write_recipe(folder, rounding="compensated", fisher_tokens=300)
    run(MMQ, folder, "wanted")
    return folder


def run(command: list[str], folder: Path, work_dir: str, *options: str, code: int = 0) -> str:
    """`mmq run`; its standard error."""
    given = ["run", str(folder / "recipe.yaml"), "--quiet", "--set", f"work_dir={work_dir}", *options]
    process = subprocess.run([*command, *given], capture_output=True, text=True, timeout=LIMIT, check=False)
    assert process.returncode == code, process.stderr
    assert process.stdout == ""
    return process.stderr


@cpu_only
def test_three_ranks_are_killed_and_two_go_on(odd: Path) -> None:
    """A killed rank ends the others, and the sentence names it. Two by accelerate go on, to the bytes of one."""
    command = [*MMQ, "run", str(odd / "recipe.yaml"), "--quiet", "--set", "work_dir=killed", "--devices", "3"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for_layer(odd / "killed")
        killed = ranks_of(process.pid)[1]
        os.kill(killed, signal.SIGKILL)
        _, stderr = process.communicate(timeout=LIMIT)
    assert process.returncode == 2
    assert re.match(rf"error: rank 1 \(process {killed} on \S+\) died without a word", stderr)
    assert len(stderr.splitlines()) == 1
    assert run([*ACCELERATE, "2", "-m", "mmq"], odd, "killed") == ""
    assert differences(odd / "killed", odd / "wanted", FOLDERS) == []
    assert leftovers(odd / "killed") == []


@cpu_only
@pytest.mark.parametrize("rank", [0, 1])
def test_one_is_killed_before_they_know_each_other(odd: Path, rank: int) -> None:
    """While the others still import: the launcher, which sees it, names it."""
    command = [*MMQ, "run", str(odd / "recipe.yaml"), "--quiet", "--set", "work_dir=early", "--devices", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while len(found := ranks_of(process.pid)) < 2:
            time.sleep(0.02)
        os.kill(found[rank], signal.SIGKILL)
        begin = time.monotonic()
        _, stderr = process.communicate(timeout=LIMIT)
    assert process.returncode == 128 + signal.SIGKILL
    assert re.fullmatch(rf"error: rank {rank} \(process {found[rank]}\) was killed by SIGKILL; finished .*\n", stderr)
    assert time.monotonic() - begin < 60, "seconds were asked for"
    assert not (odd / "early").exists()


@cpu_only
def test_torchrun_and_what_each_rank_took(odd: Path) -> None:
    run([*TORCHRUN, "2", "-m", "mmq"], odd, "torchrun")
    assert differences(odd / "torchrun", odd / "wanted", FOLDERS) == []
    verified = [json.loads((odd / run / "verify.json").read_text()) for run in ("torchrun", "wanted")]
    assert verified[0] | {"folder": ""} == verified[1] | {"folder": ""}
    for work_dir, several in (("torchrun", ["--devices", "3"]), ("wanted", [])):
        recipe = ["eval", str(odd / "recipe.yaml"), "--quiet", "--set", f"work_dir={work_dir}"]
        few = ["--samples", "5", "--sequence-length", "64"]
        subprocess.run([*MMQ, *recipe, *few, *several], check=True, timeout=LIMIT)
    evaluated = [json.loads((odd / work_dir / "eval.json").read_text()) for work_dir in ("torchrun", "wanted")]
    for key in ("variants", "samples", "layers", "tokens"):
        assert evaluated[0][key] == evaluated[1][key]
    report = (odd / "torchrun" / "report" / "report.html").read_text()
    assert "it stood still for the others" in report
    for layer in json.loads((odd / "torchrun" / "state" / "awq" / "layers.json").read_text()):
        assert len(layer["ranks"]) == 2
        for rank in layer["ranks"]:
            assert 0 <= rank["waited"] <= rank["seconds"]


@cpu_only
def test_a_signal_to_the_launcher_ends_all_in_order(odd: Path) -> None:
    command = [*MMQ, "run", str(odd / "recipe.yaml"), "--quiet", "--set", "work_dir=stopped", "--devices", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for_layer(odd / "stopped")
        ranks = ranks_of(process.pid)
        for rank in ranks.values():
            os.kill(rank, signal.SIGSTOP)
        status = subprocess.run(
            [*MMQ, "status", str(odd / "recipe.yaml"), "--set", "work_dir=stopped", "--json"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert len(json.loads(status.stdout)["running"]["ranks"]) == 2
        other = run(MMQ, odd, "stopped", "--devices", "2", code=2)
        for rank in ranks.values():
            os.kill(rank, signal.SIGCONT)
        assert re.match(rf"error: \S+ is in use by process {ranks[0]} ", other)
        assert len(other.splitlines()) == 1
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=LIMIT)
    assert process.returncode == 128 + signal.SIGTERM
    assert stderr.startswith("stopped: finished shards and layers are safe; go on with: mmq run ")
    assert "--devices 2" in stderr
    assert len(stderr.splitlines()) == 1
    assert not any(Path(f"/proc/{process}").exists() for process in ranks.values())


@cpu_only
def test_what_two_ranks_can_not_put_together_is_refused_once(odd: Path) -> None:
    observer = ["--devices", "2", "--set", "awq.kv_cache_scheme.observer=minmax"]
    stderr = run(MMQ, odd, "refused", *observer, code=2)
    assert "minmax follows the order of the samples, which 2 ranks share" in stderr
    assert len(stderr.splitlines()) == 1
    assert not (odd / "refused" / "awq").exists()


def test_more_ranks_than_experts_are_refused(odd: Path) -> None:
    workspace = Workspace.of(load(odd / "recipe.yaml"))
    workspace.team = Team(0, 12)
    (check,) = (check for check in STAGES["awq"].checks(workspace, set()) if check.name == "ranks")
    with pytest.raises(RecipeError, match="12 ranks can't share 11 experts a layer"):
        check.look(workspace)


def children_of(process: int) -> list[int]:
    """Those of all its threads, in the order in which they were started."""
    return sorted(
        int(child)
        for children in Path(f"/proc/{process}/task").glob("*/children")
        for child in children.read_text().split()
    )


def ranks_of(launcher: int) -> dict[int, int]:
    """Processes of a launcher's ranks, by rank."""
    found = {}
    for child in children_of(launcher):
        for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                found[int(entry.partition(b"=")[2])] = child
    return found


def wait_for_layer(work_dir: Path) -> None:
    """Until a layer is being worked on."""
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        holder = lock_holder(work_dir)
        if holder and holder.progress and holder.progress["unit"].startswith("layer-"):
            return
        time.sleep(0.05)
    raise AssertionError("no layer was begun")
