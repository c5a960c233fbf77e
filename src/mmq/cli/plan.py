"""mmq plan: sizes, disk, memory and KV cache, from the recipe and the source's config.json alone."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from mmq.cli.errors import handled
from mmq.cli.options import GpusOption, Json, RecipePath, Set, mode, quiet_libraries
from mmq.cli.output import Output, make_output
from mmq.errors import RecipeError
from mmq.families.sizes import DTYPE_LABELS, GIB
from mmq.recipe import load, parse_size
from mmq.serve.memory import DEFAULT_RESERVE, DEFAULT_UTILIZATION, Gpus
from mmq.text import bytes_text, gib_text

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
        machines = Gpus.parse(gpus) if gpus is not None else None
        if not 0 < utilization <= 1:
            raise RecipeError(f"--utilization is {utilization}; it must be above 0 and at most 1")
        reserved = parse_reserve(reserve)
        from mmq.stages.plan import make_plan

        value = make_plan(loaded, machines, utilization, reserved)
        output = make_output(mode(json, False))
        if json:
            output.result(value)
        else:
            _show(output, value)


def parse_reserve(text: str) -> int:
    """Raises RecipeError."""
    try:
        size = parse_size(text)
    except (ValueError, OverflowError):
        size = -1
    if size < 0:
        raise RecipeError(f"--reserve is {text!r}; it must be a size such as 4GiB")
    return size


def _show(output: Output, value: dict[str, Any]) -> None:
    """The same for people."""
    total = value["components"][-1]
    rows = [
        {
            "component": entry["component"],
            "parameters": _billions(entry["parameters"]),
            "share": f"{entry['parameters'] / total['parameters']:.1%}",
            "before": " + ".join(DTYPE_LABELS[dtype] for dtype in entry["before"]["dtypes"]),
            "bytes before": bytes_text(entry["before"]["bytes"]),
            "after": " + ".join(DTYPE_LABELS[dtype] for dtype in entry["after"]["dtypes"]),
            "bytes after": bytes_text(entry["after"]["bytes"]),
        }
        for entry in value["components"]
    ]
    output.result({}, f"{value['source']}: parameters and bytes (scales beside their weights)", rows)
    disk = value["disk"]
    rows = [
        {"stage": entry["stage"], "folder": entry["folder"], "disk": bytes_text(entry["bytes"])}
        for entry in disk["folders"]
    ]
    rows.append({"stage": "total", "folder": f"free: {bytes_text(disk['free'])}", "disk": bytes_text(disk["total"])})
    output.result({}, "Disk", rows)
    rows = [
        {
            "device": entry["device"],
            "host memory": bytes_text(entry["host_memory"]),
            "on the device": bytes_text(entry["device_memory"]) if entry["device_memory"] else "-",
        }
        for entry in value["awq_memory"]
    ]
    output.result({}, "Peak memory of the awq stage", rows)
    cache = value["kv_cache"]
    if cache["without"]:
        scaled = f"{cache['with_scales']} of {cache['layers']} layers with a KV cache get scales for it"
        output.note(f"{scaled}: {'; '.join(cache['without'])}")
    if "serving" not in value:
        return
    rows = [
        {
            "ranks": row["ranks"],
            "memory of each GPU": gib_text(row["device_memory"]) + ("" if row["fits"] else ", too much"),
            "sent a layer": bytes_text(row["sent_per_layer"]),
            **{f"times faster, {link}": f"{times:.1f}" for link, times in row["times_faster"].items()},
        }
        for row in value["ranks"]
    ]
    output.result({}, "The awq stage on several GPUs, computing alone, by a model (docs/scaling.md)", rows)
    fit = value["serving"]
    rows = [
        {
            "checkpoint": f"{row['checkpoint']}/",
            "KV cache": row["cache"],
            "weights per GPU": gib_text(row["weights_per_gpu"]),
            "left for the cache": gib_text(row["cache_per_gpu"]),
            "bytes a token": f"{row['bytes_per_token_per_gpu']:,}",
            "tokens": f"{row['tokens']:,}",
        }
        for row in fit["rows"]
    ]
    output.result({}, f"vLLM on {fit['gpus']} x {gib_text(fit['gpu_memory'])}", rows)
    for sentence in fit["assumptions"]:
        output.note(sentence)
    for sentence in fit["warnings"]:
        output.note(f"warning: {sentence}")


def _billions(count: int) -> str:
    """224680476672 -> '224.7B', 844288 -> '0.001B': one decimal, or the first digit that is none."""
    digits = 1 if count == 0 else max(1, math.ceil(-math.log10(count / 1e9)))
    return f"{count / 1e9:.{digits}f}B"
