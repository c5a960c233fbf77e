"""MiniMax-M3: norms that multiply by one plus their weight, attention that chooses blocks of tokens, sigmoid routing
with a bias, a gated unit that clamps, a shared expert, leading dense layers, beside a vision tower.

vLLM holds the router in fp32, and q, k, v and what chooses the blocks in one layer: one scheme for all five.
"""

from __future__ import annotations

from mmq.families.table import MTP, Architecture, Blocks, Clamped, Mlp, SomeLayers, Weight, grouped_query

_VISION = "vision_config"
_TOWER = "vision tower"
_ENCODER = "vision_tower.vision_model."

MINIMAX_M3_VL = Architecture(
    model_type="minimax_m3_vl",
    causal_lm="MiniMaxM3SparseForConditionalGeneration",
    modeling="transformers.models.minimax_m3_vl.modeling_minimax_m3_vl",
    config_class="MiniMaxM3VLTextConfig",
    layer_class="MiniMaxM3VLDecoderLayer",
    rotary_class="MiniMaxM3VLRotaryEmbedding",
    section="text_config",
    # As the release has them, or as transformers names them.
    renamed=(
        ("sparse_attention_config.sparse_num_index_heads", "index_n_heads"),
        ("sparse_attention_config.sparse_index_dim", "index_head_dim"),
        ("sparse_attention_config.sparse_block_size", "index_block_size"),
        ("sparse_attention_config.sparse_topk_blocks", "index_topk_blocks"),
        ("sparse_attention_config.sparse_local_block", "index_local_blocks"),
    ),
    assumed={
        "dense_intermediate_size": 12288,
        "shared_intermediate_size": 3072,
        "projector_hidden_size": 6144,
        "index_n_heads": 4,
        "index_head_dim": 128,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "hidden_act": "swigluoai",
    },
    layer="language_model.model.layers.{layer}.",
    embedding="language_model.model.embed_tokens.weight",
    final_norm="language_model.model.norm.weight",
    head="language_model.lm_head.weight",
    attention_weights=grouped_query("head", "head"),
    sparse_weights=(
        Weight("self_attn.index_q_proj.weight", ("index queries", "hidden")),
        Weight("self_attn.index_k_proj.weight", ("index head", "hidden"), whole=True),
        Weight("self_attn.index_q_norm.weight", ("index head",)),
        Weight("self_attn.index_k_norm.weight", ("index head",)),
    ),
    sparse_layers=SomeLayers(
        typed=("layer_types", "minimax_m3_sparse"), flagged=("sparse_attention_config.sparse_attention_freq", 1)
    ),
    sparse_module="self_attn.indexer",
    sparse_reach=("index_topk_blocks", "index_block_size"),
    sparse_key="index head",
    smooth_norm="post_attention_layernorm.weight",
    norm_offset=1.0,
    router="block_sparse_moe.gate.weight",
    router_bias="block_sparse_moe.e_score_correction_bias",
    routed_scale_key="routed_scaling_factor",
    expert="block_sparse_moe.experts.{expert}.",
    gate="w1",
    up="w3",
    down="w2",
    clamped=Clamped(("swigluoai", "silu"), "swiglu_alpha", "swiglu_limit"),
    fused=((("gate_proj", "up_proj"), "gate_up_proj"),),
    module_names=(
        ("self_attn.index_q_", "self_attn.indexer.q_"),
        ("self_attn.index_k_", "self_attn.indexer.k_"),
        ("block_sparse_moe.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),
        ("block_sparse_moe.", "mlp."),
    ),
    moe_module="mlp",
    shared=Mlp("block_sparse_moe.shared_experts.", "shared"),
    dense=Mlp("mlp.", "dense"),
    dense_layers=SomeLayers(typed=("mlp_layer_types", "dense"), flagged=("moe_layer_freq", 0)),
    dense_key="dense_intermediate_size",
    carried=(
        ("mtp.", MTP),
        ("language_model.mtp.", MTP),
        ("language_model.model.mtp.", MTP),
        ("vision_tower.", _TOWER),
        ("multi_modal_projector.", _TOWER),
        ("patch_merge_mlp.", _TOWER),
    ),
    carried_weights=tuple(
        Weight(name, shape, when=_VISION)
        for name, shape in (
            (f"{_ENCODER}embeddings.patch_embedding.weight", ("tower", "colours", "frames", "patch", "patch")),
            (f"{_ENCODER}pre_layrnorm.weight", ("tower",)),
            (f"{_ENCODER}pre_layrnorm.bias", ("tower",)),
            ("multi_modal_projector.linear_1.weight", ("projector", "tower")),
            ("multi_modal_projector.linear_1.bias", ("projector",)),
            ("multi_modal_projector.linear_2.weight", ("hidden", "projector")),
            ("multi_modal_projector.linear_2.bias", ("hidden",)),
            ("patch_merge_mlp.linear_1.weight", ("projector", "merged")),
            ("patch_merge_mlp.linear_1.bias", ("projector",)),
            ("patch_merge_mlp.linear_2.weight", ("hidden", "projector")),
            ("patch_merge_mlp.linear_2.bias", ("hidden",)),
        )
    ),
    carried_blocks=(
        Blocks(
            _ENCODER + "encoder.layers.{block}.",
            f"{_VISION}.num_hidden_layers",
            (
                *(
                    Weight(f"{name}.{kind}", shape if kind == "weight" else shape[:1])
                    for name, shape in (
                        ("self_attn.q_proj", ("tower", "tower")),
                        ("self_attn.k_proj", ("tower", "tower")),
                        ("self_attn.v_proj", ("tower", "tower")),
                        ("self_attn.out_proj", ("tower", "tower")),
                        ("mlp.fc1", ("tower's inner", "tower")),
                        ("mlp.fc2", ("tower", "tower's inner")),
                        ("layer_norm1", ("tower",)),
                        ("layer_norm2", ("tower",)),
                    )
                    for kind in ("weight", "bias")
                ),
            ),
        ),
    ),
    sizes={
        "index queries": (("index_n_heads", "index_head_dim"),),
        "index head": (("index_head_dim",),),
        "shared": (("shared_intermediate_size",),),
        "tower": ((f"{_VISION}.hidden_size",),),
        "tower's inner": ((f"{_VISION}.intermediate_size",),),
        "projector": (("projector_hidden_size",),),
        "merged": (("hidden_size", f"{_VISION}.spatial_merge_size", f"{_VISION}.spatial_merge_size"),),
        "colours": ((f"{_VISION}.num_channels",),),
        "frames": ((f"{_VISION}.temporal_patch_size",),),
        "patch": ((f"{_VISION}.patch_size",),),
    },
    default_theta=5_000_000.0,
    default_rotary_share=0.5,
    rotary_dim_key="rotary_dim",
    config_fields=("moe_layer_freq", "sparse_attention_config"),
    example={
        "text_config": {
            "model_type": "minimax_m3_vl_text",
            "hidden_act": "swigluoai",
            "moe_layer_freq": [0, 1],
            "shared_intermediate_size": 128,
            "routed_scaling_factor": 2.0,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "sparse_attention_config": {
                "sparse_attention_freq": [0, 1],
                "sparse_num_index_heads": 2,
                "sparse_index_dim": 64,
                "sparse_block_size": 32,
                "sparse_topk_blocks": 2,
                "sparse_local_block": 1,
            },
        },
        _VISION: {
            "model_type": "minimax_m3_vl_vision",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_channels": 3,
            "image_size": 16,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
        },
        "projector_hidden_size": 48,
        "image_token_index": 4,
        "video_token_index": 5,
    },
)
