"""Verify by the tensors' bytes: what must be the source's, smoothing that undoes itself, codes that are the nearest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from mmq.errors import MmqError
from mmq.families.sizes import BLOCK, Storage
from mmq.families.table import Architecture
from mmq.machine.team import ALONE, Team
from mmq.machine.threads import each
from mmq.prove.check_config import Original, carried_scales, kept_scales, layer_of
from mmq.prove.findings import Report
from mmq.prove.formats import Array, float32, float64, fp8_values, int4_codes, sha256
from mmq.prove.judged import Judged, bf16, round_to_nearest
from mmq.storage.checkpoint import Checkpoint, TensorReader
from mmq.workdir.output_shards import layer_unit
from mmq.workdir.progress import Reporter

NAME = "verify"
OUTSIDE = "outside"
# norm and norm' are bf16; the quotient, and its product with the router, are each rounded to fp32. Where a server holds
# the router in bf16, scales are powers of two, and nothing is rounded.
READER_TOLERANCE = 1e-6
# The most that a rounding to bf16 changes: what was fp8 is rounded once, and what a norm with an offset scales by no
# power of two is as well.
ROUNDING = 2**-8
# A code is the nearest to its weight, or 7 where the weight is 7.5 steps; bf16 roundings of weight and step, and of the
# steps from which up's and down's smoothing is found again, add up to a tenth of a step.
FARTHEST = 0.6
# Squares of what compensated rounding changes a weight by, of what rounding to nearest does, at the same group scales
# or at those of the largest magnitudes: 1.4 to 1.7 are seen, codes that are not the weight's make it hundreds.
MOST_COMPENSATED = 10
# Weights below this do nothing. bf16 and fp32 lose bits near 1e-38, and with them what scaled such weights.
NEGLIGIBLE = 1e-30


def check_tensors(
    report: Report,
    original: Original,
    result: Checkpoint,
    judged: Callable[[int], Judged | None],
    workers: int,
    reporter: Reporter,
    team: Team = ALONE,
) -> None:
    """All that needs the tensors' bytes, layer by layer on threads. Of several ranks each looks at its part of the
    layers, and all get all findings.

    Args:
        judged: what is known of a layer's rounding; None where every code must be the nearest.
    """
    arch, source = original.arch, original.checkpoint
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
                _check_outside(part, original, result)
            else:
                known = judged(layer) if arch.has_experts(layer) else None
                _check_layer(part, original, result, layer, known)
        except MmqError as error:
            part.problems.append(str(error))
        reporter.unit(units[layer])
        return part

    # Neighbours are alike: the ranks' layers come in turns.
    found = team.everyone([part.findings() for part in each(guarded, layers[team.rank :: team.size], workers)])
    for number, layer in enumerate(layers):
        rank, place = number % team.size, number // team.size
        report.add(found[rank][place])
        if rank != team.rank:
            reporter.unit(units[layer])
    reporter.finish(NAME)


def _check_layer(report: Report, original: Original, result: Checkpoint, layer: int, judged: Judged | None) -> None:
    arch, source, storage = original.arch, original.checkpoint, original.storage
    prefix = arch.layer_prefix(layer)
    with source.reader() as originals, result.reader() as results:
        for base, scale in kept_scales(original, layer).items():
            for before, after in ((base, base), *([(scale, f"{base}_scale")] if scale else [])):
                digest = sha256(originals[before])
                report.require(sha256(results[after]) == digest, f"{after} is not the source's {before}")
                report.attention[after] = digest
                report.count("attention tensors equal to the source's bytes")
        for name in original.rounded_at(layer):
            _check_rounded(report, name, float32(originals[name]), results)
        routed = arch.has_experts(layer)
        same = [arch.router_bias] if routed else [arch.smooth_norm]
        for local in [*arch.attention_inputs(layer), *filter(None, same)]:
            report.require(
                sha256(originals[prefix + local]) == sha256(results[prefix + local]),
                f"{prefix}{local} is not the source's",
            )
            report.count("other tensors equal to the source's bytes")
        entry: dict[str, Any] = {"layer": layer}
        if routed:
            kept = kept_scales(original, layer)
            applied = _check_smoothing(report, original, prefix, kept, originals, results)
            entry["expert_error"] = _check_experts(report, arch, storage, layer, applied, judged, originals, results)
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
    original: Original,
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
    arch = original.arch
    norms = [float64(reader[prefix + arch.smooth_norm]) + arch.norm_offset for reader in (originals, results)]
    for local in arch.norm_readers(experts=0):
        if prefix + local in kept:
            report.require(
                sha256(originals[prefix + arch.smooth_norm]) == sha256(results[prefix + arch.smooth_norm]),
                f"{prefix}{local} keeps its bytes, though {prefix}{arch.smooth_norm} is not the source's",
            )
            continue
        roundings = int(originals[prefix + local].dtype == torch.float8_e4m3fn)
        roundings += int(arch.norm_offset != 0 and results[prefix + local].dtype == torch.bfloat16)
        source = _source_values(originals, prefix + local, original.storage)
        weights = [source.astype(np.float64), float64(results[prefix + local])]
        before, after = (norm * weight for norm, weight in zip(norms, weights, strict=True))
        distance = np.abs(after - before) / np.maximum(np.abs(before), 1e-30)
        error = float(np.max(distance, where=before != 0, initial=0.0))
        tolerance = (1 + ROUNDING) ** roundings - 1 + READER_TOLERANCE
        report.require(
            bool(np.isfinite(after).all()) and error <= tolerance and not np.any(after[before == 0]),
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
    judged: Judged | None,
    originals: TensorReader,
    results: TensorReader,
) -> dict[str, float | None]:
    """Every int4 code must be the nearest to the source's weight as the smoothing left it.

    Where codes make up for each other's errors they are not: then a linear layer's weights as a whole must be near, the
    codes those that were judged, and the block's loss from the files what the statistics say.

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
        stored: dict[str, Array] = {}
        if judged:
            # The largest weight of a group lies between two codes: a bit decides which is the nearest.
            linears = [bf16(smoothed[linear]) for linear in (arch.gate, arch.up, arch.down)]
            judged.add("source", expert, *linears)
            judged.add(
                "nearest",
                expert,
                *(round_to_nearest(weight, _group_size(results, bases[arch.gate])) for weight in linears),
            )
        smoothed[arch.gate] *= inputs
        smoothed[arch.up] *= inputs
        if not arch.smooths_down:
            rows = np.ones(smoothed[arch.up].shape[0], dtype=np.float32)
        elif judged:
            rows = 1 / judged.inner[expert]
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
            stored[linear] = codes * steps
            difference = stored[linear] - expected
            if linear == arch.down:
                # Up's row is zero, and so is all that this column is multiplied by.
                difference[:, lost] = 0
            squares[linear] += [np.square(part, dtype=np.float64).sum() for part in (difference, expected)]
            report.require(bool((steps > 0).all()), f"{base}: a group scale is not positive")
            if judged and judged.compensated:
                with np.errstate(divide="ignore", invalid="ignore"):
                    nearest = np.clip(np.rint(expected / steps), -8, 7) * steps - expected
                # Scales fitted to the weights may leave nothing of weights that are all alike.
                usual = round_to_nearest(expected, _group_size(results, base)) - expected
                changed, *others = (
                    float(np.square(part, dtype=np.float64).sum()) for part in (difference, nearest, usual)
                )
                least = max(others)
                report.require(
                    changed <= MOST_COMPENSATED * least + NEGLIGIBLE,
                    f"{base}: int4 codes are {changed / max(least, NEGLIGIBLE):.1f} times as far from the source's"
                    f" weights as the nearest ones, in squares; compensation makes it at most {MOST_COMPENSATED} times",
                )
                continue
            far = np.count_nonzero(~(np.abs(difference) <= np.maximum(FARTHEST * steps, NEGLIGIBLE)))
            report.require(
                far == 0, f"{base}: {far} of {codes.size} int4 codes are not the nearest to the source's weights"
            )
        if judged:
            names = [(arch.gate, arch.up), (arch.down,)]
            parts = [(group, kind) for group in names for kind in ("packed", "scale")]
            tensors = [results[f"{bases[linear]}.weight_{kind}"] for group, kind in parts for linear in group]
            judged.check_codes(report, expert, bases[arch.gate].rpartition(".")[0], tensors)
            judged.add("stored", expert, stored[arch.gate], stored[arch.up], stored[arch.down], applied)
        compensated = judged is not None and judged.compensated
        report.count(f"experts whose int4 {'weights are near' if compensated else 'codes are the nearest'}")
    if judged:
        judged.check(report, layer)
    errors = {linear: float(np.sqrt(wrong / max(total, 1e-300))) for linear, (wrong, total) in squares.items()}
    return {linear: round(error, 5) if np.isfinite(error) else None for linear, error in errors.items()}


def _check_rounded(report: Report, name: str, weight: Array, results: TensorReader) -> None:
    """Block fp8 must be the nearest to the source's bf16, and each block's scale no larger than it must be.

    An e4m3 has three bits after the first, so that the nearest is off by 1 / 16 of a number at most, and by half of
    2^-9 steps near zero.
    """
    scale = float32(results[f"{name}_scale"])
    rows, columns = weight.shape
    high, wide = (np.arange(size) // BLOCK for size in (rows, columns))
    steps = scale[high][:, wide]
    error = np.abs(fp8_values(results[name], results[f"{name}_scale"]) - weight)
    far = np.count_nonzero(~(error <= np.maximum(np.abs(weight) / 16, steps * 2**-10) * (1 + 1e-5)))
    report.require(far == 0, f"{name}: {far} of {weight.size} fp8 codes are not the nearest to the source's weights")
    largest = np.zeros(scale.shape)
    np.maximum.at(largest, (high[:, None], wide[None, :]), np.abs(weight))
    report.require(
        bool((scale > 0).all()) and bool((scale <= np.maximum(largest / 448, 1e-12) * (1 + 1e-5)).all()),
        f"{name}_scale: a block's scale is not what its largest weight asks for",
    )
    report.count("attention tensors rounded to the nearest fp8")


def _source_values(originals: TensorReader, name: str, storage: Storage) -> Array:
    """A tensor of the source, float32 [out, in]."""
    if originals[name].dtype != torch.float8_e4m3fn:
        return float32(originals[name])
    return fp8_values(originals[name], originals[f"{name}{storage.scale_suffix}"], storage.block)


def _group_size(results: TensorReader, base: str) -> int:
    """Input channels that share a scale."""
    return int(results[f"{base}.weight_packed"].shape[1]) * 8 // int(results[f"{base}.weight_scale"].shape[1])


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


def _check_outside(report: Report, original: Original, result: Checkpoint) -> None:
    arch, source, suffix = original.arch, original.checkpoint, original.storage.scale_suffix
    renamed = {scale: f"{name}_scale" for name, scale in carried_scales(original).items()} if suffix else {}
    with source.reader() as originals, result.reader() as results:
        for name in source.specs:
            if layer_of(arch, source, name) is None:
                after = renamed.get(name, name)
                report.require(sha256(originals[name]) == sha256(results[after]), f"{after} is not the source's")
                report.count("other tensors equal to the source's bytes")


def _expert_of(arch: Architecture, name: str, layer: int) -> tuple[int, str, str] | None:
    found, local = arch.split(name)
    return arch.split_expert(local) if found == layer else None
