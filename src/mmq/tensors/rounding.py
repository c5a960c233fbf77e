"""Error-compensated rounding of stacked weights: the columns that are still to be rounded make up for those that were.

With H = X^T X of a layer's inputs X, rounding W to Q changes the output by trace((Q - W) H (Q - W)^T). Let H = L L^T be
its Cholesky factor, and V = L / diag(L), column by column. Column j, the last one first, is rounded from

    c_j = w_j + sum over i > j of (w_i - q_i) V_ij

which is what GPTQ (arXiv 2210.17323) does with the factor of the inverse, and LDLQ (QuIP, arXiv 2307.13304) as here; no
matrix is inverted. Columns come in ascending order of H's diagonal, so that the one that matters most is rounded first.
Group scales are found before and stay with their columns (llmcompressor's `actorder: static`), so that the format needs
no g_idx. `descend` then goes over scales and codes once more, each the best there is for all others.

Where a second moment G of the loss's gradients at the outputs says which of them matter together, the loss changes by
trace(G (Q - W) H (Q - W)^T) (YAQA, arXiv 2505.22988). The Cholesky factor of both is the Kronecker product of theirs,
so that with G = M M^T and U = M / diag(M) rows make up for each other as columns do: row r, the last one first, is
rounded by H alone, but from w_r + sum over s > r of U_sr (w_s - q_s). `round_rows` does.

An expert's down layer reads what its gate and up make of the inputs, and these are rounded too. `through_down` tells
from G which errors of gate's and up's outputs matter together, and `corrected` lets down make up for what they leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from mmq.tensors.codes import HALF_RANGE, Q_MAX, Q_MIN
from mmq.tensors.dispatch import Way, way_of_columns
from mmq.tensors.int4 import CPU_TILE, QuantizedStack, stored_scale

# Columns whose rounding errors are passed on one by one; to all later ones they go in one product.
COLUMNS = 128
# Where the errors of rows make up for each other, rows that are rounded at one time, at least, and into how many such
# blocks a matrix is cut at most (docs/quality.md, docs/performance.md).
ROWS, ROW_BLOCKS = 8, 24
# Pairs of codes of a group that a sweep tries to move, and how much a move must take off at least, as a share of what
# it adds by itself: rounding could move a code forth and back otherwise.
TRIES, SLACK = 32, 1e-5
# Shares of max|w| / 7.5 that a group's scale is chosen from.
SHARES = tuple((104 - 2 * step) / 100 for step in range(28))


@dataclass(frozen=True)
class Factor:
    """A second moment H, ready to round by.

    Attributes:
        order: int64 [n, in], columns by ascending diagonal.
        unit_lower: float32 [n, in, in], L / diag(L) of H with its columns in that order.
        diagonal: float32 [n, in], H's, in file order; never all zero.
        pivots: float32 [n, in], squares of L's diagonal, in file order: what an error of a column costs once those that
            are rounded after it have made up for it.
        unit: float32 [n], the mean diagonal that H is in units of.
        compensates: bool [n]; where False, H was no positive matrix, and its place is taken by the identity, by which
            every code is the nearest.
    """

    order: torch.Tensor
    unit_lower: torch.Tensor
    diagonal: torch.Tensor
    pivots: torch.Tensor
    unit: torch.Tensor
    compensates: torch.Tensor


def shrink(moments: torch.Tensor, counts: torch.Tensor, toward: torch.Tensor, strength: float) -> torch.Tensor:
    """Mean second moments of few rows, drawn towards what is expected without them: float32 [n, in, in].

    Args:
        moments: float32 [n, in, in], sums over rows; overwritten.
        counts: float32 [n], numbers of rows.
        toward: float32 [n, in, in], mean second moments.
        strength: the target counts as many rows as `strength` times the number of columns.

    Source: linear shrinkage (Ledoit and Wolf 2004) with a fixed number of prior rows, k / (rows + k).
    """
    prior = strength * moments.shape[-1]
    moments.mul_((1 / (counts + prior)).view(-1, 1, 1))
    return moments.addcmul_(toward, (prior / (counts + prior)).view(-1, 1, 1))


def expected(grams: torch.Tensor, rows: int, known: torch.Tensor, strength: float) -> torch.Tensor:
    """What mean second moments of a layer's inputs may be expected to be before any of its own rows is seen.

    A trained layer's weights are sums of inputs that it has seen, so that channels which go together have weights that
    do. As far as W has many rows, the correlations of W^T W are taken beside what is known otherwise.

    Args:
        grams: float32 [n, in, in], W^T W of each layer; overwritten.
        rows: of W.
        known: float32 [in, in], mean second moments of other rows, or [n, in], mean squares alone.
        strength: what is known counts as many rows of W as `strength` times the number of columns.

    Returns:
        float32 [n, in, in], their diagonals the known one.
    """
    squares = known if known.shape == grams.shape[:2] else known.diagonal().expand(grams.shape[:2])
    factor = (squares / grams.diagonal(dim1=1, dim2=2)).sqrt_().nan_to_num_(0.0, 0.0, 0.0)
    share = rows / (rows + strength * grams.shape[-1])
    grams.mul_((share * factor).unsqueeze(2)).mul_(factor.unsqueeze(1))
    if squares is not known:
        grams.add_(known, alpha=1 - share)
    grams.diagonal(dim1=1, dim2=2).copy_(squares)
    return grams


def factorize(moments: torch.Tensor, damping: float) -> Factor:
    """Damp second moments, order their columns and factorize them.

    Args:
        moments: float32 [n, in, in], symmetric; become what is factorized, in units of its mean diagonal before it was
            damped and in file order.
        damping: share of the mean diagonal that is added to the diagonal.
    """
    diagonals = moments.diagonal(dim1=1, dim2=2)
    mean = diagonals.mean(1)
    # Of no rows, of rows of zeros, and of numbers beyond fp32 nothing can be learnt.
    usable = torch.isfinite(moments.sum((1, 2))) & (mean > 0) & torch.isfinite(1 / mean)
    # In units of the mean: nothing is denormal, and damping and failures don't depend on the layer's magnitude.
    moments.mul_((1 / mean).view(-1, 1, 1))
    _identity_where(moments, ~usable)
    diagonals.add_(damping)
    # Stable, and ties in file order: every device gives the same.
    order = diagonals.argsort(dim=1, stable=True)
    diagonal = diagonals.clone()
    moments = moments.gather(1, order.unsqueeze(2).expand_as(moments))
    moments = moments.gather(2, order.unsqueeze(1).expand_as(moments))
    lower, info = torch.linalg.cholesky_ex(moments)
    for more in (1.0, None):
        failed = (info != 0) | ~torch.isfinite(lower.diagonal(dim1=1, dim2=2)).all(1)
        if not bool(failed.any()):
            break
        if more is None:
            _identity_where(moments, failed)
            usable = usable & ~failed
        else:
            moments.diagonal(dim1=1, dim2=2).add_(failed.unsqueeze(1) * more)
        lower, info = torch.linalg.cholesky_ex(moments)
    pivots = lower.diagonal(dim1=1, dim2=2).clone()
    lower.div_(pivots.unsqueeze(1))
    pivots = torch.empty_like(pivots).scatter_(1, order, pivots.square())
    return Factor(order, lower, diagonal, pivots, mean, usable)


def _identity_where(matrices: torch.Tensor, where: torch.Tensor) -> None:
    """Put the identity in place of some of [n, in, in]."""
    matrices.masked_fill_(where.view(-1, 1, 1), 0.0)
    matrices.diagonal(dim1=1, dim2=2).add_(where.unsqueeze(1).to(matrices.dtype))


def through_down(slopes: torch.Tensor, down: torch.Tensor, metric: torch.Tensor | None) -> torch.Tensor:
    """Which errors of gate's and up's outputs matter together, given which of the block's outputs do.

    With D the weights of down and j the derivatives of its inputs by gate's and up's outputs, errors e of these cost
    e^T ((D^T G D) o j j^T) e. In the mean over rows, G is taken to go with no row more than with another: a matrix of
    all tokens then serves an expert that has few.

    Args:
        slopes: float32 [n, 2I, 2I], E[j j^T], gate above up; overwritten.
        down: float32 [n, H, I].
        metric: float32 [H, H], G; without, the identity.

    Returns:
        float32 [n, 2I, 2I].
    """
    inner = down.shape[2]
    weighed = down if metric is None else torch.bmm(metric.expand(down.shape[0], -1, -1), down)
    outputs = torch.bmm(down.transpose(1, 2), weighed)
    slopes.unflatten(2, (2, inner)).unflatten(1, (2, inner)).mul_(outputs.unsqueeze(2).unsqueeze(1))
    return slopes


def corrected(weight: torch.Tensor, crossed: torch.Tensor, factor: Factor) -> torch.Tensor:
    """What stacked weights W should be where they read rounded inputs Y in place of X: float32 [n, out, in].

    E|W X - V Y|^2 is least for V = W E[X Y^T] H^-1 with H = E[Y Y^T] (as in GPTAQ, arXiv 2504.02692), which is
    W + W C H^-1 with C = E[(X - Y) Y^T].

    Args:
        weight: float32 [n, out, in]; overwritten.
        crossed: float32 [n, in, in], C.
        factor: of H. Where it does not compensate, and of what is no number, W stays as it is.
    """
    order = factor.order.unsqueeze(1).expand_as(weight)
    pull = torch.bmm(weight, crossed).gather(2, order)
    pull = torch.linalg.solve_triangular(
        factor.unit_lower.transpose(1, 2), pull, upper=True, left=False, unitriangular=True
    )
    pull.div_((factor.pivots.gather(1, factor.order) * factor.unit.unsqueeze(1)).unsqueeze(1))
    pull = torch.linalg.solve_triangular(factor.unit_lower, pull, upper=False, left=False, unitriangular=True)
    usable = factor.compensates & torch.isfinite(pull).all(2).all(1)
    pull.masked_fill_(~usable.view(-1, 1, 1), 0.0)
    return weight.scatter_add_(2, order, pull)


def searched_scale(
    weight: torch.Tensor, importance: torch.Tensor, group_size: int, whole: int | None = None
) -> torch.Tensor:
    """Group scales under which rounding to nearest changes the weighted squares least: bfloat16 [n, out, in/group].

    Args:
        weight: float32 [n, out, in].
        importance: float32 [n, in], weights of the squares: the diagonal of the inputs' second moments.
        whole: numbers of one of the matrices, where these are some of their rows.

    All are positive. With equal squares the larger share of max|w| wins; where no share gives a number, it is 1.
    """
    match way_of_columns(weight, whole):
        case Way.NUMBA:
            from mmq.tensors import compiled

            return compiled.searched_scale(weight, importance, group_size, SHARES)
        case Way.TRITON if group_size & (group_size - 1) == 0:
            from mmq.tensors.fused import rounding

            return rounding.searched_scale(weight, importance, group_size, SHARES)
    return torch.cat([_searched(tile, importance, group_size) for tile in _tiles(weight)], 1)


def _searched(weight: torch.Tensor, importance: torch.Tensor, group_size: int) -> torch.Tensor:
    groups = weight.unflatten(-1, (-1, group_size))
    factors = importance.unflatten(-1, (-1, group_size)).unsqueeze(1)
    largest = torch.maximum(groups.amax(-1), groups.amin(-1).neg_()) / HALF_RANGE
    found = stored_scale(largest, torch.bfloat16)
    best = torch.full_like(largest, torch.inf)
    for share in SHARES:
        scale = stored_scale(largest * share, torch.bfloat16)
        step = scale.float().unsqueeze(-1)
        rounded = (groups / step).round_().clamp_(Q_MIN, Q_MAX).mul_(step)
        error = rounded.sub_(groups).square_().mul_(factors).sum(-1)
        better = error < best
        found = torch.where(better, scale, found)
        best = torch.where(better, error, best)
    return found


def _tiles(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Some rows of [n, out, in] at a time, on a CPU as many as stay in its cache."""
    count, rows, columns = weight.shape
    return iter(weight.split(max(1, CPU_TILE // (count * columns)) if weight.device.type == "cpu" else rows, 1))


def round_compensated(
    weight: torch.Tensor, factor: Factor, scale: torch.Tensor, group_size: int, whole: int | None = None
) -> QuantizedStack:
    """Round stacked weights, each column from what the ones before it left over.

    Args:
        weight: float32 [n, out, in].
        factor: of the second moments of the weights' inputs.
        scale: bfloat16 [n, out, in/group], positive.
        whole: numbers of one of the matrices, where these are some of their rows.
    """
    stack, _ = _by_columns(weight, factor, scale, group_size, whole)
    return stack


def round_twice(
    weight: torch.Tensor, factor: Factor, scale: torch.Tensor, group_size: int, whole: int | None = None
) -> QuantizedStack:
    """`round_compensated`, and again by scales that are searched for what columns were rounded from the first time.

    That is not the weights, by which scales were found: errors made up for add to them. Rounded from c, a row loses
    `sum of pivots_j (c_j - q_j)^2`; of each row, what loses less is kept.
    """
    first, aims = _by_columns(weight, factor, scale, group_size, whole)
    anew = searched_scale(aims, factor.pivots, group_size, whole)
    loss = _row_losses(aims, first, factor)
    second, aims = _by_columns(weight, factor, anew, group_size, whole)
    better = _row_losses(aims, second, factor) < loss
    return QuantizedStack(
        torch.where(better, second.values, first.values), torch.where(better, second.scale, first.scale), group_size
    )


def _row_losses(aims: torch.Tensor, stack: QuantizedStack, factor: Factor) -> torch.Tensor:
    """trace((Q - W) H (Q - W)^T) of each row, by what it was rounded from; overwritten: float32 [n, out, 1]."""
    return aims.sub_(stack.dequantize(torch.float32)).square_().mul_(factor.pivots.unsqueeze(1)).sum(2, keepdim=True)


def _by_columns(
    weight: torch.Tensor, factor: Factor, scale: torch.Tensor, group_size: int, whole: int | None
) -> tuple[QuantizedStack, torch.Tensor]:
    """`round_compensated`, and what each column was rounded from: float32 [n, out, in]."""
    order = factor.order.unsqueeze(1).expand_as(weight)
    # From here on in the factor's order. What is left of a column becomes its error once it is rounded.
    left = weight.gather(2, order)
    aims, codes = left.clone(), torch.empty_like(left, dtype=torch.int8)
    steps = scale.float().gather(2, order.div(group_size, rounding_mode="floor"))
    round_columns = _columns_by(weight, whole)
    for stop in range(left.shape[2], 0, -COLUMNS):
        part = slice(max(0, stop - COLUMNS), stop)
        aim = aims[:, :, part]
        if stop < left.shape[2]:
            aim.baddbmm_(left[:, :, stop:], factor.unit_lower[:, stop:, part])
        round_columns(aim, factor.unit_lower[:, part, part], steps[:, :, part], left[:, :, part], codes[:, :, part])
    values = torch.empty_like(codes).scatter_(2, order, codes)
    return QuantizedStack(values, scale, group_size), left.scatter_(2, order, aims)


def _columns_by(weight: torch.Tensor, whole: int | None = None) -> Callable[..., None]:
    """`_round_columns`, or what takes its place."""
    match way_of_columns(weight, whole):
        case Way.NUMBA:
            from mmq.tensors import compiled

            return compiled.round_columns
        case Way.TRITON:
            from mmq.tensors.fused import rounding

            return rounding.round_columns
    return _round_columns


def _round_columns(
    aim: torch.Tensor, lower: torch.Tensor, scale: torch.Tensor, left: torch.Tensor, codes: torch.Tensor
) -> None:
    """Round the columns of one block, the last one first, passing each one's error on to those before it.

    Args:
        aim: float32 [n, out, b], what to round but for the errors within the block; becomes what was rounded.
        lower: float32 [n, b, b], the factor's part.
        scale: float32 [n, out, b].
        left: float32 [n, out, b], the weights; becomes their errors.
        codes: int8 [n, out, b], the result.
    """
    for column in range(aim.shape[2] - 1, -1, -1):
        step = scale[:, :, column]
        code = (aim[:, :, column] / step).round_().clamp_(Q_MIN, Q_MAX)
        codes[:, :, column] = code.to(torch.int8)
        error = left[:, :, column].sub_(code * step)
        if column:
            aim[:, :, :column] += error.unsqueeze(2) * lower[:, column, :column].unsqueeze(1)


def descend(
    weight: torch.Tensor, moments: torch.Tensor, factor: Factor, stack: QuantizedStack, whole: int | None = None
) -> QuantizedStack:
    """One sweep of coordinate descent on trace((Q - W) H (Q - W)^T), from a rounding on: it rises nowhere.

    Group by group: the scale of a row's group by least squares, rounded to bf16 and taken where that helps, then codes,
    each with all others fixed and the one that helps most first, then two codes at a time.

    Args:
        weight: float32 [n, out, in], what was rounded; overwritten.
        moments: float32 [n, in, in], H, as `factorize` left it; where the factor does not compensate, nothing changes.
        stack: the rounding of `weight`.
        whole: numbers of one of the matrices, where these are some of their rows.

    Source: QuantEase (arXiv 2309.01885) for the codes.
    """
    size = stack.group_size
    descend_group = _groups_by(weight, size, whole)
    values, scales = stack.values.clone(), stack.scale.clone()
    error = weight.sub_(stack.dequantize(torch.float32))
    for group in range(scales.shape[2]):
        part = slice(group * size, (group + 1) * size)
        # Of the trace, half of the slope by each quantized weight, downward.
        slope = torch.bmm(error, moments[:, :, part])
        descend_group(slope, moments[:, part, part], error[:, :, part], values[:, :, part], scales[:, :, group])
    compensates = factor.compensates.view(-1, 1, 1)
    return QuantizedStack(
        torch.where(compensates, values, stack.values), torch.where(compensates, scales, stack.scale), size
    )


def _groups_by(weight: torch.Tensor, group_size: int, whole: int | None) -> Callable[..., None]:
    """`_descend_group`, or what takes its place."""
    match way_of_columns(weight, whole):
        case Way.NUMBA:
            from mmq.tensors import compiled

            return partial(compiled.descend_group, tries=TRIES, slack=SLACK)
        case Way.TRITON if group_size >= 16 and group_size & (group_size - 1) == 0:
            from mmq.tensors.fused import rounding

            return partial(rounding.descend_group, tries=TRIES, slack=SLACK)
    return _descend_group


def _descend_group(
    slope: torch.Tensor, own: torch.Tensor, error: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor
) -> None:
    """One group of the sweep.

    Args:
        slope: float32 [n, out, g], the errors of all columns times H's columns of the group; overwritten.
        own: float32 [n, g, g], H's part.
        error: float32 [n, out, g], of the group's weights; become those that are left.
        codes: int8 [n, out, g]; become what they are changed to.
        scale: bfloat16 [n, out], as well.
    """
    code, step = codes.float(), scale.float()
    curved = torch.bmm(code, own)
    by_scale, curvature = (slope * code).sum(-1), (curved * code).sum(-1)
    found = (step + by_scale / curvature).to(torch.bfloat16).float()
    change = found - step
    # NaN, of a group of zeros, is no gain.
    gain = (found >= torch.finfo(torch.bfloat16).tiny) & (change * (2 * by_scale - change * curvature) > 0)
    change = torch.where(gain, change, 0.0).unsqueeze(2)
    step = torch.where(gain, found, step)
    scale.copy_(step)
    step = step.unsqueeze(2)
    slope.sub_(change * curved).div_(step)
    # The weights, for a moment.
    error += code * (step - change)
    _settle(slope, own, code)
    codes.copy_(code)
    error -= code * step


def _settle(slope: torch.Tensor, own: torch.Tensor, code: torch.Tensor) -> None:
    """Move codes by one while that takes something off the loss, then pairs of them.

    Moving code j by d = 1 or -1 takes 2 d slope_j - H_jj off it, in units of the scale's square, and d H_j off the
    slope.

    Args:
        slope: float32 [n, out, g], half of the loss's, downward, by each code; overwritten.
        own: float32 [n, g, g], H's part.
        code: float32 [n, out, g]; become what they are moved to.
    """
    least = (1 + SLACK) * own.diagonal(dim1=1, dim2=2)

    def gains(slope: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of moving each code as its slope has it, and which way that is."""
        way = torch.where(slope < 0, -1.0, 1.0)
        after = code + way
        gain = 2 * slope.abs() - least.view(len(own), *(1,) * (slope.dim() - 2), -1)
        return torch.where((after >= Q_MIN) & (after <= Q_MAX), gain, -torch.inf), way

    def moved(place: torch.Tensor, way: torch.Tensor) -> torch.Tensor:
        """What the slope [n, out, g] loses by moves of codes [n, out, k]: [n, out, k, g]."""
        rows = own.gather(1, place.flatten(1).unsqueeze(2).expand(-1, -1, own.shape[2]))
        return rows.unflatten(1, place.shape[1:]) * way.unsqueeze(3)

    for _ in range(code.shape[2]):
        gain, way = gains(slope, code)
        most, place = gain.max(2, keepdim=True)
        if not bool((most > 0).any()):
            break
        way = torch.where(most > 0, way.gather(2, place), 0.0)
        code.scatter_add_(2, place, way)
        slope -= moved(place, way).squeeze(2)
    # No move gains by itself now, and none by more than this because of another.
    reach = 2 * (own - torch.diag_embed(own.diagonal(dim1=1, dim2=2))).abs().amax(2).unsqueeze(1)
    untried = torch.ones_like(code, dtype=torch.bool)
    rank = torch.arange(min(TRIES, code.shape[2]), device=code.device)
    left = rank.new_full((*code.shape[:2], 1), len(rank))
    while len(rank):
        gain, way = gains(slope, code)
        gain = torch.where(untried & (gain + reach > 0), gain, -torch.inf)
        first, one = (part[:, :, : len(rank)] for part in gain.sort(dim=2, descending=True, stable=True))
        way = way.gather(2, one)
        slopes = slope.unsqueeze(2) - moved(one, way)
        gain, back = gains(slopes, code.unsqueeze(2))
        second, other = gain.scatter_(3, one.unsqueeze(3), -torch.inf).max(3)
        helps = (first + second > 0) & (rank < left)
        found, place = helps.max(2, keepdim=True)
        if not bool(found.any()):
            break
        # Of each row the first that helps; those before it were tried in vain.
        untried.scatter_(2, one, untried.gather(2, one) & (rank > place))
        left = torch.where(found, left - place - 1, 0)
        one, other = one.gather(2, place), other.gather(2, place)
        way = torch.where(found, way.gather(2, place), 0.0)
        back = back.gather(2, place.unsqueeze(3).expand(-1, -1, -1, back.shape[3])).squeeze(2).gather(2, other)
        back = torch.where(found, back, 0.0)
        slope -= moved(one, way).squeeze(2)
        slope -= moved(other, back).squeeze(2)
        code.scatter_add_(2, one, way).scatter_add_(2, other, back)


def round_rows(
    weight: torch.Tensor,
    factor: Factor,
    scale: torch.Tensor,
    group_size: int,
    round_some: Callable[[torch.Tensor, torch.Tensor], QuantizedStack],
) -> QuantizedStack:
    """Round stacked weights some rows at a time, each from what the rows before it left over.

    Args:
        weight: float32 [n, out, in].
        factor: of second moments [n, out, out] of the gradients at the outputs, or of one for all.
        scale: bfloat16 [n, out, in/group].
        round_some: rounds rows float32 [n, r, in], which it may overwrite, by group scales like these.
    """
    order = factor.order.unsqueeze(2).expand(weight.shape[0], -1, -1)
    # In the factor's order. What is left of a row becomes its error once it is rounded.
    left, scales = weight.gather(1, order.expand_as(weight)), scale.gather(1, order.expand_as(scale))
    lower = factor.unit_lower.transpose(1, 2).expand(weight.shape[0], -1, -1)
    values, found = torch.empty_like(left, dtype=torch.int8), torch.empty_like(scales)
    height = max(ROWS, -(-left.shape[1] // ROW_BLOCKS))
    for stop in range(left.shape[1], 0, -height):
        part = slice(max(0, stop - height), stop)
        aim = torch.baddbmm(left[:, part], lower[:, part, stop:], left[:, stop:])
        stack = round_some(aim, scales[:, part])
        left[:, part] -= stack.dequantize(torch.float32)
        values.scatter_(1, order[:, part].expand_as(stack.values), stack.values)
        found.scatter_(1, order[:, part].expand_as(stack.scale), stack.scale)
    return QuantizedStack(values, found, group_size)
