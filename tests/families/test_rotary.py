"""Rotary settings in every form that published configs have: what is read, calibrated with, written out and refused."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.minimax_m2.configuration_minimax_m2 import MiniMaxM2Config

from conftest import edit_json
from mmq.errors import CheckpointError
from mmq.families.minimax_m2 import MINIMAX_M2
from mmq.families.rotary import largest_position, rope_parameters
from mmq.prove.forward import run_layer
from mmq.quantize.decoder_layer import DecoderLayer, transformers_config
from mmq.quantize.head import Head
from mmq.quantize.layer import LayerContent
from reference import dequantized, divergence, frequencies, keys_and_values, logits, read_folder, rms_norm

PLAIN: dict[str, Any] = {
    "head_dim": 128,
    "hidden_size": 512,
    "num_attention_heads": 4,
    "rotary_dim": 64,
    "rope_theta": 5000000,
    "max_position_embeddings": 4096,
}
LONG = {
    "short_factor": [1 + i / 100 for i in range(32)],
    "long_factor": [1 + i for i in range(32)],
    "original_max_position_embeddings": 1024,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn of no origin": {"factor": 4.0},
    "yarn with an attention factor": {"factor": 4.0, "original_max_position_embeddings": 1024, "attention_factor": 0.8},
    "yarn with mscale": {
        "factor": 40,
        "original_max_position_embeddings": 1024,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "beta_fast": 24,
        "beta_slow": 2,
        "truncate": False,
    },
    "longrope": LONG,
    "longrope with a factor": LONG | {"factor": 2.0, "attention_factor": 1.1},
    "llama3": LLAMA3,
    "proportional": {},
}


def hub_form(name: str, form: str, partial: str) -> dict[str, Any]:
    """A config.json in one of the published forms."""
    kind, scaling = name.split()[0], SCALINGS[name]
    config = {key: value for key, value in PLAIN.items() if key != "rotary_dim"}
    config |= {"rotary_dim": 64} if partial == "rotary_dim" else {"partial_rotary_factor": 0.5}
    if form == "rope_parameters":
        theta = {"rope_theta": config.pop("rope_theta")}
        return config | {"rope_parameters": {"rope_type": kind, **theta, **scaling}}
    return config | {"rope_scaling": {form: kind, **scaling}}


def cos_sin(config: Any, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """MiniMax-M2's rotary module, as a layer calls it: [length, turning] each."""
    module = MINIMAX_M2.transformers_class(MINIMAX_M2.rotary_class)(config)
    cos, sin = module(torch.zeros(1, length, 1), torch.arange(length)[None])
    return cos[0], sin[0]


@pytest.mark.parametrize("partial", ["rotary_dim", "partial_rotary_factor"])
@pytest.mark.parametrize("form", ["rope_parameters", "rope_type", "type"])
@pytest.mark.parametrize("name", SCALINGS)
def test_every_form_turns_as_transformers_own_config_does(name: str, form: str, partial: str) -> None:
    """Against another model's config class and rotary module, given the settings in its newest form, below
    and above the positions of pretraining."""
    ours = transformers_config(MINIMAX_M2, hub_form(name, form, partial))
    kind = name.split()[0]
    theirs = LlamaConfig(
        head_dim=128,
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": kind, "rope_theta": 5000000, "partial_rotary_factor": 0.5} | SCALINGS[name],
    )
    other = LlamaRotaryEmbedding(theirs)
    for length in (200, 2000, 5000, 200):
        expected = other(torch.zeros(1, length, 1), torch.arange(length)[None])
        found = cos_sin(ours, length)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b[0])
    assert found[0].shape[-1] == (128 if kind == "proportional" else 64)


@pytest.mark.parametrize("name", ["linear", "yarn", "llama3", "plain"])
def test_angles_are_the_papers_formulas(name: str) -> None:
    config = PLAIN if name == "plain" else PLAIN | {"rope_scaling": {"type": name, **SCALINGS[name]}}
    per_position, scale = frequencies(config)
    angles = torch.arange(300)[:, None].double() * per_position.double()
    cos, sin = cos_sin(transformers_config(MINIMAX_M2, config), 300)
    for found, expected in ((cos, angles.cos() * scale), (sin, angles.sin() * scale)):
        assert torch.allclose(found, expected.repeat(1, 2).float(), atol=1e-4)
    if name != "plain":
        assert not torch.allclose(per_position, frequencies(PLAIN)[0], rtol=0.1)


def test_dynamic_and_longrope_are_their_formulas() -> None:
    """NTK's base grows with the sequence; longrope divides each frequency and scales by the root of its logarithms."""
    config = transformers_config(MINIMAX_M2, hub_form("dynamic", "type", "rotary_dim"))
    base = 5000000 * (4 * 6000 / 4096 - 3) ** (64 / 62)
    cos, _ = cos_sin(config, 6000)
    angle = 5999 * base ** (-2 * torch.arange(32, dtype=torch.float64) / 64)
    assert torch.allclose(cos[5999, :32].double(), angle.cos(), atol=2e-3)
    config = transformers_config(MINIMAX_M2, hub_form("longrope", "type", "rotary_dim"))
    for length, factors in ((500, LONG["short_factor"]), (2000, LONG["long_factor"])):
        cos, _ = cos_sin(config, length)
        angle = (length - 1) * 5000000 ** (-torch.arange(32).double() / 32) / torch.tensor(factors).double()
        scale = math.sqrt(1 + math.log(4) / math.log(1024))
        assert torch.allclose(cos[-1, :32].double(), angle.cos() * scale, atol=2e-3)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("form", ["rope_parameters", "rope_type", "type"])
def test_what_was_read_is_read_again(name: str, form: str) -> None:
    """The outputs' config.json has both sections beside the source's keys."""
    config = hub_form(name, form, "rotary_dim")
    written = rope_parameters(config, MINIMAX_M2)
    both = config | {"rope_parameters": written, "rope_scaling": written}
    assert rope_parameters(both, MINIMAX_M2) == written
    assert written["rope_type"] == name.split()[0] and written["partial_rotary_factor"] == 0.5
    assert all(written[key] == value for key, value in SCALINGS[name].items())


def test_the_base_is_transformers_where_none_is_given() -> None:
    config = {key: value for key, value in PLAIN.items() if key != "rope_theta"}
    assert rope_parameters(config, MINIMAX_M2)["rope_theta"] == MiniMaxM2Config().rope_parameters["rope_theta"]


def test_a_share_gives_back_the_dimensions_it_came_from() -> None:
    """int(44 * (30 / 44)) is 29."""
    for head in range(2, 257, 2):
        for turning in range(2, head + 1, 2):
            given = rope_parameters({"head_dim": head, "rotary_dim": turning}, MINIMAX_M2)
            assert int(head * given["partial_rotary_factor"]) == turning


def test_positions_are_what_a_server_allows() -> None:
    def positions(scaling: dict[str, Any] | None) -> int | None:
        return largest_position(PLAIN | {"rope_scaling": scaling}, MINIMAX_M2)

    assert positions(None) == 4096
    assert positions({"type": "linear", "factor": 2.0}) == positions({"type": "dynamic", "factor": 2}) == 8192
    assert positions({"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 1024}) == 8192
    assert positions({"type": "llama3"} | LLAMA3) == positions({"type": "su"} | LONG) == 4096
    assert largest_position({"head_dim": 128}, MINIMAX_M2) is None


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two types": (
        {"rope_scaling": YARN, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        "rope_parameters.rope_type is 'linear', rope_scaling.type is 'yarn'",
    ),
    "two types in one": ({"rope_scaling": YARN | {"rope_type": "linear"}}, "rope_scaling.rope_type is 'linear'"),
    "two bases": ({"rope_scaling": YARN | {"rope_theta": 10000.0}}, "rope_theta is 10000.0, rope_theta is 5000000"),
    "two factors": ({"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 2.0}}, "rope_scaling.factor is 4.0"),
    "two shares": ({"partial_rotary_factor": 0.25}, "rotary_dim is 64, but partial_rotary_factor = 0.25"),
    "two origins": ({"rope_scaling": YARN, "original_max_position_embeddings": 2048}, "1024, original_max_position"),
    "an origin beyond the positions": (
        {"rope_scaling": YARN | {"original_max_position_embeddings": 8192}},
        "original_max_position_embeddings = 8192 is above max_position_embeddings = 4096",
    ),
    "a factor and no type": ({"rope_scaling": {"factor": 4.0}}, "factor = 4.0, but no type"),
    "no factor": ({"rope_scaling": {"type": "yarn"}}, "settings of type yarn lack factor"),
    "a null factor": ({"rope_scaling": {"type": "linear", "factor": None}}, "settings of type linear lack factor"),
    "a small factor": ({"rope_scaling": YARN | {"factor": 0.5}}, "factor is 0.5 instead of a number of at least 1"),
    "a factor in words": ({"rope_scaling": YARN | {"factor": "4.0"}}, "factor is '4.0' instead of a number"),
    "no long factors": ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "lack long_factor"),
    "too few factors": ({"rope_scaling": {"type": "su"} | LONG | {"long_factor": [1.0]}}, "long_factor has 1 factors"),
    "slow above fast": ({"rope_scaling": {"type": "llama3"} | LLAMA3 | {"low_freq_factor": 9}}, "low_freq_factor = 9"),
    "betas swapped": ({"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 32}}, "beta_fast = 1 is below beta_slow"),
    "an unknown type": ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "rope_type is 'mrope'; known are"),
    "one for each kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_parameters has settings of its own for 'full_attention'",
    ),
    "an odd number of dimensions": ({"rotary_dim": 63}, "63 dimensions of a head would turn; they turn in pairs"),
    "more than there are": ({"rotary_dim": 256}, "rotary_dim is 256 instead of a number of dimensions"),
    "none at all": ({"rotary_dim": 0}, "rotary_dim is 0"),
    "a base beyond floats": ({"rope_theta": 10**400}, "000 instead of a number of at least 1"),
    "a base of zero": ({"rope_theta": 0}, "rope_theta is 0 instead of a number of at least 1"),
    "a base that makes infinite frequencies": ({"rope_theta": 1e-320}, "rope_theta is 1e-320 instead of a number of"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_what_contradicts_itself_or_lacks_something_is_refused_by_name(fault: str) -> None:
    change, message = REFUSED[fault]
    with pytest.raises(CheckpointError) as error:
        rope_parameters(PLAIN | change, MINIMAX_M2)
    assert message in str(error.value)


def test_a_run_calibrates_with_the_settings_and_writes_them_out(
    project: Path, mmq: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """The older key: verified, read by transformers from the result; the KV scale of keys is that of the plain forward
    with the settings."""
    given = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    change = {"rope_scaling": given, "max_position_embeddings": 512}
    edit_json(project / "source/config.json", lambda config: config.update(change))
    assert mmq("run", project / "recipe.yaml", "--set", "awq.source=fp8", "--quiet").returncode == 0
    for folder in ("awq", "hybrid"):
        config = json.loads((project / "run" / folder / "config.json").read_text())
        wanted = {key: value for key, value in given.items() if key != "type"} | {"rope_type": "yarn"}
        for section in ("rope_parameters", "rope_scaling"):
            assert wanted.items() <= config[section].items(), folder
        assert AutoConfig.from_pretrained(project / "run" / folder).rope_parameters == config["rope_parameters"]
    tokens = next((project / "run/state/calibration").glob("*.safetensors"))
    kept = load_file(tokens)
    lengths = [sample[1] for sample in json.loads(bytes(kept["samples"]))]
    config, tensors = read_folder(project / "run/hybrid")
    weights = dequantized(tensors)
    plain = {key: value for key, value in config.items() if key != "rope_scaling"}
    prefix = "model.layers.0."
    largest = {"with": 0.0, "without": 0.0}
    for ids in kept["ids"].split(lengths):
        x = weights["model.embed_tokens.weight"][ids]
        x = rms_norm(x, weights[prefix + "input_layernorm.weight"], config["rms_norm_eps"])
        for settings, scaling in (("with", given), ("without", None)):
            key, _ = keys_and_values(x, weights, prefix, plain | {"rope_scaling": scaling})
            largest[settings] = max(largest[settings], float(key.abs().max()))
    scale = float(tensors[prefix + "self_attn.k_scale"]) * 448
    assert scale == pytest.approx(largest["with"], rel=0.01)
    assert scale != pytest.approx(largest["without"], rel=0.02)


@pytest.mark.parametrize("name", ["linear", "yarn", "llama3"])
def test_logits_are_those_of_the_plain_forward(pristine: Path, name: str) -> None:
    """What calibration and eval run, in fp32, against another implementation; and the settings matter."""
    config, tensors = read_folder(pristine / "source")
    weights = dequantized(tensors)
    scaling = {"type": name} | SCALINGS[name] | ({} if name == "linear" else {"original_max_position_embeddings": 32})
    scaled = config | {"rope_scaling": scaling}
    ours = transformers_config(MINIMAX_M2, scaled)
    ids = torch.randint(3, 500, (200,), generator=torch.Generator().manual_seed(5))
    hidden = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        names = [f"block_sparse_moe.experts.{expert}" for expert in range(config["num_local_experts"])]
        content = LayerContent(
            torch.stack([torch.cat([own[f"{n}.w1.weight"], own[f"{n}.w3.weight"]]) for n in names]),
            torch.stack([own[f"{n}.w2.weight"] for n in names]),
            {key: value for key, value in own.items() if ".experts." not in key},
        )
        decoder = DecoderLayer(MINIMAX_M2, ours, layer, content.rest, torch.device("cpu"))
        hidden = run_layer(decoder, content, hidden, [len(ids)], 128)
    found = Head(MINIMAX_M2, ours, weights["model.norm.weight"], weights["lm_head.weight"]).log_probabilities(hidden)
    expected = logits(ids, weights, scaled)
    assert torch.allclose(found, expected.log_softmax(-1), atol=1e-3 * float(expected.abs().max()))
    assert divergence(expected, logits(ids, weights, config)) > 0.01


# None where vLLM comes to transformers' weight by itself.
VLLM: dict[str, float | None] = {
    "yarn": None,
    "yarn with an attention factor": 0.8,
    "yarn with mscale": (0.1 * math.log(40) + 1) / (0.07 * math.log(40) + 1),
    "longrope": None,
    "longrope with a factor": 1.1,
}


@pytest.mark.parametrize("name", VLLM)
def test_vllm_multiplies_by_what_transformers_does(name: str) -> None:
    """vLLM reads no attention_factor, and mscale for another type only: it takes 0.1 ln(factor) + 1 times attn_factor
    for yarn, and for longrope short_mscale or else what follows from the positions."""
    weight = VLLM[name]
    config = hub_form(name, "type", "rotary_dim")
    rope = rope_parameters(config, MINIMAX_M2)
    module = MINIMAX_M2.transformers_class(MINIMAX_M2.rotary_class)(transformers_config(MINIMAX_M2, config))
    if name.startswith("yarn"):
        theirs = (0.1 * math.log(rope["factor"]) + 1) * rope.get("attn_factor", 1.0)
    else:
        theirs = rope.get("short_mscale", math.sqrt(1 + math.log(4) / math.log(1024)))
        assert rope.get("long_mscale") == rope.get("short_mscale")
    assert theirs == pytest.approx(module.attention_scaling)
    assert ({"attn_factor", "short_mscale"} & rope.keys() == set()) == (weight is None)
    assert weight is None or theirs == pytest.approx(weight)


def test_a_weight_that_only_vllm_would_read_is_refused() -> None:
    config = PLAIN | {"rope_scaling": {"type": "yarn", "factor": 2.0, "attn_factor": 3.0}}
    with pytest.raises(CheckpointError, match=r"attn_factor = 3\.0 vLLM multiplies cos and sin by 3\.2"):
        rope_parameters(config, MINIMAX_M2)


def test_a_sequence_turns_alike_whatever_came_before(pristine: Path) -> None:
    """transformers' module keeps the base of the longest sequence that `dynamic` met."""
    config, tensors = read_folder(pristine / "source")
    weights = dequantized(tensors)
    scaled = config | {"max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
    prefix = "model.layers.0."
    own = {
        name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix) and "exper" not in name
    }

    def layer() -> DecoderLayer:
        return DecoderLayer(MINIMAX_M2, transformers_config(MINIMAX_M2, scaled), 0, own, torch.device("cpu"))

    lengths = [200, 80, 48]
    hidden = torch.randn(sum(lengths), 256, generator=torch.Generator().manual_seed(3))
    together = layer().attend(hidden, lengths).split(lengths)
    for found, part in zip(together, hidden.split(lengths), strict=True):
        assert torch.equal(found, layer().attend(part, [len(part)]))
