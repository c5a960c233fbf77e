"""Serving clients in processes of their own: scripts/test-serving says where vLLM is; without it nothing is collected.

The tests run in the ordinary environment, the clients in the one of vLLM, whose transformers and compressed-tensors
are of other versions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SERVING_PYTHON = os.environ.get("MMQ_SERVING_PYTHON", "")
collect_ignore_glob = [] if SERVING_PYTHON else ["test_*.py"]

# What `synth` and `run` are called with in scripts/demo.
SYNTH = ["--layers", "3", "--experts", "16", "--shuffle"]
FORMS = ["dynamic", "none"]
EXPERT_TARGETS = {"dynamic": "both", "none": "hub"}
ALL_PATCHES = ["minimax_routing", "kernels_without_amx", "weight_only_linear"]

Result = dict[str, Any]


class ClientError(Exception):
    """A client ended with an error; its message is what the client wrote."""


@pytest.fixture(scope="session")
def hybrids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo's hybrid checkpoint by the form of its config.json: "dynamic" activations, as by default, and "none"
    (weight-only), which names the experts as the hub does alone: readers of today make the same of both."""
    folder = tmp_path_factory.mktemp("demo")
    mmq_run("synth", folder / "source", *SYNTH)
    found = {}
    for form in FORMS:
        settings = [f"model.source={folder / 'source'}", f"work_dir={folder / form}", "awq.source=fp8"]
        settings += [f"restore.attention_activations={form}", f"restore.expert_targets={EXPERT_TARGETS[form]}"]
        mmq_run("run", ROOT / "configs/tiny.yaml", *(part for setting in settings for part in ("--set", setting)))
        found[form] = folder / form / "hybrid"
    return found


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Held-out text, code and prose: 173 to 679 tokens of the tiny tokenizer each."""
    lines = (ROOT / "calibration_data/eval.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"][-1]["content"][:250] for line in lines[::4]]


def run_client(
    python: str, script: str, folder: Path, job: dict[str, Any], environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """The result of a client. Raises ClientError with its output."""
    (folder / "job.json").write_text(json.dumps(job))
    command = [python, str(HERE / script), str(folder / "job.json"), str(folder / "result.json")]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=1800, check=False, env=os.environ | (environment or {})
    )
    (folder / "log").write_text(run.stdout + run.stderr)
    if run.returncode:
        raise ClientError(run.stdout + run.stderr)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


Serve = Callable[..., Result]


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Serve:
    """Load a checkpoint in vLLM, complete the texts, and say what vLLM holds; ClientError where vLLM fails."""

    def run(
        model: Path, patches: list[str] = ALL_PATCHES, plain_experts: bool = False, plugin: bool = True, **engine: Any
    ) -> Result:
        """Serve.

        Args:
            patches: of harness.PATCHES.
            plain_experts: the int4 experts are computed without the CPU kernel's int8 activations.
            plugin: mmq's plugin is loaded, as it is where mmq is installed beside vLLM.
            engine: arguments of vllm.LLM.
        """
        folder = tmp_path_factory.mktemp("vllm")
        job = {
            "model": str(model),
            "prompts": texts,
            "patches": patches,
            "plain_experts": plain_experts,
            "engine": engine,
            "loaded": str(folder / "loaded.safetensors"),
            "max_tokens": 16,
        }
        # vLLM loads all installed plugins, unless this variable names those to load.
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | ({} if plugin else {"VLLM_PLUGINS": ""})
        result = run_client(SERVING_PYTHON, "vllm_client.py", folder, job, environment)
        return result | {"tensors": load_file(folder / "loaded.safetensors")}

    return run


def mmq_run(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "mmq", *map(str, arguments), "--quiet"], check=True)
