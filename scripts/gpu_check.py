"""Everything that only a GPU can tell, in one run of at most eight minutes.

    python scripts/gpu_check.py --out results.jsonl
    python scripts/gpu_check.py --device cpu --small
    python scripts/gpu_check.py --parts kernels,search

Each part runs under its own time limit and writes one JSON line as soon as it ends; a table of all comes last. A part
that fails, hangs or kills its process costs the others nothing.

    ceilings   rates of a large product, of a grouped one, and of copies on the card and to and from the host
    kernels    every operation of mmq.tensors on the device against the CPU, bit for bit or within a tolerance, and on
               more than 2^31 numbers
    speed      the same operations at the real shape, Triton's form beside torch's
    layer      a whole layer of MiniMax-M2.5's shape, 131,072 tokens, seconds by part
    search     the search of that layer with working memory of 16, 8, 4 and 2 GiB, and in full
    tiny       the tiny project's stages on the device: twice, killed and resumed, layers not read ahead, under torch's
               ban on chance: the same bytes, which pass verify; how many codes are others on the CPU
    profile    where a pass of the search spends its time
    stage      `mmq awq` on three layers of the real shape from fp8, with random routers
    stock      llmcompressor's search as shipped and on routed tokens, at two numbers of tokens

It needs no network. On a machine without one that has PyTorch, Triton and transformers, the other packages come as
wheels: `scripts/gpu_wheels FOLDER` fills a folder, and there

    python3 -m pip install --no-index --no-deps --target site FOLDER/*.whl
    PYTHONPATH=site:src python3 scripts/gpu_check.py

`--device cpu --small` runs all parts at toy sizes, in under a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ["LLM_COMPRESSOR_LOG_DISABLED"] = os.environ["COMPRESSED_TENSORS_LOG_DISABLED"] = "true"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "src")]

GIB = 2**30
# The fp32 sum of a row's 3072 products in another order, and its rounding to bf16.
SUMS, ROUNDED = 1e-4, 2**-6
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


@dataclass(frozen=True)
class Check:
    """An operation, given its inputs on a device: what must be the same there and on the CPU.

    Attributes:
        tolerance: of the largest magnitude; 0 for the same bits.
    """

    name: str
    inputs: Callable[[Any], list[Any]]
    operation: Callable[..., Any]
    tolerance: float = 0.0


def checks() -> list[Check]:
    """One line an operation: further ones come here."""
    import torch

    from mmq.tensors import experts, fp8, int4, smoothing

    def normal(g: Any, *shape: int) -> Any:
        return torch.randn(*shape, generator=g)

    def weights(g: Any) -> list[Any]:
        """Weights with zero groups, ties, denormal and large numbers."""
        weight = normal(g, 3, 64, 512) * 2.0 ** torch.randint(-20, 20, (3, 64, 1), generator=g)
        weight[0, 0] = 0
        weight[0, 1] = torch.arange(512).remainder(15).sub(7).add(0.5)
        weight[0, 2] *= 1e-38
        weight[1, 0, 5] = 3e38
        return [weight.to(torch.bfloat16), normal(g, 512).exp()]

    def codes(g: Any) -> list[Any]:
        every = torch.arange(256, dtype=torch.uint8)
        every[[0x7F, 0xFF]] = 0
        weight = every[torch.randint(0, 256, (3, 300, 384), generator=g)].view(torch.float8_e4m3fn)
        return [weight, normal(g, 3, 3, 3).mul(3).exp()]

    counts = torch.tensor([0, 700, 1, 33, 1290, 0, 24])
    ends = counts.cumsum(0).to(torch.int32)

    def routed(g: Any, inner: int, width: int) -> list[Any]:
        rows = normal(g, int(ends[-1]), inner).to(torch.bfloat16)
        return [rows, (normal(g, 7, width, inner) * inner**-0.5).to(torch.bfloat16), ends]

    def gathered(g: Any) -> list[Any]:
        x = normal(g, 300, 1024).to(torch.bfloat16)
        token = torch.randint(0, 300, (int(ends[-1]),), generator=g)
        return [x, token, (normal(g, 7, 512, 1024) / 32).to(torch.bfloat16), ends]

    def combined(g: Any) -> list[Any]:
        outputs = normal(g, 512 * 4, 1000).to(torch.bfloat16)
        place = torch.randperm(512 * 4, generator=g).view(512, 4).sort(1).values
        return [outputs, place, torch.rand(512, 4, generator=g), normal(g, 512, 1000)]

    silu = torch.nn.functional.silu
    return [
        Check("fake_quantize_scaled", weights, lambda w, s: int4.fake_quantize_scaled(w, s, 128)),
        Check("fake_quantize_scaled, groups of 32", weights, lambda w, s: int4.fake_quantize_scaled(w, s, 32)),
        Check(
            "fake_quantize_scaled, the change",
            weights,
            lambda w, s: int4.fake_quantize_scaled(w, s.expand(3, 1, -1), 128, change=True),
        ),
        Check("normalized_mean", weights, lambda w, s: int4.normalized_mean(w, 128), 1e-6),
        Check(
            "quantize_in_place, codes",
            weights,
            lambda w, s: int4.quantize_in_place(w.clone(), s, None, 128)[0],
        ),
        Check("quantize_in_place, scales", weights, lambda w, s: int4.quantize_in_place(w.clone(), s, None, 128)[1]),
        Check("dequantize_blocks", codes, lambda w, s: fp8.dequantize_blocks(w, s)),
        Check("dequantize_block", codes, lambda w, s: fp8.dequantize_block(w[1], s[1])),
        Check("broken_matrices", codes, lambda w, s: fp8.broken_matrices(w)),
        Check("grouped_linear", lambda g: routed(g, 1024, 384), experts.grouped_linear, ROUNDED),
        Check(
            "grouped_rows into a part",
            lambda g: routed(g, 512, 1000),
            lambda r, w, e: experts.grouped_rows(r, w, e, r.new_zeros(len(r) + 9, 1000)[4:-5]),
            ROUNDED,
        ),
        Check("gated_rows", gathered, lambda x, t, w, e: experts.gated_rows(x, t, w, e, silu), ROUNDED),
        Check("combine", combined, lambda o, p, w, r: experts.combine(o, p, w, r.clone()), 1e-6),
        Check("combine, a batch", combined, lambda o, p, w, r: experts.combine(o[500:900], p, w, r.clone(), 500), 1e-6),
        Check("token_losses", combined, lambda o, p, w, r: experts.token_losses(o, p, w, r), SUMS),
        Check("token_losses, a batch", combined, lambda o, p, w, r: experts.token_losses(o[:900], p, w, r), SUMS),
        Check(
            "squares_by_expert",
            lambda g: routed(g, 1024, 8),
            lambda r, w, e: experts.squares_by_expert(r.clone(), e),
            2**-7,
        ),
        Check("magnitude_sums", lambda g: routed(g, 1024, 8), _magnitudes, SUMS),
        Check("second_moments", lambda g: routed(g, 512, 8), _moments, SUMS),
        Check(
            "quadratic_form",
            lambda g: [normal(g, 3, 96, 256).to(torch.bfloat16), normal(g, 3, 256, 256)],
            lambda d, m: experts.quadratic_form(d, m @ m.transpose(1, 2)),
            ROUNDED,
        ),
        Check("row_squares", lambda g: [normal(g, 700, 1000)], lambda x: experts.row_squares(x.clone()), 1e-6),
        Check("gated_rows, rows given", lambda g: routed(g, 512, 256), _gated, ROUNDED),
        Check(
            "gated_rows, one row",
            lambda g: routed(g, 512, 256),
            lambda r, w, e: _gated(r[:1], w[:1], e[1:2] // 700),
            ROUNDED,
        ),
        Check(
            "grouped_linear, one row",
            lambda g: routed(g, 512, 256),
            lambda r, w, e: experts.grouped_linear(r[:1], w[:1], e[1:2] // 700),
            ROUNDED,
        ),
        Check(
            "grouped_linear, no rows",
            lambda g: routed(g, 512, 256),
            lambda r, w, e: experts.grouped_linear(r[:0], w, e * 0),
        ),
        Check("grouped_linear, no tile's width", lambda g: routed(g, 520, 248), experts.grouped_linear, ROUNDED),
        Check(
            "Rows.of, order",
            lambda g: [torch.randint(0, 9, (700, 4), generator=g)],
            lambda i: experts.Rows.of(i, 9).token,
        ),
        Check(
            "Rows.of, places",
            lambda g: [torch.randint(0, 9, (700, 4), generator=g)],
            lambda i: experts.Rows.of(i, 9).place,
        ),
        Check(
            "smooth_norm",
            lambda g: [normal(g, 512).to(torch.bfloat16), normal(g, 512).exp()],
            lambda n, s: smoothing.smooth_norm(n, s)[0],
        ),
        Check(
            "smooth_norm, applied",
            lambda g: [normal(g, 512).to(torch.bfloat16), normal(g, 512).exp()],
            lambda n, s: smoothing.smooth_norm(n, s)[1],
        ),
        Check(
            "top_up",
            lambda g: [normal(g, 300, 16), torch.rand(300, 16, generator=g).topk(2).indices.sort(1).values],
            _topped_up,
        ),
        Check(
            "candidate_scales",
            lambda g: [normal(g, 512).exp(), normal(g, 512).exp()],
            lambda x, w: smoothing.candidate_scales(x, w, [(0.0, False), (0.35, True), (1.0, True)]),
            1e-5,
        ),
    ]


def _gated(rows: Any, weight: Any, ends: Any) -> Any:
    import torch

    from mmq.tensors.experts import gated_rows

    return gated_rows(rows, None, weight, ends, torch.nn.functional.silu)


def _topped_up(logits: Any, index: Any) -> Any:
    from mmq.quantize.routed_experts import top_up

    rows = top_up(logits, index, 50)
    assert rows is not None
    return rows.token


def _magnitudes(rows: Any, weight: Any, ends: Any) -> Any:
    from mmq.tensors.experts import magnitude_sums

    out = rows.new_ones(len(ends), rows.shape[1]).float()
    magnitude_sums(rows, ends, out)
    return out


def _moments(rows: Any, weight: Any, ends: Any) -> Any:
    from mmq.tensors.experts import second_moments

    out = rows.new_ones(len(ends), rows.shape[1], rows.shape[1]).float()
    second_moments(rows, ends, out)
    return out


def kernels(context: Context) -> Iterator[Facts]:
    """The device against the CPU, under torch's ban on operations whose result chance decides."""
    import torch

    from mmq.tensors import dispatch

    device = context.torch_device()
    torch.use_deterministic_algorithms(True)
    try:
        from mmq.tensors import compiled  # noqa: F401
    except Exception as error:
        # The CPU's side is torch's then.
        dispatch.COMPILED_FROM = 2**62
        yield {"check": "numba", "ok": False, "error": f"{type(error).__name__}: {str(error)[:200]}"}
    for check in checks():
        facts: Facts = {"check": check.name}
        try:
            inputs = check.inputs(torch.Generator().manual_seed(0))
            expected = check.operation(*inputs)
            there = [value.to(device) if isinstance(value, torch.Tensor) else value for value in inputs]
            once, again = (check.operation(*there) for _ in range(2))
            facts["repeats"] = bool(torch.equal(_integers(once), _integers(again)))
            facts |= _compared(once.cpu(), expected, check.tolerance)
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
            facts |= _compared(*tail(device, 2**22 if context.small else 2**31), tolerance)
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


def _compared(found: Any, expected: Any, tolerance: float) -> Facts:
    """Bit for bit where the tolerance is 0, otherwise by the largest difference, as a part of the largest number."""
    import torch

    if tolerance == 0:
        differing = int((_integers(found) != _integers(expected)).sum())
        return {"differing": differing, "ok": differing == 0 and found.shape == expected.shape}
    a, b = found.double(), expected.double()
    known = torch.isfinite(b)
    off = float((a - b)[known].abs().max()) / float(b[known].abs().max())
    return {"off": off, "ok": torch.equal(torch.isfinite(a), known) and off <= tolerance}


def tails() -> list[tuple[str, float, Callable[[Any, int], tuple[Any, Any]]]]:
    """Operations on more numbers than 32 bits count: on a device, the end of the result, and the CPU's of that end
    alone. Each with its tolerance, as a `Check` has it."""
    import torch

    from mmq.tensors import experts, fp8, int4

    bf16 = torch.bfloat16
    hidden, last, top_k = 3072, 100, 8

    def drawn(device: Any, *shape: int) -> Any:
        return torch.empty(*shape, dtype=bf16, device=device).normal_()

    def weights(device: Any, numbers: int) -> tuple[Any, Any]:
        weight = drawn(device, numbers // hidden**2 + 2, hidden, hidden)
        return weight, (torch.rand(hidden, device=device) + 0.5)

    def quantized(device: Any, numbers: int) -> tuple[Any, Any]:
        weight, scales = weights(device, numbers)
        found = int4.fake_quantize_scaled(weight, scales, 128)[-1:].cpu()
        return found, int4.fake_quantize_scaled(weight[-1:].cpu(), scales.cpu(), 128)

    def normalized(device: Any, numbers: int) -> tuple[Any, Any]:
        weight, _ = weights(device, numbers)
        return int4.normalized_mean(weight, 128)[-1].cpu(), int4.normalized_mean(weight[-1:].cpu(), 128)[0]

    def dequantized(device: Any, numbers: int) -> tuple[Any, Any]:
        shape = (numbers // hidden**2 + 2, hidden, hidden)
        codes = torch.randint(0, 0x7F, shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        scale = torch.rand(shape[0], *fp8.scale_shape(shape[1:]), device=device)
        found = fp8.dequantize_blocks(codes, scale)[-1:].cpu()
        return found, fp8.dequantize_blocks(codes[-1:].cpu(), scale[-1:].cpu())

    def summed(device: Any, numbers: int, combine: bool) -> tuple[Any, Any]:
        tokens = numbers // hidden // top_k + last
        outputs = drawn(device, tokens * top_k, hidden)
        place = torch.randperm(tokens * top_k, device=device).view(tokens, top_k).sort(1).values
        weight, reference = torch.rand(tokens, top_k, device=device), torch.randn(tokens, hidden, device=device)
        own = outputs[place[-last:].flatten()].cpu()
        there = torch.arange(last * top_k).view(last, top_k)
        operation = experts.combine if combine else experts.token_losses
        # The first is overwritten.
        expected = operation(own, there, weight[-last:].cpu(), reference[-last:].cpu())
        return operation(outputs, place, weight, reference)[-last:].cpu(), expected

    def rows(device: Any, numbers: int, width: int) -> tuple[Any, Any]:
        count = numbers // width + 2 * last
        each = torch.arange(1, 9, device=device) * ((count - last) // 7)
        each[-1] = count
        each[-2] = count - last
        return drawn(device, count, width), each.to(torch.int32)

    end = torch.tensor([last], dtype=torch.int32)

    def gated(device: Any, numbers: int) -> tuple[Any, Any]:
        x, ends = rows(device, numbers, hidden)
        weight = drawn(device, 8, 512, hidden).mul_(hidden**-0.5)
        return _gated(x, weight, ends)[-last:].cpu(), _gated(x[-last:].cpu(), weight[-1:].cpu(), end)

    def multiplied(device: Any, numbers: int) -> tuple[Any, Any]:
        x, ends = rows(device, numbers * 256 // hidden, 256)
        weight = drawn(device, 8, hidden, 256).mul_(1 / 16)
        out = torch.empty(x.shape[0], hidden, dtype=bf16, device=device)
        found = experts.grouped_rows(x, weight, ends, out)[-last:].cpu()
        return found, experts.grouped_linear(x[-last:].cpu(), weight[-1:].cpu(), end)

    def squared(device: Any, numbers: int) -> tuple[Any, Any]:
        x, ends = rows(device, numbers, hidden)
        return experts.squares_by_expert(x, ends)[-1:].cpu(), experts.squares_by_expert(x[-last:].cpu(), end)

    def magnitudes(device: Any, numbers: int) -> tuple[Any, Any]:
        x, ends = rows(device, numbers, hidden)
        return _magnitudes(x, None, ends)[-1:].cpu(), _magnitudes(x[-last:].cpu(), None, end)

    def moments(device: Any, numbers: int) -> tuple[Any, Any]:
        x, ends = rows(device, numbers, 1536)
        return _moments(x, None, ends)[-1:].cpu(), _moments(x[-last:].cpu(), None, end)

    def measured(device: Any, numbers: int) -> tuple[Any, Any]:
        count = numbers // (hidden * 1536) + 2
        change, moments = drawn(device, count, hidden, 1536), torch.rand(count, 1536, 1536, device=device)
        moments += moments.transpose(1, 2).clone()
        found = experts.quadratic_form(change, moments)[-1:].cpu()
        return found, experts.quadratic_form(change[-1:].cpu(), moments[-1:].cpu())

    return [
        ("fake_quantize_scaled", 0.0, quantized),
        ("normalized_mean", 1e-6, normalized),
        ("dequantize_blocks", 0.0, dequantized),
        ("combine", 1e-6, lambda device, numbers: summed(device, numbers, True)),
        ("token_losses", SUMS, lambda device, numbers: summed(device, numbers, False)),
        ("gated_rows", ROUNDED, gated),
        ("grouped_rows", ROUNDED, multiplied),
        ("squares_by_expert", SUMS, squared),
        ("magnitude_sums", SUMS, magnitudes),
        ("second_moments", SUMS, moments),
        ("quadratic_form", ROUNDED, measured),
    ]


def _integers(tensor: Any) -> Any:
    """A tensor's bits, with one NaN for all: which of them an operation gives is its own affair."""
    import torch

    tensor = tensor.contiguous()
    if tensor.is_floating_point() and tensor.element_size() > 1:
        tensor = torch.where(tensor.isnan(), torch.nan, tensor)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor if tensor.dtype == torch.bool else tensor.view(kinds[tensor.element_size()])


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
            "down",
            2.0 * total * inner * hidden,
            "TFLOP",
            lambda: experts.grouped_rows(middle, down, piece.ends, outputs),
        ),
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
    """Attention, search, rounding and propagation of one layer, in both searches."""
    import torch

    from real_layers import layer_in_memory

    device = context.torch_device()
    # The second runs warm: the first of anything pays for compiling and choosing kernels.
    for search in ("paired", "paired", "full"):
        content, config, hidden = layer_in_memory(context.shape(), context.tokens, device)
        quantizer = _quantizer(context, config, context.tokens, search=search)
        if context.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        synchronize(context)
        begin = time.perf_counter()
        result = quantizer.quantize(0, content, hidden)
        synchronize(context)
        statistics = result.statistics
        points = statistics["norm"]["points"]
        facts: Facts = {
            "search": search,
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
    """Kernels of one pass of the norm's search over all tokens, and of a down search, by their time."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from mmq.quantize.routed_experts import SmoothedGateUp

    block, reference = _block(context, 16 * (2**20 if context.small else GIB), False)
    ones = torch.ones(block.x.shape[1], device=block.x.device)
    modifier = _modifier()

    def one_pass() -> None:
        for share, part in zip(block.shares, reference, strict=True):
            block.losses(share, SmoothedGateUp(block, ones), part)

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if context.is_gpu else [])
    for name, work in (("pass", one_pass), ("down", lambda: modifier.search_down(block))):
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


def _mmq(*arguments: object, code: str = "", timeout: float = 100) -> subprocess.CompletedProcess[str]:
    """mmq as a process of its own; `code` runs before it."""
    start = f"import sys\n{code}\nfrom mmq.cli.app import main\nmain()"
    command = [sys.executable, "-c", start, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
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

        def recipe(run: str, device: str) -> Path:
            content = {
                "model": {"source": "source"},
                "work_dir": run,
                "awq": {
                    "calibration": {"files": [{"path": "samples.jsonl", "samples": 24}], "sequence_length": 96},
                    "source": "fp8",
                    "device": device,
                },
            }
            path = folder / f"{run}.yaml"
            path.write_text(yaml.safe_dump(content), encoding="utf-8")
            return path

        def finished(run: str, device: str, code: str = "", kill: bool = False) -> Facts:
            path = recipe(run, device)
            begin = time.perf_counter()
            try:
                if kill:
                    killed = _mmq("awq", path, "--quiet", code=KILLED)
                    if killed.returncode != -signal.SIGKILL:
                        why = f"not killed: {killed.returncode} {killed.stderr[-300:]}"
                        return {"run": run, "ok": False, "error": why}
                done = _mmq("run", path, "--quiet", code=code)
            except subprocess.TimeoutExpired as error:
                return {"run": run, "ok": False, "error": f"no end after {error.timeout:.0f} s"}
            facts: Facts = {"run": run, "seconds": round(time.perf_counter() - begin, 1), "ok": done.returncode == 0}
            return facts if facts["ok"] else facts | {"error": done.stderr[-500:]}

        runs = [("killed", context.device, "", True)]
        if not context.small:
            here = context.device
            runs += [("again", here, "", False), ("alone", here, ALONE, False), ("strict", here, STRICT, False)]
        if context.is_gpu:
            runs.append(("cpu", "cpu", "", False))
        # Side by side: most of a run's time here is that of its imports.
        with ThreadPoolExecutor(1 + len(runs)) as pool:
            first = pool.submit(finished, "first", context.device)
            others = [pool.submit(finished, *run) for run in runs]
            yield first.result()
            wanted = _digests(folder / "first/hybrid")
            verdict = pool.submit(_mmq, "verify", folder / "first.yaml", "--quiet")
            for future in as_completed(others):
                facts = future.result()
                if facts["ok"] and facts["run"] in ("cpu", "strict"):
                    # With torch's ban, other forms of an operation may be taken.
                    facts |= _differences(folder / "first/hybrid", folder / facts["run"] / "hybrid")
                elif facts["ok"]:
                    facts["same_bytes"] = _digests(folder / facts["run"] / "hybrid") == wanted
                    facts["ok"] = facts["same_bytes"] and bool(wanted)
                yield facts
            done = verdict.result()
            yield {"run": "verify", "ok": done.returncode == 0} | ({"error": done.stderr[-300:]} if done.stderr else {})


def _differences(one: Path, other: Path) -> Facts:
    """In how many int4 codes two checkpoints differ, and in which other tensors."""
    import torch
    from safetensors.torch import load_file

    differing = codes = 0
    others: list[str] = []
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    for path in sorted(one.glob("*.safetensors")):
        a, b = load_file(path), load_file(other / path.name)
        for name in a:
            if name.endswith("weight_packed"):
                codes += 8 * a[name].numel()
                differing += int((((a[name] ^ b[name]).unsqueeze(-1) >> shifts) & 15).ne(0).sum())
            elif not torch.equal(_integers(a[name]), _integers(b[name])):
                others.append(name)
    return {"share_of_codes": round(differing / max(1, codes), 6), "others": len(others), "such_as": others[:6]}


def stage(context: Context) -> Iterator[Facts]:
    """The awq stage as a process, with read-ahead, pinned copies and the writing thread."""
    import torch
    import yaml

    from mmq.machine.device import release_memory
    from real_layers import write_layers

    layers = 2 if context.small else 3
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(1) as pool:
        folder = Path(name)
        begin = time.perf_counter()
        write_layers(folder / "source", layers, context.torch_device(), context.shape())
        release_memory()
        if context.is_gpu:
            torch.cuda.empty_cache()
        yield {"step": "write the source", "seconds": round(time.perf_counter() - begin, 1)}
        data = ROOT / "calibration_data"
        samples = {"code": 40, "multilingual": 40, "reasoning": 24, "diverse": 24}
        files = [
            {"path": str(data / f"{kind}.jsonl"), "samples": 1 if context.small else count}
            for kind, count in samples.items()
        ]
        awq = {
            "calibration": {"files": files, "sequence_length": 64 if context.small else 1024},
            "source": "fp8",
            "device": context.device,
        }
        for budget in (None,) if context.small else (None, "8GiB"):
            own = awq | ({"memory_budget": budget} if budget else {})
            run = f"run-{budget or 'default'}"
            path = folder / f"{run}.yaml"
            path.write_text(
                yaml.safe_dump({"model": {"source": "source"}, "work_dir": run, "awq": own}), encoding="utf-8"
            )
            begin, started = time.perf_counter(), time.time()
            planning = pool.submit(_mmq, "awq", path, "--dry-run", "--json")
            done = _mmq("awq", path, "--quiet", timeout=120)
            facts: Facts = {
                "step": f"mmq awq, memory_budget {budget or 'of its own'}",
                "seconds": round(time.perf_counter() - begin, 1),
                "ok": done.returncode == 0,
            }
            if not facts["ok"]:
                yield facts | {"error": done.stderr[-600:]}
                continue
            # When what was on the disk: the rest is the process's start and end.
            files = [
                path for kind in ("state/calibration/*", "awq/*.safetensors") for path in (folder / run).glob(kind)
            ]
            moments = sorted(path.stat().st_mtime - started for path in files)
            yield facts | {"files_after": [round(moment, 1) for moment in moments]}
            statistics = json.loads((folder / run / "state/awq/layers.json").read_text(encoding="utf-8"))
            for entry in statistics:
                yield {
                    "layer": entry["layer"],
                    "parts": entry["seconds"],
                    "budget_gib": round(entry["memory_budget"] / GIB, 2),
                    "peak_gib": round(entry["peak_device_bytes"] / GIB, 2),
                    "reserved_gib": round(entry["peak_device_reserved_bytes"] / GIB, 2),
                    "loss_of_nearest": round(entry["loss_chosen"] / entry["loss_round_to_nearest"], 4),
                }
            planned = planning.result()
            facts = {"step": "the plan"}
            if planned.returncode == 0:
                (plan,) = json.loads(planned.stdout.splitlines()[-1])["plan"]
                facts |= {f"planned_{kind}_gib": round(plan[f"{kind}_memory"] / GIB, 2) for kind in ("device", "host")}
            else:
                facts |= {"ok": False, "error": planned.stderr[-300:]}
            yield facts
            shutil.rmtree(folder / run)
            if moments[-1] > 60:
                break


def stock(context: Context) -> Iterator[Facts]:
    """llmcompressor's own search on the same layer, and mmq's, at two numbers of tokens; a line through them."""
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
    for name, everywhere in (("stock, routed", False), ("stock, as shipped", True)):
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


PARTS = {
    part.run.__name__: part
    for part in (
        Part(ceilings, 30),
        Part(kernels, 90),
        Part(speed, 90),
        Part(layer, 90),
        Part(search, 90),
        Part(tiny, 120),
        Part(profile, 60),
        Part(stage, 170),
        Part(stock, 150),
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
    for facts in good:
        if facts in passed:
            continue
        lines.append(f"{facts['part']}: {_words(facts)}"[:width])
        top = [f"{entry['share']:.0%} {entry['calls']}x {entry['kernel'][:44]}" for entry in facts.get("top", [])]
        lines += ["  " + "; ".join(top[start : start + 3])[:width] for start in range(0, len(top[:12]), 3)]
    return lines[:most]


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
