"""MiniMax-M2 written plainly in fp32, and its weights read plainly from the hub's formats: shares no code with mmq."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

Weights = dict[str, torch.Tensor]


def read_folder(folder: Path) -> tuple[dict[str, Any], Weights]:
    """config.json and all tensors as stored."""
    tensors: Weights = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    return json.loads((folder / "config.json").read_text()), tensors


def dequantized(tensors: Weights) -> Weights:
    """fp32 weights by their hub names, from block fp8 (either scale name), packed int4 and plain tensors."""
    result: Weights = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = tensors.get(name + "_scale_inv", tensors.get(name + "_scale"))
            rows, columns = tensor.shape
            share = (1, columns) if scale.shape == (rows, 1) and rows > 1 else (128, 128)
            blocks = torch.kron(scale.float(), torch.ones(share))[:rows, :columns]
            result[name] = tensor.float() * blocks
        elif name.endswith("weight_packed"):
            base = name.removesuffix("_packed")
            words = tensor.to(torch.int64) & 0xFFFFFFFF
            codes = torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)], dim=-1).flatten(1) - 8
            scale = tensors[base + "_scale"].float()
            result[base] = codes.float() * scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
        elif tensor.is_floating_point() and "scale" not in name:
            result[name] = tensor.float()
    return result


def round_to_nearest(weight: torch.Tensor, group: int = 128) -> torch.Tensor:
    """Symmetric int4 in groups along the input, scales in bf16."""
    groups = weight.unflatten(1, (-1, group))
    scale = (groups.abs().amax(-1, keepdim=True) / 7.5).bfloat16().float()
    return ((groups / scale).round().clamp(-8, 7) * scale).flatten(1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def frequencies(config: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Angles a position [rotary_dim / 2], and what cosine and sine are multiplied by."""
    dim, theta, scaling = config["rotary_dim"], config["rope_theta"], config.get("rope_scaling") or {}
    plain = torch.tensor([theta ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
    if not scaling:
        return plain.float(), 1.0
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor", 1.0)
    if kind == "linear":
        return (plain / factor).float(), 1.0
    before = scaling.get("original_max_position_embeddings", config["max_position_embeddings"])
    turns = before * plain / (2 * math.pi)  # of each frequency over the positions of pretraining
    if kind == "llama3":
        # Meta's: slow ones are stretched, fast ones kept, in between mixed by the turns.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (plain * (kept + (1 - kept) / factor)).float(), 1.0
    assert kind == "yarn"
    # arXiv 2309.00071, 3.2: those that turn more than beta_fast times are kept, fewer than beta_slow stretched. Between
    # them the paper's ramp is over turns; all implementations have it over the index, with whole ends.
    ends = [dim * math.log(before / (beta * 2 * math.pi)) / (2 * math.log(theta)) for beta in (32, 1)]
    first, last = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), dim - 1)
    stretched = ((torch.arange(dim // 2, dtype=torch.float64) - first) / (last - first)).clamp(0, 1)
    return (plain * (1 - stretched + stretched / factor)).float(), 0.1 * math.log(factor) + 1


def rotate(x: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Rotate the first `rotary_dim` dimensions of [heads, T, dim], in halves."""
    rotary_dim = config["rotary_dim"]
    half = rotary_dim // 2
    per_position, scale = frequencies(config)
    angles = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * per_position
    cos, sin = angles.cos() * scale, angles.sin() * scale
    first, second, rest = x[..., :half], x[..., half:rotary_dim], x[..., rotary_dim:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def keys_and_values(x: torch.Tensor, weights: Weights, prefix: str, config: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Keys after rotary and values of the normed input [T, H]: [kv_heads, T, dim] each."""
    dim, heads = config["head_dim"], config["num_key_value_heads"]
    key = x @ weights[prefix + "self_attn.k_proj.weight"].T
    key = rms_norm(key, weights[prefix + "self_attn.k_norm.weight"], config["rms_norm_eps"])
    value = x @ weights[prefix + "self_attn.v_proj.weight"].T
    key, value = (t.view(-1, heads, dim).transpose(0, 1) for t in (key, value))
    return rotate(key, config), value


def attention(x: torch.Tensor, weights: Weights, prefix: str, config: dict[str, Any]) -> torch.Tensor:
    dim, heads = config["head_dim"], config["num_attention_heads"]
    query = x @ weights[prefix + "self_attn.q_proj.weight"].T
    query = rms_norm(query, weights[prefix + "self_attn.q_norm.weight"], config["rms_norm_eps"])
    query = rotate(query.view(-1, heads, dim).transpose(0, 1), config)
    key, value = keys_and_values(x, weights, prefix, config)
    repeat = heads // config["num_key_value_heads"]
    key, value = key.repeat_interleave(repeat, 0), value.repeat_interleave(repeat, 0)
    scores = query @ key.transpose(1, 2) * dim**-0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    output = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
    return output.transpose(0, 1).flatten(1) @ weights[prefix + "self_attn.o_proj.weight"].T


def choices(
    x: torch.Tensor, weights: Weights, prefix: str, config: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores [T, E], those with the bias by which is chosen, and the experts that are, [T, k]."""
    moe = prefix + "block_sparse_moe."
    scores = (x @ weights[moe + "gate.weight"].T).sigmoid()
    preferred = scores + weights[moe + "e_score_correction_bias"]
    return scores, preferred, preferred.topk(config["num_experts_per_tok"], dim=-1).indices


def experts(x: torch.Tensor, weights: Weights, prefix: str, config: dict[str, Any]) -> torch.Tensor:
    """Token by token, expert by expert."""
    moe = prefix + "block_sparse_moe."
    scores, preferred, chosen = choices(x, weights, prefix, config)
    share = scores.gather(1, chosen)
    share = share / share.sum(-1, keepdim=True)

    def routed(chosen: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(x)
        for expert in range(config["num_local_experts"]):
            tokens, slot = (chosen == expert).nonzero(as_tuple=True)
            w1, w2, w3 = (weights[f"{moe}experts.{expert}.{name}.weight"] for name in ("w1", "w2", "w3"))
            inner = F.silu(x[tokens] @ w1.T) * (x[tokens] @ w3.T)
            result.index_add_(0, tokens, share[tokens, slot, None] * (inner @ w2.T))
        return result

    return of_a_choice(routed, preferred, chosen, config)


def of_a_choice(
    routed: Callable[[torch.Tensor], torch.Tensor],
    preferred: torch.Tensor,
    chosen: torch.Tensor,
    config: dict[str, Any],
) -> torch.Tensor:
    """What the chosen experts put out. Where the config has `erring`, the gradient is that of a mean over choices: the
    last one of int64 [T, k] gives way to the one after it where an error of that share of the mean margin tips it.

    Args:
        routed: the block's output, given other choices at the same shares.
        preferred: [T, E], by which experts are chosen.
    """
    own = routed(chosen)
    if "erring" not in config or chosen.shape[1] == preferred.shape[1]:
        return own
    best = preferred.topk(chosen.shape[1] + 1, dim=-1)
    margin = best.values[:, -2] - best.values[:, -1]
    tipped = torch.distributions.Normal(0, config["erring"] * margin.detach().mean()).cdf(-margin)
    other = routed(torch.cat([chosen[:, :-1], best.indices[:, -1:]], 1))
    return own + (tipped - tipped.detach())[:, None] * (other - own).detach()


def attended(
    x: torch.Tensor, weights: Weights, prefix: str, config: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream after a layer's attention, and what its experts are given, [T, H] each."""
    eps = config["rms_norm_eps"]
    x = x + attention(rms_norm(x, weights[prefix + "input_layernorm.weight"], eps), weights, prefix, config)
    return x, rms_norm(x, weights[prefix + "post_attention_layernorm.weight"], eps)


def hidden_states(ids: torch.Tensor, weights: Weights, config: dict[str, Any]) -> list[torch.Tensor]:
    """The residual stream before each layer and after the last, [T, H] each."""
    states = [weights["model.embed_tokens.weight"][ids]]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        x, normed = attended(states[-1], weights, prefix, config)
        states.append(x + experts(normed, weights, prefix, config))
    return states


def chosen_experts(ids: torch.Tensor, weights: Weights, config: dict[str, Any]) -> list[torch.Tensor]:
    """Each layer's choices, [T, k]."""
    found = []
    for layer, x in enumerate(hidden_states(ids, weights, config)[:-1]):
        prefix = f"model.layers.{layer}."
        found.append(choices(attended(x, weights, prefix, config)[1], weights, prefix, config)[2])
    return found


def logits(ids: torch.Tensor, weights: Weights, config: dict[str, Any]) -> torch.Tensor:
    """[T] -> [T, vocabulary]."""
    last = rms_norm(hidden_states(ids, weights, config)[-1], weights["model.norm.weight"], config["rms_norm_eps"])
    return last @ weights["lm_head.weight"].T


def divergence(truth: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(truth || other) over positions, in nats."""
    p, q = truth.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
