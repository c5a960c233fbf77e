"""mmq plan: sizes, disk, memory and KV cache, from the recipe and the source's config.json alone."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from mmq.cli.errors import handled
from mmq.cli.options import Json, RecipePath, Set, mode, quiet_libraries
from mmq.cli.output import Output, human_bytes, make_output
from mmq.errors import RecipeError
from mmq.families.registry import architecture_of
from mmq.families.sizes import (
    DTYPE_LABELS,
    GIB,
    Component,
    Dimensions,
    Form,
    Tensors,
    components,
    disk_bytes,
    layer_bytes,
    outside_bytes,
    tensors_of,
)
from mmq.quantize.memory import awq_memory
from mmq.recipe import Recipe, load, parse_size
from mmq.serve.memory import CACHE_BYTES, DEFAULT_RESERVE, DEFAULT_UTILIZATION, Gpus, parallel_problems, serving
from mmq.source.hub import is_hub_id, source_refused
from mmq.source.samples import most_tokens

Forms = dict[Form, list[Tensors]]

GPUS = re.compile(r"(\d{1,6})\s*x\s*(\d+(?:\.\d+)?\s*[kmg]i?b)", re.IGNORECASE)
FORMS: tuple[Form, ...] = ("source", "bf16", "awq", "hybrid")
# What is worth serving: the finished checkpoint with either cache, and the awq stage's output to compare with.
SERVED: tuple[tuple[Form, str], ...] = (("hybrid", "bf16"), ("hybrid", "fp8"), ("awq", "bf16"))

GpusOption = Annotated[
    str | None,
    typer.Option("--gpus", metavar="NxSIZE", help="Say how the result fits on N GPUs of SIZE each, e.g. 4x48GiB."),
]
Utilization = Annotated[float, typer.Option("--utilization", help="vLLM's gpu_memory_utilization.")]
Reserve = Annotated[
    str,
    typer.Option(
        "--reserve",
        metavar="SIZE",
        help="What vLLM needs of each GPU besides weights and KV cache: activations, CUDA graphs, NCCL. The default is"
        " what the one published measurement implies.",
    ),
]


def plan(
    recipe: RecipePath,
    gpus: GpusOption = None,
    utilization: Utilization = DEFAULT_UTILIZATION,
    reserve: Reserve = f"{DEFAULT_RESERVE // GIB}GiB",
    set_: Set = None,
    json: Json = False,
) -> None:
    """Sizes before and after, disk, memory, and the KV cache on --gpus, from the source's config.json alone."""
    with handled():
        loaded = load(recipe, set_)
        quiet_libraries()
        machines = parse_gpus(gpus) if gpus is not None else None
        if not 0 < utilization <= 1:
            raise RecipeError(f"--utilization is {utilization}; it must be above 0 and at most 1")
        reserved = parse_reserve(reserve)
        config = _config(loaded)
        arch = architecture_of(config)
        dims = Dimensions.of(config, arch)
        scales = loaded.awq.kv_cache_scheme is not None
        forms = {form: tensors_of(dims, arch, form, loaded.awq.group_size, scales) for form in FORMS}
        value: dict[str, Any] = {
            "source": loaded.model.source,
            "components": _components(forms),
            "disk": _disk(loaded, dims, forms),
            "awq_memory": _awq_memory(loaded, dims, forms),
        }
        if machines is not None:
            value["serving"] = _serving(dims, forms, machines, utilization, reserved, config)
        output = make_output(mode(json, False))
        if json:
            output.result(value)
        else:
            _show(output, value)


def parse_gpus(text: str) -> Gpus:
    """'4x48GiB' -> 4 GPUs of 48 GiB. Raises RecipeError."""
    match = GPUS.fullmatch(text.strip())
    try:
        found = Gpus(int(match[1]), parse_size(match[2])) if match else None
    except (ValueError, OverflowError):
        found = None
    if found is None or found.count < 1 or found.memory < 1:
        raise RecipeError(f"--gpus is {text!r}; it must be a number and the memory of each, such as 4x48GiB")
    return found


def parse_reserve(text: str) -> int:
    """Raises RecipeError."""
    try:
        size = parse_size(text)
    except (ValueError, OverflowError):
        size = -1
    if size < 0:
        raise RecipeError(f"--reserve is {text!r}; it must be a size such as 4GiB")
    return size


def _config(recipe: Recipe) -> dict[str, Any]:
    """The source's config.json: of the folder, or of a hub id, from its cache before the hub itself.

    Raises:
        MmqError: there is none.
    """
    from mmq.storage.checkpoint import CONFIG_NAME, read_json

    name = recipe.model.source
    folder = recipe.path(name)
    if folder.is_dir():
        return read_json(folder / CONFIG_NAME)
    if not is_hub_id(name):
        raise RecipeError(f"model.source: there is no folder {folder}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with source_refused(f"{name} is neither a folder (looked at {folder}), nor is its {CONFIG_NAME} found on the hub"):
        try:
            path = hf_hub_download(name, CONFIG_NAME, revision=recipe.model.revision, local_files_only=True)
        except LocalEntryNotFoundError:
            path = hf_hub_download(name, CONFIG_NAME, revision=recipe.model.revision)
    return read_json(Path(path))


def _components(forms: Forms) -> list[dict[str, Any]]:
    """One entry a component, and their total."""

    def side(component: Component) -> dict[str, Any]:
        return {"dtypes": list(component.dtypes), "bytes": component.nbytes}

    before, after = components(forms["source"]), components(forms["hybrid"])
    entries = [
        {"component": name, "parameters": own.parameters, "before": side(own), "after": side(after[name])}
        for name, own in before.items()
    ]
    total: dict[str, Any] = {"component": "total", "parameters": sum(own.parameters for own in before.values())}
    for place, parts in (("before", before), ("after", after)):
        total[place] = {"dtypes": [], "bytes": sum(part.nbytes for part in parts.values())}
    return [*entries, total]


def _disk(recipe: Recipe, dims: Dimensions, forms: Forms) -> dict[str, Any]:
    """What the stages write, and what is free where they do."""
    from mmq.stages.base import free_disk

    # The states after a layer and, until its journal entry is written, those after the layer before it.
    states = 2 * most_tokens(recipe) * dims.hidden * 2
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


def _awq_memory(recipe: Recipe, dims: Dimensions, forms: Forms) -> list[dict[str, Any]]:
    """The awq stage's peaks, for each kind of device that the recipe may mean."""
    from mmq.quantize.routed_experts import DEFAULT_BUDGET
    from mmq.stages.base import BASE_MEMORY

    device = recipe.awq.device
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise RecipeError(f"awq.device is {device!r}; it must be auto, cpu, cuda or cuda:N")
    shard = max(layer_bytes(forms["awq"], dims), outside_bytes(forms["awq"]))
    result = []
    for kind in ("cpu", "cuda") if device == "auto" else (device.partition(":")[0],):
        budget = recipe.awq.memory_budget or DEFAULT_BUDGET[kind]
        hidden_states = most_tokens(recipe) * dims.hidden
        memory = awq_memory(layer_bytes(forms["bf16"], dims), shard, hidden_states, budget, kind == "cuda")
        result.append({"device": kind, "host_memory": BASE_MEMORY + memory.host, "device_memory": memory.device})
    return result


def _serving(
    dims: Dimensions,
    forms: Forms,
    gpus: Gpus,
    utilization: float,
    reserve: int,
    config: dict[str, Any],
) -> dict[str, Any]:
    """How the result fits, and why it would not."""
    rows: list[dict[str, Any]] = []
    problems = [f"vLLM would refuse: {problem}" for problem in parallel_problems(dims, gpus.count)]
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
            problem = f"{form}: nothing is left for a KV cache, {_gib(-fit.cache)} are missing on each GPU"
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
        "assumptions": _assumptions(rows, dims, gpus, utilization, reserve),
        "warnings": problems,
    }


def _assumptions(
    rows: list[dict[str, Any]], dims: Dimensions, gpus: Gpus, utilization: float, reserve: int
) -> list[str]:
    hybrid, _, awq = rows
    freed = awq["weights_per_gpu"] - hybrid["weights_per_gpu"]
    heads = dims.kv_heads_per_gpu(gpus.count)
    return [
        f"left for the cache = {_gib(gpus.memory)} x {utilization} (gpu_memory_utilization) - weights -"
        f" {_gib(reserve)} (reserve)",
        f"bytes a token and GPU = {dims.layers} layers x 2 x {heads} KV heads x {dims.head_dim} x 2 bytes (bf16) or 1"
        " (fp8)",
        "Tensor parallelism splits experts, attention, embeddings and head over the GPUs; norms, router, biases and KV"
        f" scales are on each. Of {dims.kv_heads} KV heads each GPU holds {heads}.",
        "The reserve is for activations, CUDA graphs, NCCL and the memory that CUDA does not show. Its default is what"
        " MiniMax-M2.5's model card implies: 370,000 tokens of fp8 cache on 4 x 48 GB (here 366,482).",
        "For one checkpoint an fp8 cache holds twice the tokens of a bf16 cache. Against awq/, whose attention is bf16,"
        f" hybrid/ frees another {_gib(freed)} on each GPU. The card's 160,000 tokens of bf16 cache (here 172,492 with"
        " awq/) come from a deployment that it doesn't describe.",
    ]


def _show(output: Output, value: dict[str, Any]) -> None:
    """The same for people."""
    total = value["components"][-1]
    rows = [
        {
            "component": entry["component"],
            "parameters": _billions(entry["parameters"]),
            "share": f"{entry['parameters'] / total['parameters']:.1%}",
            "before": " + ".join(DTYPE_LABELS[dtype] for dtype in entry["before"]["dtypes"]),
            "bytes before": human_bytes(entry["before"]["bytes"]),
            "after": " + ".join(DTYPE_LABELS[dtype] for dtype in entry["after"]["dtypes"]),
            "bytes after": human_bytes(entry["after"]["bytes"]),
        }
        for entry in value["components"]
    ]
    output.result({}, f"{value['source']}: parameters and bytes (scales beside their weights)", rows)
    disk = value["disk"]
    rows = [
        {"stage": entry["stage"], "folder": entry["folder"], "disk": human_bytes(entry["bytes"])}
        for entry in disk["folders"]
    ]
    rows.append({"stage": "total", "folder": f"free: {human_bytes(disk['free'])}", "disk": human_bytes(disk["total"])})
    output.result({}, "Disk", rows)
    rows = [
        {
            "device": entry["device"],
            "host memory": human_bytes(entry["host_memory"]),
            "on the device": human_bytes(entry["device_memory"]) if entry["device_memory"] else "-",
        }
        for entry in value["awq_memory"]
    ]
    output.result({}, "Peak memory of the awq stage", rows)
    if "serving" not in value:
        return
    fit = value["serving"]
    rows = [
        {
            "checkpoint": f"{row['checkpoint']}/",
            "KV cache": row["cache"],
            "weights per GPU": _gib(row["weights_per_gpu"]),
            "left for the cache": _gib(row["cache_per_gpu"]),
            "bytes a token": f"{row['bytes_per_token_per_gpu']:,}",
            "tokens": f"{row['tokens']:,}",
        }
        for row in fit["rows"]
    ]
    output.result({}, f"vLLM on {fit['gpus']} x {_gib(fit['gpu_memory'])}", rows)
    for sentence in fit["assumptions"]:
        output.note(sentence)
    for sentence in fit["warnings"]:
        output.note(f"warning: {sentence}")


def _billions(count: int) -> str:
    """224680476672 -> '224.7B', 844288 -> '0.001B': one decimal, or the first digit that is none."""
    digits = 1 if count == 0 else max(1, math.ceil(-math.log10(count / 1e9)))
    return f"{count / 1e9:.{digits}f}B"


def _gib(size: int) -> str:
    """Bytes -> '28.4 GiB'; small sizes in MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
