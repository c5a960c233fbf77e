"""Everything that only a GPU can tell, in one run of at most eight minutes.

    python scripts/gpu_check.py --out results.jsonl
    python scripts/gpu_check.py --device cpu --small
    python scripts/gpu_check.py --parts kernels,rounding

Each part runs under its own time limit and writes one JSON line as soon as it knows something; a table of all comes
last. A part that fails, hangs or kills its process costs the others nothing. What was never measured comes first, so
that it is what has time.

    ceilings      rates of a large product, of a grouped one, and of copies on the card and to and from the host
    kernels       every operation of mmq.tensors and the parts of compensated rounding on the device against the CPU,
                  bit for bit or within what stands beside each, and on more than 2^31 numbers
    rounding      compensated rounding of a layer of MiniMax-M2.5's shape, 131,072 tokens: seconds, rates and memory of
                  a step of experts part by part, three ways to factorize, whether the number of experts at a time
                  changes codes, the layer as a whole
    gradient      a layer and the head for `awq.fisher_tokens`, forward and back, 32,768 tokens: seconds, memory beside
                  the plan's, the same bits twice
    tiny          the tiny project's stages on the device, compensated and rounded to nearest: twice, killed and
                  resumed, layers not read ahead, under torch's ban on chance: the same bytes, which pass verify; how
                  many codes are others on the CPU
    layer         a whole layer of that shape, seconds by part, in both ways of rounding and both searches
    stage         `mmq awq` on three such layers from fp8, with random routers, compensated and to nearest
    growth        `mmq awq` on ten smaller layers: memory reserved after each
    profile       where a pass of the search and a step of compensated rounding spend their time
    speed         operations of the search at the real shape, Triton's form beside torch's
    tests         some of the tests with MMQ_TEST_DEVICE, where pytest is
    stock         llmcompressor's search as shipped at two numbers of tokens
    search        the search of that layer with working memory of 16, 8, 4 and 2 GiB, and in full
    stock_routed  llmcompressor's search on routed tokens

It needs no network. On a machine without one that has PyTorch, Triton and transformers, the other packages come as
wheels. Here, with freeze.txt the list that `python3 -m pip freeze` prints there:

    .venv/bin/python scripts/gpu_wheels FOLDER --have freeze.txt

and there, in a copy of this repository:

    python3 -m pip install --no-index --no-deps --target site FOLDER/*.whl
    PYTHONPATH=site:src PYTHONUNBUFFERED=1 python3 scripts/gpu_check.py --out results.jsonl

One run ends some seconds after `--seconds`, 420 unless told. What had no time is said to have failed, and `--parts`
asks for it in another run. It writes at most 20 GB below $TMPDIR. `--device cpu --small` runs all parts at toy sizes,
in 80 seconds on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ["LLM_COMPRESSOR_LOG_DISABLED"] = os.environ["COMPRESSED_TENSORS_LOG_DISABLED"] = "true"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "src")]

GIB = 2**30
# Seconds a layer that arithmetic from the datasheets gave before anything had run: with all kernels, and with the race.
PREDICTED = {"H200": (1.9, 1.2), "H100": (2.0, 1.2), "A6000": (12.5, 6.2), "4090": (6.9, 3.6), "5090": (5.3, 2.8)}


@dataclass(frozen=True)
class Context:
    """What all parts are given."""

    device: str
    small: bool

    @property
    def tokens(self) -> int:
        return 512 if self.small else 131072

    def shape(self) -> Any:
        from real_layers import Shape

        return Shape(8, 256, 128, 2, 4, 2, 64) if self.small else Shape()

    def torch_device(self) -> Any:
        from mmq.machine.device import present_device

        return present_device(self.device)

    @property
    def is_gpu(self) -> bool:
        return self.device != "cpu"


Facts = dict[str, Any]


def synchronize(context: Context) -> None:
    import torch

    if context.is_gpu:
        torch.cuda.synchronize()


def timed(context: Context, work: Callable[[], Any], repeat: int = 3) -> float:
    """Seconds of the fastest of some runs after a warm-up."""
    best = float("inf")
    work()
    for _ in range(1 if context.small else repeat):
        synchronize(context)
        begin = time.perf_counter()
        work()
        synchronize(context)
        best = min(best, time.perf_counter() - begin)
    return best


def product_rate(context: Context) -> float:
    """Operations a second of a large bf16 product."""
    import torch

    size = 512 if context.small else 8192
    a = torch.randn(size, size, device=context.torch_device()).to(torch.bfloat16)
    b = torch.randn_like(a)
    return 2 * size**3 / timed(context, lambda: torch.mm(a, b), 10)


def _grouped_rate(context: Context) -> float | None:
    """Operations a second of torch's own grouped product of gate and up; None where the card has none."""
    import torch

    from mmq.tensors.dispatch import grouped_mm_works

    device, shape = context.torch_device(), context.shape()
    if not grouped_mm_works(device, torch.bfloat16):
        return None
    each = 16 if context.small else 1024
    weight = torch.empty(shape.experts, 2 * shape.intermediate, shape.hidden, dtype=torch.bfloat16, device=device)
    rows = torch.randn(each * shape.experts, shape.hidden, device=device).to(torch.bfloat16)
    ends = torch.arange(each, rows.shape[0] + 1, each, dtype=torch.int32, device=device)
    weight.normal_().mul_(shape.hidden**-0.5)
    seconds = timed(context, lambda: torch.nn.functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends))
    return 2 * rows.shape[0] * weight[0].numel() / seconds


def ceilings(context: Context) -> Iterator[Facts]:
    """What the card can do at all."""
    import torch

    device = context.torch_device()
    facts: Facts = {"product_tflops": product_rate(context) / 1e12}
    numbers = torch.randint(0, 255, (2**24 if context.small else 2**32,), dtype=torch.uint8, device=device)
    other = torch.empty_like(numbers)
    facts["copy_gb_per_s"] = 2 * numbers.numel() / timed(context, partial(other.copy_, numbers)) / 1e9
    if context.is_gpu:
        host = torch.empty(2**29, dtype=torch.uint8)
        pinned = torch.empty(2**29, dtype=torch.uint8, pin_memory=True)
        for name, memory in (("pageable", host), ("pinned", pinned)):
            part = numbers[: memory.numel()]
            facts[f"up_{name}_gb_per_s"] = memory.numel() / timed(context, partial(part.copy_, memory)) / 1e9
            facts[f"down_{name}_gb_per_s"] = memory.numel() / timed(context, partial(memory.copy_, part)) / 1e9
        properties = torch.cuda.get_device_properties(device)
        facts["card"] = (
            f"{properties.name}, {properties.multi_processor_count} SMs, sm_{properties.major}{properties.minor}"
        )
        facts["memory_gib"] = round(properties.total_memory / GIB, 1)
    yield facts
    # Freed before the products take their place.
    del numbers, other
    grouped = _grouped_rate(context)
    facts = {} if grouped is None else {"grouped_tflops": grouped / 1e12}
    facts["torch"] = torch.__version__
    with contextlib.suppress(ImportError):
        import triton

        facts["triton"] = triton.__version__
    yield facts


def kernels(context: Context) -> Iterator[Facts]:
    """The device against the CPU, under torch's ban on operations whose result chance decides."""
    import torch

    from gpu_operations import checks, compared, integers, tails
    from mmq.tensors import dispatch

    device = context.torch_device()
    torch.use_deterministic_algorithms(True)
    try:
        from mmq.tensors import compiled  # noqa: F401
    except Exception as error:
        # The CPU's side is torch's then.
        dispatch.COMPILED_FROM = dispatch.COMPILED_MATRIX = 2**62
        yield {"check": "numba", "ok": False, "error": f"{type(error).__name__}: {str(error)[:200]}"}
    for check in checks():
        facts: Facts = {"check": check.name}
        try:
            inputs = check.inputs(torch.Generator().manual_seed(0))
            expected = check.operation(*inputs)
            there = [value.to(device) if isinstance(value, torch.Tensor) else value for value in inputs]
            once, again = (check.operation(*there) for _ in range(2))
            facts["repeats"] = bool(torch.equal(integers(once), integers(again)))
            facts |= compared(once.cpu(), expected, check.tolerance, check.others)
            facts["ok"] = facts["ok"] and facts["repeats"]
        except Exception as error:
            facts |= {"ok": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
            if "CUDA error" in str(error):
                yield facts
                raise
        yield facts
    for name, tolerance, tail in tails():
        facts = {"check": f"{name}, the end of a large one"}
        try:
            facts |= compared(*tail(device, 2**22 if context.small else 2**31), tolerance)
        except Exception as error:
            facts |= {"ok": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
            if "CUDA error" in str(error):
                yield facts
                raise
        if context.is_gpu:
            torch.cuda.empty_cache()
        yield facts
    reduced = context.is_gpu and torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    yield {"check": "no sums in bf16", "ok": not reduced}


def speed(context: Context) -> Iterator[Facts]:
    """Operations at the real shape: bytes or products a second, Triton's form and torch's."""
    import torch

    from mmq.tensors import dispatch, experts, fp8, int4

    device, shape = context.torch_device(), context.shape()
    count, hidden, inner, top_k = shape.experts, shape.hidden, shape.intermediate, shape.top_k
    tokens = context.tokens // 4
    generator = torch.Generator(device).manual_seed(0)
    gate_up = torch.empty(count, 2 * inner, hidden, dtype=torch.bfloat16, device=device)
    down = torch.empty(count, hidden, inner, dtype=torch.bfloat16, device=device)
    for expert in range(count):
        gate_up[expert].normal_(generator=generator).mul_(hidden**-0.5)
        down[expert].normal_(generator=generator).mul_(inner**-0.5)
    x = torch.randn(tokens, hidden, generator=generator, device=device).to(torch.bfloat16)
    index = torch.rand(tokens, count, generator=generator, device=device).topk(top_k).indices.sort(1).values
    rows = experts.Rows.of(index, count)
    (piece,) = rows.pieces(0, count, 2**40)
    total = piece.stop
    weight = torch.rand(tokens, top_k, device=device)
    reference = torch.randn(tokens, hidden, device=device)
    middle = torch.randn(total, inner, generator=generator, device=device).to(torch.bfloat16)
    outputs = torch.empty(total, hidden, dtype=torch.bfloat16, device=device)
    scales = torch.rand(hidden, device=device) + 0.5
    changed = torch.empty_like(gate_up)
    silu = torch.nn.functional.silu
    codes = gate_up.view(torch.uint8)[:, :inner, :hidden].contiguous().bitwise_and_(0x7E).view(torch.float8_e4m3fn)
    blocks = torch.rand(count, *fp8.scale_shape((inner, hidden)), device=device)
    moments = torch.zeros(min(count, 64), inner, inner, device=device)
    some = int(rows.ends[len(moments) - 1])
    operations: list[tuple[str, float, str, Callable[[], Any]]] = [
        (
            "quantize gate_up",
            4.0 * gate_up.numel(),
            "GB",
            lambda: int4.fake_quantize_scaled(gate_up, scales, 128, changed),
        ),
        ("dequantize fp8", 3.0 * codes.numel(), "GB", lambda: fp8.dequantize_blocks(codes, blocks)),
        (
            "gather, gate_up, gate",
            4.0 * total * inner * hidden,
            "TFLOP",
            lambda: experts.gated_rows(x, rows.token, gate_up, piece.ends, silu),
        ),
        (
            "down, into a place",
            2.0 * total * inner * hidden,
            "TFLOP",
            lambda: experts.grouped_rows(middle, down, piece.ends, outputs),
        ),
        ("down", 2.0 * total * inner * hidden, "TFLOP", lambda: experts.grouped_linear(middle, down, piece.ends)),
        (
            "token losses",
            2.0 * outputs.numel() + 4.0 * reference.numel(),
            "GB",
            lambda: experts.token_losses(outputs, rows.place, weight, reference),
        ),
        (
            "combine",
            2.0 * outputs.numel() + 8.0 * reference.numel(),
            "GB",
            lambda: experts.combine(outputs, rows.place, weight, reference),
        ),
        (
            "second moments",
            2.0 * some * inner * inner,
            "TFLOP",
            lambda: experts.second_moments(middle[:some], piece.ends[: len(moments)], moments),
        ),
        (
            "quadratic form of the moments",
            2.0 * len(moments) * hidden * inner * inner,
            "TFLOP",
            lambda: experts.quadratic_form(down[: len(moments)], moments),
        ),
        (
            "quantize for good, 16 experts",
            4.5 * gate_up[:16].numel(),
            "GB",
            lambda: int4.quantize_in_place(gate_up[:16], scales, None, 128),
        ),
    ]
    works = dispatch.triton_works
    for name, amount, unit, operation in operations:
        facts: Facts = {"operation": name, "unit": f"{unit}/s"}
        scale = 1e9 if unit == "GB" else 1e12
        for form, triton in (("mmq", works), ("torch", lambda _: False)):
            if form == "torch" and not context.is_gpu:
                continue
            dispatch.triton_works = triton
            try:
                seconds = timed(context, operation)
                facts |= {form: round(amount / seconds / scale, 1), f"{form}_ms": round(seconds * 1e3, 3)}
            except Exception as error:
                facts[f"{form}_error"] = f"{type(error).__name__}: {str(error)[:200]}"
                if "CUDA error" in str(error):
                    yield facts
                    raise
            finally:
                dispatch.triton_works = works
                if context.is_gpu:
                    torch.cuda.empty_cache()
        yield facts


def _quantizer(context: Context, config: Facts, tokens: int, **settings: Any) -> Any:
    import torch

    from mmq.families.minimax_m2 import MINIMAX_M2
    from mmq.quantize.layer import LayerQuantizer
    from mmq.recipe import Awq

    sequence = min(1024, tokens)
    awq = Awq.model_validate({"calibration": {"files": [{"path": "unused.jsonl"}]}} | settings)
    lengths = [sequence] * (tokens // sequence)
    return LayerQuantizer(MINIMAX_M2, config, awq, lengths, torch.arange(sum(lengths)), context.torch_device())


def layer(context: Context) -> Iterator[Facts]:
    """Attention, search, rounding and propagation of one layer, in both ways of rounding and both searches."""
    import torch

    from real_layers import layer_in_memory

    device = context.torch_device()
    # The second runs warm: the first of anything pays for compiling and choosing kernels.
    runs = [("paired", "compensated"), ("paired", "compensated"), ("paired", "nearest"), ("full", "nearest")]
    for search, rounding in runs:
        content, config, hidden = layer_in_memory(context.shape(), context.tokens, device)
        quantizer = _quantizer(context, config, context.tokens, search=search, rounding=rounding)
        if context.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        synchronize(context)
        begin = time.perf_counter()
        result = quantizer.quantize(0, content, hidden, _costs(context) if rounding == "compensated" else None)
        synchronize(context)
        statistics = result.statistics
        points = statistics["norm"]["points"]
        facts: Facts = {
            "search": search,
            "rounding": rounding,
            "seconds": round(time.perf_counter() - begin, 3),
            "parts": statistics["seconds"],
            "passes": round(sum(point["tokens"] for point in points) / context.tokens, 2),
            "point": [statistics["norm"]["ratio"], statistics["norm"]["duo_scaling"]],
            "loss_of_nearest": statistics["loss_chosen"] / statistics["loss_round_to_nearest"],
            "fewest_tokens": min(statistics["tokens_per_expert"]),
        }
        if context.is_gpu:
            facts["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
            facts["peak_beyond_inputs_gib"] = round((torch.cuda.max_memory_allocated() - before) / GIB, 2)
            facts["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
            facts["predicted_seconds"] = next(
                (v for k, v in PREDICTED.items() if k in torch.cuda.get_device_name()), None
            )
        yield facts
        del content, hidden, result, quantizer


@cache
def _block(context: Context, budget: int, full: bool) -> Any:
    """The block of a layer, with its budget, and the unquantized outputs."""
    import torch

    import stock_awq
    from mmq.quantize.race import parts
    from mmq.quantize.routed_experts import ExpertBlock, Weights

    x, index, weight, own = _routed(context)
    shares = (1.0,) if full else parts(index.numel() / own.gate_up.shape[0])
    block = ExpertBlock(
        x, index, weight, own.gate_up, own.down, torch.nn.functional.silu, stock_awq.GROUP_SIZE, None, budget, shares
    )
    return block, block.outputs(Weights(block))


@cache
def _routed(context: Context) -> Any:
    from mmq.families.minimax_m2 import MINIMAX_M2
    from mmq.quantize.decoder_layer import DecoderLayer, transformers_config
    from real_layers import layer_in_memory

    device = context.torch_device()
    content, config, hidden = layer_in_memory(context.shape(), context.tokens, device)
    decoder = DecoderLayer(MINIMAX_M2, transformers_config(MINIMAX_M2, config), 0, content.rest, device)
    x = decoder.block_input(hidden)
    _, weight, index = decoder.route(x)
    return x, index, weight, content


def _modifier() -> Any:
    from mmq.families.minimax_m2 import MINIMAX_M2
    from mmq.quantize.search import StackedAWQModifier, awq_mappings

    return StackedAWQModifier(mappings=awq_mappings(MINIMAX_M2), duo_scaling=True, n_grid=20)


# What of compensated rounding is timed apart, by the names that `quantize.rounding` calls it by.
STEPS = {
    "_inputs": "moments", "_middles": "moments", "_costs": "slopes", "through_down": "through_down", "_grams": "grams",
    "expected": "shrink", "shrink": "shrink", "factorize": "factorize", "corrected": "corrected",
    "searched_scale": "scales", "round_twice": "columns", "descend": "sweep", "round_rows": "rows", "put": "put",
    "hear": "judging",
}  # fmt: skip


@contextlib.contextmanager
def _timed_apart(context: Context) -> Iterator[dict[str, float]]:
    """Seconds of each part of compensated rounding within the block, the device waited for before and after each; what
    is a part of another counts there alone."""
    from mmq.quantize import rounding

    seconds = dict.fromkeys(STEPS.values(), 0.0)
    owners = {
        "_inputs": rounding.Compensation,
        "_middles": rounding.Compensation,
        "_costs": rounding.Compensation,
        "put": rounding.Rounded,
        "hear": rounding._Jury,
    }
    # Of the calls that a thread is in, seconds of their parts.
    inside: dict[int, list[float]] = defaultdict(lambda: [0.0])

    def timed_apart(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            synchronize(context)
            begin, own = time.perf_counter(), inside[threading.get_ident()]
            own.append(0.0)
            result = function(*arguments, **options)
            synchronize(context)
            took = time.perf_counter() - begin
            seconds[STEPS[name]] += took - own.pop()
            own[-1] += took
            return result

        return run

    with contextlib.ExitStack() as stack:
        for name in STEPS:
            owner = owners.get(name, rounding)
            stack.enter_context(mock.patch.object(owner, name, timed_apart(name, getattr(owner, name))))
        yield seconds


def _reset_peak(context: Context) -> int:
    """Begin to measure the most that is allocated; what is now."""
    import torch

    if not context.is_gpu:
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak_since(context: Context, before: int) -> Facts:
    import torch

    if not context.is_gpu:
        return {}
    return {
        "peak_beyond_inputs_gib": round((torch.cuda.max_memory_allocated() - before) / GIB, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
    }


def _costs(context: Context) -> Any:
    """What errors of a block's output cost, as a gradient would give it."""
    import torch

    from mmq.quantize.fisher import fisher

    hidden, device = context.shape().hidden, context.torch_device()
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(context.tokens, hidden, generator=generator, device=device)
    mix = torch.randn(hidden, hidden, generator=generator, device=device) / hidden**0.5
    return fisher(torch.addmm(rows, rows, mix))


def _lengths(context: Context, tokens: int) -> list[int]:
    """Of the samples that so many tokens make up."""
    sequence = min(1024, context.tokens // 16)
    return [sequence] * (tokens // sequence)


def rounding(context: Context) -> Iterator[Facts]:
    """Compensated rounding: a step of experts part by part, ways to factorize, and a layer as a whole."""
    import torch

    from mmq.quantize.rounding import Compensation, Metric, held_back, rows_per_column

    block, reference = _block(context, 8 * (2**20 if context.small else GIB), False)
    fitted = (~held_back(_lengths(context, context.tokens))).nonzero().flatten().to(block.x.device)
    costs = _costs(context)
    metric = Metric.of(costs, context.tokens, rows_per_column(block, fitted))
    compensation = Compensation(block, fitted, context.tokens, metric)
    yield from _rounded_step(context, compensation)
    yield from _factorized(context, compensation)
    del compensation
    if context.is_gpu:
        torch.cuda.empty_cache()
    yield from _judged(context, block, reference, costs)


def _rounded_step(context: Context, compensation: Any) -> Iterator[Facts]:
    """As many experts as come together: seconds, rates, memory, and the codes again and in smaller steps."""
    import torch

    from mmq.quantize.rounding import PROBED, Rounded, Smoothing

    shape, block = context.shape(), compensation.block
    hidden, inner, device = shape.hidden, shape.intermediate, block.x.device
    plain = Smoothing(torch.ones(hidden, device=device), torch.ones(shape.experts, inner, device=device))
    count = compensation.step
    chosen = torch.arange(shape.experts) < count
    first, again, halves, exact = (Rounded(block, plain) for _ in range(4))
    # Compiles.
    compensation.fit([first], chosen)
    before = _reset_peak(context)
    with _timed_apart(context) as seconds:
        compensation.fit([again], chosen)
    peak = _peak_since(context, before)
    del seconds["judging"]
    share = shape.experts / count * (1 + 1 / PROBED)
    rows = sum(compensation.rows.counts[:count])
    yield {
        "of": f"{count} experts, {rows} rows",
        "layer_seconds": {name: round(took * share, 3) for name, took in seconds.items()},
        "sum": round(sum(seconds.values()) * share, 2),
    }
    columns = count * (2 * inner * hidden**2 + hidden * inner**2)
    operations = {
        "moments": rows * (2 * hidden**2 + 8 * inner**2 + 8 * hidden * inner),
        "slopes": rows * (8 * inner**2 + 4 * hidden * inner),
        "through_down": 2 * count * (hidden**2 * inner + hidden * inner**2),
        "grams": 2 * columns,
        "factorize": count * (hidden**3 + 9 * inner**3) / 3,
        "corrected": 4 * count * hidden * inner**2,
        "columns": 2 * columns,
        "sweep": 2 * columns,
        "rows": count * (hidden**2 * inner + 4 * inner**2 * hidden),
    }
    rates = {name: round(number / max(1e-9, seconds[name]) / 1e12, 2) for name, number in operations.items()}
    weights = 3 * count * hidden * inner
    rates["scales_gweights_per_s"] = round(weights / seconds["scales"] / 1e9, 2)
    planned = compensation.least(hidden, inner) * count
    yield {"of": "their TFLOP/s", **rates, **peak, "planned_gib": round(planned / GIB, 2)}
    # How many are rounded at a time: kernels may be chosen by it, and sums come in another order.
    compensation.step = -(-count // 2)
    compensation.fit([halves], chosen)
    compensation.step = count
    with mock.patch("mmq.quantize.rounding.tensor_cores", lambda device: contextlib.nullcontext()):
        begun = time.perf_counter()
        compensation.fit([exact], chosen)
        synchronize(context)
        yield {"of": "their layer, products in fp32", "sum": round((time.perf_counter() - begun) * share, 2)}
    differing = {}
    for name, other in (("again", again), ("halves", halves), ("fp32", exact)):
        pairs = zip(first.packed, other.packed, strict=True)
        differing[name] = sum(_other_codes(one[:count], two[:count]) for one, two in pairs) / weights
    yield {"of": "other codes", "ok": differing["again"] == 0, **differing}


def _factorized(context: Context, compensation: Any) -> Iterator[Facts]:
    """Ways to factorize a step's second moments: milliseconds a matrix, and how far they are off."""
    count, block = compensation.step, compensation.block

    def middles() -> Any:
        return compensation._middles(block.gate_up[:count].float(), 0, count)[0]

    for moments_of in (lambda: compensation._inputs(0, count)[0], middles, lambda: compensation._costs(0, count)):
        moments = moments_of()
        moments /= moments.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-9).view(-1, 1, 1)
        moments.diagonal(dim1=1, dim2=2).add_(0.1)
        facts: Facts = {"of": f"factorizing {count} of {moments.shape[1]}, ms each"}
        for name, way in (("together", _together), ("one_by_one", _one_by_one), ("in_blocks", _in_blocks)):
            try:
                facts[name] = round(timed(context, partial(way, moments), 1) / count * 1e3, 3)
                lower = way(moments)[:1].double()
                facts[f"{name}_off"] = float((lower @ lower.mT - moments[:1]).abs().max() / moments[:1].max())
            except RuntimeError as error:
                facts[f"{name}_error"] = str(error)[:200]
                if "CUDA error" in str(error):
                    yield facts
                    raise
        yield facts


def _judged(context: Context, block: Any, reference: Any, costs: Any) -> Iterator[Facts]:
    """All of a layer's rounding: by what errors cost, part by part, and with all outputs alike."""
    from mmq.quantize.rounding import Smoothing, judge

    modifier, lengths = _modifier(), _lengths(context, context.tokens)
    norm, down = modifier.search_norm(block, reference), modifier.search_down(block)
    found = Smoothing(norm.scales, down.scales)
    for name, apart, fisher in (("weighed", False, costs), ("weighed", True, costs), ("alike", False, None)):
        before = _reset_peak(context)
        synchronize(context)
        begin = time.perf_counter()
        with _timed_apart(context) if apart else contextlib.nullcontext({}) as seconds:
            verdict = judge(block, reference, lengths, context.tokens, found, fisher=fisher)
        synchronize(context)
        took = time.perf_counter() - begin
        if apart:
            seconds["rest"] = took - sum(seconds.values())
            begin = time.perf_counter()
            if verdict.rounded:
                verdict.rounded.digests()
            seconds["digests"] = time.perf_counter() - begin
            yield {"of": "a layer, part by part", **{name: round(part, 3) for name, part in seconds.items()}}
            continue
        statistics = verdict.statistics
        yield {
            "of": f"a layer, outputs {name}",
            "seconds": round(took, 3),
            "chosen": statistics["rounding"],
            "smoothed": verdict.smoothed,
            "loss_of_nearest": statistics["loss_chosen"] / statistics["loss_round_to_nearest"],
            **_peak_since(context, before),
        }


def gradient(context: Context) -> Iterator[Facts]:
    """What `awq.fisher_tokens` takes of a layer, and of the head."""
    import torch

    from mmq.families.minimax_m2 import MINIMAX_M2
    from mmq.machine.team import ALONE
    from mmq.quantize.decoder_layer import DecoderLayer, transformers_config
    from mmq.quantize.fisher import SourceLayer, fisher
    from mmq.quantize.head import Head
    from mmq.quantize.memory import fisher_memory
    from real_layers import layer_in_memory

    shape, device, tokens = context.shape(), context.torch_device(), context.tokens // 4
    vocabulary = 1024 if context.small else 200064
    content, config, hidden = layer_in_memory(shape, tokens, device)
    lengths, settings = _lengths(context, tokens), transformers_config(MINIMAX_M2, config)
    decoder = DecoderLayer(MINIMAX_M2, settings, 0, content.rest, device)
    layer = SourceLayer(decoder, content, lengths, ALONE)
    weight = torch.randn(vocabulary, shape.hidden, device=device).mul_(shape.hidden**-0.5).to(torch.bfloat16)
    head = Head(MINIMAX_M2, settings, torch.ones_like(hidden[0]), weight)
    ids = torch.randint(0, vocabulary, (tokens,), device=device)
    above = head.gradient(hidden, ids)
    whole = sum(tensor.nbytes for tensor in content.tensors)
    planned = fisher_memory(
        whole, tokens, tokens, lengths[0], shape.hidden, shape.intermediate, shape.top_k, vocabulary, context.is_gpu
    )
    yield {"of": "the plan", "gib": round(planned / GIB, 2), "of_which_layer_gib": round(whole / GIB, 2)}
    for name, work in (
        ("the loss and its gradient", lambda: head.gradient(hidden, ids)),
        ("forward", lambda: layer.forward(hidden)),
        ("back", lambda: layer.back(hidden, above)),
        ("second moments", lambda: fisher(above).matrix),
    ):
        before = _reset_peak(context)
        seconds = timed(context, work, 2)
        peak = _peak_since(context, before)
        same = bool(torch.equal(work(), work()))
        yield {"of": name, "tokens": tokens, "seconds": round(seconds, 3), "same_bits": same, "ok": same, **peak}


def _together(moments: Any) -> Any:
    """Cholesky factors of [n, k, k], all by one call."""
    import torch

    return torch.linalg.cholesky_ex(moments)[0]


def _one_by_one(moments: Any) -> Any:
    import torch

    return torch.stack([torch.linalg.cholesky_ex(one)[0] for one in moments])


def _in_blocks(moments: Any, size: int = 512) -> Any:
    """Diagonal blocks of all matrices by one call, and products for what is below."""
    import torch

    lower = moments.clone()
    for start in range(0, moments.shape[1], size):
        stop = start + size
        own = torch.linalg.cholesky_ex(lower[:, start:stop, start:stop])[0]
        lower[:, start:stop, start:stop] = own
        below = torch.linalg.solve_triangular(own.mT, lower[:, stop:, start:stop], upper=True, left=False)
        lower[:, stop:, start:stop] = below
        lower[:, stop:, stop:].baddbmm_(below, below.mT, alpha=-1)
    return lower.tril_()


def _other_codes(one: Any, other: Any) -> int:
    """How many of the int4 codes in two packed tensors are not the same."""
    import torch

    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=one.device)
    return sum(
        int((((a ^ b).unsqueeze(-1) >> shifts) & 15).ne(0).sum())
        for a, b in zip(one.split(64), other.split(64), strict=True)
    )


def search(context: Context) -> Iterator[Facts]:
    """Seconds of the norm's and of down's search, by working memory, and their share of the products' own time."""
    import torch

    shape = context.shape()
    rows = context.tokens * shape.top_k
    rate = product_rate(context)
    one_pass = rows * 6 * shape.hidden * shape.intermediate / rate
    budgets = [(16, False), (8, False), (4, False), (2, False), (16, True)]
    for gibibytes, full in budgets:
        _block.cache_clear()
        if context.is_gpu:
            torch.cuda.empty_cache()
        block, reference = _block(context, gibibytes * (2**20 if context.small else GIB), full)
        modifier = _modifier()
        if gibibytes == 16 and not full:
            # What compiling takes is not the search's.
            modifier.search_norm(block, reference, full)
        if context.is_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        synchronize(context)
        begin = time.perf_counter()
        norm = modifier.search_norm(block, reference, full)
        synchronize(context)
        middle = time.perf_counter()
        down = modifier.search_down(block)
        synchronize(context)
        end = time.perf_counter()
        passes = sum(point.tokens for point in norm.points) / context.tokens
        facts: Facts = {
            "budget_gib": gibibytes,
            "search": "full" if full else "paired",
            "norm_seconds": round(middle - begin, 3),
            "down_seconds": round(end - middle, 3),
            "passes": round(passes, 2),
            "norm_roofline_share": round(passes * one_pass / (middle - begin), 3),
            "steps_rows": [block.step, block.most_rows],
            "point": [float(norm.ratio), bool(norm.duo)],
            "mean_down_ratio": round(float(down.ratio.double().mean()), 4),
        }
        if context.is_gpu:
            facts["peak_beyond_inputs_gib"] = round((torch.cuda.max_memory_allocated() - before) / GIB, 2)
            facts["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
        yield facts


def profile(context: Context) -> Iterator[Facts]:
    """Kernels by their time: of one pass of the norm's search over all tokens, of a step of compensated rounding, of a
    down search. And the pass with Triton's kernel for down."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from mmq.quantize.rounding import Compensation, Metric, Rounded, Smoothing, rows_per_column
    from mmq.quantize.routed_experts import SmoothedGateUp
    from mmq.tensors import experts

    block, reference = _block(context, 16 * (2**20 if context.small else GIB), False)
    ones = torch.ones(block.x.shape[1], device=block.x.device)
    modifier = _modifier()

    def one_pass() -> None:
        for share, part in zip(block.shares, reference, strict=True):
            block.losses(share, SmoothedGateUp(block, ones), part)

    plain = Smoothing(ones, torch.ones(block.experts, block.down.shape[2], device=ones.device))
    half = torch.arange(0, len(block.x), 2, device=ones.device)
    metric = Metric.of(_costs(context), len(half), rows_per_column(block, half))
    compensation = Compensation(block, half, len(half), metric)
    chosen = torch.arange(block.experts) < compensation.step
    with mock.patch.object(experts, "torch_multiplies_faster", lambda rows: False):
        seconds = timed(context, one_pass)
    yield {"of": "pass, down by Triton's kernel", "seconds": round(seconds, 4)}
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if context.is_gpu else [])
    for name, work in (
        ("pass", one_pass),
        ("rounding", lambda: compensation.fit([Rounded(block, plain)], chosen)),
        ("down", lambda: modifier.search_down(block)),
    ):
        work()
        synchronize(context)
        begin = time.perf_counter()
        work()
        synchronize(context)
        wall = time.perf_counter() - begin
        with profiler(activities=activities) as found:
            work()
            synchronize(context)
        time_of = "self_device_time_total" if context.is_gpu else "self_cpu_time_total"
        events = sorted(found.key_averages(), key=lambda event: -getattr(event, time_of))
        total = sum(getattr(event, time_of) for event in events)
        yield {
            "of": name,
            "seconds": round(wall, 4),
            "busy_seconds": round(total / 1e6, 4),
            "top": [
                {"kernel": event.key[:80], "calls": event.count, "share": round(getattr(event, time_of) / total, 3)}
                for event in events[:15]
            ],
        }


def _digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }


def _mmq(
    *arguments: object, code: str = "", timeout: float = 100, threads: int = 0
) -> subprocess.CompletedProcess[str]:
    """mmq as a process of its own, with so many of torch's threads if not all; `code` runs before it."""
    start = f"import sys\n{code}\nfrom mmq.cli.app import main\nmain()"
    command = [sys.executable, "-c", start, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


KILLED = """
import os, signal
import mmq.stages.awq as awq
write = awq._Stage._write
def dying(self, layer, result):
    if layer == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, layer, result)
awq._Stage._write = dying
"""
STRICT = """
import torch
torch.use_deterministic_algorithms(True)
# Memory that nothing was written to yet would hold NaN, and what reads it would show; here that takes no time.
torch.utils.deterministic.fill_uninitialized_memory = True
"""
ALONE = """
import mmq.stages.awq as awq
fit = awq._Stage._fit_memory
awq._Stage._fit_memory = lambda self: fit(self) and False
"""


def tiny(context: Context) -> Iterator[Facts]:
    """The tiny project, each time in a process of its own."""
    import yaml

    from mmq.source.synth import Sizes, write_checkpoint, write_samples

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = Sizes() if context.small else Sizes(4, 512, 256, 16, 4, 8, 2, 64)
        write_checkpoint(folder / "source", sizes, shards=4, shuffle=True)
        samples = folder / "samples.jsonl"
        write_samples(samples, 48)
        # Texts alone: rendering chats takes a process of its own in each run.
        lines = samples.read_text(encoding="utf-8").splitlines(keepends=True)
        samples.write_text("".join(line for line in lines if "messages" not in json.loads(line)), encoding="utf-8")

        def finished(rounding: str, run: str, device: str, code: str = "", kill: bool = False) -> Facts:
            content = {
                "model": {"source": "source"},
                "work_dir": f"{rounding}/{run}",
                "awq": {
                    "calibration": {"files": [{"path": "samples.jsonl", "samples": 24}], "sequence_length": 96},
                    "source": "fp8",
                    "rounding": rounding,
                    "device": device,
                },
            }
            path = folder / f"{rounding}-{run}.yaml"
            path.write_text(yaml.safe_dump(content), encoding="utf-8")
            facts: Facts = {"rounding": rounding, "run": run}
            begin = time.perf_counter()
            try:
                if kill:
                    killed = _mmq("awq", path, "--quiet", code=KILLED, threads=1)
                    if killed.returncode != -signal.SIGKILL:
                        why = f"not killed: {killed.returncode} {killed.stderr[-300:]}"
                        return facts | {"ok": False, "error": why}
                done = _mmq("run", path, "--quiet", code=code, threads=1)
            except subprocess.TimeoutExpired as error:
                return facts | {"ok": False, "error": f"no end after {error.timeout:.0f} s"}
            facts |= {"seconds": round(time.perf_counter() - begin, 1), "ok": done.returncode == 0}
            return facts if facts["ok"] else facts | {"error": done.stderr[-500:]}

        here = context.device
        runs = [("killed", here, "", True)]
        if not context.small:
            runs += [("again", here, "", False), ("alone", here, ALONE, False), ("strict", here, STRICT, False)]
        if context.is_gpu:
            runs.append(("cpu", "cpu", "", False))
        roundings = ("compensated",) if context.small else ("compensated", "nearest")
        # Side by side: most of a run's time here is that of its imports.
        with ThreadPoolExecutor(len(roundings) * (1 + len(runs))) as pool:
            firsts = {rounding: pool.submit(finished, rounding, "first", here) for rounding in roundings}
            others = [pool.submit(finished, rounding, *run) for run in runs for rounding in roundings]
            verdicts = {}
            for rounding, first in firsts.items():
                facts = first.result()
                if facts["ok"]:
                    taken = [entry["rounding"] for entry in _layers(folder / rounding / "first")]
                    facts["layers"] = {way: taken.count(way) for way in sorted(set(taken))}
                yield facts
                verdicts[rounding] = pool.submit(_mmq, "verify", folder / f"{rounding}-first.yaml", "--quiet")
            for future in as_completed(others):
                facts = future.result()
                one, other = folder / facts["rounding"] / "first", folder / facts["rounding"] / facts["run"]
                if facts["ok"] and facts["run"] in ("cpu", "strict"):
                    # With torch's ban, other forms of an operation may be taken.
                    facts |= _differences(one / "hybrid", other / "hybrid")
                    losses = ([entry["loss_chosen"] for entry in _layers(run)] for run in (one, other))
                    facts["losses_off"] = max(abs(b / a - 1) for a, b in zip(*losses, strict=True))
                    facts["ok"] = facts["losses_off"] < 0.1
                elif facts["ok"]:
                    wanted = _digests(one / "hybrid")
                    facts["same_bytes"] = _digests(other / "hybrid") == wanted
                    facts["ok"] = facts["same_bytes"] and bool(wanted)
                yield facts
            for rounding, verdict in verdicts.items():
                done = verdict.result()
                facts = {"rounding": rounding, "run": "verify", "ok": done.returncode == 0}
                yield facts | ({"error": done.stderr[-300:]} if done.stderr else {})


def _layers(run: Path) -> list[Facts]:
    """What the awq stage says of each layer."""
    found: list[Facts] = json.loads((run / "state/awq/layers.json").read_text(encoding="utf-8"))
    return found


def _differences(one: Path, other: Path) -> Facts:
    """In how many int4 codes two checkpoints differ, and in which other tensors."""
    import torch
    from safetensors.torch import load_file

    from gpu_operations import integers

    differing = codes = 0
    others: list[str] = []
    for path in sorted(one.glob("*.safetensors")):
        a, b = load_file(path), load_file(other / path.name)
        for name in a:
            if name.endswith("weight_packed"):
                codes += 8 * a[name].numel()
                differing += _other_codes(a[name], b[name])
            elif not torch.equal(integers(a[name]), integers(b[name])):
                others.append(name)
    return {"share_of_codes": round(differing / max(1, codes), 6), "others": len(others), "such_as": others[:6]}


def _write_source(context: Context, folder: Path, layers: int, shape: Any) -> Facts:
    """An fp8 checkpoint of some layers in `source`."""
    import torch

    from mmq.machine.device import release_memory
    from real_layers import write_layers

    begin = time.perf_counter()
    write_layers(folder / "source", layers, context.torch_device(), shape)
    release_memory()
    if context.is_gpu:
        torch.cuda.empty_cache()
    return {"step": "write the source", "seconds": round(time.perf_counter() - begin, 1)}


def _awq_recipe(context: Context, folder: Path, run: str, part: int = 1, **awq: Any) -> Path:
    """A recipe for the project in a folder, which calibrates on one in `part` of the samples."""
    import yaml

    samples = {"code": 40, "multilingual": 40, "reasoning": 24, "diverse": 24}
    files = [
        {
            "path": str(ROOT / f"calibration_data/{kind}.jsonl"),
            "samples": 1 if context.small else count // part,
        }
        for kind, count in samples.items()
    ]
    calibration = {"files": files, "sequence_length": 64 if context.small else 1024}
    awq = {"calibration": calibration, "source": "fp8", "device": context.device} | awq
    path = folder / f"{run}.yaml"
    path.write_text(yaml.safe_dump({"model": {"source": "source"}, "work_dir": run, "awq": awq}), encoding="utf-8")
    return path


def _awq_run(recipe: Path, what: str) -> Facts:
    """`mmq awq` as a process."""
    begin = time.perf_counter()
    try:
        done = _mmq("awq", recipe, "--quiet", timeout=120)
    except subprocess.TimeoutExpired as error:
        return {"step": what, "ok": False, "error": f"no end after {error.timeout:.0f} s"}
    facts: Facts = {"step": what, "seconds": round(time.perf_counter() - begin, 1), "ok": done.returncode == 0}
    return facts if facts["ok"] else facts | {"error": done.stderr[-600:]}


def stage(context: Context) -> Iterator[Facts]:
    """The awq stage as a process, with read-ahead, pinned copies and the writing thread."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(1) as pool:
        folder = Path(name)
        yield _write_source(context, folder, 2 if context.small else 3, context.shape())
        for rounding in ("compensated",) if context.small else ("compensated", "nearest"):
            recipe, run = _awq_recipe(context, folder, rounding, rounding=rounding), folder / rounding
            started = time.time()
            planning = pool.submit(_mmq, "awq", recipe, "--dry-run", "--json")
            facts = _awq_run(recipe, f"mmq awq, rounding {rounding}")
            if not facts["ok"]:
                yield facts
                continue
            # When what was on the disk: the rest is the process's start and end.
            files = [path for kind in ("state/calibration/*", "awq/*.safetensors") for path in run.glob(kind)]
            moments = sorted(path.stat().st_mtime - started for path in files)
            yield facts | {"files_after": [round(moment, 1) for moment in moments]}
            for entry in _layers(run):
                yield {
                    "rounding": rounding,
                    "layer": entry["layer"],
                    "parts": entry["seconds"],
                    "peak_gib": round(entry["peak_device_bytes"] / GIB, 2),
                    "reserved_gib": round(entry["peak_device_reserved_bytes"] / GIB, 2),
                    "loss_of_nearest": round(entry["loss_chosen"] / entry["loss_round_to_nearest"], 4),
                }
            planned = planning.result()
            facts = {"step": f"the plan, rounding {rounding}"}
            if planned.returncode == 0:
                (plan,) = json.loads(planned.stdout.splitlines()[-1])["plan"]
                facts |= {f"planned_{kind}_gib": round(plan[f"{kind}_memory"] / GIB, 2) for kind in ("device", "host")}
            else:
                facts |= {"ok": False, "error": planned.stderr[-300:]}
            yield facts
            shutil.rmtree(run)
            if moments[-1] > 60:
                break


def growth(context: Context) -> Iterator[Facts]:
    """Memory of a GPU that one process holds after each of many layers: the most in use, and the most reserved."""
    from real_layers import Shape

    layers = 3 if context.small else 10
    shape = context.shape() if context.small else Shape(64, 2048, 1024, 8, 16, 4, 128)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield _write_source(context, folder, layers, shape)
        yield _awq_run(_awq_recipe(context, folder, "run", part=4, rounding="compensated"), f"mmq awq, {layers} layers")
        entries = _layers(folder / "run")
        peaks, reserved = (
            [round(entry[kind] / 2**20) for entry in entries]
            for kind in ("peak_device_bytes", "peak_device_reserved_bytes")
        )
        # The first layer has no other one's files to be written beside it.
        grows = reserved[-1] > 1.05 * reserved[2]
        seconds = [round(sum(entry["seconds"].values()), 1) for entry in entries]
        yield {"ok": not grows, "peak_mib": peaks, "reserved_mib": reserved, "seconds": seconds}


# What of the tests says most of a card: kernels, rounding, the search beside the libraries' own, a model's layers.
TESTS = (
    "tensors/test_fused.py",
    "tensors/test_rounding.py",
    "quantize/test_awq_stock.py",
    "quantize/test_race.py",
    "quantize/test_rounding.py",
    "quantize/test_model.py",
    "stages/test_fisher.py::test_the_matrices_are_those_of_a_plain_models_gradients",
)


def tests(context: Context) -> Iterator[Facts]:
    """Some of the tests on the device, each file a process."""
    if importlib.util.find_spec("pytest") is None:
        yield {"ok": False, "error": "pytest is not here: scripts/gpu_wheels ... --also pytest pluggy iniconfig"}
        return
    places = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "MMQ_TEST_DEVICE": context.device}

    def run(name: str) -> Facts:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{name}"]
        begin = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
        lines = done.stdout.splitlines() or [done.stderr[-300:]]
        facts: Facts = {"file": name, "ok": done.returncode == 0, "said": lines[-1].strip("= ")}
        failed = [line[:150] for line in lines if line.startswith(("FAILED", "ERROR"))]
        return facts | {"seconds": round(time.perf_counter() - begin, 1)} | ({"failed": failed} if failed else {})

    chosen = ["tensors/test_rounding.py::test_packing_is_undone"] if context.small else TESTS
    with ThreadPoolExecutor(len(chosen)) as pool:
        for future in as_completed([pool.submit(run, name) for name in chosen]):
            yield future.result()


def stock(context: Context) -> Iterator[Facts]:
    """llmcompressor's own search as shipped: every expert sees all tokens."""
    yield from _stock(context, "stock, as shipped", True)


def stock_routed(context: Context) -> Iterator[Facts]:
    """The same on an expert's own tokens."""
    yield from _stock(context, "stock, routed", False)


def _stock(context: Context, name: str, everywhere: bool) -> Iterator[Facts]:
    """llmcompressor's search of a layer at two numbers of tokens, a line through them, and mmq's."""
    import torch

    import stock_awq
    from mmq.quantize.race import parts
    from mmq.quantize.routed_experts import ExpertBlock, Weights

    device, shape = context.torch_device(), context.shape()
    sizes = [128, 256] if context.small else [8192, 16384]
    own = stock_awq.random_layer(shape.experts, shape.hidden, shape.intermediate, torch.bfloat16, device)
    hidden = stock_awq.random_hidden(
        sizes[-1] if context.small else context.tokens, shape.hidden, torch.bfloat16, device
    )

    def ours(tokens: int) -> None:
        x, index, weight = stock_awq.block_inputs(own, hidden[:tokens], shape.top_k)
        block = ExpertBlock(
            x, index, weight, own.gate_up, own.down, torch.nn.functional.silu, stock_awq.GROUP_SIZE,
            parts=parts(index.numel() / shape.experts),
        )  # fmt: skip
        modifier = _modifier()
        modifier.search_norm(block, block.outputs(Weights(block)))
        modifier.search_down(block)

    mine = timed(context, lambda: ours(hidden.shape[0]), 2)
    yield {"contender": "mmq", "tokens": hidden.shape[0], "seconds": round(mine, 3)}
    seconds = []
    for tokens in sizes:
        batches = hidden[:tokens].split(4096)
        if tokens == sizes[0]:
            stock_awq.run_stock(stock_awq.build_model(own, shape.top_k), batches[:1], False, 3, everywhere)
        runs: list[float] = []
        while len(runs) < (1 if context.small else 2) and sum(runs) < 10:
            model = stock_awq.build_model(own, shape.top_k)
            synchronize(context)
            begin = time.perf_counter()
            stock_awq.run_stock(model, batches, True, 20, everywhere)
            synchronize(context)
            runs.append(time.perf_counter() - begin)
        seconds.append(min(runs))
        yield {"contender": name, "tokens": tokens, "seconds": [round(run, 2) for run in runs]}
    growth = (seconds[1] - seconds[0]) / (sizes[1] - sizes[0])
    whole = seconds[1] + growth * (hidden.shape[0] - sizes[1])
    yield {
        "contender": name,
        "tokens": hidden.shape[0],
        "extrapolated": round(whole, 1),
        "times_mmq": round(whole / mine, 1),
    }


@dataclass(frozen=True)
class Part:
    run: Callable[[Context], Iterator[Facts]]
    seconds: float


# What was never measured, and what a fault would cost most, first.
PARTS = {
    part.run.__name__: part
    for part in (
        Part(ceilings, 30),
        Part(kernels, 100),
        Part(rounding, 90),
        Part(gradient, 60),
        Part(tiny, 120),
        Part(layer, 90),
        Part(stage, 150),
        Part(growth, 60),
        Part(profile, 60),
        Part(speed, 60),
        Part(tests, 90),
        Part(stock, 150),
        Part(search, 60),
        Part(stock_routed, 150),
    )
}


def work(context: Context, names: list[str]) -> int:
    """Run parts one after the other in this process, a JSON line each fact; the caller watches the time."""
    import torch

    torch.set_grad_enabled(False)
    # Says where a part hangs, before it is killed.
    faulthandler.register(signal.SIGUSR1)
    for name in names:
        begin = time.perf_counter()
        tell({"part": name, "begin": True})
        _block.cache_clear()
        _routed.cache_clear()
        if context.is_gpu:
            torch.cuda.empty_cache()
        try:
            # Libraries print to stdout at times; the JSON must stand there alone.
            with contextlib.redirect_stdout(sys.stderr):
                for facts in PARTS[name].run(context):
                    tell({"part": name, **facts})
        except Exception as error:
            where = "".join(traceback.format_tb(error.__traceback__)[-3:])
            tell({"part": name, "ok": False, "error": f"{type(error).__name__}: {str(error)[:400]}", "where": where})
            tell({"part": name, "end": True, "seconds": round(time.perf_counter() - begin, 1)})
            if "CUDA error" in str(error):
                # The process's context is lost; the caller goes on in another.
                return 1
            torch.use_deterministic_algorithms(False)
            continue
        torch.use_deterministic_algorithms(False)
        tell({"part": name, "end": True, "seconds": round(time.perf_counter() - begin, 1)})
    return 0


def tell(facts: Facts) -> None:
    sys.__stdout__.write(json.dumps(facts) + "\n")
    sys.__stdout__.flush()


def supervise(options: argparse.Namespace, names: list[str]) -> list[Facts]:
    """Run parts in a process that is replaced where one hangs, dies or loses the device."""
    results: list[Facts] = []
    deadline = time.monotonic() + options.seconds
    left = list(names)
    with open(options.out, "a", encoding="utf-8") if options.out else contextlib.nullcontext() as file:

        def keep(facts: Facts) -> None:
            results.append(facts)
            if file is not None:
                file.write(json.dumps(facts) + "\n")
                file.flush()

        while left and time.monotonic() < deadline:
            command = [sys.executable, __file__, "--worker", ",".join(left), "--device", options.device]
            command += ["--small"] if options.small else []
            process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
            current, limit = left[0], min(deadline, time.monotonic() + 60 + PARTS[left[0]].seconds)
            assert process.stdout is not None
            os.set_blocking(process.stdout.fileno(), False)
            buffer = b""
            while True:
                chunk = process.stdout.read() or b""
                buffer += chunk
                *lines, buffer = buffer.split(b"\n")
                for line in lines:
                    with contextlib.suppress(ValueError):
                        facts = json.loads(line)
                        if facts.get("begin"):
                            current = facts["part"]
                            limit = min(deadline, time.monotonic() + PARTS[current].seconds)
                            continue
                        if facts.get("end"):
                            left.remove(facts["part"])
                        keep(facts)
                if process.poll() is not None and not chunk:
                    break
                if time.monotonic() > limit:
                    process.send_signal(signal.SIGUSR1)
                    time.sleep(0.5)
                    os.killpg(process.pid, signal.SIGKILL)
                    keep({"part": current, "ok": False, "error": "its time was up"})
                    break
                time.sleep(0.05)
            process.wait()
            if left and left[0] == current and current in left and process.returncode != 0:
                keep({"part": current, "ok": False, "error": f"the process ended with {process.returncode}"})
                left.remove(current)
            elif process.returncode == 0:
                break
        for name in left:
            keep({"part": name, "ok": False, "error": "not run: no time was left"})
    return results


def table(results: list[Facts], most: int = 60, width: int = 190) -> list[str]:
    """The results in lines: the failed ones first, then the seconds of the parts, then what was found."""
    failed = [facts for facts in results if facts.get("ok") is False]
    ends = [facts for facts in results if facts.get("end")]
    good = [facts for facts in results if facts.get("ok") is not False and not facts.get("end")]
    passed = [facts for facts in good if facts["part"] == "kernels"]
    lines = [f"{len(failed)} of {len(results) - len(ends)} lines failed" if failed else "nothing failed"]
    lines += [f"FAILED {facts['part']}: {_words(facts)}"[: 2 * width] for facts in failed]
    lines.append("seconds: " + ", ".join(f"{facts['part']} {facts['seconds']:.0f}" for facts in ends))
    if passed:
        same = sum(facts.get("differing") == 0 for facts in passed)
        lines.append(f"kernels: {len(passed)} checks passed, {same} of them bit for bit")
    words: dict[str, list[str]] = {}
    for facts in good:
        if facts not in passed:
            top = [f"{entry['share']:.0%} {entry['calls']}x {entry['kernel'][:44]}" for entry in facts.get("top", [])]
            words.setdefault(facts["part"], []).append("; ".join([_words(facts), *top[:6]]))
    for part, found in words.items():
        lines += _filled(part, found, width)
    return lines[:most]


def _filled(part: str, words: list[str], width: int) -> list[str]:
    """As many of a part's findings to a line as it holds; one that is longer than a line is cut."""
    lines: list[str] = []
    for found in words:
        if lines and len(lines[-1]) + len(found) + 3 <= width:
            lines[-1] += f" | {found}"
        else:
            lines.append(f"{part}: {found}"[:width])
    return lines


def _words(facts: Facts) -> str:
    hidden = ("part", "where", "ok", "top")
    return " ".join(f"{key}={_short(value)}" for key, value in facts.items() if key not in hidden)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + " ".join(f"{key}:{_short(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument(
        "--seconds", type=float, default=420, help="for all parts together; what begins last is cut or left out"
    )
    parser.add_argument("--parts", help=f"some of {', '.join(PARTS)}; default: all, in this order")
    parser.add_argument("--out", help="a file for the JSON lines")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(Context(options.device, options.small), options.worker.split(","))
    names = options.parts.split(",") if options.parts else list(PARTS)
    if unknown := set(names) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    begin = time.monotonic()
    results = supervise(options, names)
    print("\n".join(table(results)))
    print(f"{time.monotonic() - begin:.0f} s in all")
    return 1 if any(facts.get("ok") is False for facts in results) else 0


if __name__ == "__main__":
    sys.exit(main())
