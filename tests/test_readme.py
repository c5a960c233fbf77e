"""Every command of the README, run: on the synthetic model where the README means the real one."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from conftest import ROOT
from mmq.cli.app import app

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """The lines of a text's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


# What the wheel alone is to do is done in tests/test_wheel.py.
(WHEEL,) = re.findall(r"^## From a wheel$.*?(?=^## )", TEXT, re.DOTALL | re.MULTILINE)
COMMANDS = commands(TEXT.replace(WHEEL, ""))
REAL_RECIPE = "configs/minimax-m2.5.yaml"


def test_the_readmes_scripts_are_there_and_parse() -> None:
    scripts = [command for command in COMMANDS if command.startswith("./scripts/")]
    assert {"./scripts/demo", "./scripts/test"} <= set(scripts)
    for script in scripts:
        path = ROOT / script.split()[0]
        assert os.access(path, os.X_OK)
        subprocess.run(["bash", "-n", path], check=True)
    assert "./scripts/test" in (ROOT / ".ci/run").read_text(encoding="utf-8")


@pytest.mark.skipif(not (ROOT / ".venv/bin/mmq").exists(), reason="the demo would install: run through ./scripts/test")
def test_the_demo_runs(tmp_path: Path) -> None:
    """In a copy of the project that shares the environment, so that the checkout's own runs/ stays."""
    copy = tmp_path / "project"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "*cache*", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=ignored)
    (copy / ".venv").symlink_to(ROOT / ".venv")
    (copy / "scripts/install").write_text("#!/bin/sh\n", encoding="utf-8")
    run = subprocess.run([copy / "scripts/demo"], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (copy / "runs/tiny/hybrid/model.safetensors.index.json").exists()
    assert str(copy / "runs/tiny/hybrid") in run.stdout


def test_the_readmes_mmq_commands_run_in_order(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real recipe with the synthetic source, a short sequence length, and nothing else changed."""
    recipe = yaml.safe_load((ROOT / REAL_RECIPE).read_text(encoding="utf-8"))
    recipe["model"]["source"] = "source"
    recipe["awq"]["calibration"]["sequence_length"] = 48
    shutil.copytree(pristine / "source", tmp_path / "source")
    shutil.copytree(pristine / "source", tmp_path / "MiniMaxAI/MiniMax-M2.1")
    (tmp_path / "configs").mkdir()
    (tmp_path / REAL_RECIPE).write_text(yaml.safe_dump(recipe), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    mine = [command for command in COMMANDS if command.startswith("mmq ")]
    assert len(mine) >= 8
    for command in mine:
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception}"
    for work_dir in ("runs/minimax-m2.5", "runs/minimax-m2.1"):
        assert (tmp_path / work_dir / "hybrid/config.json").exists()
        assert (tmp_path / work_dir / "verify.json").exists()
