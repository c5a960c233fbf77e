"""The finished checkpoint as a model: against the plain fp32 forward of reference.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import DEVICE, cpu_only, digests, write_recipe
from mmq.families.minimax_m2 import MINIMAX_M2
from mmq.prove.verify import verify_checkpoint
from mmq.quantize.decoder_layer import DecoderLayer, transformers_config
from mmq.quantize.layer import LayerContent, LayerQuantizer, LayerResult
from mmq.quantize.routed_experts import ExpertBlock, top_up
from mmq.quantize.routed_experts import Weights as StackedWeights
from mmq.recipe import load
from mmq.source.synth import Sizes, write_checkpoint, write_samples
from mmq.stages import awq
from mmq.stages.awq_checks import calibration_tokens
from mmq.stages.pipeline import run_stages
from mmq.storage.checkpoint import Checkpoint
from mmq.workdir.workspace import Workspace
from reference import (
    Weights,
    dequantized,
    divergence,
    hidden_states,
    keys_and_values,
    logits,
    read_folder,
    rms_norm,
    round_to_nearest,
)

HELD_OUT = torch.randint(0, 500, (192,), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def source(finished: Path) -> tuple[dict[str, Any], Weights]:
    config, tensors = read_folder(finished / "source")
    return config, dequantized(tensors)


@pytest.fixture(scope="module")
def hybrid(finished: Path) -> Weights:
    return dequantized(read_folder(finished / "run/hybrid")[1])


def stacked(weights: Weights, prefix: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    names = [f"{prefix}block_sparse_moe.experts.{expert}." for expert in range(count)]
    gate_up = torch.stack([torch.cat([weights[f"{n}w1.weight"], weights[f"{n}w3.weight"]]) for n in names])
    return gate_up, torch.stack([weights[f"{n}w2.weight"] for n in names])


def test_the_streamed_layer_is_the_plain_one(source: tuple[dict[str, Any], Weights]) -> None:
    """Attention with partial rotary, norms, fp32 router and grouped experts of transformers' layer, in fp32."""
    config, weights = source
    ids = HELD_OUT
    states = hidden_states(ids, weights, config)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        local = {
            name.removeprefix(prefix): tensor
            for name, tensor in weights.items()
            if name.startswith(prefix) and ".experts." not in name
        }
        decoder = DecoderLayer(MINIMAX_M2, transformers_config(MINIMAX_M2, config), layer, local, DEVICE)
        # Two copies of different lengths and one more: sequences don't see each other.
        lengths = [192, 64, 192]
        hidden = torch.cat([states[layer], states[layer][:64], states[layer]]).to(DEVICE)
        residual = decoder.attend(hidden, lengths)
        x = decoder.block_input(residual)
        _, share, index = decoder.route(x)
        gate_up, down = (w.to(DEVICE) for w in stacked(weights, prefix, config["num_local_experts"]))
        block = ExpertBlock(x, index, share, gate_up, down, decoder.activation, 128)
        output = residual + block.output(StackedWeights(block))
        expected = torch.cat([states[layer + 1], states[layer + 1][:64], states[layer + 1]])
        assert torch.allclose(output.cpu(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_rotary_fix_matters(source: tuple[dict[str, Any], Weights]) -> None:
    """Rotating all head dimensions, as the stock config does, gives another function."""
    config, weights = source
    wrong = config | {"rotary_dim": config["head_dim"]}
    assert divergence(logits(HELD_OUT, weights, config), logits(HELD_OUT, weights, wrong)) > 0.01


def test_smoothing_alone_leaves_the_logits_unchanged(source: tuple[dict[str, Any], Weights], hybrid: Weights) -> None:
    """The stored norms and routers, with their scales undone in unquantized experts, are the source's function."""
    config, weights = source
    smoothed = dict(weights)
    moved = 0.0
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        norm, router = prefix + "post_attention_layernorm.weight", prefix + "block_sparse_moe.gate.weight"
        applied = weights[norm] / hybrid[norm]
        moved = max(moved, float(applied.log().abs().max()))
        smoothed[norm], smoothed[router] = hybrid[norm], hybrid[router]
        for expert in range(config["num_local_experts"]):
            for linear in ("w1", "w3"):
                name = f"{prefix}block_sparse_moe.experts.{expert}.{linear}.weight"
                smoothed[name] = weights[name] * applied
    before, after = (logits(HELD_OUT, w, config) for w in (weights, smoothed))
    assert moved > 0.5, "nothing was smoothed"
    assert float((after - before).abs().max()) < 2e-5 * float(before.abs().max())


def test_the_hybrid_is_much_closer_to_the_source_than_round_to_nearest(
    finished: Path, source: tuple[dict[str, Any], Weights], hybrid: Weights, tmp_path: Path
) -> None:
    config, weights = source
    nearest = {name: round_to_nearest(tensor) if ".experts." in name else tensor for name, tensor in weights.items()}
    tokenizer = AutoTokenizer.from_pretrained(finished / "source")
    write_samples(tmp_path / "held-out.jsonl", 16, seed=1)
    lines = [json.loads(line) for line in (tmp_path / "held-out.jsonl").read_text().splitlines()]
    texts = [torch.tensor(tokenizer(line["text"])["input_ids"]) for line in lines if "text" in line]
    truth = [logits(ids, weights, config) for ids in texts]
    ours, theirs = (
        sum(divergence(t, logits(ids, w, config)) for t, ids in zip(truth, texts, strict=True))
        for w in (hybrid, nearest)
    )
    assert ours < 0.75 * theirs, f"KL {ours:.4f} against {theirs:.4f} of round-to-nearest"


def test_kv_scales_cover_keys_after_rotary_and_values(finished: Path, source: tuple[dict[str, Any], Weights]) -> None:
    config, weights = source
    tokens = calibration_tokens(Workspace.of(load(finished / "recipe.yaml")))
    largest = {"k_scale": 0.0, "v_scale": 0.0}
    for ids in tokens.ids.split(tokens.lengths):
        x = weights["model.embed_tokens.weight"][ids]
        x = rms_norm(x, weights["model.layers.0.input_layernorm.weight"], config["rms_norm_eps"])
        for name, tensor in zip(largest, keys_and_values(x, weights, "model.layers.0.", config), strict=True):
            largest[name] = max(largest[name], float(tensor.abs().max()))
    stored = read_folder(finished / "run/hybrid")[1]
    for name, value in largest.items():
        # The observers see bf16 activations.
        assert float(stored[f"model.layers.0.self_attn.{name}"]) == pytest.approx(value / 448, rel=0.02)


@pytest.mark.parametrize("quantized", [True, False])
def test_layers_are_calibrated_on_what_comes_before_them(
    project: Path, source: tuple[dict[str, Any], Weights], quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second layer sees what the quantized first layer gives, or the source's where the recipe says so."""
    config, weights = source
    captured: list[torch.Tensor] = []
    quantize = LayerQuantizer.quantize

    def captive(
        self: LayerQuantizer, layer: int, content: LayerContent, hidden: torch.Tensor, *rest: Any
    ) -> LayerResult:
        captured.append(hidden)
        return quantize(self, layer, content, hidden, *rest)

    monkeypatch.setattr(LayerQuantizer, "quantize", captive)
    workspace = Workspace.of(load(write_recipe(project, source="fp8", propagate_quantized=quantized)))
    run_stages(workspace, ["awq"])
    tokens = calibration_tokens(workspace)
    first = tokens.ids[: tokens.lengths[0]]
    ours = dequantized(read_folder(project / "run/awq")[1])
    states = {name: hidden_states(first, w, config)[1] for name, w in (("quantized", ours), ("source", weights))}
    found = captured[1][: tokens.lengths[0]].float().cpu()
    errors = {name: float((found - state).norm() / state.norm()) for name, state in states.items()}
    wanted, other = ("quantized", "source") if quantized else ("source", "quantized")
    assert errors[wanted] < 0.02
    assert errors[wanted] < 0.5 * errors[other]


def test_the_fp8_source_gives_the_bytes_of_the_bf16_path(finished: Path, project: Path) -> None:
    run_stages(Workspace.of(load(write_recipe(project, source="fp8"))), ["awq", "restore"])
    assert not (project / "run/bf16").exists()
    for folder in ("awq", "hybrid"):
        assert digests(project / "run" / folder) == digests(finished / "run" / folder)


def test_reading_a_layer_ahead_changes_nothing(finished: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that holds two layers."""
    monkeypatch.setattr(awq._Stage, "_fit_memory", lambda _: True)
    run_stages(Workspace.of(load(write_recipe(project, source="fp8"))), ["awq"])
    assert digests(project / "run/awq") == digests(finished / "run/awq")


def test_bf16_folder_holds_the_dequantized_weights_and_everything_else_byte_for_byte(finished: Path) -> None:
    _, before = read_folder(finished / "source")
    config, after = read_folder(finished / "run/bf16")
    plain = dequantized(before)
    assert "quantization_config" not in config
    assert set(after) == {name for name in before if not name.endswith("_scale_inv")}
    for name, tensor in after.items():
        if before[name].dtype == torch.float8_e4m3fn:
            assert torch.equal(tensor, plain[name].to(torch.bfloat16)), name
        else:
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name]), name


def test_statistics_say_what_happened(finished: Path) -> None:
    layers = json.loads((finished / "run/state/awq/layers.json").read_text())
    tokens = calibration_tokens(Workspace.of(load(finished / "recipe.yaml")))
    for entry in layers:
        assert sum(entry["tokens_per_expert"]) == 2 * sum(tokens.lengths)
        assert 0 < entry["loss_chosen"] <= entry["loss_round_to_nearest"]
        if entry["rounding"] == "nearest":
            # The one is of all tokens, the other of as many as decided between smoothing and none.
            alike = entry["loss_tokens"] == sum(tokens.lengths)
            assert entry["loss_propagated"] == pytest.approx(entry["loss_chosen"], rel=0.2 if alike else 0.5)
        assert entry["loss_propagated"] < entry["loss_round_to_nearest"]
        for count, extra in zip(entry["tokens_per_expert"], entry["topped_up"], strict=True):
            assert extra == max(0, 64 - count)
        assert {"reading", "attention", "searching", "quantizing", "propagating"} <= set(entry["seconds"])


def test_top_up_takes_the_highest_scores_among_the_unrouted() -> None:
    scores = torch.rand(40, 6, generator=torch.Generator().manual_seed(0))
    index = scores[:, :4].topk(2).indices  # experts 4 and 5 get nothing
    rows = top_up(scores, index, 10)
    assert rows is not None
    counts = torch.bincount(index.flatten(), minlength=6).tolist()
    assert rows.counts == [max(0, 10 - count) for count in counts]
    start = 0
    for expert, end in enumerate(rows.ends):
        taken = set(rows.token[start:end].tolist())
        routed = set((index == expert).any(1).nonzero().flatten().tolist())
        free = sorted(set(range(40)) - routed, key=lambda token: -float(scores[token, expert]))
        assert taken == set(free[: end - start])
        start = end
    assert top_up(scores, index, 0) is None
    everything = top_up(scores, index, 1000)
    assert everything is not None and everything.counts[4] == 40


@pytest.mark.parametrize("names", ["default", "hub"])
def test_transformers_loads_the_hybrid_checkpoint(finished_copy: Path, hybrid: Weights, names: str) -> None:
    """No missing or unexpected keys; experts bit-equal to an independent unpacking, whatever names config.json has for
    them beside the hub's: nothing else goes by the others, as verify finds too."""
    folder = finished_copy / "run/hybrid"
    if names == "hub":
        recipe = load(finished_copy / "recipe.yaml", ["restore.expert_targets=hub"])
        run_stages(Workspace.of(recipe), ["restore"], restart=True)
        assert not verify_checkpoint(Workspace.of(recipe)).problems
    groups = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]["config_groups"]
    hub, common = (rf"re:.*experts\.\d+\.({linears})$" for linears in ("w1|w2|w3", "down_proj|gate_proj|up_proj"))
    assert groups["group_0"]["targets"] == ([hub] if names == "hub" else [hub, common])
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.bfloat16)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.rope_parameters["partial_rotary_factor"] == 0.5
    for layer, module in enumerate(model.model.layers):
        gate_up, down = stacked(hybrid, f"model.layers.{layer}.", model.config.num_local_experts)
        assert torch.equal(module.mlp.experts.gate_up_proj, gate_up.to(torch.bfloat16))
        assert torch.equal(module.mlp.experts.down_proj, down.to(torch.bfloat16))


MEASURE = """
import sys
from mmq.stages.pipeline import run_stages
from mmq.recipe import load
from mmq.source.synth import Sizes, write_checkpoint, write_samples
from mmq.workdir.workspace import Workspace
from pathlib import Path
run_stages(Workspace.of(load(Path(sys.argv[1]))), sys.argv[2].split(","))
print(int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024)
"""


@cpu_only
def test_memory_is_bounded_by_a_layer_and_not_by_the_model(tmp_path: Path) -> None:
    """Nine more layers must not take as much memory as half of them, in any stage."""
    peaks = {}
    for layers in (3, 12):
        folder = tmp_path / str(layers)
        # 19 MB a layer in bf16; one shard holds about half a layer.
        write_checkpoint(folder / "source", Sizes(layers, 256, 256, 48), shards=2 * layers)
        write_samples(folder / "samples.jsonl", 12)
        recipe = write_recipe(folder, memory_budget=2**24, n_grid=3)
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, recipe, "dequant,awq,restore"],
            capture_output=True,
            text=True,
            check=True,
            # oneDNN keeps up to 1024 compiled kernels, one for each number of rows it meets: bounded, but not yet full.
            env=os.environ | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"},
        )
        peaks[layers] = int(run.stdout)
        size = Checkpoint.open(folder / "run/bf16").nbytes / layers
    assert peaks[12] - peaks[3] < 9 * size / 2, f"{peaks} with {size / 1e6:.0f} MB a layer"


def test_the_synthetic_models_experts_matter(source: tuple[dict[str, Any], Weights]) -> None:
    """Or the comparisons above would prove nothing."""
    config, weights = source
    before = hidden_states(HELD_OUT, weights, config)
    silent = {name: torch.zeros_like(w) if name.endswith("w2.weight") else w for name, w in weights.items()}
    after = hidden_states(HELD_OUT, silent, config)
    assert float((before[-1] - after[-1]).norm()) > 0.1 * float(before[-1].norm())
