"""Verify by the tensors' bytes: what must be the source's, smoothing that undoes itself, codes that are the nearest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmq.errors import MmqError
from mmq.families.sizes import Storage
from mmq.families.table import Architecture
from mmq.machine.threads import each
from mmq.prove.check_config import kept_scales, layer_of
from mmq.prove.findings import Report
from mmq.prove.formats import Array, float32, float64, fp8_values, int4_codes, sha256
from mmq.storage.checkpoint import Checkpoint, TensorReader
from mmq.workdir.output_shards import layer_unit
from mmq.workdir.progress import Reporter

NAME = "verify"
OUTSIDE = "outside"
# norm and norm' are bf16; the quotient, and its product with the router, are each rounded to fp32. Where a server holds
# the router in bf16, scales are powers of two, and nothing is rounded.
READER_TOLERANCE = 1e-6
# A code is the nearest to its weight, or 7 where the weight is 7.5 steps; bf16 roundings of weight and step, and of the
# steps from which up's and down's smoothing is found again, add up to a tenth of a step.
FARTHEST = 0.6
# Squares of what compensated rounding changes a weight by, of what rounding to nearest at the same group scales does:
# 1.4 to 1.7 are seen, codes that are not the weight's make it hundreds.
MOST_COMPENSATED = 10
# Weights below this do nothing. bf16 and fp32 lose bits near 1e-38, and with them what scaled such weights.
NEGLIGIBLE = 1e-30


def check_tensors(
    report: Report,
    arch: Architecture,
    source: Checkpoint,
    storage: Storage,
    result: Checkpoint,
    compensated: bool,
    workers: int,
    reporter: Reporter,
) -> None:
    """All that needs the tensors' bytes, layer by layer on threads.

    Args:
        compensated: codes make up for each other's errors, so that many are not the nearest to their weights.
    """
    sizes: dict[int | None, int] = {None: 0}
    for checkpoint in (source, result):
        for name, spec in checkpoint.specs.items():
            layer = layer_of(arch, source, name)
            sizes[layer] = sizes.get(layer, 0) + spec.nbytes
    layers = [*sorted(layer for layer in sizes if layer is not None), None]
    units = {layer: OUTSIDE if layer is None else layer_unit(layer) for layer in layers}
    reporter.start(NAME, {units[layer]: sizes[layer] for layer in layers}, (), sum(sizes.values()))

    def guarded(layer: int | None) -> Report:
        reporter.step(units[layer], "comparing", 0, 1)
        part = Report(report.folder, report.path)
        try:
            if layer is None:
                _check_outside(part, arch, source, result)
            else:
                _check_layer(part, arch, source, storage, result, compensated, layer)
        except MmqError as error:
            part.problems.append(str(error))
        reporter.unit(units[layer])
        return part

    for part in each(guarded, layers, workers):
        report.problems += part.problems
        report.layers += part.layers
        report.attention |= part.attention
        for check, number in part.checks.items():
            report.count(check, number)
    reporter.finish(NAME)


def _check_layer(
    report: Report,
    arch: Architecture,
    source: Checkpoint,
    storage: Storage,
    result: Checkpoint,
    compensated: bool,
    layer: int,
) -> None:
    prefix = arch.layer_prefix(layer)
    with source.reader() as originals, result.reader() as results:
        for base, scale in kept_scales(arch, source, storage, layer).items():
            for before, after in ((base, base), *([(scale, f"{base}_scale")] if scale else [])):
                digest = sha256(originals[before])
                report.require(sha256(results[after]) == digest, f"{after} is not the source's {before}")
                report.attention[after] = digest
                report.count("attention tensors equal to the source's bytes")
        routed = arch.has_experts(layer)
        same = [arch.router_bias] if routed else [arch.smooth_norm]
        for local in [*arch.attention_inputs, *filter(None, same)]:
            report.require(
                sha256(originals[prefix + local]) == sha256(results[prefix + local]),
                f"{prefix}{local} is not the source's",
            )
            report.count("other tensors equal to the source's bytes")
        entry: dict[str, Any] = {"layer": layer}
        if routed:
            kept = kept_scales(arch, source, storage, layer)
            applied = _check_smoothing(report, arch, prefix, kept, originals, results)
            entry["expert_error"] = _check_experts(
                report, arch, storage, layer, applied, compensated, originals, results
            )
        for scale in ("k_scale", "v_scale"):
            name = f"{prefix}{arch.attention_module}.{scale}"
            if name in result.specs:
                value = float(results[name])
                report.require(bool(np.isfinite(value)) and value > 0, f"{name} is {value}")
                report.count("KV scales finite and positive")
                entry[scale] = value if np.isfinite(value) else None
        report.layers.append(entry)


def _check_smoothing(
    report: Report,
    arch: Architecture,
    prefix: str,
    kept: Mapping[str, str | None],
    originals: TensorReader,
    results: TensorReader,
) -> Array:
    """norm x reader must be what it was, for all readers but the routed experts, whose codes are looked at.

    Args:
        kept: readers that have the source's bytes, for which the norm must have them too.

    Returns:
        the scale that the new norm leaves to its readers, float64 [H].
    """
    norms = [float64(reader[prefix + arch.smooth_norm]) for reader in (originals, results)]
    for local in arch.norm_readers(experts=0):
        if prefix + local in kept:
            report.require(
                sha256(originals[prefix + arch.smooth_norm]) == sha256(results[prefix + arch.smooth_norm]),
                f"{prefix}{local} keeps its bytes, though {prefix}{arch.smooth_norm} is not the source's",
            )
            continue
        weights = [float64(reader[prefix + local]) for reader in (originals, results)]
        before, after = (norm * weight for norm, weight in zip(norms, weights, strict=True))
        distance = np.abs(after - before) / np.maximum(np.abs(before), 1e-30)
        error = float(np.max(distance, where=before != 0, initial=0.0))
        report.require(
            bool(np.isfinite(after).all()) and error <= READER_TOLERANCE and not np.any(after[before == 0]),
            f"{prefix}{local} does not undo what {prefix}{arch.smooth_norm} does (relative error {error:.1e})",
        )
        report.count("routers that undo their norm" if local == arch.router else "shared experts that undo their norm")
    safe = np.where(norms[1] == 0, 1.0, norms[1])
    return np.where(norms[1] == 0, 1.0, norms[0] / safe)


def _check_experts(
    report: Report,
    arch: Architecture,
    storage: Storage,
    layer: int,
    applied: Array,
    compensated: bool,
    originals: TensorReader,
    results: TensorReader,
) -> dict[str, float | None]:
    """Every int4 code must be the nearest to the source's weight as the smoothing left it; where codes make up for each
    other's errors, a linear layer's weights as a whole must be near.

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
        smoothed = {linear: _source_values(originals, f"{base}.weight", storage) for linear, base in bases.items()}
        smoothed[arch.gate] *= inputs
        smoothed[arch.up] *= inputs
        if compensated:
            up = int4_codes(results[f"{bases[arch.up]}.weight_packed"], results[f"{bases[arch.up]}.weight_scale"])
            rows = _fitted_rows(smoothed[arch.up], up[0] * up[1])
        else:
            rows = _row_scales(smoothed[arch.up], float32(results[f"{bases[arch.up]}.weight_scale"]))
        lost = np.isnan(rows)
        smoothed[arch.up] *= np.where(lost, 1.0, rows).astype(np.float32)[:, None]
        smoothed[arch.down] /= np.where(lost, 1.0, rows).astype(np.float32)
        for linear, base in bases.items():
            expected = smoothed[linear]
            shape = results[f"{base}.weight_shape"].tolist()
            report.require(shape == list(expected.shape), f"{base}.weight_shape is {shape}, not {list(expected.shape)}")
            codes, steps = int4_codes(results[f"{base}.weight_packed"], results[f"{base}.weight_scale"])
            difference = codes * steps - expected
            if linear == arch.down:
                # Up's row is zero, and so is all that this column is multiplied by.
                difference[:, lost] = 0
            if compensated:
                nearest = np.clip(np.rint(expected / steps), codes.min(), codes.max()) * steps - expected
                changed, least = (float(np.square(part, dtype=np.float64).sum()) for part in (difference, nearest))
                report.require(
                    changed <= MOST_COMPENSATED * least + NEGLIGIBLE,
                    f"{base}: int4 codes are {changed / max(least, NEGLIGIBLE):.1f} times as far from the source's"
                    f" weights as the nearest ones, in squares; compensation makes it at most {MOST_COMPENSATED} times",
                )
            else:
                far = np.count_nonzero(~(np.abs(difference) <= np.maximum(FARTHEST * steps, NEGLIGIBLE)))
                report.require(
                    far == 0, f"{base}: {far} of {codes.size} int4 codes are not the nearest to the source's weights"
                )
            squares[linear] += [np.square(part, dtype=np.float64).sum() for part in (difference, expected)]
        report.count(f"experts whose int4 {'weights are near' if compensated else 'codes are the nearest'}")
    errors = {linear: float(np.sqrt(wrong / max(total, 1e-300))) for linear, (wrong, total) in squares.items()}
    return {linear: round(error, 5) if np.isfinite(error) else None for linear, error in errors.items()}


def _source_values(originals: TensorReader, name: str, storage: Storage) -> Array:
    """A matrix of the source, float32 [out, in]."""
    if storage.scale_suffix is None:
        return float32(originals[name])
    return fp8_values(originals[name], originals[f"{name}{storage.scale_suffix}"], storage.block)


def _fitted_rows(weight: Array, stored: Array) -> Array:
    """The scale of each row of a weight that fits what is stored best, by least squares; NaN for a row of zeros.

    Source: for s that minimizes |q - s w|^2, s = <q, w> / <w, w>.
    """
    products = (stored.astype(np.float64) * weight).sum(1)
    squares = np.square(weight, dtype=np.float64).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = products / squares
    return np.where(found > 0, found, np.nan)


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
            if layer_of(arch, source, name) is None:
                report.require(sha256(originals[name]) == sha256(results[name]), f"{name} is not the source's")
                report.count("other tensors equal to the source's bytes")


def _expert_of(arch: Architecture, name: str, layer: int) -> tuple[int, str, str] | None:
    found, local = arch.split(name)
    return arch.split_expert(local) if found == layer else None
