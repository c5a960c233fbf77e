"""The families beside MiniMax-M2 written plainly in fp32, from their papers and configs: shares no code with mmq."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tests.reference import Weights, of_a_choice, rms_norm, rotate

Config = dict[str, Any]
Block = Callable[[torch.Tensor, Weights, str, Config], torch.Tensor]


def gated(x: torch.Tensor, weights: Weights, prefix: str, config: Config) -> torch.Tensor:
    gate, up, down = (weights[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    gate, up = x @ gate.T, x @ up.T
    if limit := config.get("swiglu_limit"):
        gate, up = gate.clip(None, limit), up.clip(-limit, limit)
        return (gate * (gate * config["swiglu_alpha"]).sigmoid() * (up + 1)) @ down.T
    return (F.silu(gate) * up) @ down.T


# Norms multiply by one plus their weight.
AROUND_ZERO = ("qwen3_next", "qwen3_5_moe_text", "minimax_m3_vl_text")


def normed(x: torch.Tensor, weight: torch.Tensor, config: Config) -> torch.Tensor:
    return rms_norm(x, weight + 1 if config["model_type"] in AROUND_ZERO else weight, config["rms_norm_eps"])


def heads(
    x: torch.Tensor, weights: Weights, prefix: str, name: str, count: int, config: Config, turns: bool = True
) -> torch.Tensor:
    """[T, H] -> [heads, T, dim]: a projection, the norm of each head where there is one, and rotary if it `turns`."""
    projected = x @ weights[f"{prefix}self_attn.{name}_proj.weight"].T
    projected = projected + weights.get(f"{prefix}self_attn.{name}_proj.bias", torch.zeros(()))
    result = projected.unflatten(1, (count, -1))
    norm = weights.get(f"{prefix}self_attn.{name}_norm.weight")
    result = normed(result, norm, config) if norm is not None else result
    result = result.transpose(0, 1)
    turning = config.get("rotary_dim") or int(config["head_dim"] * config.get("partial_rotary_factor", 1.0))
    return rotate(result, config | {"rotary_dim": turning}) if turns else result


def keys_and_values(x: torch.Tensor, weights: Weights, prefix: str, config: Config) -> tuple[torch.Tensor, ...]:
    """Keys after rotary and values of the normed input [T, H]: [kv_heads, T, dim] each."""
    count = config["num_key_value_heads"]
    key = heads(x, weights, prefix, "k", count, config)
    return key, heads(x, weights, prefix, "v", count, config, False)


def attention(x: torch.Tensor, weights: Weights, prefix: str, config: Config) -> torch.Tensor:
    if f"{prefix}linear_attn.A_log" in weights:
        return linear_attention(x, weights, prefix, config)
    if "kv_lora_rank" in config:
        return latent_attention(x, weights, prefix, config)
    count = config["num_attention_heads"]
    gate = None
    if config["model_type"] in ("qwen3_next", "qwen3_5_moe_text"):
        # Each head's query and, after it, its gate.
        both = weights[f"{prefix}self_attn.q_proj.weight"].unflatten(0, (count, 2, -1))
        gate = (x @ both[:, 1].flatten(0, 1).T).sigmoid()
        weights = weights | {f"{prefix}self_attn.q_proj.weight": both[:, 0].flatten(0, 1)}
    query = heads(x, weights, prefix, "q", count, config)
    repeat = count // config["num_key_value_heads"]
    key, value = (t.repeat_interleave(repeat, 0) for t in keys_and_values(x, weights, prefix, config))
    scores = query @ key.transpose(1, 2) * config["head_dim"] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1).expand_as(scores)
    if f"{prefix}self_attn.index_q_proj.weight" in weights:
        hidden = hidden | ~chosen_blocks(x, weights, prefix, config).repeat_interleave(repeat, 0)
    output = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(0, 1).flatten(1)
    return (output if gate is None else output * gate) @ weights[prefix + "self_attn.o_proj.weight"].T


def chosen_blocks(x: torch.Tensor, weights: Weights, prefix: str, config: Config) -> torch.Tensor:
    """bool [KV heads, T, T]: of each token those in its own block of tokens, and in the blocks that hold the best match
    of an index query with an index key."""
    sparse = config.get("sparse_attention_config") or {
        "sparse_num_index_heads": config["index_n_heads"],
        "sparse_block_size": config["index_block_size"],
        "sparse_topk_blocks": config["index_topk_blocks"],
    }
    query = heads(x, weights, prefix, "index_q", sparse["sparse_num_index_heads"], config)
    match = query @ heads(x, weights, prefix, "index_k", 1, config).transpose(1, 2)
    size, count = sparse["sparse_block_size"], sparse["sparse_topk_blocks"]
    allowed = torch.zeros(match.shape, dtype=torch.bool)
    for head, token in itertools.product(range(match.shape[0]), range(len(x))):
        best = {
            start: float(match[head, token, start : min(start + size, token + 1)].max())
            for start in range(0, token + 1, size)
        }
        own = token // size * size
        others = sorted((start for start in best if start != own), key=lambda start: -best[start])
        for start in [own, *others[: count - 1]]:
            allowed[head, token, start : start + size] = True
    return allowed


def linear_attention(x: torch.Tensor, weights: Weights, prefix: str, config: Config) -> torch.Tensor:
    """The gated delta rule, token by token: S decays, and what it says of a key moves toward the key's value."""
    start = f"{prefix}linear_attn."
    own = {name.removeprefix(start): weight for name, weight in weights.items() if name.startswith(start)}
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    dim, wide, share = config["linear_key_head_dim"], config["linear_value_head_dim"], values // keys
    if "in_proj_z.weight" in own:
        # Qwen3.5: a projection each, all heads' queries before all keys before all values.
        mixed, z, b, a = (x @ own[f"in_proj_{name}.weight"].T for name in ("qkv", "z", "b", "a"))
    else:
        # Side by side for each key head: query, key, its value heads' values, and their gates.
        q, k, v, z = (
            (x @ own["in_proj_qkvz.weight"].T)
            .unflatten(1, (keys, -1))
            .split([dim, dim, share * wide, share * wide], -1)
        )
        b, a = (x @ own["in_proj_ba.weight"].T).unflatten(1, (keys, -1)).split([share, share], -1)
        mixed = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], 1)
    kernel = config["linear_conv_kernel_dim"]
    before = torch.cat([mixed.new_zeros(kernel - 1, mixed.shape[1]), mixed])
    taps = own["conv1d.weight"][:, 0]
    mixed = F.silu(sum(before[tap : tap + len(x)] * taps[:, tap] for tap in range(kernel)))
    q, k, v = mixed.split([keys * dim, keys * dim, values * wide], 1)
    unit = [
        t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        for t in (q.unflatten(1, (keys, -1)), k.unflatten(1, (keys, -1)))
    ]
    q, k = (t.repeat_interleave(share, 1) for t in unit)
    v, rate = v.unflatten(1, (values, -1)), b.flatten(1).sigmoid()
    decay = (-own["A_log"].exp() * F.softplus(a.flatten(1) + own["dt_bias"])).exp()
    state, outputs = x.new_zeros(values, dim, wide), []
    for token in range(len(x)):
        state = state * decay[token, :, None, None]
        missing = v[token] - torch.einsum("hkv,hk->hv", state, k[token])
        state = state + torch.einsum("hk,hv->hkv", k[token], rate[token, :, None] * missing)
        outputs.append(torch.einsum("hkv,hk->hv", state, q[token]) * dim**-0.5)
    output = rms_norm(torch.stack(outputs), own["norm.weight"], config["rms_norm_eps"])
    return (output * F.silu(z.reshape(output.shape))).flatten(1) @ own["out_proj.weight"].T


def turned_in_pairs(x: torch.Tensor, config: Config) -> torch.Tensor:
    """[heads, T, dim]: neighbours as complex numbers, each times its angle; frequencies as yarn has them."""
    yarn, dim = config["rope_scaling"], x.shape[-1]
    base, original = config["rope_theta"], yarn["original_max_position_embeddings"]
    place = torch.arange(dim // 2).double()
    frequency = base ** (-2 * place / dim)
    # The place of the pair that turns so often in the original length.
    low, high = (
        dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (yarn["beta_fast"], yarn["beta_slow"])
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
    ramp = ((place - low) / (high - low)).clamp(0, 1)
    frequency = frequency * (1 - ramp) + frequency / yarn["factor"] * ramp
    angles = torch.arange(x.shape[1])[:, None].double() * frequency
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2).float()


def latent_attention(x: torch.Tensor, weights: Weights, prefix: str, config: Config) -> torch.Tensor:
    """Multi-head latent attention: keys and values of all heads from one latent, one rotary key for all."""
    count, eps = config["num_attention_heads"], 1e-6
    plain, value_dim = config["qk_nope_head_dim"], config["v_head_dim"]
    own = {name: weights.get(f"{prefix}self_attn.{name}.weight") for name in (
        "q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj",
    )}  # fmt: skip
    if own["q_proj"] is None:
        query = rms_norm(x @ own["q_a_proj"].T, own["q_a_layernorm"], eps) @ own["q_b_proj"].T
    else:
        query = x @ own["q_proj"].T
    query = query.unflatten(1, (count, -1)).transpose(0, 1)
    latent, rotary_key = (x @ own["kv_a_proj_with_mqa"].T).split(
        [config["kv_lora_rank"], config["qk_rope_head_dim"]], 1
    )
    expanded = (rms_norm(latent, own["kv_a_layernorm"], eps) @ own["kv_b_proj"].T).unflatten(1, (count, -1))
    key, value = expanded.transpose(0, 1).split([plain, value_dim], -1)
    turned = turned_in_pairs(rotary_key[None], config).expand(count, -1, -1)
    query = torch.cat([query[..., :plain], turned_in_pairs(query[..., plain:], config)], -1)
    # yarn's temperature, squared: of queries and of keys.
    yarn = config["rope_scaling"]
    scale = query.shape[-1] ** -0.5 * (0.1 * yarn["mscale_all_dim"] * math.log(yarn["factor"]) + 1) ** 2
    scores = query @ torch.cat([key, turned], -1).transpose(1, 2) * scale
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    output = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
    return output.transpose(0, 1).flatten(1) @ weights[prefix + "self_attn.o_proj.weight"].T


def routed(
    x: torch.Tensor,
    weights: Weights,
    prefix: str,
    preferred: torch.Tensor,
    chosen: torch.Tensor,
    share: torch.Tensor,
    config: Config,
) -> torch.Tensor:
    """Token by token, expert by expert."""
    experts = next(config[key] for key in ("num_experts", "n_routed_experts", "num_local_experts") if key in config)

    def output(chosen: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(x)
        for expert in range(experts):
            tokens, slot = (chosen == expert).nonzero(as_tuple=True)
            output = gated(x[tokens], weights, f"{prefix}mlp.experts.{expert}.", config)
            result.index_add_(0, tokens, share[tokens, slot, None] * output)
        return result

    return of_a_choice(output, preferred, chosen, config)


def qwen3_moe(x: torch.Tensor, weights: Weights, prefix: str, config: Config) -> torch.Tensor:
    """Softmax over all experts, the largest kept; they sum to one where the config says so."""
    layer = int(prefix.split(".")[2])
    if layer in config["mlp_only_layers"] or (layer + 1) % config["decoder_sparse_step"]:
        return gated(x, weights, prefix + "mlp.", config)
    logits = x @ weights[prefix + "mlp.gate.weight"].T
    share, chosen = logits.softmax(-1).topk(config["num_experts_per_tok"], dim=-1)
    share = share / share.sum(-1, keepdim=True) if config["norm_topk_prob"] else share
    return routed(x, weights, prefix, logits, chosen, share, config)


def glm4_moe(x: torch.Tensor, weights: Weights, prefix: str, config: Config) -> torch.Tensor:
    """Sigmoid scores; the best groups by their two best experts, of these the best experts, the bias choosing only."""
    layer = int(prefix.split(".")[2])
    if layer < config["first_k_dense_replace"]:
        return gated(x, weights, prefix + "mlp.", config)
    scores = (x @ weights[prefix + "mlp.gate.weight"].T).sigmoid()
    preferred = scores + weights[prefix + "mlp.gate.e_score_correction_bias"]
    groups = preferred.unflatten(1, (config["n_group"], -1))
    kept = groups.sort(dim=-1, descending=True).values[..., :2].sum(-1).topk(config["topk_group"], dim=-1).indices
    allowed = torch.zeros(groups.shape[:2]).scatter(1, kept, 1.0)[..., None].expand_as(groups).flatten(1) > 0
    preferred = preferred.masked_fill(~allowed, -torch.inf)
    chosen = preferred.topk(config["num_experts_per_tok"], dim=-1).indices
    share = scores.gather(1, chosen)
    share = share / (share.sum(-1, keepdim=True) + 1e-20) if config["norm_topk_prob"] else share
    share = share * config["routed_scaling_factor"]
    output = routed(x, weights, prefix, preferred, chosen, share, config)
    return output + gated(x, weights, prefix + "mlp.shared_experts.", config)


def qwen3_next(x: torch.Tensor, weights: Weights, prefix: str, config: Config) -> torch.Tensor:
    """As Qwen3-MoE, and a shared expert weighed by the sigmoid of one number a token."""
    output = qwen3_moe(x, weights, prefix, config)
    if f"{prefix}mlp.shared_expert_gate.weight" not in weights:
        return output
    share = (x @ weights[f"{prefix}mlp.shared_expert_gate.weight"].T).sigmoid()
    return output + share * gated(x, weights, f"{prefix}mlp.shared_expert.", config)


def qwen3_5_moe(x: torch.Tensor, weights: Weights, prefix: str, config: Config) -> torch.Tensor:
    """As Qwen3-Next; every layer has experts, and the weights of those kept always sum to one."""
    always = {"mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True}
    return qwen3_next(x, weights, prefix, config | always)


def minimax_m3(x: torch.Tensor, weights: Weights, prefix: str, config: Config) -> torch.Tensor:
    """Sigmoid scores, the bias choosing only; the routed experts' sum counts as often as the config says."""
    if f"{prefix}mlp.gate.weight" not in weights:
        return gated(x, weights, prefix + "mlp.", config)
    scores = (x @ weights[prefix + "mlp.gate.weight"].T).sigmoid()
    preferred = scores + weights[prefix + "mlp.e_score_correction_bias"]
    chosen = preferred.topk(config["num_experts_per_tok"], dim=-1).indices
    share = scores.gather(1, chosen)
    share = share / share.sum(-1, keepdim=True) * config["routed_scaling_factor"]
    output = routed(x, weights, prefix, preferred, chosen, share, config)
    return output + gated(x, weights, prefix + "mlp.shared_experts.", config)


# DeepSeek V3 routes as GLM does.
BLOCKS: dict[str, Block] = {
    "qwen3_moe": qwen3_moe,
    "glm4_moe": glm4_moe,
    "deepseek_v3": glm4_moe,
    "qwen3_next": qwen3_next,
    "qwen3_5_moe_text": qwen3_5_moe,
    "minimax_m3_vl_text": minimax_m3,
}
# What reads the norm before the block beside the experts' gate and up, in a layer with experts.
READERS = {
    "qwen3_moe": ["mlp.gate.weight"],
    "glm4_moe": [
        "mlp.gate.weight",
        "mlp.shared_experts.gate_proj.weight",
        "mlp.shared_experts.up_proj.weight",
    ],
}
READERS["deepseek_v3"] = READERS["minimax_m3_vl"] = READERS["glm4_moe"]
READERS["qwen3_next"] = [
    "mlp.gate.weight",
    "mlp.shared_expert.gate_proj.weight",
    "mlp.shared_expert.up_proj.weight",
    "mlp.shared_expert_gate.weight",
]
READERS["qwen3_5_moe"] = READERS["qwen3_5_moe_text"] = READERS["qwen3_next"]


def hidden_states(ids: torch.Tensor, weights: Weights, config: Config) -> list[torch.Tensor]:
    """The residual stream before each layer and after the last, [T, H] each."""
    states = [weights["model.embed_tokens.weight"][ids]]
    for layer in range(config["num_hidden_layers"]):
        states.append(through_layer(states[-1], weights, layer, config))
    return states


def through_layer(x: torch.Tensor, weights: Weights, layer: int, config: Config) -> torch.Tensor:
    """The residual stream [T, H] after a layer, given that before it."""
    prefix = f"model.layers.{layer}."
    x = x + attention(normed(x, weights[prefix + "input_layernorm.weight"], config), weights, prefix, config)
    inner = normed(x, weights[prefix + "post_attention_layernorm.weight"], config)
    return x + BLOCKS[config["model_type"]](inner, weights, prefix, config)


def logits(ids: torch.Tensor, weights: Weights, config: Config) -> torch.Tensor:
    """[T] -> [T, vocabulary]."""
    last = normed(hidden_states(ids, weights, config)[-1], weights["model.norm.weight"], config)
    return last @ weights["lm_head.weight"].T
