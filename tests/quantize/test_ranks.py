"""Several ranks quantize a layer: each a thread here, with the collectives' meaning and none of their network."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import pytest
import torch

import mmq.quantize.rounding
from mmq.families.minimax_m2 import MINIMAX_M2
from mmq.machine.team import ALONE, Team
from mmq.quantize.layer import LayerContent, LayerQuantizer, LayerResult
from mmq.quantize.rounding import Fisher
from mmq.quantize.routed_experts import ExpertBlock, Rows, Weights
from mmq.recipe import Awq
from mmq.source.synth import Sizes, model_config

Result = TypeVar("Result")
CPU = torch.device("cpu")


class Board:
    """Where the ranks' threads put what they tell each other."""

    def __init__(self, size: int) -> None:
        self.size, self.said, self.barrier = size, [None] * size, Barrier(size, timeout=60)

    def say(self, rank: int, fact: Any) -> list[Any]:
        self.said[rank] = fact
        self.barrier.wait()
        facts = list(self.said)
        self.barrier.wait()
        return facts


class ThreadTeam(Team):
    """A rank that is a thread."""

    def __init__(self, rank: int, board: Board) -> None:
        super().__init__(rank, board.size)
        self.board = board

    def everyone(self, fact: Any) -> list[Any]:
        return [json.loads(said) for said in self.board.say(self.rank, json.dumps(fact))]

    def gather(self, own: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        parts = self.board.say(self.rank, own.clone())
        assert [len(part) for part in parts] == list(counts)
        return torch.cat(parts)

    def exchange(self, rows: torch.Tensor, sent: Sequence[int], received: Sequence[int], out: torch.Tensor) -> Any:
        parts = [split[self.rank] for split in self.board.say(self.rank, rows.clone().split(list(sent)))]
        assert [len(part) for part in parts] == list(received)
        torch.cat(parts, out=out)
        return self

    def wait(self) -> None: ...

    def _extreme(self, tensor: torch.Tensor, operation: Any) -> torch.Tensor:
        stack = torch.stack(self.board.say(self.rank, tensor.float()))
        result = stack.amax(0) if operation == torch.distributed.ReduceOp.MAX else stack.amin(0)
        return result.to(tensor.dtype)

    def at(self, where: str) -> None: ...


def by_ranks(size: int, work: Callable[[Team], Result]) -> list[Result]:
    """What each of so many ranks makes of the same work."""
    if size == 1:
        return [work(ALONE)]
    board = Board(size)

    def guarded(rank: int) -> Result:
        torch.set_grad_enabled(False)
        try:
            return work(ThreadTeam(rank, board))
        except BaseException:
            board.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(size)]
    return [future.result() for future in futures]


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_outputs_and_losses_are_those_of_one_rank(size: int, tokens: int) -> None:
    """Experts that don't divide by the ranks, one that no token chooses, fewer tokens than ranks, rows in pieces."""
    experts, hidden, inner, top_k = 11, 64, 32, 3
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    x, gate_up, down = normal(tokens, hidden), normal(experts, 2 * inner, hidden), normal(experts, hidden, inner)
    # Expert 4 gets none.
    scores = torch.rand(tokens, experts, generator=generator)
    scores[:, 4] = -1
    index = scores.topk(top_k, dim=1).indices.sort(dim=1).values
    weight = torch.rand(tokens, top_k, generator=generator)
    extra = Rows(torch.arange(min(tokens, 5)), [0] * 4 + [min(tokens, 5)] * 7, index[:0])
    wanted = torch.randn(tokens, hidden, generator=generator)
    chosen = torch.rand(tokens, generator=generator) < 0.3

    def work(team: Team) -> list[Any]:
        own = team.part(experts)
        part = slice(own.start, own.stop)
        block = ExpertBlock(
            x, index, weight, gate_up[part], down[part], torch.nn.functional.silu, 32, extra, 2**16, (0.25, 0.75),
            team,
        )  # fmt: skip
        outputs = block.outputs(Weights(block))
        references = [wanted[share.mine] for share in block.shares]
        losses = [
            block.losses(share, Weights(block), reference)
            for share, reference in zip(block.shares, references, strict=True)
        ]
        inputs = block.down_inputs(0, len(own))
        return [
            block.in_order(outputs),
            torch.cat(losses),
            block.in_order(references, chosen),
            team.gather_parts(inputs.sums, experts),
            team.gather_parts(inputs.squared_change(block.down), experts),
            block.counts,
        ]

    (expected,) = by_ranks(1, work)
    assert torch.equal(expected[2], wanted[chosen])
    for found in by_ranks(size, work):
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("rounding", ["nearest", "compensated", "compensated, weighed"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_layer_is_that_of_one_rank(rounding: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Sizes(layers=1, hidden=128, intermediate=64, experts=11, top_k=2, heads=2, kv_heads=1, head_dim=64)
    settings = Awq.model_validate(
        {
            "calibration": {"files": [{"path": "unused", "samples": 1}]},
            "rounding": rounding.partition(",")[0],
            "group_size": 32,
            "min_tokens": 24,
            "n_grid": 6,
            "device": "cpu",
        }
    )
    lengths = [40, 7, 40, 31, 12]
    content, hidden = random_layer(sizes, sum(lengths))
    fisher = None
    if rounding.endswith("weighed"):
        monkeypatch.setattr(mmq.quantize.rounding, "ENOUGH", 0)
        gradients = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        fisher = Fisher(gradients.T @ gradients / len(hidden), gradients.norm(dim=1))

    def work(team: Team) -> LayerResult:
        own = team.part(sizes.experts)
        part = LayerContent(
            content.gate_up[own.start : own.stop].clone(), content.down[own.start : own.stop].clone(), content.rest
        )
        return LayerQuantizer(
            MINIMAX_M2, model_config(sizes), settings, lengths, torch.arange(sum(lengths)), CPU, team=team
        ).quantize(0, part, hidden, fisher)

    (expected,) = by_ranks(1, work)
    ranks = by_ranks(size, work)
    named = [name for rank in ranks for name in rank.tensors if ".experts." in name]
    assert sorted(named) == sorted(name for name in expected.tensors if ".experts." in name)
    for rank in ranks:
        assert torch.equal(rank.hidden, expected.hidden)
        for name, tensor in rank.tensors.items():
            assert torch.equal(tensor, expected.tensors[name]), name
        assert rank.evidence.keys() == expected.evidence.keys()
        for name, tensor in rank.evidence.items():
            assert torch.equal(tensor, expected.evidence[name]), name
        assert rank.statistics | {"seconds": 0} == expected.statistics | {"seconds": 0}


def random_layer(sizes: Sizes, tokens: int) -> tuple[LayerContent, torch.Tensor]:
    """A layer's tensors, and hidden states [T, H]."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, inner, experts = sizes.hidden, sizes.intermediate, sizes.experts
    query, key = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    rest = {
        "self_attn.q_proj.weight": normal(query, hidden) * hidden**-0.5,
        "self_attn.k_proj.weight": normal(key, hidden) * hidden**-0.5,
        "self_attn.v_proj.weight": normal(key, hidden) * hidden**-0.5,
        "self_attn.o_proj.weight": normal(hidden, query) * query**-0.5,
        "self_attn.q_norm.weight": torch.ones(query),
        "self_attn.k_norm.weight": torch.ones(key),
        "input_layernorm.weight": torch.ones(hidden),
        MINIMAX_M2.smooth_norm: normal(hidden).exp(),
    }
    assert MINIMAX_M2.router_bias is not None
    whole = {name: tensor.to(torch.bfloat16) for name, tensor in rest.items()}
    whole |= {MINIMAX_M2.router: normal(experts, hidden), MINIMAX_M2.router_bias: normal(experts)}
    gate_up = (normal(experts, 2 * inner, hidden) * hidden**-0.5).to(torch.bfloat16)
    down = (normal(experts, hidden, inner) * inner**-0.5).to(torch.bfloat16)
    return LayerContent(gate_up, down, whole), normal(tokens, hidden).to(torch.bfloat16)
