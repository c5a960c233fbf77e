"""Bad input: each kind ends with exit code 2 and a sentence that names what is wrong, and leaves nothing half-made."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cli.test_cli import cli, refused, succeed
from conftest import SAMPLES, digests, edit_json, write_recipe
from mmq.source.synth import Sizes, write_checkpoint
from storage.test_storage import INDEX, edit_tensors, put, truncate

EXPERT = "model.layers.1.block_sparse_moe.experts.3."
Change = Callable[[Path], Any]


def half_made(project: Path) -> set[str]:
    """Files in the work_dir that are neither journal nor lock."""
    return digests(project / "run").keys() - {"journal.json", "lock"} if (project / "run").exists() else set()


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """A change of the source's tensors."""
    return lambda project: edit_tensors(project / "source", change)


def tensor(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Replace a tensor of the source by a function of it."""
    return tensors(lambda all_: all_.update({name: function(all_[name])}))


def config(**values: Any) -> Change:
    """Set keys of the source's config.json; None removes one."""

    def change(content: dict[str, Any]) -> None:
        content.update(values)
        for key in [key for key, value in values.items() if value is None]:
            del content[key]

    return lambda project: edit_json(project / "source" / "config.json", change)


def quantization(**values: Any) -> Change:
    """Set keys of the source's quantization_config."""
    return lambda project: edit_json(
        project / "source" / "config.json", lambda content: content["quantization_config"].update(values)
    )


def on_source(change: Callable[[Path], Any]) -> Change:
    """A change of the source's folder."""
    return lambda project: change(project / "source")


def poison(at: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Put one value into a tensor."""

    def change(original: torch.Tensor) -> torch.Tensor:
        result = original.clone()
        result.view(-1)[at] = value
        return result

    return change


def nan_code(weight: torch.Tensor) -> torch.Tensor:
    """Make one fp8 code the NaN 0xff."""
    raw = weight.view(torch.uint8).clone()
    raw[5, 7] = 0xFF
    return raw.view(torch.float8_e4m3fn)


def all_bf16(all_: dict[str, torch.Tensor]) -> None:
    """An unquantized checkpoint."""
    for name in [name for name in all_ if name.endswith("_scale_inv")]:
        del all_[name]
    for name, value in all_.items():
        all_[name] = value.to(torch.bfloat16)


def set_text(name: str, text: str) -> Change:
    """Write a file of the source."""
    return on_source(lambda source: (source / name).write_text(text, encoding="utf-8"))


SHARD = "model-00002-of-00004.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
SOURCES: dict[str, tuple[Change, str]] = {
    "no source": (on_source(shutil.rmtree), "source"),
    "missing shard": (on_source(lambda s: (s / SHARD).unlink()), f"{SHARD} is missing"),
    "truncated shard": (on_source(lambda s: truncate(s / SHARD, 1000)), SHARD),
    "empty shard": (on_source(lambda s: os.truncate(s / SHARD, 0)), SHARD),
    "index leads out": (on_source(put(Q_PROJ, "../x.safetensors")), f"{Q_PROJ} in '../x.safetensors'"),
    "index is garbage": (set_text(INDEX, "garbage"), INDEX),
    "pickled weights": (on_source(put(Q_PROJ, "pytorch_model.bin")), "pytorch_model.bin"),
    "missing scale": (tensors(lambda all_: all_.pop(f"{Q_PROJ}_scale_inv")), f"{Q_PROJ}_scale_inv is missing"),
    "orphan scale": (
        tensors(lambda all_: all_.update({f"{EXPERT}w9.weight_scale_inv": torch.ones(1, 1)})),
        f"{EXPERT}w9.weight_scale_inv belongs to no fp8 weight",
    ),
    "scale of another shape": (
        tensor(f"{EXPERT}w1.weight_scale_inv", lambda scale: torch.ones(2, 2)),
        f"{EXPERT}w1.weight_scale_inv is F32 [2, 2]",
    ),
    "transposed scale": (
        tensor(f"{EXPERT}w1.weight_scale_inv", lambda scale: scale.T.contiguous()),
        f"{EXPERT}w1.weight_scale_inv is F32 [2, 1]",
    ),
    "scale of another dtype": (
        tensor(f"{EXPERT}w1.weight_scale_inv", lambda scale: scale.double()),
        f"{EXPERT}w1.weight_scale_inv is F64",
    ),
    "fp8 router": (
        tensors(
            lambda all_: all_.update(
                {
                    "model.layers.0.block_sparse_moe.gate.weight": torch.zeros(8, 256).to(torch.float8_e4m3fn),
                    "model.layers.0.block_sparse_moe.gate.weight_scale_inv": torch.ones(1, 2),
                }
            )
        ),
        "model.layers.0.block_sparse_moe.gate.weight is fp8",
    ),
    "e5m2": (
        tensor("model.norm.weight", lambda norm: norm.to(torch.float8_e5m2)),
        "model.norm.weight is e5m2",
    ),
    "blocks of 64": (quantization(weight_block_size=[64, 64]), "weight_block_size is [64, 64]"),
    "no blocks": (quantization(weight_block_size=None), "weight_block_size is None"),
    "another method": (quantization(quant_method="gptq"), "quant_method"),
    "another fp8": (quantization(fmt="float8_e5m2"), "float8_e5m2"),
    "no quantization_config": (config(quantization_config=None), "quantization_config"),
    "bf16 source": (tensors(all_bf16), "instead of fp8"),
    "one bf16 expert": (
        tensors(
            lambda all_: all_.update(
                {f"{EXPERT}w2.weight": all_[f"{EXPERT}w2.weight"].to(torch.bfloat16)}
            )
            or all_.pop(f"{EXPERT}w2.weight_scale_inv")
        ),
        f"{EXPERT}w2.weight is BF16 instead of fp8",
    ),
    "missing expert": (
        tensors(lambda all_: [all_.pop(f"{EXPERT}w2.weight"), all_.pop(f"{EXPERT}w2.weight_scale_inv")]),
        f"{EXPERT}w2.weight is missing",
    ),
    "missing router": (
        tensors(lambda all_: all_.pop("model.layers.1.block_sparse_moe.gate.weight")),
        "model.layers.1.block_sparse_moe.gate.weight is missing",
    ),
    "missing embeddings": (
        tensors(lambda all_: all_.pop("model.embed_tokens.weight")),
        "model.embed_tokens.weight",
    ),
    "expert of another shape": (
        tensors(
            lambda all_: all_.update(
                {
                    f"{EXPERT}w1.weight": torch.zeros(256, 256).to(torch.float8_e4m3fn),
                    f"{EXPERT}w1.weight_scale_inv": torch.ones(2, 2),
                }
            )
        ),
        f"{EXPERT}w1.weight",
    ),
    "router of another shape": (
        tensor("model.layers.1.block_sparse_moe.gate.weight", lambda router: router[:, :128]),
        "model.layers.1.block_sparse_moe.gate.weight",
    ),
    "router of fewer experts": (
        tensor("model.layers.1.block_sparse_moe.gate.weight", lambda router: router[:7]),
        "model.layers.1.block_sparse_moe.gate.weight",
    ),
    "norm of another shape": (
        tensor("model.layers.1.post_attention_layernorm.weight", lambda norm: norm[:128]),
        "post_attention_layernorm.weight",
    ),
    "NaN in an expert": (tensor(f"{EXPERT}w3.weight", nan_code), f"{EXPERT}w3.weight holds NaN"),
    "NaN in a norm": (
        tensor("model.layers.1.post_attention_layernorm.weight", poison(3, float("nan"))),
        "model.layers.1.post_attention_layernorm.weight holds NaN",
    ),
    "NaN in the router": (
        tensor("model.layers.1.block_sparse_moe.gate.weight", poison(3, float("nan"))),
        "model.layers.1.block_sparse_moe.gate.weight holds NaN",
    ),
    "inf in a scale": (
        tensor(f"{Q_PROJ}_scale_inv", poison(0, float("inf"))),
        f"{Q_PROJ}_scale_inv holds NaN or inf",
    ),
    "inf in the embeddings": (
        tensor("model.embed_tokens.weight", poison(9, float("inf"))),
        "model.embed_tokens.weight holds NaN or inf",
    ),
    "unknown model": (config(model_type="llama", architectures=["LlamaForCausalLM"]), "'llama' is not supported"),
    "no model type": (config(model_type=None, architectures=None), "None is not supported"),
    "architectures is a number": (config(model_type="llama", architectures=5), "'llama' is not supported"),
    "no config": (on_source(lambda s: (s / "config.json").unlink()), "config.json is missing"),
    "config is garbage": (set_text("config.json", "garbage"), "config.json can't be read"),
    "config is nested": (set_text("config.json", "[" * 100_000), "config.json can't be read"),
    "a billion layers": (config(num_hidden_layers=10**9), "1000000000 layers"),
    "a billion experts": (config(num_local_experts=10**9), "1000000000 experts"),
    "endless layers": (config(num_hidden_layers=float("inf")), "config.json"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers"),
    "fewer layers than tensors": (config(num_hidden_layers=1), "model.layers.1."),
    "fewer experts than tensors": (config(num_local_experts=4), "block_sparse_moe.gate.weight"),
    "more experts than tensors": (config(num_local_experts=9), "experts.8."),
    "layers is a word": (config(num_hidden_layers="many"), "config.json"),
    "layers missing": (config(num_hidden_layers=None), "num_hidden_layers"),
    "hidden_size missing": (config(hidden_size=None), "hidden_size"),
    "hidden_size wrong": (config(hidden_size=128), "experts.0.w1.weight"),
    "heads wrong": (config(num_attention_heads=8), "self_attn.q_proj.weight"),
    "top_k above the experts": (config(num_experts_per_tok=9), "num_experts_per_tok"),
    "unknown activation": (config(hidden_act="nonsense"), "nonsense"),
}  # fmt: skip
# These are seen by the stage that uses them; all others by the first.
IN_AWQ = {
    "missing embeddings", "expert of another shape", "router of another shape", "router of fewer experts",
    "norm of another shape", "fewer experts than tensors", "hidden_size missing", "hidden_size wrong", "heads wrong",
    "top_k above the experts", "unknown activation",
}  # fmt: skip


@pytest.mark.parametrize("fault", [fault for fault in SOURCES if fault not in IN_AWQ])
def test_dequant_refuses_a_bad_source(project: Path, fault: str) -> None:
    change, message = SOURCES[fault]
    change(project)
    assert message in refused("dequant", project / "recipe.yaml", "--set", "workers=1")
    # Shards that were whole before the fault was met may stay; without an index they are no checkpoint.
    assert not {name for name in half_made(project) if not name.endswith(".safetensors")}
    assert not half_made(project) or "holds NaN" in message


@pytest.mark.parametrize("source", ["bf16", "fp8"])
@pytest.mark.parametrize("fault", [*sorted(IN_AWQ), "NaN in an expert", "NaN in a norm"])
def test_awq_refuses_a_bad_source(project: Path, fault: str, source: str) -> None:
    """Whichever stage sees it: the run ends in order, before any quantized checkpoint is whole."""
    change, message = SOURCES[fault]
    change(project)
    assert message in refused("run", project / "recipe.yaml", "--quiet", "--set", f"awq.source={source}")
    assert not (project / "run" / "awq" / INDEX).exists()
    assert not [name for name in half_made(project) if name.endswith(".mmq-tmp")]


@pytest.mark.parametrize("fault", ["missing shard", "missing scale", "unknown model", "a billion layers"])
@pytest.mark.parametrize("command", ["awq", "restore", "run", "status"])
def test_every_command_refuses_a_bad_source(project: Path, fault: str, command: str) -> None:
    change, message = SOURCES[fault]
    change(project)
    assert message in refused(command, project / "recipe.yaml")
    assert half_made(project) == set()


def samples(text: str | bytes) -> Change:
    """Write the calibration file."""
    data = text.encode() if isinstance(text, str) else text
    return lambda project: (project / "samples.jsonl").write_bytes(data)


GOOD = json.dumps({"text": "some words of text"}) + "\n"
CALIBRATIONS: dict[str, tuple[Change, str]] = {
    "missing": (lambda project: (project / "samples.jsonl").unlink(), "there is no calibration file"),
    "empty": (samples(""), "is empty"),
    "blank": (samples("\n \n\n"), "is empty"),
    "too few": (samples(GOOD * 5), f"has 5 samples, the recipe asks for {SAMPLES}"),
    "not JSON": (samples(GOOD * 2 + "words\n" + GOOD * 20), "samples.jsonl:3 is not JSON"),
    "torn JSON": (samples(GOOD * 3 + GOOD[:-4] + "\n"), "samples.jsonl:4 is not JSON"),
    "nested JSON": (samples(GOOD + "[" * 100_000 + "\n"), "samples.jsonl:2"),
    "a list": (samples(GOOD + "[1]\n"), "samples.jsonl:2 is not a JSON object"),
    "no text": (samples(GOOD + '{"content": "words"}\n'), "samples.jsonl:2 has no text"),
    "empty text": (samples(GOOD + '{"text": "  "}\n'), "samples.jsonl:2 has no text"),
    "text is a number": (samples(GOOD + '{"text": 5}\n'), "samples.jsonl:2 has no text"),
    "no messages": (samples(GOOD + '{"messages": []}\n'), "samples.jsonl:2 has no text"),
    "odd messages": (samples(GOOD + '{"messages": ["words"]}\n'), "samples.jsonl:2"),
    "bytes": (samples(GOOD.encode() * SAMPLES + b"\xff\xfe\n"), "samples.jsonl can't be read"),
    "a folder": (
        lambda project: ((project / "samples.jsonl").unlink(), (project / "samples.jsonl").mkdir()),
        "samples.jsonl can't be read",
    ),
    "no tokenizer": (
        lambda project: [path.unlink() for path in (project / "source").glob("tokenizer*")],
        "tokenizer",
    ),
    "garbage tokenizer": (set_text("tokenizer.json", "garbage"), "tokenizer"),
    "empty tokenizer": (set_text("tokenizer.json", "{}"), "tokenizer"),
    "no chat template": (
        on_source(lambda source: (source / "chat_template.jinja").unlink()),
        "samples.jsonl:2 has messages, but the tokenizer has no chat template",
    ),
    "broken chat template": (set_text("chat_template.jinja", "{% for"), "samples.jsonl:2"),
    "small vocabulary": (
        tensor("model.embed_tokens.weight", lambda table: table[:40].clone()),
        "the model knows 40",
    ),
}


@pytest.mark.parametrize("fault", CALIBRATIONS)
def test_bad_calibration_is_refused(project: Path, fault: str) -> None:
    change, message = CALIBRATIONS[fault]
    change(project)
    assert message in refused("awq", project / "recipe.yaml", "--set", "awq.source=fp8")
    assert half_made(project) == set()


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_only_a_newline_ends_a_sample(project: Path, separator: str) -> None:
    """JSON allows these inside a string as they are; `json.dumps(..., ensure_ascii=False)` writes them so."""
    line = json.dumps({"text": f"some{separator}words"}, ensure_ascii=False)
    samples(f"{line}\n" * SAMPLES)(project)
    succeed("awq", project / "recipe.yaml", "--set", "awq.source=fp8", "--quiet")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", ""])
def test_a_device_that_is_not_there_is_refused(project: Path, device: str) -> None:
    message = refused("awq", project / "recipe.yaml", "--set", f"awq.device={device!r}", "--set", "awq.source=fp8")
    assert "awq.device" in message
    assert not [name for name in half_made(project) if name.startswith("awq/")]


def test_an_intermediate_size_that_groups_do_not_divide_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", Sizes(layers=1, intermediate=192, experts=2))
    (tmp_path / "samples.jsonl").write_text(GOOD * SAMPLES, encoding="utf-8")
    recipe = write_recipe(tmp_path)
    message = refused("awq", recipe)
    assert "w2.weight has 192 input channels" in message
    assert "awq.group_size = 128" in message
    assert half_made(tmp_path) == set()
    succeed("run", recipe, "--quiet", "--set", "awq.group_size=64")


@pytest.mark.parametrize("source", ["./nothing", "/nothing/at/all", "nothing", "owner/nothing"])
def test_a_source_that_is_nowhere_is_refused(project: Path, source: str) -> None:
    """A hub id is not fetched here: the tests run offline."""
    assert "model.source" in refused("dequant", project / "recipe.yaml", "--set", f"model.source={source}")
    assert half_made(project) == set()


@pytest.mark.parametrize("folder", ["bf16", "awq", "hybrid"])
@pytest.mark.parametrize("options", [[], ["--restart"]], ids=["plain", "restart"])
def test_a_source_in_the_place_of_an_output_is_never_touched(project: Path, folder: str, options: list[str]) -> None:
    """Dequantizing `run/bf16` into `run/bf16` would replace the only copy of the source, shard by shard."""
    (project / "run").mkdir()
    (project / "source").rename(project / "run" / folder)
    before = digests(project / "run" / folder)
    result = cli("run", project / "recipe.yaml", "--quiet", "--set", f"model.source=run/{folder}", *options)
    assert digests(project / "run" / folder) == before
    assert result.exit_code == 2


def test_stages_out_of_order_are_refused(project: Path) -> None:
    recipe = project / "recipe.yaml"
    assert "mmq dequant" in refused("awq", recipe)
    assert "mmq awq" in refused("restore", recipe)
    succeed("dequant", recipe)
    assert "mmq awq" in refused("restore", recipe)
    assert not [name for name in half_made(project) if name.startswith(("awq/", "hybrid/"))]


def test_a_stage_that_was_refused_for_its_order_runs_later(project: Path, finished: Path) -> None:
    recipe = project / "recipe.yaml"
    refused("restore", recipe)
    refused("awq", recipe)
    for stage in ("dequant", "awq", "restore"):
        succeed(stage, recipe, "--quiet")
    assert digests(project / "run" / "hybrid") == digests(finished / "run" / "hybrid")


def test_a_stage_that_finished_nothing_binds_nobody(project: Path) -> None:
    """awq was refused before its first layer; what the recipe says meanwhile is no mixing of two runs."""
    recipe = project / "recipe.yaml"
    refused("awq", recipe)
    succeed("dequant", recipe)
    succeed("awq", recipe, "--quiet", "--set", "awq.n_grid=5")


def test_restore_refuses_what_does_not_fit_the_attention(finished_copy: Path) -> None:
    recipe, run = finished_copy / "recipe.yaml", finished_copy / "run"
    name = "model.layers.1.input_layernorm.weight"
    edit_json(run / "journal.json", lambda journal: journal["stages"].pop("restore"))
    shutil.rmtree(run / "hybrid")
    shard = run / "awq" / json.loads((run / "awq" / INDEX).read_text(encoding="utf-8"))["weight_map"][name]
    content = bytearray(shard.read_bytes())
    length = int.from_bytes(content[:8], "little")
    begin = json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
    content[8 + length + begin] ^= 1
    shard.write_bytes(content)
    message = refused("restore", recipe)
    assert name in message
    assert "differs" in message
    assert not [path for path in half_made(finished_copy) if path.startswith("hybrid/")]


def test_a_disk_that_is_too_small_is_refused_first(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = project / "recipe.yaml"
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(total=10**12, used=10**12, free=1000))
    message = refused("dequant", recipe)
    assert str(project / "run" / "bf16") in message
    assert "its disk has 1.0 kB free" in message
    assert half_made(project) == set()
    monkeypatch.undo()
    succeed("dequant", recipe, "--quiet")
