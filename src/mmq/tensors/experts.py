"""Mixture-of-experts arithmetic on stacked weights: rows sorted by expert, grouped matrix products.

Shapes: T tokens, k experts a token, R = T*k rows, E experts, H hidden, I intermediate. Sums over the k experts of a
token are taken in a fixed order, so a result does not depend on how the device schedules its threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch

from mmq.tensors.dispatch import Way, grouped_mm_works, torch_multiplies_faster, way, way_of_products

# Parts of a second moment's columns on a CPU, each multiplied with itself and those before it.
STRIPS = 4


@dataclass(frozen=True)
class ClampedGate:
    """gate * sigmoid(alpha * gate) * (1 + up), gate clamped from above and up from both sides at the limit before."""

    alpha: float
    limit: float


# What gate goes through before it multiplies up, or the two together.
Activation = Callable[[torch.Tensor], torch.Tensor] | ClampedGate


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

    def of_experts(self, first: int, last: int) -> Rows:
        """The rows of experts first..last alone. `place` stays as it is."""
        begin = self.ends[first - 1] if first else 0
        return Rows(self.token[begin : self.ends[last - 1]], [end - begin for end in self.ends[first:last]], self.place)

    def pieces(self, first: int, last: int, most: int) -> Iterator[Piece]:
        """The rows of experts first..last, at most so many at a time. An expert with more is cut by itself, so that how
        its rows come together depends on nothing but their number."""
        begins = [self.ends[expert - 1] if expert else 0 for expert in range(first, last)]
        start = stop = begins[0]
        for begin, end in zip(begins, self.ends[first:last], strict=True):
            if end - start > most and begin > start:
                yield self._piece(first, last, start, begin)
                start = begin
            while end - start > most:
                yield self._piece(first, last, start, start + most)
                start += most
            stop = end
        if stop > start:
            yield self._piece(first, last, start, stop)

    def _piece(self, first: int, last: int, start: int, stop: int) -> Piece:
        local = [min(max(own - start, 0), stop - start) for own in self.ends[first:last]]
        return Piece(first, last, start, stop, torch.tensor(local, dtype=torch.int32, device=self.token.device))


def grouped_linear(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x W_e^T for the rows of each expert.

    Args:
        rows: [R, in], sorted by expert.
        weight: [E, out, in].
        ends: int32 [E], where each expert's rows end; the last is R.

    Returns:
        [R, out] in the rows' dtype.
    """
    if rows.shape[0] and torch_multiplies_faster(rows):
        return torch.nn.functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    return grouped_rows(rows, weight, ends, rows.new_empty(rows.shape[0], weight.shape[1]))


def grouped_rows(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`grouped_linear` into `out` [R, out], which may be a part of a larger tensor's rows."""
    if rows.shape[0] == 0:
        return out
    if way_of_products(rows) is Way.TRITON:
        from mmq.tensors.fused import grouped

        grouped.grouped_rows(rows, weight, ends, out)
        return out
    if grouped_mm_works(rows.device, rows.dtype):
        return out.copy_(torch.nn.functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends))
    return _products(rows, weight.transpose(1, 2), ends, out)


def grouped_back(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """y W_e for the rows of each expert: what `grouped_linear`'s inputs get of the gradient y of its outputs.

    Args:
        rows: [R, out], sorted by expert.
        weight: [E, out, in].
        ends: int32 [E], where each expert's rows end; the last is R.

    Returns:
        [R, in] in the rows' dtype.
    """
    if rows.shape[0] and grouped_mm_works(rows.device, rows.dtype):
        return torch.nn.functional.grouped_mm(rows, weight, offs=ends)
    return _products(rows, weight, ends, rows.new_empty(rows.shape[0], weight.shape[2]))


def _products(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Each expert's rows [r, n] times its matrix of [E, n, m], one after the other, into `out` [R, m]."""
    for own, matrix, target in zip(_split(rows, ends), matrices, _split(out, ends), strict=True):
        torch.mm(own, matrix, out=target)
    return out


def gated_rows(
    x: torch.Tensor, token: torch.Tensor | None, gate_up: torch.Tensor, ends: torch.Tensor, activation: Activation
) -> torch.Tensor:
    """act(gate) * up of the tokens' experts: what goes into their down layers.

    Args:
        x: [T, H].
        token: int64 [R], the tokens that rows are of, sorted by expert; None where x holds the rows themselves.
        gate_up: [E, 2I, H], gate rows above up rows.
        ends: int32 [E], where each expert's rows end; the last is R.

    Returns:
        [R, I] in the dtype of x.
    """
    count = x.shape[0] if token is None else token.shape[0]
    if count and way_of_products(x) is Way.TRITON and _is_silu(activation):
        from mmq.tensors.fused import grouped

        return grouped.gated_rows(x, token, gate_up, ends)
    rows = x if token is None else x.index_select(0, token)
    return gated(grouped_linear(rows, gate_up, ends), activation)


def gated(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """act(gate) * up, or what the activation makes of both, of [R, 2I] -> [R, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    if isinstance(activation, ClampedGate):
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        # Autograd needs the sigmoid as it is.
        return (torch.sigmoid(gate * activation.alpha) * gate).mul_(up.add_(1))
    return activation(gate).mul_(up)


def gated_slopes(
    x: torch.Tensor, token: torch.Tensor, gate_up: torch.Tensor, ends: torch.Tensor, activation: Activation
) -> torch.Tensor:
    """Derivatives of `gated_rows` by the outputs of gate and of up: [R, 2I] in the dtype of x, given the same."""
    with torch.enable_grad():
        both = grouped_linear(x.index_select(0, token), gate_up, ends).requires_grad_()
        # Each product has its own gate and up.
        (slopes,) = torch.autograd.grad(gated(both, activation).sum(), both)
    return slopes


@cache
def _is_silu(activation: Activation) -> bool:
    """Libraries name and wrap it differently; what it computes tells."""
    if isinstance(activation, ClampedGate):
        return False
    numbers = torch.linspace(-8, 8, 33)
    return torch.equal(activation(numbers.clone()), torch.nn.functional.silu(numbers))


def combine(
    outputs: torch.Tensor, place: torch.Tensor, weights: torch.Tensor, start: torch.Tensor, first: int = 0
) -> torch.Tensor:
    """start + the sum over a token's experts of weight * output, as far as the outputs are among those given.

    Args:
        outputs: [n, H], rows first..first+n of all that are sorted by expert.
        place: int64 [T, k], the tokens' rows.
        weights: float32 [T, k], the router's.
        start: float32 [T, H], overwritten.
    """
    if place.shape[0] == 0 or outputs.shape[0] == 0:
        return start
    match way(outputs):
        case Way.NUMBA:
            from mmq.tensors import compiled

            return compiled.combine(outputs, place, weights, start, first)
        case Way.TRITON:
            from mmq.tensors.fused import combine as fused

            fused.combine(outputs, place, weights, start, first)
            return start
    for j in range(weights.shape[1]):
        local = place[:, j] - first
        inside = (local >= 0) & (local < outputs.shape[0])
        chosen = outputs.index_select(0, local.clamp(0, outputs.shape[0] - 1))
        start.addcmul_(torch.where(inside.unsqueeze(1), chosen, 0), weights[:, j : j + 1])
    return start


def token_losses(
    outputs: torch.Tensor,
    place: torch.Tensor,
    weights: torch.Tensor,
    reference: torch.Tensor,
    first: int = 0,
    whole: int | None = None,
) -> torch.Tensor:
    """Each token's sum of squared differences between what `combine` makes of a block's outputs and a reference.

    Args:
        outputs, place, weights, first: as `combine` takes them.
        reference: float32 [T, H].
        whole: numbers of the outputs of all batches.

    Returns:
        float32 [T]. A token is summed whole, so neither threads nor how tokens are shared out decide anything.
    """
    if place.shape[0] == 0:
        return reference.new_zeros(0)
    match way(outputs, whole):
        case Way.NUMBA:
            from mmq.tensors import compiled

            return compiled.token_losses(outputs, place, weights, reference, first)
        case Way.TRITON:
            from mmq.tensors.fused import combine as fused

            return fused.token_losses(outputs, place, weights, reference, first)
    return combine(outputs, place, weights, reference.neg(), first).square_().sum(1)


def squares_by_expert(rows: torch.Tensor, ends: torch.Tensor, whole: int | None = None) -> torch.Tensor:
    """Sum of the squares of each expert's rows: float64 [E].

    Args:
        rows: [R, n], sorted by expert.
        ends: int32 [E], where each expert's rows end.
        whole: numbers of all experts' rows.
    """
    match way(rows, whole):
        case Way.NUMBA:
            from mmq.tensors import compiled

            return compiled.squares_by_expert(rows, ends)
        case Way.TRITON:
            from mmq.tensors.fused import moments

            return moments.squares_by_expert(rows, ends)
    squares = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).to(torch.float64).square_()
    # A sum a segment: a running sum of floats comes in another order every time on a GPU.
    offsets = torch.nn.functional.pad(ends.long(), (1, 0))
    return torch.segment_reduce(squares, "sum", offsets=offsets, unsafe=True, initial=0)


def magnitude_sums(rows: torch.Tensor, ends: torch.Tensor, out: torch.Tensor) -> None:
    """out += each expert's sum of |x|.

    Args:
        rows: [R, n], sorted by expert.
        ends: int32 [E], where each expert's rows end.
        out: float32 [E, n].
    """
    if way(rows) is Way.TRITON:
        from mmq.tensors.fused import moments

        moments.magnitude_sums(rows, ends, out)
        return
    for own, total in zip(_split(rows, ends), out, strict=True):
        total += own.abs().sum(0, dtype=torch.float32)


def second_moments(rows: torch.Tensor, ends: torch.Tensor, out: torch.Tensor) -> None:
    """out += X^T X of each expert's rows X.

    Args:
        rows: [R, n], sorted by expert.
        ends: int32 [E], where each expert's rows end.
        out: float32 [E, n, n], symmetric.
    """
    if way_of_products(rows) is Way.TRITON:
        from mmq.tensors.fused import moments

        moments.second_moments(rows, ends, out)
        return
    for own, total in zip(_split(rows, ends), out, strict=True):
        if own.shape[0] == 0:
            continue
        if rows.device.type == "cuda" and rows.dtype == torch.bfloat16:
            total += torch.mm(own.T, own, out_dtype=torch.float32)
        else:
            _add_moments(own.float(), total)


def _add_moments(rows: torch.Tensor, total: torch.Tensor) -> None:
    """total += X^T X of rows X, float32 [R, n]. Of many rows, what lies above the diagonal is copied from below."""
    width = total.shape[0]
    strip = width if len(rows) < width else -(-width // STRIPS)
    for start in range(0, width, strip):
        stop = min(start + strip, width)
        total[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop])
        total[:start, start:stop] = total[start:stop, :start].T


def quadratic_form(change: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """trace(D G D^T) of each expert's D and G: float32 [E].

    Args:
        change: [E, out, in], D.
        moments: float32 [E, in, in], G, rounded to the dtype of D for the product.
    """
    product = torch.bmm(change, moments.to(change.dtype))
    if way(product) is Way.TRITON:
        from mmq.tensors.fused import moments as fused

        return fused.row_products(product, change).sum(1)
    # Row by row: a sum over all of a matrix is cut up among threads, in another order for each number of them.
    return product.mul_(change).sum(2, dtype=torch.float32).sum(1)


def _split(rows: torch.Tensor, ends: torch.Tensor) -> Iterator[torch.Tensor]:
    """Each expert's rows."""
    start = 0
    for end in ends.tolist():
        yield rows[start:end]
        start = end


def row_squares(x: torch.Tensor) -> torch.Tensor:
    """Sums of squares of the rows of float32 [n, m], overwritten: [n].

    Rows are summed whole, so that neither the number of threads nor how rows are shared out decides anything.
    """
    return x.square_().sum(1)
