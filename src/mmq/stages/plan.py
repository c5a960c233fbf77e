"""What a run will write and need, from the recipe and the source's config.json alone."""

from __future__ import annotations

import re
from typing import Any

from mmq.errors import RecipeError
from mmq.families.registry import architecture_of
from mmq.families.rotary import rope_parameters
from mmq.families.sizes import (
    RARE_COMPONENTS,
    Component,
    Dimensions,
    Form,
    Forms,
    components,
    disk_bytes,
    layer_bytes,
    outside_bytes,
)
from mmq.families.table import Architecture
from mmq.quantize.memory import Peaks, awq_memory, fisher_memory, fisher_state
from mmq.quantize.routed_experts import DEFAULT_BUDGET
from mmq.quantize.scaling import rank_costs
from mmq.recipe import Recipe
from mmq.serve.fit import fit_on
from mmq.serve.memory import DEFAULT_RESERVE, DEFAULT_UTILIZATION, Gpus
from mmq.serve.outputs import output_tensors
from mmq.source.hub import source_config
from mmq.source.samples import most_fisher_tokens, most_tokens
from mmq.stages.base import BASE_MEMORY, free_disk

FORMS: tuple[Form, ...] = ("source", "bf16", "awq", "hybrid")


def make_plan(
    recipe: Recipe,
    gpus: Gpus | None = None,
    utilization: float = DEFAULT_UTILIZATION,
    reserve: int = DEFAULT_RESERVE,
) -> dict[str, Any]:
    """Parameters and bytes before and after, disk, memory, and on `gpus` the KV cache, as JSON.

    Raises:
        MmqError: the source has no config.json that can be planned with.
    """
    config = source_config(recipe)
    arch = architecture_of(config)
    config = arch.settings(config)
    dims = Dimensions.of(config, arch)
    rope_parameters(config, arch)
    forms = {form: output_tensors(recipe, config, arch, form) for form in FORMS}
    value: dict[str, Any] = {
        "source": recipe.model.source,
        "components": _components(forms),
        "kv_cache": _kv_cache(recipe, arch, dims),
        "disk": _disk(recipe, dims, forms),
        "awq_memory": _awq_memory(recipe, arch, dims, forms, config),
    }
    if gpus is not None:
        value["ranks"] = _ranks(recipe, arch, dims, forms, gpus, config)
        value["serving"] = fit_on(dims, forms, gpus, utilization, reserve, config)
    return value


def _ranks(
    recipe: Recipe, arch: Architecture, dims: Dimensions, forms: Forms, gpus: Gpus, config: dict[str, Any]
) -> list[dict[str, Any]]:
    """What the awq stage takes of each of these GPUs, and how much faster it is than on one, by a model."""
    tokens, top_k, inner = most_tokens(recipe), int(config[arch.top_k_key]), int(config[arch.intermediate_key])
    budget = recipe.awq.memory_budget or DEFAULT_BUDGET["cuda"]
    rows = []
    alone = rank_costs(tokens, dims.hidden, inner, top_k, 1)
    for ranks in sorted({1, *(2**power for power in range(1, gpus.count.bit_length())), gpus.count}):
        if ranks > int(config[arch.experts_key]):
            continue
        memory = _peaks(recipe, dims, forms, budget, True, (top_k, inner), ranks)
        costs = rank_costs(tokens, dims.hidden, inner, top_k, ranks)
        rows.append(
            {
                "ranks": ranks,
                "device_memory": memory.device,
                "fits": memory.device <= gpus.memory,
                "sent_per_layer": costs.exchanged + costs.gathered,
                "times_faster": {link: round(alone.seconds[link] / own, 2) for link, own in costs.seconds.items()},
            }
        )
    return rows


def _kv_cache(recipe: Recipe, arch: Architecture, dims: Dimensions) -> dict[str, Any]:
    """How many layers get scales of an fp8 KV cache, and why others get none."""
    wanted = recipe.awq.kv_cache_scheme is not None
    scaled = dims.cached_layers if wanted and arch.has_kv_cache_scales else 0
    reasons = {arch.without_kv_scales(layer) for layer in (*arch.linear_at, *range(dims.layers)[:1])} - {None}
    return {"layers": dims.cached_layers, "with_scales": scaled, "without": sorted(map(str, reasons)) if wanted else []}


def _components(forms: Forms) -> list[dict[str, Any]]:
    """One entry a component, and their total."""

    def side(component: Component) -> dict[str, Any]:
        return {"dtypes": list(component.dtypes), "bytes": component.nbytes}

    before, after = components(forms["source"]), components(forms["hybrid"])
    entries = [
        {"component": name, "parameters": own.parameters, "before": side(own), "after": side(after[name])}
        for name, own in before.items()
        if own.parameters or name not in RARE_COMPONENTS
    ]
    total: dict[str, Any] = {"component": "total", "parameters": sum(own.parameters for own in before.values())}
    for place, parts in (("before", before), ("after", after)):
        total[place] = {"dtypes": [], "bytes": sum(part.nbytes for part in parts.values())}
    return [*entries, total]


def _disk(recipe: Recipe, dims: Dimensions, forms: Forms) -> dict[str, Any]:
    """What the stages write, and what is free where they do."""
    # The states after a layer and, until its journal entry is written, those after the layer before it.
    states = 2 * most_tokens(recipe) * dims.hidden * 2
    if tokens := most_fisher_tokens(recipe):
        states += fisher_state(dims.layers, tokens, dims.hidden)
    written = [] if recipe.awq.source == "fp8" else [("dequant", "bf16", disk_bytes(forms["bf16"]))]
    written += [
        ("awq", "awq", disk_bytes(forms["awq"])),
        ("awq", "state", states),
        ("restore", "hybrid", disk_bytes(forms["hybrid"])),
    ]
    return {
        "folders": [
            {"stage": stage, "folder": str(recipe.work_path / folder), "bytes": size} for stage, folder, size in written
        ],
        "total": sum(size for _, _, size in written),
        "free": free_disk(recipe.work_path),
    }


def _awq_memory(
    recipe: Recipe, arch: Architecture, dims: Dimensions, forms: Forms, config: dict[str, Any]
) -> list[dict[str, Any]]:
    """The awq stage's peaks, for each kind of device that the recipe may mean."""
    device = recipe.awq.device
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise RecipeError(f"awq.device is {device!r}; it must be auto, cpu, cuda or cuda:N")
    result, of_tokens = [], (int(config[arch.top_k_key]), int(config[arch.intermediate_key]))
    for kind in ("cpu", "cuda") if device == "auto" else (device.partition(":")[0],):
        budget = recipe.awq.memory_budget or DEFAULT_BUDGET[kind]
        memory = _peaks(recipe, dims, forms, budget, kind == "cuda", of_tokens)
        result.append({"device": kind, "host_memory": BASE_MEMORY + memory.host, "device_memory": memory.device})
    return result


def _peaks(
    recipe: Recipe,
    dims: Dimensions,
    forms: Forms,
    budget: int,
    gpu: bool,
    of_tokens: tuple[int, int],
    ranks: int = 1,
) -> Peaks:
    """The awq stage's peaks on each rank; `of_tokens` are the experts of a token, and an expert's width."""
    (top_k, inner), length = of_tokens, recipe.awq.calibration.sequence_length
    shard, layer = max(layer_bytes(forms["awq"], dims), outside_bytes(forms["awq"])), layer_bytes(forms["bf16"], dims)
    compensated, calibration = recipe.awq.rounding == "compensated", most_tokens(recipe)
    memory = awq_memory(layer, shard, calibration * dims.hidden, budget, gpu, compensated, ranks, top_k)
    if tokens := most_fisher_tokens(recipe):
        needed = fisher_memory(layer, calibration, tokens, length, dims.hidden, inner, top_k, dims.vocabulary, gpu)
        memory = memory.at_least(needed, gpu)
    return memory
