"""Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder: softmax routing, norms on each head of queries and keys.

vLLM holds the router in the model's dtype (no `params_dtype` in its qwen3_moe.py).
"""

from __future__ import annotations

from mmq.families.table import Architecture, Mlp, SomeLayers, grouped_query

QWEN3_MOE = Architecture(
    model_type="qwen3_moe",
    causal_lm="Qwen3MoeForCausalLM",
    modeling="transformers.models.qwen3_moe.modeling_qwen3_moe",
    config_class="Qwen3MoeConfig",
    layer_class="Qwen3MoeDecoderLayer",
    rotary_class="Qwen3MoeRotaryEmbedding",
    layer="model.layers.{layer}.",
    attention_weights=grouped_query("head", "head"),
    smooth_norm="post_attention_layernorm.weight",
    router="mlp.gate.weight",
    router_bias=None,
    router_stored="BF16",
    router_served="BF16",
    expert="mlp.experts.{expert}.",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
    module_names=(),
    moe_module="mlp",
    dense=Mlp("mlp.", "dense"),
    dense_layers=SomeLayers(listed="mlp_only_layers", step="decoder_sparse_step"),
    experts_key="num_experts",
    intermediate_key="moe_intermediate_size",
    config_fields=("head_dim",),
    example={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False},
)
