"""mmq's search on stacked experts against llmcompressor's own on the same layer, tokens and routing."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq.mappings import AWQ_MAPPING_REGISTRY
from transformers.activations import ACT2FN
from transformers.models.minimax_m2.configuration_minimax_m2 import MiniMaxM2Config

import stock_awq
from conftest import DEVICE, NEVER, compile_from, cpu_only
from mmq.families.minimax_m2 import MINIMAX_M2
from mmq.quantize.decoder_layer import transformers_config
from mmq.quantize.routed_experts import ExpertBlock, Weights
from mmq.quantize.search import Error, Found, StackedAWQModifier, awq_mappings
from mmq.tensors.int4 import weight_args
from mmq.tensors.smoothing import candidate_scales

TOKENS, TOP_K, N_GRID = 256, 2, 20
SILU = ACT2FN["silu"]
# A group's extreme weight, if negative, lies on the edge between two codes, so that an ulp decides; see random_layer.
NO_EDGES = {"negative": 0.1, "spread": 0.15, "outliers": 2.0}
UNREACHED = 3


@dataclass(frozen=True)
class Shape:
    experts: int
    hidden: int
    intermediate: int
    unreached: tuple[int, ...] = ()


SHAPES = [Shape(8, 256, 128), Shape(4, 384, 256), Shape(16, 128, 128, unreached=(UNREACHED,))]
every_shape = pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda shape: f"{shape.experts}x{shape.hidden}x{shape.intermediate}"
)
every_grid = pytest.mark.parametrize("duo_scaling", [True, False, "both"])


class Recording(StackedAWQModifier):
    """Remembers the losses of the down search."""

    def _search(self, x_mean: torch.Tensor, w_mean: torch.Tensor, error: Error) -> Found:
        points = []

        def recorded(scales: torch.Tensor) -> torch.Tensor:
            points.append(error(scales))
            return points[-1]

        found = super()._search(x_mean, w_mean, recorded)
        object.__setattr__(self, "losses", torch.stack(points).double().cpu())
        return found


def make_layer(shape: Shape, dtype: torch.dtype, **options: float) -> stock_awq.Layer:
    return stock_awq.random_layer(
        shape.experts, shape.hidden, shape.intermediate, dtype, DEVICE, unreached=shape.unreached, **options
    )


def make_hidden(shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    return stock_awq.random_hidden(TOKENS, shape.hidden, dtype, DEVICE)


def make_block(layer: stock_awq.Layer, hidden: torch.Tensor, budget: int | None = None) -> ExpertBlock:
    x, index, weight = stock_awq.block_inputs(layer, hidden, TOP_K)
    return ExpertBlock(x, index, weight, layer.gate_up, layer.down, SILU, stock_awq.GROUP_SIZE, budget=budget)


def modifier(duo_scaling: bool | str) -> Recording:
    return Recording(mappings=awq_mappings(MINIMAX_M2), duo_scaling=duo_scaling, n_grid=N_GRID)


def search_norm(block: ExpertBlock, duo_scaling: bool | str) -> tuple[Found, torch.Tensor]:
    """The search's result and its losses [points]."""
    found = modifier(duo_scaling).search_norm(block, block.outputs(Weights(block)), full=True)
    grid = modifier(duo_scaling)._get_grid_search_params()
    losses = {(point.ratio, point.duo_scaling): point.loss for point in found.points}
    return found, torch.tensor([losses[point] for point in grid], dtype=torch.float64)


def search_down(block: ExpertBlock, duo_scaling: bool | str) -> tuple[Found, torch.Tensor]:
    """The search's result and its losses [points, E]; one step holds all experts of these sizes."""
    assert block.step >= block.gate_up.shape[0]
    searching = modifier(duo_scaling)
    return searching.search_down(block), searching.losses


def point(grid: list[tuple[float, bool]], ratio: torch.Tensor, duo: torch.Tensor) -> int:
    """The place in the grid of what was found."""
    (place,) = (i for i, (some, other) in enumerate(grid) if abs(some - float(ratio)) < 1e-6 and other == bool(duo))
    return place


def same_losses(stock: list[float], losses: torch.Tensor) -> torch.Tensor:
    """Which points agree to 1e-4; none may be off by a percent.

    With scales an ulp apart, one weight in some millions is rounded to the other side, and shows in a loss of few rows.
    """
    off = (losses / torch.tensor(stock, dtype=torch.float64) - 1).abs()
    assert off.max() < 0.01
    return off < 1e-4


@every_shape
@every_grid
def test_fp32_agrees_with_stock(shape: Shape, duo_scaling: bool | str) -> None:
    """Every point's loss to 1e-4, the chosen points the same, the chosen scales to 1e-5."""
    layer, hidden = make_layer(shape, torch.float32, **NO_EDGES), make_hidden(shape, torch.float32)
    # Two batches: the stock losses are means over all of them.
    stock = stock_awq.run_stock(
        stock_awq.build_model(layer, TOP_K), hidden.split(TOKENS // 2), duo_scaling, N_GRID, all_experts=False
    )
    block = make_block(layer, hidden)
    norm, norm_losses = search_norm(block, duo_scaling)
    down, down_losses = search_down(block, duo_scaling)

    agreed = [same_losses(stock.norm.losses, norm_losses)]
    assert (float(norm.ratio), bool(norm.duo)) == pytest.approx((stock.norm.ratio, stock.norm.duo), abs=1e-6)
    # Stock gives scales to the host.
    torch.testing.assert_close(norm.scales.cpu(), stock.norm.scales.cpu(), rtol=1e-5, atol=0)
    assert float(norm.error) == pytest.approx(min(stock.norm.losses), rel=1e-4)
    assert float(norm.identity_error) == pytest.approx(stock.norm.losses[0], rel=1e-4)

    assert set(stock.down) == set(range(shape.experts)) - set(shape.unreached)
    for expert, search in stock.down.items():
        agreed.append(same_losses(search.losses, down_losses[:, expert]))
        assert float(down.ratio[expert]) == pytest.approx(search.ratio, abs=1e-6), expert
        assert bool(down.duo[expert]) == search.duo, expert
        torch.testing.assert_close(down.scales[expert].cpu(), search.scales.cpu(), rtol=1e-5, atol=0)
    assert torch.cat(agreed).double().mean() >= 0.97
    # The comparison means little where the search ends at the identity.
    assert any(search.ratio > 0 for search in (stock.norm, *stock.down.values()))


def test_expert_without_tokens_keeps_its_weights() -> None:
    shape = SHAPES[2]
    block = make_block(make_layer(shape, torch.float32), make_hidden(shape, torch.float32))
    assert int(block.counts[UNREACHED]) == 0
    down, _ = search_down(block, True)
    assert torch.equal(down.scales[UNREACHED].cpu(), torch.ones(shape.intermediate))
    assert bool(down.identity[UNREACHED])
    assert torch.isfinite(down.scales).all() and torch.isfinite(down.error).all()


def passes(block: ExpertBlock) -> int:
    """How many times outputs are summed in a pass over all tokens."""
    return sum(len(list(block.passes(share, Weights(block)))) for share in block.shares)


def rounded(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Q(W s) / s of [out, in] by compressed-tensors, the product in fp32 and the group scales in the weight's dtype."""
    args = weight_args(stock_awq.GROUP_SIZE)
    scaled = weight.float() * scales
    groups = scaled.unflatten(-1, (-1, stock_awq.GROUP_SIZE))
    step, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    return fake_quantize(scaled, step.to(weight.dtype).float(), zero, args) / scales


def expert_middle(x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """The inputs [n, I] of one expert's down layer, in the dtype of x [n, H] and gate_up [2I, H]."""
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return SILU(gate) * up


def plain_output(layer: stock_awq.Layer, block: ExpertBlock, gate_up: list[torch.Tensor]) -> torch.Tensor:
    """The block's output [T, H] in fp32, one expert after the other."""
    result = torch.zeros_like(block.x, dtype=torch.float32)
    for expert, weight in enumerate(gate_up):
        token, choice = (block.index == expert).nonzero(as_tuple=True)
        middle = expert_middle(block.x[token].float(), weight)
        output = middle @ layer.down[expert].float().T
        result.index_add_(0, token, output * block.weight[token, choice, None])
    return result


def linears(weights: torch.Tensor) -> list[torch.nn.Module]:
    """Layers as `AWQModifier._compute_layer_means` takes them, of [n, out, in]."""
    result = []
    for weight in weights:
        layer = torch.nn.Module()
        layer.weight = weight
        layer.quantization_scheme = type("Scheme", (), {"weights": weight_args(stock_awq.GROUP_SIZE)})
        result.append(layer)
    return result


def grid_scales(x: torch.Tensor, weights: torch.Tensor, grid: list[tuple[float, bool]]) -> torch.Tensor:
    x_mean = x.abs().float().mean(0)
    w_mean = AWQModifier._compute_layer_means(linears(weights))
    return candidate_scales(x_mean, w_mean.float(), grid)


@every_shape
@every_grid
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=cpu_only)], ids=["torch", "compiled"])
def test_bf16_choices_are_good(
    shape: Shape, duo_scaling: bool | str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock modifier rounds W s and its losses to bf16, and differs from itself by percents when the scales move by
    an ulp. So the judge is a third: fp32 losses of weights rounded by compressed-tensors. By them, mmq's points are
    within a percent of the best, and of what the stock modifier chose."""
    compile_from(monkeypatch, 0 if compiled else NEVER)
    layer, hidden = make_layer(shape, torch.bfloat16), make_hidden(shape, torch.bfloat16)
    stock = stock_awq.run_stock(stock_awq.build_model(layer, TOP_K), [hidden], duo_scaling, N_GRID, all_experts=False)
    block = make_block(layer, hidden)
    plain = layer.gate_up.float()

    norm, _ = search_norm(block, duo_scaling)
    reference = plain_output(layer, block, list(plain))
    losses = [
        float((plain_output(layer, block, [rounded(w, scales) for w in layer.gate_up]) - reference).square().mean())
        for scales in grid_scales(block.x, layer.gate_up, stock.grid)
    ]
    chosen = losses[point(stock.grid, norm.ratio, norm.duo)]
    assert chosen <= 1.01 * min(losses)
    assert chosen <= 1.01 * losses[stock.grid.index((stock.norm.ratio, stock.norm.duo))]
    assert float(norm.error) == pytest.approx(chosen, rel=0.02)
    # The stock modifier's own losses, in bf16 and of other roundings, are near the judge's.
    apart = torch.tensor(stock.norm.losses) / torch.tensor(losses)
    assert float(apart.median()) == pytest.approx(1, abs=0.03)

    down, _ = search_down(block, duo_scaling)
    for expert, search in stock.down.items():
        token = (block.index == expert).any(1)
        middle = expert_middle(block.x[token], layer.gate_up[expert])
        weight = layer.down[expert]
        losses = [
            float((middle.float() @ (rounded(weight, scales) - weight.float()).T).square().mean())
            for scales in grid_scales(middle, weight.unsqueeze(0), stock.grid)
        ]
        chosen = losses[point(stock.grid, down.ratio[expert], down.duo[expert])]
        assert chosen <= 1.01 * min(losses), expert
        assert chosen <= 1.01 * losses[stock.grid.index((search.ratio, search.duo))], expert


@every_shape
def test_block_output_is_that_of_transformers(shape: Shape) -> None:
    layer, hidden = make_layer(shape, torch.float32), make_hidden(shape, torch.float32)
    block = make_block(layer, hidden)
    expected = stock_awq.build_block(layer, TOP_K)(block.x.unsqueeze(0)).squeeze(0)
    output = block.output(Weights(block))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().mean()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [2**20, 2**22])
def test_a_small_budget_finds_the_same(dtype: torch.dtype, budget: int) -> None:
    """Steps of experts, and their rows in parts."""
    shape = SHAPES[0]
    layer, hidden = make_layer(shape, dtype, **NO_EDGES), make_hidden(shape, dtype)
    hidden = torch.cat([hidden, hidden.flip(1), hidden.flip(0)])
    whole, parts = make_block(layer, hidden), make_block(layer, hidden, budget)
    assert passes(parts) > passes(whole) == 1 and parts.step < whole.step
    results = []
    for block in (whole, parts):
        searching = modifier("both")
        results.append((searching.search_norm(block, block.outputs(Weights(block))), searching.search_down(block)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.ratio, other.ratio) and torch.equal(one.duo, other.duo)
        torch.testing.assert_close(one.scales, other.scales, rtol=1e-5, atol=0)
        # Chunks sum in another order, by an ulp.
        tolerance = 1e-4 if dtype == torch.float32 else 1e-3
        torch.testing.assert_close(one.error, other.error, rtol=tolerance, atol=0)
        torch.testing.assert_close(one.identity_error, other.identity_error, rtol=tolerance, atol=0)


# Faults of the libraries that mmq works around: a failure here says that one is fixed.


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is memory to pin for")
def test_upstream_stock_search_needs_an_accelerator() -> None:
    """llmcompressor pins memory without asking for whom; until then the stock search runs."""
    shape = Shape(2, 128, 128)
    model = stock_awq.build_model(make_layer(shape, torch.float32), TOP_K)
    with pytest.raises(RuntimeError, match="accelerator"):
        stock_awq.run_stock(model, [make_hidden(shape, torch.float32)], n_grid=3, pinning=True)


def test_upstream_has_no_mappings_for_minimax_m2() -> None:
    assert "Qwen3MoeForCausalLM" in AWQ_MAPPING_REGISTRY
    assert MINIMAX_M2.causal_lm not in AWQ_MAPPING_REGISTRY


def test_upstream_ignores_rotary_dim() -> None:
    """transformers would rotate all dimensions of a head (issue 48241); mmq's own config has the factor."""
    hub = {"rotary_dim": 64, "head_dim": 128, "rope_theta": 5000000, "hidden_size": 3072}
    upstream = MiniMaxM2Config.from_dict(dict(hub))
    assert "partial_rotary_factor" not in upstream.rope_parameters
    ours = transformers_config(MINIMAX_M2, hub | {"num_attention_heads": 48})
    assert ours.rope_parameters["partial_rotary_factor"] == 0.5
