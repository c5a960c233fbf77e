"""Mixture-of-experts arithmetic on stacked weights: rows sorted by expert, grouped matrix products.

Shapes: T tokens, k experts a token, R = T*k rows, E experts, H hidden, I intermediate. Sums over the k experts of a
token are taken in a fixed order, so a result does not depend on how the device schedules its threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mmq.tensors.dispatch import worth_compiling

Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Piece:
    """Experts first..last and their rows start..stop; `ends` int32 [last-first], where each expert's rows end."""

    first: int
    last: int
    start: int
    stop: int
    ends: torch.Tensor


@dataclass(frozen=True)
class Rows:
    """One row for every (token, expert) pair of some tokens, sorted by expert.

    Attributes:
        token: int64 [R], the row's token.
        ends: where the rows of each expert end.
        place: int64 [T, k], the row of each token's j-th expert; [0, k] for rows that are in no token's output.
    """

    token: torch.Tensor
    ends: list[int]
    place: torch.Tensor

    @classmethod
    def of(cls, experts: torch.Tensor, num_experts: int) -> Rows:
        """Sort the choices int64 [T, k] of a router."""
        tokens, top_k = experts.shape
        flat = experts.reshape(-1)
        order = torch.argsort(flat, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel(), device=order.device)
        ends = torch.bincount(flat, minlength=num_experts).cumsum(0).tolist()
        return cls(order // top_k, ends, place.view(tokens, top_k))

    @property
    def counts(self) -> list[int]:
        """Rows of each expert."""
        return [end - start for start, end in zip([0, *self.ends[:-1]], self.ends, strict=True)]

    def cut(self, size: int) -> Iterator[Rows]:
        """The same rows, at most `size` at a time, for those that are in no token's output."""
        for start in range(0, self.token.shape[0], size):
            token = self.token[start : start + size]
            yield Rows(token, [min(max(end - start, 0), token.shape[0]) for end in self.ends], self.place)

    def within(self, first: int, last: int) -> Rows:
        """The rows of experts first..last alone, for those that are in no token's output."""
        start, stop = self.ends[first - 1] if first else 0, self.ends[last - 1]
        ends = [min(max(end, start), stop) - start for end in self.ends]
        return Rows(self.token[start:stop], ends, self.place)

    def piece(self, first: int, last: int) -> Piece | None:
        """The rows of experts first..last, if they have any."""
        start, stop = self.ends[first - 1] if first else 0, self.ends[last - 1]
        if start == stop:
            return None
        local = [end - start for end in self.ends[first:last]]
        return Piece(first, last, start, stop, torch.tensor(local, dtype=torch.int32, device=self.token.device))

    def pieces(self, step: int) -> Iterator[Piece]:
        """All rows, `step` experts at a time."""
        for first in range(0, len(self.ends), step):
            piece = self.piece(first, min(first + step, len(self.ends)))
            if piece is not None:
                yield piece


def grouped_linear(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x W_e^T for the rows of each expert.

    Args:
        rows: [R, in], sorted by expert.
        weight: [E, out, in].
        ends: int32 [E], where each expert's rows end; the last is R.

    Returns:
        [R, out] in the rows' dtype.
    """
    if _has_grouped_mm(rows):
        return torch.nn.functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    result = rows.new_empty(rows.shape[0], weight.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        torch.mm(rows[start:end], weight[expert].T, out=result[start:end])
        start = end
    return result


def gated(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """act(gate) * up of [R, 2I] -> [R, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate).mul_(up)


def combine(outputs: torch.Tensor, place: torch.Tensor, weights: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """start + the sum over a token's experts of weight * output.

    Args:
        outputs: [R, H], sorted by expert.
        place: int64 [T, k], the tokens' rows in it.
        weights: float32 [T, k], the router's.
        start: float32 [T, H], overwritten.
    """
    for j in range(weights.shape[1]):
        start.addcmul_(outputs.index_select(0, place[:, j]), weights[:, j : j + 1])
    return start


def squared_error(
    outputs: torch.Tensor, place: torch.Tensor, weights: torch.Tensor, reference: torch.Tensor
) -> torch.Tensor:
    """Sum of squared differences between what `combine` makes of a block's outputs and float32 [T, H]: float64 []."""
    if worth_compiling(outputs):
        from mmq.tensors import compiled

        return compiled.squared_error(outputs, place, weights, reference)
    return sum_of_squares(combine(outputs, place, weights, reference.neg()))


def squares_by_expert(rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Sum of the squares of each expert's rows: float64 [E].

    Args:
        rows: [R, n], sorted by expert; overwritten.
        ends: int32 [E], where each expert's rows end.
    """
    if worth_compiling(rows):
        from mmq.tensors import compiled

        return compiled.squares_by_expert(rows, ends)
    squares = rows.square_().sum(1, dtype=torch.float32)
    running = torch.nn.functional.pad(squares.cumsum(0, dtype=torch.float64), (1, 0))[ends.long()]
    return torch.diff(running, prepend=running.new_zeros(1))


def sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    """Of float32 [n, m], overwritten: float64 []. Rows are summed whole, so the number of threads decides nothing."""
    return x.square_().sum(1).sum(dtype=torch.float64)


def second_moments(rows: torch.Tensor, out: torch.Tensor) -> None:
    """out += X^T X for X [n, I], out float32 [I, I]."""
    if rows.shape[0] == 0:
        return
    if rows.device.type == "cuda" and rows.dtype == torch.bfloat16:
        out += torch.mm(rows.T, rows, out_dtype=torch.float32)
    else:
        wide = rows.float()
        out.addmm_(wide.T, wide)


def _has_grouped_mm(rows: torch.Tensor) -> bool:
    if rows.device.type == "cuda":
        return rows.dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows.device) >= (8, 0)
    return rows.device.type == "cpu"
