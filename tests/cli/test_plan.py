"""`mmq plan`: against what the stages plan, and the whole from config.json alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from conftest import edit_json, write_recipe
from families.test_sizes import M2_5, headers, synthetic
from mmq.cli.plan import plan
from mmq.families import sizes
from mmq.families.minimax_m2 import MINIMAX_M2 as ARCH
from mmq.families.sizes import GIB, tensors_of
from mmq.quantize.memory import Peaks, awq_memory
from mmq.recipe import load
from mmq.serve.memory import Gpus, weights_per_gpu
from mmq.source.samples import most_tokens
from mmq.source.synth import Sizes, model_config
from mmq.stages.base import BASE_MEMORY
from mmq.stages.pipeline import STAGES
from mmq.workdir.workspace import Workspace

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(plan)


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def planned(*arguments: object) -> dict[str, Any]:
    """The one object that --json prints."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    (line,) = result.stdout.splitlines()
    value: dict[str, Any] = json.loads(line)
    return value


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A recipe whose source is M2.5's config.json and nothing else."""
    (tmp_path / "source").mkdir()
    config = model_config(Sizes(62, 3072, 1536, 256, 8, 48, 8, 128, 200064))
    (tmp_path / "source/config.json").write_text(json.dumps(config), encoding="utf-8")
    recipe = write_recipe(tmp_path)
    text = recipe.read_text(encoding="utf-8").replace("samples: 12", "samples: 128")
    recipe.write_text(text.replace("sequence_length: 96", "sequence_length: 1024"), encoding="utf-8")
    return recipe


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_awq_stage_plans_the_same_memory(device: str, project: Path) -> None:
    """From the config, and from headers as the stage does it: they differ in a shard's header at most."""
    overrides = [f"awq.device={device}", "awq.source=fp8"]
    staged = STAGES["awq"].plan(Workspace.of(load(project / "recipe.yaml", overrides)))
    (own,) = planned(project / "recipe.yaml", "--set", overrides[0])["awq_memory"]
    header = 256 * len(headers(project / "source"))
    assert 0 <= staged.host_memory - own["host_memory"] <= header
    assert 0 <= staged.device_memory - own["device_memory"] <= header
    assert (own["device_memory"] > 0) == (device == "cuda")
    dims = synthetic(project)
    assert own["host_memory"] > BASE_MEMORY + sizes.layer_bytes(tensors_of(dims, ARCH, "bf16"), dims)


def test_awq_memory_by_hand() -> None:
    assert awq_memory(100, 10, 5, 10**9, True) == Peaks(100 + 10 + 70, 100 + 10 + 70 + 126)
    assert awq_memory(100, 10, 500, 100, True) == Peaks(7110, 100 + 20 + 9000 + 12)
    assert awq_memory(100, 10, 5, 7, False) == Peaks(100 + 10 + 70 + 7, 0)
    # A half of the layer, its shard and the fp32 sums; rows of half of the tokens, sent and arriving.
    assert awq_memory(100, 10, 6, 7, False, ranks=2, top_k=3) == Peaks(50 + 5 + 36 + 24 + 18 + 7, 0)
    assert awq_memory(100, 10, 5, 7, False, compensated=True) == Peaks(100 + 30 + 70 + 7, 0)
    assert awq_memory(100, 10, 5, 10**9, True, compensated=True) == Peaks(180, 100 + 30 + 70 + 210)


def test_calibration_tokens_are_counted_where_no_number_is_given(project: Path) -> None:
    assert most_tokens(load(project / "recipe.yaml")) == 12 * 96
    files = "awq.calibration.files=[{path: samples.jsonl}, {hub: a/b, samples: 5}, {path: missing.jsonl}]"
    assert most_tokens(load(project / "recipe.yaml", [files])) == (12 + 5) * 96


def test_the_whole_plan_from_config_alone(real: Path) -> None:
    value = planned(real, "--gpus", "4x48GiB")
    total = value["components"][-1]
    assert total["component"] == "total"
    for side in ("before", "after"):
        assert total[side]["bytes"] == sum(entry[side]["bytes"] for entry in value["components"][:-1])
    assert [f"{total[side]['bytes'] / 1e9:.0f}" for side in ("before", "after")] == ["230", "121"]
    folders = {Path(entry["folder"]).name: entry["bytes"] for entry in value["disk"]["folders"]}
    assert {name: f"{size / 1e9:.0f}" for name, size in folders.items()} == {
        "bf16": "457", "awq": "124", "state": "2", "hybrid": "121",
    }  # fmt: skip
    assert value["disk"]["total"] == sum(folders.values())
    assert folders["state"] == 2 * 128 * 1024 * 3072 * 2
    serving = value["serving"]
    assert (serving["gpus"], serving["gpu_memory"]) == (4, 48 * GIB)
    one, two, four = value["ranks"]
    assert [row["ranks"] for row in (one, two, four)] == [1, 2, 4]
    assert one["sent_per_layer"] == 0
    assert one["times_faster"] == {"NVLink": 1.0, "PCIe 4": 1.0}
    assert one["device_memory"] > two["device_memory"] > four["device_memory"]
    assert 1 < two["times_faster"]["NVLink"] < four["times_faster"]["NVLink"] < 4
    tokens = {(row["checkpoint"], row["cache"]): row["tokens"] for row in serving["rows"]}
    assert tokens == {("hybrid", "bf16"): 183_241, ("hybrid", "fp8"): 366_482, ("awq", "bf16"): 172_492}
    assert serving["warnings"] == []
    text = " ".join(serving["assumptions"])
    assert all(word in text for word in ("gpu_memory_utilization", "reserve", "366,482", "172,492", "160,000"))


def test_the_fp8_path_needs_no_bf16_folder(real: Path) -> None:
    value = planned(real, "--set", "awq.source=fp8")
    assert [entry["stage"] for entry in value["disk"]["folders"]] == ["awq", "awq", "restore"]
    assert "serving" not in value


def test_the_plan_for_people(real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = run(real, "--gpus", "8x48GiB", "--set", "awq.device=auto").stdout
    for part in ("224.7B", "2.7B", "0.6B", "0.05B", "228.7B", "457.5 GB", "cpu", "cuda", "8 x 48.0 GiB"):
        assert part in text
    assert "warning: vLLM would refuse: each of 8 GPUs gets 192 of an expert's 1536" in text


def test_weights_that_do_not_fit(real: Path) -> None:
    serving = planned(real, "--gpus", "2x48GiB")["serving"]
    assert [row["tokens"] for row in serving["rows"]] == [0, 0, 0]
    assert [warning.partition(":")[0] for warning in serving["warnings"]] == ["hybrid", "awq"]
    assert "are missing on each GPU" in serving["warnings"][0]


def test_a_cache_shorter_than_the_models_context(real: Path) -> None:
    edit_json(real.parent / "source/config.json", lambda config: config.update(max_position_embeddings=196_608))
    (warning,) = planned(real, "--gpus", "4x48GiB")["serving"]["warnings"]
    assert "196,608" in warning
    assert "hybrid with bf16" in warning
    assert "hybrid with fp8" not in warning


def test_utilization_and_reserve_count(real: Path) -> None:
    rows = planned(real, "--gpus", "4x48GiB", "--utilization", "0.95", "--reserve", "2GiB")["serving"]["rows"]
    more = int(48 * GIB * 0.95) - int(48 * GIB * 0.9) + 2 * GIB
    weights = weights_per_gpu(tensors_of(M2_5, ARCH, "hybrid"), M2_5, 4)
    assert rows[1]["tokens"] == (int(48 * GIB * 0.9) - 4 * GIB + more - weights) // 31_744


@pytest.mark.parametrize(
    ("text", "count", "memory"),
    [("4x48GiB", 4, 48 * GIB), ("1x80gb", 1, 80 * 10**9), (" 2 X 1.5 GiB ", 2, 3 * GIB // 2)],
)
def test_gpus_are_read(text: str, count: int, memory: int) -> None:
    assert Gpus.parse(text) == Gpus(count, memory)


@pytest.mark.parametrize(
    "text", ["", "4", "48GiB", "4x", "x48GiB", "4x48", "0x48GiB", "4x0GiB", "-4x48GiB", "4x-48GiB", "4x48TiB",
             "4*48GiB", "4x48GiB,2x24GiB", "1.5x48GiB", f"4x{'9' * 400}GiB", "9999999x48GiB", "x"]
)  # fmt: skip
def test_gpus_that_are_none(text: str, real: Path) -> None:
    assert "it must be a number and the memory of each, such as 4x48GiB" in refused(real, f"--gpus={text}")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--utilization", "0"], "--utilization is 0.0; it must be above 0 and at most 1"),
        (["--utilization", "nan"], "it must be above 0 and at most 1"),
        (["--utilization", "1.5"], "it must be above 0 and at most 1"),
        (["--reserve", "much"], "--reserve is 'much'; it must be a size such as 4GiB"),
        (["--reserve=-1GiB"], "it must be a size such as 4GiB"),
        (["--set", "awq.device=tpu"], "awq.device is 'tpu'"),
        (["--set", "model.source=nowhere"], "there is no folder"),
    ],
)
def test_other_bad_options(arguments: list[str], sentence: str, real: Path) -> None:
    assert sentence in refused(real, "--gpus", "4x48GiB", *arguments)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_key_value_heads": None}, "num_key_value_heads is None instead of a number from 1"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"hidden_size": 10**400}, "instead of a number from 1"),
        ({"head_dim": None, "hidden_size": 5}, "head_dim is 0"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quant_method is 'gptq'; mmq reads fp8, compressed-tensors",
        ),
        ({"quantization_config": ["fp8"]}, "quantization_config is ['fp8'] instead of an object"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            "weight_block_size is [64, 64]; only [128, 128] is supported",
        ),
        ({"model_type": "llama", "architectures": []}, "the model type 'llama' is not supported"),
        ({"intermediate_size": 200}, "200 input channels wide"),
    ],
)
def test_configs_that_can_not_be_planned(change: dict[str, Any], sentence: str, real: Path) -> None:
    edit_json(real.parent / "source/config.json", lambda config: config.update(change))
    assert sentence in refused(real)


def test_a_folder_without_config(real: Path) -> None:
    (real.parent / "source/config.json").unlink()
    assert "config.json is missing" in refused(real)


def test_of_a_hub_id_only_the_config_is_fetched(real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache where it is there, else from the hub."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[tuple[str, str, str | None, bool]] = []
    cached = [True]

    def download(name: str, file: str, revision: str | None = None, local_files_only: bool = False) -> str:
        asked.append((name, file, revision, local_files_only))
        if local_files_only and not cached:
            raise LocalEntryNotFoundError("not there")
        return str(real.parent / "source/config.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    arguments = (real, "--set", "model.source=some/model", "--set", "model.revision=v1")
    assert planned(*arguments)["source"] == "some/model"
    assert asked == [("some/model", "config.json", "v1", True)]
    cached.clear()
    assert planned(*arguments)["source"] == "some/model"
    assert [call[3] for call in asked] == [True, True, False]


def test_a_hub_id_that_is_not_there(real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "nor is its config.json found on the hub" in refused(real, "--set", "model.source=no-one/nothing")


def test_sizes_need_no_torch() -> None:
    code = "import sys, mmq.families.sizes, mmq.cli.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_is_touched(real: Path) -> None:
    before = sorted(real.parent.rglob("*"))
    run(real, "--gpus", "4x48GiB")
    assert sorted(real.parent.rglob("*")) == before
