"""The tensor functions against formulas from the formats' definitions, on all code points and odd shapes."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.entrypoints.convert import FP8BlockDequantizer
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams

from mmq.quantize.routed_experts import DownInputs
from mmq.source.synth import quantize_block
from mmq.tensors.experts import (
    Rows,
    combine,
    grouped_linear,
    magnitude_sums,
    second_moments,
    squares_by_expert,
)
from mmq.tensors.fp8 import dequantize_block, dequantize_blocks, has_nan, is_finite, scale_shape
from mmq.tensors.int4 import fake_quantize_scaled, normalized_mean, quantize_stack, weight_args
from mmq.tensors.smoothing import candidate_scales, smooth_norm

CODES = torch.arange(256, dtype=torch.uint8)
FINITE = CODES[(CODES & 127) != 127]


def e4m3_value(code: int) -> float:
    """Sign, four exponent bits of bias 7, three mantissa bits; exponent 0 is subnormal."""
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = 2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8)
    return -value if code & 128 else value


@pytest.mark.parametrize("scale", [1.0, 1e-4, 3.7e-7, 127.9, 500.0, 2.0**-120])
def test_every_fp8_code_is_dequantized_in_fp32_and_rounded_once(scale: float) -> None:
    weight = FINITE.view(torch.float8_e4m3fn).unsqueeze(0)
    scales = torch.full(scale_shape(tuple(weight.shape)), scale)
    values = torch.tensor([[e4m3_value(int(code)) for code in FINITE]], dtype=torch.float32)
    expected = (values * torch.tensor(scale)).to(torch.bfloat16)
    assert torch.equal(dequantize_block(weight, scales).view(torch.int16), expected.view(torch.int16))


def test_dequantization_by_rows_over_all_codes() -> None:
    """Each code times each row's scale: sign, exponent and mantissa by hand, in exact fractions of two."""
    codes = [code for code in range(256) if code & 0x7F != 0x7F]
    scales = torch.tensor([1.0, 0.5, 3.0, 0.0123, 2.0**-9, 411.0])
    weight = torch.tensor(codes, dtype=torch.uint8).view(torch.float8_e4m3fn).expand(len(scales), -1).contiguous()
    values = [
        (-1) ** (code >> 7)
        * ((code & 7) * 2.0**-9 if not code >> 3 & 15 else (8 + (code & 7)) * 2.0 ** ((code >> 3 & 15) - 10))
        for code in codes
    ]
    expected = (torch.tensor(values, dtype=torch.float64) * scales.double()[:, None]).float().bfloat16()
    assert torch.equal(dequantize_block(weight, scales[:, None]), expected)
    stacked = dequantize_blocks(weight.expand(3, -1, -1).contiguous(), scales[:, None].expand(3, -1, -1))
    assert torch.equal(stacked, expected.expand(3, -1, -1))


@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (130, 257), (383, 128), (256, 96), (5, 1000)])
def test_fp8_blocks_with_partial_edges_agree_with_compressed_tensors(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(0, len(FINITE), shape, generator=generator)
    weight = FINITE[index].view(torch.float8_e4m3fn)
    scale = torch.rand(scale_shape(shape), generator=generator) * 1e-2
    theirs = FP8BlockDequantizer(targets=["re:.*"]).process({"a.weight": weight, "a.weight_scale_inv": scale})
    assert torch.equal(dequantize_block(weight, scale), theirs["a.weight"])


def test_fp8_of_the_synthetic_model_is_within_half_a_step() -> None:
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    restored = dequantize_block(*quantize_block(weight)).float()
    # Three mantissa bits: half a step is 1/16 of the value; the smallest step is 2^-9 of the block's scale.
    assert (
        (restored - weight).abs() <= weight.abs() / 16 + weight.abs().max() / 448 * 2**-10 + weight.abs() / 256
    ).all()


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_fp8_nan_is_found(code: int) -> None:
    raw = FINITE.clone()
    assert not has_nan(raw.view(torch.float8_e4m3fn))
    raw[77] = code
    assert has_nan(raw.view(torch.float8_e4m3fn))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float64])
def test_is_finite(dtype: torch.dtype) -> None:
    largest = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(largest)
    for bad in (float("nan"), float("inf"), -float("inf")):
        value = torch.zeros(1000, dtype=dtype)
        value[500] = bad
        assert not is_finite(value)
    assert is_finite(torch.zeros(0, dtype=dtype))
    assert is_finite(torch.arange(5))


def test_int4_values_and_packing_over_all_codes() -> None:
    # A group whose largest magnitude is 7.5 steps; every integer is hit, ties go to even, 7.5 is clipped to 7.
    steps = torch.cat([torch.arange(-15, 16) / 2, torch.zeros(97)])
    stack = quantize_stack((steps * 0.5).view(1, 1, 128), 128)
    values = stack.values
    assert float(stack.scale) == 0.5
    expected = [max(-8, min(7, round(float(step)))) for step in steps]
    assert values.flatten().tolist() == expected
    packed = stack.pack()
    assert packed.dtype == torch.int32
    assert packed.shape == (1, 1, 16)
    words = [int(word) & 0xFFFFFFFF for word in packed.flatten()]
    assert [((words[i // 8] >> 4 * (i % 8)) & 15) - 8 for i in range(128)] == expected
    assert torch.equal(unpack_from_int32(packed[0], 4, torch.Size([1, 128])), values[0])
    assert torch.equal(stack.dequantize(torch.float32).flatten(), torch.tensor(expected) * 0.5)


@pytest.mark.parametrize("spread", [1e-6, 0.02, 300.0])
@pytest.mark.parametrize("shape", [(1, 3, 128), (5, 7, 384), (2, 16, 256)])
def test_a_stack_is_quantized_and_packed_as_compressed_tensors_does(shape: tuple[int, int, int], spread: float) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * spread
    weight[0, 0, :128] = 0
    stack, args = quantize_stack(weight.clone(), 128), weight_args(128)
    for number, matrix in enumerate(weight):
        groups = matrix.unflatten(-1, (-1, 128))
        scale = calculate_qparams(groups.amin(-1), groups.amax(-1), args)[0].to(torch.bfloat16)
        scale = torch.where(groups.abs().amax(-1) == 0, torch.finfo(torch.bfloat16).eps, scale)
        values = quantize(matrix, scale.float(), None, args, dtype=torch.int8)
        assert torch.equal(stack.scale[number], scale)
        assert torch.equal(stack.values[number], values)
        assert torch.equal(stack.pack()[number], pack_to_int32(values, 4))
        for dtype in (torch.bfloat16, torch.float32):
            plain = dequantize(values, scale.float(), args=args, dtype=torch.float32).to(dtype)
            assert torch.equal(stack.dequantize(dtype)[number], plain)


@pytest.mark.parametrize("shape", [(1, 3, 128), (5, 7, 384), (2, 16, 256)])
def test_packed_stack_is_each_matrix_packed(shape: tuple[int, int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    stack = quantize_stack(weight, 128)
    for number, matrix in enumerate(stack.pack()):
        assert torch.equal(unpack_from_int32(matrix, 4, torch.Size(shape[1:])), stack.values[number])


def test_zero_groups_stay_zero() -> None:
    weight = torch.zeros(1, 2, 256)
    weight[0, 1, 128:] = 1.0
    values, scale = (stack := quantize_stack(weight.clone(), 128)).values, stack.scale
    assert bool(torch.isfinite(scale.float()).all()) and bool((scale > 0).all())
    assert not values[0, 0].any() and not values[0, 1, :128].any()
    assert bool(torch.isfinite(fake_quantize_scaled(weight, torch.ones(256), 128)).all())


@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_search_sees_what_is_packed(group: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = (torch.randn(3, 40, 256, generator=generator) * 0.02).to(torch.bfloat16)
    scales = torch.rand(3, 1, 256, generator=generator) + 0.5
    stack = quantize_stack(weight.float() * scales, group)
    plain = stack.values.float() * stack.scale.float().repeat_interleave(group, -1) / scales
    assert torch.equal(fake_quantize_scaled(weight, scales, group), plain.to(torch.bfloat16))


def test_normalized_mean_is_the_mean_share_of_the_groups_largest() -> None:
    weight = torch.randn(2, 5, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    expected = torch.zeros(2, 256, dtype=torch.float64)
    for n in range(2):
        for row in weight[n]:
            for start in (0, 128):
                part = row[start : start + 128].abs()
                expected[n, start : start + 128] += part / (part.max() + 1e-6)
    assert torch.allclose(normalized_mean(weight, 128), expected, rtol=1e-12)


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_smoothing_a_norm_changes_nothing_but_fp32_noise(spread: float) -> None:
    generator = torch.Generator().manual_seed(5)
    norm = torch.randn(512, generator=generator).to(torch.bfloat16)
    norm[3] = 0
    smoothed, applied = smooth_norm(norm, (torch.randn(512, generator=generator) * spread).exp())
    assert smoothed.dtype == torch.bfloat16
    product = smoothed.double() * applied.double()
    assert torch.allclose(product, norm.double(), rtol=2**-23, atol=0)
    assert float(applied[3]) == 1.0


def test_smoothing_keeps_channels_that_would_vanish() -> None:
    norm = torch.tensor([1e-38, 1.0, 3e38], dtype=torch.bfloat16)
    smoothed, applied = smooth_norm(norm, torch.tensor([1e30, 2.0, 1e-3]))
    assert torch.isfinite(smoothed.float()).all() and bool((smoothed != 0).all())
    assert torch.allclose(smoothed.double() * applied.double(), norm.double(), rtol=2**-23)


def test_candidate_scales_follow_the_paper_and_are_normalized() -> None:
    x, w = torch.rand(3, 64) + 0.1, torch.rand(3, 64) + 0.1
    for ratio in (0.0, 0.3, 1.0):
        plain, duo = candidate_scales(x, w, [(ratio, False), (ratio, True)])
        for row in range(3):
            raw = torch.tensor([float(v) ** ratio for v in x[row]])
            assert torch.allclose(plain[row] / plain[row, 0], raw / raw[0], rtol=1e-5)
            raw = torch.tensor(
                [float(a) ** ratio / (float(b) ** (1 - ratio) + 1e-4) for a, b in zip(x[row], w[row], strict=True)]
            )
            assert torch.allclose(duo[row] / duo[row, 0], raw / raw[0], rtol=1e-4)
        for scales in (plain, duo):
            assert torch.allclose(scales.amax(-1) * scales.amin(-1), torch.ones(3), rtol=1e-5)
    assert torch.equal(candidate_scales(x, w, [(0.0, False)]), torch.ones(1, 3, 64))


def test_dead_channels_get_a_finite_scale() -> None:
    scales = candidate_scales(torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.0, 0.5, 0.5]), [(0.5, True)])
    assert torch.isfinite(scales).all() and bool((scales > 0).all())


def test_rows_sort_tokens_by_expert_and_combine_adds_them_back() -> None:
    generator = torch.Generator().manual_seed(6)
    index = torch.rand(50, 7, generator=generator).topk(3).indices
    index[index == 5] = 4  # an expert without tokens; expert 4 may come twice
    weights = torch.rand(50, 3, generator=generator)
    rows = Rows.of(index, 7)
    assert rows.counts == torch.bincount(index.flatten(), minlength=7).tolist()
    x, matrices = torch.randn(50, 16, generator=generator), torch.randn(7, 8, 16, generator=generator)
    outputs = torch.empty(150, 8)
    for piece in (piece for first in range(0, 7, 2) for piece in rows.pieces(first, min(first + 2, 7), 1000)):
        inputs = x[rows.token[piece.start : piece.stop]]
        outputs[piece.start : piece.stop] = grouped_linear(inputs, matrices[piece.first : piece.last], piece.ends)
    start = torch.randn(50, 8, generator=generator)
    expected = start.clone()
    for token in range(50):
        for slot in range(3):
            expected[token] += weights[token, slot] * (matrices[index[token, slot]] @ x[token])
    assert torch.allclose(combine(outputs, rows.place, weights, start.clone()), expected, atol=1e-5)


def test_sums_over_an_experts_rows_add_up() -> None:
    rows, counts = torch.randn(30, 13).to(torch.bfloat16), [5, 0, 24, 1]
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    wide = [part.double() for part in rows.split(counts)]
    moments, magnitudes = torch.ones(4, 13, 13), torch.ones(4, 13)
    second_moments(rows, ends, moments)
    magnitude_sums(rows, ends, magnitudes)
    squares = squares_by_expert(rows, ends)
    for expert, own in enumerate(wide):
        torch.testing.assert_close(moments[expert], (1 + own.T @ own).float(), rtol=1e-5, atol=1e-5)
        assert torch.equal(moments[expert], moments[expert].T)
        torch.testing.assert_close(magnitudes[expert], (1 + own.abs().sum(0)).float(), rtol=1e-6, atol=0)
        torch.testing.assert_close(squares[expert], own.square().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("many", [True, False])
def test_a_changed_down_weight_is_measured_by_moments_as_by_rows(many: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    counts, inner, hidden = [5, 0, 9, 1], 12, 7
    chunks = [(torch.randn(sum(counts), inner, generator=generator), counts) for _ in range(2)]
    change = torch.randn(4, hidden, inner, generator=generator)
    inputs = DownInputs.empty(torch.tensor(counts) * 2, inner, 2 * sum(counts), 4)
    assert inputs.moments is None
    if many:
        inputs.moments = torch.zeros(4, inner, inner)
    for rows, sizes in chunks:
        inputs.add(rows, torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32))
    for expert in range(4):
        own = torch.cat([rows.split(sizes)[expert] for rows, sizes in chunks]).double()
        assert torch.allclose(inputs.sums[expert].double(), own.abs().sum(0), rtol=1e-5)
        expected = (own @ change[expert].double().T).square().sum()
        assert torch.allclose(inputs.squared_change(change)[expert].double(), expected, rtol=1e-5, atol=1e-9)
    assert DownInputs.empty(torch.tensor([13 * 4, 0, 0, 0]), inner, 13 * 4, 4).moments is not None
