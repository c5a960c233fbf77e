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
from mmq.families.sizes import BLOCK_FP8, Storage
from mmq.families.table import Architecture
from mmq.recipe import Recipe
from mmq.source.formats import format_of
from mmq.tensors.int4 import weight_args

COMMON_NAMES = ["down_proj", "gate_proj", "up_proj"]


def output_config(
    architecture: Architecture, recipe: Recipe, source: dict[str, Any], kept: Sequence[str]
) -> dict[str, Any]:
    """The source's config.json with the rotary settings spelled out and a compressed-tensors quantization_config. That
    stands where transformers and vLLM look first: beside the section with the decoder's settings, if there is one.

    Args:
        source: the source's config.json.
        kept: modules that are block fp8, as in the source; none where all is bf16, as the awq stage leaves it.
    """
    carried = [module for module in kept if architecture.is_extra(module)]
    both = recipe.restore.expert_targets == "both" and has_two_names(architecture)
    groups = {"group_0": experts_scheme(architecture, recipe.awq.group_size, fp8_prefixes(architecture, carried), both)}
    if kept:
        dynamic = recipe.restore.attention_activations == "dynamic"
        groups["group_1"] = kept_scheme(architecture, kept, dynamic, _fp8_storage(architecture.settings(source)))
    hybrid = len(groups) > 1
    scheme = recipe.awq.kv_cache_scheme if architecture.has_kv_cache_scales else None
    quantization = QuantizationConfig(
        config_groups=groups,
        format=(CompressionFormat.mixed_precision if hybrid else CompressionFormat.pack_quantized).value,
        quantization_status=QuantizationStatus.COMPRESSED,
        kv_cache_scheme=QuantizationArgs(**scheme.model_dump()) if scheme else None,
        ignore=[
            architecture.head.removesuffix(".weight"),
            *ignored_extras(architecture, carried),
            *left_between(architecture, source, kept),
        ],
    )
    config = unquantized(architecture, source)
    decoder = config[architecture.section] if architecture.section else config
    decoder["rope_parameters"] = rope_parameters(source, architecture)
    if decoder.get("rope_scaling"):
        # transformers takes this one where there are both, and older servers know no other.
        decoder["rope_scaling"] = decoder["rope_parameters"]
    config["quantization_config"] = quantization.model_dump(mode="json") | {"version": compressed_tensors.__version__}
    return config


def unquantized(architecture: Architecture, source: dict[str, Any]) -> dict[str, Any]:
    """A source's config.json that says nothing of quantization, at none of the places where it may."""
    config = {key: value for key, value in source.items() if key != "quantization_config"}
    if architecture.section:
        decoder = config[architecture.section]
        config[architecture.section] = {key: own for key, own in decoder.items() if key != "quantization_config"}
    return config


def has_two_names(architecture: Architecture) -> bool:
    """Whether its experts have other names on the hub than those that most families have, so that both can be said."""
    return sorted(architecture.expert_linears) != COMMON_NAMES


def names_both(config: dict[str, Any]) -> bool:
    """Whether a result's config.json has the names that most families' experts have."""
    expert = "model.layers.0.mlp.experts.0."
    try:
        groups = config["quantization_config"]["config_groups"].values()
        patterns = [target.removeprefix("re:") for group in groups for target in group["targets"]]
        return all(any(re.match(pattern, expert + linear) for pattern in patterns) for linear in COMMON_NAMES)
    except (KeyError, TypeError, AttributeError, re.error):
        # By another hand, and for verify to name.
        return False


def experts_scheme(
    architecture: Architecture, group_size: int, elsewhere: Sequence[str] = (), both: bool = False
) -> QuantizationScheme:
    """int4 experts. The pattern names no prefix: vLLM matches transformers' module names, sglang the hub's.

    Args:
        elsewhere: beginnings of the names of experts that are not int4.
        both: beside the family's own names those that most families have, for servers that ask for no other.
    """
    names = [sorted(architecture.expert_linears)]
    if both:
        names.append(COMMON_NAMES)
    but = f"(?!{'|'.join(map(re.escape, elsewhere))})" if elsewhere else ""
    return QuantizationScheme(
        targets=[rf"re:{but}.*experts\.\d+\.({'|'.join(map(re.escape, linears))})$" for linears in names],
        weights=weight_args(group_size),
        format=CompressionFormat.pack_quantized.value,
    )


def fp8_prefixes(architecture: Architecture, carried: Sequence[str]) -> list[str]:
    """Of what is carried as it is, the beginnings under which modules are fp8."""
    return [prefix for prefix in architecture.extra_prefixes if any(name.startswith(prefix) for name in carried)]


def ignored_extras(architecture: Architecture, carried: Sequence[str]) -> list[str]:
    """Patterns of what is carried in bf16: what the groups' patterns would match there is not quantized."""
    fp8 = fp8_prefixes(architecture, carried)
    # transformers and vLLM may have it deeper.
    return [rf"re:(.*\.)?{re.escape(prefix)}.*" for prefix in architecture.extra_prefixes if prefix not in fp8]


def left_between(architecture: Architecture, source: dict[str, Any], kept: Sequence[str]) -> list[str]:
    """Modules of some layers that are bf16 where those of others are fp8: their pattern, which names no layer, is of
    both. Under the hub's names and transformers'."""
    patterns = [re.compile(target.removeprefix("re:")) for target in kept_targets(architecture, kept)]
    fp8, found = set(kept), dict[str, None]()
    for layer in range(int(architecture.settings(source)[architecture.layers_key])):
        for weight in (*architecture.kept(layer), *architecture.scaled(layer)):
            module = architecture.layer_prefix(layer) + weight.module
            names = (module, architecture.transformers_name(module))
            if module not in fp8 and any(pattern.match(name) for pattern in patterns for name in names):
                found |= dict.fromkeys(names)
    return [*found]


def _fp8_storage(source: dict[str, Any]) -> Storage:
    """How what is fp8 in the result is stored: as in the source, or in blocks where it has none."""
    found = format_of(source)
    return found.storage if found.quantized else BLOCK_FP8


def kept_scheme(
    architecture: Architecture, kept: Sequence[str], dynamic_activations: bool, storage: Storage = BLOCK_FP8
) -> QuantizationScheme:
    """fp8 attention, dense layers and shared experts, in blocks or by rows; with dynamic activations, as the source's
    `activation_scheme: dynamic` says: in groups as wide as a block, or by tokens."""
    weights: dict[str, Any] = {"strategy": QuantizationStrategy.CHANNEL}
    activations: dict[str, Any] = {"strategy": QuantizationStrategy.TOKEN}
    if all(storage.block):
        weights = {"strategy": QuantizationStrategy.BLOCK, "block_structure": list(storage.block)}
        activations = {"strategy": QuantizationStrategy.GROUP, "group_size": storage.block[1]}
    fp8: dict[str, Any] = {"num_bits": 8, "type": QuantizationType.FLOAT, "symmetric": True}
    return QuantizationScheme(
        targets=kept_targets(architecture, kept),
        weights=QuantizationArgs(**fp8, **weights, dynamic=False),
        input_activations=QuantizationArgs(**fp8, **activations, dynamic=True) if dynamic_activations else None,
        format=CompressionFormat.float_quantized.value,
    )


def kept_targets(architecture: Architecture, kept: Sequence[str]) -> list[str]:
    """Patterns of what keeps the source's fp8, a parent module each: under transformers' names and the hub's alike."""
    attention = {module.rpartition(".")[0] for module in architecture.attention}
    by_parent: dict[str, list[str]] = {}
    for module in kept:
        if architecture.is_extra(module):
            above, _, linear = module.rpartition(".")
            # One pattern for all experts.
            parent = re.sub(r"\.\d+$", ".NUMBER", above) if _number_of_expert(architecture, module) else above
            places = {re.escape(parent).replace("NUMBER", r"\d+"): linear}
        else:
            local = architecture.split(module)[1]
            places = {}
            for name in (local, architecture.module_name(local)):
                above, _, linear = name.rpartition(".")
                # An expert's linear layers lie deeper than a dense layer's, under the same parent.
                deep = ".*" if local.rpartition(".")[0] in attention else r".*\.\d+\."
                places[deep + re.escape(above)] = linear
        for parent, linear in places.items():
            linears = by_parent.setdefault(parent, [])
            if linear not in linears:
                linears.append(linear)
    return [f"re:{parent}\\.{_any_of(linears)}$" for parent, linears in by_parent.items()]


def _number_of_expert(architecture: Architecture, module: str) -> bool:
    return architecture.split_expert(architecture.split(module)[1] + ".weight") is not None


def _any_of(linears: Sequence[str]) -> str:
    """A pattern of some names; what all end in stands once."""
    end = "_proj" if all(linear.endswith("_proj") for linear in linears) else ""
    return f"({'|'.join(re.escape(linear.removesuffix(end)) for linear in linears)}){end}"
