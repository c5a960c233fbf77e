"""`mmq plan`: sizes from config.json against the model card, against real shards, and the KV cache by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from conftest import edit_json, write_recipe
from mmq.cli.plan import FORMS, parse_gpus, plan
from mmq.errors import CheckpointError
from mmq.families import sizes
from mmq.families.minimax_m2 import MINIMAX_M2 as ARCH
from mmq.families.sizes import GIB, Dimensions, Tensors, tensors_of
from mmq.quantize.memory import AwqMemory, awq_memory
from mmq.recipe import load
from mmq.run.workspace import Workspace
from mmq.serve import memory
from mmq.serve.memory import Gpus
from mmq.source.samples import most_tokens
from mmq.source.synth import Sizes, model_config
from mmq.stages.base import BASE_MEMORY
from mmq.stages.pipeline import STAGES

M2_5 = Dimensions.of(model_config(Sizes(62, 3072, 1536, 256, 8, 48, 8, 128, 200064)), ARCH)
A6000S = Gpus(4, 48 * GIB)
FOLDERS = {"source": "source", "bf16": "run/bf16", "awq": "run/awq", "hybrid": "run/hybrid"}
# The model card's breakdown, in billions; norms and biases are "below 0.01".
CARD = {"experts": "224.7", "attention": "2.7", "embeddings": "0.6", "head": "0.6", "router": "0.05"}

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


def headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Every tensor of a folder as the shards' headers have it: dtype, shape, bytes. Read by hand."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = (entry["dtype"], tuple(entry["shape"]), end - begin)
    return found


def expanded(tensors: list[Tensors], dims: Dimensions) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The same from the plan: one entry a tensor, numbers put into the names."""
    result = {}
    for tensor in tensors:
        experts = range(dims.experts) if "{expert}" in tensor.name else range(1)
        layers = range(dims.layers) if tensor.in_layer else range(1)
        names = {tensor.name.format(layer=layer, expert=expert) for layer in layers for expert in experts}
        assert len(names) == tensor.count
        result |= dict.fromkeys(names, (tensor.dtype, tensor.shape))
    return result


def synthetic(project: Path) -> Dimensions:
    return Dimensions.of(json.loads((project / "source/config.json").read_text(encoding="utf-8")), ARCH)


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


def test_the_model_cards_parameters() -> None:
    for form in FORMS:
        found = sizes.components(tensors_of(M2_5, ARCH, form))
        for component, billions in CARD.items():
            decimals = len(billions.partition(".")[2])
            assert f"{found[component].parameters / 1e9:.{decimals}f}" == billions
        assert 0 < found["norms and biases"].parameters < 0.01e9
        assert found["kv_scales"].parameters == 0
        assert 228.6e9 < sum(own.parameters for own in found.values()) < 229.5e9


def test_the_model_cards_dtypes() -> None:
    before, after = (sizes.components(tensors_of(M2_5, ARCH, form)) for form in ("source", "hybrid"))
    assert before["experts"].dtypes == before["attention"].dtypes == after["attention"].dtypes == ("F8_E4M3", "F32")
    assert after["experts"].dtypes == ("I32", "BF16", "I64")
    for component, dtypes in {"embeddings": ("BF16",), "head": ("BF16",), "router": ("F32",)}.items():
        assert before[component].dtypes == after[component].dtypes == dtypes
    assert after["norms and biases"].dtypes == ("BF16", "F32")


@pytest.mark.parametrize("form", FORMS)
def test_the_tensors_are_those_of_the_shards(form: sizes.Form, finished: Path) -> None:
    """Names, dtypes and shapes of a real run, and so the bytes of each component."""
    dims = synthetic(finished)
    tensors = tensors_of(dims, ARCH, form)
    found = headers(finished / FOLDERS[form])
    assert expanded(tensors, dims) == {name: (dtype, shape) for name, (dtype, shape, _) in found.items()}
    by_component = dict.fromkeys(sizes.COMPONENTS, 0)
    for name, (_, _, nbytes) in found.items():
        by_component[ARCH.component(name)] += nbytes
    assert {name: own.nbytes for name, own in sizes.components(tensors).items()} == by_component
    assert (by_component["kv_scales"] > 0) == (form in ("awq", "hybrid"))


@pytest.mark.parametrize("form", ["bf16", "awq", "hybrid"])
def test_disk_covers_headers_and_index_and_little_more(form: sizes.Form, finished: Path) -> None:
    tensors = tensors_of(synthetic(finished), ARCH, form)
    written = sum(path.stat().st_size for path in (finished / FOLDERS[form]).glob("model*"))
    raw = sum(tensor.nbytes for tensor in tensors)
    assert raw < written <= sizes.disk_bytes(tensors) <= raw + 256 * len(headers(finished / FOLDERS[form]))


def test_a_group_size_and_no_kv_scales_change_the_tensors(finished: Path) -> None:
    dims = synthetic(finished)
    coarse, fine = (sizes.components(tensors_of(dims, ARCH, "awq", group, False)) for group in (128, 64))
    assert coarse["kv_scales"].nbytes == 0
    assert fine["experts"].nbytes - coarse["experts"].nbytes == coarse["experts"].parameters // 128 * 2
    narrow = Dimensions.of(model_config(Sizes(intermediate=192)), ARCH)
    with pytest.raises(CheckpointError, match=r"192 input channels wide, not a multiple of awq\.group_size = 128"):
        tensors_of(narrow, ARCH, "awq")


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
    assert awq_memory(100, 10, 5, 10**9, True) == AwqMemory(100 + 10 + 70, 100 + 10 + 70 + 420)
    assert awq_memory(100, 10, 5, 7, False) == AwqMemory(100 + 10 + 70 + 7, 0)


def test_calibration_tokens_are_counted_where_no_number_is_given(project: Path) -> None:
    assert most_tokens(load(project / "recipe.yaml")) == 12 * 96
    files = "awq.calibration.files=[{path: samples.jsonl}, {hub: a/b, samples: 5}, {path: missing.jsonl}]"
    assert most_tokens(load(project / "recipe.yaml", [files])) == (12 + 5) * 96


def test_kv_bytes_by_hand() -> None:
    assert memory.kv_bytes_per_token(M2_5, 1, 2) == 62 * 2 * 8 * 128 * 2 == 253_952
    assert memory.kv_bytes_per_token(M2_5, 4, 2) == 63_488
    assert memory.kv_bytes_per_token(M2_5, 4, 1) == 31_744
    # With more GPUs than KV heads each holds one.
    assert memory.kv_bytes_per_token(M2_5, 16, 1) == memory.kv_bytes_per_token(M2_5, 8, 1) == 62 * 2 * 128


def test_kv_bytes_as_vllm_reports_them() -> None:
    """vLLM on M2.7, two GPUs, bf16: 196,608 tokens need 23.25 GiB on each (eugr/spark-vllm-docker issue 396)."""
    assert memory.kv_bytes_per_token(M2_5, 2, 2) * 196_608 == 23.25 * GIB


def test_weights_per_gpu_by_hand() -> None:
    tensors = tensors_of(M2_5, ARCH, "hybrid")
    nbytes = {name: own.nbytes for name, own in sizes.components(tensors).items()}
    replicated = nbytes["router"] + nbytes["norms and biases"] + nbytes["kv_scales"]
    split = sum(nbytes.values()) - replicated
    assert memory.weights_per_gpu(tensors, M2_5, 1) == sum(nbytes.values())
    assert memory.weights_per_gpu(tensors, M2_5, 4) == split // 4 + replicated
    # k and v of one head each: 128 rows of 3072 fp8 values and 24 block scales.
    key_value = 62 * 2 * 8 * (128 * 3072 + 24 * 4)
    assert memory.weights_per_gpu(tensors, M2_5, 16) == (split - key_value) // 16 + key_value // 8 + replicated


def test_the_model_cards_cache() -> None:
    """The one formula on 4 x 48 GiB: what it explains of the card's figures, and what its own text says."""

    def tokens(form: sizes.Form, itemsize: int) -> int:
        fit = memory.serving(tensors_of(M2_5, ARCH, form), M2_5, A6000S, 0.9, memory.DEFAULT_RESERVE, itemsize)
        weights = memory.weights_per_gpu(tensors_of(M2_5, ARCH, form), M2_5, 4)
        assert fit.tokens == (int(48 * GIB * 0.9) - weights - 4 * GIB) // (31_744 * itemsize)
        return fit.tokens

    fp8, bf16, attention_bf16 = tokens("hybrid", 1), tokens("hybrid", 2), tokens("awq", 2)
    assert fp8 == pytest.approx(370_000, rel=0.02)
    assert attention_bf16 == pytest.approx(160_000, rel=0.1)
    assert fp8 // 2 == bf16
    assert fp8 / attention_bf16 == pytest.approx(2.12, abs=0.005)
    for figure in (fp8, bf16, attention_bf16):
        assert f"{figure:,} tokens" in str(memory.__doc__)
    hybrid = memory.weights_per_gpu(tensors_of(M2_5, ARCH, "hybrid"), M2_5, 4)
    awq = memory.weights_per_gpu(tensors_of(M2_5, ARCH, "awq"), M2_5, 4)
    assert (48 * GIB * 0.9 - hybrid - 370_000 * 31_744) / GIB == pytest.approx(3.9, abs=0.01)
    assert (awq - hybrid) / GIB == pytest.approx(0.64, abs=0.005)
    assert (attention_bf16 - 160_000) * 63_488 / GIB == pytest.approx(0.74, abs=0.005)


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (1, []),
        (2, []),
        (4, []),
        (3, ["8 KV heads"]),
        (5, ["307.2 of an expert's", "48 query heads", "8 KV heads"]),
        (8, ["gets 192 of an expert's 1536 .* --enable-expert-parallel gives each GPU 32 whole experts"]),
    ],
)
def test_tensor_parallelism_that_vllm_refuses(gpus: int, expected: list[str]) -> None:
    problems = memory.parallel_problems(M2_5, gpus)
    assert len(problems) == len(expected)
    for problem, pattern in zip(problems, expected, strict=True):
        assert re.search(pattern, problem)


def test_rows_that_are_no_whole_blocks() -> None:
    dims = Dimensions.of(model_config(Sizes(hidden=320, intermediate=256, heads=2, kv_heads=2, head_dim=64)), ARCH)
    assert [problem.partition(",")[0] for problem in memory.parallel_problems(dims, 2)] == [
        "the hidden size 320 is not a multiple of 128",
        "each of 2 GPUs gets 64 rows of q",
        "each of 2 GPUs gets 64 rows of k and v",
    ]


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
    weights = memory.weights_per_gpu(tensors_of(M2_5, ARCH, "hybrid"), M2_5, 4)
    assert rows[1]["tokens"] == (int(48 * GIB * 0.9) - 4 * GIB + more - weights) // 31_744


@pytest.mark.parametrize(
    ("text", "count", "memory"),
    [("4x48GiB", 4, 48 * GIB), ("1x80gb", 1, 80 * 10**9), (" 2 X 1.5 GiB ", 2, 3 * GIB // 2)],
)
def test_gpus_are_read(text: str, count: int, memory: int) -> None:
    assert parse_gpus(text) == Gpus(count, memory)


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
        ({"quantization_config": None}, "does not describe a block-fp8 checkpoint"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, "must be [128, 128]"),
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


def test_head_dim_and_tied_embeddings() -> None:
    config = model_config(Sizes()) | {"head_dim": None, "tie_word_embeddings": True}
    dims = Dimensions.of(config, ARCH)
    assert dims.head_dim == 256 // 4
    assert sizes.components(tensors_of(dims, ARCH, "source"))["head"].nbytes == 0


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
