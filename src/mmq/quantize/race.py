"""Finding the best point of a grid on as few tokens as decide it.

Points lie on lines, ratios in ascending order; the loss along a line changes smoothly. Tokens come in shares, each an
even sample of all. On the first share every third point of a line is measured, then those beside the line's best and
beside points that are not surely worse than the best of all, until there are none; the points that are left go on to
the next share, and so on until one is left or the tokens are used up.

Two points are compared on the tokens that both have seen, token by token, since what makes a token's loss large makes
it large for both. With d the n differences, a point is surely worse when

    mean(d) > SURE * sqrt(var(d) / n * (1 - n / N))

The last factor is the sampling of n out of N tokens without replacement: with all of them seen, the mean alone decides.
At SURE = 3 a point that is in truth the better one is dropped in about one of 700 comparisons if the differences of a
share's tokens are independent; points so close to each other that this matters have losses within a fraction of a
percent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

SURE = 3.0
# Parts of the tokens, and the least number of rows to an expert that a part is worth quantizing its weights for.
PARTS, LEAST_ROWS = (1 / 8, 1 / 8, 1 / 4, 1 / 2), 32
# Points of a line from one that is measured first to the next.
COARSE = 3


@dataclass
class Runner:
    """A point of the grid in the race.

    Attributes:
        losses: float32 [t] of each share's tokens that it has seen.
        dropped: after which share it was surely worse; None where it never was.
    """

    losses: list[torch.Tensor] = field(default_factory=list)
    dropped: int | None = None

    @property
    def seen(self) -> int:
        """Tokens."""
        return sum(part.numel() for part in self.losses)

    @property
    def loss(self) -> float:
        """Mean over the tokens seen; infinity where it is not a number."""
        total = sum(float(part.sum(dtype=torch.float64)) for part in self.losses)
        return total / self.seen if total == total else float("inf")


@dataclass(frozen=True)
class Outcome:
    """A race's end.

    Attributes:
        best: the winner's place in the grid.
        runners: by place in the grid; points that were never measured are missing.
    """

    best: int
    runners: dict[int, Runner]


def race(
    lines: Sequence[Sequence[int]],
    shares: int,
    tokens: int,
    measure: Callable[[int, int], torch.Tensor],
    stride: int = COARSE,
) -> Outcome:
    """The point of least mean loss; of equal ones the first.

    Args:
        lines: points by their places in the grid, along which the loss changes smoothly. The ends are always measured;
            the identity, the grid's first point, is one.
        shares: in how many the tokens come.
        tokens: how many there are in all.
        measure: losses float32 [t] of a point on the tokens of a share.
        stride: points of a line from one that is measured first to the next.
    """
    runners: dict[int, Runner] = {}

    def look(points: Sequence[int]) -> None:
        for point in points:
            runners[point] = Runner([measure(point, 0)])

    def drop(share: int) -> None:
        running = [point for point in runners if runners[point].dropped is None]
        best = min(running, key=lambda point: (runners[point].loss, point))
        for point in running:
            if point != best and surely_worse(runners[point], runners[best], tokens):
                runners[point].dropped = share

    look(list(dict.fromkeys(point for line in lines for point in [*line[:-1:stride], line[-1]])))
    drop(0)
    while new := beside(lines, runners):
        look(new)
        drop(0)
    for share in range(1, shares):
        running = [point for point in runners if runners[point].dropped is None]
        if len(running) == 1:
            break
        for point in running:
            runners[point].losses.append(measure(point, share))
        drop(share)
    running = [point for point in runners if runners[point].dropped is None]
    return Outcome(min(running, key=lambda point: (runners[point].loss, point)), runners)


def parts(rows_per_expert: float) -> tuple[float, ...]:
    """How to share out tokens that are so many rows to an expert on average."""
    found = list(PARTS)
    while len(found) > 1 and found[0] * rows_per_expert < LEAST_ROWS:
        found[:2] = [found[0] + found[1]]
    return tuple(found)


def beside(lines: Sequence[Sequence[int]], runners: dict[int, Runner]) -> list[int]:
    """Points not measured yet that lie, with no measured one between, beside one that is still running, or beside the
    best of their line."""
    found: list[int] = []
    for line in lines:
        known = [place for place, point in enumerate(line) if point in runners]
        best = min(known, key=lambda place: runners[line[place]].loss)
        for left, right in pairwise(known):
            if best in (left, right) or any(runners[line[place]].dropped is None for place in (left, right)):
                found += line[left + 1 : right]
    return found


def surely_worse(one: Runner, other: Runner, tokens: int) -> bool:
    """Whether a point's loss is above another's on all tokens, as far as those tell that both have seen."""
    pairs = zip(one.losses, other.losses, strict=False)
    difference = torch.cat([a.double() - b.double() for a, b in pairs])
    n = difference.numel()
    mean = float(difference.mean())
    if not torch.isfinite(difference).all():
        return one.loss > other.loss
    if n < 2:
        return False
    error = float(difference.std()) / n**0.5 * (1 - n / tokens) ** 0.5
    return mean > SURE * error
