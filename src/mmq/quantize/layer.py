"""Quantizing one decoder layer in memory: attention, search, rounding, and the hidden states for the next layer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from mmq.errors import CalibrationError, CheckpointError
from mmq.families.table import Architecture
from mmq.machine.team import ALONE, Team
from mmq.quantize.decoder_layer import DecoderLayer, transformers_config
from mmq.quantize.kv_cache import KvObserver
from mmq.quantize.race import Runner, parts, surely_worse
from mmq.quantize.rounding import Fisher, Rounded, Smoothing, judge
from mmq.quantize.routed_experts import ExpertBlock, Smoothed, Weights, default_budget, top_up
from mmq.quantize.search import Found, StackedAWQModifier, awq_mappings, unscaled, unsmoothed
from mmq.recipe import Awq
from mmq.storage.shards import DTYPES
from mmq.tensors.fp8 import is_finite, round_block
from mmq.tensors.int4 import fits, quantize_in_place
from mmq.tensors.smoothing import smooth_norm


@dataclass
class LayerContent:
    """A dequantized layer.

    Attributes:
        gate_up: bfloat16 [E, 2I, H] on the device, gate rows above up rows; of several ranks, of this one's experts.
        down: bfloat16 [E, H, I] on the device.
        rest: all other tensors by their names in the layer.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    rest: dict[str, torch.Tensor]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.gate_up, self.down, *self.rest.values()]

    @classmethod
    def stacked(
        cls, arch: Architecture, experts: range, tensors: Iterable[tuple[str, torch.Tensor]], device: torch.device
    ) -> LayerContent:
        """Stack some experts of a layer's dequantized tensors, given one after another by their names in the layer."""
        gate_up = down = torch.empty(0)
        rest = {}
        for local, value in tensors:
            parts = arch.split_expert(local)
            if parts is None:
                # A copy: views would keep the shard mapped.
                rest[local] = value.clone()
                continue
            expert, linear, _ = parts
            # gate and up are [I, H], down is [H, I].
            inner, hidden = value.shape if linear != arch.down else value.shape[::-1]
            if not gate_up.numel():
                gate_up = torch.empty(len(experts), 2 * inner, hidden, dtype=torch.bfloat16, device=device)
                down = torch.empty(len(experts), hidden, inner, dtype=torch.bfloat16, device=device)
            target = {arch.gate: gate_up[:, :inner], arch.up: gate_up[:, inner:], arch.down: down}[linear]
            target[expert - experts.start].copy_(value)
        return cls(gate_up, down, rest)


@dataclass(frozen=True)
class LayerResult:
    """A quantized layer.

    Attributes:
        tensors: what the layer's shard holds, by names in the layer, where they were computed; of the experts, those of
            this rank.
        hidden: bfloat16 [T, H] on the device, the next layer's input.
        statistics: JSON of what was found and how long it took.
        evidence: what verify needs to find a loss of the statistics again; see `rounding.Verdict`.
    """

    tensors: dict[str, torch.Tensor]
    hidden: torch.Tensor
    statistics: dict[str, Any]
    evidence: dict[str, torch.Tensor] = field(default_factory=dict)


class NotFiniteError(CalibrationError):
    """NaN or infinity appeared in a layer. `samples` are the calibration samples it appeared for, counted from 1."""

    def __init__(self, what: str, samples: list[int]) -> None:
        super().__init__(f"{what} NaN or infinite for {_named(samples)}")
        self.samples = samples


# Parts of a layer's time before one was measured, in order.
PARTS = {
    "nearest": {"attention": 0.05, "searching": 0.8, "quantizing": 0.05, "propagating": 0.1},
    "compensated": {"attention": 0.05, "searching": 0.4, "rounding": 0.4, "quantizing": 0.05, "propagating": 0.1},
}
NOT_THROUGH_A_CLAMP = "up is clamped before down reads it, and scales do not pass through"
# How much of the search is done after the norm's, and after down's.
SEARCHED = 0.7, 0.9


class LayerQuantizer:
    """Quantizes the layers of one model, each given the hidden states that the one before it left.

    Args:
        config: the source's config.json.
        lengths: tokens of each calibration sample; the hidden states are their concatenation.
        ids: int64 [T], their tokens.
        excluded: samples that finished layers left out, counted from 1; the hidden states are without them.
        team: the ranks that share the experts and the tokens.
        smooth_norm: the norm before the experts may be smoothed: all that reads it can be scaled.
        fp8_attention: attention will be served in block fp8, and is calibrated with so; its tensors stay as they are.
        say: told the layer, the part of it that is being done, the share of the layer that is done, and where in the
            part.

    Attributes:
        samples: tokens of each sample that is still in the run, by its number counted from 1.
        budget: bytes of working memory; see `ExpertBlock.working_memory`.
    """

    def __init__(
        self,
        arch: Architecture,
        config: dict[str, Any],
        settings: Awq,
        lengths: list[int],
        ids: torch.Tensor,
        device: torch.device,
        say: Callable[[int, str, float, str], None] = lambda *_: None,
        excluded: Iterable[int] = (),
        team: Team = ALONE,
        smooth_norm: bool = True,
        fp8_attention: bool = False,
    ) -> None:
        self.arch, self.settings, self.device, self.say, self.team = arch, settings, device, say, team
        self.smooth_norm, self.fp8_attention = smooth_norm, fp8_attention
        self._shares: Mapping[str, float] = PARTS[settings.rounding]
        left_out = set(excluded)
        self._ids = dict(enumerate(ids.cpu().split(lengths), 1))
        self.samples = {number: length for number, length in enumerate(lengths, 1) if number not in left_out}
        self.budget = settings.memory_budget or default_budget(device)
        self.config = transformers_config(arch, config)
        self.modifier = StackedAWQModifier(
            mappings=awq_mappings(arch),
            duo_scaling=settings.duo_scaling,
            n_grid=settings.n_grid,
            powers_of_two=arch.powers_of_two,
        )

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample that is still in the run."""
        return list(self.samples.values())

    @property
    def distinct(self) -> int:
        """How many different tokens the samples have that are still in the run."""
        return torch.cat([self._ids[number] for number in self.samples]).unique().numel()

    @torch.no_grad()
    def quantize(
        self, layer: int, content: LayerContent, hidden: torch.Tensor, fisher: Fisher | None = None
    ) -> LayerResult:
        """Quantize a layer. `content`'s experts are overwritten.

        Args:
            fisher: of all samples, also those that were left out; of compensated rounding.

        With `nonfinite: exclude` a sample for which NaN or infinity appears leaves `samples`, and the layer is begun
        anew without it: the result is that of a run whose hidden states never held it from this layer on.

        Raises:
            CalibrationError: NaN or infinity appeared and must not, or no sample is left; it names layer and samples.
        """
        fatal = self.settings.calibration.nonfinite == "error"
        excluded: list[int] = []
        while True:
            try:
                result = self._quantize(layer, content, hidden, fisher and self._present(fisher))
                break
            except NotFiniteError as error:
                if fatal:
                    raise CalibrationError(
                        f"{error}; awq.calibration.nonfinite: exclude leaves such samples out"
                    ) from None
                hidden = self._leave_out(error, hidden)
                excluded += error.samples
        if fatal:
            # Otherwise the next layer finds it, and leaves the sample out.
            self._check_finite(result.hidden, f"the output of layer {layer}'s quantized experts is")
        result.statistics["excluded_samples"] = sorted(excluded)
        return result

    def _present(self, fisher: Fisher) -> Fisher:
        """With the tokens of samples that are still in the run."""
        parts = fisher.norms.split([len(ids) for ids in self._ids.values()])
        return replace(fisher, norms=torch.cat([parts[number - 1] for number in self.samples]))

    def _decoder(self, layer: int, rest: dict[str, torch.Tensor]) -> DecoderLayer:
        """A layer without its experts, attention as it will be served."""
        if self.fp8_attention:
            rounded = {weight.name for weight in self.arch.attention_of(layer) if weight.is_matrix}
            rest = {name: round_block(tensor) if name in rounded else tensor for name, tensor in rest.items()}
        return DecoderLayer(self.arch, self.config, layer, rest, self.device)

    def _attend(
        self, decoder: DecoderLayer, layer: int, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """All of a layer that comes before its experts: the residual stream [T, H], and the KV scales that it takes."""
        scheme = self.settings.kv_cache_scheme if self.arch.has_kv_scales(layer) else None
        observer = KvObserver(decoder, scheme.model_dump()) if scheme else None
        residual = decoder.attend(hidden, self.lengths, self.team)
        if observer and (broken := observer.broken(self.lengths, self.team)):
            raise NotFiniteError(f"keys or values of layer {layer} are", self._numbers(broken))
        return residual, observer.scales(self.team) if observer else {}

    def _pass(self, layer: int, content: LayerContent, hidden: torch.Tensor) -> LayerResult:
        """A layer without experts: nothing is quantized but the KV cache."""
        clock = _Clock(self.device, {"attention": 1.0}, partial(self.say, layer))
        with clock.part("attention"):
            decoder = self._decoder(layer, content.rest)
            hidden, kv_scales = self._attend(decoder, layer, hidden)
            self._check_finite(hidden, f"the output of layer {layer} is")
        tensors = content.rest | {f"{self.arch.attention_module}.{name}": s for name, s in kv_scales.items()}
        statistics = {"layer": layer, **self._kv_statistics(layer, kv_scales), "seconds": clock.seconds}
        return LayerResult(tensors, hidden, statistics)

    def _kv_statistics(self, layer: int, scales: dict[str, torch.Tensor]) -> dict[str, Any]:
        found: dict[str, Any] = {"kv_scales": {name: float(scale) for name, scale in scales.items()}}
        reason = self.arch.without_kv_scales(layer) if self.settings.kv_cache_scheme else None
        return found | ({"no_kv_scales": reason} if reason else {})

    def _quantize(self, layer: int, content: LayerContent, hidden: torch.Tensor, fisher: Fisher | None) -> LayerResult:
        arch, settings = self.arch, self.settings
        if not arch.has_experts(layer):
            return self._pass(layer, content, hidden)
        clock = _Clock(self.device, self._shares, partial(self.say, layer))
        with clock.part("attention"):
            decoder = self._decoder(layer, content.rest)
            attended, kv_scales = self._attend(decoder, layer, hidden)
            x = decoder.block_input(attended)
            residual = decoder.add_shared(attended, x)
            self._check_finite(x, f"the input of layer {layer}'s experts is")
            logits, weight, index = decoder.route(x)
        with clock.part("searching"):
            extra = top_up(logits, index, settings.min_tokens)
            rows_per_expert = index.numel() / logits.shape[1]
            del logits
            full = settings.search == "full"
            block = ExpertBlock(
                x, index, weight, content.gate_up, content.down, decoder.activation, settings.group_size, extra,
                self.budget, (1.0,) if full else parts(rows_per_expert), self.team,
            )  # fmt: skip
            reference = block.outputs(Weights(block))
            # The sum is bf16 as well, and what the next layer gets.
            sums = (
                residual[share.mine] + part.to(residual.dtype)
                for share, part in zip(block.shares, reference, strict=True)
            )
            finite = block.in_order([torch.isfinite(tokens).all(dim=1) for tokens in sums])
            self._check_tokens(finite, f"the output of layer {layer}'s experts is")
            found = self._search(clock, block, reference)
            own_norm = content.rest[arch.smooth_norm].to(self.device)
            norm, applied = smooth_norm(own_norm, found[0].scales, arch.norm_offset)
            inner = found[1].scales[block.own.start : block.own.stop]
            rounded, evidence = None, {}
            if settings.rounding == "nearest":
                clock.step(SEARCHED[1], "comparing with round-to-nearest")
                better, statistics = self._better(block, reference, found[0].scales, inner)
                if not better:
                    norm, applied, inner = own_norm, torch.ones_like(applied), torch.ones_like(inner)
        if settings.rounding == "compensated":
            with clock.part("rounding"):
                verdict = judge(
                    block, reference, self.lengths, self.distinct, Smoothing(applied, inner), clock.step, fisher
                )
                applied, inner, rounded = verdict.smoothing.norm, verdict.smoothing.inner, verdict.rounded
                norm, statistics = norm if verdict.smoothed else own_norm, verdict.statistics
                evidence = verdict.evidence
                if rounded:
                    statistics["evidence"]["codes"] = rounded.digests()
        statistics |= {"norm": _describe(found[0]), "down": _describe(found[1])}
        if not self.smooth_norm:
            statistics["norm"]["not_smoothed"] = "the shared expert reads it and keeps its fp8 bytes"
        if not arch.smooths_down:
            statistics["down"]["not_smoothed"] = NOT_THROUGH_A_CLAMP
        with clock.part("quantizing"):
            if rounded is None:
                tensors = self._quantize_experts(layer, block, applied, inner)
            else:
                tensors = self._store(layer, block, rounded)
            # As the server holds it: in bf16 by powers of two, which it takes without a rounding.
            readers = {name: content.rest[name].to(self.device) for name in arch.norm_readers(experts=0)}
            served = {name: weight.dtype for name, weight in readers.items()}
            served[arch.router] = DTYPES[arch.router_served]
            readers = {name: (weight.float() * applied).to(served[name]) for name, weight in readers.items()}
            tensors |= content.rest | {arch.smooth_norm: norm} | readers
            tensors |= {f"{arch.attention_module}.{name}": scale for name, scale in kv_scales.items()}
        with clock.part("propagating"):
            decoder.set_norm(norm)
            decoder.set_router(readers[arch.router])
            output = self._served(decoder, block, attended)
            squares = sum(map(block.squared_distance, block.shares, output, reference))
            statistics["loss_propagated"] = _number(squares / residual.numel())
            hidden = _added(residual, block, output if settings.propagate_quantized else reference)
        statistics = {
            "layer": layer,
            "tokens_per_expert": block.counts.tolist(),
            "topped_up": extra.counts if extra else [0] * block.counts.numel(),
            **statistics,
            **self._kv_statistics(layer, kv_scales),
            "seconds": clock.seconds,
        }
        self._shares = dict(clock.seconds)
        return LayerResult(tensors, hidden, statistics, evidence)

    def _search(self, clock: _Clock, block: ExpertBlock, reference: list[torch.Tensor]) -> tuple[Found, Found]:
        """The norm's and the inner scales that are best for rounding to nearest."""
        full = self.settings.search == "full"
        to_norm, to_down = SEARCHED
        if self.smooth_norm:
            norm = self.modifier.search_norm(block, reference, full, lambda share, at: clock.step(to_norm * share, at))
        else:
            norm = unsmoothed(block.x)
        if not self.arch.smooths_down:
            return norm, unscaled(block)
        down = self.modifier.search_down(block, lambda share, at: clock.step(to_norm + (to_down - to_norm) * share, at))
        return norm, down

    def _better(
        self, block: ExpertBlock, reference: list[torch.Tensor], norm: torch.Tensor, inner: torch.Tensor
    ) -> tuple[bool, dict[str, Any]]:
        """Whether the block as a whole, rounded to nearest, is better for the scales that were found."""
        plain = Smoothed(block, torch.ones_like(norm), torch.ones_like(inner))
        found = Smoothed(block, norm, inner)
        before, after = Runner(), Runner()
        for share, part in zip(block.shares, reference, strict=True):
            before.losses.append(block.losses(share, plain, part))
            after.losses.append(block.losses(share, found, part))
            if any(surely_worse(*pair, block.x.shape[0]) for pair in ((before, after), (after, before))):
                break
        better = after.loss < before.loss
        hidden = block.x.shape[1]
        statistics = {
            "rounding": "nearest",
            "loss_tokens": before.seen,
            "loss_round_to_nearest": _number(before.loss / hidden),
            "loss_chosen": _number((after if better else before).loss / hidden),
            "identity_kept": not better,
        }
        return better, statistics

    def _quantize_experts(
        self, layer: int, block: ExpertBlock, norm_scales: torch.Tensor, inner_scales: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Scale and quantize all experts; the block's weights become the dequantized ones.

        Args:
            norm_scales: float32 [H], onto gate's and up's columns.
            inner_scales: float32 [E, I], off up's rows and onto down's columns, of this rank's experts.

        Returns:
            the packed tensors by their names in the layer.

        Raises:
            CheckpointError: a weight is so large that an int4 value of its group would be infinite.
        """
        steps = range(0, block.gate_up.shape[0], block.step)
        parts = block.each(partial(self._quantize_step, layer, block, norm_scales, inner_scales), steps)
        return {name: tensor for part in parts for name, tensor in part.items()}

    def _quantize_step(
        self, layer: int, block: ExpertBlock, norm_scales: torch.Tensor, inner_scales: torch.Tensor, first: int
    ) -> dict[str, torch.Tensor]:
        """`_quantize_experts` for `block.step` experts."""
        arch, part = self.arch, slice(first, first + block.step)
        inner = inner_scales[part]
        # Gate's rows stay as they are.
        divisors = torch.cat([torch.ones_like(inner), inner], dim=1).unsqueeze(2)
        tensors: dict[str, torch.Tensor] = {}
        for weight, factors, divisor, linears in (
            (block.gate_up[part], norm_scales, divisors, (arch.gate, arch.up)),
            (block.down[part], inner.unsqueeze(1), None, (arch.down,)),
        ):
            packed, scale = quantize_in_place(weight, factors, divisor, self.settings.group_size)
            tensors |= self._by_name(layer, block.own.start + first, packed, scale, linears)
        return tensors

    def _store(self, layer: int, block: ExpertBlock, rounded: Rounded) -> dict[str, torch.Tensor]:
        """`_quantize_experts` for experts that are rounded already."""
        arch, experts = self.arch, block.gate_up.shape[0]
        for first in range(0, experts, block.step):
            last = min(first + block.step, experts)
            block.gate_up[first:last] = rounded.stored(0, first, last)
            block.down[first:last] = rounded.stored(1, first, last)
        tensors: dict[str, torch.Tensor] = {}
        for packed, scale, linears in zip(
            rounded.packed, rounded.scale, ((arch.gate, arch.up), (arch.down,)), strict=True
        ):
            tensors |= self._by_name(layer, block.own.start, packed, scale, linears)
        return tensors

    def _by_name(
        self, layer: int, first: int, packed: torch.Tensor, scale: torch.Tensor, linears: tuple[str, ...]
    ) -> dict[str, torch.Tensor]:
        """Packed experts [n, out, ...] from `first` on, whose rows are those of one or two linear layers, by names in
        the layer."""
        tensors: dict[str, torch.Tensor] = {}
        rows, columns, whole = packed.shape[1] // len(linears), packed.shape[2] * 8, fits(scale)
        for number in range(packed.shape[0]):
            for place, linear in enumerate(linears):
                base = f"{self.arch.expert.format(expert=first + number)}{linear}.weight"
                own = slice(place * rows, (place + 1) * rows)
                if not whole and not fits(scale[number, own]):
                    raise CheckpointError(
                        f"{self.arch.layer_prefix(layer)}{base} holds values too large for int4 with a bf16 scale"
                    )
                tensors[f"{base}_packed"] = packed[number, own]
                tensors[f"{base}_scale"] = scale[number, own]
                tensors[f"{base}_shape"] = torch.tensor([rows, columns])
        return tensors

    def _served(self, decoder: DecoderLayer, block: ExpertBlock, residual: torch.Tensor) -> list[torch.Tensor]:
        """The quantized block's outputs as they will be served, through the smoothed norm and router: float32 [t, H] of
        each share."""
        x = decoder.block_input(residual)
        _, weight, index = decoder.route(x)
        served = ExpertBlock(
            x, index, weight, block.gate_up, block.down, block.activation, block.group_size, None, block.budget,
            block.parts, self.team,
        )  # fmt: skip
        return served.outputs(Weights(served))

    def _check_finite(self, tensor: torch.Tensor, what: str) -> None:
        """Raises NotFiniteError where [T, H] holds NaN or infinity."""
        if not is_finite(tensor):
            self._check_tokens(torch.isfinite(tensor).all(dim=1), what)

    def _check_tokens(self, finite: torch.Tensor, what: str) -> None:
        """Raises NotFiniteError where one of bool [T] is not so."""
        if not bool(finite.all()):
            parts = finite.cpu().split(self.lengths)
            raise NotFiniteError(what, self._numbers([place for place, own in enumerate(parts) if not own.all()]))

    def _numbers(self, places: list[int]) -> list[int]:
        """Numbers of the samples at these places among those still in the run."""
        numbers = list(self.samples)
        return [numbers[place] for place in places]

    def _leave_out(self, error: NotFiniteError, hidden: torch.Tensor) -> torch.Tensor:
        """Drop the error's samples from `samples`; the hidden states [T, H] without them."""
        parts = zip(self.samples, hidden.split(self.lengths), strict=True)
        kept = [part for number, part in parts if number not in error.samples]
        if not kept:
            raise CalibrationError(f"{error}; no calibration sample is left")
        self.samples = {number: length for number, length in self.samples.items() if number not in error.samples}
        return torch.cat(kept)


def _added(residual: torch.Tensor, block: ExpertBlock, outputs: list[torch.Tensor]) -> torch.Tensor:
    """The residual stream [T, H] with the block's outputs of each share, rounded to its dtype."""
    return residual + block.in_order([part.to(residual.dtype) for part in outputs])


class _Clock:
    """Seconds of each part, the device's work included; and how far the layer is.

    Args:
        shares: of the parts in the layer's time, in order, as they are expected.
        say: told the part, the share of the layer that is done, and where in the part.
    """

    def __init__(
        self, device: torch.device, shares: Mapping[str, float], say: Callable[[str, float, str], None]
    ) -> None:
        self._device, self._say = device, say
        total = sum(shares.values()) or 1.0
        self._shares = {name: share / total for name, share in shares.items()}
        self._part, self._before = "", 0.0
        self.seconds: dict[str, float] = {}

    def step(self, share: float, at: str = "") -> None:
        """So much of the present part is done. May be called from threads that compute."""
        self._say(self._part, self._before + self._shares[self._part] * share, at)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        names = list(self._shares)
        self._part, self._before = name, sum(self._shares[part] for part in names[: names.index(name)])
        self.step(0)
        begin = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] = round(time.perf_counter() - begin, 3)


def _named(samples: list[int], most: int = 8) -> str:
    """Samples in words: the first few of them."""
    listed = ", ".join(map(str, samples[:most])) + (f" and {len(samples) - most} more" if len(samples) > most else "")
    return f"calibration sample{'s' if len(samples) > 1 else ''} {listed}"


def _describe(found: Found) -> dict[str, Any]:
    """A search's result for the statistics; lists where there is one per expert."""
    return {
        "ratio": found.ratio.tolist(),
        "duo_scaling": found.duo.tolist(),
        "error": _numbers(found.error),
        "identity_error": _numbers(found.identity_error),
    } | ({"points": [asdict(point) | {"loss": _number(point.loss)} for point in found.points]} if found.points else {})


def _numbers(errors: torch.Tensor) -> Any:
    """A tensor of one dimension as a list, of none as a number."""
    values = errors.tolist()
    return [_number(value) for value in values] if isinstance(values, list) else _number(values)


def _number(value: float) -> float | None:
    """For JSON, which knows neither NaN nor infinity: a loss too large for fp32."""
    return value if math.isfinite(value) else None
