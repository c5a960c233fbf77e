"""Time mmq's scale search against llmcompressor's on one random MiniMax-M2 layer, all in one process.

    python scripts/bench_awq.py --preset cpu
    python scripts/bench_awq.py --preset m2.5 --device cuda
    python scripts/bench_awq.py --experts 16 --tokens 2048 --json
    python scripts/bench_awq.py --preset cpu --skip-stock --scaling

Three contenders do the same work: norm and router, the block's unquantized output, the grid of the norm before the
block and the grid of every expert's down layer. Each is warmed up before it is timed, the stock modifier with a grid of
three points: the first products of a shape, and the first call of some functions, take seconds.

    stock         llmcompressor's AWQModifier as shipped: every expert calibrated on every token
    stock routed  the same with moe_calibrate_all_experts off: an expert sees its own tokens, as in mmq
    mmq           ExpertBlock, search_norm and search_down

With --rounding, what `awq.rounding: compensated` adds is timed as well: moments, rounding with and without smoothing,
and judging by the samples held back, after a search that is not timed.

Where there is no accelerator, the stock modifier can run only with its pinning of memory taken out.

With --stock-tokens below --tokens, the stock modifier is timed at that number and at half of it, and a straight line
through the two gives its time at --tokens: a part of its time does not grow with the tokens, so scaling the one time in
proportion would flatter mmq. Both are printed.

roofline share: the time that the bare matrix products of mmq's search would take at the rate of one large bf16 product
measured in the same run, divided by mmq's time. Counted are the forward passes of the routed rows that the norm's
points took (with --search full, n_grid of them) and one more, the down layers' inputs, and n_grid products of [H, I]
with their second moments [I, I] or, where fewer, with the inputs.

Peak memory is the most held at one time above what the process held before: of the device's allocator on a GPU, of the
resident set on a CPU, by Linux's own account of it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

# Read at import: progress bars are no part of what is timed, and llmcompressor's log goes to stdout.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ["LLM_COMPRESSOR_LOG_DISABLED"] = os.environ["COMPRESSED_TENSORS_LOG_DISABLED"] = "true"

import torch
from rich.console import Console
from rich.table import Table
from transformers.activations import ACT2FN

from mmq.families.minimax_m2 import MINIMAX_M2
from mmq.machine.device import peak_host, resident_host
from mmq.quantize.race import parts
from mmq.quantize.rounding import Smoothing, judge
from mmq.quantize.routed_experts import ExpertBlock, Weights
from mmq.quantize.search import Found, StackedAWQModifier, awq_mappings
from mmq.recipe import parse_size

sys.path.insert(0, str(Path(__file__).parent))

import stock_awq

STOCK, ROUTED, MMQ, ROUNDING = "stock", "stock routed", "mmq", "mmq rounding"
# Tokens of one batch of the stock modifier: few and large batches are in its favour.
STOCK_BATCH = 4096
# Tokens of a calibration sample, an eighth of which are held back to judge.
SAMPLE = 256
# Losses of the stock modifier are sums in bf16, of weights times scales rounded to bf16.
LOSS_TOLERANCE = 0.02
PRESETS = {
    "cpu": {"experts": 64, "hidden": 512, "intermediate": 256, "top_k": 2, "tokens": 4096, "repeat": 3},
    "m2.5": {
        "experts": 256,
        "hidden": 3072,
        "intermediate": 1536,
        "top_k": 8,
        "tokens": 131072,
        "stock_tokens": 4096,
        "repeat": 1,
    },
}
DUO_SCALING: dict[str, bool | str] = {"true": True, "false": False, "both": "both"}


@dataclass(frozen=True)
class Sizes:
    """What is searched."""

    experts: int
    hidden: int
    intermediate: int
    top_k: int
    tokens: int
    n_grid: int
    duo_scaling: bool | str


@dataclass
class Measured:
    """One contender's runs.

    Attributes:
        seconds: of every repetition.
        peak_bytes: the largest of all repetitions.
        result: of the last one.
        error: why there is no result.
    """

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    result: Any = None
    error: str | None = None

    @property
    def best(self) -> float | None:
        """The least time: what other programs on the machine add is never negative."""
        return min(self.seconds) if self.seconds and self.error is None else None


@dataclass
class Agreement:
    """How mmq's choices compare with those of the stock modifier on the same routed tokens.

    Attributes:
        norm_same: whether the norm's point of the grid is the same.
        down_same: the share of experts whose point is the same.
        norm_excess, down_excess: loss at mmq's point over the least, less 1, both by the stock modifier's losses; the
            latter is a mean over experts.
        scales_difference: largest relative difference of scales where the points are the same.
    """

    tokens: int
    norm_same: bool
    down_same: float
    norm_excess: float
    down_excess: float
    scales_difference: float

    @property
    def agree(self) -> bool:
        return max(self.norm_excess, self.down_excess) <= LOSS_TOLERANCE and self.scales_difference < 1e-2


class PeakMemory:
    """Context that measures how far memory rises above where it was; `bytes` afterwards."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._begin = torch.cuda.memory_allocated(self.device)
            return self
        _give_back_heap()
        self._begin = resident_host()
        with contextlib.suppress(OSError):
            # Linux: the largest resident size so far is what it is now. Sampling it would take time from what is timed.
            Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._begin
        elif self._begin is not None:
            self.bytes = peak_host() - self._begin


def _give_back_heap() -> None:
    """Freed pages that malloc holds back would hide what the next contender takes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Contender:
    """Something to time: work(prepare()), where only `work` counts."""

    prepare: Callable[[], Any]
    work: Callable[[Any], Any]
    warm_up: Callable[[Any], Any]
    measured: Measured = field(default_factory=Measured)


def measure(contenders: list[Contender], device: torch.device, repeat: int) -> None:
    """Warm up and time all, in turns, so that a change of the machine's load meets all; an error ends one alone."""
    for number in range(repeat + 1):
        for contender in contenders:
            if contender.measured.error is None:
                _measure_once(contender, device, warm_up=number == 0)


def _measure_once(contender: Contender, device: torch.device, warm_up: bool) -> None:
    measured = contender.measured
    try:
        prepared = contender.prepare()
        if warm_up:
            contender.warm_up(prepared)
            _synchronize(device)
        else:
            with PeakMemory(device) as peak:
                begin = time.perf_counter()
                measured.result = contender.work(prepared)
                _synchronize(device)
                measured.seconds.append(time.perf_counter() - begin)
            measured.peak_bytes = max(measured.peak_bytes, peak.bytes)
    except Exception as error:
        lines = str(error).splitlines()
        measured.error = f"{type(error).__name__}: {lines[0] if lines else ''}"
        measured.result = None


@dataclass
class Bench:
    """One random layer and its tokens, on the device in bf16."""

    sizes: Sizes
    device: torch.device
    seed: int
    search: str = "paired"
    budget: int | None = None

    def __post_init__(self) -> None:
        sizes = self.sizes
        self.layer = stock_awq.random_layer(
            sizes.experts, sizes.hidden, sizes.intermediate, torch.bfloat16, self.device, self.seed
        )
        self.hidden = stock_awq.random_hidden(sizes.tokens, sizes.hidden, torch.bfloat16, self.device, self.seed + 1)

    def stock(self, tokens: int, all_experts: bool) -> Contender:
        """The stock modifier on the first tokens; building its modules is not timed."""
        batches = self.hidden[:tokens].split(STOCK_BATCH)
        duo_scaling, n_grid = self.sizes.duo_scaling, self.sizes.n_grid
        return Contender(
            lambda: stock_awq.build_model(self.layer, self.sizes.top_k),
            lambda model: stock_awq.run_stock(model, batches, duo_scaling, n_grid, all_experts),
            lambda model: stock_awq.run_stock(model, batches[:1], False, 3, all_experts),
        )

    def mmq(self, tokens: int) -> Contender:
        """mmq on the first tokens."""

        def search(_: None) -> tuple[Found, Found]:
            return self._search(self.hidden[:tokens])

        return Contender(lambda: None, search, search)

    def rounding(self) -> Contender:
        """mmq's compensated rounding on all tokens, under what its search found."""
        lengths = [len(part) for part in self.hidden.split(SAMPLE)]

        def search() -> tuple[ExpertBlock, list[torch.Tensor], Smoothing]:
            block = self._block(self.hidden)
            norm, down = self._search(self.hidden)
            return block, block.outputs(Weights(block)), Smoothing(norm.scales.float(), down.scales.float())

        def work(prepared: tuple[ExpertBlock, list[torch.Tensor], Smoothing]) -> None:
            judge(*prepared[:2], lengths, sum(lengths), prepared[2])

        return Contender(search, work, work)

    def _block(self, hidden: torch.Tensor) -> ExpertBlock:
        x, index, weight = stock_awq.block_inputs(self.layer, hidden, self.sizes.top_k)
        layer = self.layer
        return ExpertBlock(
            x, index, weight, layer.gate_up, layer.down, ACT2FN["silu"], stock_awq.GROUP_SIZE, budget=self.budget,
            parts=(1.0,) if self.search == "full" else parts(index.numel() / self.sizes.experts),
        )  # fmt: skip

    def _search(self, hidden: torch.Tensor) -> tuple[Found, Found]:
        full, block = self.search == "full", self._block(hidden)
        modifier = StackedAWQModifier(
            mappings=awq_mappings(MINIMAX_M2), duo_scaling=self.sizes.duo_scaling, n_grid=self.sizes.n_grid
        )
        return modifier.search_norm(block, block.outputs(Weights(block)), full), modifier.search_down(block)

    def agreement(self, stock: stock_awq.StockResult, tokens: int) -> Agreement:
        """mmq's search on the same tokens, by the stock modifier's losses."""
        norm, down = self._search(self.hidden[:tokens])
        same, excess, differences = [], [], [0.0]

        def compare(search: stock_awq.Search, scales: torch.Tensor, ratio: float, duo: bool) -> None:
            place = min((abs(some - ratio), i) for i, (some, other) in enumerate(stock.grid) if other == duo)[1]
            same.append(stock.grid[place] == (search.ratio, search.duo))
            least = min(search.losses)
            excess.append(search.losses[place] / least - 1 if least else 0.0)
            if same[-1]:
                differences.append(float((scales.cpu() / search.scales - 1).abs().max()))

        compare(stock.norm, norm.scales, float(norm.ratio), bool(norm.duo))
        for expert, search in stock.down.items():
            compare(search, down.scales[expert], float(down.ratio[expert]), bool(down.duo[expert]))
        experts = max(1, len(stock.down))
        return Agreement(
            tokens, same[0], sum(same[1:]) / experts, excess[0], sum(excess[1:]) / experts, max(differences)
        )


def product_flops(sizes: Sizes, passes: float) -> float:
    """Floating-point operations of the matrix products in mmq's search.

    Args:
        passes: over all tokens that the norm's search took, parts of one included.
    """
    rows, hidden, inner = sizes.tokens * sizes.top_k, sizes.hidden, sizes.intermediate
    points = 2 * (sizes.n_grid // 2) if sizes.duo_scaling == "both" else sizes.n_grid
    forwards = (passes + 1) * rows * 6 * hidden * inner
    many = rows > sizes.experts * inner
    inputs = rows * (4 * hidden * inner + (2 * inner * inner if many else 0))
    down = points * min(rows, sizes.experts * inner) * 2 * hidden * inner
    return float(forwards + inputs + down)


def matmul_rate(device: torch.device, repeat: int = 5) -> float:
    """Operations a second of the best of some large bf16 products."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    best = math.inf
    for _ in range(repeat + 2):
        _synchronize(device)
        begin = time.perf_counter()
        torch.mm(a, b)
        _synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def at_tokens(seconds: float, half_seconds: float, measured_tokens: int, tokens: int) -> float:
    """Time at `tokens` by the straight line through the times at `measured_tokens` and half of them."""
    growth = min(max(0.0, 2 * (seconds - half_seconds)), seconds)
    return seconds + growth * (tokens / measured_tokens - 1)


def stock_facts(measured: Measured, half: Measured | None, stock_tokens: int, tokens: int) -> dict[str, Any]:
    """One stock contender's times at `stock_tokens`, and at half of them where they are not all, as reported."""
    facts: dict[str, Any] = {
        "measured_tokens": stock_tokens,
        "measured_seconds": measured.seconds,
        "seconds": measured.best,
        "extrapolated": half is not None,
        "peak_bytes": measured.peak_bytes or None,
        "error": measured.error or (half.error if half else None),
    }
    if half is not None:
        facts["measured_seconds_half"] = half.seconds
        facts["seconds"] = facts["seconds_in_proportion"] = None
        if measured.best is not None:
            facts["seconds_in_proportion"] = measured.best * tokens / stock_tokens
            if half.best is not None:
                facts["seconds"] = at_tokens(measured.best, half.best, stock_tokens, tokens)
    return facts


def growth(bench: Bench, repeat: int) -> dict[str, list[dict[str, float | None]]]:
    """mmq's time at a quarter, half and all of the experts, and of the tokens."""
    sizes, device = bench.sizes, bench.device
    series: dict[str, list[dict[str, float | None]]] = {"experts": [], "tokens": []}
    for part in (4, 2, 1):
        experts, tokens = max(sizes.top_k, sizes.experts // part), max(1, sizes.tokens // part)
        fewer = bench
        if part > 1:
            fewer = Bench(replace(sizes, experts=experts), device, bench.seed, bench.search, bench.budget)
        pair = [fewer.mmq(sizes.tokens), bench.mmq(tokens)]
        measure(pair, device, repeat)
        series["experts"].append({"experts": experts, "seconds": pair[0].measured.best})
        series["tokens"].append({"tokens": tokens, "seconds": pair[1].measured.best})
        del fewer, pair
    return series


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All that was asked for, as it goes into the JSON."""
    device = torch.device(options.device)
    sizes = Sizes(
        options.experts, options.hidden, options.intermediate, options.top_k, options.tokens,
        options.n_grid, DUO_SCALING[options.duo_scaling],
    )  # fmt: skip
    stock_tokens = min(options.stock_tokens or sizes.tokens, sizes.tokens)
    partly = stock_tokens < sizes.tokens
    bench = Bench(
        sizes,
        device,
        options.seed,
        options.search,
        parse_size(options.memory_budget) if options.memory_budget else None,
    )
    rate = matmul_rate(device)
    contenders = {MMQ: bench.mmq(sizes.tokens)}
    if options.rounding:
        contenders[ROUNDING] = bench.rounding()
    halves = {}
    if not options.skip_stock:
        for name, all_experts in ((ROUTED, False), (STOCK, True)):
            contenders[name] = bench.stock(stock_tokens, all_experts)
            if partly:
                halves[name] = bench.stock(stock_tokens // 2, all_experts)
    measure([*contenders.values(), *halves.values()], device, options.repeat)
    mmq = contenders[MMQ].measured
    points = mmq.result[0].points if mmq.result else []
    passes = sum(point.tokens for point in points) / sizes.tokens
    bare = product_flops(sizes, passes) / rate
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "sizes": asdict(sizes),
        "seconds": {MMQ: mmq.best},
        "peak_bytes": {MMQ: mmq.peak_bytes or None},
        "errors": {MMQ: mmq.error} if mmq.error else {},
        "mmq_seconds": mmq.seconds,
        "search": options.search,
        "passes": passes,
        "matmul_tflops": rate / 1e12,
        "bare_products_seconds": bare,
        "roofline_share": bare / mmq.best if mmq.best else None,
        "speedup_vs_stock": None,
        "speedup_vs_stock_routed": None,
        "scales_agree": None,
        "agreement": None,
        "stock": {},
    }
    if ROUNDING in contenders:
        measured = contenders[ROUNDING].measured
        report["seconds"][ROUNDING], report["peak_bytes"][ROUNDING] = measured.best, measured.peak_bytes or None
        if measured.error:
            report["errors"][ROUNDING] = measured.error
    for name, key in ((ROUTED, "speedup_vs_stock_routed"), (STOCK, "speedup_vs_stock")):
        if name not in contenders:
            continue
        half = halves[name].measured if partly else None
        facts = stock_facts(contenders[name].measured, half, stock_tokens, sizes.tokens)
        report["stock"][name] = facts
        report["seconds"][name], report["peak_bytes"][name] = facts["seconds"], facts["peak_bytes"]
        if facts["error"]:
            report["errors"][name] = facts["error"]
        if facts["seconds"] and mmq.best:
            report[key] = facts["seconds"] / mmq.best
    routed = contenders[ROUTED].measured.result if ROUTED in contenders else None
    if routed is not None and mmq.error is None:
        agreement = bench.agreement(routed, stock_tokens)
        report["agreement"], report["scales_agree"] = asdict(agreement), agreement.agree
    if options.scaling:
        report["scaling"] = growth(bench, options.repeat)
    return report


def show(report: dict[str, Any], console: Console) -> None:
    """The report as tables."""
    sizes = report["sizes"]
    shape = "{experts} experts x {hidden} x {intermediate}, top {top_k}, {tokens} tokens, {n_grid} points".format(
        **sizes
    )
    table = Table(title=f"{shape}, on {report['device']}", title_justify="left", min_width=100)
    for column in ("", "seconds", "times mmq's", "peak memory", ""):
        table.add_column(column, justify="left" if not column else "right")
    own = report["seconds"][MMQ]
    for name in (STOCK, ROUTED, MMQ, ROUNDING):
        if name not in report["seconds"]:
            continue
        seconds, peak = report["seconds"][name], report["peak_bytes"][name]
        facts = report["stock"].get(name, {})
        note = report["errors"].get(name, "")
        if facts.get("extrapolated") and seconds:
            measured = min(facts["measured_seconds"])
            note = (
                f"extrapolated from {facts['measured_tokens']} tokens, {measured:.2f} s; "
                f"in proportion it would be {facts['seconds_in_proportion']:.1f} s"
            )
        table.add_row(
            name,
            f"{seconds:.2f}" if seconds else "-",
            f"{seconds / own:.1f}" if seconds and own else "-",
            f"{peak / 2**20:.0f} MiB" if peak else "-",
            note,
        )
    console.print(table)
    if report["roofline_share"]:
        console.print(
            f"roofline share {report['roofline_share']:.0%}: mmq's products alone would take "
            f"{report['bare_products_seconds']:.2f} s at {report['matmul_tflops']:.2f} TFLOP/s of a large bf16 "
            f"product; {report['search']} search, {report['passes']:.1f} passes over all tokens"
        )
    if (agreement := report["agreement"]) is not None:
        tokens, norm_excess, down_excess = (agreement[key] for key in ("tokens", "norm_excess", "down_excess"))
        console.print(
            f"scales {'agree' if report['scales_agree'] else 'DO NOT AGREE'} with stock routed on {tokens} tokens: "
            f"norm's point {'the same' if agreement['norm_same'] else 'another'}, loss {norm_excess:+.2%}; "
            f"down's point the same for {agreement['down_same']:.0%} of experts, loss {down_excess:+.2%}; "
            f"scales of the same points differ by {agreement['scales_difference']:.1e}"
        )
    for kind, rows in report.get("scaling", {}).items():
        table = Table(title=f"mmq by {kind}", title_justify="left")
        for column in (kind, "seconds", "growth of time / of size"):
            table.add_column(column, justify="right")
        before = None
        for row in rows:
            size, seconds = row[kind], row["seconds"]
            ratio = f"{seconds / before[1] / (size / before[0]):.2f}" if before and seconds and before[1] else ""
            table.add_row(str(size), f"{seconds:.2f}" if seconds else "-", ratio)
            before = (size, seconds)
        console.print(table)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; a preset gives the sizes that are not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    for name in ("experts", "hidden", "intermediate", "top-k", "tokens"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--stock-tokens", type=int, help="tokens of the stock modifier; default: all, with m2.5 4096")
    parser.add_argument("--n-grid", type=int, default=20)
    parser.add_argument("--duo-scaling", choices=list(DUO_SCALING), default="true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--repeat", type=int, help="runs of each contender, of which the best counts; default: 3, with m2.5 1"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--search", choices=["paired", "full"], default="paired")
    parser.add_argument("--memory-budget", default=None, help="as in a recipe, e.g. 8GiB; default: the device's")
    parser.add_argument("--skip-stock", action="store_true", help="time mmq alone")
    parser.add_argument("--rounding", action="store_true", help="time mmq's compensated rounding as well")
    parser.add_argument("--scaling", action="store_true", help="time mmq at three numbers of experts and of tokens")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args(arguments)
    for key, value in PRESETS[options.preset].items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    if min(options.experts, options.top_k, options.tokens, options.repeat) < 1 or options.n_grid < 3:
        parser.error("--experts, --top-k, --tokens and --repeat must be at least 1, --n-grid at least 3")
    if options.top_k > options.experts:
        parser.error("--top-k must be at most --experts")
    if options.hidden % stock_awq.GROUP_SIZE or options.intermediate % stock_awq.GROUP_SIZE:
        parser.error(f"--hidden and --intermediate must be multiples of {stock_awq.GROUP_SIZE}")
    if options.stock_tokens is not None and options.stock_tokens < 2:
        parser.error("--stock-tokens must be at least 2")
    return options


def main() -> int:
    options = parse()
    # Libraries print to stdout at times; the JSON must stand there alone.
    with contextlib.redirect_stdout(sys.stderr):
        report = run(options)
    if options.json:
        print(json.dumps(report))
    else:
        show(report, Console(width=None if sys.stdout.isatty() else 160))
    return 1 if MMQ in report["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
