"""How far the hybrid checkpoint is from its source: perplexity, KL, top-1 agreement and hidden states on held-out text.

All variants of the model go through the decoder layers together, each with hidden states and a routing of its own; one
layer of one checkpoint is in memory at a time. After each layer the hidden states are on disk and the journal says so.

Weights are dequantized and activations are bf16, as a weight-only kernel computes; the variant with an fp8 KV cache
rounds keys after rotary and values with the calibrated scales.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file

from mmq.errors import CalibrationError, CheckpointError, JournalError
from mmq.families.table import Architecture
from mmq.machine.device import present_device, release_memory
from mmq.quantize.decoder_layer import DecoderLayer, embed, transformers_config
from mmq.quantize.kv_cache import quantize_kv_cache
from mmq.quantize.layer import LayerContent
from mmq.quantize.routed_experts import ExpertBlock, Smoothed, Weights
from mmq.recipe import Calibration, FileSamples, Recipe
from mmq.run.journal import StageJournal
from mmq.run.layer_files import LayerFiles
from mmq.run.lock import lock
from mmq.run.output_shards import layer_unit, scale_name
from mmq.run.versions import versions
from mmq.run.workspace import HYBRID, Workspace
from mmq.source.block_fp8 import Fp8Source
from mmq.source.calibration import load_tokens
from mmq.source.tokens import Tokens
from mmq.stages.base import begin_run, check_disk
from mmq.storage.atomic import FileRecord, make_folder, remove_temporaries, write_json
from mmq.storage.checkpoint import Checkpoint, TensorReader, read_json
from mmq.storage.shards import save_tensors
from mmq.tensors.fp8 import dequantize_block, is_finite
from mmq.tensors.int4 import QuantizedStack

name = "eval"
REPORT_NAME = "eval.json"
DEFAULT_DATA = "calibration_data/eval.jsonl"
HEAD = "head"
# The fingerprint's field that says of which result the evaluation is.
RESULT_FIELD = "hybrid (restore's output)"
# Logits computed at one time; a few tensors of this many float32 are alive together.
HEAD_ELEMENTS = 2**25
# exp of more would not fit into a float.
LARGEST_LOSS = 700.0


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
        round_to_nearest: experts are rounded to int4 without smoothing.
        fp8_kv: keys and values are rounded to e4m3.
    """

    name: str
    weights: str
    round_to_nearest: bool = False
    fp8_kv: bool = False


# The first one is the truth.
SOURCE = Variant("source", "source")
HYBRID_MODEL = Variant("hybrid", "hybrid")
HYBRID_FP8_KV = Variant("hybrid, fp8 KV cache", "hybrid", fp8_kv=True)
NEAREST = Variant("round-to-nearest", "source", round_to_nearest=True)


def evaluate_checkpoint(workspace: Workspace, settings: EvalSettings, restart: bool = False) -> dict[str, Any]:
    """Run or resume the evaluation under the work_dir's lock.

    Returns:
        the content of eval.json.

    Raises:
        JournalError: restore has not ended, or an evaluation was begun with other inputs.
        CalibrationError: the data can't be used.
    """
    with lock(workspace.work_dir):
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
        }
        for entry in report["variants"]
    ]


def units_of(source: Fp8Source) -> list[str]:
    """What the journal names: every layer, then the head."""
    return [*map(layer_unit, range(source.layer_count())), HEAD]


class LayerWeights(Protocol):
    """A checkpoint whose layers come dequantized."""

    @property
    def checkpoint(self) -> Checkpoint: ...

    def names(self, layer: int) -> tuple[list[str], list[str]]:
        """Weights of the layer's experts under their dequantized names, and all its other tensors."""

    def read(self, reader: TensorReader, tensor: str, device: torch.device) -> torch.Tensor:
        """A dequantized tensor."""


@dataclass(frozen=True)
class SourceWeights:
    """The fp8 source."""

    source: Fp8Source

    @property
    def checkpoint(self) -> Checkpoint:
        return self.source.checkpoint

    def names(self, layer: int) -> tuple[list[str], list[str]]:
        arch, names = self.source.architecture, self.source.layer_names(layer)
        experts = [tensor for tensor in names if arch.split_expert(arch.split(tensor)[1])]
        return experts, [tensor for tensor in names if tensor not in set(experts)]

    def read(self, reader: TensorReader, tensor: str, device: torch.device) -> torch.Tensor:
        return self.source.read(reader, tensor, device)


@dataclass(frozen=True)
class HybridWeights:
    """The hybrid checkpoint, dequantized from its own bytes."""

    checkpoint: Checkpoint
    architecture: Architecture

    @cached_property
    def _by_layer(self) -> dict[int | None, list[str]]:
        result: dict[int | None, list[str]] = {}
        for tensor in self.checkpoint.specs:
            result.setdefault(self.architecture.split(tensor)[0], []).append(tensor)
        return result

    def names(self, layer: int) -> tuple[list[str], list[str]]:
        arch, names = self.architecture, self._by_layer.get(layer, [])
        inside = {tensor: arch.split_expert(arch.split(tensor)[1]) for tensor in names}
        experts = [t.removesuffix("_packed") for t, parts in inside.items() if parts and parts[2] == "weight_packed"]
        known = self.checkpoint.specs
        scales = {scale_name(t) for t in names if t.endswith(".weight") and scale_name(t) in known}
        return experts, [t for t, parts in inside.items() if parts is None and t not in scales]

    def read(self, reader: TensorReader, tensor: str, device: torch.device) -> torch.Tensor:
        packed = f"{tensor}_packed"
        if packed in reader.names:
            scale = reader[f"{tensor}_scale"].to(device)
            rows, columns = reader[f"{tensor}_shape"].tolist()
            values = unpack_from_int32(reader[packed].to(device), 4, torch.Size([rows, columns]))
            group = columns // scale.shape[1]
            return QuantizedStack(values.unsqueeze(0), scale.unsqueeze(0), group).dequantize(torch.bfloat16)[0]
        weight = reader[tensor].to(device)
        if weight.dtype == torch.float8_e4m3fn:
            return dequantize_block(weight, reader[scale_name(tensor)].to(device))
        return weight


def read_layer(weights: LayerWeights, arch: Architecture, layer: int, device: torch.device) -> LayerContent:
    """A dequantized layer with its experts stacked on the device: gate_up [E, 2I, H] and down [E, H, I] in bfloat16.

    Raises:
        CheckpointError: an expert is missing.
    """
    expert_names, other_names = weights.names(layer)
    count = int(weights.checkpoint.config[arch.experts_key])
    if len(set(expert_names)) != count * len(arch.expert_linears):
        raise CheckpointError(f"{weights.checkpoint.folder}: layer {layer} has not all of its {count} experts")
    with weights.checkpoint.reader() as reader:
        names = [*expert_names, *other_names]
        tensors = ((arch.split(tensor)[1], weights.read(reader, tensor, device)) for tensor in names)
        return LayerContent.stacked(arch, count, tensors, device)


@torch.no_grad()
def run_layer(
    decoder: DecoderLayer,
    content: LayerContent,
    hidden: torch.Tensor,
    lengths: list[int],
    group_size: int,
    round_to_nearest: bool = False,
    budget: int | None = None,
) -> torch.Tensor:
    """One decoder layer on bfloat16 [T, H] of concatenated sequences: bfloat16 [T, H]."""
    residual = decoder.attend(hidden, lengths)
    x = decoder.block_input(residual)
    _, weight, index = decoder.route(x)
    block = ExpertBlock(
        x, index, weight, content.gate_up, content.down, decoder.activation, group_size, budget=budget
    )  # fmt: skip
    weights = Weights(block)
    if round_to_nearest:
        experts, width, inner = content.down.shape
        weights = Smoothed(block, x.new_ones(width).float(), x.new_ones(experts, inner).float())
    return residual + block.output(weights).to(residual.dtype)


def relative_error(hidden: torch.Tensor, truth: torch.Tensor) -> float:
    """||hidden - truth|| / ||truth|| of [T, H]."""
    difference = torch.linalg.vector_norm(hidden.float() - truth.float(), dtype=torch.float64)
    return float(difference / torch.linalg.vector_norm(truth.float(), dtype=torch.float64))


class Head:
    """Final norm and head: hidden states to logits in fp32.

    Args:
        norm: the final norm's weight [H].
        head: [V, H].
    """

    def __init__(self, arch: Architecture, config: Any, norm: torch.Tensor, head: torch.Tensor) -> None:
        with torch.device("meta"):
            layer = arch.transformers_class(arch.layer_class)(config, 0)
        # The final norm is of the kind that the layers have.
        self.norm = layer.get_submodule(arch.module_name(arch.smooth_norm).removesuffix(".weight"))
        self.norm.weight = torch.nn.Parameter(norm, requires_grad=False)
        self.weight = head if head.device.type == "cuda" else head.float()

    @torch.no_grad()
    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """bfloat16 [n, H] -> float32 [n, V]; the logits are not rounded to bf16 on the way."""
        x = self.norm(hidden)
        if x.device.type == "cuda" and x.dtype == self.weight.dtype == torch.bfloat16:
            logits = torch.mm(x, self.weight.T, out_dtype=torch.float32)
        else:
            logits = x.float() @ self.weight.T.float()
        return logits.log_softmax(-1)


@dataclass
class Sums:
    """Sums over predicted tokens, in float64."""

    loss: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    def add(self, found: torch.Tensor, truth: torch.Tensor, following: torch.Tensor) -> None:
        """Add a chunk: log-probabilities float32 [n, V] of the variant and of the source, next tokens int64 [n]."""
        self.loss -= float(found.gather(1, following.unsqueeze(1)).sum(dtype=torch.float64))
        self.kl += float((truth.exp() * (truth - found)).sum(dtype=torch.float64))
        self.agreed += int((found.argmax(-1) == truth.argmax(-1)).sum())

    def metrics(self, count: int) -> dict[str, float]:
        loss = self.loss / count
        return {
            "negative_log_likelihood": loss,
            "perplexity": math.exp(min(loss, LARGEST_LOSS)),
            "kl": self.kl / count,
            "top1_agreement": self.agreed / count,
        }


def predictions(tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions that have a next token in their sample, and that token: int64 [P] each."""
    last = torch.tensor(tokens.lengths).cumsum(0) - 1
    keep = torch.ones_like(tokens.ids, dtype=torch.bool)
    keep[last] = False
    positions = keep.nonzero().flatten()
    return positions, tokens.ids[positions + 1]


def measure(
    hidden: dict[str, torch.Tensor], heads: dict[str, Head], truth: str, tokens: Tokens
) -> dict[str, dict[str, float]]:
    """Metrics of each variant over all predicted tokens.

    Args:
        hidden: bfloat16 [T, H] after the last layer, by variant.
        heads: of each variant.
        truth: the variant that the others are compared with.
    """
    positions, following = predictions(tokens)
    device = hidden[truth].device
    positions, following = positions.to(device), following.to(device)
    sums = {variant: Sums() for variant in hidden}
    step = max(1, HEAD_ELEMENTS // heads[truth].weight.shape[0])
    for where, wanted in zip(positions.split(step), following.split(step), strict=True):
        expected = heads[truth].log_probabilities(hidden[truth][where])
        for variant, states in hidden.items():
            found = expected if variant == truth else heads[variant].log_probabilities(states[where])
            sums[variant].add(found, expected, wanted)
    return {variant: sums[variant].metrics(positions.numel()) for variant in hidden}


class _Evaluation:
    """One run of the evaluation."""

    def __init__(self, workspace: Workspace, settings: EvalSettings) -> None:
        self.workspace, self.settings = workspace, settings
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
        self.kv_scheme: dict[str, Any] | None = (hybrid.config.get("quantization_config") or {}).get("kv_cache_scheme")
        self.variants = [SOURCE, HYBRID_MODEL, *([HYBRID_FP8_KV] if self.kv_scheme else []), NEAREST]
        self.device = present_device(workspace.recipe.awq.device)
        self.recipe = eval_recipe(workspace.recipe, settings)
        self.tokens = load_tokens(self.recipe, self.source.checkpoint.folder)
        if max(self.tokens.lengths) < 2:
            raise CalibrationError(f"no sample of {settings.data} has two tokens: there is nothing to predict")

    def run(self, restart: bool) -> dict[str, Any]:
        if restart:
            self._forget()
        self.journal.begin(self._fingerprint())
        if self.journal.complete:
            self.workspace.reporter.note(f"{name} is complete: {self.report_path}")
            return read_json(self.report_path)
        make_folder(self.files.folder)
        remove_temporaries(self.files.folder)
        begin_run(self.workspace, self.journal)
        if HEAD not in self.journal.units:
            self._compute()
        report = read_json(self.report_path)
        self.files.remove_hidden()
        self.journal.finish()
        self.workspace.reporter.finish(name)
        return report

    def _compute(self) -> None:
        """All layers that the journal lacks, then the head and the report."""
        reporter, width = self.workspace.reporter, int(self.source.config[self.arch.hidden_key])
        pending = [layer for layer in self.layers if layer_unit(layer) not in self.journal.units]
        states = 2 * len(self.variants) * self.tokens.ids.numel() * width
        # The last layer's go only after the next one's are in place.
        check_disk(self.files.folder, 2 * states)
        reporter.start(name, len(pending) + 1, sum(map(self._bytes_of, pending)))
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
        for key in self.weights:
            self.workspace.reporter.item(f"layer {layer} of {key}")
            after |= self._run_variants(key, layer, hidden)
            release_memory()
        after = {variant.name: after[variant.name] for variant in self.variants}
        truth = after[SOURCE.name]
        errors = {variant.name: relative_error(after[variant.name], truth) for variant in self.variants}
        seconds = round(time.perf_counter() - begin, 3)
        record = {"layer": layer, "relative_error": errors, "seconds": seconds}
        self._save(layer, after, record)
        self.workspace.reporter.advance(self._bytes_of(layer))
        shown = {variant: f"{error:.2%}" for variant, error in errors.items() if variant != SOURCE.name}
        self.workspace.reporter.unit(layer_unit(layer), **shown, seconds=seconds)
        return after

    def _run_variants(self, key: str, layer: int, hidden: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The variants that have one checkpoint's weights; its layer is freed when this returns."""
        content = read_layer(self.weights[key], self.arch, layer, self.device)
        scales = _take_kv_scales(self.arch, content)
        settings, after = self.workspace.recipe.awq, {}
        for variant in self.variants:
            if variant.weights != key:
                continue
            decoder = DecoderLayer(self.arch, self.configs[key], layer, content.rest, self.device)
            if variant.fp8_kv and self.kv_scheme:
                quantize_kv_cache(decoder, self.kv_scheme, scales)
            states = run_layer(
                decoder, content, hidden[variant.name], self.tokens.lengths, settings.group_size,
                variant.round_to_nearest, settings.memory_budget,
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
        self.workspace.reporter.item(HEAD)
        begin = time.perf_counter()
        heads = self._heads()
        metrics = measure(hidden, heads, SOURCE.name, self.tokens)
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
            "variants": [{"variant": variant} | metrics[variant] for variant in metrics],
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

    def _heads(self) -> dict[str, Head]:
        """Each variant's head; one copy where the checkpoints agree, as they should."""
        arch, found = self.arch, {}
        truth: tuple[torch.Tensor, torch.Tensor, Head] | None = None
        for key, weights in self.weights.items():
            with weights.checkpoint.reader() as reader:
                norm, weight = reader[arch.final_norm].to(self.device), reader[arch.head].to(self.device)
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
        self.files.remove_hidden(but=path)
        if path is not None:
            loaded = load_file(path, device=str(self.device))
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
            "hybrid": str(self.workspace.folder(HYBRID)),
            "data": [samples.model_dump() for samples in calibration.files],
            "sequence_length": calibration.sequence_length,
            "group_size": self.workspace.recipe.awq.group_size,
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


def _take_kv_scales(arch: Architecture, content: LayerContent) -> dict[str, torch.Tensor]:
    """Take `k_scale` and `v_scale`, float32 [1] each, out of a layer's tensors; the source's layers have none."""
    attention = arch.attention[0].rpartition(".")[0]
    found = {scale: content.rest.pop(f"{attention}.{scale}", None) for scale in ("k_scale", "v_scale")}
    return {scale: value for scale, value in found.items() if value is not None}
