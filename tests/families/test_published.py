"""Parameters of published models from their public config.json's sizes, against what the hub counts in their files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from mmq.families.registry import architecture_of
from mmq.families.sizes import Dimensions, Form, components, tensors_of
from mmq.families.table import MTP

QWEN3: dict[str, Any] = {"model_type": "qwen3_moe", "head_dim": 128, "num_key_value_heads": 4, "vocab_size": 151936}
GLM45: dict[str, Any] = {
    "model_type": "glm4_moe", "head_dim": 128, "num_attention_heads": 96, "num_key_value_heads": 8,
    "vocab_size": 151552, "n_shared_experts": 1, "attention_bias": True, "num_nextn_predict_layers": 1,
    "num_experts_per_tok": 8,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "n_shared_experts": 1, "attention_bias": False,
}  # fmt: skip

# What the hub's pages of the models say of their safetensors files, scales of fp8 weights not counted.
PUBLISHED = {
    "Qwen3-30B-A3B": (30_532_122_624, QWEN3 | {
        "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_experts": 128,
    }),
    "Qwen3-235B-A22B": (235_093_634_560, QWEN3 | {
        "hidden_size": 4096, "moe_intermediate_size": 1536, "num_hidden_layers": 94, "num_attention_heads": 64,
        "num_experts": 128,
    }),
    "Qwen3-Coder-480B-A35B": (480_154_875_392, QWEN3 | {
        "hidden_size": 6144, "moe_intermediate_size": 2560, "num_hidden_layers": 62, "num_attention_heads": 96,
        "num_key_value_heads": 8, "num_experts": 160,
    }),
    "GLM-4.5-Air": (110_468_824_832, GLM45 | {
        "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 46,
        "n_routed_experts": 128, "first_k_dense_replace": 1, "use_qk_norm": False,
    }),
    "GLM-4.5": (358_337_791_296, GLM45 | {
        "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 92,
        "n_routed_experts": 160, "first_k_dense_replace": 3, "use_qk_norm": True,
    }),
    "DeepSeek-V3": (684_489_845_504, DEEPSEEK | {
        "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256, "vocab_size": 129280,
        "first_k_dense_replace": 3, "num_nextn_predict_layers": 1,
    }),
    "Qwen3-Next-80B-A3B": (81_324_862_720, {
        "model_type": "qwen3_next", "hidden_size": 2048, "intermediate_size": 5120, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "num_hidden_layers": 48, "num_experts": 512, "vocab_size": 151936,
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "full_attention_interval": 4,
        "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_num_value_heads": 32,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    }),
    "Kimi-K2": (1_026_408_232_448, DEEPSEEK | {
        "model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], "num_attention_heads": 64,
        "num_key_value_heads": 64, "n_routed_experts": 384, "vocab_size": 163840, "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
    }),
}  # fmt: skip


# Families whose config class has a release's sizes as defaults, and which layers are of which kind, which it has not.
SIZED_BY_CLASS: dict[str, dict[str, Any]] = {
    "qwen3_5_moe": {},
    "minimax_m3_vl": {
        "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 57,
        "layer_types": ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57,
    },
}


@pytest.mark.parametrize(("family", "kinds"), SIZED_BY_CLASS.items(), ids=list(SIZED_BY_CLASS))
def test_parameters_of_transformers_class(family: str, kinds: dict[str, Any]) -> None:
    """Counted by the class on no device, tower and all, but for what predicts further tokens."""
    config = AutoConfig.for_model(family, text_config=kinds)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    settings = config.to_dict()
    arch = architecture_of(settings)
    parts = components(tensors_of(Dimensions.of(settings, arch), arch, "hybrid"))
    counted = {name: part.parameters for name, part in parts.items() if name != MTP}
    assert sum(counted.values()) == sum(tensor.numel() for tensor in model.state_dict().values()) > 30e9


@pytest.mark.parametrize(("published", "config"), PUBLISHED.values(), ids=list(PUBLISHED))
def test_parameters(published: int, config: dict[str, Any]) -> None:
    arch = architecture_of(config)
    dims = Dimensions.of(config, arch)
    forms: tuple[Form, ...] = ("source", "hybrid")
    for form in forms:
        assert sum(own.parameters for own in components(tensors_of(dims, arch, form)).values()) == published
