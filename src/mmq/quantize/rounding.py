"""Error-compensated rounding of one layer's experts, and the samples held back to judge it by.

Second moments are of each expert's own routed rows, a few experts at a time, and drawn towards what all tokens and the
expert's weights let expect by how few rows there are; where there are many, tokens at which errors cost more count
more. Down comes after gate and up, and reads what these make of the inputs once they are rounded. The loss on rows that
were fitted falls whatever happens elsewhere, so every eighth sample takes no part in the moments: on those, smoothing
and none, compensated and nearest are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import xxhash

from mmq.machine.device import tensor_cores
from mmq.machine.threads import each
from mmq.quantize.routed_experts import ExpertBlock, Smoothed, Weights
from mmq.tensors.experts import Rows, gated_rows, gated_slopes, row_squares, second_moments
from mmq.tensors.int4 import QuantizedStack
from mmq.tensors.rounding import (
    Factor,
    corrected,
    descend,
    expected,
    factorize,
    round_rows,
    round_twice,
    searched_scale,
    shrink,
    through_down,
)

# With so many rows for each column, in an expert on average, tokens count by what errors cost there. Rows that count
# unlike are worth fewer, and of few rows that takes more than it brings (docs/quality.md).
ENOUGH = 8
# As many rows for each column count what is expected of a moment before its own rows are seen; the least share of the
# mean diagonal that is added to it, and that share where the text has as many different tokens as there are columns.
# docs/quality.md has what other values give.
SHRINKAGE, DAMPING, NARROW = 1.0, 0.1, 0.25
# What is expected follows from a layer's weights, and from all tokens' moment or from mean squares: these count as so
# many rows of weights for each column.
POOLED, SQUARES = 3.0, 1.0
HELD_BACK = 8  # one sample in as many
PROBED = 4  # one expert in as many is rounded under each smoothing
CPU_STEPS = 8  # steps that the experts are rounded in on a CPU, if there are as many
GPU_RUNS = 2  # of probed experts on a GPU, which would rather have many at a time
EVIDENCE = 256  # at most as many tokens are kept for verify to compute the block's loss from the files by
ROUNDED = 0.9  # the share of the time that rounding takes, before judging


def damping(columns: int, distinct: int) -> float:
    """The share of the mean diagonal that is added to moments of so many columns.

    Rows of the same few tokens say nothing of others, however many there are: moments of narrow text are drawn towards
    the identity by how few different tokens it has. On samples held back of the same text that can't be seen.
    """
    return max(DAMPING, NARROW * columns / max(1, distinct))


def held_back(lengths: list[int]) -> torch.Tensor:
    """Which tokens judge: every eighth sample's, or of a single sample the last eighth; bool [T].

    None do when there is one token in all.
    """
    if len(lengths) == 1:
        return torch.arange(lengths[0]) >= lengths[0] - max(lengths[0] // HELD_BACK, min(1, lengths[0] - 1))
    last = min(len(lengths), HELD_BACK) - 1
    marks = torch.tensor([place % HELD_BACK == last for place in range(len(lengths))])
    return marks.repeat_interleave(torch.tensor(lengths))


@dataclass(frozen=True)
class Smoothing:
    """Scales to round under: float32 [H] of gate's and up's inputs, float32 [E, I] of down's."""

    norm: torch.Tensor
    inner: torch.Tensor


class Rounded(Weights):
    """Experts as they will be stored, where they are computed; asked for as weights, with the smoothing undone.

    Attributes:
        done: bool [E], which are rounded; the others' weights are still the source's.
        packed: int32 [E, out, in/8] of gate and up, and of down.
        scale: bfloat16 [E, out, in/group] of each.
    """

    def __init__(self, block: ExpertBlock, smoothing: Smoothing) -> None:
        super().__init__(block)
        self.smoothing, self.done = smoothing, torch.zeros(block.gate_up.shape[0], dtype=torch.bool)
        stacks = (block.gate_up, block.down)
        self.packed = [w.new_empty(*w.shape[:2], w.shape[2] // 8, dtype=torch.int32) for w in stacks]
        self.scale = [w.new_empty(*w.shape[:2], w.shape[2] // block.group_size, dtype=torch.bfloat16) for w in stacks]

    def put(self, which: int, first: int, stack: QuantizedStack) -> None:
        """Keep gate and up (0) or down (1) of the experts from `first` on."""
        part = slice(first, first + stack.values.shape[0])
        self.packed[which][part] = stack.pack()
        self.scale[which][part] = stack.scale

    def stored(self, which: int, first: int, last: int) -> torch.Tensor:
        """float32 [n, out, in], what a reader of the checkpoint gets."""
        packed, scale = (tensors[which][first:last] for tensors in (self.packed, self.scale))
        return QuantizedStack.unpack(packed, scale, self.block.group_size).dequantize(torch.float32)

    def gate_up(self, first: int, last: int) -> torch.Tensor:
        """float32 [n, 2I, H], gate and up with the smoothing undone."""
        inner = self.smoothing.inner[first:last]
        weight = self.stored(0, first, last).div_(self.smoothing.norm)
        weight[:, inner.shape[1] :].mul_(inner.unsqueeze(2))
        return weight

    def digests(self) -> list[str]:
        """xxh3-128 of all experts' codes and scales, one after the other: of gate and up, then of down."""
        found: list[str] = []
        for expert in range(self.packed[0].shape[0]):
            digest = xxhash.xxh3_128()
            for tensor in (part[expert] for pair in zip(self.packed, self.scale, strict=True) for part in pair):
                digest.update(tensor.view(torch.uint8).cpu().numpy().data)
            found.append(digest.hexdigest())
        return [digest for own in self.block.team.everyone(found) for digest in own]

    def take(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        source, done = super().take(first, last), self.done[first:last]
        if not bool(done.any()):
            return source
        inner = self.smoothing.inner[first:last].unsqueeze(1)
        gate_up, down = self.gate_up(first, last), self.stored(1, first, last).div_(inner)
        rounded = gate_up.to(source[0].dtype), down.to(source[1].dtype)
        if bool(done.all()):
            return rounded
        mask = done.to(gate_up.device).view(-1, 1, 1)
        return torch.where(mask, rounded[0], source[0]), torch.where(mask, rounded[1], source[1])


def probed(block: ExpertBlock) -> torch.Tensor:
    """One expert in `PROBED`, in runs that are rounded together, the same ones on any number of ranks: bool [E]."""
    runs = CPU_STEPS if block.x.device.type == "cpu" else GPU_RUNS
    run = max(1, block.experts // (PROBED * runs))
    return torch.arange(block.own.start, block.own.stop) // run % PROBED == 0


def rows_per_column(block: ExpertBlock, fitted: torch.Tensor) -> float:
    """Of gate and up, in an expert on average, if int64 [F] are the tokens whose rows are fitted."""
    return len(fitted) * block.index.shape[1] / (block.experts * block.x.shape[1])


@dataclass(frozen=True)
class Fisher:
    """What the loss's gradients g by a layer's output say.

    Attributes:
        matrix: float32 [H, H], E[g g^T].
        norms: float32 [T], |g| at each calibration token; NaN where no gradient was taken.
    """

    matrix: torch.Tensor
    norms: torch.Tensor


@dataclass(frozen=True)
class Metric:
    """What errors of a block's outputs cost: those of a token together, and of which tokens.

    Attributes:
        matrix: float32 [H, H], its mean diagonal about 1.
        factor: of it.
        weights: float32 [T], of each token, one in the mean; None where all count alike.
    """

    matrix: torch.Tensor
    factor: Factor
    weights: torch.Tensor | None = None

    @classmethod
    def of(cls, fisher: Fisher, distinct: int, rows: float) -> Metric:
        """Args:
        distinct: how many different tokens the calibration has.
        rows: see `rows_per_column`.
        """
        matrix = fisher.matrix.clone()
        # Becomes what is factorized.
        factor = factorize(matrix.unsqueeze(0), damping(matrix.shape[0], distinct))
        if rows < ENOUGH:
            return cls(matrix, factor)
        # By the norm and not its square: one text's next token is one draw of many. Without a gradient as in the mean.
        weights = fisher.norms / fisher.norms.nanmean()
        return cls(matrix, factor, torch.where(torch.isfinite(weights), weights, 1.0))


@dataclass
class Compensation:
    """Fits compensated rounding on a block's tokens.

    Args:
        fitted: int64 [F], the tokens whose rows the moments are of.
        distinct: how many different tokens the calibration has.
        metric: by which rows of down make up for each other, and through down those of gate and up; without, all
            outputs count alike.

    Attributes:
        rows: of the fitted tokens.
        pooled: float32 [H, H], the mean second moment of all fitted tokens.
        step: experts at a time.
        workers: threads that take a step each; on a GPU the calling thread alone.
    """

    block: ExpertBlock
    fitted: torch.Tensor
    distinct: int
    metric: Metric | None = None
    rows: Rows = field(init=False)
    pooled: torch.Tensor = field(init=False)
    step: int = field(init=False)
    workers: int = field(init=False)

    def __post_init__(self) -> None:
        block, fitted = self.block, self.fitted
        experts, hidden, inner = block.gate_up.shape[0], block.gate_up.shape[2], block.down.shape[2]
        rows = Rows.of(block.index[fitted], block.experts).of_experts(block.own.start, block.own.stop)
        self.rows = Rows(fitted[rows.token], rows.ends, rows.place)
        self.pooled = torch.zeros(hidden, hidden, dtype=torch.float32, device=block.x.device)
        for tokens in fitted.split(self._slice):
            ends = torch.tensor([len(tokens)], dtype=torch.int32, device=block.x.device)
            x = self._weighed(block.x.index_select(0, tokens), tokens)
            second_moments(x, ends, self.pooled.unsqueeze(0))
        self.pooled /= max(1, len(fitted))
        room, needed = block.working_memory // 2, self.least(hidden, inner)
        # On a CPU small steps, so that there are some for every thread; their size depends on no number of threads.
        cpu = block.x.device.type == "cpu"
        most = -(-experts // CPU_STEPS) if cpu else experts
        self.step = max(1, min(most, room // needed))
        fit = room // (self.step * needed)
        self.workers = max(1, min(torch.get_num_threads(), -(-experts // self.step), fit)) if cpu else 1

    @staticmethod
    def least(hidden: int, inner: int) -> int:
        """Bytes for one expert. For gate and up: the inputs' moments, their smoothed copy and the factor in the making,
        the same of the slopes, and the weights' fp32 copies. For down: moments of both inputs, what is expected of
        them, their smoothed copy and the factor in the making, and the weights' fp32 copies."""
        return max(20 * hidden**2 + 80 * inner**2 + 48 * inner * hidden, 56 * inner**2 + 36 * inner * hidden)

    @property
    def _slice(self) -> int:
        """Rows at a time: their inputs, gate and up, product, its slopes, and the fp32 copies that a CPU multiplies."""
        hidden, inner = self.block.gate_up.shape[2], self.block.down.shape[2]
        return max(1, self.block.working_memory // 8 // (6 * hidden + 24 * inner))

    def fit(
        self, results: list[Rounded], which: torch.Tensor, say: Callable[[float, str], None] = lambda *_: None
    ) -> None:
        """Round experts that are not yet done, under the smoothing of each result.

        Args:
            results: the same experts are done in all of them.
            which: bool [E], which to have done.
            say: told the share of the experts that are done, and which come next; also from threads that compute.
        """
        wanted = which & ~results[0].done
        count, begun, steps = len(wanted), int(results[0].done.sum()), []
        for first, last in _runs(wanted):
            for start in range(first, last, self.step):
                stop = min(start + self.step, last)
                steps.append((start, stop, begun))
                begun += stop - start

        def fit(step: tuple[int, int, int]) -> None:
            first, last, before = step
            at = f"of expert {before + 1} of {count}"
            say(before / count, f"rounding gate and up {at}")
            self._fit_gate_up(results, first, last)
            say((before + (last - first) / 2) / count, f"rounding down {at}")
            self._fit_down(results, first, last)

        device = self.block.x.device
        if device.type != "cpu":
            # An error that is passed on to three digits is made up for as well as to seven (docs/quality.md).
            with tensor_cores(device):
                for step in steps:
                    fit(step)
        else:
            # A worker has one of torch's threads: MKL's Cholesky gives other last bits on two.
            threads = torch.get_num_threads()
            try:
                torch.set_num_threads(1)
                each(fit, steps, self.workers)
            finally:
                torch.set_num_threads(threads)
        for result in results:
            result.done |= wanted

    def _fit_gate_up(self, results: list[Rounded], first: int, last: int) -> None:
        inputs, counts = self._inputs(first, last)
        source = self.block.gate_up[first:last]
        shrink(inputs, counts, expected(_grams(source), source.shape[1], self.pooled, POOLED), SHRINKAGE)
        costs = self._costs(first, last)
        for result in results:
            norm, own = result.smoothing.norm, result.smoothing.inner[first:last]
            moments = inputs / torch.outer(norm, norm)
            # Up's rows are divided by what down's columns are multiplied by, gate's stay as they are.
            rows = torch.cat([torch.ones_like(own), own], 1)
            weight = source.float().mul_(norm).div_(rows.unsqueeze(2))
            outputs = self._factor(costs * rows.unsqueeze(2) * rows.unsqueeze(1))
            result.put(0, first, self._round(weight, moments, self._factor(moments), outputs))
            del weight, moments, outputs

    def _fit_down(self, results: list[Rounded], first: int, last: int) -> None:
        source = self.block.down[first:last]
        grams = _grams(source)
        for result in results:
            own = result.smoothing.inner[first:last]
            moments, crossed, counts, squares = self._middles(result.gate_up(first, last), first, last)
            for sums in (moments, crossed):
                sums.div_(own.unsqueeze(2)).div_(own.unsqueeze(1))
            # Products of two have heavy tails: squares of few rows say little of a channel.
            squares.div_(own.square())
            squares.add_(squares.mean(1, keepdim=True)).div_(2)
            shrink(moments, counts, expected(grams.clone(), source.shape[1], squares, SQUARES), SHRINKAGE)
            # Before any row is seen, nothing is expected of what gate and up leave.
            shrink(crossed, counts, crossed.new_zeros(1), SHRINKAGE)
            factor = self._factor(moments)
            weight = corrected(source.float().mul_(own.unsqueeze(1)), crossed, factor)
            result.put(1, first, self._round(weight, moments, factor, self.metric.factor if self.metric else None))
            del weight, moments, crossed, factor

    def _factor(self, moments: torch.Tensor) -> Factor:
        """Of float32 [n, in, in], which become what is factorized."""
        return factorize(moments, damping(moments.shape[1], self.distinct))

    def _round(
        self, weight: torch.Tensor, moments: torch.Tensor, factor: Factor, outputs: Factor | None
    ) -> QuantizedStack:
        size, whole = self.block.group_size, weight.shape[1] * weight.shape[2]
        scale = searched_scale(weight, factor.diagonal, size)

        def by_columns(weight: torch.Tensor, scale: torch.Tensor) -> QuantizedStack:
            return descend(weight, moments, factor, round_twice(weight, factor, scale, size, whole), whole)

        return round_rows(weight, outputs, scale, size, by_columns) if outputs else by_columns(weight, scale)

    def _weighed(self, rows: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """Rows [r, n] of so many tokens, to count what these do; overwritten."""
        weights = self.metric.weights if self.metric else None
        return rows if weights is None else rows.mul_(weights[token].sqrt_().unsqueeze(1))

    def _inputs(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """X^T X of the inputs X of gate and up of experts first..last, float32 [n, H, H], and numbers of rows, float32
        [n]."""
        hidden = self.block.gate_up.shape[2]
        moments = self.pooled.new_zeros(last - first, hidden, hidden)
        for piece in self.rows.pieces(first, last, self._slice):
            token = self.rows.token[piece.start : piece.stop]
            second_moments(self._weighed(self.block.x.index_select(0, token), token), piece.ends, moments)
        return moments, self._counts(self.rows, first, last)

    def _costs(self, first: int, last: int) -> torch.Tensor:
        """What errors of gate's and up's outputs cost together, of experts first..last: float32 [n, 2I, 2I]."""
        block, count = self.block, last - first
        slopes = self.pooled.new_zeros(count, block.gate_up.shape[1], block.gate_up.shape[1])
        for piece in self.rows.pieces(first, last, self._slice):
            token = self.rows.token[piece.start : piece.stop]
            own = gated_slopes(block.x, token, block.gate_up[first:last], piece.ends, block.activation)
            second_moments(self._weighed(own, token), piece.ends, slopes)
        counts = self._counts(self.rows, first, last)
        squares = slopes.diagonal(dim1=1, dim2=2) / counts.clamp(min=1).unsqueeze(1)
        shrink(slopes, counts, torch.diag_embed(squares), SHRINKAGE)
        return through_down(slopes, block.down[first:last].float(), self.metric.matrix if self.metric else None)

    def _middles(
        self, rounded: torch.Tensor, first: int, last: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the inputs of down of experts first..last, X by the source's gate and up, Y by rounded ones.

        Args:
            rounded: float32 [n, 2I, H], gate and up.

        Returns:
            sums of Y Y^T and of (X - Y) Y^T, float32 [n, I, I]; numbers of rows, float32 [n]; mean squares of Y over
            these rows and those that top up, float32 [n, I].
        """
        block, inner = self.block, self.block.down.shape[2]
        rounded = rounded.to(block.gate_up.dtype)
        sums = self.pooled.new_zeros(last - first, 2 * inner, 2 * inner)
        for piece in self.rows.pieces(first, last, self._slice):
            token = self.rows.token[piece.start : piece.stop]
            both = [
                gated_rows(block.x, token, weight, piece.ends, block.activation)
                for weight in (block.gate_up[first:last], rounded)
            ]
            second_moments(self._weighed(torch.cat(both, 1), token), piece.ends, sums)
        moments = sums[:, inner:, inner:].contiguous()
        crossed = sums[:, :inner, inner:] - moments
        counts = total = self._counts(self.rows, first, last)
        squares = moments.diagonal(dim1=1, dim2=2).clone()
        if block.extra is not None:
            total = total + self._counts(block.extra, first, last)
            for piece in block.extra.pieces(first, last, self._slice):
                token = block.extra.token[piece.start : piece.stop]
                middle = gated_rows(block.x, token, rounded, piece.ends, block.activation)
                middle = self._weighed(middle, token).float().square_()
                owner = torch.bucketize(torch.arange(len(middle), device=middle.device), piece.ends, right=True)
                # Of each expert a plain sum, in one order on every device.
                chosen = torch.nn.functional.one_hot(owner, last - first).to(middle.dtype)
                squares += chosen.T @ middle
        return moments, crossed, counts, squares / total.clamp(min=1).unsqueeze(1)

    def _counts(self, rows: Rows, first: int, last: int) -> torch.Tensor:
        """float32 [n], numbers of rows of experts first..last."""
        return torch.tensor(rows.counts[first:last], dtype=torch.float32, device=self.pooled.device)


def _grams(weight: torch.Tensor) -> torch.Tensor:
    """W^T W of stacked weights [n, out, in]: float32 [n, in, in]."""
    count, rows, columns = weight.shape
    grams = weight.new_zeros(count, columns, columns, dtype=torch.float32)
    ends = torch.arange(1, count + 1, dtype=torch.int32, device=weight.device) * rows
    second_moments(weight.flatten(0, 1), ends, grams)
    return grams


def _runs(which: torch.Tensor) -> list[tuple[int, int]]:
    """First and one past the last of each run of True in bool [E]."""
    edges = torch.cat([torch.tensor([False]), which, torch.tensor([False])]).int().diff().nonzero().flatten().tolist()
    return [*zip(edges[::2], edges[1::2], strict=True)]


@dataclass(frozen=True)
class Verdict:
    """What samples that were held back say.

    Attributes:
        smoothing: the scales that were best.
        smoothed: whether they are those that the search found, not ones.
        rounded: the experts, compensated, or None where rounding to nearest was best.
        statistics: JSON: the mean squared error of the block's output on those samples, of every way that was tried.
        evidence: some of the tokens (`x` bf16 [n, H], `index` and `weight` [n, k]) and `inner`, the scales of down's
            inputs, on the host: what verify needs to compute `statistics["evidence"]` from the files.
    """

    smoothing: Smoothing
    smoothed: bool
    rounded: Rounded | None
    statistics: dict[str, Any]
    evidence: dict[str, torch.Tensor]


@dataclass
class _Jury:
    """The tokens that judge, and what they said.

    Attributes:
        block: the layer's experts with these tokens alone.
        wanted: float32 [t, H], the unquantized block's outputs for this rank's share of them.
        metric: what errors of the outputs cost, of these tokens alone; None where all cost alike, and each by itself.
        losses: float32 [n] of each way, squared errors of these tokens' outputs.
        values: their mean per element; infinity where it is not a number.
        costs: the same of the errors as the metric has them.
    """

    block: ExpertBlock
    wanted: torch.Tensor
    metric: Metric | None
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, block: ExpertBlock, reference: list[torch.Tensor], tokens: torch.Tensor, metric: Metric | None
    ) -> _Jury:
        heard = ExpertBlock(
            block.x[tokens], block.index[tokens], block.weight[tokens], block.gate_up, block.down, block.activation,
            block.group_size, None, block.working_memory // 2, team=block.team,
        )  # fmt: skip
        chosen = torch.zeros(block.x.shape[0], dtype=torch.bool, device=block.x.device)
        chosen[tokens] = True
        (share,) = heard.shares
        if metric and metric.weights is not None:
            metric = replace(metric, weights=metric.weights[tokens[share.tokens]])
        return cls(heard, block.in_order(reference, chosen)[share.mine], metric)

    def hear(self, way: str, weights: Weights) -> None:
        (share,), width = self.block.shares, self.wanted.shape[1]
        if self.metric is None:
            self.losses[way] = self.block.losses(share, weights, self.wanted)
            self.costs[way] = self.values[way] = _mean(self.losses[way], width)
            return
        (outputs,) = self.block.outputs(weights)
        # Of all tokens at once: what a product of rows rounds to may depend on how many there are.
        error = self.block.team.gather_parts(outputs.sub_(self.wanted), share.tokens.numel())
        costs = (error @ self.metric.matrix).mul_(error).sum(1)
        self.costs[way] = _mean(costs if self.metric.weights is None else costs.mul_(self.metric.weights), width)
        self.losses[way] = row_squares(error)
        self.values[way] = _mean(self.losses[way], width)

    def best(self, ways: Iterable[str]) -> str:
        """The first of those that cost least, of all whose squared errors are not above those of rounding to nearest
        without smoothing."""
        most = self.values["nearest"]
        return min((way for way in ways if self.values[way] <= most or way == "nearest"), key=self.costs.__getitem__)


def judge(
    block: ExpertBlock,
    reference: list[torch.Tensor],
    lengths: list[int],
    distinct: int,
    found: Smoothing,
    say: Callable[[float, str], None] = lambda *_: None,
    fisher: Fisher | None = None,
) -> Verdict:
    """Round with and without smoothing, compensated and to nearest, and take what is best on samples held back.

    Args:
        reference: float32 [t, H] of each share, the unquantized block's outputs.
        lengths: tokens of each sample.
        distinct: how many different tokens there are.
        found: the smoothing that a search for rounding to nearest chose.
        fisher: of the gradients at the block's outputs; without, all outputs and all tokens count alike.
    """
    mask = held_back(lengths).to(block.x.device)
    judging, fitted = mask.nonzero().flatten(), (~mask).nonzero().flatten()
    if not len(judging):
        judging = fitted
    metric = None if fisher is None else Metric.of(fisher, distinct, rows_per_column(block, fitted))
    jury = _Jury.of(block, reference, judging, metric)
    plain = Smoothing(torch.ones_like(found.norm), torch.ones_like(found.inner))
    smoothings = {"": plain}
    changed = torch.stack([(found.norm != 1).any(), (found.inner != 1).any()])
    if bool(block.team.largest(changed).any()):
        smoothings["smoothed_"] = found
    # Of equal losses the simpler way wins.
    nearest = {f"{name}nearest": smoothing for name, smoothing in smoothings.items()}
    for way, smoothing in nearest.items():
        jury.hear(way, Smoothed(jury.block, smoothing.norm, smoothing.inner))
    compensation = Compensation(block, fitted, distinct, metric)
    results = {name: Rounded(block, smoothing) for name, smoothing in smoothings.items()}

    def progress(share: float, at: str) -> None:
        say(ROUNDED * share, at)

    if len(results) > 1:
        compensation.fit([*results.values()], probed(block), progress)
        say(ROUNDED / PROBED, "judging by samples held back")
        for name, result in results.items():
            jury.hear(f"{name}probe", result)
    # Where the probed experts had no token, as it is for nearest.
    name = min(results, key=lambda name: (jury.costs.get(f"{name}probe", 0.0), jury.costs[f"{name}nearest"]))
    way, result = f"{name}compensated", results[name]
    del results
    compensation.fit([result], torch.ones_like(result.done), progress)
    say(ROUNDED, "judging by samples held back")
    jury.hear(way, result)
    best = jury.best((*nearest, way))
    rounded = result if best == way else None
    smoothing = result.smoothing if rounded else nearest[best]
    kept = torch.arange(0, len(judging), -(-len(judging) // EVIDENCE), device=block.x.device)
    shown = [_mean(jury.losses[way][kept], block.x.shape[1]) for way in ("nearest", best)]
    statistics = {
        "rounding": "nearest" if rounded is None else "compensated",
        "loss_tokens": len(judging),
        "held_back": bool(mask.any()),
        "loss_round_to_nearest": _finite(jury.values["nearest"]),
        "loss_chosen": _finite(jury.values[best]),
        "losses": {way: _finite(value) for way, value in jury.values.items()},
        **({} if fisher is None else {"costs": {way: _finite(value) for way, value in jury.costs.items()}}),
        "identity_kept": smoothing is plain,
        "evidence": {
            "tokens": len(kept),
            "loss_round_to_nearest": _finite(shown[0]),
            "loss_chosen": _finite(shown[1]),
        },
    }
    heard = jury.block
    evidence = {"x": heard.x[kept], "index": heard.index[kept], "weight": heard.weight[kept]}
    evidence["inner"] = block.team.gather_parts(smoothing.inner, block.experts)
    return Verdict(
        smoothing, smoothing is not plain, rounded, statistics, {name: t.cpu() for name, t in evidence.items()}
    )


def _mean(losses: torch.Tensor, width: int) -> float:
    """Mean squared error of an output, from the sums float32 [n] of tokens; infinity where it is not a number."""
    mean = losses.sum(dtype=torch.float64) / (losses.numel() * width)
    return float(mean.nan_to_num(nan=torch.inf, posinf=torch.inf))


def _finite(value: float) -> float | None:
    """For JSON, which knows no infinity."""
    return value if value < float("inf") else None
