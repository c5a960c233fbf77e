"""What an evaluation is foretold to take of memory: by hand, beside what a process took, refused before the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mmq.prove.evaluate
import mmq.stages.base
from cli.test_cli import refused
from conftest import TINY, cpu_only
from mmq.prove.memory import eval_memory
from mmq.quantize.memory import Peaks
from mmq.stages.base import BASE_MEMORY

# What a process holds after an evaluation for which libraries and kernels were loaded, and the peak of a larger one.
MEASURE = """
import sys
from pathlib import Path
from mmq.api import evaluate

def status(field):
    return int(Path("/proc/self/status").read_text().partition(field + ":")[2].split()[0]) * 1024

evaluate(sys.argv[1], sys.argv[2], 1, 64)
print(status("VmRSS"))
evaluate(sys.argv[1], sys.argv[2], None, 1024, restart=True)
print(status("VmHWM"))
"""


def test_by_hand() -> None:
    # 3 streams of 5 x 10 numbers before and after a layer of 1000 bytes; 2 experts a token.
    assert eval_memory(1000, 5, 10, 7, 2, 3, 10**9, False) == Peaks(600 + 1000 + 600 + 1600, 0)
    assert eval_memory(2000, 5, 10, 7, 2, 3, 10**9, False) == Peaks(600 + 2000 + 600 + 3 * 200 + 2000, 0)
    assert eval_memory(2000, 5, 10, 7, 2, 3, 4000, True) == Peaks(300, 600 + 2000 + 600 + 2000)
    # Half a layer and half the routed rows to each of two ranks, as many more that arrive, and all tokens' outputs.
    two = eval_memory(4000, 5, 10, 7, 2, 3, 10**9, True, ranks=2)
    assert two.device == 600 + 2000 + 600 + (300 + 2000) + 100 + 100
    # A head of 10**6 rows: logits of 33 tokens at a time; of all tokens where it has fewer.
    assert eval_memory(0, 50, 10, 10**6, 2, 3, 0, False).host == 3000 + 8 * 10**7 + 33 * (24 * 10**6 + 60)
    assert eval_memory(0, 50, 10, 10**4, 2, 1, 0, False).host == 1000 + 8 * 10**5 + 50 * (24 * 10**4 + 60)


@cpu_only
def test_beside_what_a_process_takes(finished_copy: Path) -> None:
    """8 thousand tokens of a tiny model: no more than foretold, and not far less."""
    held_out = finished_copy / "held-out.jsonl"
    text = " ".join(f"word {number}" for number in range(400))
    held_out.write_text("\n".join(json.dumps({"text": text}) for _ in range(8)), encoding="utf-8")
    command = [sys.executable, "-c", MEASURE, str(finished_copy / "recipe.yaml"), str(held_out)]
    # The C library gives back what is freed, as it does where tensors are large.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    process = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    before, peak = map(int, process.stdout.splitlines()[-2:])
    layer = 2 * 3 * TINY.experts * TINY.hidden * TINY.intermediate
    foretold = eval_memory(layer, 8 * 1024, TINY.hidden, TINY.vocabulary, TINY.top_k, 4, 2**32, False).host
    said = f"{peak / 2**20:.0f} after {before / 2**20:.0f}, foretold {foretold / 2**20:.0f} MiB"
    assert peak < BASE_MEMORY + foretold and peak - before > foretold / 2, said


@pytest.mark.parametrize("options", [[], ["--by-layer"], ["--dry-run"]])
def test_too_little_is_refused_before_the_work(
    finished_copy: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmq.stages.base, "total_host", lambda: 800 * 2**20)
    monkeypatch.setattr(mmq.prove.evaluate, "read_layer", lambda *_, **__: pytest.fail("work was begun"))
    said = refused("eval", finished_copy / "recipe.yaml", *options)
    assert said.startswith("eval needs 8") and "of memory at least, this machine has 838.9 MB; fewer or shorter" in said
    assert said.endswith("samples (--samples, --sequence-length) need less")


def test_memory_that_ends_in_the_midst_is_one_sentence(finished_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another process takes a GPU's memory; what was finished stays finished."""
    read: Callable[..., Any] = mmq.prove.evaluate.read_layer

    def short(weights: Any, arch: Any, layer: int, *rest: Any) -> Any:
        if layer:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")
        return read(weights, arch, layer, *rest)

    monkeypatch.setattr(mmq.prove.evaluate, "read_layer", short)
    said = refused("eval", finished_copy / "recipe.yaml", "--sequence-length", 8)
    assert said.startswith("cpu has too little memory left for eval; fewer or shorter samples (--samples, ")
    assert said.endswith("need less: CUDA out of memory. Tried to allocate 2.00 GiB")
    units = json.loads((finished_copy / "run/journal.json").read_text(encoding="utf-8"))["stages"]["eval"]["units"]
    assert list(units) == ["layer-00000"]
