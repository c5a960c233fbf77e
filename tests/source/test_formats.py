"""How a source stores its weights: told by config.json, and refused by name where mmq reads none of it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import SAMPLES, cpu_only, write_recipe

from mmq.errors import CheckpointError, JournalError, RecipeError
from mmq.families.minimax_m2 import MINIMAX_M2
from mmq.families.qwen3_moe import QWEN3_MOE
from mmq.families.sizes import components
from mmq.prove.verify import verify_checkpoint
from mmq.recipe import load
from mmq.serve.outputs import output_tensors
from mmq.source.formats import FORMATS, format_of
from mmq.source.synth import STORED, Sizes, write_checkpoint, write_samples
from mmq.stages.pipeline import run_stages
from mmq.workdir.workspace import Workspace

BLOCK, CHANNEL = (STORED[name].settings or {} for name in ("ct-block", "ct-channel"))


@pytest.mark.parametrize("name", STORED)
def test_each_is_told_by_its_settings(name: str) -> None:
    stored = STORED[name]
    config = {"quantization_config": dict(stored.settings)} if stored.settings else {}
    assert format_of(config) is stored.format and stored.format in FORMATS


def changed(settings: Any, *keys: str, to: Any) -> dict[str, Any]:
    result: dict[str, Any] = deepcopy(dict(settings))
    node = result
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = to
    return result


WEIGHTS = ("config_groups", "group_0", "weights")
FINE = STORED["fp8"].settings or {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'; mmq reads fp8, compressed-tensors, and bf16"),
        ({"quant_method": "mxfp8"}, "quant_method is 'mxfp8'"),
        ({"quant_method": "mxfp4"}, "quant_method is 'mxfp4'"),
        ({}, "quant_method is None"),
        ([], "quantization_config is [] instead of an object"),
        (changed(FINE, "weight_block_size", to=[1, 32]), "weight_block_size is [1, 32] (MXFP8); only [128, 128]"),
        (changed(FINE, "fmt", to="e5m2"), "fmt is 'e5m2'"),
        (changed(BLOCK, *WEIGHTS, "block_structure", to=[64, 64]), "block_structure is [64, 64]"),
        (changed(BLOCK, *WEIGHTS, "strategy", to="group"), "strategy = 'group'; only block or channel"),
        (changed(CHANNEL, *WEIGHTS, "strategy", to="tensor"), "strategy = 'tensor'; only block or channel"),
        (changed(CHANNEL, *WEIGHTS, "type", to="int"), "type = 'int'; only float"),
        (changed(CHANNEL, *WEIGHTS, "num_bits", to=4), "num_bits = 4; only 8"),
        (changed(CHANNEL, *WEIGHTS, "symmetric", to=False), "symmetric = False"),
        (changed(CHANNEL, "config_groups", "group_0", "format", to="mxfp8-quantized"), "'mxfp8-quantized'; only float"),
        (changed(CHANNEL, "config_groups", "group_0", "weights", to=None), "only float-quantized weights"),
        (changed(CHANNEL, "config_groups", to={}), "config_groups is {}"),
        (changed(CHANNEL, "kv_cache_scheme", to={"num_bits": 8}), "scales of its own for a KV cache"),
    ],
)
def test_what_is_none_of_them_is_refused(settings: Any, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        format_of({"quantization_config": settings})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "plain", "stored"),
    [
        (FINE, ("model.layers.0.mlp.gate",), ("model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.q_proj")),
        (
            changed(FINE, "modules_to_not_convert", to=["mtp.fc", "model.layers.1.self_attn"]),
            ("mtp.fc", "model.layers.1.self_attn.q_proj"),
            ("model.layers.11.self_attn.q_proj", "mtp.layers.0.self_attn.q_proj"),
        ),
        (CHANNEL, ("model.layers.0.mlp.gate",), ("model.layers.0.mlp.gate_proj",)),
        (
            changed(CHANNEL, "ignore", to=["model.layers.1.self_attn.q_proj", "re:.*shared_experts.*"]),
            ("model.layers.1.self_attn.q_proj", "model.layers.9.mlp.shared_experts.up_proj"),
            ("model.layers.11.self_attn.q_proj", "model.layers.1.self_attn.q_proj_"),
        ),
        (
            changed(BLOCK, "config_groups", "group_0", "targets", to=[r"re:.*mlp\.experts\.\d+\..*"]),
            ("model.layers.0.self_attn.q_proj",),
            # By the name that transformers has for it.
            ("model.layers.0.block_sparse_moe.experts.3.w1",),
        ),
    ],
)
def test_what_a_source_leaves_in_bf16(settings: Any, plain: tuple[str, ...], stored: tuple[str, ...]) -> None:
    config = {"quantization_config": settings}
    left = format_of(config).plain(config, MINIMAX_M2)
    assert [left(f"{name}.weight") for name in (*plain, *stored)] == [True] * len(plain) + [False] * len(stored)


@pytest.mark.parametrize(
    "settings",
    [changed(CHANNEL, "ignore", to=["re:("]), changed(CHANNEL, "ignore", to="lm_head"),
     changed(FINE, "modules_to_not_convert", to=[1]), changed(BLOCK, "config_groups", "group_0", "targets", to=[None])],
)  # fmt: skip
def test_modules_that_are_none(settings: Any) -> None:
    config = {"quantization_config": settings}
    with pytest.raises(CheckpointError, match="quantization_config does not name modules"):
        format_of(config).plain(config, MINIMAX_M2)


@cpu_only
def test_fp8_by_rows_and_bf16_attention_side_by_side(tmp_path: Path) -> None:
    """As where a release leaves attention alone, all of it or some: bf16 stays bf16, no group speaks of it, and the
    plan counts it so."""
    for name, left in {"some": "model.layers.1.self_attn.q_proj", "all": "re:.*self_attn.*"}.items():
        folder = tmp_path / name
        settings = changed(CHANNEL, "ignore", to=[*CHANNEL["ignore"], left])
        stored = replace(STORED["ct-channel"], settings=settings)
        write_checkpoint(folder / "source", Sizes(), family=QWEN3_MOE, stored=stored)
        write_samples(folder / "samples.jsonl", SAMPLES)
        workspace = Workspace.of(load(write_recipe(folder, source="fp8")))
        assert workspace.source.specs.keys() - workspace.source.scales.keys()
        planned = {form: planned_bytes(workspace, form) for form in ("source", "hybrid")}
        run_stages(workspace, ["awq", "restore"])
        assert not verify_checkpoint(workspace).problems
        found = load_all(folder / "run/hybrid")
        names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]
        kept = torch.bfloat16 if name == "all" else torch.float8_e4m3fn
        assert [found[name].dtype for name in names] == [kept, torch.bfloat16]
        assert planned == {"source": bytes_of(folder / "source"), "hybrid": bytes_of(folder / "run/hybrid")}


def planned_bytes(workspace: Workspace, form: Any) -> dict[str, int]:
    arch = workspace.architecture
    tensors = output_tensors(workspace.recipe, workspace.source.config, arch, form)
    return {name: part.nbytes for name, part in components(tensors).items() if part.nbytes}


def bytes_of(folder: Path) -> dict[str, int]:
    """Of each component, by the files."""
    found: dict[str, int] = {}
    for name, tensor in load_all(folder).items():
        component = QWEN3_MOE.component(name)
        found[component] = found.get(component, 0) + tensor.nbytes
    return found


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_rounding_attention_is_for_bf16_sources(project: Path) -> None:
    """Refused with the first stage, not after the hours before the last."""
    workspace = Workspace.of(load(project / "recipe.yaml", ["restore.attention=fp8_block"]))
    with pytest.raises(RecipeError, match="fp8_block, which is for bf16 sources; this one is block fp8"):
        run_stages(workspace, ["dequant", "awq", "restore"])
    assert not (project / "run/bf16").exists()


@cpu_only
def test_verify_sees_attention_that_was_rounded_otherwise(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", Sizes(), family=QWEN3_MOE, stored=STORED["bf16"])
    write_samples(tmp_path / "samples.jsonl", SAMPLES)
    recipe = load(write_recipe(tmp_path, source="fp8"), ["restore.attention=fp8_block"])
    run_stages(Workspace.of(recipe), ["awq", "restore"])
    report = verify_checkpoint(Workspace.of(recipe))
    assert not report.problems and report.checks["attention tensors rounded to the nearest fp8"] == 8
    # The experts and the cache's scales were calibrated with it.
    plain = Workspace.of(load(tmp_path / "recipe.yaml"))
    for stages, restart in ((["restore"], True), (["awq", "restore"], False)):
        with pytest.raises(
            JournalError, match=r'awq was begun with restore\.attention = "fp8_block", now it is nothing'
        ):
            run_stages(plain, stages, restart)
    name = "model.layers.1.self_attn.o_proj.weight"
    path = next(p for p in (tmp_path / "run/hybrid").glob("*.safetensors") if name in load_file(p))
    good = load_file(path)
    codes, scale = good[name].clone(), good[f"{name}_scale"].clone()
    codes.view(torch.uint8)[3, 7] ^= 2
    scale[0, 0] *= 2
    for change, words in (({name: codes}, "1 of 65536 fp8 codes"), ({f"{name}_scale": scale}, "fp8 codes are not")):
        save_file(good | change, path)
        assert any(words in problem for problem in verify_checkpoint(Workspace.of(recipe)).problems)
