"""AWQ's scale search on stacked experts, as a subclass of llmcompressor's AWQModifier.

The grid, its options and the mappings are the modifier's own; what differs is how a grid point is measured. The stock
search replays Python modules, one expert at a time. Here the tokens are routed and sorted once, and every point is a
vectorized quantization and a grouped product; where tokens are many, the per-expert search needs no products with
them at all, since its loss is a quadratic form of the expert's second moments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier

from mmq.families.table import Architecture
from mmq.quantize.race import COARSE, Runner, race
from mmq.quantize.routed_experts import ExpertBlock, SmoothedGateUp
from mmq.tensors.int4 import fake_quantize_scaled, normalized_mean
from mmq.tensors.smoothing import candidate_scales, nearest_power_of_two


class Error(Protocol):
    """Losses of candidate scales [..., in]: [...]."""

    def __call__(self, scales: torch.Tensor) -> torch.Tensor: ...


def awq_mappings(architecture: Architecture) -> list[AWQMapping]:
    """The family's smoothing in llmcompressor's words, on transformers' module names with linear experts.

    The router comes first: the statistics hook sits on the first balance layer, and only the router sees every token.
    """
    expert = architecture.module_name(architecture.expert).replace(r"{expert}", r"\d+")
    router = architecture.module_name(architecture.router).removesuffix(".weight")
    return [
        AWQMapping(
            f"re:.*{architecture.smooth_norm.removesuffix('.weight')}$",
            [f"re:.*{router}$", f"re:.*{expert}gate_proj$", f"re:.*{expert}up_proj$"],
        ),
        AWQMapping(f"re:.*{expert}up_proj$", [f"re:.*{expert}down_proj$"]),
    ]


@dataclass(frozen=True)
class Point:
    """A point of the grid in a race: its loss over the tokens it has seen, and after which share it was dropped."""

    ratio: float
    duo_scaling: bool
    tokens: int
    loss: float
    dropped: int | None


@dataclass(frozen=True)
class Found:
    """The best point of a grid.

    Attributes:
        scales: float32 [..., in].
        ratio, duo, error, identity_error: float or bool tensors of the shape before [in], or of one element.
        points: what was measured of each point, in the order of the race; empty where all were, on all tokens.
    """

    scales: torch.Tensor
    ratio: torch.Tensor
    duo: torch.Tensor
    error: torch.Tensor
    identity_error: torch.Tensor
    points: list[Point] = field(default_factory=list)

    @property
    def identity(self) -> torch.Tensor:
        """Where no point was better than leaving the weights alone."""
        return (self.ratio == 0) & ~self.duo


def unsmoothed(x: torch.Tensor) -> Found:
    """What stands for the search of a norm's scales where there is none to choose; `x` is [T, H]."""
    unknown = torch.tensor(torch.nan, dtype=torch.float64)
    ones = torch.ones(x.shape[1], device=x.device)
    return Found(ones, torch.tensor(0.0, dtype=torch.float64), torch.tensor(False), unknown, unknown)


def unscaled(block: ExpertBlock) -> Found:
    """What stands for the search of down's scales where none may be moved there."""
    experts, device = block.experts, block.x.device
    unknown = torch.full((experts,), torch.nan, device=device)
    ones = torch.ones(experts, block.down.shape[2], device=device)
    return Found(
        ones,
        torch.zeros(experts, device=device),
        torch.zeros(experts, dtype=torch.bool, device=device),
        unknown,
        unknown,
    )


# Told the share of a search that is done, and where it is.
Told = Callable[[float, str], None]


def _untold(_share: float, _at: str) -> None: ...


class StackedAWQModifier(AWQModifier):
    """AWQModifier whose searches run on stacked experts.

    Attributes:
        powers_of_two: the norm's scales are such, so that a norm and a router in bf16 take them without a rounding.
    """

    powers_of_two: bool = False

    @torch.no_grad()
    def search_norm(
        self, block: ExpertBlock, reference: list[torch.Tensor], full: bool = False, told: Told = _untold
    ) -> Found:
        """Scales of the norm before router and experts: those of the grid whose quantized gate and up layers change the
        block's output least.

        Args:
            reference: float32 [t, H] of each share, the unquantized block's outputs.
            full: measure every point, not only those that may be the best.
            told: how far the search is.

        Returns:
            scales [H]; ratio, duo and errors of one element. Errors are mean squared differences over the outputs of
            the tokens that both the chosen point and the identity have seen.
        """
        grid, scales = grid_of_norm(self, block)
        seen: list[int] = []

        def measure(point: int, share: int) -> torch.Tensor:
            seen.append(point)
            at = f"norm, point {len(set(seen))} of at most {len(grid)}, tokens {share + 1}/{len(block.shares)}"
            told((len(seen) - 1) / (len(grid) * len(block.shares)), at)
            return block.losses(block.shares[share], SmoothedGateUp(block, scales[point]), reference[share])

        tokens, hidden = block.x.shape
        result = race(lines(grid), len(block.shares), tokens, measure, 1 if full else COARSE)
        best, identity = result.runners[result.best], result.runners[0]
        error, plain = (Runner(one.losses[: len(other.losses)]) for one, other in ((best, identity), (identity, best)))
        ratio, duo = grid[result.best]
        return Found(
            scales[result.best],
            torch.tensor(ratio, dtype=torch.float64),
            torch.tensor(duo),
            torch.tensor(error.loss / hidden, dtype=torch.float64),
            torch.tensor(plain.loss / hidden, dtype=torch.float64),
            [
                Point(grid[place][0], grid[place][1], one.seen, one.loss / hidden, one.dropped)
                for place, one in result.runners.items()
            ],
        )

    @torch.no_grad()
    def search_down(self, block: ExpertBlock, told: Told = _untold) -> Found:
        """Scales of each up layer's output: those of the grid whose quantized down layer changes its output least.

        With X the expert's inputs and D = Q(W s)/s - W the change of its weight, the squared difference is that of
        X D^T, or trace(D G D^T) with G = X^T X; each worker keeps the inputs of `block.step` experts at a time.

        Args:
            told: how far the search is; called from the block's workers.

        Returns:
            scales [E, I]; ratio, duo and errors [E]; of all experts. An expert without rows keeps scales of 1.
        """
        step, experts = block.step, block.gate_up.shape[0]

        def search(first: int) -> Found:
            last = min(first + step, experts)
            told(first / experts, f"down, experts {first + 1} to {last} of {experts}")
            return self._search_down(block, first, last)

        parts = block.each(search, range(0, experts, step))

        def everyone(own: list[torch.Tensor]) -> torch.Tensor:
            return block.team.gather_parts(torch.cat(own), block.experts)

        return Found(
            everyone([part.scales for part in parts]),
            everyone([part.ratio for part in parts]),
            everyone([part.duo for part in parts]),
            everyone([part.error for part in parts]),
            everyone([part.identity_error for part in parts]),
        )

    def _search_down(self, block: ExpertBlock, first: int, last: int) -> Found:
        inputs = block.down_inputs(first, last)
        weight = block.down[first:last]
        count = inputs.counts.clamp(min=1).to(torch.float32)
        x_mean = inputs.sums / count.unsqueeze(1)
        w_mean = normalized_mean(weight, block.group_size) / weight.shape[1]
        change = torch.empty_like(weight)

        def error(scales: torch.Tensor) -> torch.Tensor:
            fake_quantize_scaled(weight, scales.unsqueeze(1), block.group_size, change, change=True)
            return inputs.squared_change(change) / (count * weight.shape[1])

        found = self._search(x_mean, w_mean, error)
        unused = inputs.counts == 0
        return replace(
            found,
            scales=torch.where(unused.unsqueeze(1), 1.0, found.scales),
            ratio=torch.where(unused, 0.0, found.ratio),
            duo=found.duo & ~unused,
        )

    def _search(self, x_mean: torch.Tensor, w_mean: torch.Tensor, error: Error) -> Found:
        """The grid for all leading dimensions at a time; the first of equal points wins, as in the stock search."""
        grid = self._get_grid_search_params()
        scales = candidate_scales(x_mean, w_mean.to(torch.float32), grid)
        # NaN is no better than anything, and nothing would be better than it.
        losses = [error(point).nan_to_num_(nan=torch.inf, posinf=torch.inf) for point in scales]
        found, best = torch.stack(losses).min(0)
        ratio = torch.tensor([ratio for ratio, _ in grid], dtype=found.dtype, device=best.device)
        duo = torch.tensor([duo for _, duo in grid], device=best.device)
        chosen = best.unsqueeze(-1).expand(scales.shape[1:]).unsqueeze(0)
        # Every form of the grid begins with (0, no duo scaling), which is the identity.
        return Found(scales.gather(0, chosen).squeeze(0), ratio[best], duo[best], found, losses[0])


def grid_of_norm(modifier: StackedAWQModifier, block: ExpertBlock) -> tuple[list[tuple[float, bool]], torch.Tensor]:
    """The norm's points, ratio and whether to scale by both activations and weights, and their scales [points, H]."""
    # bf16 magnitudes and, inside the sum, their fp32 copy.
    x_mean = _mean_magnitude(block.x, min(2**14, block.working_memory // 8 // (8 * block.x.shape[1]) + 1))
    sums = block.each(lambda part: normalized_mean(part, block.group_size), block.gate_up.split(block.step))
    # Summed over all experts at once, so that neither steps nor ranks decide the order.
    w_mean = block.team.gather_parts(torch.cat(sums), block.experts).sum(0) / (block.experts * block.gate_up.shape[1])
    grid = modifier._get_grid_search_params()
    scales = candidate_scales(x_mean, w_mean.to(torch.float32), grid)
    return grid, nearest_power_of_two(scales) if modifier.powers_of_two else scales


def lines(grid: list[tuple[float, bool]]) -> list[list[int]]:
    """Places in the grid by ratio: one line without duo scaling and one with it."""
    found = []
    for duo in sorted({duo for _, duo in grid}):
        found.append(sorted((place for place, point in enumerate(grid) if point[1] == duo), key=lambda p: grid[p]))
    return found


def _mean_magnitude(x: torch.Tensor, step: int) -> torch.Tensor:
    """Mean |x| of each channel of [T, H], `step` tokens at a time: float32 [H]."""
    total = torch.zeros(x.shape[1], dtype=torch.float32, device=x.device)
    for start in range(0, x.shape[0], step):
        total += x[start : start + step].abs().sum(0, dtype=torch.float32)
    return total / x.shape[0]
