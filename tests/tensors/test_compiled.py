"""What numba compiles for CPUs against what torch computes, and the threads that share it out."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers.activations import ACT2FN

import mmq.quantize.routed_experts
import stock_awq
from conftest import NEVER, compile_from
from mmq.families.minimax_m2 import MINIMAX_M2
from mmq.machine.threads import each, one_thread
from mmq.quantize.routed_experts import ExpertBlock, Weights, top_up
from mmq.quantize.search import Found, StackedAWQModifier, awq_mappings
from mmq.tensors.dispatch import Way, way, way_of_columns, worth_compiling
from mmq.tensors.experts import combine, squares_by_expert, token_losses
from mmq.tensors.fp8 import dequantize_block, has_nan, scale_shape
from mmq.tensors.int4 import fake_quantize_scaled, normalized_mean

SHAPES = [(3, 8, 512, 128), (2, 5, 192, 64), (1, 7, 96, 32), (4, 1, 128, 128)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def both(monkeypatch: pytest.MonkeyPatch, function: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What torch and what the compiled functions make of it."""
    results = []
    for least in (NEVER, 0):
        compile_from(monkeypatch, least)
        results.append(function())
    return results[0], results[1]


def identical(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To the bit, but for the kind of NaN."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    same = one.view(width) == other.view(width)
    return one.dtype == other.dtype and bool((same | (one.isnan() & other.isnan())).all())


def odd_weights(experts: int, rows: int, columns: int, group: int) -> torch.Tensor:
    """bfloat16 [E, rows, columns] of all magnitudes: zeros, denormal numbers, ties, near the largest, NaN, infinity."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(experts, rows, columns, generator=generator)
    weight *= 2.0 ** torch.randint(-140, 128, (experts, rows, 1), generator=generator)
    flat = weight.view(-1, group)
    flat[0] = 0
    # A scale of 1: every weight lies between two codes.
    flat[1] = torch.arange(group).remainder(15).sub(7).add(0.5)
    flat[2] = torch.finfo(torch.bfloat16).max
    weight = weight.to(torch.bfloat16)
    flat = weight.view(-1, group)
    flat[-1, group // 2] = torch.nan
    flat[-2, 0] = -torch.inf
    return weight


@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (130, 257), (383, 128), (5, 1000)])
@pytest.mark.parametrize("factor", [1.0, -3e-4, 0.0, 500.0, 2.0**-120, 1e37, float("inf")])
def test_every_fp8_code_is_dequantized_as_by_torch(
    shape: tuple[int, int], factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and partial blocks, each with a scale of its own; results that are subnormal, infinite or NaN as well."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.arange(shape[0] * shape[1]).reshape(shape).to(torch.uint8)
    scale = factor * (1 + torch.rand(scale_shape(shape), generator=generator))
    by_torch, by_numba = both(monkeypatch, lambda: dequantize_block(codes.view(torch.float8_e4m3fn), scale))
    assert identical(by_torch, by_numba)
    kept = torch.full(shape, 7.0, dtype=torch.bfloat16)
    assert dequantize_block(codes.view(torch.float8_e4m3fn), scale, kept) is kept
    assert identical(by_torch, kept)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_among_fp8_codes_is_found(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_from(monkeypatch, 0)
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 5)
    codes[codes & 0x7F == 0x7F] = 0x7E
    assert not has_nan(codes.view(torch.float8_e4m3fn))
    codes[2, 1000] = code
    assert has_nan(codes.view(torch.float8_e4m3fn))
    assert has_nan(codes.view(torch.float8_e4m3fn)[:, 990:1010])


@every_shape
@pytest.mark.parametrize("per_expert", [False, True])
@pytest.mark.parametrize("change", [False, True])
def test_weights_are_rounded_as_torch_rounds_them(
    shape: tuple[int, int, int, int], per_expert: bool, change: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, rows, columns, group = shape
    for weight in (odd_weights(*shape), torch.randn(experts, rows, columns).to(torch.bfloat16)):
        for spread in (0.0, 1.0, 8.0):
            scales = torch.randn((experts, 1, columns) if per_expert else (columns,)).mul_(spread).exp_()
            before = weight.clone()
            plain, compiled = both(
                monkeypatch, lambda w=weight, s=scales: fake_quantize_scaled(w, s, group, None, change)
            )
            assert identical(plain, compiled)
            assert identical(weight, before)
            assert plain.isnan().any() == weight.isnan().any()


def test_the_result_goes_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, out = torch.randn(2, 4, 128).to(torch.bfloat16), torch.empty(2, 4, 128, dtype=torch.bfloat16)
    for result in both(monkeypatch, lambda: fake_quantize_scaled(weight, torch.ones(128), 32, out)):
        assert result.data_ptr() == out.data_ptr()


@every_shape
def test_normalized_means_are_torchs(shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    group = shape[3]
    weight = odd_weights(*shape)
    weight[weight.isinf()] = 0
    plain, compiled = both(monkeypatch, lambda: normalized_mean(weight, group))
    assert identical(plain, compiled)
    assert plain.isnan().sum() == group


@pytest.mark.parametrize("top_k", [1, 3])
def test_a_tokens_loss_is_that_of_its_output(top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, hidden = 37, 72
    outputs = torch.randn(tokens * top_k, hidden).to(torch.bfloat16)
    place = torch.randperm(tokens * top_k).view(tokens, top_k)
    weights, reference = torch.rand(tokens, top_k), torch.randn(tokens, hidden)
    exact = (outputs.double()[place] * weights.double().unsqueeze(2)).sum(1) - reference
    before = reference.clone()
    for found in both(monkeypatch, lambda: token_losses(outputs, place, weights, reference)):
        assert found.dtype == torch.float32 and found.shape == (tokens,)
        torch.testing.assert_close(found.double(), exact.square().sum(1), rtol=1e-5, atol=0)
    plain, compiled = both(monkeypatch, lambda: combine(outputs, place, weights, -reference))
    torch.testing.assert_close(plain, exact.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(plain, compiled)
    assert torch.equal(reference, before)
    outputs[place[3, 0], 5] = torch.nan
    assert all(
        found[3].isnan() for found in both(monkeypatch, lambda: token_losses(outputs, place, weights, reference))
    )
    outputs[place[3, 0], 5] = 3e38
    # Squares beyond fp32 are infinite in either.
    for found in both(monkeypatch, lambda: token_losses(outputs, place, weights, reference)):
        assert found[3].isinf() and found.isfinite().sum() == tokens - 1


@pytest.mark.parametrize("batches", [[0, 111], [0, 40, 111], [0, 1, 2, 60, 111]])
def test_outputs_that_come_in_batches_sum_to_the_same_bits(batches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are what a memory budget makes of the rows; rows of no batch are left out, an infinite one's too."""
    tokens, top_k, hidden = 37, 3, 72
    outputs = torch.randn(tokens * top_k, hidden).to(torch.bfloat16)
    # A token's rows come in the order of its choices, as experts sorted by number give them.
    place = torch.randperm(tokens * top_k).view(tokens, top_k).sort(1).values
    weights, reference = torch.rand(tokens, top_k), torch.randn(tokens, hidden)
    outputs[place[0, 2]] = torch.inf

    def summed() -> torch.Tensor:
        result, rest = torch.zeros(tokens, hidden), reference.clone()
        *some, (first, last) = itertools.pairwise(batches)
        for begin, end in some:
            combine(outputs[begin:end], place, weights, result, begin)
            combine(outputs[begin:end], place, -weights, rest, begin)
        combine(outputs[first:last], place, weights, result, first)
        losses = token_losses(outputs[first:last], place, weights, rest, first)
        return torch.cat([result, losses.unsqueeze(1).expand(-1, hidden)])

    for found in both(monkeypatch, summed):
        assert torch.equal(found[:tokens], combine(outputs, place, weights, torch.zeros(tokens, hidden)))
        once = token_losses(outputs, place, weights, reference)
        torch.testing.assert_close(found[tokens:, 0], once, rtol=1e-6, atol=0)
        assert found[0].isinf().all() and found[1:tokens].isfinite().all()


def test_no_tokens_have_no_losses() -> None:
    outputs, none = torch.randn(4, 16).to(torch.bfloat16), torch.empty(0, 2, dtype=torch.int64)
    assert token_losses(outputs, none, none.float(), torch.empty(0, 16)).shape == (0,)


def test_squares_are_summed_by_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, counts = torch.randn(40, 96).to(torch.bfloat16), [0, 7, 0, 32, 1, 0]
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    expected = torch.stack([part.double().square().sum() for part in rows.split(counts)])
    plain, compiled = both(monkeypatch, lambda: squares_by_expert(rows, ends))
    torch.testing.assert_close(compiled, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(plain, expected, rtol=1e-6, atol=0)


def test_only_large_bf16_tensors_on_a_cpu_are_worth_compiling_for() -> None:
    large = torch.empty(2**20, dtype=torch.bfloat16)
    assert worth_compiling(large) and not worth_compiling(large[:100]) and not worth_compiling(large.float())
    assert not worth_compiling(large.to("meta"))
    # Of a stack, one of its matrices decides, or how many are given at a time would.
    matrix = torch.empty(2**15, dtype=torch.bfloat16)
    assert worth_compiling(matrix.view(1, 128, 256)) and not worth_compiling(matrix.view(4, 64, 128).repeat(9, 1, 1))


def test_both_ways_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the tests here would hold torch's results against themselves."""
    small = torch.zeros(1, 1, 32, dtype=torch.bfloat16)
    ways = []
    for least in (NEVER, 0):
        compile_from(monkeypatch, least)
        ways.append([(way(small), way(small[0]), way_of_columns(small.float()))])
    assert ways == [[(Way.TORCH,) * 3], [(Way.NUMBA,) * 3]]


def test_some_rows_go_the_way_of_their_whole_matrix() -> None:
    some = torch.zeros(2, 4, 128)
    assert way_of_columns(some) == Way.TORCH and way_of_columns(some, 2**15) == Way.NUMBA
    assert way_of_columns(some.repeat(1, 64, 1), 4 * 128) == Way.TORCH


def make_block() -> ExpertBlock:
    """Tokens that reach one expert hardly, and rows that bring it to more."""
    generator = torch.Generator().manual_seed(0)
    layer = stock_awq.random_layer(12, 256, 128, torch.bfloat16, torch.device("cpu"))
    x = torch.randn(700, 256, generator=generator).to(torch.bfloat16)
    scores = torch.rand(700, 12, generator=generator)
    scores[:, 0] -= 0.9
    index = scores.topk(2).indices.sort(1).values
    weight = scores.gather(1, index)
    extra = top_up(scores, index, 300)
    return ExpertBlock(x, index, weight, layer.gate_up, layer.down, ACT2FN["silu"], stock_awq.GROUP_SIZE, extra)


def tensors_of(found: Found) -> list[torch.Tensor]:
    return [value for value in vars(found).values() if isinstance(value, torch.Tensor)]


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    kept = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(kept)


@pytest.mark.parametrize("least", [0, NEVER], ids=["compiled", "torch"])
def test_the_number_of_threads_decides_nothing(
    least: int, monkeypatch: pytest.MonkeyPatch, torch_threads: Callable[[int], None]
) -> None:
    compile_from(monkeypatch, least)
    monkeypatch.setattr(mmq.quantize.routed_experts, "CPU_STEP_ELEMENTS", 2**17)
    monkeypatch.setattr(mmq.quantize.routed_experts, "CPU_PART_TOKENS", 64)
    modifier = StackedAWQModifier(mappings=awq_mappings(MINIMAX_M2), duo_scaling="both", n_grid=6)
    found = []
    for threads in (1, 2, 5):
        torch_threads(threads)
        block = make_block()
        assert block.workers == threads and block.step == 2
        output = block.output(Weights(block))
        norm, down = modifier.search_norm(block, [output]), modifier.search_down(block)
        found.append([output, *tensors_of(norm), *tensors_of(down)])
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_results_come_in_the_items_order(torch_threads: Callable[[int], None]) -> None:
    def slow(number: int) -> tuple[int, str, int]:
        time.sleep(0.02 if number % 3 == 0 else 0)
        return number, threading.current_thread().name, torch.get_num_threads()

    torch_threads(4)
    results = each(slow, iter(range(30)), workers=3, cores=2)
    assert [number for number, _, _ in results] == list(range(30))
    assert len({name for _, name, _ in results}) == 3
    assert threading.current_thread().name in {name for _, name, _ in results}
    assert {cores for _, _, cores in results} == {2}
    # The caller's threads, and those of threads to come, are as they were.
    assert torch.get_num_threads() == 4
    with one_thread("later") as pool:
        assert pool.submit(torch.get_num_threads).result() == 4
    assert each(slow, [], workers=3) == []
    assert {name for _, name, _ in each(slow, range(3), workers=1)} == {threading.current_thread().name}


def test_an_error_ends_the_others() -> None:
    done, running = [], []

    def work(number: int) -> None:
        running.append(number)
        time.sleep(0.02)
        if number == 3:
            raise ValueError("three")
        done.append(number)

    with pytest.raises(ValueError, match="three"):
        each(work, range(100), workers=2)
    assert len(running) == len(done) + 1 < 10
    # An IndexError is the item's, not the end of the items.
    with pytest.raises(IndexError):
        each(lambda items: items[1], [[0, 1], [0]], workers=2)


@pytest.mark.parametrize("sender", ["caller", "other"])
def test_an_interrupt_leaves_nothing_running(sender: str) -> None:
    main, ended, running = threading.main_thread(), [], set()
    assert main.ident is not None
    sent = threading.Event()

    def work(number: int) -> None:
        running.add(number)
        called = threading.current_thread() is main
        # Only the main thread takes signals.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        assert called or {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} <= blocked
        try:
            if called == (sender == "caller") and number >= 4 and not sent.is_set():
                sent.set()
                signal.pthread_kill(main.ident, signal.SIGINT)
            time.sleep(0.05)
            ended.append(number)
        finally:
            running.remove(number)

    with pytest.raises(KeyboardInterrupt):
        each(work, range(1000), workers=3)
    assert not running and 4 <= len(ended) < 30
    before = list(ended)
    time.sleep(0.1)
    assert ended == before


def _squares_in_a_child() -> None:
    assert each(lambda number: number**2, range(5), workers=2) == [0, 1, 4, 9, 16]


def test_a_forked_process_has_threads_of_its_own() -> None:
    _squares_in_a_child()
    child = multiprocessing.get_context("fork").Process(target=_squares_in_a_child)
    child.start()
    child.join(60)
    assert child.exitcode == 0
