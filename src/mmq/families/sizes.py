"""How large a model is before, between and after the stages, from config.json alone.

The tensors of a checkpoint are written down as names, dtypes, shapes and counts; everything else is sums over them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mmq.errors import CheckpointError, shown
from mmq.families.table import Architecture

Form = Literal["source", "bf16", "awq", "hybrid"]
Split = Literal["tensor parallel", "kv heads", "none"]

GIB = 2**30
ITEM_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4, "I32": 4, "I64": 8}
DTYPE_LABELS = {"F8_E4M3": "fp8", "BF16": "bf16", "F32": "fp32", "I32": "int4 in int32", "I64": "int64"}
FP8 = "F8_E4M3"
BLOCK = 128  # rows and columns of a block with one scale, and what vLLM's kernels want of each GPU's part
PACK = 8  # int4 codes in an int32
LARGEST = 10**9  # a size in a config.json above this is a mistake
# At most: a tensor's entries in its shard's header and in the index.
ENTRY_BYTES = 256
COMPONENTS = ("experts", "attention", "embeddings", "head", "router", "norms and biases", "kv_scales")


@dataclass(frozen=True)
class Dimensions:
    """The sizes in a config.json."""

    layers: int
    experts: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False

    @classmethod
    def of(cls, config: dict[str, Any], arch: Architecture) -> Dimensions:
        """Read them.

        Raises:
            CheckpointError: one is missing or no positive number, or the checkpoint is not block fp8.
        """
        settings = config.get("quantization_config")
        if not isinstance(settings, dict) or settings.get("quant_method") != "fp8":
            raise CheckpointError("config.json does not describe a block-fp8 checkpoint (quant_method: fp8)")
        if settings.get("weight_block_size") != [BLOCK, BLOCK]:
            raise CheckpointError(f"config.json: weight_block_size must be [{BLOCK}, {BLOCK}]")
        keys = ["num_attention_heads", "num_key_value_heads", "vocab_size"]
        keys += [arch.layers_key, arch.experts_key, arch.hidden_key, arch.intermediate_key]
        heads, kv_heads, vocabulary, layers, experts, hidden, intermediate = (_count(config, key) for key in keys)
        given = config if config.get("head_dim") is not None else {"head_dim": hidden // heads}
        head_dim = _count(given, "head_dim")
        tied = config.get("tie_word_embeddings") is True
        return cls(layers, experts, hidden, intermediate, vocabulary, heads, kv_heads, head_dim, tied)

    def kv_heads_per_gpu(self, gpus: int) -> int:
        """Split while there are enough of them, else one on each."""
        return -(-self.kv_heads // gpus)


@dataclass(frozen=True)
class Tensors:
    """Tensors of one kind.

    Attributes:
        name: with `{layer}` and `{expert}` where numbers stand.
        shape: of one of them.
        count: how many there are in the checkpoint.
        parameters: the model's parameters that one of them holds; 0 for scales and shapes.
        split: what tensor parallelism does with them.
    """

    name: str
    component: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    parameters: int
    split: Split

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype] * self.count

    @property
    def in_layer(self) -> bool:
        return "{layer}" in self.name


Forms = dict[Form, list[Tensors]]


@dataclass(frozen=True)
class Component:
    """What one of the model card's components amounts to; dtypes by size, the largest part first."""

    parameters: int
    nbytes: int
    dtypes: tuple[str, ...]


def attention_shapes(dims: Dimensions, arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Attention's matrices [out, in], in the table's order q, k, v, o, and the norms it depends on, by local name.

    The norms of queries and keys run over all heads at once (`qk_norm_type: per_layer`).
    """
    query, key = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    matrices = ((query, dims.hidden), (key, dims.hidden), (key, dims.hidden), (dims.hidden, query))
    shapes: dict[str, tuple[int, ...]] = {
        f"{linear}.weight": shape for linear, shape in zip(arch.attention, matrices, strict=True)
    }
    for norm in arch.attention_inputs:
        rows = query if "q_norm" in norm else key if "k_norm" in norm else dims.hidden
        shapes[norm] = (rows,)
    return shapes


def tensors_of(
    dims: Dimensions, arch: Architecture, form: Form, group_size: int = 128, kv_scales: bool = True
) -> list[Tensors]:
    """All tensors of the source, or of a stage's output.

    Raises:
        CheckpointError: the experts' inputs can't be cut into groups.
    """
    result = []
    for weight in _parameters(dims, arch):
        if weight.dtype != FP8 or form == "source":
            result.append(weight)
            if weight.dtype == FP8:
                result.append(_part(weight, "_scale_inv", "F32", _blocks(weight.shape)))
        elif weight.component == "experts" and form in ("awq", "hybrid"):
            rows, columns = weight.shape
            if columns % group_size:
                raise CheckpointError(
                    f"config.json makes {weight.name} {columns} input channels wide, not a multiple of"
                    f" awq.group_size = {group_size}"
                )
            packed = _part(weight, "_packed", "I32", (rows, columns // PACK), weight.parameters)
            result += [packed, _part(weight, "_scale", "BF16", (rows, columns // group_size))]
            result.append(_part(weight, "_shape", "I64", (2,)))
        elif weight.component == "attention" and form == "hybrid":
            result += [weight, _part(weight, "_scale", "F32", _blocks(weight.shape))]
        else:
            result.append(_part(weight, "", "BF16", weight.shape, weight.parameters))
    if kv_scales and form in ("awq", "hybrid"):
        prefix = arch.layer + arch.attention[0].rpartition(".")[0]
        for scale in ("k_scale", "v_scale"):
            result.append(Tensors(f"{prefix}.{scale}", "kv_scales", "F32", (1,), dims.layers, 0, "none"))
    return result


def components(tensors: Iterable[Tensors]) -> dict[str, Component]:
    """Sums by component; all of COMPONENTS, also where there is nothing."""
    listed = list(tensors)
    result = {}
    for component in COMPONENTS:
        own = [tensor for tensor in listed if tensor.component == component]
        dtypes: dict[str, int] = {}
        for tensor in own:
            dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.nbytes
        parameters = sum(tensor.parameters * tensor.count for tensor in own)
        ordered = tuple(sorted(dtypes, key=lambda dtype: -dtypes[dtype]))
        result[component] = Component(parameters, sum(tensor.nbytes for tensor in own), ordered)
    return result


def disk_bytes(tensors: Iterable[Tensors]) -> int:
    """Disk that a checkpoint takes: its tensors and, rounded up, what the headers and the index say of them."""
    return sum(tensor.nbytes + ENTRY_BYTES * tensor.count for tensor in tensors)


def layer_bytes(tensors: Iterable[Tensors], dims: Dimensions) -> int:
    """Tensors of one decoder layer; all layers are alike."""
    return sum(tensor.nbytes for tensor in tensors if tensor.in_layer) // dims.layers


def outside_bytes(tensors: Iterable[Tensors]) -> int:
    """Tensors outside the decoder layers."""
    return sum(tensor.nbytes for tensor in tensors if not tensor.in_layer)


def _parameters(dims: Dimensions, arch: Architecture) -> Iterator[Tensors]:
    """The tensors that hold parameters, as in the source: matrices of decoder layers in fp8, router in fp32."""

    def tensors(name: str, dtype: str, shape: tuple[int, ...], count: int, split: Split = "none") -> Tensors:
        component = arch.component(name.format(layer=0, expert=0))
        return Tensors(name, component, dtype, shape, count, math.prod(shape), split)

    yield tensors(arch.embedding, "BF16", (dims.vocabulary, dims.hidden), 1, "tensor parallel")
    if not dims.tied:
        yield tensors(arch.head, "BF16", (dims.vocabulary, dims.hidden), 1, "tensor parallel")
    yield tensors(arch.final_norm, "BF16", (dims.hidden,), 1)
    _, key, value, _ = arch.attention
    for local, shape in attention_shapes(dims, arch).items():
        if len(shape) == 1:
            yield tensors(arch.layer + local, "BF16", shape, dims.layers)
        else:
            per_kv_head = local.removesuffix(".weight") in (key, value)
            yield tensors(arch.layer + local, FP8, shape, dims.layers, "kv heads" if per_kv_head else "tensor parallel")
    yield tensors(arch.layer + arch.smooth_norm, "BF16", (dims.hidden,), dims.layers)
    yield tensors(arch.layer + arch.router, "F32", (dims.experts, dims.hidden), dims.layers)
    if arch.router_bias:
        yield tensors(arch.layer + arch.router_bias, "F32", (dims.experts,), dims.layers)
    wide, narrow = (dims.intermediate, dims.hidden), (dims.hidden, dims.intermediate)
    for linear, shape in ((arch.gate, wide), (arch.up, wide), (arch.down, narrow)):
        name = f"{arch.layer}{arch.expert}{linear}.weight"
        yield tensors(name, FP8, shape, dims.layers * dims.experts, "tensor parallel")


def _part(weight: Tensors, suffix: str, dtype: str, shape: tuple[int, ...], parameters: int = 0) -> Tensors:
    """What a weight becomes, or is accompanied by."""
    return Tensors(weight.name + suffix, weight.component, dtype, shape, weight.count, parameters, weight.split)


def _blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // BLOCK) for size in shape)


def _count(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise CheckpointError(f"config.json: {key} is {shown(value)} instead of a number from 1 to {LARGEST}")
    return value
