"""Triton's compiler makes machine code of every kernel for every kind of card, without one: the interpreter takes more
than the compiler does. The kernels are called as `dispatch` has them called, in a process that knows no interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

# Ampere with much shared memory and with little, Hopper, both kinds of Blackwell; bytes a program may have of it.
SHARED = {80: 163 * 2**10, 86: 99 * 2**10, 90: 227 * 2**10, 100: 227 * 2**10, 120: 99 * 2**10}
KERNELS = {
    "_combine",
    "_dequantize",
    "_descend_group",
    "_double",
    "_fake_quantize",
    "_grouped_product",
    "_magnitude_sums",
    "_normalized_mean",
    "_row_squares",
    "_quantize_in_place",
    "_round_columns",
    "_row_products",
    "_searched_scale",
    "_second_moments",
    "_sums_by_expert",
    "_token_losses",
}


# Experts, rows, hidden and inner width, group: as in a model; every number one, and odd, which are compiled apart from
# others. The latter for one card.
MODEL, OTHERS = (256, 4096, 3072, 1536, 128), [(1, 1, 32, 32, 32), (3, 5, 160, 96, 32)]


def compile_all() -> list[dict[str, Any]]:
    """What Triton says of each kernel that it compiled."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    from mmq.tensors.fused import combine, dequantize, grouped, launch, moments, probe, quantize, rounding

    class Card:
        capability = 90

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", self.capability, 32)

        def get_current_device(self) -> int:
            return self.capability

        def get_current_stream(self, device: int) -> int:
            return 0

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def stack(cubin: bytes) -> int:
        """Bytes a thread keeps in memory for want of registers."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            command = [str(tools / "cuobjdump"), "-res-usage", file.name]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return max(int(number) for number in re.findall(r"STACK:(\d+)", told))

    compiled: list[dict[str, Any]] = []
    run = triton.runtime.jit.JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        text = kernel.asm["ptx"]
        compiled.append(
            {
                "capability": card.capability,
                "name": kernel.metadata.name,
                "shared": kernel.metadata.shared,
                "flushes": ".ftz" in text,
                "fused": "fma.rn" in text,
                "cubin": len(kernel.asm["cubin"]),
                "stack": stack(kernel.asm["cubin"]),
            }
        )

    card = Card()
    triton.runtime.driver.set_active(card)
    triton.runtime.jit.JITFunction.run = compile_only

    def bf16(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    def compile_for(experts: int, count: int, hidden: int, inner: int, group: int) -> None:
        gate_up, down = bf16(experts, 2 * inner, hidden), bf16(experts, hidden, inner)
        for change in (False, True):
            quantize.fake_quantize_scaled(gate_up[:1], torch.ones(hidden), group, gate_up[:1], change)
        quantize.normalized_mean(gate_up[:1], group)
        for divisors in (None, torch.ones(1, 2 * inner, 1)):
            quantize.quantize_in_place(gate_up[:1], torch.ones(hidden), divisors, group)
        rounding.searched_scale(gate_up[:1].float(), torch.ones(1, hidden), group, (1.0, 0.9))
        for columns in {64, group, min(32, hidden)}:
            aim = torch.empty(1, 2 * inner, columns)
            codes = torch.empty(1, 2 * inner, hidden, dtype=torch.int8)[:, :, -columns:]
            rounding.round_columns(aim, torch.empty(1, columns, columns), aim, aim, codes)
        slope, own = torch.empty(1, 2 * inner, group), torch.empty(1, hidden, hidden)[:, :group, :group]
        error, codes = torch.empty(1, 2 * inner, hidden)[:, :, -group:], codes[:, :, -group:]
        rounding.descend_group(slope, own, error, codes, bf16(1, 2 * inner, hidden // group)[:, :, 0], 32, 1e-5)
        ends = torch.ones(experts, dtype=torch.int32)
        token = torch.zeros(count, dtype=torch.int64)
        grouped.gated_rows(bf16(count, hidden), token, gate_up, ends)
        grouped.grouped_rows(bf16(count, inner), down, ends, bf16(count, hidden))
        weights, reference = torch.ones(count, 1), torch.empty(count, hidden)
        combine.combine(bf16(count, hidden), token.unsqueeze(1), weights, reference, 0)
        combine.token_losses(bf16(count, hidden), token.unsqueeze(1), weights, reference, 0)
        codes = torch.empty(experts, count, hidden, dtype=torch.float8_e4m3fn)
        scales = torch.ones(experts, -(-count // 128), -(-hidden // 128))
        dequantize.dequantize_blocks(codes, scales, torch.empty(codes.shape, dtype=torch.bfloat16), 128)
        moments.squares_by_expert(bf16(count, inner), ends)
        moments.magnitude_sums(bf16(count, inner), ends, torch.empty(experts, inner))
        moments.row_products(down, down)
        moments.second_moments(bf16(count, inner), ends, torch.empty(1, 1, 1).expand(experts, inner, inner))

    for card.capability in SHARED:
        large = launch.large_shared_memory(divmod(card.capability, 10))
        for module in (grouped, moments):
            tiles = module.LARGE if large else module.SMALL
            module._tiles = lambda device, tiles=tiles: tiles
        probe.double(bf16(100))
        for sizes in (MODEL, *OTHERS) if card.capability == 90 else (MODEL,):
            compile_for(*sizes)
    return compiled


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # Triton warns of kernels for which nothing is said, since its choice changes.
    assert "FP fusion" not in done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles(capability: int, compiled: list[dict[str, Any]]) -> None:
    kernels = [kernel for kernel in compiled if kernel["capability"] == capability]
    assert {kernel["name"] for kernel in kernels} == KERNELS
    for kernel in kernels:
        assert kernel["cubin"] > 0 and kernel["shared"] <= SHARED[capability]
        assert kernel["stack"] == 0, kernel["name"]
        # Denormal numbers are kept, as torch keeps them.
        assert not kernel["flushes"]
        # A product and a sum that are rounded once would be other bits than torch's.
        assert not (
            kernel["fused"]
            and kernel["name"]
            in ("_fake_quantize", "_quantize_in_place", "_normalized_mean", "_dequantize", "_round_columns")
        )


if __name__ == "__main__":
    print(json.dumps(compile_all()))
