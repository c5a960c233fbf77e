"""MiniMax-M2, M2.1, M2.5 and M2.7: one architecture."""

from __future__ import annotations

from mmq.families.table import Architecture, grouped_query

MINIMAX_M2 = Architecture(
    model_type="minimax_m2",
    causal_lm="MiniMaxM2ForCausalLM",
    modeling="transformers.models.minimax_m2.modeling_minimax_m2",
    config_class="MiniMaxM2Config",
    layer_class="MiniMaxM2DecoderLayer",
    rotary_class="MiniMaxM2RotaryEmbedding",
    layer="model.layers.{layer}.",
    # The norms of queries and keys run over all heads at once (`qk_norm_type: per_layer`).
    attention_weights=grouped_query("query", "key"),
    smooth_norm="post_attention_layernorm.weight",
    router="block_sparse_moe.gate.weight",
    router_bias="block_sparse_moe.e_score_correction_bias",
    expert="block_sparse_moe.experts.{expert}.",
    gate="w1",
    up="w3",
    down="w2",
    module_names=(("block_sparse_moe.", "mlp."),),
    moe_module="mlp",
    default_theta=5_000_000.0,
    rotary_dim_key="rotary_dim",
    example={
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "use_mtp": True,
    },
)
