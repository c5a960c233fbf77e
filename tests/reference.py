"""MiniMax-M2 written plainly in fp32, and its weights read plainly from the hub's formats: shares no code with mmq."""

from __future__ import annotations

import json
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
            blocks = torch.kron(scale, torch.ones(128, 128))[:rows, :columns]
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


def rotate(x: torch.Tensor, rotary_dim: int, theta: float) -> torch.Tensor:
    """Rotate the first `rotary_dim` dimensions of [heads, T, dim], in halves."""
    half = rotary_dim // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float32) * 2 / rotary_dim)
    angles = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    first, second, rest = x[..., :half], x[..., half:rotary_dim], x[..., rotary_dim:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def keys_and_values(x: torch.Tensor, weights: Weights, prefix: str, config: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Keys after rotary and values of the normed input [T, H]: [kv_heads, T, dim] each."""
    dim, heads = config["head_dim"], config["num_key_value_heads"]
    key = x @ weights[prefix + "self_attn.k_proj.weight"].T
    key = rms_norm(key, weights[prefix + "self_attn.k_norm.weight"], config["rms_norm_eps"])
    value = x @ weights[prefix + "self_attn.v_proj.weight"].T
    key, value = (t.view(-1, heads, dim).transpose(0, 1) for t in (key, value))
    return rotate(key, config["rotary_dim"], config["rope_theta"]), value


def attention(x: torch.Tensor, weights: Weights, prefix: str, config: dict[str, Any]) -> torch.Tensor:
    dim, heads = config["head_dim"], config["num_attention_heads"]
    query = x @ weights[prefix + "self_attn.q_proj.weight"].T
    query = rms_norm(query, weights[prefix + "self_attn.q_norm.weight"], config["rms_norm_eps"])
    query = rotate(query.view(-1, heads, dim).transpose(0, 1), config["rotary_dim"], config["rope_theta"])
    key, value = keys_and_values(x, weights, prefix, config)
    repeat = heads // config["num_key_value_heads"]
    key, value = key.repeat_interleave(repeat, 0), value.repeat_interleave(repeat, 0)
    scores = query @ key.transpose(1, 2) * dim**-0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    output = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
    return output.transpose(0, 1).flatten(1) @ weights[prefix + "self_attn.o_proj.weight"].T


def experts(x: torch.Tensor, weights: Weights, prefix: str, config: dict[str, Any]) -> torch.Tensor:
    """Token by token, expert by expert."""
    moe = prefix + "block_sparse_moe."
    scores = (x @ weights[moe + "gate.weight"].T).sigmoid()
    chosen = (scores + weights[moe + "e_score_correction_bias"]).topk(config["num_experts_per_tok"], dim=-1).indices
    share = scores.gather(1, chosen)
    share = share / share.sum(-1, keepdim=True)
    result = torch.zeros_like(x)
    for expert in range(config["num_local_experts"]):
        tokens, slot = (chosen == expert).nonzero(as_tuple=True)
        w1, w2, w3 = (weights[f"{moe}experts.{expert}.{name}.weight"] for name in ("w1", "w2", "w3"))
        inner = F.silu(x[tokens] @ w1.T) * (x[tokens] @ w3.T)
        result.index_add_(0, tokens, share[tokens, slot, None] * (inner @ w2.T))
    return result


def hidden_states(ids: torch.Tensor, weights: Weights, config: dict[str, Any]) -> list[torch.Tensor]:
    """The residual stream before each layer and after the last, [T, H] each."""
    eps = config["rms_norm_eps"]
    states = [weights["model.embed_tokens.weight"][ids]]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        x = states[-1]
        x = x + attention(rms_norm(x, weights[prefix + "input_layernorm.weight"], eps), weights, prefix, config)
        normed = rms_norm(x, weights[prefix + "post_attention_layernorm.weight"], eps)
        states.append(x + experts(normed, weights, prefix, config))
    return states


def logits(ids: torch.Tensor, weights: Weights, config: dict[str, Any]) -> torch.Tensor:
    """[T] -> [T, vocabulary]."""
    last = rms_norm(hidden_states(ids, weights, config)[-1], weights["model.norm.weight"], config["rms_norm_eps"])
    return last @ weights["lm_head.weight"].T


def divergence(truth: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(truth || other) over positions, in nats."""
    p, q = truth.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
