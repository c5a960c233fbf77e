"""How far the hybrid checkpoint is from its source: perplexity, KL, top-1 agreement and hidden states on held-out text.

All variants of the model go through the decoder layers together, each with hidden states and a routing of its own; one
layer of one checkpoint is in memory at a time. What is common to all evaluations is in `streamed`.

The variant with an fp8 KV cache rounds keys after rotary and values with the calibrated scales.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file

from mmq.errors import CheckpointError, JournalError
from mmq.machine.device import release_memory
from mmq.prove import by_layer
from mmq.prove.by_layer import ByLayer
from mmq.prove.forward import run_layer
from mmq.prove.judged import inner_scales
from mmq.prove.measures import Measured, measure, other_experts, relative_error
from mmq.prove.streamed import HEAD, EvalSettings, Streamed, units_of
from mmq.prove.streamed import RESULT_FIELD as RESULT_FIELD
from mmq.prove.weights import nearest_smoothed, read_layer, take_kv_scales
from mmq.quantize.decoder_layer import DecoderLayer
from mmq.quantize.kv_cache import quantize_kv_cache
from mmq.source.model import SourceModel
from mmq.stages.base import holding
from mmq.stages.preflight import Passed
from mmq.storage.shards import save_tensors
from mmq.tensors.fp8 import is_finite
from mmq.workdir.output_shards import layer_unit
from mmq.workdir.workspace import Workspace

name = "eval"
REPORT_NAME = "eval.json"
# The evaluations by their names in the journal, and how much work each of their units is.
WORK: dict[str, Callable[[SourceModel], dict[str, int]]] = {
    name: lambda source: dict.fromkeys(units_of(source), 1),
    by_layer.name: by_layer.work_of,
}


@dataclass(frozen=True)
class Variant:
    """One column of the evaluation.

    Attributes:
        weights: whose tensors it has, "source" or "hybrid".
        round_to_nearest: its experts are the source's, rounded to nearest int4 under the smoothing that the weights
            have: the source's have none.
        fp8_kv: keys and values are rounded to e4m3.
    """

    name: str
    weights: str
    round_to_nearest: bool = False
    fp8_kv: bool = False

    @property
    def experts(self) -> str:
        """Whose experts it is made from."""
        return SOURCE.weights if self.round_to_nearest else self.weights


# The first one is the truth.
SOURCE = Variant("source", "source")
HYBRID_MODEL = Variant("hybrid", "hybrid")
HYBRID_FP8_KV = Variant("hybrid, fp8 KV cache", "hybrid", fp8_kv=True)
NEAREST = Variant("round-to-nearest", "source", round_to_nearest=True)
# Of a result that was rounded to nearest it is the result itself.
SMOOTHED_NEAREST = Variant("round-to-nearest, same smoothing", "hybrid", round_to_nearest=True)


def evaluate_checkpoint(
    workspace: Workspace, settings: EvalSettings, restart: bool = False, layers: bool = False
) -> dict[str, Any]:
    """Run or resume the evaluation under the work_dir's lock.

    Args:
        layers: evaluate each layer by itself as well.

    Returns:
        the content of eval.json; with `layers` that of by_layer.json as `by_layer`.

    Raises:
        JournalError: restore has not ended, or an evaluation was begun with other inputs.
        CalibrationError: the data can't be used.
    """
    with holding(workspace):
        passes = _passes(workspace, settings, layers)
        if workspace.team.leads:
            for one in passes:
                one.check(restart)
        report, *others = (one.run(restart) for one in passes)
    return report | ({"by_layer": others[0]} if others else {})


def checked(workspace: Workspace, settings: EvalSettings, restart: bool = False, layers: bool = False) -> list[Passed]:
    """What `evaluate_checkpoint` would refuse, looked at without a lock; nothing is written. Raises as it does."""
    return [passed for one in _passes(workspace, settings, layers) for passed in one.check(restart)]


def _passes(workspace: Workspace, settings: EvalSettings, layers: bool) -> list[Streamed]:
    return [_Evaluation(workspace, settings), *([ByLayer(workspace, settings)] if layers else [])]


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """eval.json as a table for people; "last hidden" is the relative error of the hidden states after all layers."""
    return [
        {
            "variant": entry["variant"],
            "perplexity": f"{entry['perplexity']:.4f}",
            "KL (nats)": f"{entry['kl']:.5f}",
            "same top-1": f"{entry['top1_agreement']:.2%}",
            "last hidden": f"{report['layers'][-1]['relative_error'][entry['variant']]:.2%}",
            "KL ±": f"{entry['kl_standard_error']:.5f}" if entry.get("kl_standard_error") else "",
        }
        for entry in report["variants"]
    ]


def told_routing(report: dict[str, Any]) -> str | None:
    """How many of the routers' choices are none of the source's for the same token, in words: means over the layers
    that have experts. None of an evaluation made before choices were counted."""
    layers = [layer["other_experts"] for layer in report["layers"] if "other_experts" in layer]
    if not layers:
        return None
    shares = {name: sum(layer[name] for layer in layers) / len(layers) for name in layers[0] if name != SOURCE.name}
    return "routed to other experts than the source's: " + "; ".join(f"{n} {s:.2%}" for n, s in shares.items())


def kind_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """KL of each kind of text that samples name, as a table; empty where they name none."""
    return [
        {
            "KL by kind of text": entry["variant"],
            **{kind: _with_error(found) for kind, found in entry["kinds"].items()},
        }
        for entry in report["variants"]
        if entry.get("kinds") and entry["variant"] != SOURCE.name
    ]


def _with_error(found: dict[str, Any]) -> str:
    """A mean KL and its standard error."""
    error = found["kl_standard_error"]
    return f"{found['kl']:.5f}" + (f" ± {error:.5f}" if error else "")


def worst(report: dict[str, Any], most: int = 3) -> list[dict[str, Any]]:
    """The samples that the result is farthest from the source on."""
    samples = [sample for sample in report.get("samples", []) if sample["tokens"]]
    samples.sort(key=lambda sample: -sample["variants"][HYBRID_MODEL.name]["kl"])
    return [
        {
            "sample": sample["sample"],
            "name": sample["name"],
            "KL (nats)": f"{sample['variants'][HYBRID_MODEL.name]['kl']:.5f}",
            "perplexity of the source": f"{sample['variants'][SOURCE.name]['perplexity']:.2f}",
        }
        for sample in samples[:most]
    ]


def brought(report: dict[str, Any]) -> str | None:
    """What smoothing and compensated rounding bring, in words; None where the report doesn't tell."""
    kl = {entry["variant"]: entry["kl"] for entry in report["variants"]}
    if not {NEAREST.name, HYBRID_MODEL.name} <= kl.keys():
        return None
    start, end = f"KL {kl[NEAREST.name]:.5f} of the source rounded to nearest", f"{kl[HYBRID_MODEL.name]:.5f}"
    if SMOOTHED_NEAREST.name in kl:
        return f"{start}, {kl[SMOOTHED_NEAREST.name]:.5f} after smoothing, {end} with compensated rounding too"
    if report["settings"].get("rounding") != "nearest":
        return None
    return f"{start}, {end} after smoothing, which is all that the result has"


def told_by_layer(layers: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    """Which layers cost most, in words, beside what all cost together if the evaluation is of the same samples.

    Args:
        layers: content of by_layer.json.
        evaluation: content of eval.json.
    """
    whole = None
    if evaluation is not None and evaluation["tokens"].get("fingerprint") == layers["tokens"]["fingerprint"]:
        whole = next((one["kl"] for one in evaluation["variants"] if one["variant"] == HYBRID_MODEL.name), None)
    return by_layer.told(layers, whole)


class _Evaluation(Streamed):
    """One run of the evaluation."""

    name = name
    state = name
    report_name = REPORT_NAME

    def __init__(self, workspace: Workspace, settings: EvalSettings) -> None:
        super().__init__(workspace, settings)
        self.kv_scheme: dict[str, Any] | None = (self.hybrid.config.get("quantization_config") or {}).get(
            "kv_cache_scheme"
        )
        self.rounding = str(workspace.journal.stage("awq").fingerprint.get("awq.rounding", "nearest"))
        self.variants = [
            SOURCE,
            HYBRID_MODEL,
            *([HYBRID_FP8_KV] if self.kv_scheme else []),
            NEAREST,
            *([SMOOTHED_NEAREST] if self.rounding != "nearest" else []),
        ]
        self.streams = self.at_once = len(self.variants)

    def check_layers(self, pending: Sequence[int]) -> dict[str, str]:
        found = super().check_layers(pending)
        if SMOOTHED_NEAREST in self.variants:
            routed = [layer for layer in pending if self.arch.has_experts(layer)]
            for layer in routed:
                inner_scales(self.workspace, layer)
            found["smoothing"] = f"the scales of {len(routed)} layers, as awq wrote them"
        return found

    def compute(self, pending: list[int]) -> None:
        hidden = self._hidden_states()
        for layer in pending:
            hidden = self._run_layer(layer, hidden)
        self._run_head(hidden)

    def _run_layer(self, layer: int, hidden: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All variants through one layer; their states [T, H] after it are on disk when this returns."""
        begin = time.perf_counter()
        after: dict[str, torch.Tensor] = {}
        choices: dict[str, torch.Tensor] = {}
        for place, key in enumerate(self.weights):
            self.workspace.reporter.step(layer_unit(layer), f"computing {key}", place, len(self.weights))
            after |= self._run_variants(key, layer, hidden, choices)
            release_memory()
        after = {variant.name: after[variant.name] for variant in self.variants}
        truth = after[SOURCE.name]
        errors = {variant.name: relative_error(after[variant.name], truth) for variant in self.variants}
        seconds = round(time.perf_counter() - begin, 3)
        record = {"layer": layer, "relative_error": errors, "seconds": seconds}
        if choices:
            true = choices[SOURCE.name]
            record["other_experts"] = {one.name: other_experts(choices[one.name], true) for one in self.variants}
        if self.team.leads:
            saved = save_tensors(self.files.hidden(layer), {key: states.cpu() for key, states in after.items()})
            self.finish_layer(layer, saved, record)
        shown = {variant: f"{error:.2%}" for variant, error in errors.items() if variant != SOURCE.name}
        self.workspace.reporter.unit(layer_unit(layer), **shown, seconds=seconds)
        return after

    def _run_variants(
        self, key: str, layer: int, hidden: dict[str, torch.Tensor], choices: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The variants that are made from one checkpoint's experts; its layer is freed when this returns.

        Args:
            choices: takes each variant's, int64 [T, k], where the layer has a router.
        """
        content = read_layer(self.weights[key], self.arch, layer, self.device, self.team)
        scales = take_kv_scales(self.arch, content)
        settings, after = self.workspace.recipe.awq, {}
        for variant in self.variants:
            if variant.experts != key:
                continue
            if variant is SMOOTHED_NEAREST:
                # The last of the source's: it overwrites the experts.
                content = nearest_smoothed(
                    content, self.weights[variant.weights], self.arch, layer,
                    partial(inner_scales, self.workspace, layer), settings.group_size, self.device, self.team,
                )  # fmt: skip
                take_kv_scales(self.arch, content)
            decoder = DecoderLayer(self.arch, self.configs[variant.weights], layer, content.rest, self.device)
            if variant.fp8_kv and self.kv_scheme and self.arch.has_kv_scales(layer):
                quantize_kv_cache(decoder, self.kv_scheme, scales)
            states = run_layer(
                decoder, content, hidden[variant.name], self.tokens.lengths, settings.group_size,
                variant is NEAREST, self.budget, self.team, partial(choices.__setitem__, variant.name),
            )  # fmt: skip
            if not is_finite(states):
                raise CheckpointError(f"{variant.name}: the output of layer {layer} is NaN or infinite")
            after[variant.name] = states
        return after

    def _run_head(self, hidden: dict[str, torch.Tensor]) -> None:
        """Final norm, head and metrics, and the report."""
        self.workspace.reporter.step(HEAD, "computing", 0, 1)
        begin = time.perf_counter()
        own = self.heads()
        heads = {variant.name: own[variant.weights] for variant in self.variants}
        measured = measure(hidden, heads, SOURCE.name, self.tokens, self.team)
        if not self.team.leads:
            return
        layers = [{key: value for key, value in record.items() if key != "seconds"} for record in self.records()]
        variants = [
            {"variant": variant, **found.metrics(), "kinds": self._kinds(found)} for variant, found in measured.items()
        ]
        found = {"variants": variants, "samples": self._samples(measured), "layers": layers}
        self.finish_head(found, round(time.perf_counter() - begin, 3))

    def _kinds(self, measured: Measured) -> dict[str, dict[str, float | None]]:
        """Metrics of each kind of text that samples name in `kind`."""
        found: dict[str, list[int]] = {}
        for place, sample in enumerate(self.contents):
            if (kind := sample.get("kind")) and int(measured.count[place]):
                found.setdefault(str(kind), []).append(place)
        return {kind: measured.of(places).metrics() for kind, places in found.items()}

    def _samples(self, measured: dict[str, Measured]) -> list[dict[str, Any]]:
        """Means over each sample's predicted tokens."""
        result = []
        for place, content in enumerate(self.contents):
            count = int(measured[SOURCE.name].count[place])
            variants = {variant: found.of([place]).metrics() for variant, found in measured.items()} if count else {}
            name, kind = content.get("id"), content.get("kind")
            entry = {"sample": place + 1, "name": name if isinstance(name, str) else None, "kind": kind}
            result.append(entry | {"tokens": count, "variants": variants})
        return result

    def _hidden_states(self) -> dict[str, torch.Tensor]:
        """bfloat16 [T, H] of each variant on the device: after the last finished layer, or the embeddings."""
        path = self.last_hidden()
        if path is not None:
            loaded = load_file(path, device=str(self.device))
            if lacking := [variant.name for variant in self.variants if variant.name not in loaded]:
                raise JournalError(
                    f"{path} has no hidden states of {', '.join(lacking)}: another version of mmq began this"
                    f" evaluation; run `mmq {name} --restart` to begin it anew"
                )
            return {variant.name: loaded[variant.name] for variant in self.variants}
        embedded = {key: self.embedded(key) for key in self.weights}
        return {variant.name: embedded[variant.weights] for variant in self.variants}

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"rounding": self.rounding}
