"""How large a model is before, between and after the stages, and how much KV cache it leaves: from config.json alone.

The tensors of a checkpoint are written down as names, dtypes, shapes and counts; everything else is sums over them. No
file is read but the calibration samples whose lines are counted, and torch isn't needed.

KV cache under tensor parallelism, per GPU:

    cache  = memory * utilization - weights - reserve
    token  = layers * 2 * KV heads on the GPU * head_dim * bytes of the cache's dtype
    tokens = cache / token

`utilization` is vLLM's gpu_memory_utilization. `reserve` is all else that vLLM counts against it: activations at their
peak, CUDA graphs, NCCL's buffers, and the part of the nominal memory that CUDA doesn't show. Experts, attention,
embeddings and head are split over the GPUs; norms, router, biases and KV scales are on each. KV heads, and with them
k_proj and v_proj, are split while there are enough of them; with more GPUs than KV heads each GPU holds one.

Beside MiniMax-M2.5's model card (4 GPUs of 48 GiB, about 160,000 tokens with bf16 and 370,000 with fp8), at the default
utilization of 0.9:

    370,000 fp8 tokens imply a reserve of 3.9 GiB. DEFAULT_RESERVE is that, rounded up: fp8 agrees by construction
    hybrid/, fp8 cache     366,482 tokens; the card's 370,000
    hybrid/, bf16 cache    183,241 tokens: the same weights and half the bytes a token are twice the tokens, no more
    awq/,    bf16 cache    172,492 tokens; the card's 160,000? Attention in bf16 takes another 0.64 GiB of each GPU

So the card's "more than doubled" (2.31 times) needs more than the cache's dtype. Attention that was still bf16 in the
deployment it compares with makes it 2.12 times. The rest, 0.74 GiB a GPU, isn't explained here: the card doesn't say
what it measured. int4 of another format, another version of vLLM or other settings would do it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mmq.architectures import Architecture
from mmq.errors import CheckpointError, shown
from mmq.recipe import FileSamples, Recipe

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
CACHE_BYTES = {"bf16": 2, "fp8": 1}
DEFAULT_UTILIZATION = 0.9
# See the module's text: what the one published measurement implies.
DEFAULT_RESERVE = 4 * GIB


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


@dataclass(frozen=True)
class Component:
    """What one of the model card's components amounts to; dtypes by size, the largest part first."""

    parameters: int
    nbytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class AwqMemory:
    """Peaks of the awq stage in bytes, beyond the process itself."""

    host: int
    device: int


@dataclass(frozen=True)
class Gpus:
    """Equal GPUs; `memory` is bytes of each."""

    count: int
    memory: int


@dataclass(frozen=True)
class Serving:
    """One GPU's memory, in bytes, and the tokens that all of them can cache; `cache` is negative where nothing fits."""

    weights: int
    cache: int
    token: int

    @property
    def tokens(self) -> int:
        return max(0, self.cache) // self.token


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


def most_tokens(recipe: Recipe) -> int:
    """Upper bound of the calibration tokens; lines are counted where the recipe names no number of samples."""
    settings = recipe.awq.calibration
    samples = 0
    for source in settings.files:
        if source.samples is not None:
            samples += source.samples
        elif isinstance(source, FileSamples) and recipe.path(source.path).is_file():
            with open(recipe.path(source.path), "rb") as file:
                samples += sum(1 for line in file if line.strip())
    return samples * settings.sequence_length


def awq_memory(layer: int, shard: int, hidden_states: int, budget: int, gpu: bool) -> AwqMemory:
    """Peaks of the awq stage.

    Args:
        layer: bytes of the widest decoder layer in bf16.
        shard: bytes of the largest output shard.
        hidden_states: elements, calibration tokens times hidden size.
        budget: bytes that the search may work with; small models stay far below it.
        gpu: the search runs on a GPU, not on the host.
    """
    # bf16 hidden states, residual stream and block input; fp32 reference and output; the packed layer being written.
    working = layer + shard + 14 * hidden_states
    searching = min(budget, 4 * (layer + hidden_states))
    return AwqMemory(working, working + searching) if gpu else AwqMemory(working + searching, 0)


def kv_bytes_per_token(dims: Dimensions, gpus: int, itemsize: int) -> int:
    """Keys and values of one token in all layers, on one of the GPUs."""
    return dims.layers * 2 * dims.kv_heads_per_gpu(gpus) * dims.head_dim * itemsize


def weights_per_gpu(tensors: Iterable[Tensors], dims: Dimensions, gpus: int) -> int:
    """Bytes of weights on one of the GPUs under tensor parallelism."""
    total = 0
    for tensor in tensors:
        if tensor.split == "none":
            total += tensor.nbytes
        elif tensor.split == "kv heads":
            total += -(-tensor.nbytes * dims.kv_heads_per_gpu(gpus) // dims.kv_heads)
        else:
            total += -(-tensor.nbytes // gpus)
    return total


def serving(
    tensors: Iterable[Tensors], dims: Dimensions, gpus: Gpus, utilization: float, reserve: int, itemsize: int
) -> Serving:
    """The module's formula for one checkpoint and one dtype of the cache, `itemsize` bytes an element."""
    weights = weights_per_gpu(tensors, dims, gpus.count)
    cache = int(gpus.memory * utilization) - weights - reserve
    return Serving(weights, cache, kv_bytes_per_token(dims, gpus.count, itemsize))


def parallel_problems(dims: Dimensions, gpus: int) -> list[str]:
    """Why vLLM would not split the hybrid checkpoint over so many GPUs, a sentence each.

    vLLM shares out whole heads, and its int4 and block-fp8 kernels take multiples of 128 channels: the hidden size,
    which isn't split, each GPU's part of an expert, and each GPU's rows of q, k and v.
    """
    problems = []
    if dims.hidden % BLOCK:
        problems.append(f"the hidden size {dims.hidden} is not a multiple of {BLOCK}")
    if dims.intermediate % gpus or dims.intermediate // gpus % BLOCK:
        part = f"{dims.intermediate / gpus:.1f}".removesuffix(".0")
        whole = dims.experts % gpus == 0 and dims.intermediate % BLOCK == 0
        way_out = (
            f"; --enable-expert-parallel gives each GPU {dims.experts // gpus} whole experts instead, of the same size"
            if whole
            else ""
        )
        problems.append(
            f"each of {gpus} GPUs gets {part} of an expert's {dims.intermediate} intermediate channels, not a multiple"
            f" of {BLOCK}{way_out}"
        )
    if dims.heads % gpus:
        problems.append(f"{dims.heads} query heads can't be shared out to {gpus} GPUs")
    elif dims.heads // gpus * dims.head_dim % BLOCK:
        problems.append(
            f"each of {gpus} GPUs gets {dims.heads // gpus * dims.head_dim} rows of q, not a multiple of {BLOCK}"
        )
    if max(dims.kv_heads, gpus) % min(dims.kv_heads, gpus):
        problems.append(f"{dims.kv_heads} KV heads can't be shared out to {gpus} GPUs")
    elif dims.kv_heads_per_gpu(gpus) * dims.head_dim % BLOCK:
        rows = dims.kv_heads_per_gpu(gpus) * dims.head_dim
        problems.append(f"each of {gpus} GPUs gets {rows} rows of k and v, not a multiple of {BLOCK}")
    return problems


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
