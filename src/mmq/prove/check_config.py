"""Verify without a tensor's bytes: names, dtypes and shapes, config.json, the small files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mmq.families.sizes import BLOCK_FP8, Storage
from mmq.families.table import Architecture
from mmq.prove.findings import Report
from mmq.storage.checkpoint import Checkpoint

ROTARY = ("rope_parameters", "rope_scaling")


def layer_of(arch: Architecture, source: Checkpoint, name: str) -> int | None:
    """The decoder layer that a tensor belongs to; None outside them and past the last."""
    layer = arch.split(name)[0]
    return layer if layer is not None and layer < int(arch.settings(source.config)[arch.layers_key]) else None


@dataclass(frozen=True)
class Original:
    """The source, as verify reads it.

    Attributes:
        shared: what reads the norm before the experts keeps its bytes where it is fp8.
        rounded: attention is bf16 there, and block fp8 in the result.
    """

    arch: Architecture
    checkpoint: Checkpoint
    storage: Storage
    shared: bool
    rounded: bool = False

    def rounded_at(self, layer: int) -> list[str]:
        """A layer's matrices that were rounded to block fp8."""
        attention = self.arch.attention_of(layer) if self.rounded else ()
        return [self.arch.layer_prefix(layer) + weight.name for weight in attention if weight.is_matrix]


def kept_scales(original: Original, layer: int) -> dict[str, str | None]:
    """A layer's matrices that keep the source's bytes, and the names of their scales; None where they are plain."""
    arch, source, storage = original.arch, original.checkpoint, original.storage
    result: dict[str, str | None] = {}
    for weight in (*arch.kept(layer), *arch.scaled(layer)):
        name = arch.layer_prefix(layer) + weight.name
        fp8 = storage.scale_suffix is not None and source.specs[name].dtype == "F8_E4M3"
        if name in original.rounded_at(layer):
            continue
        if (fp8 and original.shared) or weight in arch.kept(layer):
            result[name] = f"{name}{storage.scale_suffix}" if fp8 else None
    return result


def carried_scales(original: Original) -> dict[str, str]:
    """fp8 matrices of what is carried as it is, layers past the last among them, and the names of their scales."""
    arch, source, storage = original.arch, original.checkpoint, original.storage
    return {
        name: f"{name}{storage.scale_suffix}"
        for name, spec in source.specs.items()
        if spec.dtype == "F8_E4M3" and layer_of(arch, source, name) is None
    }


def expected_tensors(original: Original, kv_scales: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape that each tensor of the result must have, by the source's headers and the model card's table."""
    arch, source, storage = original.arch, original.checkpoint, original.storage
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    layers = range(int(arch.settings(source.config)[arch.layers_key]))
    kept: dict[str, str | None] = {**carried_scales(original)}
    for number in layers:
        kept |= kept_scales(original, number)
    # Of what becomes bf16 and is scaled, the source's scales are gone as well.
    scaled = {arch.layer_prefix(layer) + weight.name for layer in layers for weight in arch.scaled(layer)}
    dropped = {scale for scale in kept.values() if scale is not None}
    dropped |= {f"{name}{storage.scale_suffix}" for name in scaled if storage.scale_suffix}
    for name, spec in source.specs.items():
        stem, _, parameter = name.rpartition(".")
        layer, local = layer_of(arch, source, name), arch.split(name)[1]
        if name in dropped:
            continue
        if layer is not None and name in original.rounded_at(layer):
            expected[name] = ("F8_E4M3", spec.shape)
            expected[f"{stem}.weight_scale"] = ("F32", BLOCK_FP8.scale_shape(spec.shape))
        elif name in kept:
            expected[name] = ("BF16" if kept[name] is None else "F8_E4M3", spec.shape)
            if scale := kept[name]:
                expected[f"{stem}.weight_scale"] = (source.specs[scale].dtype, storage.scale_shape(spec.shape))
        elif layer is not None and arch.split_expert(local):
            if parameter == "weight":
                rows, columns = spec.shape
                expected[f"{stem}.weight_packed"] = ("I32", (rows, columns // 8))
                # The group size is checked through the scale's shape and the config.
                expected[f"{stem}.weight_scale"] = ("BF16", (rows, -1))
                expected[f"{stem}.weight_shape"] = ("I64", (2,))
        elif name in scaled:
            expected[name] = ("BF16", spec.shape)
        elif layer is not None and local == arch.router:
            expected[name] = (arch.router_served, spec.shape)
        else:
            # Norms, embeddings and head are bf16 in the table; tensors that it does not know keep their dtype.
            known = name in (arch.embedding, arch.head, arch.final_norm) or name.endswith("norm.weight")
            free = arch.is_extra(name) or local in {weight.name for weight in arch.linear_weights}
            expected[name] = ("BF16" if known and not free else spec.dtype, spec.shape)
    if kv_scales:
        for layer in filter(arch.has_kv_scales, layers):
            for scale in ("k_scale", "v_scale"):
                expected[f"{arch.layer_prefix(layer)}{arch.attention_module}.{scale}"] = ("F32", (1,))
    return expected


def check_names(report: Report, original: Original, result: Checkpoint, kv_scales: bool) -> None:
    """Every source tensor has its counterpart of the right dtype and shape, and nothing else is there."""
    source, expected = original.checkpoint, expected_tensors(original, kv_scales)
    groups = mapping(mapping(result.config.get("quantization_config")).get("config_groups"))
    group_size = mapping(mapping(groups.get("group_0")).get("weights")).get("group_size")
    group_size = group_size if type(group_size) is int else 0
    for name, (dtype, shape) in expected.items():
        spec = result.specs.get(name)
        if spec is None:
            report.problems.append(f"{name} is missing")
            continue
        if -1 in shape:
            columns = source.specs[name.removesuffix("_scale")].shape[1]
            shape = (shape[0], columns // group_size if group_size > 0 else 0)
        report.require(spec.dtype == dtype, f"{name} is {spec.dtype} instead of {dtype}")
        report.require(spec.shape == shape, f"{name} has the shape {list(spec.shape)} instead of {list(shape)}")
    report.count("dtypes and shapes", len(expected))
    for name in result.specs.keys() - expected.keys():
        orphan = "an orphan scale" if "scale" in name.rpartition(".")[2] else "not accounted for by the source"
        report.problems.append(f"{name} is {orphan}")
    report.count("source tensors accounted for", len(source.specs))


def check_config(report: Report, original: Original, result: Checkpoint) -> None:
    """config.json and the small files are the source's but for quantization and rotary settings; each group's targets
    match the modules they must and no other, under the hub's prefix and under transformers'."""
    arch, source = original.arch, original.checkpoint
    config = result.config
    _check_settings(report, arch, source.config, config)
    for path in source.carried_files():
        copy = result.folder / path.name
        same = copy.is_file() and copy.read_bytes() == path.read_bytes()
        report.require(same, f"{path.name} is not the source's")
        report.count("small files equal to the source's")
    quantization = mapping(config.get("quantization_config"))
    groups = mapping(quantization.get("config_groups"))
    report.require(quantization.get("quant_method") == "compressed-tensors", "config.json: quant_method is wrong")
    modules = {name.rpartition(".")[0] for name in result.specs}
    inside = {module for module in modules if layer_of(arch, source, module) is not None}
    kinds = {"experts": {module for module in inside if arch.split_expert(arch.split(module)[1] + ".weight")}}
    ignored = quantization.get("ignore") or []
    layers = range(int(arch.settings(source.config)[arch.layers_key]))
    kept = {
        name.removesuffix(".weight")
        for layer in layers
        for name, scale in kept_scales(original, layer).items()
        if scale is not None
    }
    kept |= {name.removesuffix(".weight") for layer in layers for name in original.rounded_at(layer)}
    kept |= {name.removesuffix(".weight") for name in carried_scales(original)}
    if kept:
        kinds["attention"] = kept
    wanted: dict[tuple[Any, Any, Any], str] = {
        ("pack-quantized", "int", 4): "experts",
        ("float-quantized", "float", 8): "attention",
    }
    covered = set()
    for name, group in groups.items():
        group = mapping(group)
        weights = mapping(group.get("weights"))
        kind = wanted.get((group.get("format"), weights.get("type"), weights.get("num_bits")))
        if kind not in kinds:
            report.problems.append(f"config.json: {name} is neither int4 experts nor block-fp8 attention")
            continue
        covered.add(kind)
        for rename in (str, arch.transformers_name):
            try:
                named = {module: rename(module) for module in modules}
                left = {module for module in modules if not _matches(named[module], ignored)}
                matched = {module for module in left if _matches(named[module], group.get("targets") or [])}
            except (re.error, TypeError) as error:
                report.problems.append(f"config.json: {name} has a target that is no pattern ({error})")
                continue
            for module in matched ^ kinds[kind]:
                verb = "matches" if module in matched else "does not match"
                report.problems.append(f"config.json: {name} {verb} {rename(module)}")
        report.count("modules matched by config targets", len(kinds[kind]))
    report.require(covered == set(kinds), f"config.json describes {sorted(covered)}, not {sorted(kinds)}")
    head = arch.head.removesuffix(".weight")
    report.require(head in (quantization.get("ignore") or []), f"config.json: ignore lacks {head}")
    _check_rotary(report, arch.settings(source.config), arch.settings(config))
    has_scales = any(name.endswith(".k_scale") for name in result.specs)
    report.require(
        bool(quantization.get("kv_cache_scheme")) == has_scales, "config.json: kv_cache_scheme and KV scales disagree"
    )


def _check_settings(report: Report, arch: Architecture, source: dict[str, Any], config: dict[str, Any]) -> None:
    """All else in config.json, and in the section with the decoder's settings, must be the source's; quantization is
    described beside the section alone."""
    free = {"quantization_config", *ROTARY}
    for key in (source.keys() | config.keys()) - free - {arch.section}:
        report.require(config.get(key) == source.get(key), f"config.json: {key} is not the source's")
    if arch.section is None:
        return
    before, after = mapping(source.get(arch.section)), mapping(config.get(arch.section))
    for key in (before.keys() | after.keys()) - free:
        report.require(after.get(key) == before.get(key), f"config.json: {arch.section}.{key} is not the source's")
    report.require("quantization_config" not in after, f"config.json: {arch.section} has a quantization_config")


def _check_rotary(report: Report, source: dict[str, Any], config: dict[str, Any]) -> None:
    """`rope_parameters` says all that the source says anywhere, `rope_scaling` the same where there is one."""
    rope = mapping(config.get("rope_parameters"))
    for section in ROTARY:
        for key, value in mapping(source.get(section)).items():
            if value is not None and key not in ("type", "rope_type"):
                report.require(rope.get(key) == value, f"config.json: rope_parameters lacks the source's {key}")
            elif value is not None:
                value = "longrope" if value == "su" else value
                report.require(rope.get("rope_type") == value, f"config.json: rope_type is not {value}")
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if source.get(key) is not None:
            report.require(rope.get(key) == source[key], f"config.json: rope_parameters lacks the source's {key}")
    if config.get("rotary_dim") and config.get("head_dim"):
        # What readers make of it is an integer.
        share, wanted = rope.get("partial_rotary_factor"), config["rotary_dim"] / config["head_dim"]
        right = isinstance(share, float | int) and int(config["head_dim"] * share) == config["rotary_dim"]
        report.require(right, f"config.json: partial_rotary_factor is not {wanted}")
    if source.get("rope_scaling"):
        report.require(config.get("rope_scaling") == rope, "config.json: rope_scaling is not rope_parameters")
    else:
        report.require(not config.get("rope_scaling"), "config.json: rope_scaling is not the source's")


def mapping(value: object) -> dict[str, Any]:
    """A JSON object, or an empty one where something else stands."""
    return value if isinstance(value, dict) else {}


def _matches(module: str, targets: Iterable[str]) -> bool:
    """compressed-tensors' rule: `re:` patterns match from the start, other targets are whole names."""
    return any(
        re.match(target[3:], module) is not None if target.startswith("re:") else target == module for target in targets
    )
