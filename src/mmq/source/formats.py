"""How a source stores its weights, as a table: a new format is a new entry that knows nothing of families.

A format is told by config.json's quantization_config alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mmq.errors import CheckpointError, shown
from mmq.families.sizes import BLOCK, BLOCK_FP8, Storage
from mmq.families.table import Architecture

FP8 = "F8_E4M3"
SCALE_SUFFIX = "_scale_inv"
# Whether a quantization_config means a module, by any of the names that the module has.
Meant = Callable[[set[str]], bool]


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
        left: of a section without fault, which modules it leaves in bf16.
    """

    name: str
    method: str | None
    storage: Storage
    scale_dtypes: tuple[str, ...] = ()
    partly: bool = False
    fault: Callable[[dict[str, Any]], str | None] = lambda _settings: None
    left: Callable[[dict[str, Any]], Meant] = lambda _settings: lambda _names: False

    @property
    def quantized(self) -> bool:
        """Whether weights have scales."""
        return self.storage.scale_suffix is not None

    def plain(self, config: dict[str, Any], arch: Architecture) -> Callable[[str], bool]:
        """Which weights, by the hub's names, are bf16 though this is the format, as far as config.json tells.

        Raises:
            CheckpointError: what names them is no list of names and patterns.
        """
        try:
            left = self.left(config.get("quantization_config") or {})
        except (TypeError, re.error) as error:
            raise CheckpointError(f"config.json: quantization_config does not name modules: {error}") from None

        def plain(name: str) -> bool:
            module = name.removesuffix(".weight")
            return left({module, arch.transformers_name(module)})

        return plain


def _fault_of_blocks(settings: dict[str, Any]) -> str | None:
    block = settings.get("weight_block_size")
    if block != [BLOCK, BLOCK]:
        kind = " (MXFP8)" if block == [1, 32] else ""
        return f"weight_block_size is {shown(block)}{kind}; only [{BLOCK}, {BLOCK}] is supported"
    if settings.get("fmt", "float8_e4m3fn") not in ("float8_e4m3fn", "e4m3"):
        return f"fmt is {shown(settings['fmt'])}; only float8_e4m3fn is supported"
    return None


def _not_converted(settings: dict[str, Any]) -> Meant:
    """transformers' rule for `modules_to_not_convert`: its entries are patterns from a name's start, or ends of it."""
    ends = _strings(settings.get("modules_to_not_convert"))
    starts = [re.compile(entry) for entry in ends]
    return lambda names: any(name.endswith(ends) or any(s.match(name) for s in starts) for name in names)


def _not_targeted(settings: dict[str, Any]) -> Meant:
    """compressed-tensors' rule: what `targets` mean and `ignore` does not."""
    groups = settings["config_groups"].values()
    targeted = _meant_by(target for group in groups for target in _strings(group.get("targets")))
    ignored = _meant_by(_strings(settings.get("ignore")))
    return lambda names: ignored(names) or not targeted(names)


def _meant_by(entries: Iterable[str]) -> Meant:
    """Whole names, patterns after `re:`, or classes, of which all that a source may store in fp8 are Linear."""
    whole = {*entries}
    patterns = [re.compile(entry.removeprefix("re:")) for entry in whole if entry.startswith("re:")]
    return lambda names: bool(whole & {*names, "Linear"}) or any(p.match(name) for p in patterns for name in names)


def _strings(value: object) -> tuple[str, ...]:
    """A list of strings, or nothing. Raises TypeError."""
    if value is not None and not (isinstance(value, list) and all(isinstance(entry, str) for entry in value)):
        raise TypeError(f"{shown(value)} is no list of strings")
    return tuple(value or ())


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
FINE_GRAINED_FP8 = SourceFormat(
    "block fp8", "fp8", BLOCK_FP8, ("F32", "BF16", "F16"), False, _fault_of_blocks, _not_converted
)
PLAIN_BF16 = SourceFormat("bf16", None, Storage("BF16", None, "BF16"))
_CT = "compressed-tensors"
CT_BLOCK_FP8 = SourceFormat(
    f"{_CT} block fp8", _CT, Storage(scale_suffix="_scale", scale_dtype="BF16"), ("F32", "BF16", "F16"), True,
    _fault_of_groups("block"), _not_targeted,
)  # fmt: skip
CT_CHANNEL_FP8 = SourceFormat(
    f"{_CT} channel fp8", _CT, Storage(scale_suffix="_scale", scale_dtype="BF16", block=(1, 0)), ("F32", "BF16", "F16"),
    True, _fault_of_groups("channel"), _not_targeted,
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
