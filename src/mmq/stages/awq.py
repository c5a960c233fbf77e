"""Stage 2, awq: the experts of one decoder layer after the other, and the KV cache's scales, in one pass.

For each layer: read it, run attention on the hidden states so far (observing keys and values), search the scales that
protect the experts' salient channels, quantize, write the layer's shard, and run the quantized block to get the next
layer's hidden states. One layer is in memory at a time; shard, statistics and hidden states are on disk before the
journal says so.
"""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file

from mmq.architectures import Architecture
from mmq.awq_modifier import Found, StackedAWQModifier, awq_mappings
from mmq.calibration import Tokens, load_tokens
from mmq.errors import CalibrationError, CheckpointError, JournalError, RecipeError
from mmq.expert_block import ExpertBlock, Smoothed, Weights, default_budget, top_up
from mmq.fp8_source import Fp8Source
from mmq.journal import StageJournal
from mmq.layers import DecoderLayer, transformers_config
from mmq.layout import layers_and_rest, quantized_specs, shard_name
from mmq.quant_config import output_config
from mmq.recipe import FileSamples
from mmq.stages.base import BASE_MEMORY, Plan, Unit
from mmq.storage.atomic import write_json
from mmq.storage.checkpoint import Checkpoint, TensorReader, finish_folder
from mmq.storage.shards import save_tensors, shard_size, write_shard
from mmq.tensors.fp8 import is_finite
from mmq.tensors.int4 import QuantizedStack, quantize_stack
from mmq.tensors.smoothing import smooth_norm
from mmq.workspace import AWQ, BF16, STATE, Workspace

name = "awq"
OUTSIDE = "outside"


def layer_unit(layer: int) -> str:
    return f"layer-{layer:05d}"


def plan(workspace: Workspace) -> Plan:
    """One unit per decoder layer and one for all that lies outside them."""
    source, recipe = workspace.source, workspace.recipe
    _check_shapes(source, recipe.awq.group_size)
    fp8 = recipe.awq.source == "fp8"
    units = []
    for layer in layers_and_rest(workspace):
        names = source.outside_names() if layer is None else source.layer_names(layer)
        read = sum((source.checkpoint.specs if fp8 else source.specs)[tensor].nbytes for tensor in names)
        specs = quantized_specs(workspace, layer)
        units.append(Unit(OUTSIDE if layer is None else layer_unit(layer), read, shard_size(specs)))
    widest = max(sum(source.specs[n].nbytes for n in source.layer_names(i)) for i in range(source.layer_count()))
    hidden_states = _most_tokens(workspace) * int(source.config[source.architecture.hidden_key])
    # bf16 hidden states, residual stream and block input; fp32 reference and output; the packed layer being written.
    working = widest + max(unit.written for unit in units) + 14 * hidden_states
    device = _device(recipe.awq.device)
    # The budget is a bound; small models stay far below it.
    budget = min(recipe.awq.memory_budget or default_budget(device), 4 * (widest + hidden_states))
    folder = source.checkpoint.folder if fp8 else workspace.folder(BF16)
    if device.type == "cpu":
        return Plan(name, folder, workspace.folder(AWQ), units, BASE_MEMORY + working + budget)
    return Plan(name, folder, workspace.folder(AWQ), units, BASE_MEMORY + working, working + budget)


def fingerprint(workspace: Workspace) -> dict[str, Any]:
    awq = workspace.recipe.awq
    return {
        "model.source": workspace.source.checkpoint.fingerprint(),
        "awq.calibration": _tokens(workspace).fingerprint(),
        "awq.n_grid": awq.n_grid,
        "awq.duo_scaling": awq.duo_scaling,
        "awq.group_size": awq.group_size,
        "awq.min_tokens": awq.min_tokens,
        "awq.propagate_quantized": awq.propagate_quantized,
        "awq.kv_cache_scheme": awq.kv_cache_scheme.model_dump() if awq.kv_cache_scheme else None,
    }


def work(workspace: Workspace, plan: Plan, journal: StageJournal) -> None:
    with _Stage(workspace, plan, journal) as stage:
        for layer in range(workspace.source.layer_count()):
            if layer_unit(layer) not in journal.units:
                stage.quantize_layer(layer)
                _release_memory()
        stage.finish_writing()
        if OUTSIDE not in journal.units:
            stage.carry_outside()
    config = output_config(workspace.architecture, workspace.recipe, workspace.source.config, hybrid=False)
    shards = [shard_name(workspace, layer) for layer in layers_and_rest(workspace)]
    finish_folder(workspace.source.checkpoint, plan.folder, config, shards)
    layers = [journal.facts(layer_unit(layer)) for layer in range(workspace.source.layer_count())]
    write_json(workspace.folder(STATE) / name / "layers.json", layers)
    stage.forget_hidden_states()


class _Weights(Protocol):
    """Where a layer's dequantized tensors come from."""

    checkpoint: Checkpoint

    def read(self, reader: TensorReader, name: str, device: torch.device | None = None) -> torch.Tensor: ...


@dataclass
class _Bf16Folder:
    """The dequant stage's output."""

    checkpoint: Checkpoint

    def read(self, reader: TensorReader, name: str, device: torch.device | None = None) -> torch.Tensor:
        return reader[name]


@dataclass
class _Layer:
    """A layer in memory: stacked experts on the device, the rest by local name."""

    gate_up: torch.Tensor
    down: torch.Tensor
    rest: dict[str, torch.Tensor]


@dataclass
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - begin, 3)


class _Stage:
    """One run of the stage: hidden states, the thread that reads ahead, and the thread that writes behind."""

    def __init__(self, workspace: Workspace, plan: Plan, journal: StageJournal) -> None:
        self.workspace, self.plan, self.journal = workspace, plan, journal
        self.recipe = workspace.recipe.awq
        self.arch: Architecture = workspace.architecture
        self.source: Fp8Source = workspace.source
        self.device = _present_device(self.recipe.device)
        self.weights: _Weights = self.source
        if self.recipe.source == "bf16":
            if not workspace.journal.stage("dequant").complete:
                raise JournalError(
                    f"{workspace.folder(BF16)} is not complete; run `mmq dequant` first, or set awq.source: fp8"
                )
            workspace.journal.stage("dequant").check_files()
            self.weights = _Bf16Folder(Checkpoint.open(workspace.folder(BF16)))
        self.config = transformers_config(self.arch, self.source.config)
        self.modifier = StackedAWQModifier(
            mappings=awq_mappings(self.arch), duo_scaling=self.recipe.duo_scaling, n_grid=self.recipe.n_grid
        )
        self.state = workspace.folder(STATE) / name
        self.state.mkdir(parents=True, exist_ok=True)
        self.tokens = _tokens(workspace)
        self.hidden = self._hidden_states()
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="mmq-writer")
        self.pending: Future[None] | None = None
        self.ahead: threading.Thread | None = None

    def __enter__(self) -> _Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=True)

    def quantize_layer(self, layer: int) -> None:
        """All of one layer; its files are written while the next one computes."""
        clock, reporter = _Clock(), self.workspace.reporter
        arch, recipe = self.arch, self.recipe
        reporter.item(f"layer {layer}")
        _reset_peak(self.device)
        with clock.part("reading"):
            content = self._read_layer(layer)
        self._read_ahead(layer + 1)
        decoder = DecoderLayer(arch, self.config, layer, content.rest, self.device)
        observer = None
        if recipe.kv_cache_scheme is not None:
            observer = decoder.observe_kv_cache(recipe.kv_cache_scheme.model_dump())
        with clock.part("attention"):
            residual = decoder.attend(self.hidden, self.tokens.lengths)
            kv_scales = observer.scales() if observer else {}
            x = decoder.block_input(residual)
            logits, weight, index = decoder.route(x)
            _check_finite(x, f"the input of layer {layer}'s experts", self.tokens)
        with clock.part("searching"):
            block = ExpertBlock(
                x, index, weight, content.gate_up, content.down, decoder.activation, recipe.group_size,
                top_up(logits, index, recipe.min_tokens), recipe.memory_budget,
            )  # fmt: skip
            del logits
            reference = block.output(Weights(block))
            _check_finite(reference, f"the output of layer {layer}'s experts", self.tokens)
            norm_found = self.modifier.search_norm(block, reference)
            down_found = self.modifier.search_down(block)
            ones = Smoothed(block, torch.ones_like(norm_found.scales), torch.ones_like(down_found.scales))
            chosen = Smoothed(block, norm_found.scales, down_found.scales)
            before, after = (float(block.loss(w, reference)) for w in (ones, chosen))
            identity = not after < before
            if identity:
                chosen = ones
        with clock.part("quantizing"):
            norm, applied = smooth_norm(content.rest[arch.smooth_norm].to(self.device), chosen.norm)
            tensors = self._quantize(block, applied, chosen.inner, layer)
            # fp32 in the families known so far; another dtype is rounded here, as it will be served.
            router = content.rest[arch.router].to(self.device)
            router = (router.float() * applied).to(router.dtype)
            tensors |= self._rest(content, layer, norm, router, kv_scales)
        with clock.part("propagating"):
            decoder.set_norm(norm)
            decoder.set_router(router)
            self.hidden, quantized_loss = self._propagate(decoder, block, residual, reference)
        facts = {
            "layer": layer,
            "tokens_per_expert": block.counts.tolist(),
            "topped_up": block.extra.counts if block.extra else [0] * block.counts.numel(),
            "loss_round_to_nearest": before,
            "loss_chosen": min(after, before),
            "loss_propagated": quantized_loss,
            "identity_kept": identity,
            "norm": _describe(norm_found),
            "down": _describe(down_found),
            "kv_scales": {key: float(value) for key, value in kv_scales.items()},
            "seconds": clock.seconds,
            "peak_host_bytes": _peak_host(),
            "peak_device_bytes": _peak_device(self.device),
        }
        self.finish_writing()
        self.pending = self.pool.submit(self._write, layer, tensors, self.hidden.cpu(), facts)

    def finish_writing(self) -> None:
        """Wait for the layer whose files are being written."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def carry_outside(self) -> None:
        """Embeddings, final norm, head: as the dequantized checkpoint has them."""
        path = self.plan.folder / shard_name(self.workspace, None)
        with (
            self.weights.checkpoint.reader() as reader,
            write_shard(path, quantized_specs(self.workspace, None)) as shard,
        ):
            for spec in shard.specs:
                shard.add(spec.name, self.weights.read(reader, spec.name))
                self.workspace.reporter.advance(2 * spec.nbytes)
        self.journal.finish_unit(OUTSIDE, {f"{AWQ}/{path.name}": shard.record})
        self.workspace.reporter.unit(OUTSIDE)

    def forget_hidden_states(self) -> None:
        """All layers are done: no hidden states are needed any more."""
        last = self.source.layer_count() - 1
        self.journal.forget_files(layer_unit(last), [self._relative(self._hidden_path(last))])
        self.journal.save()
        self.remove_hidden_states()

    def remove_hidden_states(self, but: Path | None = None) -> None:
        """Remove hidden states that no later layer needs."""
        for path in self.state.glob("hidden-*"):
            if path != but:
                path.unlink()

    def _hidden_states(self) -> torch.Tensor:
        """bf16 [T, H] on the device: the last finished layer's output, or the embeddings."""
        done = sum(layer_unit(layer) in self.journal.units for layer in range(self.source.layer_count()))
        if done == self.source.layer_count():
            return torch.empty(0)
        if done:
            path = self._hidden_path(done - 1)
            self.remove_hidden_states(but=path)
            return load_file(path, device=str(self.device))["hidden_states"]
        self.remove_hidden_states()
        ids = self.tokens.ids
        with self.weights.checkpoint.reader() as reader:
            table = reader[self.arch.embedding]
            if int(ids.max()) >= table.shape[0]:
                raise CalibrationError(f"the tokenizer made token {int(ids.max())}, the model knows {table.shape[0]}")
            return table[ids].to(self.device)

    def _hidden_path(self, layer: int) -> Path:
        return self.state / f"hidden-{layer:05d}.safetensors"

    def _read_layer(self, layer: int) -> _Layer:
        """Map the layer's tensors and stack its experts on the device: gate_up [E, 2I, H] and down [E, H, I]."""
        arch, source = self.arch, self.source
        gate_name, down_name = (f"{arch.expert_weight(layer, 0, linear)}.weight" for linear in (arch.gate, arch.down))
        inner, hidden = source.specs[gate_name].shape
        experts = source.expert_count()
        gate_up = torch.empty(experts, 2 * inner, hidden, dtype=torch.bfloat16, device=self.device)
        down = torch.empty(experts, *source.specs[down_name].shape, dtype=torch.bfloat16, device=self.device)
        rest = {}
        with self.weights.checkpoint.reader() as reader:
            for tensor in source.layer_names(layer):
                local = arch.split(tensor)[1]
                value = self.weights.read(reader, tensor, self.device)
                parts = arch.split_expert(local)
                if parts is None:
                    # A copy: views would keep the shard mapped.
                    rest[local] = value.clone()
                    continue
                expert, linear, _ = parts
                target = {arch.gate: gate_up[:, :inner], arch.up: gate_up[:, inner:], arch.down: down}[linear]
                target[expert].copy_(value)
        self.workspace.reporter.advance(self._unit(layer).read)
        return _Layer(gate_up, down, rest)

    def _unit(self, layer: int) -> Unit:
        return self.plan.units[layer]

    def _read_ahead(self, layer: int) -> None:
        """Bring the next layer's bytes into the system's page cache, which costs this process no memory."""
        if layer >= self.source.layer_count():
            return
        checkpoint = self.weights.checkpoint
        names = [tensor for tensor in self.source.layer_names(layer) if tensor in checkpoint.specs]
        self.ahead = threading.Thread(target=checkpoint.read_ahead, args=(names,), daemon=True)
        self.ahead.start()

    def _quantize(
        self, block: ExpertBlock, norm_scales: torch.Tensor, inner_scales: torch.Tensor, layer: int
    ) -> dict[str, torch.Tensor]:
        """Scale and quantize all experts; the block's weights become the dequantized ones.

        Returns:
            the packed tensors by full name, on the host.
        """
        arch, group = self.arch, self.recipe.group_size
        inner = block.down.shape[2]
        tensors = {}
        for first in range(0, block.gate_up.shape[0], block.step):
            last = min(first + block.step, block.gate_up.shape[0])
            gate_up = block.gate_up[first:last].float().mul_(norm_scales)
            gate_up[:, inner:].div_(inner_scales[first:last].unsqueeze(2))
            down = block.down[first:last].float().mul_(inner_scales[first:last].unsqueeze(1))
            for weight, target, linears in (
                (gate_up, block.gate_up, (arch.gate, arch.up)),
                (down, block.down, (arch.down,)),
            ):
                stack = QuantizedStack(*quantize_stack(weight, group), group)
                target[first:last] = stack.dequantize(0, last - first, target.dtype)
                packed, scale = stack.pack(0, last - first).cpu(), stack.scale.cpu()
                rows = weight.shape[1] // len(linears)
                for expert in range(last - first):
                    for place, linear in enumerate(linears):
                        base = f"{arch.expert_weight(layer, first + expert, linear)}.weight"
                        part = slice(place * rows, (place + 1) * rows)
                        tensors[f"{base}_packed"] = packed[expert, part]
                        tensors[f"{base}_scale"] = scale[expert, part]
                        tensors[f"{base}_shape"] = torch.tensor([rows, weight.shape[2]])
        return tensors

    def _rest(
        self,
        content: _Layer,
        layer: int,
        norm: torch.Tensor,
        router: torch.Tensor,
        kv_scales: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """The layer's other tensors under their full names, the norm and the router smoothed."""
        arch = self.arch
        attention = arch.attention[0].rpartition(".")[0]
        changed = {arch.smooth_norm: norm.cpu(), arch.router: router.cpu()}
        changed |= {f"{attention}.{key}": value for key, value in kv_scales.items()}
        return {arch.layer_prefix(layer) + local: value for local, value in (content.rest | changed).items()}

    def _propagate(
        self, decoder: DecoderLayer, block: ExpertBlock, residual: torch.Tensor, reference: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        """The next layer's hidden states, and the mean squared error of the block as it will be served."""
        x = decoder.block_input(residual)
        _, weight, index = decoder.route(x)
        served = ExpertBlock(
            x,
            index,
            weight,
            block.gate_up,
            block.down,
            block.activation,
            block.group_size,
            budget=block.budget,
        )
        output = served.output(Weights(served))
        loss = float((output - reference).square_().mean(dtype=torch.float64))
        chosen = output if self.recipe.propagate_quantized else reference
        return residual + chosen.to(residual.dtype), loss

    def _write(self, layer: int, tensors: dict[str, torch.Tensor], hidden: torch.Tensor, facts: dict[str, Any]) -> None:
        """Shard, statistics and hidden states, then the journal, then the last layer's hidden states may go."""
        begin = time.perf_counter()
        path = self.plan.folder / shard_name(self.workspace, layer)
        with write_shard(path, quantized_specs(self.workspace, layer)) as shard:
            for spec in shard.specs:
                shard.add(spec.name, tensors[spec.name])
        files = {f"{AWQ}/{path.name}": shard.record}
        hidden_path = self._hidden_path(layer)
        files[self._relative(hidden_path)] = save_tensors(hidden_path, {"hidden_states": hidden})
        facts["seconds"]["writing"] = round(time.perf_counter() - begin, 3)
        if layer:
            self.journal.forget_files(layer_unit(layer - 1), [self._relative(self._hidden_path(layer - 1))])
        self.journal.finish_unit(layer_unit(layer), files, facts)
        self.remove_hidden_states(but=hidden_path)
        reporter = self.workspace.reporter
        reporter.advance(self._unit(layer).written)
        reporter.unit(layer_unit(layer), **_summary(facts))

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.workspace.work_dir).as_posix()


def _tokens(workspace: Workspace) -> Tokens:
    """The run's calibration tokens, made once."""
    if workspace.calibration is None:
        workspace.calibration = load_tokens(workspace.recipe, workspace.source.checkpoint.folder)
    return workspace.calibration


def _device(name: str) -> torch.device:
    """The device a recipe names, there or not. Raises RecipeError when it is none that mmq runs on."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise RecipeError(f"awq.device is {name!r}; it must be auto, cpu, cuda or cuda:N")
    return torch.device(name)


def _present_device(name: str) -> torch.device:
    """Raises RecipeError when this machine lacks the device."""
    device = _device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(f"awq.device is {name!r}; this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def _check_shapes(source: Fp8Source, group_size: int) -> None:
    for linear in source.architecture.expert_linears:
        spec = source.specs[f"{source.architecture.expert_weight(0, 0, linear)}.weight"]
        if spec.shape[1] % group_size:
            raise CheckpointError(
                f"{source.checkpoint.folder}: {spec.name} has {spec.shape[1]} input channels, not a multiple of"
                f" awq.group_size = {group_size}"
            )


def _most_tokens(workspace: Workspace) -> int:
    """Upper bound of the calibration tokens, without reading them."""
    settings = workspace.recipe.awq.calibration
    samples = 0
    for source in settings.files:
        if source.samples is not None:
            samples += source.samples
        elif isinstance(source, FileSamples) and workspace.recipe.path(source.path).is_file():
            with open(workspace.recipe.path(source.path), "rb") as file:
                samples += sum(1 for line in file if line.strip())
    return samples * settings.sequence_length


def _check_finite(tensor: torch.Tensor, what: str, tokens: Tokens) -> None:
    if is_finite(tensor):
        return
    token = int((~torch.isfinite(tensor)).any(dim=1).nonzero()[0])
    sample, end = 0, tokens.lengths[0]
    while token >= end:
        sample += 1
        end += tokens.lengths[sample]
    raise CalibrationError(f"{what} is NaN or infinite for calibration sample {sample + 1}")


def _describe(found: Found) -> dict[str, Any]:
    """A search's result for the statistics; lists where there is one per expert."""
    return {
        "ratio": found.ratio.tolist(),
        "duo_scaling": found.duo.tolist(),
        "error": found.error.tolist(),
        "identity_error": found.identity_error.tolist(),
    }


def _summary(facts: dict[str, Any]) -> dict[str, Any]:
    """What is worth showing of a layer."""
    before, after = facts["loss_round_to_nearest"], facts["loss_chosen"]
    return {
        "loss": f"{after:.3e}",
        "of round-to-nearest": f"{after / before:.1%}" if before else "-",
        "fewest tokens": min(facts["tokens_per_expert"]),
        "topped up": sum(1 for count in facts["topped_up"] if count),
        "seconds": round(sum(facts["seconds"].values()), 1),
    }


def _release_memory() -> None:
    """Free the last layer now: its hooks make reference cycles, and the C library keeps freed blocks for later."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _peak_host() -> int:
    """The process's largest resident size so far, in bytes. Linux's getrusage would tell of the parent's as well."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_device(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
