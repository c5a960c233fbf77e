"""How much KV cache a checkpoint leaves, and over how many GPUs it can be served: from config.json alone.

KV cache under tensor parallelism, per GPU:

    cache  = memory * utilization - weights - reserve
    token  = layers * 2 * KV heads on the GPU * head_dim * bytes of the cache's dtype
             or, where one latent stands for all heads, layers * its width * bytes, on each GPU
             and, in layers that choose their tokens by keys of their own, layers * their width * 2: bf16 on each GPU
    tokens = cache / token

`utilization` is vLLM's gpu_memory_utilization. `reserve` is all else that vLLM counts against it: activations at their
peak, CUDA graphs, NCCL's buffers, and the part of the nominal memory that CUDA doesn't show. Experts, attention,
embeddings and head are split over the GPUs; norms, router, biases and KV scales are on each, and so is a vision tower,
of which vLLM splits most: that much is left over. What predicts further tokens is loaded for speculative decoding alone
(vLLM 0.32: deepseek_v2.py, glm4_moe.py, qwen3_next.py, qwen3_5.py, minimax_m3/), and not counted. KV heads, and with
them k_proj and v_proj, are split while there are enough of them; with more GPUs than KV heads each GPU holds one.

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

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from mmq.errors import RecipeError
from mmq.families.sizes import BLOCK, FP8, GIB, Dimensions, Tensors
from mmq.families.table import MTP
from mmq.recipe import parse_size

CACHE_BYTES = {"bf16": 2, "fp8": 1}


GPUS = re.compile(r"(\d{1,6})\s*x\s*(\d+(?:\.\d+)?\s*[kmg]i?b)", re.IGNORECASE)
DEFAULT_UTILIZATION = 0.9


# See the module's text: what the one published measurement implies.
DEFAULT_RESERVE = 4 * GIB


@dataclass(frozen=True)
class Gpus:
    """Equal GPUs; `memory` is bytes of each."""

    count: int
    memory: int

    @classmethod
    def parse(cls, text: str) -> Gpus:
        """'4x48GiB' -> 4 GPUs of 48 GiB. Raises RecipeError."""
        match = GPUS.fullmatch(text.strip())
        try:
            found = cls(int(match[1]), parse_size(match[2])) if match else None
        except (ValueError, OverflowError):
            found = None
        if found is None or found.count < 1 or found.memory < 1:
            raise RecipeError(f"--gpus is {text!r}; it must be a number and the memory of each, such as 4x48GiB")
        return found


@dataclass(frozen=True)
class Serving:
    """One GPU's memory, in bytes, and the tokens that all of them can cache; `cache` is negative where nothing fits."""

    weights: int
    cache: int
    token: int

    @property
    def tokens(self) -> int:
        return max(0, self.cache) // self.token


def kv_bytes_per_token(dims: Dimensions, gpus: int, itemsize: int) -> int:
    """What the caches of all layers hold of one token, on one of the GPUs."""
    own = dims.latent or 2 * dims.kv_heads_per_gpu(gpus) * dims.head_dim
    # vLLM 0.32: `indexer_kv_dtype` is bf16 unless the command line says otherwise.
    return dims.cached_layers * own * itemsize + dims.sparse_layers * dims.sparse_key * CACHE_BYTES["bf16"]


def weights_per_gpu(tensors: Iterable[Tensors], dims: Dimensions, gpus: int) -> int:
    """Bytes of weights on one of the GPUs under tensor parallelism, as far as they are loaded."""
    total = 0
    for tensor in tensors:
        if tensor.component == MTP:
            continue
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


def serve_command(model: str, gpus: int, whole_experts: bool = False, positions: int | None = None) -> str:
    """vLLM's command for a checkpoint: a folder, or a hub id.

    Args:
        whole_experts: each GPU holds whole experts instead of a part of each.
        positions: the longest sequence, where the cache holds less than the model's own.
    """
    options = ["--tensor-parallel-size", str(gpus), "--gpu-memory-utilization", str(DEFAULT_UTILIZATION)]
    options += ["--enable-expert-parallel"] if whole_experts else []
    options += ["--max-model-len", str(positions)] if positions else []
    return shlex.join(["vllm", "serve", model, *options])


def wants_whole_experts(dims: Dimensions, gpus: int) -> bool:
    """Whether an expert can't be cut into so many parts, but the experts can be shared out whole."""
    cut = dims.intermediate % gpus == 0 and dims.intermediate // gpus % BLOCK == 0
    return not cut and dims.experts % gpus == 0 and dims.intermediate % BLOCK == 0


def attention_in_blocks(tensors: Iterable[Tensors]) -> bool:
    """Whether any of a checkpoint's attention is fp8 in blocks, and not by rows or bf16."""
    attention = [tensor for tensor in tensors if tensor.component == "attention"]
    rows = {f"{tensor.name}_scale": tensor.shape[0] for tensor in attention if tensor.dtype == FP8}
    return any(tensor.shape[0] < rows.get(tensor.name, 0) for tensor in attention)


def parallel_problems(dims: Dimensions, gpus: int, blocks: bool = True) -> list[str]:
    """Why vLLM would not split the hybrid checkpoint over so many GPUs, a sentence each.

    vLLM shares out whole heads, and its int4 and block-fp8 kernels take multiples of 128 channels: the hidden size,
    which isn't split, each GPU's part of an expert, and each GPU's rows of q, k and v.

    Args:
        blocks: attention is fp8 in blocks.
    """
    problems = []
    if dims.hidden % BLOCK:
        problems.append(f"the hidden size {dims.hidden} is not a multiple of {BLOCK}")
    if dims.intermediate % gpus or dims.intermediate // gpus % BLOCK:
        part = f"{dims.intermediate / gpus:.1f}".removesuffix(".0")
        way_out = (
            f"; --enable-expert-parallel gives each GPU {dims.experts // gpus} whole experts instead, of the same size"
            if wants_whole_experts(dims, gpus)
            else ""
        )
        problems.append(
            f"each of {gpus} GPUs gets {part} of an expert's {dims.intermediate} intermediate channels, not a multiple"
            f" of {BLOCK}{way_out}"
        )
    rows = dims.size("query") // dims.heads
    if dims.heads % gpus:
        problems.append(f"{dims.heads} query heads can't be shared out to {gpus} GPUs")
    elif blocks and dims.heads // gpus * rows % BLOCK:
        problems.append(f"each of {gpus} GPUs gets {dims.heads // gpus * rows} rows of q, not a multiple of {BLOCK}")
    if dims.latent:
        return problems
    if max(dims.kv_heads, gpus) % min(dims.kv_heads, gpus):
        problems.append(f"{dims.kv_heads} KV heads can't be shared out to {gpus} GPUs")
    elif blocks and dims.kv_heads_per_gpu(gpus) * dims.head_dim % BLOCK:
        rows = dims.kv_heads_per_gpu(gpus) * dims.head_dim
        problems.append(f"each of {gpus} GPUs gets {rows} rows of k and v, not a multiple of {BLOCK}")
    return problems
