"""config.json of the outputs: what compressed-tensors and vLLM must be told of the tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
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


def output_config(
    architecture: Architecture, recipe: Recipe, source: dict[str, Any], kept: Sequence[str]
) -> dict[str, Any]:
    """The source's config.json with the rotary settings spelled out and a compressed-tensors quantization_config.

    Args:
        kept: modules in a decoder layer that are block fp8, as in the source; none where all of it is bf16, as the awq
            stage leaves it.
    """
    groups = {"group_0": experts_scheme(architecture, recipe.awq.group_size)}
    if kept:
        dynamic = recipe.restore.attention_activations == "dynamic"
        groups["group_1"] = kept_scheme(architecture, kept, dynamic)
    hybrid = len(groups) > 1
    scheme = recipe.awq.kv_cache_scheme
    quantization = QuantizationConfig(
        config_groups=groups,
        format=(CompressionFormat.mixed_precision if hybrid else CompressionFormat.pack_quantized).value,
        quantization_status=QuantizationStatus.COMPRESSED,
        kv_cache_scheme=QuantizationArgs(**scheme.model_dump()) if scheme else None,
        ignore=[architecture.head.removesuffix(".weight"), *ignored_layers(architecture)],
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


def ignored_layers(architecture: Architecture) -> list[str]:
    """Patterns of the layers past the last: what the groups' patterns would match there is not quantized."""
    return [f"re:{re.escape(architecture.layer_prefix(layer))}.*" for layer in architecture.extra_at]


def kept_scheme(architecture: Architecture, kept: Sequence[str], dynamic_activations: bool) -> QuantizationScheme:
    """Block-fp8 attention, dense layers and shared experts; with dynamic activations, as the source's
    `activation_scheme: dynamic` says."""
    activations = QuantizationArgs(
        num_bits=8,
        type=QuantizationType.FLOAT,
        strategy=QuantizationStrategy.GROUP,
        group_size=BLOCK,
        symmetric=True,
        dynamic=True,
    )
    return QuantizationScheme(
        targets=kept_targets(architecture, kept),
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


def kept_targets(architecture: Architecture, kept: Sequence[str]) -> list[str]:
    """Patterns of what keeps the source's fp8, a parent module each: under transformers' names and the hub's alike."""
    by_parent: dict[str, list[str]] = {}
    for module in kept:
        parent, _, linear = module.rpartition(".")
        by_parent.setdefault(parent, []).append(linear.removesuffix("_proj"))
    targets = []
    for parent, linears in by_parent.items():
        # An expert's linear layers lie deeper than a dense layer's, under the same parent.
        above = ".*" if parent == architecture.attention_module else r".*\.\d+\."
        targets.append(rf"re:{above}{re.escape(parent)}\.({'|'.join(map(re.escape, linears))})_proj$")
    return targets
