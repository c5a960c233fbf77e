"""Every family all the way, in the formats that its releases come in: against a plain forward and transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tests.conftest import DEVICE, SAMPLES, edit_json, write_recipe
from tests.families.forwards import READERS, hidden_states, keys_and_values, logits, normed, through_layer
from tests.reference import Weights, dequantized, divergence, read_folder, round_to_nearest
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from typer.testing import CliRunner

from mmq.cli.app import app
from mmq.errors import CheckpointError
from mmq.families.registry import ARCHITECTURES, architecture_of
from mmq.families.sizes import Dimensions
from mmq.machine.team import ALONE
from mmq.prove.evaluate import evaluate_checkpoint
from mmq.prove.forward import run_layer
from mmq.prove.streamed import EvalSettings
from mmq.prove.verify import verify_checkpoint
from mmq.prove.weights import HybridWeights, SourceWeights, read_layer, take_kv_scales
from mmq.quantize.decoder_layer import DecoderLayer, embed, transformers_config
from mmq.quantize.fisher import SourceLayer, following
from mmq.quantize.head import Head
from mmq.quantize.kv_cache import KvObserver
from mmq.recipe import load
from mmq.report.card import render
from mmq.serve.outputs import output_tensors
from mmq.source.formats import format_of
from mmq.source.synth import STORED, Sizes, model_config, write_checkpoint, write_samples
from mmq.stages.awq_checks import calibration_tokens
from mmq.stages.pipeline import run_stages
from mmq.stages.plan import make_plan
from mmq.storage.checkpoint import Checkpoint
from mmq.tensors.experts_gradient import ERRING
from mmq.workdir.workspace import Workspace

# Kinds of attention whose KV cache gets no scales.
WITHOUT_KV_SCALES = {
    "deepseek_v3": {"full": "vLLM takes no calibrated scales for the latent that this attention caches"},
    "qwen3_next": {"linear": "linear attention has no KV cache"},
    "qwen3_5_moe": {"linear": "linear attention has no KV cache"},
    "qwen3_5_moe_text": {"linear": "linear attention has no KV cache"},
}
# Rotary settings of a model that sees: which of a head's pairs turn by time, height and width.
MROPE = {
    "rope_type": "default",
    "rope_theta": 5000000,
    "partial_rotary_factor": 0.25,
    "mrope_section": [3, 3, 2],
    "mrope_interleaved": True,
}
HALF = {"rope_type": "default", "rope_theta": 5000000, "partial_rotary_factor": 0.5}
# MiniMax-M3's settings as transformers writes them, another layer sparse.
M3_NAMED = {
    "rope_parameters": HALF,
    "moe_layer_freq": None,
    "mlp_layer_types": ["sparse", "dense"],
    "sparse_attention_config": None,
    "layer_types": ["minimax_m3_sparse", "full_attention"],
    "index_n_heads": 2,
    "index_head_dim": 64,
    "index_block_size": 32,
    "index_topk_blocks": 2,
    "index_local_blocks": 1,
}
# Names in the files, as patterns, and what they are looked at by.
PLAIN = {
    "qwen3_5_moe": {r"^model\.language_model\.": "model."},
    "minimax_m3_vl": {
        r"^language_model\.": "",
        r"\.block_sparse_moe\.": ".mlp.",
        r"(\.experts\.\d+)\.w1\.": r"\1.gate_proj.",
        r"(\.experts\.\d+)\.w3\.": r"\1.up_proj.",
        r"(\.experts\.\d+)\.w2\.": r"\1.down_proj.",
    },
}
# What carries over beside the decoder.
BESIDE = ("mtp.", "model.visual.", "vision_tower.", "multi_modal_projector.", "patch_merge_mlp.")
HELD_OUT = torch.arange(4, 100) * 5 % 500


@dataclass(frozen=True)
class Case:
    """A family in a format.

    Attributes:
        seed: of the weights; one with which the samples held back want the norm smoothed.
    """

    family: str
    stored: str
    layers: int = 2
    settings: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    restore: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def plain(self, name: str) -> str:
        """A tensor's name in the files as most families have it."""
        for theirs, ours in PLAIN.get(self.family, {}).items():
            name = re.sub(theirs, ours, name)
        return name

    def read(self, folder: Path) -> tuple[dict[str, Any], Weights]:
        """config.json and all tensors under plain names; of a stack of experts each by itself."""
        config, tensors = read_folder(folder)
        return config, {self.plain(name): tensor for name, tensor in each_expert(tensors).items()}

    @property
    def fp8(self) -> bool:
        return not self.stored.startswith("bf16")

    @property
    def smooths(self) -> bool:
        return self.recipe.get("shared_experts") != "source"

    @property
    def readers(self) -> list[str]:
        """What the norm's scales go into beside the experts."""
        return READERS[self.family] if self.smooths else READERS[self.family][:1]


CASES = {
    "qwen3_moe in bf16": Case("qwen3_moe", "bf16"),
    "qwen3_moe with bf16 scales and a dense layer": Case(
        "qwen3_moe", "fp8-bf16-scales", 3, {"mlp_only_layers": [1], "norm_topk_prob": False}
    ),
    "glm4_moe in fp8, its shared expert scaled": Case("glm4_moe", "fp8", 3, {"attention_bias": False}),
    "glm4_moe in fp8, its shared expert kept": Case(
        "glm4_moe", "fp8", settings={"use_qk_norm": False}, recipe={"shared_experts": "source"}
    ),
    "deepseek_v3 with scales that are powers of two": Case("deepseek_v3", "fp8-powers-of-two", 3),
    "qwen3_moe in compressed-tensors' blocks": Case("qwen3_moe", "ct-block"),
    "glm4_moe by compressed-tensors' channels": Case("glm4_moe", "ct-channel", 3, {"use_qk_norm": False}),
    "qwen3_moe in bf16, attention rounded to fp8": Case("qwen3_moe", "bf16", restore={"attention": "fp8_block"}),
    "deepseek_v3, errors compensated": Case("deepseek_v3", "fp8", 3, recipe={"rounding": "compensated"}),
    "deepseek_v3 without a query latent": Case(
        "deepseek_v3",
        "fp8",
        settings={"q_lora_rank": None, "n_group": 1, "topk_group": 1},
        recipe={"shared_experts": "source"},
    ),
    "qwen3_next in fp8": Case("qwen3_next", "fp8", 3, {"full_attention_interval": 3, "mlp_only_layers": [1]}),
    "qwen3_next in bf16, kinds of layers named": Case(
        "qwen3_next", "bf16", 2, {"layer_types": ["full_attention", "linear_attention"]}
    ),
    "qwen3_5_moe in fp8, beside a vision tower": Case(
        "qwen3_5_moe", "fp8", settings={"full_attention_interval": 2, "rope_parameters": MROPE}
    ),
    "qwen3_5_moe in bf16, experts stacked": Case(
        "qwen3_5_moe", "bf16-stacked", settings={"full_attention_interval": 2}
    ),
    "minimax_m3_vl in bf16, attention rounded to fp8": Case(
        "minimax_m3_vl", "bf16", settings={"rope_parameters": HALF}, restore={"attention": "fp8_block"}
    ),
    "minimax_m3_vl, errors compensated, kinds of layers named": Case(
        "minimax_m3_vl", "bf16", settings=M3_NAMED, recipe={"rounding": "compensated"}, seed=2
    ),
    "qwen3_5_moe of text alone, its shared expert kept": Case(
        "qwen3_5_moe_text", "fp8", settings={"full_attention_interval": 2}, recipe={"shared_experts": "source"}
    ),
    "glm4_moe in bf16, in groups": Case(
        "glm4_moe", "bf16", 3, {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    ),
}


def each_expert(tensors: Weights) -> Weights:
    """Qwen3.5's stacks cut apart: gate rows lie above up rows."""
    result = {}
    for name, tensor in tensors.items():
        above, _, last = name.rpartition(".")
        if tensor.ndim == 3 and last in ("gate_up_proj", "down_proj"):
            linears = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
            for expert, rows in enumerate(tensor):
                parts = zip(linears, rows.chunk(len(linears)), strict=True)
                result |= {f"{above}.{expert}.{linear}.weight": part for linear, part in parts}
        else:
            result[name] = tensor
    return result


@dataclass(frozen=True)
class Made:
    """A project after its stages.

    Attributes:
        config: the decoder's; `raw` is config.json.
    """

    case: Case
    folder: Path
    raw: dict[str, Any]
    source: Weights
    stored: Weights
    hybrid: Weights

    @property
    def config(self) -> dict[str, Any]:
        beside = {key: value for key, value in self.raw.items() if key not in ("text_config", "vision_config")}
        return beside | self.raw.get("text_config", {})

    @property
    def before(self) -> Weights:
        return self.case.read(self.folder / "source")[1]

    def workspace(self) -> Workspace:
        return Workspace.of(load(self.folder / "recipe.yaml"))

    def layers(self) -> Iterator[tuple[int, str, bool]]:
        """Number and prefix of each decoder layer, and whether it has experts."""
        for layer in range(self.case.layers):
            prefix = f"model.layers.{layer}."
            yield layer, prefix, f"{prefix}mlp.gate.weight" in self.source


@pytest.fixture(scope="module", params=CASES.values(), ids=list(CASES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    case: Case = request.param
    folder = tmp_path_factory.mktemp("family")
    write_checkpoint(
        folder / "source",
        Sizes(layers=case.layers),
        case.seed,
        family=ARCHITECTURES[case.family],
        stored=STORED[case.stored],
        settings=case.settings,
        shuffle=True,
    )
    write_samples(folder / "samples.jsonl", SAMPLES)
    recipe = write_recipe(folder, source="fp8", **case.recipe)
    with recipe.open("a", encoding="utf-8") as file:
        yaml.safe_dump({"restore": case.restore}, file)
    run_stages(Workspace.of(load(recipe)), ["awq", "restore"])
    config, before = case.read(folder / "source")
    stored = case.read(folder / "run/hybrid")[1]
    return Made(case, folder, config, dequantized(before), stored, dequantized(stored))


def test_the_plain_forward_is_transformers(made: Made) -> None:
    settings = {key: value for key, value in made.config.items() if key != "quantization_config"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32).eval()
    # transformers has no layers past the last.
    past = (f"model.layers.{made.case.layers}.", *BESIDE)
    state = {name: t for name, t in made.source.items() if ".mlp.experts." not in name and not name.startswith(past)}
    state = as_transformers_has_it(state) if made.case.family == "minimax_m3_vl" else state
    for _, prefix, has_experts in made.layers():
        if has_experts:
            gate, up, down = (stacked(made.source, prefix, name) for name in ("gate", "up", "down"))
            state[f"{prefix}mlp.experts.gate_up_proj"] = torch.cat([gate, up], 1)
            state[f"{prefix}mlp.experts.down_proj"] = down
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        theirs = model(HELD_OUT[None]).logits[0]
    ours = logits(HELD_OUT, made.source, made.config)
    assert float((ours - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())


def as_transformers_has_it(weights: Weights) -> Weights:
    """MiniMax-M3's: gate and up of what is no routed expert in one, the indexer and the router's bias elsewhere."""
    result = {}
    for name, tensor in weights.items():
        if name.endswith("gate_proj.weight"):
            up = weights[name.replace("gate_proj", "up_proj")]
            result[name.replace("gate_proj", "gate_up_proj")] = torch.cat([tensor, up])
        elif not name.endswith("up_proj.weight"):
            name = name.replace("self_attn.index_", "self_attn.indexer.")
            result[name.replace("mlp.e_score", "mlp.gate.e_score")] = tensor
    return result


def stacked(weights: Weights, prefix: str, linear: str) -> torch.Tensor:
    return torch.stack([weights[f"{prefix}mlp.experts.{expert}.{linear}_proj.weight"] for expert in range(8)])


def test_the_streamed_layers_are_the_plain_ones(made: Made) -> None:
    source = made.workspace().source
    arch, weights = source.architecture, SourceWeights(source)
    config = transformers_config(arch, source.config)
    truth = hidden_states(HELD_OUT, made.source, made.config)
    with source.checkpoint.reader() as reader:
        hidden = embed(reader[arch.embedding], HELD_OUT).to(DEVICE)
    for layer, _, has_experts in made.layers():
        content = read_layer(weights, arch, layer, DEVICE)
        decoder = DecoderLayer(arch, config, layer, content.rest, DEVICE)
        assert decoder.has_experts == has_experts
        # From the plain states each time: a choice of experts that bf16 turns over is met once, not for ever.
        found = run_layer(decoder, content, truth[layer].bfloat16().to(DEVICE), [len(HELD_OUT)], 128).float().cpu()
        change, wanted = found - truth[layer], truth[layer + 1] - truth[layer]
        off = (change - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert float(off.median()) < 0.02, layer
    assert hidden.shape == truth[0].shape


def test_the_gradient_through_a_layer_is_autograds(made: Made) -> None:
    source = made.workspace().source
    arch, weights = source.architecture, SourceWeights(source)
    config = transformers_config(arch, source.config)
    truth = hidden_states(HELD_OUT, made.source, made.config)
    generator = torch.Generator().manual_seed(0)
    for layer, _, _ in made.layers():
        leaf = truth[layer].bfloat16().float().requires_grad_()
        given = torch.randn(leaf.shape, generator=generator).bfloat16()
        output = through_layer(leaf, made.source, layer, made.config | {"erring": ERRING})
        (wanted,) = torch.autograd.grad(output, leaf, given.float())
        content = read_layer(weights, arch, layer, DEVICE)
        decoder = DecoderLayer(arch, config, layer, content.rest, DEVICE)
        whole = SourceLayer(decoder, content, [len(HELD_OUT)], ALONE)
        found = whole.back(leaf.detach().bfloat16().to(DEVICE), given.to(DEVICE)).float().cpu()
        # What the layer adds to the gradient that goes past it; its output is that of `run_layer`.
        off = (found - wanted).norm(dim=1) / (wanted - given.float()).norm(dim=1)
        assert float(off.median()) < 0.08, layer
        forward = whole.forward(truth[layer].bfloat16().to(DEVICE))
        assert torch.equal(
            forward, run_layer(decoder, content, truth[layer].bfloat16().to(DEVICE), [len(HELD_OUT)], 128)
        )
    norm, head = (made.source[name] for name in ("model.norm.weight", "lm_head.weight"))
    leaf = truth[-1].bfloat16().float().requires_grad_()
    loss = torch.nn.functional.cross_entropy(
        normed(leaf, norm, made.config)[:-1] @ head.T, HELD_OUT[1:], reduction="sum"
    )
    (wanted,) = torch.autograd.grad(loss, leaf)
    found = Head(arch, config, norm.bfloat16().to(DEVICE), head.bfloat16().to(DEVICE)).gradient(
        truth[-1].bfloat16().to(DEVICE), following(HELD_OUT, [len(HELD_OUT)]).to(DEVICE)
    )
    assert float((found.float().cpu() - wanted).norm() / wanted.norm()) < 0.02
    assert not found[-1].any()


def test_verify_passes_and_what_is_no_expert_has_the_sources_bytes(made: Made) -> None:
    report = verify_checkpoint(made.workspace())
    assert not report.problems
    before = made.before
    smoothed = ("post_attention_layernorm.weight", *made.case.readers)
    kept = [
        name
        for name in before
        if ".experts." not in name and before[name].dtype == torch.float8_e4m3fn and not name.endswith(smoothed)
    ]
    assert bool(kept) == made.case.fp8
    suffix = format_of(made.config).storage.scale_suffix
    for name in kept:
        assert torch.equal(made.stored[name].view(torch.uint8), before[name].view(torch.uint8))
        scale, original = made.stored[f"{name}_scale"], before[f"{name}{suffix}"]
        assert scale.dtype == original.dtype and torch.equal(scale, original)
    for name, tensor in before.items():
        if made.case.restore and re.match(r"model\.layers\.\d+\.self_attn\.", name) and tensor.ndim == 2:
            found = made.hybrid[name]
            # Rounded once, to four bits: half a unit in the last place of a block's largest is 16.
            assert made.stored[name].dtype == torch.float8_e4m3fn
            assert bool(
                ((found - tensor.float()).abs() <= tensor.float().abs() / 16 + tensor.abs().max() / 2**18).all()
            )
            assert not torch.equal(found, tensor.float())
        elif ".experts." not in name and "scale" not in name and name not in kept and not name.endswith(smoothed):
            assert torch.equal(made.stored[name], tensor) and made.stored[name].dtype == tensor.dtype, name


def norms(made: Made, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm before a layer's block, of the source and the hybrid checkpoint."""
    name = prefix + "post_attention_layernorm.weight"
    return made.source[name], made.hybrid[name]


def test_smoothing_alone_leaves_the_logits_unchanged(made: Made) -> None:
    if not made.case.smooths:
        for _, prefix, _ in made.layers():
            norm = prefix + "post_attention_layernorm.weight"
            assert torch.equal(made.source[norm], made.hybrid[norm])
        return
    # What was fp8 and is scaled is rounded to bf16 once, before it is scaled.
    before = made.before
    source = {
        name: tensor.bfloat16().float() if before[name].dtype == torch.float8_e4m3fn else tensor
        for name, tensor in made.source.items()
    }
    smoothed, moved = dict(source), 0.0
    for _, prefix, has_experts in made.layers():
        norm = prefix + "post_attention_layernorm.weight"
        offset = ARCHITECTURES[made.case.family].norm_offset
        applied = (made.source[norm] + offset) / (made.hybrid[norm] + offset)
        if not has_experts:
            assert torch.equal(applied, torch.ones_like(applied))
            continue
        moved = max(moved, float(applied.log().abs().max()))
        smoothed[norm] = made.hybrid[norm]
        for name in (prefix + reader for reader in made.case.readers):
            smoothed[name] = source[name] * applied
            # In the files it is rounded once to what a server holds.
            assert torch.equal(made.hybrid[name], smoothed[name].to(made.stored[name].dtype).float()), name
        for expert in range(made.config[ARCHITECTURES[made.case.family].experts_key]):
            for linear in ("gate_proj", "up_proj"):
                name = f"{prefix}mlp.experts.{expert}.{linear}.weight"
                smoothed[name] = source[name] * applied
    before, after = (logits(HELD_OUT, w, made.config) for w in (source, smoothed))
    assert moved > 0.5, "nothing was smoothed"
    assert float((after - before).abs().max()) < 2e-5 * float(before.abs().max())


def test_verify_sees_a_reader_that_was_not_scaled(made: Made, tmp_path: Path) -> None:
    """Norm x reader, for every reader: each one put back to the source's, in turn."""
    moved = (prefix for _, prefix, _ in made.layers() if not torch.equal(*norms(made, prefix)))
    prefix = next(moved) if made.case.smooths else ""
    for reader in made.case.readers if made.case.smooths else ():
        name, path = next(
            (name, path)
            for path in (made.folder / "run/hybrid").glob("*.safetensors")
            for name in load_file(path)
            if made.case.plain(name) == prefix + reader
        )
        good, tensors = path.read_bytes(), load_file(path)
        tensors[name] = made.source[prefix + reader].to(tensors[name].dtype)
        save_file(tensors, path)
        try:
            problems = verify_checkpoint(made.workspace()).problems
        finally:
            path.write_bytes(good)
        assert any(f"{name} does not undo" in problem for problem in problems), problems


def test_verify_sees_scales_that_were_moved_through_a_clamp(made: Made) -> None:
    """Up's rows doubled and down's columns halved: what other families' smoothing may do, and this one's must not."""
    if made.case.family != "minimax_m3_vl" or made.case.recipe:
        return
    ups = [name for name in made.stored if name.endswith("up_proj.weight_scale") and ".experts." in name]
    moved = dict.fromkeys(ups, 2.0) | dict.fromkeys((name.replace("up_proj", "down_proj") for name in ups), 0.5)
    good = {path: path.read_bytes() for path in (made.folder / "run/hybrid").glob("*.safetensors")}
    for path in good:
        tensors = load_file(path)
        factors = {name: factor for name in tensors if (factor := moved.get(made.case.plain(name)))}
        save_file(tensors | {name: tensors[name] * factor for name, factor in factors.items()}, path)
    try:
        problems = verify_checkpoint(made.workspace()).problems
    finally:
        for path, content in good.items():
            path.write_bytes(content)
    assert len(moved) == 16 and sum(".w3: " in problem for problem in problems) == 8, problems


def test_the_hybrid_is_much_closer_to_the_source_than_round_to_nearest(made: Made, tmp_path: Path) -> None:
    source = dequantized(made.before)
    nearest = {name: round_to_nearest(tensor) if ".experts." in name else tensor for name, tensor in source.items()}
    tokenizer = AutoTokenizer.from_pretrained(made.folder / "source")
    write_samples(tmp_path / "held-out.jsonl", 16, seed=1)
    lines = [json.loads(line) for line in (tmp_path / "held-out.jsonl").read_text().splitlines()]
    texts = [torch.tensor(tokenizer(line["text"])["input_ids"]) for line in lines if "text" in line]
    truth = [logits(ids, source, made.config) for ids in texts]
    # What rounding attention adds is no merit or fault of the experts'.
    rounded = {name: tensor for name, tensor in source.items() if made.case.restore and ".self_attn." in name}
    ours, theirs = (
        sum(divergence(t, logits(ids, w, made.config)) for t, ids in zip(truth, texts, strict=True))
        for w in (made.hybrid | rounded, nearest)
    )
    assert ours < (0.75 if made.case.smooths else 1) * theirs, f"KL {ours:.4f} against {theirs:.4f} of round-to-nearest"


def test_no_scales_where_no_server_takes_them(made: Made) -> None:
    """And it is said why, in the statistics, the plan and the card."""
    reasons = WITHOUT_KV_SCALES.get(made.case.family, {})
    records = json.loads((made.folder / "run/state/awq/layers.json").read_text(encoding="utf-8"))
    for layer, prefix, _ in made.layers():
        kind = "linear" if f"{prefix}linear_attn.A_log" in made.source else "full"
        assert (f"{prefix}self_attn.k_scale" in made.stored) == (kind not in reasons)
        assert reasons.get(kind, "") in records[layer].get("no_kv_scales", "")
        assert bool(records[layer]["kv_scales"]) == (kind not in reasons)
    scheme = json.loads((made.folder / "run/hybrid/config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert bool(scheme) == ("full" not in reasons)
    plan, card = CliRunner().invoke(app, ["plan", str(made.folder / "recipe.yaml")]), render(made.workspace())
    for reason in reasons.values():
        assert reason in " ".join(plan.output.split()) and reason in card


def test_kv_scales_cover_keys_after_rotary_and_values(made: Made) -> None:
    if "model.layers.0.self_attn.k_scale" not in made.stored:
        return
    tokens = calibration_tokens(made.workspace())
    largest = {"k_scale": 0.0, "v_scale": 0.0}
    for ids in tokens.ids.split(tokens.lengths):
        x = made.hybrid["model.embed_tokens.weight"][ids]
        x = normed(x, made.hybrid["model.layers.0.input_layernorm.weight"], made.config)
        for name, tensor in zip(largest, keys_and_values(x, made.hybrid, "model.layers.0.", made.config), strict=True):
            largest[name] = max(largest[name], float(tensor.abs().max()))
    for name, value in largest.items():
        # The observers see bf16 activations.
        assert float(made.stored[f"model.layers.0.self_attn.{name}"]) == pytest.approx(value / 448, rel=0.02)


def test_kv_scales_are_of_attention_as_it_is_served(made: Made) -> None:
    """Bit for bit what is observed in the result's own first layer, rounded or not."""
    arch, checkpoint = architecture_of(made.raw), Checkpoint.open(made.folder / "run/hybrid")
    content = read_layer(HybridWeights(checkpoint, arch), arch, 0, DEVICE)
    scheme = made.workspace().kv_cache_scheme
    if not (scales := take_kv_scales(arch, content)):
        return
    assert scheme is not None
    decoder = DecoderLayer(arch, transformers_config(arch, checkpoint.config), 0, content.rest, DEVICE)
    observer, tokens = KvObserver(decoder, scheme.model_dump()), calibration_tokens(made.workspace())
    with checkpoint.reader() as reader:
        decoder.attend(embed(reader[arch.embedding], tokens.ids).to(DEVICE), tokens.lengths)
    assert observer.scales() == scales


def test_transformers_loads_the_hybrid_checkpoint(made: Made) -> None:
    kind = AutoModelForImageTextToText if "vision_config" in made.raw else AutoModelForCausalLM
    model, info = kind.from_pretrained(made.folder / "run/hybrid", output_loading_info=True, dtype=torch.bfloat16)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    # The KV cache's scales have no place there where attention's class is not one that compressed-tensors fits with it.
    past = f"model.layers.{made.case.layers}."
    known = ("k_scale", "v_scale")
    assert not [name for name in info["unexpected_keys"] if not name.endswith(known) and not name.startswith(past)]
    for layer, prefix, has_experts in made.layers():
        if has_experts:
            down = getattr(model.model, "language_model", model.model).layers[layer].mlp.experts.down_proj
            assert torch.equal(down, stacked(made.hybrid, prefix, "down").to(torch.bfloat16))


@pytest.mark.parametrize("form", ["source", "awq", "hybrid"])
def test_the_plans_tensors_are_those_of_the_shards(made: Made, form: Any) -> None:
    arch = architecture_of(made.raw)
    dims = Dimensions.of(made.raw, arch)
    folder = made.folder / ("source" if form == "source" else f"run/{form}")
    found = each_expert(read_folder(folder)[1])
    for tensors in output_tensors(load(made.folder / "recipe.yaml"), made.raw, arch, form):
        layers = range(dims.layers) if tensors.in_layer else range(1)
        experts = range(dims.experts) if "{expert}" in tensors.name else range(1)
        names = {tensors.name.format(layer=layer, expert=expert) for layer in layers for expert in experts}
        own = [found.pop(name) for name in names if name in found]
        assert len(own) == tensors.count and {tuple(tensor.shape) for tensor in own} == {tensors.shape}
        # config.json does not say what dtype the scales have; F32 is planned with.
        if not tensors.name.endswith(("_scale_inv", "_scale")):
            assert sum(tensor.nbytes for tensor in own) == tensors.nbytes, tensors.name
    assert not found


def test_the_plan_and_the_card_tell_of_it(made: Made) -> None:
    value = make_plan(load(made.folder / "recipe.yaml"))
    parameters = {entry["component"]: entry["parameters"] for entry in value["components"]}
    assert parameters["total"] == sum(tensor.numel() for tensor in made.source.values())
    assert ("dense layers" in parameters) == any(not has_experts for _, _, has_experts in made.layers())
    verify_checkpoint(made.workspace())
    card = render(made.workspace())
    assert f"{parameters['experts']:,}" in card
    assert ("attention in fp8" in card) == (made.case.fp8 or bool(made.case.restore))
    assert ("rounded to block fp8" in card) == bool(made.case.restore)
    assert ("scaled with the norm that they read" in card) == ("shared experts" in parameters and made.case.smooths)
    assert ("the norm that they read is not smoothed" in card) == (not made.case.smooths)
    records = json.loads((made.folder / "run/state/awq/layers.json").read_text(encoding="utf-8"))
    clamped = {"not_smoothed" in record["down"] for record in records if "down" in record}
    assert clamped == {made.case.family == "minimax_m3_vl"}
    assert ("up is clamped before down reads it" in card) == clamped.pop()


def test_the_dequantized_folder_leads_to_the_same_bytes(made: Made) -> None:
    recipe = load(made.folder / "recipe.yaml", ["work_dir=by-way-of-bf16", "awq.source=bf16"])
    run_stages(Workspace.of(recipe), ["dequant", "awq", "restore"])
    for path in (made.folder / "run/hybrid").glob("*"):
        assert (made.folder / "by-way-of-bf16/hybrid" / path.name).read_bytes() == path.read_bytes(), path.name
    bf16 = made.case.read(made.folder / "by-way-of-bf16/bf16")[1]
    assert bf16.keys() == made.source.keys()
    for name, tensor in bf16.items():
        assert torch.equal(tensor.float(), made.source[name].to(tensor.dtype).float()), name


def test_eval_compares_it_with_its_source(made: Made) -> None:
    workspace = made.workspace()
    settings = EvalSettings(str(made.folder / "samples.jsonl"), 6)
    variants = {entry["variant"]: entry for entry in evaluate_checkpoint(workspace, settings)["variants"]}
    assert variants["source"]["kl"] == 0 < variants["hybrid"]["kl"]
    cached = [entry["kl"] for name, entry in variants.items() if "KV" in name]
    assert bool(cached) == any(name.endswith("k_scale") for name in made.stored)
    assert variants["hybrid"]["kl"] not in cached


def test_a_recipe_finds_family_and_format(made: Made, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    config = tmp_path / "source/config.json"

    def init() -> Any:
        config.parent.joinpath("recipe.yaml").unlink(missing_ok=True)
        return CliRunner().invoke(
            app, ["recipe", "init", str(config.parent / "recipe.yaml"), "--source", str(config.parent)]
        )

    config.write_text(json.dumps(made.raw), encoding="utf-8")
    assert f"{made.case.family} in {format_of(made.config).name}" in init().output
    assert load(config.parent / "recipe.yaml").model.source == str(config.parent)
    edit_json(config, lambda content: content.update(model_type="gpt2", architectures=["GPT2LMHeadModel"]))
    said = init()
    assert said.exit_code == 2 and "'gpt2' is not supported" in said.output
    assert not (config.parent / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("mlp_only_layers", "all", "mlp_only_layers is no list of layers"),
        ("mlp_only_layers", [0, "1"], "mlp_only_layers is no list of layers"),
        ("mlp_only_layers", [0, 1], "no layer has experts"),
        ("decoder_sparse_step", 0, "decoder_sparse_step is 0"),
        ("decoder_sparse_step", True, "decoder_sparse_step is no number of layers"),
    ],
)
def test_what_decides_over_layers_and_is_none_is_refused(key: str, value: Any, words: str) -> None:
    config = model_config(Sizes(), ARCHITECTURES["qwen3_moe"]) | {key: value}
    with pytest.raises(CheckpointError, match=words):
        Dimensions.of(config, architecture_of(config))
