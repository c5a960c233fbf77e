"""How far the hybrid checkpoint is from its source: perplexity, KL, top-1 agreement and hidden states on held-out text.

All variants of the model go through the decoder layers together, each with hidden states and a routing of its own; one
layer of one checkpoint is in memory at a time. After each layer the hidden states are on disk and the journal says so.

The variant with an fp8 KV cache rounds keys after rotary and values with the calibrated scales.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file

from mmq.errors import CalibrationError, CheckpointError, JournalError
from mmq.families.rotary import check_length
from mmq.machine.device import present_device, release_memory
from mmq.prove.forward import Head, run_layer
from mmq.prove.judged import inner_scales
from mmq.prove.measures import Measured, measure, predictions, relative_error
from mmq.prove.weights import (
    HybridWeights,
    LayerWeights,
    SourceWeights,
    nearest_smoothed,
    read_layer,
    take_kv_scales,
)
from mmq.quantize.decoder_layer import DecoderLayer, embed, transformers_config
from mmq.quantize.kv_cache import quantize_kv_cache
from mmq.recipe import Calibration, FileSamples, Recipe
from mmq.source.calibration import load_tokens
from mmq.source.model import SourceModel
from mmq.source.samples import read_files, read_samples
from mmq.stages.base import begin_run, check_disk, holding, share_journal
from mmq.storage.atomic import FileRecord, make_folder, remove_temporaries, write_json
from mmq.storage.checkpoint import Checkpoint, read_json
from mmq.storage.shards import save_tensors
from mmq.tensors.fp8 import is_finite
from mmq.workdir.journal import StageJournal
from mmq.workdir.layer_files import LayerFiles
from mmq.workdir.output_shards import layer_unit
from mmq.workdir.versions import versions
from mmq.workdir.workspace import HYBRID, Workspace

name = "eval"
REPORT_NAME = "eval.json"
DEFAULT_DATA = "builtin:eval"
HEAD = "head"
# The fingerprint's field that says of which result the evaluation is.
RESULT_FIELD = "hybrid (restore's output)"


@dataclass(frozen=True)
class EvalSettings:
    """What to evaluate on.

    Attributes:
        data: JSONL as for calibration, from the recipe's root if relative.
        samples: lines from the top; all by default.
        sequence_length: tokens kept of each sample; by default as many as calibration keeps.
    """

    data: str = DEFAULT_DATA
    samples: int | None = None
    sequence_length: int | None = None


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


def evaluate_checkpoint(workspace: Workspace, settings: EvalSettings, restart: bool = False) -> dict[str, Any]:
    """Run or resume the evaluation under the work_dir's lock.

    Returns:
        the content of eval.json.

    Raises:
        JournalError: restore has not ended, or an evaluation was begun with other inputs.
        CalibrationError: the data can't be used.
    """
    with holding(workspace):
        return _Evaluation(workspace, settings).run(restart)


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


def units_of(source: SourceModel) -> list[str]:
    """What the journal names: every layer, then the head."""
    return [*map(layer_unit, range(source.layer_count())), HEAD]


class _Evaluation:
    """One run of the evaluation."""

    def __init__(self, workspace: Workspace, settings: EvalSettings) -> None:
        self.workspace, self.settings, self.team = workspace, settings, workspace.team
        self.report_path = workspace.work_dir / REPORT_NAME
        self.files = LayerFiles.of(workspace, name)
        self.journal: StageJournal = workspace.journal.stage(name)
        self.arch, self.source = workspace.architecture, workspace.source
        self.layers = range(self.source.layer_count())
        hybrid = _finished_hybrid(workspace)
        self.weights: dict[str, LayerWeights] = {
            "source": SourceWeights(self.source),
            "hybrid": HybridWeights(hybrid, self.arch),
        }
        self.configs = {
            key: transformers_config(self.arch, weights.checkpoint.config) for key, weights in self.weights.items()
        }
        length = settings.sequence_length or workspace.recipe.awq.calibration.sequence_length
        check_length(length, "the sequence length", self.source.config, self.arch)
        self.kv_scheme: dict[str, Any] | None = (hybrid.config.get("quantization_config") or {}).get("kv_cache_scheme")
        self.rounding = str(workspace.journal.stage("awq").fingerprint.get("awq.rounding", "nearest"))
        self.variants = [
            SOURCE,
            HYBRID_MODEL,
            *([HYBRID_FP8_KV] if self.kv_scheme else []),
            NEAREST,
            *([SMOOTHED_NEAREST] if self.rounding != "nearest" else []),
        ]
        self.device = present_device(workspace.recipe.awq.device)
        self.recipe = eval_recipe(workspace.recipe, settings)
        self.tokens = load_tokens(self.recipe, self.source.checkpoint.folder)
        self.contents = [content for *_, content in read_samples(self.recipe, read_files(self.recipe))]
        if max(self.tokens.lengths) < 2:
            raise CalibrationError(f"no sample of {settings.data} has two tokens: there is nothing to predict")

    def run(self, restart: bool) -> dict[str, Any]:
        if self.team.leads:
            self._begin(restart)
        share_journal(self.workspace)
        self.journal = self.workspace.journal.stage(name)
        if not self.journal.complete:
            if HEAD not in self.journal.units:
                self._compute()
            if self.team.leads:
                self.files.remove_hidden()
                self.journal.finish()
                self.workspace.reporter.finish(name)
        self.team.together()
        return read_json(self.report_path)

    def _begin(self, restart: bool) -> None:
        """Begin anew or resume; the leading rank's."""
        if restart:
            self._check(self.layers)
            self._forget()
        self.journal.begin(self._fingerprint())
        if self.journal.complete:
            self.workspace.reporter.note(f"{name} is complete: {self.report_path}")
            return
        self._check(self._pending())
        make_folder(self.files.folder)
        remove_temporaries(self.files.folder)
        begin_run(self.workspace, self.journal)

    def _pending(self) -> list[int]:
        """Layers that the journal lacks."""
        return [layer for layer in self.layers if layer_unit(layer) not in self.journal.units]

    def _check(self, pending: Sequence[int]) -> None:
        """Raises DiskSpaceError where hidden states would fill the disk, JournalError where awq's scales are gone."""
        if SMOOTHED_NEAREST in self.variants:
            for layer in filter(self.arch.has_experts, pending):
                inner_scales(self.workspace, layer)
        if pending:
            width = int(self.source.config[self.arch.hidden_key])
            states = 2 * len(self.variants) * self.tokens.ids.numel() * width
            # The last layer's go only after the next one's are in place.
            check_disk(self.files.folder, 2 * states)

    def _compute(self) -> None:
        """All layers that the journal lacks, then the head and the report."""
        reporter, pending = self.workspace.reporter, self._pending()
        weights = dict.fromkeys(units_of(self.source), 1)
        reporter.start(name, weights, self.journal.units, sum(map(self._bytes_of, pending)))
        if len(pending) < len(self.layers):
            reporter.note(f"{name} resumes: {len(self.layers) - len(pending)} of {len(self.layers)} layers are done")
        hidden = self._hidden_states()
        for layer in pending:
            hidden = self._run_layer(layer, hidden)
        self._finish_head(hidden)

    def _run_layer(self, layer: int, hidden: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All variants through one layer; their states [T, H] after it are on disk when this returns."""
        begin = time.perf_counter()
        after: dict[str, torch.Tensor] = {}
        for place, key in enumerate(self.weights):
            self.workspace.reporter.step(layer_unit(layer), f"computing {key}", place, len(self.weights))
            after |= self._run_variants(key, layer, hidden)
            release_memory()
        after = {variant.name: after[variant.name] for variant in self.variants}
        truth = after[SOURCE.name]
        errors = {variant.name: relative_error(after[variant.name], truth) for variant in self.variants}
        seconds = round(time.perf_counter() - begin, 3)
        record = {"layer": layer, "relative_error": errors, "seconds": seconds}
        if self.team.leads:
            self._save(layer, after, record)
        shown = {variant: f"{error:.2%}" for variant, error in errors.items() if variant != SOURCE.name}
        self.workspace.reporter.unit(layer_unit(layer), **shown, seconds=seconds)
        return after

    def _run_variants(self, key: str, layer: int, hidden: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The variants that are made from one checkpoint's experts; its layer is freed when this returns."""
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
                variant is NEAREST, settings.memory_budget, self.team,
            )  # fmt: skip
            if not is_finite(states):
                raise CheckpointError(f"{variant.name}: the output of layer {layer} is NaN or infinite")
            after[variant.name] = states
        return after

    def _save(self, layer: int, hidden: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        """Hidden states and errors, then the journal, then the last layer's hidden states may go."""
        hidden_path, record_path = self.files.hidden(layer), self.files.record(layer)
        files = {
            self.files.in_journal(hidden_path): save_tensors(hidden_path, {key: t.cpu() for key, t in hidden.items()}),
            self.files.in_journal(record_path): write_json(record_path, record),
        }
        self._finish_unit(layer_unit(layer), files, layer - 1)
        self.files.remove_hidden(but=hidden_path)

    def _finish_head(self, hidden: dict[str, torch.Tensor]) -> None:
        """Final norm, head and metrics, and the report."""
        self.workspace.reporter.step(HEAD, "computing", 0, 1)
        begin = time.perf_counter()
        heads = self._heads()
        measured = measure(hidden, heads, SOURCE.name, self.tokens, self.team)
        if not self.team.leads:
            return
        records = [read_json(self.files.record(layer)) for layer in self.layers]
        head_seconds = round(time.perf_counter() - begin, 3)
        report = {
            "settings": self._settings(),
            "tokens": {
                "samples": len(self.tokens.lengths),
                "read": self.tokens.ids.numel(),
                "predicted": predictions(self.tokens)[0].numel(),
                "fingerprint": self.tokens.fingerprint(),
            },
            "variants": [
                {"variant": variant, **found.metrics(), "kinds": self._kinds(found)}
                for variant, found in measured.items()
            ],
            "samples": self._samples(measured),
            "layers": [{key: record[key] for key in ("layer", "relative_error")} for record in records],
            "versions": versions(),
            "seconds": {
                "layers": [record["seconds"] for record in records],
                HEAD: head_seconds,
                "total": round(sum(record["seconds"] for record in records) + head_seconds, 3),
            },
        }
        files = {self.files.in_journal(self.report_path): write_json(self.report_path, report)}
        self._finish_unit(HEAD, files, self.layers[-1])
        self.workspace.reporter.unit(HEAD, seconds=head_seconds)

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

    def _heads(self) -> dict[str, Head]:
        """Each variant's head; one copy where the checkpoints agree, as they should."""
        arch, found = self.arch, {}
        truth: tuple[torch.Tensor, torch.Tensor, Head] | None = None
        for key, weights in self.weights.items():
            with weights.checkpoint.reader() as reader:
                head = arch.head if arch.head in reader.names else arch.embedding  # where they are tied
                norm, weight = reader[arch.final_norm].to(self.device), reader[head].to(self.device)
                if truth is not None and torch.equal(norm, truth[0]) and torch.equal(weight, truth[1]):
                    found[key] = truth[2]
                    continue
                found[key] = Head(arch, self.configs[key], norm.clone(), weight.clone())
                truth = truth or (norm.clone(), weight.clone(), found[key])
        return {variant.name: found[variant.weights] for variant in self.variants}

    def _hidden_states(self) -> dict[str, torch.Tensor]:
        """bfloat16 [T, H] of each variant on the device: after the last finished layer, or the embeddings."""
        done = [layer for layer in self.layers if layer_unit(layer) in self.journal.units]
        path = self.files.hidden(done[-1]) if done else None
        if self.team.leads:
            self.files.remove_hidden(but=path)
        if path is not None:
            loaded = load_file(path, device=str(self.device))
            if lacking := [variant.name for variant in self.variants if variant.name not in loaded]:
                raise JournalError(
                    f"{path} has no hidden states of {', '.join(lacking)}: another version of mmq began this"
                    f" evaluation; run `mmq {name} --restart` to begin it anew"
                )
            return {variant.name: loaded[variant.name] for variant in self.variants}
        embedded = {}
        for key, weights in self.weights.items():
            with weights.checkpoint.reader() as reader:
                embedded[key] = embed(reader[self.arch.embedding], self.tokens.ids).to(self.device)
        return {variant.name: embedded[variant.weights] for variant in self.variants}

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "model.source": self.source.checkpoint.fingerprint(),
            RESULT_FIELD: self.workspace.journal.stage("restore").digest(HYBRID),
            "data (its tokens)": self.tokens.fingerprint(),
            "awq.group_size": self.workspace.recipe.awq.group_size,
        }

    def _settings(self) -> dict[str, Any]:
        calibration = self.recipe.awq.calibration
        return {
            "source": str(self.source.checkpoint.folder),
            "source_fingerprint": self.source.checkpoint.fingerprint(),
            "hybrid": str(self.workspace.folder(HYBRID)),
            "data": [samples.model_dump() for samples in calibration.files],
            "sequence_length": calibration.sequence_length,
            "group_size": self.workspace.recipe.awq.group_size,
            "rounding": self.rounding,
            "device": str(self.device),
        }

    def _bytes_of(self, layer: int) -> int:
        """Bytes of a layer in both checkpoints."""
        found = 0
        for weights in self.weights.values():
            specs = weights.checkpoint.specs
            found += sum(spec.nbytes for tensor, spec in specs.items() if self.arch.split(tensor)[0] == layer)
        return found

    def _forget(self) -> None:
        """Begin anew."""
        self.journal.reset()
        self.report_path.unlink(missing_ok=True)
        if self.files.folder.exists():
            shutil.rmtree(self.files.folder)

    def _finish_unit(self, unit: str, files: dict[str, FileRecord], before: int) -> None:
        """Journal a unit; the hidden states of the layer before it are needed no more."""
        if before >= 0:
            self.journal.forget_files(layer_unit(before), [self.files.in_journal(self.files.hidden(before))])
        self.journal.finish_unit(unit, files)


def eval_recipe(recipe: Recipe, settings: EvalSettings) -> Recipe:
    """The recipe with the held-out samples in calibration's place, so that both are tokenized alike."""
    calibration = Calibration(
        files=[FileSamples(path=settings.data, samples=settings.samples)],
        sequence_length=settings.sequence_length or recipe.awq.calibration.sequence_length,
    )
    return recipe.model_copy(update={"awq": recipe.awq.model_copy(update={"calibration": calibration})})


def _finished_hybrid(workspace: Workspace) -> Checkpoint:
    """The hybrid folder. Raises JournalError where it is not complete, or was made from another source."""
    restore, folder = workspace.journal.stage("restore"), workspace.folder(HYBRID)
    if not restore.complete:
        raise JournalError(f"{folder} is not complete; run `mmq restore` first")
    restore.check_files(HYBRID)
    source = workspace.source.checkpoint
    if restore.fingerprint.get("model.source") != source.fingerprint():
        raise JournalError(f"{folder} was made from another source than {source.folder}")
    return Checkpoint.open(folder)
