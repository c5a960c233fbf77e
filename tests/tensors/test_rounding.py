"""Error-compensated rounding against llmcompressor's GPTQ and a plain float64 form, and on odd matrices.

On a GPU with MMQ_TEST_DEVICE=cuda.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import DEVICE, NEVER, compile_from, cpu_only
from mmq.tensors import rounding
from mmq.tensors.int4 import QuantizedStack, quantize_stack, weight_args
from mmq.tensors.rounding import (
    Factor,
    corrected,
    descend,
    expected,
    factorize,
    round_compensated,
    round_rows,
    round_twice,
    searched_scale,
    shrink,
    through_down,
)

GROUP = 128


def moments(count: int, columns: int, rows: int, seed: int = 0) -> torch.Tensor:
    """Mean second moments of correlated inputs whose channels differ in size: float32 [count, columns, columns]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(count, columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    size = (torch.randn(count, 1, columns, generator=generator) * 0.7).exp()
    x = (torch.randn(count, rows, columns, generator=generator) @ mix) * size
    return (x.transpose(1, 2) @ x / rows).to(DEVICE)


def weights(count: int, rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def nearest(weight: torch.Tensor) -> QuantizedStack:
    return quantize_stack(weight.clone(), GROUP)


def loss(stack: QuantizedStack, weight: torch.Tensor, h: torch.Tensor, g: torch.Tensor | None = None) -> torch.Tensor:
    """trace(G (Q - W) H (Q - W)^T) of each matrix, without G of all outputs alike: float64 [n]."""
    change = stack.dequantize(torch.float64) - weight.double()
    weighed = change if g is None else g.double() @ change
    return ((weighed @ h.double()) * change).sum((1, 2))


def same_codes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """All of them on a CPU. A GPU's libraries take other kernels for other numbers of rows and of matrices."""
    return float((one != other).double().mean()) <= (0 if DEVICE.type == "cpu" else 1e-3)


def rounded(weight: torch.Tensor, h: torch.Tensor, damping: float = 0.01) -> QuantizedStack:
    factor = factorize(h.clone(), damping)
    scale = searched_scale(weight, factor.diagonal, GROUP)
    return round_compensated(weight.clone(), factor, scale, GROUP)


def plain(weight: torch.Tensor, h: torch.Tensor, scale: torch.Tensor, damping: float) -> torch.Tensor:
    """GPTQ's codes as its paper has it, one matrix in float64: the inverse's Cholesky factor, a column at a time."""
    h = h.double() + damping * h.double().diagonal().mean() * torch.eye(len(h), device=h.device)
    order = h.diagonal().float().argsort(stable=True).flip(0)
    h, w = h[order][:, order], weight.double()[:, order].clone()
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    steps = scale.double().repeat_interleave(GROUP, 1)[:, order]
    codes = torch.empty_like(w)
    for column in range(w.shape[1]):
        codes[:, column] = (w[:, column] / steps[:, column]).round().clamp(-8, 7)
        error = (w[:, column] - codes[:, column] * steps[:, column]) / upper[column, column]
        w[:, column:] -= error[:, None] * upper[column, None, column:]
    return codes[:, order.argsort()]


def test_codes_are_those_of_the_plain_form() -> None:
    """fp32 and another factor of the same matrix: single codes on an edge may differ."""
    h, weight = moments(3, 384, 900), weights(3, 64, 384)
    stack = rounded(weight, h)
    for expert in range(3):
        expected = plain(weight[expert], h[expert], stack.scale[expert], 0.01)
        assert (stack.values[expert] != expected).double().mean() < 1e-3


def test_codes_are_those_of_llmcompressor() -> None:
    """Its GPTQ with the same scales, damping and order ("static": scales of the unordered groups)."""
    h, weight = moments(2, 256, 600), weights(2, 96, 256).float()
    arguments = weight_args(GROUP)
    arguments = QuantizationArgs(**arguments.model_dump(exclude={"actorder"}), actorder=ActivationOrdering.STATIC)
    groups = weight.unflatten(-1, (-1, GROUP))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    scale = scale.bfloat16()
    theirs, _, fell_back = quantize_weight(weight.clone(), h.clone(), scale.float(), zero, None, arguments)
    assert not fell_back.any()
    stack = round_compensated(weight.clone(), factorize(h.clone(), 0.01), scale, GROUP)
    codes = (theirs / scale.float().repeat_interleave(GROUP, -1)).round()
    assert (codes != stack.values).double().mean() < 1e-3
    assert (codes != nearest(weight).values).double().mean() > 0.1


@pytest.mark.parametrize("rows", [1200, 100], ids=["many rows", "fewer rows than columns"])
def test_it_changes_the_output_less_than_nearest(rows: int) -> None:
    h, weight = moments(4, 256, rows), weights(4, 128, 256)
    assert (loss(rounded(weight, h), weight, h) < 0.5 * loss(nearest(weight), weight, h)).all()


def test_without_correlations_the_codes_are_the_nearest() -> None:
    h = torch.diag_embed(torch.rand(2, 256, generator=torch.Generator().manual_seed(2)) + 0.1).to(DEVICE)
    weight = weights(2, 32, 256)
    stack = rounded(weight, h)
    steps = stack.scale.float().repeat_interleave(GROUP, -1)
    assert torch.equal(stack.values.float(), (weight / steps).round().clamp(-8, 7))


def test_blocks_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    h, weight = moments(2, 256, 500), weights(2, 16, 256)
    one = rounded(weight, h).values
    monkeypatch.setattr(rounding, "COLUMNS", 1)
    assert (rounded(weight, h).values != one).double().mean() < 1e-3


@cpu_only
def test_compiled_rounding_is_torchs_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    h, weight = moments(3, 384, 500), weights(3, 40, 384)
    weight[0, 3], weight[1, :, 128:256] = 0.0, 0.0
    weight[2, 5, 7] = 1e-39
    found = []
    for least in (0, NEVER):
        compile_from(monkeypatch, least)
        damped = h.clone()
        factor = factorize(damped, 0.1)
        scale = nearest(weight).scale
        stack = round_compensated(weight.clone(), factor, scale, GROUP)
        moved = descend(weight.clone(), damped, factor, stack)
        found.append((searched_scale(weight, factor.diagonal, GROUP), stack, moved))
    (scale, stack, moved), (other, same, too) = found
    assert torch.equal(stack.values, same.values) and torch.equal(moved.values, too.values)
    # Sums in another order: of two shares that are as good, either may win.
    assert (scale == other).double().mean() > 0.99


def test_searched_scales_are_the_best_of_their_shares() -> None:
    """Positive, and by the weighted squares none of 28 shares of the nearest's scale is better; in float64."""
    weight, importance = weights(2, 24, 256), moments(2, 256, 400).diagonal(dim1=1, dim2=2)
    found = searched_scale(weight, importance, GROUP)
    assert (found > 0).all()

    def error(scale: torch.Tensor) -> torch.Tensor:
        steps = scale.double().repeat_interleave(GROUP, -1)
        change = (weight.double() / steps).round().clamp(-8, 7) * steps - weight.double()
        return (change.square() * importance.double().unsqueeze(1)).unflatten(-1, (-1, GROUP)).sum(-1)

    largest = weight.unflatten(-1, (-1, GROUP)).abs().amax(-1)
    tried = torch.stack([error((largest / 7.5 * (1.04 - 0.02 * k)).bfloat16()) for k in range(28)])
    assert torch.allclose(error(found), tried.amin(0), rtol=1e-5)


def test_shrinkage_is_a_mean_of_rows_and_prior_rows() -> None:
    sums, counts = moments(3, 128, 50) * 50, torch.tensor([50.0, 0.0, 10**6], device=DEVICE)
    sums[1], sums[2] = 0.0, sums[2] * 10**6 / 50
    toward = moments(3, 128, 400, seed=5)
    found = shrink(sums.clone(), counts, toward, 0.5)
    assert torch.allclose(found[0], (sums[0] + 64 * toward[0]) / 114, rtol=1e-5)
    assert torch.allclose(found[1], toward[1])
    assert torch.allclose(found[2], sums[2] / 10**6, atol=1e-3 * float(toward.abs().max()))


@pytest.mark.parametrize("rows", [32, 128, 512])
@pytest.mark.parametrize("whole", [True, False], ids=["moments", "squares"])
def test_what_is_expected_has_the_weights_correlations(rows: int, whole: bool) -> None:
    """By numpy's own correlations, about zero. A channel whose weights are zero goes with no other."""
    weight = weights(2, rows, 128).double()
    weight[1, :, 7] = 0.0
    pooled = moments(1, 128, 400, seed=5)[0]
    squares = torch.rand(2, 128, device=DEVICE) + 0.1
    grams = (weight.transpose(1, 2) @ weight).float()
    found = expected(grams, rows, pooled if whole else squares, 3.0).cpu().double().numpy()
    for number in range(2):
        known = (pooled if whole else torch.diag(squares[number])).cpu().double().numpy()
        own = weight[number].cpu().numpy()
        length = np.linalg.norm(own, axis=0)
        cosine = own.T @ own / np.maximum(np.outer(length, length), 1e-30)
        np.fill_diagonal(cosine, 1.0)
        deviation = np.sqrt(np.diag(known))
        share = rows / (rows + 3 * 128)
        wanted = share * cosine * np.outer(deviation, deviation) + (1 - share) * known
        np.testing.assert_allclose(found[number], wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
        assert np.linalg.eigvalsh(found[number]).min() > -1e-5 * np.abs(wanted).max()
        assert whole or number == 0 or np.count_nonzero(found[number, 7]) == 1


def odd_matrices() -> dict[str, torch.Tensor]:
    good = moments(1, 256, 600)[0]
    dead = good.clone()
    dead[5], dead[:, 5] = 0.0, 0.0
    broken = good.clone()
    broken[3, 4] = torch.nan
    indefinite = good - 3 * good.diagonal().mean() * torch.eye(256, device=DEVICE)
    single = torch.zeros(256, 256, device=DEVICE)
    single[9, 9] = 2.0
    ones = torch.ones(256, 256, device=DEVICE)
    return {
        "good": good, "zero": good * 0, "dead channel": dead, "NaN": broken, "infinite": good * 1e38 * 1e3,
        "indefinite": indefinite, "one channel": single, "rank one": ones, "tiny": good * 1e-36,
        "denormal": good * 1e-42, "huge": good * 1e30,
    }  # fmt: skip


@pytest.mark.parametrize("kind", odd_matrices())
def test_matrices_of_every_odd_kind_leave_the_others_alone(kind: str) -> None:
    """Each beside a good one: codes in range, positive scales, and the good one's as if it were alone."""
    good, odd, weight = odd_matrices()["good"], odd_matrices()[kind], weights(2, 32, 256)
    alone = rounded(weight[:1], good.unsqueeze(0), 0.1)
    factor = factorize(torch.stack([good, odd]), 0.1)
    scale = searched_scale(weight, factor.diagonal, GROUP)
    stack = round_compensated(weight.clone(), factor, scale, GROUP)
    assert factor.compensates[0] and torch.equal(stack.scale[0], alone.scale[0])
    assert same_codes(stack.values[0], alone.values[0])
    assert torch.isfinite(stack.scale).all() and (stack.scale > 0).all()
    if kind in ("zero", "NaN", "infinite", "indefinite", "denormal"):
        assert not factor.compensates[1]
        steps = scale[1].float().repeat_interleave(GROUP, -1)
        assert torch.equal(stack.values[1].float(), (weight[1] / steps).round().clamp(-8, 7))
    else:
        assert factor.compensates[1]
    if kind in ("tiny", "huge"):
        assert (stack.values[1] != rounded(weight[1:], good.unsqueeze(0), 0.1).values[0]).double().mean() < 1e-3


def test_weights_of_zero_stay_zero() -> None:
    h, weight = moments(1, 256, 400), weights(1, 8, 256)
    weight[0, 2] = 0.0
    assert (rounded(weight, h).values[0, 2] == 0).all()


def test_packing_is_undone() -> None:
    stack = nearest(weights(2, 8, 256))
    back = QuantizedStack.unpack(stack.pack(), stack.scale, GROUP)
    assert torch.equal(back.values, stack.values) and back.values.dtype == torch.int8
    assert torch.equal(back.dequantize(torch.float32), stack.dequantize(torch.float32))


def swept(weight: torch.Tensor, h: torch.Tensor, damping: float = 0.1) -> tuple[QuantizedStack, QuantizedStack]:
    """Compensated rounding, and what a sweep makes of it; H becomes what was factorized."""
    factor = factorize(h, damping)
    stack = round_compensated(weight.clone(), factor, searched_scale(weight, factor.diagonal, GROUP), GROUP)
    return stack, descend(weight.clone(), h, factor, stack)


@pytest.mark.parametrize("rows", [60, 900], ids=["fewer rows than columns", "more"])
def test_a_sweep_lowers_the_loss_of_every_row(rows: int) -> None:
    h, weight = moments(3, 384, rows), weights(3, 64, 384)
    before, after = swept(weight, h)
    assert (after.scale > 0).all() and after.values.amin() >= -8 and after.values.amax() <= 7

    def by_row(stack: QuantizedStack) -> torch.Tensor:
        change = stack.dequantize(torch.float64) - weight.double()
        return ((change @ h.double()) * change).sum(2)

    assert (by_row(after) <= by_row(before) * (1 + 1e-5)).all()
    assert by_row(after).sum() < 0.99 * by_row(before).sum()


def test_a_sweep_is_a_plain_one() -> None:
    """In float64, a scale and then a move or two at a time, each against the whole loss."""
    h, weight = moments(1, 256, 400), weights(1, 8, 256)
    before, after = swept(weight, h)
    values, scales = after.values.cpu(), after.scale.cpu()
    before = QuantizedStack(before.values.cpu(), before.scale.cpu(), GROUP)
    h64, weight, different, paired = h[0].double().cpu(), weight.cpu(), 0, 0
    for row in range(8):
        w, codes = weight[0, row].double(), before.values[0, row].double()
        steps = before.scale[0, row].double().repeat_interleave(GROUP)

        def squares(codes: torch.Tensor, steps: torch.Tensor, w: torch.Tensor = w) -> torch.Tensor:
            change = codes * steps - w
            return ((change @ h64) * change).sum(-1)

        for start in (0, GROUP):
            part = slice(start, start + GROUP)
            rest = w - codes * steps
            rest[part] += (codes * steps)[part]
            z = torch.zeros_like(w)
            z[part] = codes[part]
            best = float((z @ h64 @ rest) / (z @ h64 @ z))
            tried = steps.clone()
            tried[part] = torch.tensor(best).bfloat16().double()
            if squares(codes, tried) < squares(codes, steps):
                steps = tried

            def moves(codes: torch.Tensor, steps: torch.Tensor = steps, start: int = start) -> torch.Tensor:
                """Codes after each move of one of the group, down and up."""
                units = torch.eye(256, dtype=torch.float64)[start : start + GROUP]
                return torch.cat([codes - units, codes + units])

            def losses(moved: torch.Tensor, steps: torch.Tensor = steps) -> torch.Tensor:
                """Infinite where there is no room."""
                room = (moved >= -8).all(1) & (moved <= 7).all(1)
                return torch.where(room, squares(moved, steps), torch.inf)

            while True:
                moved = moves(codes)
                now = losses(moved)
                if now.min() >= squares(codes, steps) - 1e-9:
                    break
                codes = moved[now.argmin()]
            own = h64[part, part] * steps[start] ** 2
            reach = 2 * (own - own.diag().diag()).abs().amax(1)
            untried = torch.ones(GROUP, dtype=torch.bool)
            for _ in range(rounding.TRIES):
                moved, least = moves(codes), squares(codes, steps)
                # Of both ways of a code, the better one.
                now, way = losses(moved).view(2, GROUP).min(0)
                now[~untried | (now - reach >= least)] = torch.inf
                one = int(now.argmin())
                if torch.isinf(now[one]):
                    break
                untried[one] = False
                pairs = moves(moved.view(2, GROUP, 256)[way[one], one])
                both = losses(pairs).view(2, GROUP)
                both[:, one] = torch.inf
                if both.min() < least:
                    codes, paired = pairs[both.argmin()], paired + 1
        different += int((values[0, row] != codes).sum())
        assert torch.equal(scales[0, row].double(), steps[::GROUP])
    # fp32: single codes on an edge may differ.
    assert different <= 2 and paired > 3


def test_pairs_of_moves_lower_the_loss_further(monkeypatch: pytest.MonkeyPatch) -> None:
    h, weight = moments(2, 256, 900), weights(2, 64, 256)
    costs = []
    for tries in (0, rounding.TRIES):
        monkeypatch.setattr(rounding, "TRIES", tries)
        damped = h.clone()
        _, after = swept(weight, damped)
        costs.append(loss(after, weight, damped))
    assert (costs[1] < 0.999 * costs[0]).all()


class Launches(TorchDispatchMode):
    """Counts the operations that are no views, each a kernel on a GPU, with those that are one there."""

    VIEWS = (
        "slice",
        "expand",
        "view",
        "_unsafe_view",
        "unsqueeze",
        "transpose",
        "t",
        "diagonal",
        "empty",
        "empty_like",
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.count += function.overloadpacket.__name__ not in self.VIEWS
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(("width", "most"), [(3072, 5_500), (1536, 3_400)], ids=["gate and up", "down"])
def test_a_gpu_is_asked_for_few_kernels(width: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rounding weights of the real shape as their rows make up for each other: a launch takes some microseconds
    however many experts there are."""
    launches = Launches()

    def one(*tensors: torch.Tensor) -> None:
        launches.count += 1

    def searched(weight: torch.Tensor, importance: torch.Tensor, size: int, whole: int | None) -> torch.Tensor:
        launches.count += 1
        return empty(*weight.shape[:2], weight.shape[2] // size, dtype=torch.bfloat16)

    monkeypatch.setattr(rounding, "_columns_by", lambda weight, whole: one)
    monkeypatch.setattr(rounding, "_groups_by", lambda weight, size, whole: one)
    monkeypatch.setattr(rounding, "searched_scale", searched)
    n, out = 14, 3072

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def factor(count: int, size: int) -> Factor:
        order, compensates = empty(count, size, dtype=torch.int64), empty(count, dtype=torch.bool)
        diagonal, unit = empty(count, size), empty(count)
        return Factor(order, empty(count, size, size), diagonal, diagonal, unit, compensates)

    moments, own = empty(n, width, width), factor(n, width)

    def by_columns(weight: torch.Tensor, scale: torch.Tensor) -> QuantizedStack:
        return descend(weight, moments, own, round_twice(weight, own, scale, GROUP))

    scale = empty(n, out, width // GROUP, dtype=torch.bfloat16)
    with launches:
        rounding.round_rows(empty(n, out, width), factor(1, out), scale, GROUP, by_columns)
    assert 1000 < launches.count < most


def test_a_sweep_leaves_alone_what_is_not_compensated() -> None:
    h, weight = moments(2, 256, 400), weights(2, 16, 256)
    h[0] = 0
    before, after = swept(weight, h)
    assert torch.equal(after.values[0], before.values[0]) and torch.equal(after.scale[0], before.scale[0])
    assert not torch.equal(after.values[1], before.values[1])


def by_rows(weight: torch.Tensor, h: torch.Tensor, g: torch.Tensor) -> QuantizedStack:
    """Rows make up for each other by G [1, out, out], columns by H."""
    factor = factorize(h.clone(), 0.1)
    scale = searched_scale(weight, factor.diagonal, GROUP)
    return round_rows(
        weight.clone(), factorize(g.clone(), 0.1), scale, GROUP, lambda w, s: round_compensated(w, factor, s, GROUP)
    )


def damped(h: torch.Tensor) -> torch.Tensor:
    return h + 0.1 * h.diagonal(dim1=-2, dim2=-1).mean() * torch.eye(h.shape[-1])


def test_rows_and_columns_together_are_columns_of_the_kronecker_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time, and the whole matrix as one long row whose columns have the moments G (x) H."""
    monkeypatch.setattr(rounding, "ROWS", 1)
    out, columns = 8, GROUP
    weight, h, g = weights(1, out, columns), moments(1, columns, 400), moments(1, out, 100, seed=5)
    found = by_rows(weight, h, g)
    found, weight, h, g = QuantizedStack(found.values.cpu(), found.scale.cpu(), GROUP), weight.cpu(), h.cpu(), g.cpu()
    steps = found.scale.double().repeat_interleave(GROUP, 2)[0]
    rows, inputs = (damped(m[0].double()) for m in (g, h))
    # Last comes what is rounded first: the row and in it the column that matter most.
    order = [(r, c) for r in rows.diagonal().argsort() for c in inputs.diagonal().argsort()]
    places = torch.tensor([int(r) * columns + int(c) for r, c in order])
    lower = torch.linalg.cholesky(torch.kron(rows, inputs)[places][:, places])
    lower = lower / lower.diagonal()
    w, step = weight[0].double().flatten()[places], steps.flatten()[places]
    error, codes = torch.zeros_like(w), torch.empty_like(w)
    for column in range(len(w) - 1, -1, -1):
        codes[column] = ((w[column] + error @ lower[:, column]) / step[column]).round().clamp(-8, 7)
        error[column] = w[column] - codes[column] * step[column]
    wanted = torch.empty_like(codes)
    wanted[places] = codes
    same = (found.values[0].double().flatten() == wanted).double().mean()
    # fp32 and float64 part where one value is halfway between two codes, and what comes after it may differ.
    assert float(same) > 0.99


def test_rows_that_make_up_for_each_other_cost_less() -> None:
    weight, h, g = weights(2, 96, 256), moments(2, 256, 900), moments(1, 96, 400, seed=7)

    alone = rounded(weight, h, damping=0.1)
    assert bool((loss(by_rows(weight, h, g), weight, h, g) < 0.8 * loss(alone, weight, h, g)).all())
    # Rows that have nothing to do with each other leave each other alone.
    apart = by_rows(weight, h, torch.eye(96, device=DEVICE).unsqueeze(0))
    assert torch.equal(apart.scale, alone.scale) and same_codes(apart.values, alone.values)


class TenBits(TorchFunctionMode):
    """Factors of products as a GPU's TF32 has them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = {"bmm": 0, "baddbmm": 1, "baddbmm_": 1}.get(func.__name__)
        if first is not None:
            args = (*args[:first], *map(self.ten_bits, args[first : first + 2]), *args[first + 2 :])
        return func(*args, **(kwargs or {}))

    @staticmethod
    def ten_bits(factor: torch.Tensor) -> torch.Tensor:
        bits = factor.contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def test_products_of_ten_bits_serve_as_well() -> None:
    """What a GPU takes for errors that are passed on: other codes, no worse ones."""
    weight, h, g = weights(4, 96, 384), moments(4, 384, 900), moments(1, 96, 400, seed=7)

    def found() -> QuantizedStack:
        damped = h.clone()
        factor = factorize(damped, 0.1)

        def some(w: torch.Tensor, scale: torch.Tensor) -> QuantizedStack:
            return descend(w, damped, factor, round_twice(w, factor, scale, GROUP))

        scale = searched_scale(weight, factor.diagonal, GROUP)
        return round_rows(weight.clone(), factorize(g.clone(), 0.1), scale, GROUP, some)

    exact = found()
    with TenBits():
        short = found()
    assert not torch.equal(exact.values, short.values)
    torch.testing.assert_close(loss(short, weight, h, g), loss(exact, weight, h, g), rtol=0.02, atol=0)


def test_each_matrix_has_the_rows_of_its_own() -> None:
    """With a moment of the outputs for each, as with one for all."""
    weight, h, g = weights(3, 48, 256), moments(3, 256, 900), moments(3, 48, 200, seed=9)
    together = by_rows(weight, h, g)
    for number in range(3):
        own = slice(number, number + 1)
        alone = by_rows(weight[own], h[own], g[own])
        assert torch.equal(together.scale[own], alone.scale) and same_codes(together.values[own], alone.values)
    assert not torch.equal(by_rows(weight, h, g[:1]).values[1:], together.values[1:])


def test_scales_searched_anew_lose_less() -> None:
    """In no row more, in many less; and what a row loses is told by what it was rounded from."""
    weight, h = weights(2, 64, 384), moments(2, 384, 900)
    h[1] *= 0
    damped_h = h.clone()
    factor = factorize(damped_h, 0.1)
    scale = searched_scale(weight, factor.diagonal, GROUP)
    once, twice = (way(weight.clone(), factor, scale, GROUP) for way in (round_compensated, round_twice))

    def rows(stack: QuantizedStack) -> torch.Tensor:
        change = stack.dequantize(torch.float64) - weight.double()
        return ((change @ damped_h.double()) * change).sum(2)

    before, after = rows(once), rows(twice)
    assert (after <= before * (1 + 1e-5)).all()
    assert (after[0] < 0.99 * before[0]).double().mean() > 0.3 and after[0].sum() < 0.99 * before[0].sum()
    stack, aims = rounding._by_columns(weight.clone(), factor, scale, GROUP, None)
    told = (aims.double() - stack.dequantize(torch.float64)).square() * factor.pivots.double().unsqueeze(1)
    assert torch.allclose(told.sum(2), before, rtol=1e-4)


def test_weights_are_fitted_to_other_inputs() -> None:
    """Against a least squares problem in float64 whose damping is rows of its own that W should do nothing else to."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 900, 128, generator=generator) @ torch.randn(128, 128, generator=generator) / 11
    y, weight = x + 0.3 * torch.randn(x.shape, generator=generator), weights(2, 24, 128).cpu()
    h, crossed = y.mT @ y / 900, (x - y).mT @ y / 900
    unit = h.diagonal(dim1=1, dim2=2).mean(1)
    factor = factorize(h.clone().to(DEVICE), 0.1)
    found = corrected(weight.clone().to(DEVICE), crossed.to(DEVICE), factor).cpu()
    for number in range(2):
        edge = (0.1 * 900 * unit[number].double()) ** 0.5 * torch.eye(128, dtype=torch.float64)
        inputs, wanted = torch.cat([y[number].double(), edge]), torch.cat([x[number].double(), edge])
        best = np.linalg.lstsq(inputs.numpy(), (wanted @ weight[number].double().T).numpy(), rcond=None)[0].T
        assert np.allclose(found[number].double().numpy(), best, rtol=1e-3, atol=1e-3)
    # Where nothing is known, and where it is no number, they stay.
    h[0], crossed[1, 0, 0] = 0, torch.inf
    factor = factorize(h.to(DEVICE), 0.1)
    assert torch.equal(corrected(weight.clone().to(DEVICE), crossed.to(DEVICE), factor).cpu(), weight)


@pytest.mark.parametrize("known", [True, False], ids=["metric", "all outputs alike"])
def test_what_errors_before_down_cost_is_what_they_do_to_the_output(known: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    down, slopes = torch.randn(2, 20, 6, generator=generator), torch.randn(2, 50, 12, generator=generator)
    metric = moments(1, 20, 80, seed=8)[0].cpu() if known else torch.eye(20)
    found = through_down(
        (slopes.mT @ slopes / 50).to(DEVICE), down.to(DEVICE), metric.to(DEVICE) if known else None
    ).cpu()
    error = torch.randn(12, generator=generator).double()
    for number in range(2):
        before = (slopes[number].double() * error).unflatten(1, (2, 6)).sum(1)
        outputs = before @ down[number].double().T
        cost = ((outputs @ metric.double()) * outputs).sum(1).mean()
        assert torch.allclose(error @ found[number].double() @ error, cost, rtol=1e-4)
