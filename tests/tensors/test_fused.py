"""Triton's kernels against torch's plain forms: on a CPU in Triton's interpreter, on a GPU with MMQ_TEST_DEVICE=cuda.

Quantization and dequantization are held equal to the bit, to torch on the same device; sums in another order, and
products, to a tolerance that stands beside each.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

import mmq.tensors.dispatch
from conftest import DEVICE, NEVER, compile_from
from mmq.tensors.dispatch import Way, way
from mmq.tensors.experts import (
    combine,
    gated_rows,
    grouped_linear,
    grouped_rows,
    magnitude_sums,
    quadratic_form,
    second_moments,
    squares_by_expert,
    token_losses,
)
from mmq.tensors.fp8 import dequantize_block, dequantize_blocks, scale_shape
from mmq.tensors.int4 import fake_quantize_scaled, normalized_mean, quantize_in_place
from mmq.tensors.rounding import descend, factorize, round_compensated, searched_scale

pytest.importorskip("triton")

# The interpreter computes by numpy, which speaks of infinities and NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton counts as working wherever the tests run, unless one takes it away, and numba never."""
    if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and Triton was imported without its interpreter")
    _let_numbers_be_indices(monkeypatch)
    compile_from(monkeypatch, NEVER)
    monkeypatch.setattr(mmq.tensors.dispatch, "triton_works", lambda device: True)
    yield


def _let_numbers_be_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps a number in an array of one element, which numpy 2.4 no longer takes for one, as the end of
    a loop say."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def plain(monkeypatch: pytest.MonkeyPatch, function: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What torch makes of it."""
    with monkeypatch.context() as patch:
        patch.setattr(mmq.tensors.dispatch, "triton_works", lambda device: False)
        return function()


def identical(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To the bit, but for the kind of NaN."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    same = one.view(width) == other.view(width)
    return one.dtype == other.dtype and bool((same | (one.isnan() & other.isnan())).all())


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """bfloat16."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.bfloat16)


def odd_weights(experts: int, rows: int, columns: int, group: int) -> torch.Tensor:
    """bfloat16 [E, rows, columns] of all magnitudes: zeros, denormal numbers, ties, near the largest, NaN, infinity."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(experts, rows, columns, generator=generator)
    weight *= 2.0 ** torch.randint(-140, 128, (experts, rows, 1), generator=generator)
    flat = weight.view(-1, group)
    special = [
        torch.zeros(group),
        # A scale of 1: every weight lies between two codes.
        torch.arange(group).remainder(15).sub(7).add(0.5),
        torch.full((group,), torch.finfo(torch.bfloat16).max),
        # The least that a bf16 can hold, and what rounds to a scale of zero.
        torch.full((group,), 2.0**-133),
        torch.where(torch.arange(group) == 3, torch.nan, 1.0),
        torch.where(torch.arange(group) == group - 1, -torch.inf, 1.0),
    ]
    for line, values in zip(reversed(range(flat.shape[0])), special, strict=False):
        flat[line] = values
    return weight.to(DEVICE, torch.bfloat16)


# Experts, rows, columns, group: one row, odd rows, groups that no power of two counts, wider than a tile.
WEIGHTS = [(2, 6, 256, 128), (1, 5, 192, 64), (3, 1, 96, 32), (1, 1, 128, 128), (1, 3, 1152, 128), (2, 9, 544, 32)]


@pytest.mark.parametrize("shape", WEIGHTS, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("divided", [False, True])
def test_what_is_stored_is_what_torch_stores(
    shape: tuple[int, int, int, int], divided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, rows, columns, group = shape
    odd = odd_weights(*shape)
    # Codes of what is no number are nobody's.
    odd[~odd.isfinite()] = 1
    generator = torch.Generator().manual_seed(0)
    for weight in (odd, normal(experts, rows, columns)):
        factors = torch.randn(experts if divided else 1, 1, columns, generator=generator).exp_().to(DEVICE)
        divisors = torch.randn(experts, rows, 1, generator=generator).exp_().to(DEVICE) if divided else None
        if weight is odd:
            factors.clamp_(max=0.5)

        def stored(w: torch.Tensor = weight, f: torch.Tensor = factors, d: Any = divisors) -> list[torch.Tensor]:
            own = w.clone()
            return [own, *quantize_in_place(own, f, d, group)]

        for found, expected in zip(stored(), plain(monkeypatch, stored), strict=True):
            assert found.dtype == expected.dtype and torch.equal(found.view(torch.int16), expected.view(torch.int16))


def test_quadratic_forms_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    for experts, rows, width in ((3, 5, 96), (1, 1, 8), (2, 7, 1100)):
        change = normal(experts, rows, width)
        half = normal(experts, width, width, seed=1).float()
        moments = half @ half.transpose(1, 2) / width
        exact = torch.einsum("eoi,eij,eoj->e", change.double(), moments.to(torch.bfloat16).double(), change.double())
        found = quadratic_form(change, moments)
        # The product is rounded to bf16.
        torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=0)
        torchs = plain(monkeypatch, partial(quadratic_form, change, moments))
        torch.testing.assert_close(found, torchs, rtol=2**-7, atol=0)


@pytest.mark.parametrize("shape", WEIGHTS, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("per_expert", [False, True])
@pytest.mark.parametrize("change", [False, True])
def test_weights_are_rounded_as_torch_rounds_them(
    shape: tuple[int, int, int, int], per_expert: bool, change: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, _, columns, group = shape
    for weight in (odd_weights(*shape), normal(*shape[:3])):
        for spread in (0.0, 1.0, 8.0):
            scales = torch.randn((experts, 1, columns) if per_expert else (columns,)).mul_(spread).exp_().to(DEVICE)
            before = weight.clone()
            fused = fake_quantize_scaled(weight, scales, group, None, change)
            expected = plain(monkeypatch, lambda w=weight, s=scales: fake_quantize_scaled(w, s, group, None, change))
            assert identical(fused, expected)
            assert identical(weight, before)


@pytest.mark.parametrize("shape", [*WEIGHTS, (1, 40, 64, 32)], ids=lambda shape: "x".join(map(str, shape)))
def test_normalized_means_are_torchs(shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for weight in (odd_weights(*shape), normal(*shape[:3]), normal(*shape[:3]) * 1e-5):
        fused = normalized_mean(weight, shape[3])
        # Sums of numbers of 8 bits are exact in fp64, in any order, while they are not of too many magnitudes.
        assert fused.dtype == torch.float64
        expected = plain(monkeypatch, lambda w=weight: normalized_mean(w, shape[3]))
        torch.testing.assert_close(fused, expected, rtol=1e-12, atol=0, equal_nan=True)


def test_every_weight_is_rounded_as_torch_rounds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # All 65,536 numbers of bf16, each beside others of its magnitude.
    weight = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(1, 64, 1024).to(DEVICE)
    for scale in (1.0, 0.3, 1e30, 1e-30):
        scales = torch.full((1024,), scale, device=DEVICE)
        fused = fake_quantize_scaled(weight, scales, 32)
        assert identical(fused, plain(monkeypatch, lambda s=scales: fake_quantize_scaled(weight, s, 32)))


def test_the_result_goes_where_it_is_wanted() -> None:
    weight, out = normal(2, 4, 128), torch.zeros(3, 4, 128, dtype=torch.bfloat16, device=DEVICE)
    result = fake_quantize_scaled(weight, torch.ones(1, 1, 128, device=DEVICE), 32, out[1:])
    assert result.data_ptr() == out[1].data_ptr()
    assert identical(result, fake_quantize_scaled(weight, torch.ones(128, device=DEVICE), 32)) and not out[0].any()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="memory that is asked for but not touched")
def test_weights_beyond_two_to_the_31_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    far = 2**31 + 128
    memory = torch.empty(far + 1024, dtype=torch.bfloat16)
    weight = memory.as_strided((2, 2, 128), (far, 128, 1))
    near, scales = normal(2, 2, 128), torch.ones(128)
    expected = plain(monkeypatch, lambda: fake_quantize_scaled(near, scales, 32))
    weight.copy_(near)
    assert identical(fake_quantize_scaled(weight, scales, 32, torch.empty_like(near)), expected)
    # And where the result is far away.
    fake_quantize_scaled(near, scales, 32, weight)
    assert identical(weight.contiguous(), expected)


def test_no_weights_and_other_dtypes_are_torchs() -> None:
    assert way(normal(1)) is Way.TRITON
    assert fake_quantize_scaled(normal(0, 4, 128), torch.ones(128, device=DEVICE), 32).shape == (0, 4, 128)
    assert fake_quantize_scaled(normal(2, 0, 128), torch.ones(128, device=DEVICE), 32).shape == (2, 0, 128)
    assert way(normal(0)) is Way.TORCH and way(normal(1).float()) is Way.TORCH


# Tokens, experts a token, channels: one of each, odd, more channels than a program takes at a time.
TOKENS = [(1, 1, 1), (37, 3, 200), (5, 8, 1536), (2, 2, 2051)]


@pytest.mark.parametrize("shape", TOKENS, ids=lambda shape: "x".join(map(str, shape)))
def test_tokens_are_summed_as_torch_sums_them(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, top_k, hidden = shape
    generator = torch.Generator().manual_seed(tokens)
    outputs = normal(tokens * top_k, hidden)
    place = torch.randperm(tokens * top_k, generator=generator).view(tokens, top_k).to(DEVICE)
    weights = torch.rand(tokens, top_k, generator=generator).to(DEVICE)
    reference = torch.randn(tokens, hidden, generator=generator).to(DEVICE)
    exact = (outputs.double()[place] * weights.double().unsqueeze(2)).sum(1) - reference

    before = reference.clone()
    losses = token_losses(outputs, place, weights, reference)
    assert losses.dtype == torch.float32 and torch.equal(reference, before)
    # fp32 sums of k products, then of H squares, which have one sign.
    torch.testing.assert_close(losses.double(), exact.square().sum(1), rtol=2e-6, atol=0)
    torch.testing.assert_close(
        losses, plain(monkeypatch, lambda: token_losses(outputs, place, weights, reference)), rtol=2e-6, atol=0
    )
    start = reference.neg()
    assert combine(outputs, place, weights, start) is start
    torch.testing.assert_close(start.double(), exact, rtol=0, atol=1e-6 * top_k)

    # Rows a part at a time: what is not there is not added.
    cut = tokens * top_k // 3
    left = reference.clone()
    combine(outputs[:cut], place, -weights, left)
    rest = token_losses(outputs[cut:], place, weights, left, cut)
    torch.testing.assert_close(rest.double(), exact.square().sum(1), rtol=2e-6, atol=0)
    parts = combine(outputs[cut:], place, weights, combine(outputs[:cut], place, weights, reference.neg()), cut)
    torch.testing.assert_close(parts.double(), exact, rtol=0, atol=1e-6 * top_k)

    # The same bits when tokens are shared out in another way.
    half = -(-tokens // 2)
    for part in (slice(0, half), slice(half, tokens)):
        assert torch.equal(token_losses(outputs, place[part], weights[part], reference[part]), losses[part])

    outputs[place[0, 0], 0] = torch.nan
    assert token_losses(outputs, place, weights, reference).isnan().nonzero().tolist() == [[0]]
    outputs[place[0, 0], 0] = 3e38
    weights[0, 0] = 1
    # A square beyond fp32.
    assert token_losses(outputs, place, weights, reference).isinf().nonzero().tolist() == [[0]]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="memory that is asked for but not touched")
def test_outputs_beyond_two_to_the_31_are_found() -> None:
    far, hidden = 2**21, 1028
    outputs = torch.empty(far, hidden, dtype=torch.bfloat16)
    outputs[-1], outputs[0] = 3, 1
    place, weights = torch.tensor([[far - 1, 0]]), torch.tensor([[1.0, 2.0]])
    assert token_losses(outputs, place, weights, torch.full((1, hidden), 4.0)).tolist() == [hidden]


def test_no_tokens_have_no_losses() -> None:
    none = torch.empty(0, 2, dtype=torch.int64, device=DEVICE)
    reference = torch.empty(0, 16, device=DEVICE)
    assert token_losses(normal(4, 16), none, none.float(), reference).shape == (0,)
    assert combine(normal(4, 16), none, none.float(), reference).shape == (0, 16)


# Rows of each expert, inner width, outer width: experts without rows, one row, more than a band of tiles, odd widths.
PRODUCTS = [
    ([5, 0, 17, 1], 64, 48),
    ([1], 8, 8),
    ([0, 0, 3], 96, 40),
    ([40, 300, 2], 40, 24),
    ([16] * 5, 32, 64),
]


def rows_of(counts: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """bfloat16 [R, width], and where each expert's end."""
    return normal(sum(counts), width), torch.tensor(counts, device=DEVICE).cumsum(0).to(torch.int32)


@pytest.mark.parametrize(("counts", "inner", "outer"), PRODUCTS)
def test_products_are_grouped_as_torch_groups_them(
    counts: list[int], inner: int, outer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, ends = rows_of(counts, inner)
    weight = normal(len(counts), outer, inner, seed=1)
    exact = torch.cat([part.double() @ own.double().T for part, own in zip(rows.split(counts), weight, strict=True)])
    all_rows = torch.full((rows.shape[0] + 2, outer), 7.0, device=DEVICE, dtype=torch.bfloat16)
    result = grouped_rows(rows, weight, ends, all_rows[1:-1])
    # Rounded to bf16 once, after an fp32 sum: half a unit in the last place, and of what the sum is made of.
    scale = torch.cat(
        [part.abs().double() @ own.abs().double().T for part, own in zip(rows.split(counts), weight, strict=True)]
    )
    assert bool(((result.double() - exact).abs() <= exact.abs() * 2**-8 + scale * 2**-20).all())
    assert result.data_ptr() == all_rows[1].data_ptr()
    assert bool((all_rows[[0, -1]] == 7).all())
    assert torch.equal(grouped_linear(rows, weight, ends), result)
    torch_s = plain(monkeypatch, lambda: grouped_linear(rows, weight, ends))
    torch.testing.assert_close(result.float(), torch_s.float(), rtol=2**-7, atol=float(scale.max()) * 2**-20)


@pytest.mark.parametrize(("counts", "inner", "outer"), PRODUCTS)
def test_gated_products_are_torchs(counts: list[int], inner: int, outer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ends = rows_of(counts, inner)
    x = normal(50, inner, seed=2)
    token = torch.randint(50, (sum(counts),), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    weight = normal(len(counts), 2 * outer, inner, seed=1) * inner**-0.5
    for activation in (torch.nn.functional.silu, torch.nn.SiLU()):
        result = gated_rows(x, token, weight, ends, activation)
        expected = plain(monkeypatch, lambda act=activation: gated_rows(x, token, weight, ends, act))
        # Four roundings to bf16, of which a sum in another order may turn each.
        torch.testing.assert_close(result.float(), expected.float(), rtol=2**-5, atol=2**-8)
        assert result.shape == (sum(counts), outer) and result.dtype == torch.bfloat16
        assert torch.equal(gated_rows(x[token], None, weight, ends, activation), result)
    gelu = gated_rows(x, token, weight, ends, torch.nn.functional.gelu)
    assert torch.equal(gelu, plain(monkeypatch, lambda: gated_rows(x, token, weight, ends, torch.nn.functional.gelu)))


def test_a_token_reaches_its_own_expert_alone() -> None:
    # Integers that bf16 holds: no rounding, and every element says whose it is.
    counts = [20, 0, 33]
    rows = torch.arange(53, device=DEVICE).to(torch.bfloat16).unsqueeze(1).repeat(1, 8)
    weight = torch.tensor([1.0, 7.0, 2.0], device=DEVICE).view(3, 1, 1).expand(3, 8, 8).to(torch.bfloat16) / 8
    ends = torch.tensor(counts, device=DEVICE).cumsum(0).to(torch.int32)
    result = grouped_linear(rows, weight.contiguous(), ends)
    factor = torch.tensor([1.0] * 20 + [2.0] * 33, device=DEVICE).unsqueeze(1)
    assert torch.equal(result.float(), (rows.float() * factor))


def test_numbers_that_are_none_stay_in_their_row() -> None:
    rows, ends = rows_of([20, 20], 32)
    rows[25, 3] = torch.nan
    assert grouped_linear(rows, normal(2, 16, 32, seed=1), ends).isnan().any(1).nonzero().tolist() == [[25]]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="memory that is asked for but not touched")
def test_matrices_and_rows_beyond_two_to_the_31_are_found() -> None:
    far, inner = 2**31 // 64, 64
    memory = torch.empty(far + 8, inner, dtype=torch.bfloat16)
    memory[-3:] = normal(3, inner)
    weight, ends = normal(1, 8, inner, seed=1), torch.tensor([3], dtype=torch.int32)
    token = torch.arange(far + 5, far + 8)
    gate = torch.cat([weight, weight], 1)
    assert torch.equal(
        gated_rows(memory, token, gate, ends, torch.nn.functional.silu),
        gated_rows(memory[-3:].clone(), torch.arange(3), gate, ends, torch.nn.functional.silu),
    )
    matrices = memory.view(-1).as_strided((2, 8, inner), (far * inner, inner, 1))
    matrices[1] = weight[0]
    rows, ends = normal(4, inner), torch.tensor([0, 4], dtype=torch.int32)
    assert torch.equal(grouped_linear(rows, matrices, ends), grouped_linear(rows, weight, ends[1:]))


def test_no_rows_have_no_products() -> None:
    ends = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    token = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert grouped_linear(normal(0, 16), normal(2, 8, 16), ends).shape == (0, 8)
    assert gated_rows(normal(4, 16), token, normal(2, 8, 16), ends, torch.nn.functional.silu).shape == (0, 4)


def e4m3(*shape: int) -> torch.Tensor:
    """float8_e4m3fn, all codes in turns, NaN among them."""
    codes = torch.arange(torch.Size(shape).numel()).mul(7).remainder(256).to(torch.uint8)
    return codes.view(shape).view(torch.float8_e4m3fn).to(DEVICE)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 3.7e-7, 127.9, 500.0, 2.0**-120, 2.0**-140, 3e38, torch.inf, torch.nan])
def test_every_fp8_code_is_dequantized_in_fp32_and_rounded_once(scale: float) -> None:
    weight = e4m3(2, 256)
    scales = torch.full(scale_shape((2, 256)), scale, device=DEVICE)
    assert identical(dequantize_block(weight, scales), (weight.float() * scales[0, 0]).to(torch.bfloat16))


@pytest.mark.parametrize("shape", [(1, 128, 128), (3, 1, 1), (2, 130, 257), (1, 383, 128), (2, 256, 96), (4, 5, 1000)])
def test_stacked_fp8_blocks_are_dequantized_as_torch_dequantizes_them(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = e4m3(*shape)
    scale = torch.rand(shape[0], *scale_shape(shape[1:]), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = dequantize_blocks(weight, scale)
    wide = scale.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, : shape[1], : shape[2]]
    assert identical(found, (weight.float() * wide).to(torch.bfloat16))
    assert identical(found[-1], dequantize_block(weight[-1], scale[-1]))
    # torch's way on a CPU does not look for NaN, which callers have.
    weight.view(torch.uint8).masked_fill_(weight.isnan(), 0)
    torch_s = plain(monkeypatch, lambda: dequantize_blocks(weight, scale))
    assert identical(dequantize_blocks(weight, scale), torch_s)


@pytest.mark.parametrize(("rows", "columns", "group"), [(40, 256, 128), (5, 160, 32), (33, 64, 64), (7, 96, 48)])
def test_compensated_rounding_is_torchs(rows: int, columns: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes to the bit; scales are the same but where sums in another order make another share the best."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 300, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    weight = torch.randn(2, rows, columns, generator=generator).to(DEVICE)
    weight[0, 1], weight[1, :, :group] = 0.0, 0.0
    weight[1, 2, 3] = 1e-39
    moments = (x.mT @ x).to(DEVICE)
    factor = factorize(moments, 0.1)
    scale = searched_scale(weight, factor.diagonal, group)
    torch_s = plain(monkeypatch, lambda: searched_scale(weight, factor.diagonal, group))
    assert (scale == torch_s).double().mean() > 0.99

    def rounded() -> list[torch.Tensor]:
        stack = round_compensated(weight.clone(), factor, torch_s, group)
        swept = descend(weight.clone(), moments, factor, stack)
        return [stack.values, swept.values, swept.scale]

    with monkeypatch.context() as patch:
        patch.setattr(mmq.tensors.dispatch, "triton_works", lambda device: False)
        expected = rounded()
    for one, other in zip(rounded(), expected, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(expected[0], expected[1])


def test_no_fp8_weights() -> None:
    assert dequantize_blocks(e4m3(0, 4, 4), torch.ones(0, 1, 1, device=DEVICE)).shape == (0, 4, 4)


@pytest.mark.parametrize(("counts", "width"), [([5, 0, 17, 1], 64), ([1], 8), ([0, 0, 3], 200), ([40, 60, 0], 72)])
def test_sums_over_an_experts_rows_are_torchs(counts: list[int], width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, ends = rows_of(counts, width)

    def sums(function: Callable[..., None], *shape: int) -> torch.Tensor:
        out = torch.ones(len(counts), *shape, device=DEVICE)
        function(rows, ends, out)
        return out

    # fp32 sums of numbers of one sign; for moments, an error in proportion to what their rows' magnitudes give.
    expected = plain(monkeypatch, lambda: sums(magnitude_sums, width))
    torch.testing.assert_close(sums(magnitude_sums, width), expected, rtol=1e-6, atol=0)
    expected = plain(monkeypatch, lambda: sums(second_moments, width, width))
    moments = sums(second_moments, width, width)
    torch.testing.assert_close(moments, expected, rtol=1e-6, atol=1e-6 * max(counts) * 9)
    # A tile on the diagonal is one product; numpy's, which the interpreter takes, need not be symmetric to the bit.
    slack = 1e-6 * max(counts) * 9 if DEVICE.type == "cpu" else 0.0
    torch.testing.assert_close(moments, moments.mT, rtol=0, atol=slack)
    expected = plain(monkeypatch, lambda: squares_by_expert(rows, ends))
    squares = squares_by_expert(rows, ends)
    assert squares.dtype == torch.float64
    torch.testing.assert_close(squares, expected, rtol=1e-6, atol=0)
    assert all((squares[expert] == 0) == (count == 0) for expert, count in enumerate(counts))

    rows[-1, -1] = torch.nan
    last = max(expert for expert, count in enumerate(counts) if count)
    assert squares_by_expert(rows, ends).isnan().nonzero().tolist() == [[last]]
    assert sums(magnitude_sums, width).isnan().nonzero().tolist() == [[last, width - 1]]
    assert sums(second_moments, width, width).isnan().sum() == 2 * width - 1


def test_no_rows_have_no_sums() -> None:
    rows, ends = rows_of([0, 0], 16)
    assert squares_by_expert(rows, ends).tolist() == [0, 0]
    out = torch.ones(2, 16, 16, device=DEVICE)
    second_moments(rows, ends, out)
    magnitude_sums(rows, ends, out[:, 0])
    assert bool((out == 1).all())
