"""How a source stores its weights, as a table: a new format is a new entry that knows nothing of families.

A format is told by config.json's quantization_config alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmq.errors import CheckpointError, shown
from mmq.families.sizes import BLOCK, BLOCK_FP8, Storage

FP8 = "F8_E4M3"
SCALE_SUFFIX = "_scale_inv"


@dataclass(frozen=True)
class SourceFormat:
    """One way of storing a decoder layer's matrices.

    Attributes:
        name: for people.
        method: what quantization_config's `quant_method` is; None where there is no such section.
        storage: dtypes and blocks.
        scale_dtypes: what the scales may be.
        partly: what is no expert may be stored without scales.
        fault: what in the section is not of this format, as a clause; None where all is.
    """

    name: str
    method: str | None
    storage: Storage
    scale_dtypes: tuple[str, ...] = ()
    partly: bool = False
    fault: Callable[[dict[str, Any]], str | None] = lambda _settings: None

    @property
    def quantized(self) -> bool:
        """Whether weights have scales."""
        return self.storage.scale_suffix is not None


def _fault_of_blocks(settings: dict[str, Any]) -> str | None:
    block = settings.get("weight_block_size")
    if block != [BLOCK, BLOCK]:
        kind = " (MXFP8)" if block == [1, 32] else ""
        return f"weight_block_size is {shown(block)}{kind}; only [{BLOCK}, {BLOCK}] is supported"
    if settings.get("fmt", "float8_e4m3fn") not in ("float8_e4m3fn", "e4m3"):
        return f"fmt is {shown(settings['fmt'])}; only float8_e4m3fn is supported"
    return None


def _fault_of_groups(strategy: str) -> Callable[[dict[str, Any]], str | None]:
    """What is not compressed-tensors' static fp8 of this strategy."""

    def fault(settings: dict[str, Any]) -> str | None:
        if settings.get("kv_cache_scheme") is not None:
            return "kv_cache_scheme is set; a source that has scales of its own for a KV cache is not supported"
        groups = settings.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            return f"config_groups is {shown(groups)} instead of an object"
        for name, group in groups.items():
            group = group if isinstance(group, dict) else {}
            form, weights = group.get("format") or settings.get("format"), group.get("weights")
            if form != "float-quantized" or not isinstance(weights, dict):
                return f"{shown(name)} is in the format {shown(form)}; only float-quantized weights are supported"
            fixed = {"type": "float", "num_bits": 8, "symmetric": True, "dynamic": False}
            for key, wanted in fixed.items():
                if weights.get(key, wanted) != wanted:
                    return f"{shown(name)} has weights with {key} = {shown(weights[key])}; only {wanted} is supported"
            given = weights.get("strategy")
            if given == "block" and weights.get("block_structure") != [BLOCK, BLOCK]:
                block = shown(weights.get("block_structure"))
                return f"block_structure is {block}; only [{BLOCK}, {BLOCK}] is supported"
            if given != strategy:
                return f"{shown(name)} has weights with strategy = {shown(given)}; only block or channel is supported"
        return None

    return fault


# Scales are fp32 in MiniMax's and DeepSeek's releases, bf16 in Qwen's, fp16 in others' of Qwen.
FINE_GRAINED_FP8 = SourceFormat("block fp8", "fp8", BLOCK_FP8, ("F32", "BF16", "F16"), fault=_fault_of_blocks)
PLAIN_BF16 = SourceFormat("bf16", None, Storage("BF16", None, "BF16"))
_CT = "compressed-tensors"
CT_BLOCK_FP8 = SourceFormat(
    f"{_CT} block fp8", _CT, Storage(scale_suffix="_scale", scale_dtype="BF16"), ("F32", "BF16", "F16"), True,
    _fault_of_groups("block"),
)  # fmt: skip
CT_CHANNEL_FP8 = SourceFormat(
    f"{_CT} channel fp8", _CT, Storage(scale_suffix="_scale", scale_dtype="BF16", block=(1, 0)), ("F32", "BF16", "F16"),
    True, _fault_of_groups("channel"),
)  # fmt: skip
FORMATS = (FINE_GRAINED_FP8, CT_BLOCK_FP8, CT_CHANNEL_FP8, PLAIN_BF16)


def format_of(config: dict[str, Any]) -> SourceFormat:
    """The format that a config.json describes.

    Raises:
        CheckpointError: it is none that mmq reads.
    """
    settings = config.get("quantization_config")
    if settings is not None and not isinstance(settings, dict):
        raise CheckpointError(f"config.json: quantization_config is {shown(settings)} instead of an object")
    method = settings.get("quant_method") if settings is not None else None
    found = [known for known in FORMATS if known.method == method] if settings is None or method is not None else []
    if not found:
        listed = ", ".join(dict.fromkeys(known.method for known in FORMATS if known.method))
        raise CheckpointError(
            f"config.json: quantization_config.quant_method is {shown(method)}; mmq reads {listed}, and bf16 without"
            " such a section"
        )
    faults = [known.fault(settings or {}) for known in found]
    for known, fault in zip(found, faults, strict=True):
        if fault is None:
            return known
    raise CheckpointError(f"config.json: {faults[0]}")
