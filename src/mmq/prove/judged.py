"""Layers whose rounding was judged: the block's loss, computed again from the files.

The awq stage keeps some of the tokens that judged a layer, at the experts' input, and what the loss on them was, of the
experts it stored and of plain rounding to nearest. Here both are computed from source and result by numpy in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file
from transformers.activations import ACT2FN

from mmq.errors import CheckpointError, JournalError
from mmq.prove.findings import Report
from mmq.prove.formats import Array, float32, raw
from mmq.storage.checkpoint import read_json
from mmq.workdir.layer_files import LayerFiles
from mmq.workdir.workspace import Workspace

GROUP_CODES = 7.5
# The stage computes with bf16 activations and weights; of a loss, most of which is int4's, that is a few percent.
LOSS_TOLERANCE = 0.1
# Such noise of the outputs themselves, as a share of their squares: a loss this small says nothing.
NOISE = 2.0**-15
BEYOND = 1e37
TENSORS = ("x", "index", "weight", "inner")


@dataclass
class Judged:
    """A layer's tokens and what the awq stage says of them.

    Attributes:
        compensated: whether that way of rounding was chosen.
        inner: float32 [E, I], the scales that up's rows were divided by and down's columns multiplied with.
        x: float32 [n, H], the experts' input without smoothing.
        index, weight: int64 and float32 [n, k], the router's choices.
        activation: its name.
        clamped: where gate and up are clamped, the gate's factor in the sigmoid, and the limit.
        stated: the losses that the statistics have, `loss_chosen` and `loss_round_to_nearest`.
        outputs: float64 [n, H] of the source's experts, of those stored, and of the source's rounded to nearest.
    """

    compensated: bool
    inner: Array
    x: Array
    index: Array
    weight: Array
    stated: dict[str, Any]
    activation: str
    clamped: tuple[float, float] | None = None
    outputs: dict[str, Array] = field(default_factory=dict)

    def add(self, kind: str, expert: int, gate: Array, up: Array, down: Array, applied: Array | None = None) -> None:
        """Add what an expert gives to the tokens that chose it.

        Args:
            applied: float [H], what the smoothed norm leaves to gate's and up's inputs.
        """
        out = self.outputs.setdefault(kind, np.zeros(self.x.shape))
        token, place = np.nonzero(self.index == expert)
        if not len(token):
            return
        rows = self.x[token] if applied is None else self.x[token] / applied.astype(np.float32)
        middle = _gated(self.activation, self.clamped, rows @ gate.T, rows @ up.T)
        np.add.at(out, token, self.weight[token, place, None] * (middle @ down.T))

    def check_codes(self, report: Report, expert: int, where: str, parts: list[torch.Tensor]) -> None:
        """An expert's codes and scales must be those that were judged.

        Args:
            parts: codes of gate and up, their scales, codes of down, its scales.
        """
        if self.compensated:
            digest = xxhash.xxh3_128(b"".join(raw(part).tobytes() for part in parts)).hexdigest()
            stated = self.stated.get("codes")
            same = isinstance(stated, list) and expert < len(stated) and stated[expert] == digest
            report.require(same, f"{where}: codes or scales are not those that were judged")
            report.count("experts whose codes are those that were judged")

    def check(self, report: Report, layer: int) -> None:
        """The stored experts' loss must be the statistics', and not above nearest's on what judged."""
        truth = self.outputs["source"]
        found = {
            "loss_chosen": float(np.square(self.outputs["stored"] - truth).mean()),
            "loss_round_to_nearest": float(np.square(self.outputs["nearest"] - truth).mean()),
        }
        noise = NOISE * float(np.square(truth).mean())
        for name, value in found.items():
            stated = self.stated.get(name)
            if isinstance(stated, float):
                right = abs(value - stated) <= LOSS_TOLERANCE * max(value, stated) + noise
            else:
                # The stage's sums are fp32: of numbers beyond it the statistics have none.
                right = stated is None and not value * truth.shape[1] < BEYOND
            report.require(
                right,
                f"layer {layer}: {name} on the tokens kept as evidence is {value:.4g} by the files, {stated} by the"
                " statistics",
            )
        report.count("losses of rounding equal to the statistics'", len(found))


def judged_layer(workspace: Workspace, layer: int) -> Judged | None:
    """What the awq stage kept of a layer's judging; None where all codes must be the nearest.

    Raises:
        CheckpointError, JournalError: the statistics or the evidence are not what the stage wrote.
    """
    if workspace.recipe.awq.rounding == "nearest":
        return None
    record, tensors = _kept(workspace, layer)
    stated = record["evidence"]
    _require_fair(record, layer)
    return Judged(
        record.get("rounding") == "compensated",
        float32(tensors["inner"]),
        float32(tensors["x"]),
        tensors["index"].numpy(),
        float32(tensors["weight"]),
        stated,
        str(workspace.source.config.get("hidden_act", "silu")),
        clamped.of(workspace.source.config) if (clamped := workspace.architecture.clamped) else None,
    )


def inner_scales(workspace: Workspace, layer: int) -> torch.Tensor:
    """The scales that a judged layer's up rows were divided by and its down columns multiplied with: float32 [E, I].

    Raises:
        CheckpointError, JournalError: as for `judged_layer`.
    """
    return _kept(workspace, layer)[1]["inner"].float()


def _kept(workspace: Workspace, layer: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A judged layer's statistics and evidence, as the stage wrote them."""
    files, journal = LayerFiles.of(workspace, "awq"), workspace.journal.stage("awq")
    for path in (files.record(layer), files.evidence(layer)):
        if not path.is_file():
            raise JournalError(f"{path} is gone, without which nothing can be said of layer {layer}'s rounding")
        journal.check_content(files.in_journal(path))
    record, tensors = read_json(files.record(layer)), load_file(files.evidence(layer))
    if tensors.keys() != set(TENSORS) or not isinstance(record.get("evidence"), dict):
        raise CheckpointError(f"{files.evidence(layer)} is no evidence of a layer's rounding")
    return record, tensors


def _require_fair(record: dict[str, Any], layer: int) -> None:
    """Raises CheckpointError where the chosen way was worse than nearest on the samples that judged."""
    chosen, nearest = record.get("loss_chosen"), record.get("loss_round_to_nearest")
    if isinstance(chosen, float) and isinstance(nearest, float) and chosen > nearest:
        raise CheckpointError(
            f"layer {layer} was rounded worse than to nearest: {chosen:.4g} against {nearest:.4g} on held-back samples"
        )


def round_to_nearest(weight: Array, group: int) -> Array:
    """float32 [out, in] rounded to nearest in groups, scales in bf16, as it is read back."""
    groups = weight.reshape(weight.shape[0], -1, group)
    steps = bf16(np.abs(groups).max(-1) / np.float32(GROUP_CODES))[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(steps > 0, np.clip(np.rint(groups / steps), -8, 7), 0)
    return (codes * steps).astype(np.float32).reshape(weight.shape)


def bf16(values: Array) -> Array:
    """float32 rounded to bf16's upper half, ties to even: what the stage reads of fp8."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def _gated(name: str, clamped: tuple[float, float] | None, gate: Array, up: Array) -> Array:
    if clamped is None:
        return _act(name, gate) * up
    alpha, limit = clamped
    gate, up = np.minimum(gate, np.float32(limit)), np.clip(up, np.float32(-limit), np.float32(limit))
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(np.float32(-alpha) * gate)) * (up + 1)


def _act(name: str, values: Array) -> Array:
    if name == "silu":
        with np.errstate(over="ignore"):
            return values / (1 + np.exp(-values))
    result: Array = ACT2FN[name](torch.from_numpy(values)).numpy()
    return result
