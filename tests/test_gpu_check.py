"""scripts/gpu_check.py from end to end at toy sizes on a CPU, so that it is ready for a GPU, and scripts/gpu_wheels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, cpu_only
from gpu_check import PARTS, table
from gpu_operations import compared

SCRIPT = ROOT / "scripts/gpu_check.py"


def check(*options: object, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, "--device", "cpu", "--small", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@cpu_only
def test_every_part_runs(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    done = check("--out", out)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, "\n".join(lines[:20]) + done.stderr[-2000:]
    assert lines[0] == "nothing failed"
    assert len(lines) <= 61 and max(map(len, lines)) <= 190
    facts = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [entry["part"] for entry in facts if entry.get("end")] == list(PARTS)
    # Each part says more than that it ended.
    assert {entry["part"] for entry in facts if not entry.get("end")} == set(PARTS)
    (killed,) = (entry for entry in facts if entry.get("run") == "killed")
    assert killed["same_bytes"]


def test_what_there_is_no_time_for_is_said(tmp_path: Path) -> None:
    """A part that outlasts the time is killed, and all that it wrote before is kept."""
    done = check("--seconds", 1, "--out", tmp_path / "results.jsonl", "--parts", "ceilings,kernels")
    assert done.returncode == 1
    assert "FAILED kernels: error=not run: no time was left" in done.stdout
    facts = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {entry["part"] for entry in facts} == {"ceilings", "kernels"}


def test_a_part_that_is_not_there_is_refused() -> None:
    done = check("--parts", "ceilings,tides")
    assert done.returncode == 2 and "there is no part tides" in done.stderr


def test_a_difference_is_seen() -> None:
    torch = pytest.importorskip("torch")
    numbers = torch.tensor([1.0, -2.0, float("nan"), float("inf")])
    other = numbers.clone()
    assert compared(other, numbers, 0.0) == {"differing": 0, "ok": True}
    other[1] = torch.nextafter(other[1], torch.tensor(0.0))
    assert compared(other, numbers, 0.0) == {"differing": 1, "ok": False}
    assert compared(other, numbers, 1e-6)["ok"] and not compared(other, numbers, 1e-9)["ok"]
    other[3] = 5.0
    assert not compared(other, numbers, 1e-6)["ok"]
    # A share may be others.
    many = torch.arange(100.0)
    other = many.clone()
    other[7] += 1
    assert compared(other, many, 0.0, 0.01)["ok"] and not compared(other, many, 0.0, 0.009)["ok"]


def test_the_table_has_failures_first_and_an_end() -> None:
    facts = [{"part": "speed", "operation": f"{number:0100}", "ms": 1.0} for number in range(100)]
    lines = table([*facts, {"part": "tiny", "ok": False, "error": "x" * 1000}])
    assert lines[0] == "1 of 101 lines failed" and lines[1].startswith("FAILED tiny")
    assert len(lines) == 60 and max(map(len, lines)) < 400
    # Short ones share lines, and none is lost.
    facts = [{"part": part, "operation": number} for part in ("speed", "search") for number in range(40)]
    lines = table(facts)
    assert len(lines) < 20 and max(map(len, lines)) <= 190
    assert sum(line.count("operation=") for line in lines) == 80
    assert sum(line.startswith("search: operation=0 |") for line in lines) == 1


def wheels(*options: object) -> list[str]:
    command = [sys.executable, ROOT / "scripts/gpu_wheels", "unused", "--list", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [line.partition("==")[0] for line in done.stdout.split()]


def test_wheels_are_those_that_the_other_machine_lacks(tmp_path: Path) -> None:
    everything = wheels()
    assert {"llmcompressor", "compressed-tensors", "pydantic-core", "numba", "transformers"} <= set(everything)
    assert not {"torch", "triton", "sympy", "mmq"} & set(everything)
    have = tmp_path / "freeze.txt"
    names = [name for name in everything if not name.startswith(("llmcompressor", "pydantic"))]
    have.write_text("torch\n# a comment\n" + "\n".join(names), encoding="utf-8")
    missing = wheels("--have", have)
    assert {"llmcompressor", "pydantic", "pydantic-core"} <= set(missing) and "numba" not in missing
    # One that is too old for what needs it counts as missing; others may be of any version.
    have.write_text(have.read_text(encoding="utf-8") + "\nCompressed_Tensors==0.1\nnumba==0.61.0\n", encoding="utf-8")
    assert set(wheels("--have", have)) == set(missing) | {"compressed-tensors"}
