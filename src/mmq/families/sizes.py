"""How large a model is before, between and after the stages, from config.json alone.

The tensors of a checkpoint are written down as names, dtypes, shapes and counts; everything else is sums over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mmq.errors import CheckpointError, shown
from mmq.families.table import MTP, SIZES, Architecture, Formula, Size, Weight, value_at

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
COMPONENTS = (
    "experts", "shared experts", "attention", "dense layers", MTP, "vision tower", "embeddings", "head", "router",
    "norms and biases", "kv_scales",
)  # fmt: skip
# Of these, what only some families have.
RARE_COMPONENTS = ("shared experts", "dense layers", MTP, "vision tower")


@dataclass(frozen=True)
class Storage:
    """How a source stores the matrices of its decoder layers.

    Attributes:
        dtype: of the matrices themselves.
        scale_suffix: what their scales are called beyond the weight's own name; None where there are none.
        scale_dtype: of the scales, as far as a config.json tells.
        block: rows and columns that share a scale; 0 stands for all of them.
    """

    dtype: str = FP8
    scale_suffix: str | None = "_scale_inv"
    scale_dtype: str = "F32"
    block: tuple[int, int] = (BLOCK, BLOCK)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """[out, in] of a matrix -> that of its scales."""
        rows, columns = (-(-size // (share or size)) for size, share in zip(shape, self.block, strict=True))
        return rows, columns


# The kind that MiniMax, DeepSeek and Qwen publish.
BLOCK_FP8 = Storage()


@dataclass(frozen=True)
class Dimensions:
    """The sizes in a config.json.

    Attributes:
        linear_layers: how many have linear attention, and no KV cache.
        latent: numbers of a token that a KV cache holds where it is one latent for all heads; 0 where it isn't.
        words: what the table's own words for sizes amount to.
        sparse_layers: how many choose the tokens that they attend to.
        sparse_key: numbers of a token that a cache holds there to choose by, beside keys and values.
    """

    layers: int
    experts: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False
    dense: int = 0
    dense_layers: int = 0
    linear_layers: int = 0
    latent: int = 0
    words: Mapping[Size, int] = field(default_factory=dict)
    sparse_layers: int = 0
    sparse_key: int = 0

    @classmethod
    def of(cls, config: dict[str, Any], arch: Architecture) -> Dimensions:
        """Read them.

        Raises:
            CheckpointError: one is missing or no positive number, or no layer has experts.
        """
        config = arch.settings(config)
        keys = ["num_attention_heads", "num_key_value_heads", "vocab_size"]
        keys += [arch.layers_key, arch.experts_key, arch.hidden_key, arch.intermediate_key]
        heads, kv_heads, vocabulary, layers, experts, hidden, intermediate = (_count(config, key) for key in keys)
        key = arch.head_dim_key
        head_dim = _count(config if config.get(key) is not None else {key: hidden // heads}, key)
        tied = config.get("tie_word_embeddings") is True
        dense = _count(config, arch.dense_key) if arch.dense_at else 0
        if len(arch.dense_at) >= layers:
            raise CheckpointError("config.json: no layer has experts")
        attention = (*arch.attention_weights, *arch.linear_weights, *(arch.sparse_weights if arch.sparse_at else ()))
        given = (*attention, *(arch.shared.weights if arch.shared else ()))
        used = {word for weight in (*given, *arch.extra_tensors()) for word in weight.shape}
        words = {word: _amount(config, arch.sizes[word]) for word in sorted(used & arch.sizes.keys())}
        latent = _amount(config, arch.sizes[arch.latent]) if arch.latent else 0
        sparse_key = words[arch.sparse_key] if arch.sparse_key and arch.sparse_at else 0
        return cls(
            layers, experts, hidden, intermediate, vocabulary, heads, kv_heads, head_dim, tied, dense,
            len(arch.dense_at), len(arch.linear_at), latent, words, len(arch.sparse_at),
            sparse_key,
        )  # fmt: skip

    @property
    def expert_layers(self) -> int:
        """Decoder layers that have experts."""
        return self.layers - self.dense_layers

    def shape(self, weight: Weight) -> tuple[int, ...]:
        """A weight's shape in numbers."""
        return tuple(map(self.size, weight.shape))

    def size(self, word: Size) -> int:
        """A size in words as a number."""
        if word in self.words:
            return self.words[word]
        known = (
            self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.head_dim, self.experts,
            self.intermediate, self.dense, self.vocabulary, 2 * self.hidden, 1,
        )  # fmt: skip
        return dict(zip(SIZES, known, strict=True))[word]

    @property
    def cached_layers(self) -> int:
        """Decoder layers that have a KV cache."""
        return self.layers - self.linear_layers

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


def tensors_of(
    dims: Dimensions,
    arch: Architecture,
    form: Form,
    group_size: int = 128,
    kv_scales: bool = True,
    storage: Storage = BLOCK_FP8,
    kept_shared: bool = False,
    fp8_attention: bool = False,
    plain: Callable[[str], bool] = lambda _name: False,
) -> list[Tensors]:
    """All tensors of the source, or of a stage's output.

    Args:
        storage: of the source.
        kept_shared: a shared expert that reads the smoothed norm keeps its fp8 bytes, and the norm is not smoothed.
        fp8_attention: of a source without scales, attention is rounded to block fp8.
        plain: which weights the source leaves in bf16, whatever its storage.

    Raises:
        CheckpointError: the experts' inputs can't be cut into groups.
    """
    result = []
    for weight, stored in _parameters(dims, arch, plain):
        # Of equal matrices of several layers, those that the source stores in its format, and those that it does not.
        own = replace(weight, count=stored)
        rest = [replace(weight, count=weight.count - stored)] if stored < weight.count else []
        if weight.component == "router":
            result.append(
                replace(weight, dtype=arch.router_served if form in ("awq", "hybrid") else arch.router_stored)
            )
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
        elif not stored:
            result.append(weight)
        elif form == "source":
            result += [*_stored(own, storage, storage.scale_suffix), *rest]
        elif form == "hybrid" and storage.scale_suffix and (kept_shared or not _is_scaled(arch, weight)):
            result += [*_stored(own, storage, "_scale"), *rest]
        elif form == "hybrid" and fp8_attention and weight.component == "attention":
            result += _stored(own, BLOCK_FP8, "_scale")
        else:
            result.append(weight)
    if kv_scales and arch.has_kv_cache_scales and form in ("awq", "hybrid"):
        prefix = arch.layer + arch.attention_module
        for scale in ("k_scale", "v_scale"):
            result.append(Tensors(f"{prefix}.{scale}", "kv_scales", "F32", (1,), dims.cached_layers, 0, "none"))
    return result


def _is_scaled(arch: Architecture, weight: Tensors) -> bool:
    return weight.in_layer and arch.is_scaled(weight.name)


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
    """Tensors of one decoder layer with experts, which are all alike; where there are two kinds of attention, a little
    more than any has: both."""
    own = (tensor for tensor in tensors if tensor.in_layer and tensor.component != "dense layers")
    return sum(tensor.nbytes // tensor.count * (dims.experts if "{expert}" in tensor.name else 1) for tensor in own)


def outside_bytes(tensors: Iterable[Tensors]) -> int:
    """Tensors outside the decoder layers."""
    return sum(tensor.nbytes for tensor in tensors if not tensor.in_layer)


def _parameters(dims: Dimensions, arch: Architecture, plain: Callable[[str], bool]) -> Iterator[tuple[Tensors, int]]:
    """The tensors that hold parameters, dequantized, and how many of each are matrices that the source stores in its
    format."""

    def tensors(name: str, shape: tuple[int, ...], count: int, split: Split = "none", dtype: str = "BF16") -> Tensors:
        component = arch.component(name.format(layer=0, expert=0))
        return Tensors(name, component, dtype, shape, count, math.prod(shape), split)

    def stored(weight: Weight, name: str) -> bool:
        """Whether it is a matrix in the source's format; all experts of a layer are alike."""
        return weight.is_matrix and not plain(name.format(expert=0))

    def of_layers(weight: Weight, layers: Iterable[int]) -> tuple[Tensors, int]:
        split: Split = "kv heads" if "key" in weight.shape else "tensor parallel"
        whole = len(weight.shape) == 1 or weight.whole
        each = dims.experts if "{expert}" in weight.name else 1
        own = [stored(weight, arch.layer_prefix(layer) + weight.name) for layer in layers]
        name, shape = arch.layer + weight.name, dims.shape(weight)
        return tensors(name, shape, len(own) * each, "none" if whole else split), sum(own) * each

    yield tensors(arch.embedding, (dims.vocabulary, dims.hidden), 1, "tensor parallel"), 0
    if not dims.tied:
        yield tensors(arch.head, (dims.vocabulary, dims.hidden), 1, "tensor parallel"), 0
    yield tensors(arch.final_norm, (dims.hidden,), 1), 0
    attention: dict[Weight, list[int]] = {}
    for layer in range(dims.layers):
        for weight in arch.attention_of(layer):
            attention.setdefault(weight, []).append(layer)
    for weight, layers in attention.items():
        yield of_layers(weight, layers)
    yield tensors(arch.layer + arch.smooth_norm, (dims.hidden,), dims.layers), 0
    yield tensors(arch.layer + arch.router, (dims.experts, dims.hidden), dims.expert_layers), 0
    if arch.router_bias:
        yield tensors(arch.layer + arch.router_bias, (dims.experts,), dims.expert_layers, dtype="F32"), 0
    with_experts = [layer for layer in range(dims.layers) if arch.has_experts(layer)]
    if arch.shared:
        for weight in (*arch.shared.weights, *([arch.shared_gate] if arch.shared_gate else [])):
            yield of_layers(weight, with_experts)
    if arch.dense and dims.dense_layers:
        for weight in arch.dense.weights:
            yield of_layers(weight, sorted(arch.dense_at))
    for weight in arch.experts.weights:
        yield of_layers(weight, with_experts)
    for weight in arch.extra_tensors():
        count = dims.experts if "{expert}" in weight.name else 1
        one = tensors(weight.name, dims.shape(weight), count, dtype=weight.dtypes[0])
        yield one, count * stored(weight, weight.name)


def _stored(weight: Tensors, storage: Storage, suffix: str | None) -> list[Tensors]:
    """A matrix as it is stored, and its scales under that suffix."""
    matrix = replace(weight, dtype=storage.dtype)
    if suffix is None:
        return [matrix]
    return [matrix, _part(weight, suffix, storage.scale_dtype, storage.scale_shape(weight.shape))]


def _part(weight: Tensors, suffix: str, dtype: str, shape: tuple[int, ...], parameters: int = 0) -> Tensors:
    """What a weight becomes, or is accompanied by."""
    return Tensors(weight.name + suffix, weight.component, dtype, shape, weight.count, parameters, weight.split)


def _amount(config: Mapping[str, Any], formula: Formula) -> int:
    """A formula in numbers. Raises CheckpointError as `_count`."""
    products = ([term if isinstance(term, int) else _count(config, term) for term in product] for product in formula)
    return sum(map(math.prod, products))


def _count(config: Mapping[str, Any], key: str) -> int:
    value = value_at(config, key)
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise CheckpointError(f"config.json: {key} is {shown(value)} instead of a number from 1 to {LARGEST}")
    return value
