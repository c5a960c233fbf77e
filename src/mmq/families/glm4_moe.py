"""GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7: sigmoid routing with a bias in groups, a shared expert, leading dense layers,
half of each head turning, a layer of multi-token prediction past the last.

vLLM holds the router in fp32.
"""

from __future__ import annotations

from mmq.families.table import Architecture, Mlp, SomeLayers, Weight, grouped_query

GLM4_MOE = Architecture(
    model_type="glm4_moe",
    causal_lm="Glm4MoeForCausalLM",
    modeling="transformers.models.glm4_moe.modeling_glm4_moe",
    config_class="Glm4MoeConfig",
    layer_class="Glm4MoeDecoderLayer",
    rotary_class="Glm4MoeRotaryEmbedding",
    layer="model.layers.{layer}.",
    attention_weights=(
        *grouped_query("head", "head", norms="use_qk_norm"),
        Weight("self_attn.q_proj.bias", ("query",), "attention_bias"),
        Weight("self_attn.k_proj.bias", ("key",), "attention_bias"),
        Weight("self_attn.v_proj.bias", ("key",), "attention_bias"),
    ),
    smooth_norm="post_attention_layernorm.weight",
    router="mlp.gate.weight",
    router_bias="mlp.gate.e_score_correction_bias",
    router_stored="BF16",
    router_served="F32",
    expert="mlp.experts.{expert}.",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
    module_names=(),
    moe_module="mlp",
    shared=Mlp("mlp.shared_experts.", "shared"),
    dense=Mlp("mlp.", "dense"),
    dense_layers=SomeLayers(leading="first_k_dense_replace"),
    extra_weights=(
        Weight("eh_proj.weight", ("hidden", "pair")),
        Weight("enorm.weight", ("hidden",)),
        Weight("hnorm.weight", ("hidden",)),
        Weight("embed_tokens.weight", ("vocabulary", "hidden")),
        Weight("shared_head.norm.weight", ("hidden",)),
        Weight("shared_head.head.weight", ("vocabulary", "hidden")),
    ),
    default_rotary_share=0.5,
    experts_key="n_routed_experts",
    intermediate_key="moe_intermediate_size",
    sizes={"shared": (("moe_intermediate_size", "n_shared_experts"),)},
    extra_layers_key="num_nextn_predict_layers",
    config_fields=("head_dim",),
    example={
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 1,
    },
)
