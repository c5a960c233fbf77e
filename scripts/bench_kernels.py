"""Time each of Triton's kernels beside torch's way of computing the same, on a GPU, at the sizes of MiniMax-M2.5.

    python scripts/bench_kernels.py
    python scripts/bench_kernels.py --tokens 16384 --experts 256 --tiles

Each line gives milliseconds (the median of ten runs after three), what that is in TB/s of the least memory traffic
there could be, or in TFLOP/s, and how many times longer torch takes. Rows are those of a random router. With --tiles,
grouped products are timed with tiles of other sizes too. 40 GB of memory do.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from mmq.tensors import dispatch, experts, fp8, int4
from mmq.tensors.experts import Rows

HIDDEN, INNER, TOP_K, GROUP = 3072, 1536, 8, 128
# Height, width, depth, stages, warps; band.
TILES = [
    ((128, 256, 64, 3, 8), 8),
    ((128, 256, 64, 4, 8), 4),
    ((128, 256, 64, 4, 8), 8),
    ((128, 256, 64, 4, 8), 16),
    ((128, 256, 32, 4, 8), 8),
    ((256, 128, 64, 4, 8), 8),
    ((128, 128, 64, 4, 4), 8),
    ((128, 128, 64, 4, 8), 8),
    ((128, 128, 32, 4, 4), 8),
    ((64, 256, 64, 4, 4), 8),
]


def seconds(work: Callable[[], object]) -> float:
    """The median of ten runs after three."""
    for _ in range(3):
        work()
    times = []
    for _ in range(10):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return statistics.median(times)


@contextlib.contextmanager
def torchs_way() -> Iterator[None]:
    kept = dispatch.triton_works
    dispatch.triton_works = lambda device: False
    try:
        yield
    finally:
        dispatch.triton_works = kept


def report(name: str, work: Callable[[], object], size: float, unit: str, plain: bool = True) -> None:
    """A line of the table; `size` in bytes or floating point operations."""
    try:
        fused = seconds(work)
        line = f"{name:44} {1000 * fused:9.3f} ms {size / fused / 1e12:8.2f} {unit}"
        if plain:
            with torchs_way():
                line += f"   torch {seconds(work) / fused:6.2f} times"
    # One that fails, of tiles that want more than the card has say, is told and the others are timed.
    except Exception as error:
        line = f"{name:44} {type(error).__name__}: {str(error).splitlines()[0][:60]}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--tiles", action="store_true", help="time grouped products with tiles of other sizes too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    device = torch.device("cuda")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    tokens, number = arguments.tokens, arguments.experts
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {tokens} tokens, {number} experts")
    began = time.monotonic()

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16).mul_(scale)

    x, gate_up = normal(tokens, HIDDEN), normal(number, 2 * INNER, HIDDEN, scale=HIDDEN**-0.5)
    down = normal(number, HIDDEN, INNER, scale=INNER**-0.5)
    weights, index = torch.rand(tokens, number, device=device).topk(TOP_K)
    rows = Rows.of(index, number)
    count, ends = tokens * TOP_K, torch.tensor(rows.ends, dtype=torch.int32, device=device)
    silu = torch.nn.functional.silu

    big = normal(8192, 8192)
    result = torch.empty_like(big)
    report("one product of 8192 x 8192", lambda: torch.mm(big, big, out=result), 2 * 8192**3, "TFLOP/s", plain=False)
    target = torch.empty_like(gate_up)
    report("copy", lambda: target.copy_(gate_up), 4 * gate_up.numel(), "TB/s", plain=False)

    part = gate_up[: max(1, number // 4)]
    out, scales = target[: part.shape[0]], torch.rand(HIDDEN, device=device).add_(0.5)
    for change in (False, True):
        report(
            f"fake_quantize_scaled{', change' if change else ''}",
            lambda change=change: int4.fake_quantize_scaled(part, scales, GROUP, out, change),
            4 * part.numel(),
            "TB/s",
        )

    report("normalized_mean", lambda: int4.normalized_mean(part, GROUP), 2 * part.numel(), "TB/s")

    products = 2 * count * HIDDEN * INNER
    token = rows.token
    middle = experts.gated_rows(x, token, gate_up, ends, silu)
    outputs = normal(count, HIDDEN)
    gated: Callable[[], object] = lambda: experts.gated_rows(x, token, gate_up, ends, silu)  # noqa: E731
    grouped: Callable[[], object] = lambda: experts.grouped_rows(middle, down, ends, outputs)  # noqa: E731
    report("gated_rows", gated, 2 * products, "TFLOP/s")
    report("grouped_rows", grouped, products, "TFLOP/s")
    if arguments.tiles:
        from mmq.tensors.fused import grouped as fused

        kept = fused._tiles, fused.BAND
        for sizes, band in TILES:
            tiles = fused.Tiles(*sizes)
            fused._tiles, fused.BAND = (lambda device, tiles=tiles: tiles), band
            report(f"  gated_rows {sizes}, band {band}", gated, 2 * products, "TFLOP/s", plain=False)
            report(f"  grouped_rows {sizes}, band {band}", grouped, products, "TFLOP/s", plain=False)
        fused._tiles, fused.BAND = kept

    reference = torch.randn(tokens, HIDDEN, device=device)
    moved = 2 * outputs.numel() + 4 * reference.numel()
    report("token_losses", lambda: experts.token_losses(outputs, rows.place, weights, reference), moved, "TB/s")
    moved += 4 * reference.numel()
    report("combine", lambda: experts.combine(outputs, rows.place, weights, reference), moved, "TB/s")
    moved = 2 * outputs.numel()
    report("squares_by_expert", lambda: experts.squares_by_expert(outputs, ends), moved, "TB/s")
    sums = torch.zeros(number, INNER, device=device)
    report("magnitude_sums", lambda: experts.magnitude_sums(middle, ends, sums), 2 * middle.numel(), "TB/s")
    moments = torch.zeros(number, INNER, INNER, device=device)
    flops = 2 * count * INNER**2
    report("second_moments, as if both halves", lambda: experts.second_moments(middle, ends, moments), flops, "TFLOP/s")

    codes = part.to(torch.float8_e4m3fn)
    blocks = torch.rand(part.shape[0], *(math.ceil(size / fp8.BLOCK) for size in part.shape[1:]), device=device)
    report("dequantize_blocks", lambda: fp8.dequantize_blocks(codes, blocks), 3 * codes.numel(), "TB/s")
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
