"""verify: it passes on what the stages made, and names the fault of every kind of damage."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.test_cli import cli, events, load_folder, refused, succeed
from conftest import digests, edit_json
from mmq.storage.checkpoint import Checkpoint
from mmq.text import bytes_text
from storage.test_storage import edit_tensors

LAYER = "model.layers.1."
EXPERT = f"{LAYER}block_sparse_moe.experts.3."
ROUTER = f"{LAYER}block_sparse_moe.gate.weight"
NORM = f"{LAYER}post_attention_layernorm.weight"
Tensors = dict[str, torch.Tensor]
# verify names the layer, or the expert itself.
WRONG_EXPERT = f"layer 1|{re.escape(EXPERT)}"


def found(project: Path) -> list[str]:
    """The problems that verify finds; its exit code, its message and verify.json must agree on them."""
    result = cli("verify", project / "recipe.yaml", "--json")
    (report,) = events((project / "run" / "verify.json").read_text(encoding="utf-8").replace("\n", " "))
    problems: list[str] = report["problems"]
    assert result.exit_code == (1 if problems else 0), result.stderr
    (event,) = (event for event in events(result.stdout) if event["event"] == "result")
    assert event["problems"] == problems
    assert event["ok"] is report["ok"] is (not problems)
    if problems:
        assert all(problem in result.stderr for problem in problems[:20])
        assert "Traceback" not in result.stderr
    return problems


def test_what_the_stages_made_passes(finished_copy: Path) -> None:
    assert found(finished_copy) == []
    report = json.loads((finished_copy / "run" / "verify.json").read_text(encoding="utf-8"))
    assert [entry["layer"] for entry in report["layers"]] == [0, 1]
    source = load_folder(finished_copy / "source")
    attention = {name.replace("_scale_inv", "_scale"): t for name, t in source.items() if "_proj." in name}
    assert len(attention) == 2 * 4 * 2
    assert report["attention_sha256"] == {
        name: hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in attention.items()
    }


def test_people_see_what_was_looked_at(finished_copy: Path) -> None:
    output = succeed("verify", finished_copy / "recipe.yaml")
    assert "verified" in output
    assert "attention tensors equal to the source's bytes" in output


def test_weight_only_attention_passes(finished_copy: Path) -> None:
    recipe = finished_copy / "recipe.yaml"
    setting = "restore.attention_activations=none"
    succeed("restore", recipe, "--set", setting, "--restart")
    succeed("verify", recipe, "--set", setting)


def test_before_restore_there_is_nothing_to_verify(project: Path) -> None:
    assert "mmq restore" in refused("verify", project / "recipe.yaml")
    assert not (project / "run" / "verify.json").exists()


def flip_a_bit(name: str) -> Callable[[Tensors], None]:
    """Change one bit of one value of a tensor."""

    def change(tensors: Tensors) -> None:
        raw = tensors[name].clone().view(torch.uint8)
        raw.view(-1)[raw.numel() // 2] ^= 1
        tensors[name] = raw.view(tensors[name].dtype).view(tensors[name].shape)

    return change


def replace(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    """Replace a tensor by a function of it."""
    return lambda tensors: tensors.update({name: function(tensors[name])})


def wrong_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Eight codes of a word in the opposite order."""
    words = packed.to(torch.int64) & 0xFFFFFFFF
    turned = sum(((words >> (4 * i)) & 15) << (4 * (7 - i)) for i in range(8))
    assert isinstance(turned, torch.Tensor)
    return torch.where(turned >= 2**31, turned - 2**32, turned).to(torch.int32)


def swap(a: str, b: str) -> Callable[[Tensors], None]:
    """Exchange two tensors."""
    return lambda tensors: tensors.update({a: tensors[b], b: tensors[a]})


DAMAGES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "a bit of attention": (
        flip_a_bit(f"{LAYER}self_attn.k_proj.weight"),
        f"{LAYER}self_attn.k_proj.weight is not the source's",
    ),
    "an attention scale": (
        replace(f"{LAYER}self_attn.o_proj.weight_scale", lambda scale: scale * 1.0001),
        f"{LAYER}self_attn.o_proj.weight_scale is not the source's",
    ),
    "a missing attention scale": (
        lambda tensors: tensors.pop(f"{LAYER}self_attn.o_proj.weight_scale"),
        f"{LAYER}self_attn.o_proj.weight_scale is missing",
    ),
    "two attention matrices": (
        swap("model.layers.0.self_attn.q_proj.weight", f"{LAYER}self_attn.q_proj.weight"),
        "model.layers.0.self_attn.q_proj.weight is not the source's",
    ),
    "a norm that attention reads": (
        flip_a_bit(f"{LAYER}input_layernorm.weight"),
        f"{LAYER}input_layernorm.weight is not the source's",
    ),
    "the routers bias": (
        flip_a_bit(f"{LAYER}block_sparse_moe.e_score_correction_bias"),
        f"{LAYER}block_sparse_moe.e_score_correction_bias is not the source's",
    ),
    "nibble order of gate": (replace(f"{EXPERT}w1.weight_packed", wrong_nibbles), WRONG_EXPERT),
    "nibble order of down": (replace(f"{EXPERT}w2.weight_packed", wrong_nibbles), WRONG_EXPERT),
    "nibble order of up": (replace(f"{EXPERT}w3.weight_packed", wrong_nibbles), WRONG_EXPERT),
    "gate scales of two experts": (
        swap(f"{EXPERT}w1.weight_scale", f"{EXPERT.replace('.3.', '.4.')}w1.weight_scale"),
        WRONG_EXPERT,
    ),
    "up scales of two experts": (
        swap(f"{EXPERT}w3.weight_scale", f"{EXPERT.replace('.3.', '.4.')}w3.weight_scale"),
        WRONG_EXPERT,
    ),
    "down scales of two experts": (
        swap(f"{EXPERT}w2.weight_scale", f"{EXPERT.replace('.3.', '.4.')}w2.weight_scale"),
        WRONG_EXPERT,
    ),
    "one expert's codes in another's place": (
        swap(f"{EXPERT}w1.weight_packed", f"{EXPERT.replace('.3.', '.4.')}w1.weight_packed"),
        WRONG_EXPERT,
    ),
    "one expert is zero": (replace(f"{EXPERT}w2.weight_scale", torch.zeros_like), WRONG_EXPERT),
    "a scale is NaN": (replace(f"{EXPERT}w1.weight_scale", lambda scale: scale * float("nan")), WRONG_EXPERT),
    "a wrong shape tensor": (
        replace(f"{EXPERT}w2.weight_shape", lambda shape: shape.flip(0)),
        f"{EXPERT}w2.weight_shape is [128, 256]",
    ),
    "a router in bf16": (replace(ROUTER, lambda router: router.bfloat16()), f"{ROUTER} is BF16 instead of F32"),
    "k_scale 0": (replace(f"{LAYER}self_attn.k_scale", torch.zeros_like), f"{LAYER}self_attn.k_scale is 0.0"),
    "k_scale inf": (
        replace(f"{LAYER}self_attn.k_scale", lambda scale: scale / 0),
        f"{LAYER}self_attn.k_scale is inf",
    ),
    "v_scale NaN": (
        replace(f"{LAYER}self_attn.v_scale", lambda scale: scale * float("nan")),
        f"{LAYER}self_attn.v_scale is nan",
    ),
    "v_scale missing": (
        lambda tensors: tensors.pop(f"{LAYER}self_attn.v_scale"),
        f"{LAYER}self_attn.v_scale is missing",
    ),
    "an expert is missing": (
        lambda tensors: tensors.pop(f"{EXPERT}w1.weight_packed"),
        f"{EXPERT}w1.weight_packed is missing",
    ),
    "an orphan scale": (
        lambda tensors: tensors.update({f"{ROUTER}_scale": torch.ones(1)}),
        f"{ROUTER}_scale is an orphan scale",
    ),
    "a left-over of the source": (
        lambda tensors: tensors.update({f"{LAYER}self_attn.q_proj.weight_scale_inv": torch.ones(2, 2)}),
        f"{LAYER}self_attn.q_proj.weight_scale_inv is an orphan scale",
    ),
    "a tensor too many": (
        lambda tensors: tensors.update({"model.extra": torch.ones(1)}),
        "model.extra is not accounted for",
    ),
    "embeddings": (flip_a_bit("model.embed_tokens.weight"), "model.embed_tokens.weight is not the source's"),
    "the head": (flip_a_bit("lm_head.weight"), "lm_head.weight is not the source's"),
    "the last norm": (flip_a_bit("model.norm.weight"), "model.norm.weight is not the source's"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(finished_copy: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    edit_tensors(finished_copy / "run" / "hybrid", change)
    problems = found(finished_copy)
    pattern = message if message == WRONG_EXPERT else re.escape(message)
    assert any(re.search(pattern, problem) for problem in problems), problems


def test_rewriting_alone_is_no_damage(finished_copy: Path) -> None:
    """So that the damages above are found for what they are and not for how they were done."""
    edit_tensors(finished_copy / "run" / "hybrid", lambda tensors: None)
    assert found(finished_copy) == []


def test_a_router_without_the_norms_scales_is_found(finished_copy: Path) -> None:
    original = load_folder(finished_copy / "source")
    edit_tensors(finished_copy / "run" / "hybrid", lambda tensors: tensors.update({ROUTER: original[ROUTER]}))
    assert any(ROUTER in problem and NORM in problem for problem in found(finished_copy))


def test_a_norm_without_the_routers_scales_is_found(finished_copy: Path) -> None:
    original = load_folder(finished_copy / "source")
    edit_tensors(finished_copy / "run" / "hybrid", lambda tensors: tensors.update({NORM: original[NORM]}))
    assert any(ROUTER in problem and NORM in problem for problem in found(finished_copy))


def test_norm_and_router_without_the_experts_are_found(finished_copy: Path) -> None:
    """The router fits the norm, but the experts were quantized for the smoothed one."""
    original = load_folder(finished_copy / "source")
    changed = load_folder(finished_copy / "run" / "hybrid")
    assert not torch.equal(original[NORM], changed[NORM]), "no smoothing was chosen, the test would say nothing"
    both = {name: original[name] for name in (NORM, ROUTER)}
    edit_tensors(finished_copy / "run" / "hybrid", lambda tensors: tensors.update(both))
    assert any("layer 1" in problem or EXPERT in problem for problem in found(finished_copy))


def group(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """The config group of the int4 experts or the fp8 attention."""
    groups: dict[str, dict[str, Any]] = config["quantization_config"]["config_groups"]
    (chosen,) = (
        g for g in groups.values() if g["format"] == {"int4": "pack-quantized", "fp8": "float-quantized"}[kind]
    )
    return chosen


CONFIG_DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "targets miss experts": (
        lambda c: group(c, "int4").update(targets=[r"re:.*experts\.\d\.(w1|w2)$"]),
        "does not match model.layers.0.block_sparse_moe.experts.0.w3",
    ),
    "targets know only the hub's names": (
        lambda c: group(c, "int4").update(targets=[r"re:.*block_sparse_moe\.experts\.\d+\.(w1|w2|w3)$"]),
        "does not match model.layers.0.mlp.experts",
    ),
    "targets match everything": (lambda c: group(c, "int4").update(targets=["re:.*"]), "matches model.norm"),
    "attention's targets match norms": (
        lambda c: group(c, "fp8").update(targets=[r"re:.*self_attn\..*"]),
        "matches model.layers.0.self_attn.q_norm",
    ),
    "targets by class": (lambda c: group(c, "fp8").update(targets=["Linear"]), "does not match"),
    "a broken pattern": (lambda c: group(c, "fp8").update(targets=["re:("]), "group_1"),
    "another group size": (lambda c: group(c, "int4")["weights"].update(group_size=64), "weight_scale"),
    "eight bits": (lambda c: group(c, "int4")["weights"].update(num_bits=8), "neither int4 experts nor"),
    "no attention group": (
        lambda c: c["quantization_config"]["config_groups"].pop("group_1"),
        "config.json describes ['experts']",
    ),
    "no kv_cache_scheme": (
        lambda c: c["quantization_config"].update(kv_cache_scheme=None),
        "kv_cache_scheme and KV scales disagree",
    ),
    "head not ignored": (lambda c: c["quantization_config"].update(ignore=[]), "ignore lacks lm_head"),
    "another method": (lambda c: c["quantization_config"].update(quant_method="fp8"), "quant_method"),
    "no quantization_config": (lambda c: c.pop("quantization_config"), "quant_method"),
    "quantization_config null": (lambda c: c.update(quantization_config=None), "quant_method"),
    "wrong rotary share": (
        lambda c: c["rope_parameters"].update(partial_rotary_factor=1.0),
        "partial_rotary_factor is not 0.5",
    ),
    "no rope_parameters": (lambda c: c.pop("rope_parameters"), "partial_rotary_factor is not 0.5"),
    "another number of layers": (lambda c: c.update(num_hidden_layers=3), "num_hidden_layers"),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGES)
def test_a_wrong_config_is_found_and_named(finished_copy: Path, damage: str) -> None:
    change, message = CONFIG_DAMAGES[damage]
    edit_json(finished_copy / "run" / "hybrid" / "config.json", change)
    problems = found(finished_copy)
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "config.json is missing"),
        ("model-00002-of-00003.safetensors", "model-00002-of-00003.safetensors is missing"),
        ("tokenizer.json", "tokenizer.json"),
        ("chat_template.jinja", "chat_template.jinja"),
    ],
)
def test_a_missing_file_is_found_and_named(finished_copy: Path, name: str, message: str) -> None:
    (finished_copy / "run" / "hybrid" / name).unlink()
    assert any(message in problem for problem in found(finished_copy))


def test_a_dry_run_says_what_would_be_compared_and_touches_nothing(finished_copy: Path) -> None:
    recipe, before = finished_copy / "recipe.yaml", digests(finished_copy)
    (event,) = events(succeed("verify", recipe, "--dry-run", "--json"))
    looked_at = {check["checked"]: check["found"] for check in event["checks"]}
    opened = [Checkpoint.open(finished_copy / name) for name in ("source", "run/hybrid")]
    assert looked_at["source"].startswith(f"{len(opened[0].specs):,} tensors in 4 shards")
    assert looked_at["result"].startswith(f"{len(opened[1].specs):,} tensors in 3 shards")
    size = bytes_text(sum(checkpoint.nbytes for checkpoint in opened))
    assert looked_at["to compare"] == f"2 layers and what lies outside them, {size} to read"
    assert digests(finished_copy) == before
    # What verify would find is no refusal: its own report says it.
    (finished_copy / "run/hybrid/model-00002-of-00003.safetensors").unlink()
    (event,) = events(succeed("verify", recipe, "--dry-run", "--json"))
    (problem,) = found(finished_copy)
    assert {check["found"] for check in event["checks"]} >= {f"verify would find: {problem}"}


def test_a_dry_run_refuses_what_verify_does(project: Path) -> None:
    said = refused("verify", project / "recipe.yaml")
    assert said.endswith("run/hybrid is not complete; run `mmq restore` first")
    assert refused("verify", project / "recipe.yaml", "--dry-run") == said


def test_verify_without_its_source_is_refused(finished_copy: Path) -> None:
    (finished_copy / "source" / "model-00001-of-00004.safetensors").unlink()
    assert "model-00001-of-00004.safetensors is missing" in refused("verify", finished_copy / "recipe.yaml")
