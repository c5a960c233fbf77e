"""Proof of a finished hybrid checkpoint: it is read back and compared with the source, tensor by tensor.

Formulas here are written again, in numpy and from the formats' definitions, so that a fault in the stages' tensor code
can't hide itself. Only the reading of files is shared.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmq.errors import CheckpointError, JournalError, MmqError
from mmq.families.table import Architecture
from mmq.machine.threads import each
from mmq.run.workspace import HYBRID, Workspace
from mmq.storage.atomic import FileRecord, file_digest, write_json
from mmq.storage.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint, TensorReader, read_json

REPORT_NAME = "verify.json"
# norm and norm' are bf16; the quotient, and its product with the router, are each rounded to fp32.
ROUTER_TOLERANCE = 1e-6
# A code is the nearest to its weight, or 7 where the weight is 7.5 steps; bf16 roundings of weight and step, and of the
# steps from which up's and down's smoothing is found again, add up to a tenth of a step.
FARTHEST = 0.6
# Weights below this do nothing. bf16 and fp32 lose bits near 1e-38, and with them what scaled such weights.
NEGLIGIBLE = 1e-30
INT4_PARTS = {"weight_packed": "I32", "weight_scale": "BF16", "weight_shape": "I64"}

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Report:
    """What verify found.

    Attributes:
        problems: one sentence for everything that is off.
        checks: what was looked at, and how many things.
        layers: per decoder layer, errors of the experts and the KV scales.
        attention: sha256 of every attention tensor, equal in source and result.
        files: size and xxh3-128 of every file that this is about, by name.
    """

    folder: Path
    path: Path
    problems: list[str] = field(default_factory=list)
    checks: dict[str, int] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    attention: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[Any]] = field(default_factory=dict)

    def count(self, check: str, number: int = 1) -> None:
        self.checks[check] = self.checks.get(check, 0) + number

    def require(self, condition: bool, problem: str) -> None:
        if not condition:
            self.problems.append(problem)

    def as_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "ok": not self.problems,
            "problems": self.problems,
            "checks": self.checks,
            "layers": self.layers,
            "attention_sha256": self.attention,
            "files": self.files,
        }

    def rows(self) -> list[dict[str, Any]]:
        """The checks as a table."""
        return [{"check": check, "looked at": number} for check, number in self.checks.items()]


def verify_checkpoint(workspace: Workspace) -> Report:
    """Check the hybrid folder against the source and write verify.json beside it.

    Raises:
        JournalError: restore has not ended.
        CheckpointError: the source can't be read.
    """
    folder = workspace.folder(HYBRID)
    if not workspace.journal.stage("restore").complete:
        raise JournalError(f"{folder} is not complete; run `mmq restore` first")
    report = Report(folder, workspace.work_dir / REPORT_NAME, files=finished_files(workspace))
    source = workspace.source.checkpoint
    try:
        result = Checkpoint.open(folder)
    except CheckpointError as error:
        report.problems.append(str(error))
    else:
        # What Checkpoint.open looked at: every name of the index is in its shard, and every tensor in the index.
        report.count("tensors in index and shards", len(result.specs))
        arch = workspace.architecture
        _check_names(report, arch, source, result, workspace.recipe.awq.kv_cache_scheme is not None)
        _check_config(report, arch, source, result)
        if not report.problems:
            _check_tensors(report, arch, source, result, workspace.recipe.worker_count)
    write_json(report.path, report.as_json())
    return report


def finished_files(workspace: Workspace) -> dict[str, list[Any]]:
    """Size and xxh3-128 of the hybrid folder's files by name: shards as restore wrote them, the small ones as they are.

    The model card is not among them, nor is what mmq did not put there.
    """
    folder, restore = workspace.folder(HYBRID), workspace.journal.stage("restore")
    records = [record for unit in restore.units for record in restore.files(unit).values()]
    small = [CONFIG_NAME, INDEX_NAME, *(path.name for path in workspace.source.checkpoint.carried_files())]
    records += [
        FileRecord(name, path.stat().st_size, file_digest(path)) for name in small if (path := folder / name).is_file()
    ]
    return {record.name: [record.size, record.digest] for record in records}


def read_report(workspace: Workspace) -> tuple[dict[str, Any] | None, str]:
    """verify.json if it is about the hybrid folder's files as they are now, else None and why not, as a clause.

    Raises:
        CheckpointError: it is no JSON object, or the source can't be read.
    """
    path = workspace.work_dir / REPORT_NAME
    if not path.is_file():
        return None, "it was not verified"
    record, now = read_json(path), finished_files(workspace)
    then = _mapping(record.get("files"))
    changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    if changed:
        return None, f"it is not what was verified: {changed[0]} differs" + (
            f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        )
    return record, ""


def expected_tensors(arch: Architecture, source: Checkpoint, kv_scales: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape that each tensor of the result must have, by the source's headers and the model card's table."""
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, spec in source.specs.items():
        stem, _, parameter = name.rpartition(".")
        component = arch.component(name)
        if component == "experts":
            if parameter == "weight":
                rows, columns = spec.shape
                expected[f"{stem}.weight_packed"] = ("I32", (rows, columns // 8))
                # The group size is checked through the scale's shape and the config.
                expected[f"{stem}.weight_scale"] = ("BF16", (rows, -1))
                expected[f"{stem}.weight_shape"] = ("I64", (2,))
        elif component == "attention":
            if parameter == "weight":
                expected[name] = ("F8_E4M3", spec.shape)
                expected[f"{stem}.weight_scale"] = ("F32", tuple(-(-size // 128) for size in spec.shape))
        elif component == "router" or arch.split(name)[1] == arch.router_bias:
            expected[name] = ("F32", spec.shape)
        else:
            # Norms, embeddings and head are bf16 in the table; tensors that it does not know keep their dtype.
            known = name in (arch.embedding, arch.head, arch.final_norm) or name.endswith("norm.weight")
            expected[name] = ("BF16" if known else spec.dtype, spec.shape)
    if kv_scales:
        parent = arch.attention[0].rpartition(".")[0]
        for layer in {arch.split(name)[0] for name in source.specs} - {None}:
            assert layer is not None
            for scale in ("k_scale", "v_scale"):
                expected[f"{arch.layer_prefix(layer)}{parent}.{scale}"] = ("F32", (1,))
    return expected


def _check_names(report: Report, arch: Architecture, source: Checkpoint, result: Checkpoint, kv_scales: bool) -> None:
    """Every source tensor has its counterpart of the right dtype and shape, and nothing else is there."""
    expected = expected_tensors(arch, source, kv_scales)
    groups = _mapping(_mapping(result.config.get("quantization_config")).get("config_groups"))
    group_size = _mapping(_mapping(groups.get("group_0")).get("weights")).get("group_size")
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


def _check_config(report: Report, arch: Architecture, source: Checkpoint, result: Checkpoint) -> None:
    """config.json and the small files are the source's but for quantization and rotary settings; each group's targets
    match the modules they must and no other, under the hub's prefix and under transformers'."""
    config = result.config
    for key in (source.config.keys() | config.keys()) - {"quantization_config", "rope_parameters"}:
        report.require(config.get(key) == source.config.get(key), f"config.json: {key} is not the source's")
    for path in source.carried_files():
        copy = result.folder / path.name
        same = copy.is_file() and copy.read_bytes() == path.read_bytes()
        report.require(same, f"{path.name} is not the source's")
        report.count("small files equal to the source's")
    quantization = _mapping(config.get("quantization_config"))
    groups = _mapping(quantization.get("config_groups"))
    report.require(quantization.get("quant_method") == "compressed-tensors", "config.json: quant_method is wrong")
    modules = {name.rpartition(".")[0] for name in result.specs}
    kinds = {
        "experts": {module for module in modules if arch.split_expert(arch.split(module)[1] + ".weight")},
        "attention": {module for module in modules if arch.split(module)[1] in arch.attention},
    }
    wanted: dict[tuple[Any, Any, Any], str] = {
        ("pack-quantized", "int", 4): "experts",
        ("float-quantized", "float", 8): "attention",
    }
    covered = set()
    for name, group in groups.items():
        group = _mapping(group)
        weights = _mapping(group.get("weights"))
        kind = wanted.get((group.get("format"), weights.get("type"), weights.get("num_bits")))
        if kind is None:
            report.problems.append(f"config.json: {name} is neither int4 experts nor block-fp8 attention")
            continue
        covered.add(kind)
        for rename in (lambda module: module, lambda module: _transformers_name(arch, module)):
            try:
                matched = {module for module in modules if _matches(rename(module), group.get("targets") or [])}
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
    rope = _mapping(config.get("rope_parameters"))
    if config.get("rotary_dim") and config.get("head_dim"):
        factor = config["rotary_dim"] / config["head_dim"]
        report.require(
            rope.get("partial_rotary_factor") == factor, f"config.json: partial_rotary_factor is not {factor}"
        )
    has_scales = any(name.endswith(".k_scale") for name in result.specs)
    report.require(
        bool(quantization.get("kv_cache_scheme")) == has_scales, "config.json: kv_cache_scheme and KV scales disagree"
    )


def _check_tensors(report: Report, arch: Architecture, source: Checkpoint, result: Checkpoint, workers: int) -> None:
    """All that needs the tensors' bytes, layer by layer on threads."""
    layers = sorted({layer for name in source.specs if (layer := arch.split(name)[0]) is not None})

    def guarded(job: Callable[[Report], None]) -> Report:
        part = Report(report.folder, report.path)
        try:
            job(part)
        except MmqError as error:
            part.problems.append(str(error))
        return part

    jobs: list[Callable[[Report], None]] = [
        lambda part, layer=layer: _check_layer(part, arch, source, result, layer)  # type: ignore[misc]
        for layer in layers
    ]
    jobs.append(lambda part: _check_outside(part, arch, source, result))
    for part in each(guarded, jobs, workers):
        report.problems += part.problems
        report.layers += part.layers
        report.attention |= part.attention
        for check, number in part.checks.items():
            report.count(check, number)


def _check_layer(report: Report, arch: Architecture, source: Checkpoint, result: Checkpoint, layer: int) -> None:
    prefix = arch.layer_prefix(layer)
    with source.reader() as originals, result.reader() as results:
        for linear in arch.attention:
            base = f"{prefix}{linear}.weight"
            for before, after in ((base, base), (f"{base}_scale_inv", f"{base}_scale")):
                digest = _sha256(originals[before])
                report.require(_sha256(results[after]) == digest, f"{after} is not the source's {before}")
                report.attention[after] = digest
                report.count("attention tensors equal to the source's bytes")
        for local in [*arch.attention_inputs, *filter(None, [arch.router_bias])]:
            report.require(
                _sha256(originals[prefix + local]) == _sha256(results[prefix + local]),
                f"{prefix}{local} is not the source's",
            )
            report.count("other tensors equal to the source's bytes")
        applied = _check_smoothing(report, arch, prefix, originals, results)
        entry: dict[str, Any] = {
            "layer": layer,
            "expert_error": _check_experts(report, arch, layer, applied, originals, results),
        }
        parent = arch.attention[0].rpartition(".")[0]
        for scale in ("k_scale", "v_scale"):
            name = f"{prefix}{parent}.{scale}"
            if name in result.specs:
                value = float(results[name])
                report.require(bool(np.isfinite(value)) and value > 0, f"{name} is {value}")
                report.count("KV scales finite and positive")
                entry[scale] = value if np.isfinite(value) else None
        report.layers.append(entry)


def _check_smoothing(
    report: Report, arch: Architecture, prefix: str, originals: TensorReader, results: TensorReader
) -> Array:
    """norm x router must be what it was. Returns the scale that the new norm leaves to its readers, float64 [H]."""
    norms = [_float64(reader[prefix + arch.smooth_norm]) for reader in (originals, results)]
    routers = [_float64(reader[prefix + arch.router]) for reader in (originals, results)]
    before, after = (norm * router for norm, router in zip(norms, routers, strict=True))
    error = float(np.max(np.abs(after - before) / np.maximum(np.abs(before), 1e-30), where=before != 0, initial=0.0))
    report.require(
        bool(np.isfinite(after).all()) and error <= ROUTER_TOLERANCE and not np.any(after[before == 0]),
        f"{prefix}{arch.router} does not undo what {prefix}{arch.smooth_norm} does (relative error {error:.1e})",
    )
    report.count("routers that undo their norm")
    safe = np.where(norms[1] == 0, 1.0, norms[1])
    return np.where(norms[1] == 0, 1.0, norms[0] / safe)


def _check_experts(
    report: Report, arch: Architecture, layer: int, applied: Array, originals: TensorReader, results: TensorReader
) -> dict[str, float | None]:
    """Every int4 code must be the nearest to the source's weight as the smoothing left it.

    Args:
        applied: float64 [H], the scale that the norm left to gate and up.

    Returns:
        relative error of each linear layer, over all experts of the layer.
    """
    squares = {linear: np.zeros(2) for linear in arch.expert_linears}
    inputs = applied.astype(np.float32)
    experts = {int(found[0]) for name in originals.names if (found := _expert_of(arch, name, layer))}
    for expert in sorted(experts):
        bases = {linear: arch.expert_weight(layer, expert, linear) for linear in arch.expert_linears}
        smoothed = {
            linear: _fp8_values(originals[f"{base}.weight"], originals[f"{base}.weight_scale_inv"])
            for linear, base in bases.items()
        }
        smoothed[arch.gate] *= inputs
        smoothed[arch.up] *= inputs
        rows = _row_scales(smoothed[arch.up], _float32(results[f"{bases[arch.up]}.weight_scale"]))
        lost = np.isnan(rows)
        smoothed[arch.up] *= np.where(lost, 1.0, rows).astype(np.float32)[:, None]
        smoothed[arch.down] /= np.where(lost, 1.0, rows).astype(np.float32)
        for linear, base in bases.items():
            expected = smoothed[linear]
            shape = results[f"{base}.weight_shape"].tolist()
            report.require(shape == list(expected.shape), f"{base}.weight_shape is {shape}, not {list(expected.shape)}")
            codes, steps = _int4_codes(results[f"{base}.weight_packed"], results[f"{base}.weight_scale"])
            difference = codes * steps - expected
            if linear == arch.down:
                # Up's row is zero, and so is all that this column is multiplied by.
                difference[:, lost] = 0
            far = np.count_nonzero(~(np.abs(difference) <= np.maximum(FARTHEST * steps, NEGLIGIBLE)))
            report.require(
                far == 0, f"{base}: {far} of {codes.size} int4 codes are not the nearest to the source's weights"
            )
            squares[linear] += [np.square(part, dtype=np.float64).sum() for part in (difference, expected)]
        report.count("experts whose int4 codes are the nearest")
    errors = {linear: float(np.sqrt(wrong / max(total, 1e-300))) for linear, (wrong, total) in squares.items()}
    return {linear: round(error, 5) if np.isfinite(error) else None for linear, error in errors.items()}


def _row_scales(weight: Array, steps: Array) -> Array:
    """float32 [out]: what up's rows were multiplied by, from the steps [out, groups] of the scaled rows.

    A group's step is its largest magnitude / 7.5; the median over a row's groups is good to a bf16 rounding. NaN where
    a row is zero or negligible.
    """
    largest = np.abs(weight).reshape(*steps.shape, -1).max(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(largest > NEGLIGIBLE, 7.5 * steps / largest, np.nan)
    found = np.array([np.median(row[np.isfinite(row)]) if np.isfinite(row).any() else np.nan for row in shares])
    found[(largest > NEGLIGIBLE).any(-1) & ~(found > 0)] = 1.0
    return found.astype(np.float32)


def _check_outside(report: Report, arch: Architecture, source: Checkpoint, result: Checkpoint) -> None:
    with source.reader() as originals, result.reader() as results:
        for name in source.specs:
            if arch.split(name)[0] is None:
                report.require(_sha256(originals[name]) == _sha256(results[name]), f"{name} is not the source's")
                report.count("other tensors equal to the source's bytes")


def _mapping(value: object) -> dict[str, Any]:
    """A JSON object, or an empty one where something else stands."""
    return value if isinstance(value, dict) else {}


def _expert_of(arch: Architecture, name: str, layer: int) -> tuple[int, str, str] | None:
    found, local = arch.split(name)
    return arch.split_expert(local) if found == layer else None


def _matches(module: str, targets: Iterable[str]) -> bool:
    """compressed-tensors' rule: `re:` patterns match from the start, other targets are whole names."""
    return any(
        re.match(target[3:], module) is not None if target.startswith("re:") else target == module for target in targets
    )


def _transformers_name(arch: Architecture, module: str) -> str:
    layer, local = arch.split(module)
    return module if layer is None else arch.layer_prefix(layer) + arch.module_name(local)


def _raw(tensor: torch.Tensor) -> Array:
    array: Array = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return array


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(_raw(tensor).data).hexdigest()


def _float32(tensor: torch.Tensor) -> Array:
    """bf16 or fp32 -> fp32: a bf16 is the upper half of a float."""
    raw = _raw(tensor)
    if tensor.dtype == torch.bfloat16:
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
    if tensor.dtype == torch.float32:
        return raw.view(np.float32).reshape(tensor.shape)
    raise CheckpointError(f"a tensor of dtype {tensor.dtype} stands where bf16 or fp32 must be")


def _float64(tensor: torch.Tensor) -> Array:
    return _float32(tensor).astype(np.float64)


def _e4m3_table() -> Array:
    """The 256 values of e4m3 (sign, 4 exponent bits of bias 7, 3 mantissa bits; no infinities)."""
    values = []
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        value = 2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8)
        values.append(float("nan") if code & 127 == 127 else -value if code & 128 else value)
    return np.array(values, dtype=np.float32)


_E4M3 = _e4m3_table()


def _fp8_values(weight: torch.Tensor, scale: torch.Tensor) -> Array:
    """float32 [out, in]: value times its 128x128 block's scale."""
    rows, columns = weight.shape
    blocks = np.repeat(np.repeat(_float32(scale), 128, axis=0)[:rows], 128, axis=1)[:, :columns]
    return _E4M3[_raw(weight)].reshape(rows, columns) * blocks


def _int4_codes(packed: torch.Tensor, scale: torch.Tensor) -> tuple[Array, Array]:
    """float32 [out, in] codes and the step of each, from int32 words of eight codes, lowest bits first, each plus 8."""
    words = _raw(packed).view(np.uint32).reshape(packed.shape)
    codes = (words[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
    values = codes.reshape(words.shape[0], -1).astype(np.float32) - 8
    scales = _float32(scale)
    return values, np.repeat(scales, values.shape[1] // scales.shape[1], axis=1)
