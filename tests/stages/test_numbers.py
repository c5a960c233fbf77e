"""Numbers at the edge: zeros, denormals, huge values, NaN. A run ends with finite tensors that verify, or by name."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.test_cli import refused, succeed
from conftest import DEVICE, digests, write_recipe
from mmq.families.minimax_m2 import MINIMAX_M2
from mmq.quantize.decoder_layer import DecoderLayer, transformers_config
from mmq.quantize.kv_cache import KvObserver
from mmq.recipe import KvCacheScheme, load
from mmq.source.synth import Sizes, model_config, write_checkpoint
from mmq.stages.awq_checks import calibration_tokens
from mmq.tensors.int4 import fake_quantize_scaled, fits, quantize_stack
from mmq.workdir.workspace import Workspace
from reference import dequantized, read_folder
from stages.test_resume import stopped
from storage.test_storage import edit_tensors

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Any]

FP8 = torch.float8_e4m3fn
LAYER = "model.layers.0."
MOE, ATTENTION = f"{LAYER}block_sparse_moe.", f"{LAYER}self_attn."
EXPERTS = f"{MOE}experts."
NORM, ROUTER, BIAS = f"{LAYER}post_attention_layernorm.weight", f"{MOE}gate.weight", f"{MOE}e_score_correction_bias"
EMBEDDING = "model.embed_tokens.weight"
HUGE = 3e38
TOP_K = 2


def edit(prefix: str, change: Callable[[torch.Tensor], torch.Tensor], suffix: str = ".weight") -> Change:
    """Change tensors by prefix and suffix; fp8 ones as their codes' values."""

    def apply(tensors: Tensors) -> None:
        chosen = [name for name in tensors if name.startswith(prefix) and name.endswith(suffix)]
        assert chosen
        for name in chosen:
            wide = tensors[name].to(torch.float32) if tensors[name].dtype == FP8 else tensors[name].clone()
            tensors[name] = change(wide).to(tensors[name].dtype)

    return apply


def scales(prefix: str, value: float) -> Change:
    return edit(prefix, lambda scale: torch.full_like(scale, value), ".weight_scale_inv")


def fill(value: float, *where: slice) -> Callable[[torch.Tensor], torch.Tensor]:
    """Set a part of a tensor."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[where or ...] = value
        return tensor

    return change


def both(*changes: Change) -> Change:
    return lambda tensors: [change(tensors) for change in changes]


@pytest.fixture
def small(tmp_path: Path, pristine: Path) -> Path:
    """A project with one layer."""
    write_checkpoint(tmp_path / "source", Sizes(layers=1), shards=2)
    (tmp_path / "samples.jsonl").write_bytes((pristine / "samples.jsonl").read_bytes())
    return tmp_path


def run(project: Path, **fields: Any) -> tuple[dict[str, Any], Tensors]:
    """All stages and the verification; the first layer's statistics and the result's tensors."""
    recipe = write_recipe(project, **{"source": "fp8", "n_grid": 6} | fields)
    for stage in ("awq", "restore", "verify"):
        succeed(stage, recipe, "--quiet")
    layers = json.loads((project / "run/state/awq/layers.json").read_text(encoding="utf-8"))
    return layers[0], read_folder(project / "run/hybrid")[1]


def assert_sound(tensors: Tensors) -> None:
    """Finite as stored and when dequantized in bf16, with scales that can be divided by."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            assert torch.isfinite(tensor.float()).all(), name
        if name.endswith("weight_scale") and ".experts." in name:
            assert (tensor >= torch.finfo(torch.bfloat16).tiny).all(), name
            assert torch.isfinite(tensor * -8).all(), name
        if name.endswith(("k_scale", "v_scale")):
            assert tensor.shape == (1,) and torch.isfinite(1 / tensor).all() and tensor > 0, name
    for name, tensor in dequantized(tensors).items():
        assert torch.isfinite(tensor.bfloat16()).all(), name


SOUND: dict[str, Change] = {
    "zero groups": edit(f"{EXPERTS}0.w1", fill(0, slice(None), slice(0, 128))),
    "zero up rows": edit(f"{EXPERTS}0.w3", fill(0, slice(3, 9))),
    "zero down columns": edit(f"{EXPERTS}0.w2", fill(0, slice(None), slice(3, 9))),
    "zero experts": both(edit(f"{EXPERTS}0.", fill(0)), scales(f"{EXPERTS}5.", 0.0)),
    "zero up": edit(f"{EXPERTS}0.w3", fill(0)),
    "all experts zero": edit(EXPERTS, fill(0)),
    "attention zero": both(edit(f"{ATTENTION}v_proj", fill(0)), edit(f"{ATTENTION}o_proj", fill(0))),
    "keys zero": edit(f"{ATTENTION}k_proj", fill(0)),
    "key norm zero": edit(f"{ATTENTION}k_norm", fill(0)),
    "input norm zero": edit(f"{LAYER}input_layernorm", fill(0)),
    "norm zero": edit(NORM, fill(0), ""),
    "norm partly zero": edit(NORM, fill(0, slice(5, 40)), ""),
    "norm partly denormal": edit(NORM, fill(3e-40, slice(80, 99)), ""),
    "norm partly negative": edit(NORM, lambda norm: torch.where(torch.arange(norm.numel()) % 3 == 0, -norm, norm), ""),
    "router zero": edit(ROUTER, fill(0), ""),
    "embeddings zero": edit(EMBEDDING, fill(0), ""),
    "embeddings denormal": edit(EMBEDDING, lambda table: table * 1e-38, ""),
    "embeddings huge": edit(EMBEDDING, lambda table: table.sign() * HUGE, ""),
    "equal weights": both(edit(EXPERTS, fill(1)), scales(EXPERTS, 0.01)),
    "equal negative weights": both(edit(EXPERTS, fill(-1)), scales(EXPERTS, 0.01)),
    "denormal scales": scales(EXPERTS, 1e-40),
    "denormal scales of one up": scales(f"{EXPERTS}0.w3", 1e-40),
    "denormal scales of one gate": scales(f"{EXPERTS}0.w1", 1e-40),
    "denormal scales of one down": scales(f"{EXPERTS}0.w2", 2e-41),
    "denormal scales of keys and values": both(scales(f"{ATTENTION}k", 1e-41), scales(f"{ATTENTION}v", 1e-41)),
    "negative scales": edit(EXPERTS, lambda scale: -scale, ".weight_scale_inv"),
    "huge gates": scales(f"{EXPERTS}0.w1", 1e20),
    "huge downs": scales(f"{EXPERTS}0.w2", 1e25),
    "huge values": scales(f"{ATTENTION}v", 1e30),
    "huge keys": edit(f"{ATTENTION}k_norm", lambda norm: norm * 1e30),
}  # fmt: skip


@pytest.mark.parametrize("case", SOUND)
def test_odd_numbers_end_in_a_sound_checkpoint(small: Path, case: str) -> None:
    edit_tensors(small / "source", SOUND[case])
    statistics, tensors = run(small)
    assert_sound(tensors)
    assert statistics["excluded_samples"] == []


FATAL: dict[str, tuple[Change, str]] = {
    "NaN in the bias": (edit(BIAS, fill(float("nan"), slice(0, 1)), ""), f"{BIAS} holds NaN"),
    "NaN in the head": (edit("lm_head", fill(float("nan"), slice(0, 1))), "lm_head.weight holds NaN"),
    "a product beyond bf16": (
        scales(f"{EXPERTS}0.w2", HUGE),
        f"{EXPERTS}0.w2.weight times {EXPERTS}0.w2.weight_scale_inv is beyond bf16's range",
    ),
    "experts overflow": (
        scales(EXPERTS, 1e30),
        "the output of layer 0's experts is NaN or infinite for calibration samples 1, 2, 3, 4, 5, 6, 7, 8 and 4 more",
    ),
    "the norm overflows": (edit(NORM, fill(HUGE), ""), "the input of layer 0's experts is NaN or infinite for"),
    # 8 steps of max / 7.5 are more than bf16 holds. No token goes there, so that nothing else is wrong.
    "an unused expert too large for int4": (
        both(scales(f"{EXPERTS}3.w2", 3.3e38 / 448), edit(f"{EXPERTS}3.w2", fill(448, slice(0, 1))),
             edit(BIAS, fill(-100, slice(3, 4)), "")),
        f"{EXPERTS}3.w2.weight holds values too large for int4 with a bf16 scale",
    ),
}  # fmt: skip


@pytest.mark.parametrize("nonfinite", ["error", "exclude"])
@pytest.mark.parametrize("case", FATAL)
def test_what_can_not_be_quantized_is_named(small: Path, case: str, nonfinite: str) -> None:
    """Whatever the recipe says: the checkpoint is broken, or no sample is left."""
    change, message = FATAL[case]
    edit_tensors(small / "source", change)
    calibration = {"files": [{"path": "samples.jsonl"}], "sequence_length": 96, "nonfinite": nonfinite}
    recipe = write_recipe(small, source="fp8", n_grid=3, min_tokens=0, calibration=calibration)
    said = refused("run", recipe, "--quiet")
    assert message in said
    if "calibration sample" in said:
        assert said.endswith("no calibration sample is left" if nonfinite == "exclude" else "leaves such samples out")


@pytest.mark.parametrize("minimum", [0, 64])
def test_an_expert_without_tokens(small: Path, minimum: int) -> None:
    edit_tensors(small / "source", edit(BIAS, fill(-100, slice(3, 5)), ""))
    statistics, tensors = run(small, min_tokens=minimum)
    assert statistics["tokens_per_expert"][3:5] == [0, 0]
    assert statistics["topped_up"][3:5] == [minimum, minimum]
    if not minimum:
        assert statistics["down"]["ratio"][3:5] == [0, 0]
    assert_sound(tensors)


def test_losses_beyond_fp32_are_no_numbers(small: Path) -> None:
    """JSON has no infinity; without a finite loss the layer keeps scales of 1."""
    edit_tensors(small / "source", SOUND["huge downs"])
    statistics, _ = run(small)
    assert statistics["loss_round_to_nearest"] is None and statistics["loss_chosen"] is None
    assert statistics["identity_kept"] is True
    errors = statistics["down"]["identity_error"]
    assert errors[0] is None and all(error > 0 for error in errors[1:])


@pytest.mark.parametrize("largest", [1e-45, 3e-40, 1e-39, 6e-39, 1e-38, 8e-38, 2e-37])
def test_group_scales_are_never_denormal(largest: float) -> None:
    weight = torch.linspace(-largest, largest, 128).view(1, 1, 128)
    stack = quantize_stack(weight.clone(), 128)
    assert float(stack.scale) >= torch.finfo(torch.bfloat16).tiny
    difference = stack.dequantize(torch.float32).double() - weight.double()
    # Half a step, but for the end that 7 codes do not reach.
    assert float(difference.abs().max()) <= 0.52 * float(stack.scale)
    assert torch.isfinite(fake_quantize_scaled(weight, torch.ones(128), 128)).all()


def test_what_int4_holds_in_bf16() -> None:
    most = torch.finfo(torch.bfloat16).max
    for largest, wanted in ((most * 0.93, True), (most, False), (float("inf"), False)):
        assert fits(quantize_stack(torch.full((1, 1, 128), largest), 128).scale) is wanted


# One sample alone becomes NaN: a token that no other sample holds is the only one with anything in one channel of the
# embeddings, and what reads that channel multiplies it by a huge, finite number.
FLAG = 255
BROKEN = 5
HERE = slice(FLAG, FLAG + 1)
UNTOUCHED = edit(f"{ATTENTION}o_proj", fill(0, HERE))
POISONS: dict[str, tuple[Change, str]] = {
    "attention": (edit(f"{LAYER}input_layernorm", fill(HUGE, HERE)), "keys or values of layer 0 are"),
    "input": (
        both(UNTOUCHED, edit(NORM, fill(HUGE, HERE), "")),
        "the input of layer 0's experts is",
    ),
    "experts": (
        both(UNTOUCHED, edit(NORM, fill(2e37, HERE), "")),
        "the output of layer 0's experts is",
    ),
}  # fmt: skip


def special_token(project: Path) -> int:
    """A token that only sample BROKEN holds, in its second half."""
    tokens = calibration_tokens(Workspace.of(load(project / "recipe.yaml")))
    parts = [set(part.tolist()) for part in tokens.ids.split(tokens.lengths)]
    own = parts[BROKEN - 1] - set().union(*(part for number, part in enumerate(parts, 1) if number != BROKEN))
    return min(own)


def poisoned(project: Path, change: Change, **calibration: Any) -> Path:
    """A project whose sample BROKEN becomes NaN or infinite in layer 0."""
    lines = (project / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    sample = json.loads(lines[BROKEN - 1])
    assert "text" in sample
    lines[BROKEN - 1] = json.dumps({"text": "some words ~ and more words"})
    (project / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {"files": [{"path": "samples.jsonl"}], "sequence_length": 96} | calibration
    recipe = write_recipe(project, source="fp8", n_grid=5, calibration=settings)
    token = special_token(project)

    def flag(tensors: Tensors) -> None:
        tensors[EMBEDDING][:, FLAG] = 0
        tensors[EMBEDDING][token, FLAG] = 64

    edit_tensors(project / "source", both(flag, change))
    return recipe


@pytest.mark.parametrize("case", POISONS)
def test_a_sample_that_becomes_nan_is_named_or_left_out(project: Path, case: str) -> None:
    """The result is, byte for byte, that of a calibration without the sample."""
    change, message = POISONS[case]
    recipe = poisoned(project, change)
    said = refused("awq", recipe, "--quiet")
    assert f"{message} NaN or infinite for calibration sample {BROKEN};" in said
    # The remedy that the message names needs no restart.
    output = succeed("awq", recipe, "--set", "awq.calibration.nonfinite=exclude")
    assert f"layer 0 leaves out the calibration samples {BROKEN}" in " ".join(output.split())
    layers = json.loads((project / "run/state/awq/layers.json").read_text(encoding="utf-8"))
    assert [layer["excluded_samples"] for layer in layers] == [[BROKEN], []]
    lines = (project / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    del lines[BROKEN - 1]
    (project / "samples.jsonl").write_text("\n".join(lines), encoding="utf-8")
    succeed("awq", recipe, "--quiet", "--set", "work_dir=without")
    assert digests(project / "run/awq") == digests(project / "without/awq")


def test_a_run_that_left_samples_out_is_resumed_without_them(project: Path) -> None:
    recipe = poisoned(project, POISONS["experts"][0], nonfinite="exclude")
    succeed("awq", recipe, "--quiet", "--set", "work_dir=whole")
    # Killed while the second layer is written.
    code, _ = stopped(project, "awq", "replace", 8)
    assert code == -signal.SIGKILL
    record = json.loads((project / "run/state/awq/layer-00000.json").read_text(encoding="utf-8"))
    assert record["excluded_samples"] == [BROKEN]
    assert not (project / "run/state/awq/layers.json").exists()
    said = refused("awq", recipe, "--quiet", "--set", "awq.calibration.nonfinite=error")
    assert f"left out the calibration samples {BROKEN}" in said and "awq.calibration.nonfinite" in said
    succeed("awq", recipe, "--quiet")
    assert digests(project / "run/awq") == digests(project / "whole/awq")


def test_infinite_keys_are_found_where_attention_hides_them() -> None:
    """A key of minus infinity gets no attention, and the output stays finite; only the cache's scale would not."""
    config = model_config(Sizes(layers=1, heads=1, kv_heads=1, hidden=128, head_dim=128))
    generator = torch.Generator().manual_seed(0)
    layer = DecoderLayer(
        MINIMAX_M2,
        transformers_config(MINIMAX_M2, config),
        0,
        {
            # Channel 1 of every token is 1 and makes the query's last dimension positive; channel 0 is the flag, whose
            # key in that dimension is minus infinity once its norm is applied.
            "self_attn.q_proj.weight": last_row(1, 1.0),
            "self_attn.k_proj.weight": last_row(0, -1.0) + 1e-3 * not_last(generator),
            "self_attn.v_proj.weight": 0.1 * torch.randn(128, 128, generator=generator).bfloat16(),
            "self_attn.o_proj.weight": 0.1 * torch.randn(128, 128, generator=generator).bfloat16(),
            "self_attn.q_norm.weight": torch.ones(128).bfloat16(),
            "self_attn.k_norm.weight": torch.cat([torch.ones(127), torch.tensor([HUGE])]).bfloat16(),
            "input_layernorm.weight": torch.ones(128).bfloat16(),
            "post_attention_layernorm.weight": torch.ones(128).bfloat16(),
            MINIMAX_M2.router: torch.zeros(8, 128),
            "block_sparse_moe.e_score_correction_bias": torch.zeros(8),
        },
        DEVICE,
    )
    hidden = torch.randn(20, 128, generator=generator).bfloat16()
    hidden[:, 0], hidden[:, 1] = 0, 1
    hidden[12, 0] = 30
    observer = KvObserver(layer, KvCacheScheme().model_dump())
    lengths = [5, 10, 5]
    residual = layer.attend(hidden.to(DEVICE), lengths)
    assert torch.isfinite(residual).all()
    assert observer.broken(lengths) == [1]


def last_row(channel: int, value: float) -> torch.Tensor:
    """A projection [128, 128] of one channel onto the last dimension."""
    weight = torch.zeros(128, 128)
    weight[-1, channel] = value
    return weight.bfloat16()


def not_last(generator: torch.Generator) -> torch.Tensor:
    """A random projection [128, 128] that leaves the last dimension alone."""
    weight = torch.randn(128, 128, generator=generator)
    weight[-1] = 0
    return weight.bfloat16()
