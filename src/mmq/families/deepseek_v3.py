"""DeepSeek V3, R1 and V3.1, Kimi K2: multi-head latent attention, sigmoid routing with a bias in groups, a shared
expert, leading dense layers, a layer of multi-token prediction past the last.

vLLM holds the router in the model's dtype (its deepseek_v2.py, `_get_moe_router_dtype`), and caches one latent and one
rotary key for all heads, for which it takes no calibrated scales (its compressed_tensors.py, `get_quant_method`).
"""

from __future__ import annotations

from mmq.families.table import Architecture, Mlp, SomeLayers, Weight

DEEPSEEK_V3 = Architecture(
    model_type="deepseek_v3",
    causal_lm="DeepseekV3ForCausalLM",
    modeling="transformers.models.deepseek_v3.modeling_deepseek_v3",
    config_class="DeepseekV3Config",
    layer_class="DeepseekV3DecoderLayer",
    rotary_class="DeepseekV3RotaryEmbedding",
    layer="model.layers.{layer}.",
    attention_weights=(
        Weight("self_attn.q_proj.weight", ("query", "hidden"), unless="q_lora_rank"),
        Weight("self_attn.q_a_proj.weight", ("query latent", "hidden"), when="q_lora_rank", whole=True),
        Weight("self_attn.q_b_proj.weight", ("query", "query latent"), when="q_lora_rank"),
        Weight("self_attn.kv_a_proj_with_mqa.weight", ("latent and rotary", "hidden"), whole=True),
        Weight("self_attn.kv_b_proj.weight", ("keys and values", "latent")),
        Weight("self_attn.o_proj.weight", ("hidden", "values")),
        Weight("self_attn.q_a_layernorm.weight", ("query latent",), when="q_lora_rank"),
        Weight("self_attn.kv_a_layernorm.weight", ("latent",)),
        Weight("self_attn.q_a_proj.bias", ("query latent",), when="attention_bias"),
        Weight("self_attn.kv_a_proj_with_mqa.bias", ("latent and rotary",), when="attention_bias"),
        Weight("self_attn.o_proj.bias", ("hidden",), when="attention_bias"),
        Weight("input_layernorm.weight", ("hidden",)),
    ),
    latent="latent and rotary",
    sizes={
        "query": (("num_attention_heads", "qk_nope_head_dim"), ("num_attention_heads", "qk_rope_head_dim")),
        "query latent": (("q_lora_rank",),),
        "latent": (("kv_lora_rank",),),
        "latent and rotary": (("kv_lora_rank",), ("qk_rope_head_dim",)),
        "keys and values": (("num_attention_heads", "qk_nope_head_dim"), ("num_attention_heads", "v_head_dim")),
        "values": (("num_attention_heads", "v_head_dim"),),
        "shared": (("moe_intermediate_size", "n_shared_experts"),),
    },
    smooth_norm="post_attention_layernorm.weight",
    router="mlp.gate.weight",
    router_bias="mlp.gate.e_score_correction_bias",
    router_stored="BF16",
    router_served="BF16",
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
    experts_key="n_routed_experts",
    intermediate_key="moe_intermediate_size",
    extra_layers_key="num_nextn_predict_layers",
    # What turns of a head has a width of its own, and in transformers its name is head_dim.
    head_dim_key="qk_rope_head_dim",
    example={
        "attention_bias": False,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "rope_interleave": True,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 4096,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 1024,
        },
    },
)
