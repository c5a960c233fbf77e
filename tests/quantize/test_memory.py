"""Working memory of the search, allocation by allocation, against the budget that the recipe gives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers.activations import ACT2FN

import mmq.quantize.routed_experts
import stock_awq
from mmq.families.minimax_m2 import MINIMAX_M2
from mmq.quantize.layer import LayerQuantizer
from mmq.quantize.race import PARTS
from mmq.quantize.rounding import Compensation, Fisher, Rounded, Smoothing, judge
from mmq.quantize.routed_experts import ExpertBlock, SmoothedGateUp, Weights, top_up
from mmq.quantize.search import StackedAWQModifier, awq_mappings
from mmq.recipe import Awq
from mmq.tensors.int4 import fake_quantize_scaled

# Small tensors that no budget counts: scales, counts, a token's sums.
SLACK = 2**18


@dataclass(frozen=True)
class Shape:
    experts: int
    hidden: int
    intermediate: int
    tokens: int
    top_k: int
    min_tokens: int

    @property
    def least(self) -> int:
        """What one expert and the order of the rows take; see ExpertBlock.working_memory."""
        return 14 * 2 * self.intermediate * self.hidden + 24 * self.tokens * self.top_k


# More rows than I to an expert, so that second moments are kept, and fewer. Most tokens top up.
SHAPES = [Shape(8, 512, 128, 1600, 2, 1500), Shape(6, 256, 512, 900, 2, 400)]


def peak(function: Callable[[], Any]) -> tuple[int, int, Any]:
    """Most bytes that torch held at one time beyond what it held before, what it still holds, and the result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    assert profiler.profiler is not None
    found = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(found, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most, held, result


def make_block(shape: Shape, budget: int, rare: float = 0.9) -> ExpertBlock:
    """A random block; the first expert is hardly ever chosen."""
    generator = torch.Generator().manual_seed(0)
    layer = stock_awq.random_layer(shape.experts, shape.hidden, shape.intermediate, torch.bfloat16, torch.device("cpu"))
    x = torch.randn(shape.tokens, shape.hidden, generator=generator).to(torch.bfloat16)
    scores = torch.rand(shape.tokens, shape.experts, generator=generator)
    scores[:, 0] -= rare
    index = scores.topk(shape.top_k).indices.sort(1).values
    weight = scores.gather(1, index)
    extra = top_up(scores, index, shape.min_tokens)
    return ExpertBlock(
        x, index, weight, layer.gate_up, layer.down, ACT2FN["silu"], stock_awq.GROUP_SIZE, extra, budget, PARTS
    )


def test_the_measurement_sees_what_is_freed_in_between() -> None:
    def work() -> torch.Tensor:
        return (torch.zeros(2**18) + 1).sum(0, keepdim=True)

    most, held, result = peak(work)
    assert 2 * 2**20 <= most < 2 * 2**20 + 4096
    assert held < 4096 and float(result) == 2**18


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.experts}x{shape.hidden}x{shape.intermediate}")
@pytest.mark.parametrize("budget", [2, 4, 16, 48], ids=lambda mebibytes: f"{mebibytes}MiB")
def test_the_search_stays_within_its_budget(shape: Shape, budget: int) -> None:
    """Beyond the layer's tensors, hidden states and results; below one expert's need no budget can be kept."""
    allowed = max(budget * 2**20, shape.least) + SLACK
    block = make_block(shape, budget * 2**20)
    modifier = StackedAWQModifier(mappings=awq_mappings(MINIMAX_M2), duo_scaling=True, n_grid=3)
    quantizer = object.__new__(LayerQuantizer)
    quantizer.arch, quantizer.settings = MINIMAX_M2, cast(Awq, SimpleNamespace(group_size=stock_awq.GROUP_SIZE))
    # What the block itself keeps: the order of the rows, their inputs, and room for outputs.
    rebuild = (
        block.x, block.index, block.weight, block.gate_up, block.down, block.activation, block.group_size, block.extra,
        block.budget, block.parts,
    )  # fmt: skip
    most, own, _ = peak(lambda: ExpertBlock(*rebuild))
    assert most <= allowed
    sums = block.x.numel() * 4
    most, _, reference = peak(lambda: block.outputs(Weights(block)))
    found = {"output": most - sums}
    most, _, norm = peak(lambda: modifier.search_norm(block, reference))
    found["search_norm"] = most - sums
    found["search_down"], _, down = peak(lambda: modifier.search_down(block))
    most, tensors, _ = peak(lambda: quantizer._quantize_experts(0, block, norm.scales, down.scales))
    found["quantize"] = most - tensors
    assert all(own + bytes_ <= allowed for bytes_ in found.values()), (own, found, allowed)
    # Not by doing without: what a larger budget is for is used.
    assert budget < 48 or max(found.values()) > 2 * 2**20


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.experts}x{shape.hidden}x{shape.intermediate}")
@pytest.mark.parametrize("budget", [8, 48], ids=lambda mebibytes: f"{mebibytes}MiB")
def test_compensated_rounding_stays_within_its_budget(shape: Shape, budget: int) -> None:
    """Beyond what it returns, the judging tokens and their sums, and two more bytes a pair of weights for its results.

    Half of the budget is for a step's experts; below one expert's need no budget can be kept.
    """
    block = make_block(shape, budget * 2**20)
    reference = block.outputs(Weights(block))
    fit = Compensation(block, torch.arange(shape.tokens), shape.tokens)
    least = Compensation.least(shape.hidden, shape.intermediate)
    smoothing = Smoothing(torch.full((shape.hidden,), 2.0), torch.full((shape.experts, shape.intermediate), 0.5))
    results = [Rounded(block, smoothing) for _ in range(2)]
    most, *_ = peak(lambda: fit.fit(results, torch.ones(shape.experts, dtype=torch.bool)))
    assert most <= max(budget * 2**20, least) + SLACK
    assert fit.step == shape.experts // 8 or fit.step * least <= budget * 2**19 or fit.step == 1
    lengths, gradients = [shape.tokens // 10] * 10, torch.randn(shape.tokens, shape.hidden)
    # Two ways, four bits a weight and two bytes a group.
    packed = 2 * (block.gate_up.numel() + block.down.numel()) * (64 + 2) // 128
    for fisher in (None, Fisher(gradients.T @ gradients, gradients.norm(dim=1)))[: 2 if budget == 8 else 1]:
        most, _, verdict = peak(
            lambda fisher=fisher: judge(block, reference, lengths, shape.tokens, smoothing, fisher=fisher)
        )
        # With a gradient's moments, errors and what they cost as well, and the moments, factorized.
        judging = shape.tokens // 10 * shape.hidden * (2 + 4 + 4 if fisher is None else 2 + 4 + 12)
        matrices = 0 if fisher is None else 16 * shape.hidden**2
        assert most <= packed + judging + matrices + max(budget * 2**20, least) + SLACK
        ways = {f"{name}{way}" for name in ("", "smoothed_") for way in ("nearest", "probe")}
        (rest,) = verdict.statistics["losses"].keys() - ways
        assert rest in ("compensated", "smoothed_compensated")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.experts}x{shape.hidden}x{shape.intermediate}")
@pytest.mark.parametrize("budget", [56, 100], ids=lambda mebibytes: f"{mebibytes}MiB")
def test_threads_share_the_budget(shape: Shape, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them at once: torch's account is of one thread, so one's steps are counted for each."""
    monkeypatch.setattr(mmq.quantize.routed_experts, "CPU_STEP_ELEMENTS", 2**17)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    block = make_block(shape, budget * 2**20)
    assert block.workers > 1
    modifier = StackedAWQModifier(mappings=awq_mappings(MINIMAX_M2), duo_scaling=True, n_grid=3)
    point = SmoothedGateUp(block, torch.ones(shape.hidden))
    share = block.shares[-1]
    batch = max((batches[0] for batches in share.batches), key=lambda batch: len(batch.pieces))
    assert len(batch.pieces) > 1
    outputs = torch.empty(batch.rows, shape.hidden, dtype=torch.bfloat16)
    steps = [lambda: modifier._search_down(block, 0, block.step)]
    steps += [partial(block._step, share, point, outputs, batch.start, piece) for piece in batch.pieces]
    most = max(peak(step)[0] for step in steps)
    # An eighth for the experts of all steps, a quarter for a batch's rows.
    assert block.workers * most <= block.working_memory * 3 // 8 + SLACK


def test_budgets_of_the_test_part_the_work() -> None:
    """Or the test above would show nothing: steps, their rows and the rows that top up are all cut by some budget."""
    small, large = (make_block(SHAPES[0], budget * 2**20) for budget in (2, 48))
    assert small.step < large.step
    assert max(map(len, small.shares[-1].batches)) > 1 == max(map(len, large.shares[-1].batches))
    assert small.extra is not None and len(list(small.extra.pieces(0, 1, small.most_rows))) > 1


def test_rows_cut_into_pieces_are_the_same_rows() -> None:
    rows = make_block(SHAPES[1], 2**20).shares[0].rows
    whole = [tokens.tolist() for tokens in rows.token.split(rows.counts)]
    for size in (1, 7, 10_000):
        for step in (1, 4, len(whole)):
            parts: list[list[int]] = [[] for _ in whole]
            for first in range(0, len(whole), step):
                for piece in rows.pieces(first, min(first + step, len(whole)), size):
                    assert piece.stop - piece.start <= size and int(piece.ends[-1]) == piece.stop - piece.start
                    begin = piece.start
                    for expert, end in enumerate((piece.ends + piece.start).tolist(), piece.first):
                        parts[expert] += rows.token[begin:end].tolist()
                        begin = end
            assert parts == whole


@pytest.mark.parametrize("search", ["full", "paired"])
def test_no_weight_is_quantized_twice_for_want_of_memory(search: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A count, for budgets from all at once to one expert's rows in dozens of parts."""
    counts = []

    def counted(weight: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        counts[-1] += weight.numel()
        return fake_quantize_scaled(weight, *arguments, **options)

    monkeypatch.setattr(mmq.quantize.routed_experts, "fake_quantize_scaled", counted)
    modifier = StackedAWQModifier(mappings=awq_mappings(MINIMAX_M2), duo_scaling=True, n_grid=8)
    for budget in (64, 16, 4, 1):
        # An expert without rows in a share is not quantized for it, unless beside others.
        block = make_block(SHAPES[0], budget * 2**20, rare=0.5)
        assert all(min(share.rows.counts) for share in block.shares)
        counts.append(0)
        found = modifier.search_norm(block, block.outputs(Weights(block)), search == "full")
    assert len(set(counts)) == 1
    # Once for every point and share that was measured.
    edges = [sum(share.tokens.numel() for share in block.shares[: number + 1]) for number in range(len(block.shares))]
    measured = sum(edges.index(point.tokens) + 1 for point in found.points)
    assert counts[0] == measured * block.gate_up.numel()
    assert (
        measured == 8 * len(PARTS)
        if search == "full" and not any(p.dropped is not None for p in found.points)
        else True
    )
