"""How the result fits on GPUs, and why it would not."""

from __future__ import annotations

from typing import Any

from mmq.families.sizes import Dimensions, Form, Forms, components
from mmq.families.table import MTP
from mmq.serve.memory import CACHE_BYTES, Gpus, attention_in_blocks, parallel_problems, serving
from mmq.text import bytes_text, gib_text

# What is worth serving: the finished checkpoint with either cache, and the awq stage's output to compare with.
SERVED: tuple[tuple[Form, str], ...] = (("hybrid", "bf16"), ("hybrid", "fp8"), ("awq", "bf16"))


def fit_on(
    dims: Dimensions,
    forms: Forms,
    gpus: Gpus,
    utilization: float,
    reserve: int,
    config: dict[str, Any],
) -> dict[str, Any]:
    """How the result fits, and why it would not."""
    rows: list[dict[str, Any]] = []
    refused = parallel_problems(dims, gpus.count, attention_in_blocks(forms["hybrid"]))
    problems = [f"vLLM would refuse: {problem}" for problem in refused]
    for form, cache in SERVED:
        fit = serving(forms[form], dims, gpus, utilization, reserve, CACHE_BYTES[cache])
        rows.append(
            {
                "checkpoint": form,
                "cache": cache,
                "weights_per_gpu": fit.weights,
                "cache_per_gpu": max(0, fit.cache),
                "bytes_per_token_per_gpu": fit.token,
                "tokens": fit.tokens,
            }
        )
        if fit.cache <= 0:
            problem = f"{form}: nothing is left for a KV cache, {gib_text(-fit.cache)} are missing on each GPU"
            if problem not in problems:
                problems.append(problem)
    longest = config.get("max_position_embeddings")
    if type(longest) is int:
        short = [f"{row['checkpoint']} with {row['cache']}" for row in rows if 0 < row["tokens"] < longest]
        if short:
            problems.append(
                f"the cache holds less than the model's {longest:,} positions ({', '.join(short)}): vLLM starts only"
                " with a --max-model-len that fits"
            )
    return {
        "gpus": gpus.count,
        "gpu_memory": gpus.memory,
        "utilization": utilization,
        "reserve": reserve,
        "rows": rows,
        "assumptions": _assumptions(rows, dims, forms, gpus, utilization, reserve),
        "warnings": problems,
    }


def _assumptions(
    rows: list[dict[str, Any]], dims: Dimensions, forms: Forms, gpus: Gpus, utilization: float, reserve: int
) -> list[str]:
    hybrid, fp8, awq = rows
    freed = awq["weights_per_gpu"] - hybrid["weights_per_gpu"]
    heads = dims.kv_heads_per_gpu(gpus.count)
    token = f"one latent of {dims.latent}" if dims.latent else f"2 x {heads} KV heads x {dims.head_dim}"
    shared = (
        "The latent of all heads is cached on each GPU."
        if dims.latent
        else f"Of {dims.kv_heads} KV heads each GPU holds {heads}."
    )
    beside = components(forms["hybrid"])
    rare = []
    if beside["vision tower"].nbytes:
        rare.append("The vision tower is counted whole on each GPU.")
    if extra := beside[MTP].nbytes:
        rare.append(
            f"Multi-token prediction, {bytes_text(extra)}, is loaded for speculative decoding alone: not counted."
        )
    chosen_by = (
        f" + {dims.sparse_layers} layers x one index key of {dims.sparse_key} x 2 bytes" if dims.sparse_layers else ""
    )
    times = hybrid["bytes_per_token_per_gpu"] / fp8["bytes_per_token_per_gpu"]
    larger = f" Against awq/, where what is fp8 here is bf16, hybrid/ frees another {gib_text(freed)} on each GPU."
    return [
        f"left for the cache = {gib_text(gpus.memory)} x {utilization} (gpu_memory_utilization) - weights -"
        f" {gib_text(reserve)} (reserve)",
        f"bytes a token and GPU = {dims.cached_layers} layers x {token} x 2 bytes (bf16) or 1 (fp8){chosen_by}",
        "Tensor parallelism splits experts, attention, embeddings and head over the GPUs; norms, router, biases and KV"
        f" scales are on each. {shared}",
        *rare,
        "The reserve is for activations, CUDA graphs, NCCL and the memory that CUDA does not show. Its default is what"
        " MiniMax-M2.5's model card implies: 370,000 tokens of fp8 cache on 4 x 48 GB (here 366,482).",
        f"For one checkpoint an fp8 cache holds {times:.3g} times the tokens of a bf16 cache.{larger if freed else ''}"
        " The card's 160,000 tokens of bf16 cache (here 172,492 with awq/) come from a deployment that it doesn't"
        " describe.",
    ]
