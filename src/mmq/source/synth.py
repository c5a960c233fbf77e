"""A tiny synthetic mixture-of-experts checkpoint in the hub's layout of MiniMax-M2: for demos, tests and smoke runs.

The weights are random but shaped like the real ones where it matters: fp8 in 128x128 blocks, an fp32 router with a bias
near 8, norms with outlier channels that AWQ must protect, a tokenizer and a chat template.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mmq.errors import RecipeError
from mmq.families.minimax_m2 import MINIMAX_M2
from mmq.families.table import Architecture
from mmq.shipped import TRAINED
from mmq.source.block_fp8 import SCALE_SUFFIX
from mmq.storage.atomic import copy_file, write_json
from mmq.storage.checkpoint import CONFIG_NAME, INDEX_NAME
from mmq.storage.shards import save_tensors
from mmq.tensors.fp8 import BLOCK, scale_shape

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
FP8_MAX = 448.0


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


def write_checkpoint(folder: Path, sizes: Sizes, seed: int = 0, shards: int = 3, shuffle: bool = False) -> None:
    """Write the checkpoint.

    Args:
        shards: into how many files the tensors are cut, by size.
        shuffle: put the tensors into the shards in random order, so that weights and their scales are apart.

    Raises:
        RecipeError: the folder holds something already, or the sizes make no model.
    """
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"{folder} is not empty")
    if min(asdict(sizes).values()) < 1 or sizes.top_k > sizes.experts or sizes.heads % sizes.kv_heads:
        raise RecipeError("top_k must be at most experts, heads a multiple of kv_heads, and all sizes at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, sizes.vocabulary)
    tensors = _tensors(MINIMAX_M2, sizes, torch.Generator().manual_seed(seed))
    names = list(tensors)
    if shuffle:
        random.Random(seed).shuffle(names)
    save_checkpoint(folder, {name: tensors[name] for name in names}, model_config(sizes), shards)


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


def quantize_block(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [out, in] -> float8_e4m3fn [out, in] and float32 scales [ceil(out/128), ceil(in/128)]."""
    rows, columns = scale_shape(tuple(weight.shape))
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    scale = (blocks.abs().amax((1, 3)) / FP8_MAX).clamp(min=1e-12)
    quantized = (blocks / scale[:, None, :, None]).view_as(padded)[: weight.shape[0], : weight.shape[1]]
    return quantized.to(torch.float8_e4m3fn).contiguous(), scale


def _tensors(arch: Architecture, sizes: Sizes, generator: torch.Generator) -> dict[str, torch.Tensor]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def channels(count: int, spread: float, outliers: float) -> torch.Tensor:
        """Magnitudes around 1, some far larger: the salient channels of a real model."""
        magnitude = (normal(count) * spread).exp()
        return torch.where(torch.rand(count, generator=generator) < 0.012, magnitude * outliers, magnitude)

    tensors: dict[str, torch.Tensor] = {}

    def fp8(name: str, weight: torch.Tensor) -> None:
        tensors[f"{name}.weight"], tensors[f"{name}.weight{SCALE_SUFFIX}"] = quantize_block(weight)

    hidden, inner = sizes.hidden, sizes.intermediate
    query, key = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    tensors[arch.embedding] = normal(sizes.vocabulary, hidden).to(torch.bfloat16)
    for layer in range(sizes.layers):
        prefix = arch.layer_prefix(layer)
        for linear, (out, width) in zip(
            arch.attention, ((query, hidden), (key, hidden), (key, hidden), (hidden, query)), strict=True
        ):
            fp8(prefix + linear, normal(out, width) * width**-0.5)
        tensors[prefix + "self_attn.q_norm.weight"] = channels(query, 0.1, 2).to(torch.bfloat16)
        tensors[prefix + "self_attn.k_norm.weight"] = channels(key, 0.1, 2).to(torch.bfloat16)
        tensors[prefix + "input_layernorm.weight"] = channels(hidden, 0.2, 3).to(torch.bfloat16)
        norm = channels(hidden, 0.3, 25)
        tensors[prefix + arch.smooth_norm] = norm.to(torch.bfloat16)
        tensors[prefix + arch.router] = normal(sizes.experts, hidden) * (hidden**-0.5 / norm.square().mean().sqrt())
        assert arch.router_bias is not None
        tensors[prefix + arch.router_bias] = 8 + 0.1 * normal(sizes.experts)
        for expert in range(sizes.experts):
            gain = hidden**-0.5 / norm.square().mean().sqrt()
            fp8(arch.expert_weight(layer, expert, arch.gate), normal(inner, hidden) * gain * 2)
            fp8(
                arch.expert_weight(layer, expert, arch.up),
                normal(inner, hidden) * gain * channels(inner, 0.3, 20)[:, None],
            )
            fp8(arch.expert_weight(layer, expert, arch.down), normal(hidden, inner) * 0.6 * inner**-0.5)
    tensors[arch.final_norm] = channels(hidden, 0.1, 2).to(torch.bfloat16)
    tensors[arch.head] = (normal(sizes.vocabulary, hidden) * 2 * hidden**-0.5).to(torch.bfloat16)
    return tensors


def model_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "architectures": [MINIMAX_M2.causal_lm],
        "model_type": MINIMAX_M2.model_type,
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "rotary_dim": sizes.head_dim // 2,
        "rope_theta": 5000000,
        "num_local_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "use_mtp": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "float8_e4m3fn",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        },
    }


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
