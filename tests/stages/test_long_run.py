"""Two hundred layers through the whole pipeline and the evaluation: memory, files and threads stay where they are."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import write_recipe
from mmq.source.synth import Sizes, write_checkpoint, write_samples

LAYERS = 200
DEEP = Sizes(LAYERS, hidden=128, intermediate=128, experts=4, heads=2, kv_heads=1, head_dim=64, vocabulary=400)
# What the experts of a layer take in bf16, the least that a forgotten layer would keep.
LAYER_BYTES = 2 * DEEP.experts * 3 * DEEP.hidden * DEEP.intermediate
# Bytes a layer that the process may grow by in the long run: a tenth of a layer kept after each is more.
SLACK = LAYER_BYTES // 15
# And over all, for what comes once, such as another arena of the C library: less than half of a layer after each.
STEPS = 24 * 2**20
LAG = 40

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's account of a process")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the deep model."""
    folder = tmp_path_factory.mktemp("deep")
    write_checkpoint(folder / "source", DEEP, shards=8)
    write_samples(folder / "samples.jsonl", 4)
    calibration = {"files": [{"path": "samples.jsonl", "samples": 4}], "sequence_length": 32}
    write_recipe(folder, source="fp8", n_grid=3, min_tokens=0, calibration=calibration)
    return folder


def watched(*arguments: object) -> dict[str, list[dict[str, int]]]:
    """What a command's process takes whenever it says that a unit is done: stage -> one account a unit.

    torch and oneDNN keep up to 1024 kernels each, by the shapes that they were made for; with 16 the process is full
    grown after a few layers, and what the layers themselves leave behind shows.
    """
    environment = os.environ | {"LRU_CACHE_CAPACITY": "16", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
    command = [sys.executable, "-m", "mmq", *map(str, arguments), "--json"]
    found: dict[str, list[dict[str, int]]] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        proc = Path(f"/proc/{process.pid}")
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "unit":
                status = dict(row.split(":", 1) for row in (proc / "status").read_text().splitlines())
                account = {"files": len(list((proc / "fd").iterdir())), "threads": int(status["Threads"])}
                account["memory"] = int(status["VmRSS"].split()[0]) * 1024
                found.setdefault(event["stage"], []).append(account)
    assert process.returncode == 0
    return found


def growth(values: list[int]) -> float:
    """Growth a layer from layer 50 on: the median over pairs of layers, which single steps don't move."""
    return statistics.median((values[i + LAG] - values[i]) / LAG for i in range(50, LAYERS - LAG))


def assert_flat(values: list[int]) -> None:
    """Memory in bytes after each layer."""
    assert growth(values) < SLACK, values[::10]
    assert statistics.median(values[150:]) - statistics.median(values[50:100]) < STEPS, values[::10]


def assert_constant(values: list[int]) -> None:
    """Numbers of files or threads; a few come and go, one kept after each layer would be a hundred."""
    assert abs(statistics.median(values[50:100]) - statistics.median(values[150:])) <= 2, values
    assert max(values) <= statistics.median(values) + 6


def test_nothing_grows_with_the_layers(deep: Path) -> None:
    recipe = deep / "recipe.yaml"
    stages = watched("run", recipe) | watched("eval", recipe, "--data", deep / "samples.jsonl")
    assert list(stages) == ["awq", "restore", "verify", "eval"]
    for accounts in stages.values():
        assert len(accounts) == LAYERS + 1
        assert_flat([account["memory"] for account in accounts])
        for field in ("files", "threads"):
            assert_constant([account[field] for account in accounts])

    layers = json.loads((deep / "run" / "state" / "awq" / "layers.json").read_text(encoding="utf-8"))
    assert len(layers) == LAYERS
    assert_flat([layer["host_bytes"] for layer in layers])
    assert_constant([layer["open_files"] for layer in layers])
    for layer, account in zip(layers, stages["awq"], strict=False):
        assert 0.5 * account["memory"] < layer["host_bytes"] <= layer["peak_host_bytes"]
        assert 3 <= layer["open_files"] < 100
