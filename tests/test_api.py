"""The public API: light to import, and the same work as the commands'."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mmq
from conftest import ROOT, digests
from mmq.serve.memory import DEFAULT_RESERVE, DEFAULT_UTILIZATION, Gpus


def test_importing_mmq_imports_nothing_heavy() -> None:
    code = "import sys, mmq; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'mmq'" in found
    for heavy in ("torch", "transformers", "pydantic", "yaml", "numpy", "rich", "typer"):
        assert f"'{heavy}'" not in found


def test_loading_and_asking_need_no_torch(tmp_path: Path) -> None:
    """A recipe is looked at in no time; torch comes with the work."""
    code = "import sys, mmq; mmq.load_recipe('builtin:tiny', {'awq.n_grid': '5'}); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert found.stdout == "False\n"


def test_the_names_are_there_whatever_was_imported_before() -> None:
    """A package or module of mmq must not take a name's place."""
    kinds = "[name for name in mmq.__all__ if type(getattr(mmq, name)).__name__ == 'module']"
    code = f"import mmq.cli.app, mmq; print({kinds})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == "[]\n"
    assert set(mmq.__all__) <= set(dir(mmq))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = mmq.nonsense


def test_a_run_by_python_is_the_commands_run(project: Path, finished: Path) -> None:
    seen: list[mmq.Progress] = []
    recipe = mmq.load_recipe(project / "recipe.yaml")
    made = mmq.run(recipe, on_progress=seen.append, gpus="1x24GiB")
    for stage in ("bf16", "awq", "hybrid"):
        mine, theirs = digests(project / "run" / stage), digests(finished / "run" / stage)
        mine.pop("README.md", None)
        assert mine == theirs
    assert made.verified
    assert made.folder == project / "run/hybrid"
    assert made.bytes_after < made.bytes_before
    assert made.loss is not None
    assert 0 < made.loss < 1
    assert made.gpus == Gpus(1, 24 * 2**30)
    plan = mmq.plan(recipe, "1x24GiB")
    tokens = {(row["checkpoint"], row["cache"]): row["tokens"] for row in plan["serving"]["rows"]}
    assert made.kv_tokens == tokens["hybrid", "fp8"]
    assert made.serve.startswith(f"vllm serve {made.folder} --tensor-parallel-size 1 ")
    assert [progress.stage for progress in seen if progress.percent == 100.0 and progress.unit == ""] == [
        "dequant", "awq", "restore", "verify",
    ]  # fmt: skip
    # Again: nothing is left to do but to verify, and the summary is the same.
    seen.clear()
    assert mmq.run(project / "recipe.yaml", on_progress=seen.append, gpus="1x24GiB") == made
    assert {progress.stage for progress in seen} == {"verify"}
    seen.clear()
    assert mmq.verify(recipe, on_progress=seen.append).problems == []
    assert (seen[-1].done, seen[-1].percent) == (seen[-1].units, 100.0)
    assert mmq.status(recipe)["next"] is None
    report = mmq.evaluate(recipe, project / "samples.jsonl", samples=2)
    assert {variant["variant"] for variant in report["variants"]} >= {"source", "hybrid"}


def test_what_goes_wrong_is_raised(project: Path) -> None:
    with pytest.raises(mmq.MmqError, match="there is no recipe"):
        mmq.load_recipe(project / "missing.yaml")
    with pytest.raises(mmq.MmqError, match=r"unknown key awq\.grid"):
        mmq.load_recipe(project / "recipe.yaml", ["awq.grid=3"])
    with pytest.raises(mmq.MmqError, match="such as 4x48GiB"):
        mmq.run(project / "recipe.yaml", gpus="many")
    with pytest.raises(mmq.MmqError, match="mmq restore"):
        mmq.verify(project / "recipe.yaml")
    assert not (project / "run").exists()


def test_the_documented_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/python.md from its first line to its last, as one would type it into a notebook."""
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    cells = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(cells) >= 4
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in cells:
        exec(compile(cell, "docs/python.md", "exec"), names)
    made = names["made"]
    assert (tmp_path / "runs/tiny/hybrid/config.json").exists()
    assert getattr(made, "verified") is True  # noqa: B009
    assert set(mmq.__all__) - {"MmqError", "Progress", "Recipe"} <= {*re.findall(r"mmq\.(\w+)\(", text)}


def test_the_gpus_of_a_summary_decide_the_command(finished_copy: Path) -> None:
    """More GPUs than an expert's parts of 128 channels: whole experts, and why vLLM would refuse."""
    recipe = mmq.load_recipe(finished_copy / "recipe.yaml")
    made = mmq.run(recipe, gpus="2x48GiB")
    assert "--enable-expert-parallel" in made.serve
    assert any("128" in warning for warning in made.warnings)
    (row,) = (row for row in mmq.plan(recipe, "1x48GiB")["serving"]["rows"] if row["cache"] == "fp8")
    # The cache that is left holds a hundred tokens, far less than the model's positions.
    needed = DEFAULT_RESERVE + row["weights_per_gpu"] + 100 * row["bytes_per_token_per_gpu"]
    tight = mmq.run(recipe, gpus=Gpus(1, math.ceil(needed / DEFAULT_UTILIZATION)))
    assert tight.kv_tokens == 100
    assert tight.serve.endswith("--max-model-len 100")
    small = mmq.run(recipe, gpus="1x4GiB")
    assert (small.kv_tokens, "does not fit" in small.warnings[-1]) == (0, True)
