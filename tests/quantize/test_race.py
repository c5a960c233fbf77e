"""The race of grid points against measuring all of them on all tokens."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

import stock_awq
from bench_race import heavy_tailed
from conftest import DEVICE
from mmq.families.minimax_m2 import MINIMAX_M2
from mmq.quantize.race import PARTS, Runner, parts, race, surely_worse
from mmq.quantize.routed_experts import ExpertBlock, Weights, sampled
from mmq.quantize.search import StackedAWQModifier, awq_mappings, lines


def make_block(seed: int, shares: tuple[float, ...], tokens: int = 2048) -> ExpertBlock:
    spread, outliers = (0.3, 0.7, 1.0)[seed % 3], (2.0, 12.0, 30.0)[seed // 3 % 3]
    layer = stock_awq.random_layer(8, 256, 128, torch.bfloat16, DEVICE, seed, spread=spread, outliers=outliers)
    x, index, weight = stock_awq.block_inputs(layer, heavy_tailed(tokens, 256, seed).to(DEVICE), 2)
    return ExpertBlock(x, index, weight, layer.gate_up, layer.down, ACT2FN["silu"], stock_awq.GROUP_SIZE, parts=shares)


@pytest.mark.parametrize("duo_scaling", [True, False, "both"])
@pytest.mark.parametrize("seed", range(3))
def test_the_point_is_that_of_the_full_search(duo_scaling: bool | str, seed: int) -> None:
    """`scripts/bench_race.py` does this a hundred times and more."""
    modifier = StackedAWQModifier(mappings=awq_mappings(MINIMAX_M2), duo_scaling=duo_scaling, n_grid=20)
    blocks = make_block(seed, PARTS), make_block(seed, (1.0,))
    paired, full = (
        modifier.search_norm(block, block.outputs(Weights(block)), full)
        for block, full in zip(blocks, (False, True), strict=True)
    )
    assert torch.equal(paired.ratio, full.ratio) and torch.equal(paired.duo, full.duo)
    assert torch.equal(paired.scales, full.scales)
    assert len(full.points) == 20 and all(point.tokens == 2048 for point in full.points)
    assert sum(point.tokens for point in paired.points) < 20 * 2048 / 2
    dropped = [point for point in paired.points if point.dropped is not None]
    assert dropped and all(point.tokens < 2048 or point.dropped == len(PARTS) - 1 for point in dropped)


def test_a_race_of_made_up_losses() -> None:
    """One line with its least loss between coarse points, and another whose points are all far worse."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.rand(size, generator=generator) + 0.5 for size in (100, 300, 400)]
    loss = {place: 1 + 0.1 * abs(place - 7) for place in range(12)} | dict.fromkeys(range(12, 16), 9.0)
    asked = []

    def measure(point: int, share: int) -> torch.Tensor:
        asked.append((point, share))
        return loss[point] * tokens[share]

    outcome = race([list(range(12)), list(range(12, 16))], 3, 800, measure)
    assert outcome.best == 7
    assert len(set(asked)) == len(asked)
    # Coarse ones first, then those beside the best; one that is alone needs no more tokens.
    assert [point for point, _ in asked[:6]] == [0, 3, 6, 9, 11, 12]
    assert {share for _, share in asked} == {0}
    assert outcome.runners[0].dropped == 0 and outcome.runners[7].dropped is None
    assert {1, 2} & {point for point, _ in asked} == set()


def test_equal_points_are_decided_by_their_place_after_all_tokens() -> None:
    outcome = race([[0, 1, 2, 3]], 3, 40, lambda point, share: torch.full(((10, 10, 20)[share],), 1.0 + (point == 2)))
    assert outcome.best == 0
    assert outcome.runners[3].seen == 40 and outcome.runners[2].seen == 10


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_a_point_with_losses_that_are_no_numbers_loses(odd: float) -> None:
    outcome = race([[0, 1, 2, 3]], 2, 20, lambda point, share: torch.full((10,), odd if point < 3 else 2.0))
    assert outcome.best == 3 and outcome.runners[0].dropped == 0


def test_all_odd_gives_the_identity() -> None:
    assert race([[0, 1, 2, 3]], 2, 20, lambda point, share: torch.full((10,), torch.nan)).best == 0


def test_surely_worse_by_hand() -> None:
    one, other = Runner([torch.tensor([2.0, 4.0, 3.0, 3.0])]), Runner([torch.tensor([1.0, 2.0, 1.0, 0.0])])
    # Differences 1, 2, 2, 3: mean 2, deviation 0.8165, error 0.4082 without and 0.2887 with half of the tokens seen.
    assert surely_worse(one, other, 10**9)
    assert not surely_worse(Runner([other.losses[0] + torch.tensor([0.0, 0, 2, 2])]), other, 10**9)
    # With all tokens seen the mean decides.
    assert surely_worse(Runner([other.losses[0] + torch.tensor([0.0, 0, 0, 0.1])]), other, 4)
    assert not surely_worse(other, one, 4)
    # Only what both have seen counts.
    assert surely_worse(one, Runner([*other.losses, torch.full((4,), 100.0)]), 10**9)


def test_shares_are_even_samples() -> None:
    shares = sampled(10_000, PARTS, torch.device("cpu"))
    assert torch.equal(torch.cat(shares).sort().values, torch.arange(10_000))
    for tokens, part in zip(shares, PARTS, strict=True):
        assert tokens.numel() == pytest.approx(part * 10_000, abs=3)
        # Of any hundred tokens in a row about the same number.
        counts = torch.bincount(tokens // 100, minlength=100)
        assert (counts - 100 * part).abs().max() <= 3


def test_few_rows_make_few_shares() -> None:
    assert parts(10_000) == PARTS
    assert parts(100) == (0.5, 0.5)
    assert parts(10) == (1.0,)


def test_lines_hold_every_point_once() -> None:
    for duo_scaling in (True, False, "both"):
        grid = StackedAWQModifier(
            mappings=awq_mappings(MINIMAX_M2), duo_scaling=duo_scaling, n_grid=20
        )._get_grid_search_params()
        found = lines(grid)
        assert sorted(point for line in found for point in line) == list(range(len(grid)))
        for line in found:
            assert [grid[point] for point in line] == sorted(grid[point] for point in line)
            assert len({grid[point][1] for point in line}) == 1
