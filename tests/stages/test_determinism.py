"""The same recipe gives the same bytes, on one thread and on two, whatever the source's shards and Python's hashes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.test_cli import refused, succeed
from conftest import TINY, digests, write_recipe
from mmq.recipe import load
from mmq.source.synth import Sizes, write_checkpoint, write_samples
from mmq.stages.pipeline import run_stages, stages_of
from mmq.workdir.workspace import Workspace

FOLDERS = ("bf16", "awq", "hybrid")
# torch shares tensors of 32768 elements or more out to threads: more tokens than that times the experts, or the
# hidden size, are needed for a second thread to do anything that could differ.
SIZES = Sizes(layers=1, experts=16, top_k=2)
SAMPLES = 20
LIMIT = 2**15


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with enough tokens and experts for two threads."""
    folder = tmp_path_factory.mktemp("wide")
    write_checkpoint(folder / "source", SIZES, shards=3)
    write_samples(folder / "samples.jsonl", SAMPLES)
    write_recipe(
        folder, n_grid=3, calibration={"files": [{"path": "samples.jsonl"}], "sequence_length": 160}, min_tokens=200
    )
    return folder


def run(project: Path, work_dir: str, threads: int, workers: int, hash_seed: int) -> list[dict[str, Any]]:
    """All stages in a process of its own; the statistics of its layers without times and memory."""
    options = ["--quiet", "--set", f"work_dir={work_dir}", "--set", f"workers={workers}"]
    subprocess.run(
        [sys.executable, "-m", "mmq", "run", project / "recipe.yaml", *options],
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": str(hash_seed)},
        check=True,
        timeout=300,
    )
    layers = json.loads((project / work_dir / "state/awq/layers.json").read_text(encoding="utf-8"))
    return [
        {key: value for key, value in layer.items() if key != "seconds" and not key.endswith("bytes")}
        for layer in layers
    ]


def test_threads_workers_and_hash_seeds_decide_nothing(wide: Path) -> None:
    one = run(wide, "one", threads=1, workers=1, hash_seed=1)
    two = run(wide, "two", threads=2, workers=3, hash_seed=2)
    for folder in FOLDERS:
        found = [digests(wide / work_dir / folder) for work_dir in ("one", "two")]
        for files in found:
            # The model card tells of the run's times.
            files.pop("README.md", None)
        assert found[0] == found[1], folder
    # Losses to the last bit: an ulp of theirs can choose another point of the grid.
    assert one == two
    tokens = sum(one[0]["tokens_per_expert"]) // SIZES.top_k
    assert tokens * SIZES.experts > LIMIT and tokens // 8 * SIZES.hidden > LIMIT


def test_the_same_run_twice_is_the_same(project: Path, finished: Path) -> None:
    run_stages(Workspace.of(load(project / "recipe.yaml")), ["dequant", "awq", "restore"])
    for folder in FOLDERS:
        assert digests(project / "run" / folder) == digests(finished / "run" / folder), folder


@pytest.mark.parametrize("source", ["bf16", "fp8"])
def test_the_sources_shards_decide_nothing(tmp_path: Path, finished: Path, source: str) -> None:
    """The fixture's tensors are shuffled over four shards; here they lie in order in two."""
    write_checkpoint(tmp_path / "source", TINY, shards=2)
    samples = (finished / "samples.jsonl").read_bytes()
    (tmp_path / "samples.jsonl").write_bytes(samples)
    recipe = load(write_recipe(tmp_path, source=source))
    run_stages(Workspace.of(recipe), stages_of(recipe))
    for folder in ("awq", "hybrid"):
        assert digests(tmp_path / "run" / folder) == digests(finished / "run" / folder), folder


def test_the_seed_is_in_the_journal_and_is_not_changed_halfway(finished_copy: Path) -> None:
    recipe, journal = finished_copy / "recipe.yaml", finished_copy / "run/journal.json"
    assert json.loads(journal.read_text(encoding="utf-8"))["stages"]["awq"]["fingerprint"]["seed"] == 0
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    recipe.write_text(yaml.safe_dump(content | {"seed": 7}), encoding="utf-8")
    before = digests(finished_copy / "run")
    message = refused("awq", recipe)
    assert "awq was begun with seed = 0, now it is 7" in message
    assert digests(finished_copy / "run").items() >= {k: v for k, v in before.items() if k != "lock"}.items()
    succeed("awq", recipe, "--quiet", "--restart")
    assert json.loads(journal.read_text(encoding="utf-8"))["stages"]["awq"]["fingerprint"]["seed"] == 7
