"""Fixtures: a tiny synthetic checkpoint, recipes for it, and the `mmq` command as a real process."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
# Small matrices: a second thread costs more than it brings, and busy threads of many processes slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LLM_COMPRESSOR_LOG_DISABLED", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Where the stages and the tensors of tests are: MMQ_TEST_DEVICE=cuda has them on a GPU.
DEVICE_NAME = os.environ.get("MMQ_TEST_DEVICE", "cpu")
# Read when Triton is first imported, by whatever library. With it, tests that ask for it run kernels on a CPU;
# mmq itself takes them on a GPU alone.
if DEVICE_NAME == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch  # noqa: E402

from mmq.machine.device import total_host  # noqa: E402
from mmq.recipe import load  # noqa: E402
from mmq.source import tokenizer  # noqa: E402
from mmq.source.chat_template import Chat, render  # noqa: E402
from mmq.source.synth import Sizes, write_checkpoint, write_samples  # noqa: E402
from mmq.stages.pipeline import run_stages  # noqa: E402
from mmq.tensors import dispatch  # noqa: E402
from mmq.workdir.workspace import Workspace  # noqa: E402

DEVICE = torch.device(DEVICE_NAME)
cpu_only = pytest.mark.skipif(DEVICE.type != "cpu", reason="says something of CPUs alone")
TINY = Sizes()
SAMPLES = 12
NEVER = 2**62
# Room for a worker and the processes that its tests start.
WORKER_MEMORY = 3 * 2**30
MOST_WORKERS = 8


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` is: one for each processor that may be used, as far as memory goes; none beside this process where
    they'd share a GPU, whose free memory stages plan with."""
    if DEVICE.type != "cpu":
        return 0
    room = (total_host() or WORKER_MEMORY) // WORKER_MEMORY
    return max(1, min(len(os.sched_getaffinity(0)), room, MOST_WORKERS))


def compile_from(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    """Functions compiled for CPUs are taken from so many numbers on, in all and in one matrix of a stack."""
    for threshold in ("COMPILED_FROM", "COMPILED_MATRIX"):
        monkeypatch.setattr(dispatch, threshold, numbers)


@pytest.fixture(scope="session", autouse=True)
def rendered_once() -> Iterator[None]:
    """The same chats are rendered once: the process that does it takes more than a second to begin, and hundreds of
    tests calibrate on the same few. Commands in processes of their own, and tests of `render`, have it done anew."""
    known: dict[str, list[str]] = {}

    def rendered(chats: list[Chat], special_tokens: dict[str, Any]) -> list[str]:
        asked = json.dumps([[(c.template, c.messages, c.tools) for c in chats], special_tokens], default=str)
        if asked not in known:
            known[asked] = render(chats, special_tokens)
        return list(known[asked])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "render", rendered)
        yield


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with an fp8 checkpoint in `source`, scales apart from weights, and `samples.jsonl`. Don't write."""
    folder = tmp_path_factory.mktemp("pristine")
    write_checkpoint(folder / "source", TINY, shards=4, shuffle=True)
    write_samples(folder / "samples.jsonl", SAMPLES)
    return folder


@pytest.fixture(scope="session")
def finished(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pristine project after all three stages, recipe in `recipe.yaml`. Don't write."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(pristine, folder, dirs_exist_ok=True)
    path = write_recipe(folder)
    run_stages(Workspace.of(load(path)), ["dequant", "awq", "restore"])
    return folder


@pytest.fixture
def project(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the pristine project with `recipe.yaml`, to do anything with."""
    folder = tmp_path / "project"
    shutil.copytree(pristine, folder)
    write_recipe(folder)
    return folder


@pytest.fixture
def finished_copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished project, to do anything with."""
    folder = tmp_path / "finished"
    shutil.copytree(finished, folder)
    return folder


def write_recipe(folder: Path, **awq: Any) -> Path:
    """Write `recipe.yaml` for the project in `folder`; keywords are fields of its awq section."""
    recipe = {
        "model": {"source": "source"},
        "work_dir": "run",
        "awq": {
            "calibration": {"files": [{"path": "samples.jsonl", "samples": SAMPLES}], "sequence_length": 96},
            "source": "bf16",
            "rounding": "nearest",
            "min_tokens": 64,
            "device": DEVICE_NAME,
        }
        | awq,
        "workers": 2,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.fixture
def mmq() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line as a user would: `mmq("awq", recipe, "--quiet")`."""

    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mmq", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)

    return run


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
