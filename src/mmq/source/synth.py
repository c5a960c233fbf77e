"""A tiny synthetic mixture-of-experts checkpoint in the hub's layout of a family: for demos, tests and smoke runs.

The weights are random but shaped like the real ones where it matters: fp8 in 128x128 blocks or another source format,
a router and, where the family has it, a bias near 8, norms with outlier channels that AWQ must protect, a tokenizer and
a chat template. What there is follows from the family's table.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mmq.errors import RecipeError
from mmq.families.minimax_m2 import MINIMAX_M2
from mmq.families.sizes import Dimensions
from mmq.families.table import Architecture, Weight, value_at
from mmq.shipped import TRAINED
from mmq.source.formats import CT_BLOCK_FP8, CT_CHANNEL_FP8, FINE_GRAINED_FP8, PLAIN_BF16, SourceFormat
from mmq.storage.atomic import copy_file, write_json
from mmq.storage.checkpoint import CONFIG_NAME, INDEX_NAME
from mmq.storage.shards import DTYPES, save_tensors
from mmq.tensors import fp8
from mmq.tensors.fp8 import BLOCK, block_scales

CHAT_TEMPLATE = (
    "{%- for message in messages -%}]~b]{{ message.role }}\n{{ message.content }}"
    "{%- for call in message.tool_calls or [] -%}<tool>{{ call.function | tojson }}</tool>{%- endfor -%}"
    "[e~[\n{%- endfor -%}{%- if add_generation_prompt -%}]~b]assistant\n{%- endif -%}"
)
TRAINING_TEXT = (
    "def route(tokens, experts): return [expert for expert in experts if expert.score(tokens) > 0.5]",
    "The quick brown fox jumps over the lazy dog while the quantizer measures every channel of the layer.",
    "for (int i = 0; i < n; ++i) { total += weights[i] * inputs[i]; }",
    "Eine Handvoll Gewichte trägt den größten Teil der Bedeutung. Quelques poids portent l'essentiel du sens.",
    "SELECT layer, expert, count(*) FROM routing GROUP BY layer, expert ORDER BY count(*) DESC;",
    "量化 校准 专家 路由 注意力 Квантование весов модели",
)


@dataclass(frozen=True)
class Stored:
    """How the matrices of the decoder layers are written.

    Attributes:
        settings: config.json's quantization_config.
        scale_dtype: of the scales.
        powers_of_two: the scales are such.
        stacked: all of a layer's experts lie in the tensors that the family's table names for it.
    """

    format: SourceFormat
    settings: Mapping[str, Any] | None = None
    scale_dtype: str = "F32"
    powers_of_two: bool = False
    stacked: bool = False


BLOCK_FP8_SETTINGS = {
    "quant_method": "fp8",
    "fmt": "float8_e4m3fn",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
    "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
}


def compressed_settings(weights: Mapping[str, Any], activations: Mapping[str, Any]) -> dict[str, Any]:
    """quantization_config of compressed-tensors' fp8, as llm-compressor writes it."""
    common = {"num_bits": 8, "type": "float", "symmetric": True, "observer": "minmax"}
    group = {
        "targets": ["Linear"],
        "weights": common | {"dynamic": False} | dict(weights),
        "input_activations": common | {"dynamic": True} | dict(activations),
        "output_activations": None,
        "format": "float-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["re:.*gate$", "lm_head"],
        "kv_cache_scheme": None,
    }


CT_BLOCK_SETTINGS = compressed_settings(
    {"strategy": "block", "block_structure": [BLOCK, BLOCK]}, {"strategy": "group", "group_size": BLOCK}
)
CT_CHANNEL_SETTINGS = compressed_settings({"strategy": "channel"}, {"strategy": "token"})
# What `mmq synth --format` offers.
STORED = {
    "fp8": Stored(FINE_GRAINED_FP8, BLOCK_FP8_SETTINGS),
    "fp8-bf16-scales": Stored(FINE_GRAINED_FP8, BLOCK_FP8_SETTINGS, "BF16"),
    "fp8-powers-of-two": Stored(FINE_GRAINED_FP8, BLOCK_FP8_SETTINGS, powers_of_two=True),
    "ct-block": Stored(CT_BLOCK_FP8, CT_BLOCK_SETTINGS, "BF16"),
    "ct-channel": Stored(CT_CHANNEL_FP8, CT_CHANNEL_SETTINGS, "BF16"),
    "bf16": Stored(PLAIN_BF16),
    "bf16-stacked": Stored(PLAIN_BF16, stacked=True),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the synthetic model."""

    layers: int = 2
    hidden: int = 256
    intermediate: int = 128
    experts: int = 8
    top_k: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    vocabulary: int = 512
    dense: int = 384


def write_checkpoint(
    folder: Path,
    sizes: Sizes,
    seed: int = 0,
    shards: int = 3,
    shuffle: bool = False,
    family: Architecture = MINIMAX_M2,
    stored: Stored = STORED["fp8"],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write the checkpoint.

    Args:
        shards: into how many files the tensors are cut, by size.
        shuffle: put the tensors into the shards in random order, so that weights and their scales are apart.
        family: its table, as it is for all models.
        settings: of config.json, beside the family's example and in its place.

    Raises:
        RecipeError: the folder holds something already, or the sizes make no model.
    """
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"{folder} is not empty")
    if min(asdict(sizes).values()) < 1 or sizes.top_k > sizes.experts or sizes.heads % sizes.kv_heads:
        raise RecipeError("top_k must be at most experts, heads a multiple of kv_heads, and all sizes at least 1")
    if stored.stacked and not family.stacks:
        raise RecipeError(f"releases of {family.model_type} store each expert by itself")
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, sizes.vocabulary)
    config = model_config(sizes, family, stored, settings)
    tensors = _tensors(family.resolved(config), config, stored, torch.Generator().manual_seed(seed))
    if stored.stacked:
        tensors = _stacked(tensors, family.resolved(config), sizes)
    names = list(tensors)
    if shuffle:
        random.Random(seed).shuffle(names)
    save_checkpoint(folder, {name: tensors[name] for name in names}, config, shards)


def save_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], shards: int) -> None:
    """Write tensors in their order, cut into shards by size, with index, config.json and generation_config.json."""
    weight_map: dict[str, str] = {}
    for number, part in enumerate(_cut(list(tensors), tensors, shards), start=1):
        shard = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_tensors(folder / shard, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, shard)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(
        folder / INDEX_NAME,
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )
    write_json(folder / CONFIG_NAME, config)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False})


def copy_trained(folder: Path) -> None:
    """Copy the small trained model that comes with mmq: an fp8 checkpoint, `calibration.jsonl` and `heldout.jsonl`.

    Raises:
        RecipeError: the folder holds something already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"{folder} is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(TRAINED.iterdir()):
        copy_file(path, folder / path.name)


def write_samples(path: Path, count: int, seed: int = 0) -> None:
    """Write JSONL calibration samples for the synthetic model: chats and texts of mixed-up training text."""
    chooser = random.Random(seed)
    words = " ".join(TRAINING_TEXT).split()
    lines = []
    for number in range(count):
        text = " ".join(chooser.choices(words, k=60))
        sample: dict[str, Any] = {"text": text}
        if number % 2:
            half = text[: len(text) // 2], text[len(text) // 2 :]
            sample = {"messages": [{"role": r, "content": t} for r, t in zip(("user", "assistant"), half, strict=True)]}
        lines.append(json.dumps(sample, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def quantize_block(weight: torch.Tensor, stored: Stored = STORED["fp8"]) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [out, in] -> float8_e4m3fn [out, in] and the scales of its blocks."""
    block = stored.format.storage.block
    scale = block_scales(weight, block)
    scale = scale.log2().ceil().exp2() if stored.powers_of_two else scale.to(DTYPES[stored.scale_dtype]).float()
    return fp8.quantize_block(weight, scale, block), scale.to(DTYPES[stored.scale_dtype])


def _tensors(
    arch: Architecture, config: dict[str, Any], stored: Stored, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    dims, suffix = Dimensions.of(config, arch), stored.format.storage.scale_suffix
    plain = stored.format.plain(config, arch)
    hidden, inner = dims.hidden, dims.intermediate
    tensors: dict[str, torch.Tensor] = {}

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def channels(count: int, spread: float, outliers: float) -> torch.Tensor:
        """Magnitudes around 1, some far larger: the salient channels of a real model."""
        magnitude = (normal(count) * spread).exp()
        return torch.where(torch.rand(count, generator=generator) < 0.012, magnitude * outliers, magnitude)

    def matrix(name: str, weight: torch.Tensor) -> None:
        if suffix is None or plain(name):
            tensors[name] = weight.to(torch.bfloat16)
        else:
            tensors[name], tensors[name + suffix] = quantize_block(weight, stored)

    def vector(weight: Weight) -> torch.Tensor:
        (count,) = dims.shape(weight)
        if weight.name.endswith("bias"):
            return 0.2 * normal(count)
        return channels(count, 0.2, 3) if weight.shape == ("hidden",) else channels(count, 0.1, 2)

    def norm_weight(weight: Weight) -> torch.Tensor:
        """A norm or a bias as it is stored."""
        # Linear attention's own norms multiply by their weight alone.
        own = weight in arch.linear_weights and weight.shape != ("hidden",)
        offset = arch.norm_offset if weight.name.endswith("weight") and not own else 0
        return (vector(weight) - offset).to(torch.bfloat16)

    def attention(weight: Weight, prefix: str) -> None:
        shape = dims.shape(weight)
        if weight.is_matrix:
            matrix(prefix + weight.name, normal(*shape) * shape[1] ** -0.5)
        elif len(shape) > 1:
            tensors[prefix + weight.name] = (normal(*shape) * shape[-1] ** -0.5).to(torch.bfloat16)
        elif not weight.name.endswith((".weight", "bias")):
            tensors[prefix + weight.name] = (0.5 * normal(*shape)).to(torch.bfloat16)
        else:
            tensors[prefix + weight.name] = norm_weight(weight)

    def gated(names: list[str], width: int, gain: float) -> None:
        """A unit's gate, up and down, which read a norm's output of the magnitude 1 / gain."""
        gate, up, down = names
        matrix(gate, normal(width, hidden) * gain * 2)
        matrix(up, normal(width, hidden) * gain * channels(width, 0.3, 20)[:, None])
        matrix(down, normal(hidden, width) * 0.6 * width**-0.5)

    tensors[arch.embedding] = normal(dims.vocabulary, hidden).to(torch.bfloat16)
    for layer in range(dims.layers):
        prefix = arch.layer_prefix(layer)
        for weight in arch.attention_of(layer):
            attention(weight, prefix)
        norm = channels(hidden, 0.3, 25)
        gain = hidden**-0.5 / float(norm.square().mean().sqrt())
        tensors[prefix + arch.smooth_norm] = (norm - arch.norm_offset).to(torch.bfloat16)
        if not arch.has_experts(layer):
            assert arch.dense is not None
            gated([prefix + weight.name for weight in arch.dense.weights], dims.dense, gain)
            continue
        tensors[prefix + arch.router] = (normal(dims.experts, hidden) * gain).to(DTYPES[arch.router_stored])
        if arch.router_bias:
            tensors[prefix + arch.router_bias] = 8 + 0.1 * normal(dims.experts)
        if arch.shared:
            gated([prefix + weight.name for weight in arch.shared.weights], dims.size(arch.shared.width), gain)
        if arch.shared_gate:
            tensors[prefix + arch.shared_gate.name] = (normal(*dims.shape(arch.shared_gate)) * gain).bfloat16()
        for expert in range(dims.experts):
            gated([prefix + weight.name.format(expert=expert) for weight in arch.experts.weights], inner, gain)
    for weight in arch.extra_tensors():
        shape = dims.shape(weight)
        for name in {weight.name.format(expert=expert): None for expert in range(dims.experts)}:
            values = 0.1 * normal(*shape) if len(shape) > 1 else vector(weight)
            if weight.is_matrix:
                matrix(name, values)
            else:
                tensors[name] = values.to(DTYPES[weight.dtypes[0]])
    tensors[arch.final_norm] = (channels(hidden, 0.1, 2) - arch.norm_offset).to(torch.bfloat16)
    tensors[arch.head] = (normal(dims.vocabulary, hidden) * 2 * hidden**-0.5).to(torch.bfloat16)
    return tensors


def _stacked(tensors: dict[str, torch.Tensor], arch: Architecture, sizes: Sizes) -> dict[str, torch.Tensor]:
    """The tensors with all experts of a layer in the stacks that the table names."""
    result = dict(tensors)
    for prefix in (*map(arch.layer_prefix, range(sizes.layers)), *arch.carried_layers):
        for stack in arch.stacks:
            rows = [
                torch.cat(
                    [result.pop(f"{prefix}{arch.expert.format(expert=e)}{name}.weight") for name in stack.linears]
                )
                for e in range(sizes.experts)
            ]
            result[prefix + stack.name] = torch.stack(rows)
    return result


def model_config(
    sizes: Sizes,
    family: Architecture = MINIMAX_M2,
    stored: Stored = STORED["fp8"],
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """config.json of a model of these sizes; `settings` of the decoder are put beside the family's example and in its
    place."""
    config: dict[str, Any] = {
        "architectures": [family.causal_lm],
        "model_type": family.model_type,
        "vocab_size": sizes.vocabulary,
        family.hidden_key: sizes.hidden,
        family.intermediate_key: sizes.intermediate,
        family.layers_key: sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads if family.latent else sizes.kv_heads,
        family.head_dim_key: sizes.head_dim,
        "rope_theta": 5000000,
        family.experts_key: sizes.experts,
        family.top_k_key: sizes.top_k,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    if family.dense:
        config[family.dense_key] = sizes.dense
    if family.rotary_dim_key:
        config[family.rotary_dim_key] = sizes.head_dim // 2
    beside = _for_layers(family, sizes.layers)
    if family.section:
        named = {key: config.pop(key) for key in ("architectures", "model_type")}
        config |= beside.pop(family.section) | dict(settings or {})
        config = named | beside | {"tie_word_embeddings": config["tie_word_embeddings"], family.section: config}
    else:
        config |= beside | dict(settings or {})
    return config | ({"quantization_config": dict(stored.settings)} if stored.settings else {})


def _for_layers(family: Architecture, layers: int) -> dict[str, Any]:
    """The family's example; where it says of each layer what it is, the last one's kind is that of those after it."""
    example = copy.deepcopy(dict(family.example))
    decoder = example[family.section] if family.section else example
    for some in (family.dense_layers, family.linear_layers, family.sparse_layers):
        for key, _ in filter(None, (some.typed, some.flagged)):
            above, _, last = key.rpartition(".")
            place = value_at(decoder, above) if above else decoder
            if isinstance(place, dict) and isinstance(kinds := place.get(last), list):
                place[last] = (kinds + kinds[-1:] * layers)[:layers] if layers >= len(kinds) else kinds[-layers:]
    return example


def _cut(names: list[str], tensors: dict[str, torch.Tensor], shards: int) -> list[list[str]]:
    """Cut a list of tensors into parts of about equal bytes, in order."""
    total = sum(tensors[name].nbytes for name in names)
    parts: list[list[str]] = [[] for _ in range(shards)]
    done = 0
    for name in names:
        parts[min(shards - 1, done * shards // total)].append(name)
        done += tensors[name].nbytes
    return parts


def write_tokenizer(folder: Path, vocabulary: int, text: Sequence[str] = TRAINING_TEXT) -> None:
    """A byte-level BPE tokenizer trained on a text, by default a few lines, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "[e~[", "]~b]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary < len(alphabet) + len(special):
        raise RecipeError(f"the vocabulary must have at least {len(alphabet) + len(special)} tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="[e~[",
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)
