"""Qwen3-Next: linear attention in three of four layers, norms that multiply by one plus their weight, a gate on full
attention's output, softmax routing, and a shared expert with a gate of its own, which reads the smoothed norm as well.

vLLM holds the router in the model's dtype (no `params_dtype` in its qwen3_next.py). The projections of a layer's
decay and learning rate are too narrow for fp8 blocks, and stay bf16 in fp8 releases.
"""

from __future__ import annotations

from mmq.families.table import MTP, Architecture, Mlp, SomeLayers, Weight

FINE = ("BF16", "F32")
# What linear attention has beside its first projections.
LINEAR_REST = (
    Weight("linear_attn.out_proj.weight", ("hidden", "values")),
    Weight("linear_attn.conv1d.weight", ("queries, keys and values", "one", "kernel")),
    Weight("linear_attn.A_log", ("value heads",), dtypes=FINE),
    Weight("linear_attn.dt_bias", ("value heads",), dtypes=FINE),
    Weight("linear_attn.norm.weight", ("value head",), dtypes=FINE),
    Weight("input_layernorm.weight", ("hidden",)),
)

QWEN3_NEXT = Architecture(
    model_type="qwen3_next",
    causal_lm="Qwen3NextForCausalLM",
    modeling="transformers.models.qwen3_next.modeling_qwen3_next",
    config_class="Qwen3NextConfig",
    layer_class="Qwen3NextDecoderLayer",
    rotary_class="Qwen3NextRotaryEmbedding",
    layer="model.layers.{layer}.",
    attention_weights=(
        Weight("self_attn.q_proj.weight", ("query and gate", "hidden")),
        Weight("self_attn.k_proj.weight", ("key", "hidden")),
        Weight("self_attn.v_proj.weight", ("key", "hidden")),
        Weight("self_attn.o_proj.weight", ("hidden", "query")),
        Weight("self_attn.q_norm.weight", ("head",)),
        Weight("self_attn.k_norm.weight", ("head",)),
        Weight("input_layernorm.weight", ("hidden",)),
    ),
    linear_weights=(
        Weight("linear_attn.in_proj_qkvz.weight", ("queries, keys, values and gates", "hidden")),
        Weight("linear_attn.in_proj_ba.weight", ("two a value head", "hidden"), plain=True),
        *LINEAR_REST,
    ),
    linear_layers=SomeLayers(typed=("layer_types", "linear_attention"), step="full_attention_interval", step_default=4),
    sizes={
        "query and gate": ((2, "num_attention_heads", "head_dim"),),
        "queries, keys, values and gates": (
            (2, "linear_num_key_heads", "linear_key_head_dim"),
            (2, "linear_num_value_heads", "linear_value_head_dim"),
        ),
        "queries, keys and values": (
            (2, "linear_num_key_heads", "linear_key_head_dim"),
            ("linear_num_value_heads", "linear_value_head_dim"),
        ),
        "two a value head": ((2, "linear_num_value_heads"),),
        "value heads": (("linear_num_value_heads",),),
        "value head": (("linear_value_head_dim",),),
        "values": (("linear_num_value_heads", "linear_value_head_dim"),),
        "kernel": (("linear_conv_kernel_dim",),),
        "shared": (("shared_expert_intermediate_size",),),
    },
    smooth_norm="post_attention_layernorm.weight",
    norm_offset=1.0,
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
    shared=Mlp("mlp.shared_expert.", "shared"),
    shared_gate=Weight("mlp.shared_expert_gate.weight", ("one", "hidden"), plain=True, whole=True),
    dense=Mlp("mlp.", "dense"),
    dense_layers=SomeLayers(listed="mlp_only_layers", step="decoder_sparse_step"),
    carried=(("mtp.", MTP),),
    carried_layers=("mtp.layers.0.",),
    carried_weights=(
        Weight("mtp.fc.weight", ("hidden", "pair")),
        Weight("mtp.pre_fc_norm_embedding.weight", ("hidden",)),
        Weight("mtp.pre_fc_norm_hidden.weight", ("hidden",)),
        Weight("mtp.norm.weight", ("hidden",)),
    ),
    default_rotary_share=0.25,
    experts_key="num_experts",
    intermediate_key="moe_intermediate_size",
    config_fields=("full_attention_interval",),
    example={
        "full_attention_interval": 4,
        "linear_num_key_heads": 1,
        "linear_key_head_dim": 128,
        "linear_num_value_heads": 2,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": 128,
        "partial_rotary_factor": 0.25,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
    },
)
