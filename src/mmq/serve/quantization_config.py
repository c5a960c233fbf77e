"""config.json of the outputs: what compressed-tensors and vLLM must be told of the tensors."""

from __future__ import annotations

import re
from typing import Any

import compressed_tensors
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    QuantizationType,
)

from mmq.families.rotary import rope_parameters
from mmq.families.table import Architecture
from mmq.recipe import Recipe
from mmq.tensors.fp8 import BLOCK
from mmq.tensors.int4 import weight_args


def output_config(architecture: Architecture, recipe: Recipe, source: dict[str, Any], hybrid: bool) -> dict[str, Any]:
    """The source's config.json with the rotary settings spelled out and a compressed-tensors quantization_config.

    Args:
        hybrid: attention is block fp8; otherwise it is bf16, as the awq stage leaves it.
    """
    groups = {"group_0": experts_scheme(architecture, recipe.awq.group_size)}
    if hybrid:
        groups["group_1"] = attention_scheme(architecture, recipe.restore.attention_activations == "dynamic")
    scheme = recipe.awq.kv_cache_scheme
    quantization = QuantizationConfig(
        config_groups=groups,
        format=(CompressionFormat.mixed_precision if hybrid else CompressionFormat.pack_quantized).value,
        quantization_status=QuantizationStatus.COMPRESSED,
        kv_cache_scheme=QuantizationArgs(**scheme.model_dump()) if scheme else None,
        ignore=[architecture.head.removesuffix(".weight")],
    )
    config = {key: value for key, value in source.items() if key != "quantization_config"}
    config["rope_parameters"] = rope_parameters(source, architecture)
    if config.get("rope_scaling"):
        # transformers takes this one where there are both, and older servers know no other.
        config["rope_scaling"] = config["rope_parameters"]
    config["quantization_config"] = quantization.model_dump(mode="json") | {"version": compressed_tensors.__version__}
    return config


def experts_scheme(architecture: Architecture, group_size: int) -> QuantizationScheme:
    """int4 experts. The pattern names no prefix: vLLM matches transformers' module names, sglang the hub's."""
    linears = "|".join(re.escape(linear) for linear in sorted(architecture.expert_linears))
    return QuantizationScheme(
        targets=[rf"re:.*experts\.\d+\.({linears})$"],
        weights=weight_args(group_size),
        format=CompressionFormat.pack_quantized.value,
    )


def attention_scheme(architecture: Architecture, dynamic_activations: bool) -> QuantizationScheme:
    """Block-fp8 attention; with dynamic activations, as the source's `activation_scheme: dynamic` says."""
    parent, _, _ = architecture.attention[0].rpartition(".")
    linears = "|".join(linear.rpartition(".")[2].removesuffix("_proj") for linear in architecture.attention)
    activations = QuantizationArgs(
        num_bits=8,
        type=QuantizationType.FLOAT,
        strategy=QuantizationStrategy.GROUP,
        group_size=BLOCK,
        symmetric=True,
        dynamic=True,
    )
    return QuantizationScheme(
        targets=[rf"re:.*{re.escape(parent)}\.({linears})_proj$"],
        weights=QuantizationArgs(
            num_bits=8,
            type=QuantizationType.FLOAT,
            strategy=QuantizationStrategy.BLOCK,
            block_structure=[BLOCK, BLOCK],
            symmetric=True,
            dynamic=False,
        ),
        input_activations=activations if dynamic_activations else None,
        format=CompressionFormat.float_quantized.value,
    )
