"""Qwen3.5 and Qwen3.6 with experts: Qwen3-Next's decoder with the projections of linear attention apart, beside a
vision tower.

The release with the tower keeps the decoder's settings in `text_config` and its tensors below `model.language_model.`;
of text alone both lie where Qwen3-Next's do. bf16 releases store all experts of a layer in two tensors.
"""

from __future__ import annotations

from dataclasses import replace

from mmq.families.qwen3_next import LINEAR_REST, QWEN3_NEXT
from mmq.families.table import Blocks, SomeLayers, Stack, Weight

QWEN3_5_MOE_TEXT = replace(
    QWEN3_NEXT,
    model_type="qwen3_5_moe_text",
    causal_lm="Qwen3_5MoeForCausalLM",
    modeling="transformers.models.qwen3_5_moe.modeling_qwen3_5_moe",
    config_class="Qwen3_5MoeTextConfig",
    layer_class="Qwen3_5MoeDecoderLayer",
    rotary_class="Qwen3_5MoeTextRotaryEmbedding",
    linear_weights=(
        Weight("linear_attn.in_proj_qkv.weight", ("queries, keys and values", "hidden")),
        Weight("linear_attn.in_proj_z.weight", ("values", "hidden")),
        Weight("linear_attn.in_proj_b.weight", ("value heads", "hidden"), plain=True),
        Weight("linear_attn.in_proj_a.weight", ("value heads", "hidden"), plain=True),
        *LINEAR_REST,
    ),
    dense=None,
    dense_layers=SomeLayers(),
    stacks=(
        Stack("mlp.experts.gate_up_proj", ("gate_proj", "up_proj")),
        Stack("mlp.experts.down_proj", ("down_proj",)),
    ),
    rotary_axes=3,
    example={
        key: value
        for key, value in QWEN3_NEXT.example.items()
        if key not in ("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")
    },
)

_VISION = "vision_config"
_TOWER = "model.visual."

QWEN3_5_MOE = replace(
    QWEN3_5_MOE_TEXT,
    model_type="qwen3_5_moe",
    causal_lm="Qwen3_5MoeForConditionalGeneration",
    section="text_config",
    layer="model.language_model.layers.{layer}.",
    embedding="model.language_model.embed_tokens.weight",
    final_norm="model.language_model.norm.weight",
    carried=(*QWEN3_5_MOE_TEXT.carried, (_TOWER, "vision tower")),
    carried_weights=(
        *QWEN3_5_MOE_TEXT.carried_weights,
        *(
            Weight(f"{_TOWER}{name}", shape, when=_VISION)
            for name, shape in (
                ("patch_embed.proj.weight", ("tower", "colours", "frames", "patch", "patch")),
                ("patch_embed.proj.bias", ("tower",)),
                ("pos_embed.weight", ("places", "tower")),
                ("merger.norm.weight", ("tower",)),
                ("merger.norm.bias", ("tower",)),
                ("merger.linear_fc1.weight", ("merged", "merged")),
                ("merger.linear_fc1.bias", ("merged",)),
                ("merger.linear_fc2.weight", ("tower's output", "merged")),
                ("merger.linear_fc2.bias", ("tower's output",)),
            )
        ),
    ),
    carried_blocks=(
        Blocks(
            _TOWER + "blocks.{block}.",
            f"{_VISION}.depth",
            tuple(
                Weight(name, shape)
                for name, shape in (
                    ("norm1.weight", ("tower",)),
                    ("norm1.bias", ("tower",)),
                    ("norm2.weight", ("tower",)),
                    ("norm2.bias", ("tower",)),
                    ("attn.qkv.weight", ("tower's queries, keys and values", "tower")),
                    ("attn.qkv.bias", ("tower's queries, keys and values",)),
                    ("attn.proj.weight", ("tower", "tower")),
                    ("attn.proj.bias", ("tower",)),
                    ("mlp.linear_fc1.weight", ("tower's inner", "tower")),
                    ("mlp.linear_fc1.bias", ("tower's inner",)),
                    ("mlp.linear_fc2.weight", ("tower", "tower's inner")),
                    ("mlp.linear_fc2.bias", ("tower",)),
                )
            ),
        ),
    ),
    sizes={
        **QWEN3_5_MOE_TEXT.sizes,
        "tower": ((f"{_VISION}.hidden_size",),),
        "tower's queries, keys and values": ((3, f"{_VISION}.hidden_size"),),
        "tower's inner": ((f"{_VISION}.intermediate_size",),),
        "tower's output": ((f"{_VISION}.out_hidden_size",),),
        "merged": ((f"{_VISION}.hidden_size", f"{_VISION}.spatial_merge_size", f"{_VISION}.spatial_merge_size"),),
        "places": ((f"{_VISION}.num_position_embeddings",),),
        "colours": ((f"{_VISION}.in_channels",),),
        "frames": ((f"{_VISION}.temporal_patch_size",),),
        "patch": ((f"{_VISION}.patch_size",),),
    },
    example={
        "text_config": {**QWEN3_5_MOE_TEXT.example, "model_type": QWEN3_5_MOE_TEXT.model_type},
        _VISION: {
            "model_type": "qwen3_5_moe_vision",
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "in_channels": 3,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": 256,
            "num_position_embeddings": 16,
        },
        "image_token_id": 4,
        "video_token_id": 5,
        "vision_start_token_id": 6,
        "vision_end_token_id": 7,
    },
)
