"""Layers of MiniMax-M2.5's shape with weights that differ and routers that route, for benchmarks.

Not a program. `scripts/gpu_check.py` and `scripts/bench_io.py` import it:

    write_layers(folder, layers=3, device=torch.device("cuda"))
    content, config, hidden = layer_in_memory(Shape(), tokens=131072, device=torch.device("cuda"))

The distributions are those of `mmq synth`, drawn on the device that is given, where a layer takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmq.families.minimax_m2 import MINIMAX_M2
from mmq.families.sizes import Dimensions
from mmq.quantize.layer import LayerContent
from mmq.source.formats import SCALE_SUFFIX
from mmq.source.synth import Sizes, model_config, write_tokenizer
from mmq.storage.atomic import write_json
from mmq.storage.checkpoint import CONFIG_NAME, INDEX_NAME
from mmq.storage.shards import save_tensors
from mmq.tensors.fp8 import BLOCK, LARGEST

ARCH = MINIMAX_M2
SHARD_BYTES = 2**30


@dataclass(frozen=True)
class Shape:
    """A layer's sizes; MiniMax-M2.5's by default."""

    experts: int = 256
    hidden: int = 3072
    intermediate: int = 1536
    top_k: int = 8
    heads: int = 48
    kv_heads: int = 8
    head_dim: int = 128

    def sizes(self, layers: int, vocabulary: int = 1024) -> Sizes:
        return Sizes(
            layers, self.hidden, self.intermediate, self.experts, self.top_k, self.heads, self.kv_heads, self.head_dim,
            vocabulary,
        )  # fmt: skip


class Draw:
    """Random tensors of the synthetic model's distributions."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator, device=self.device)

    def channels(self, count: int, spread: float, outliers: float) -> torch.Tensor:
        """Magnitudes around 1, one in 80 far larger."""
        magnitude = (self.normal(count) * spread).exp()
        chosen = torch.rand(count, generator=self._generator, device=self.device) < 0.012
        return torch.where(chosen, magnitude * outliers, magnitude)

    def outside_experts(self, shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
        """A layer's tensors but for its experts, matrices in fp32, by their names in the layer."""
        hidden, dims = shape.hidden, Dimensions.of(model_config(shape.sizes(1)), ARCH)
        for weight in ARCH.attention_weights:
            size = dims.shape(weight)
            if weight.is_matrix:
                yield weight.name, self.normal(*size) * size[1] ** -0.5
            else:
                yield weight.name, self.channels(*size, 0.1, 2).to(torch.bfloat16)
        norm = self.channels(hidden, 0.3, 25)
        yield ARCH.smooth_norm, norm.to(torch.bfloat16)
        yield ARCH.router, self.normal(shape.experts, hidden) * (hidden**-0.5 / norm.square().mean().sqrt())
        assert ARCH.router_bias is not None
        yield ARCH.router_bias, 8 + 0.1 * self.normal(shape.experts)

    def expert(self, shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gate, up [I, H] and down [H, I] in fp32."""
        hidden, inner = shape.hidden, shape.intermediate
        # About what the norm's outlier channels make of a unit input.
        gain = hidden**-0.5 / 3
        up = self.normal(inner, hidden) * gain * self.channels(inner, 0.3, 20)[:, None]
        return self.normal(inner, hidden) * gain * 2, up, self.normal(hidden, inner) * 0.6 * inner**-0.5


def layer_in_memory(
    shape: Shape, tokens: int, device: torch.device, seed: int = 0
) -> tuple[LayerContent, dict[str, Any], torch.Tensor]:
    """A dequantized layer, its config.json, and hidden states bfloat16 [T, H] with heavy tails."""
    draw = Draw(device, seed)
    gate_up = torch.empty(shape.experts, 2 * shape.intermediate, shape.hidden, dtype=torch.bfloat16, device=device)
    down = torch.empty(shape.experts, shape.hidden, shape.intermediate, dtype=torch.bfloat16, device=device)
    for expert in range(shape.experts):
        gate, up, own = draw.expert(shape)
        gate_up[expert, : shape.intermediate], gate_up[expert, shape.intermediate :], down[expert] = gate, up, own
    rest = {
        name: tensor.to(torch.bfloat16) if name.removesuffix(".weight") in ARCH.attention else tensor
        for name, tensor in draw.outside_experts(shape)
    }
    hidden = draw.normal(tokens, shape.hidden) * draw.channels(shape.hidden, 0.3, 5)
    hidden *= draw.normal(tokens, 1).mul_(0.5).exp_()
    return LayerContent(gate_up, down, rest), model_config(shape.sizes(1)), hidden.to(torch.bfloat16)


def write_layers(
    folder: Path,
    layers: int,
    device: torch.device,
    shape: Shape | None = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """An fp8 checkpoint of some layers, in shards of a gigabyte unless told, with a tokenizer of 1024 tokens."""
    shape = shape or Shape()
    folder.mkdir(parents=True)
    sizes = shape.sizes(layers)
    write_tokenizer(folder, sizes.vocabulary)
    draw = Draw(device, seed)
    weight_map: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}

    def flush() -> None:
        shard = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_tensors(folder / shard, part)
        weight_map.update(dict.fromkeys(part, shard))
        part.clear()

    def add(name: str, tensor: torch.Tensor, fp8: bool = False) -> None:
        if fp8:
            codes, scale = to_block_fp8(tensor)
            part[name], part[name + SCALE_SUFFIX] = codes.cpu(), scale.cpu()
        else:
            part[name] = tensor.cpu()
        if sum(own.nbytes for own in part.values()) >= shard_bytes:
            flush()

    add(ARCH.embedding, draw.normal(sizes.vocabulary, shape.hidden).to(torch.bfloat16))
    add(ARCH.head, draw.normal(sizes.vocabulary, shape.hidden).mul(2 * shape.hidden**-0.5).to(torch.bfloat16))
    add(ARCH.final_norm, draw.channels(shape.hidden, 0.1, 2).to(torch.bfloat16))
    for layer in range(layers):
        for name, tensor in draw.outside_experts(shape):
            add(ARCH.layer_prefix(layer) + name, tensor, name.removesuffix(".weight") in ARCH.attention)
        for expert in range(shape.experts):
            for linear, weight in zip(ARCH.expert_linears, draw.expert(shape), strict=True):
                add(f"{ARCH.expert_weight(layer, expert, linear)}.weight", weight, fp8=True)
    flush()
    write_json(folder / INDEX_NAME, {"metadata": {}, "weight_map": weight_map})
    write_json(folder / CONFIG_NAME, model_config(sizes))


def to_block_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [out, in], both multiples of 128 -> float8_e4m3fn [out, in] and float32 block scales."""
    rows, columns = weight.shape
    blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)) / LARGEST
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.view(rows, columns), scale
