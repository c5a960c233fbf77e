"""How near dequant and restore come to the disk: python scripts/bench_io.py [--gigabytes 2] [--folder DIR] [--json]

Makes an fp8 checkpoint of one layer with random experts of the real size, then times, in turns and with the page cache
dropped before each, (a) plain file copies that read and write the same numbers of bytes on as many threads, each file
fsynced as the stages' are, and (b) the stage. Prints the share of the plain copies' throughput that the stage reaches.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("LLM_COMPRESSOR_LOG_DISABLED", "true")

import torch

from mmq.recipe import Recipe
from mmq.stages.base import Plan, execute
from mmq.stages.pipeline import STAGES
from mmq.storage.atomic import write_json
from mmq.storage.checkpoint import CONFIG_NAME, INDEX_NAME
from mmq.storage.shards import DTYPES, TensorSpec, write_shard
from mmq.workdir.lock import lock
from mmq.workdir.output_shards import layers_and_rest, quantized_specs, shard_name
from mmq.workdir.workspace import AWQ, Workspace
from real_layers import Shape, write_layers

SHARD = 512 * 2**20
CHUNK = 2**24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the fp8 checkpoint")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder here by default")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder or Path.cwd(), prefix="bench-io-") as name:
        result = measure(Path(name), options.gigabytes, options.workers, options.repeat)
    if options.json:
        print(json.dumps(result))
        return
    for stage in ("dequant", "restore"):
        plain, ours = result[f"{stage}_plain_bytes_per_second"], result[f"{stage}_bytes_per_second"]
        print(
            f"{stage}: {ours / 1e9:.2f} GB/s, plain copies {plain / 1e9:.2f} GB/s, share {result[stage + '_share']:.2f}"
        )


def measure(folder: Path, gigabytes: float, workers: int, repeat: int) -> dict[str, float]:
    """Time both stages against plain copies; medians over `repeat` turns."""
    write_source(folder / "source", gigabytes)
    recipe = Recipe.model_validate(
        {
            "model": {"source": "source"},
            "work_dir": "run",
            "awq": {"calibration": {"files": [{"path": "unused.jsonl"}]}, "source": "fp8"},
            "workers": workers,
            "root": folder,
        }
    )
    result: dict[str, float] = {"workers": workers, "gigabytes": gigabytes}
    for stage in ("dequant", "restore"):
        workspace = Workspace.of(recipe)
        with lock(workspace.work_dir):
            if stage == "restore":
                pretend_awq(workspace)
            plan = STAGES[stage].plan(workspace)
            moved = plan.read + plan.written
            seconds: dict[str, list[float]] = {"plain": [], "ours": []}
            for turn in range(repeat + 1):
                plain = timed(plan, lambda plan=plan: plain_copies(plan, folder / "plain", workers))
                shutil.rmtree(folder / "plain")
                ours = timed(
                    plan, lambda stage=stage, workspace=workspace: execute(STAGES[stage], workspace, restart=True)
                )
                if turn:  # the first warms up
                    seconds["plain"].append(plain)
                    seconds["ours"].append(ours)
        result[f"{stage}_plain_bytes_per_second"] = moved / statistics.median(seconds["plain"])
        result[f"{stage}_bytes_per_second"] = moved / statistics.median(seconds["ours"])
        ratios = [p / o for p, o in zip(seconds["plain"], seconds["ours"], strict=True)]
        result[f"{stage}_share"] = round(statistics.median(ratios), 3)
        shutil.rmtree(plan.folder)
    return result


def timed(plan: Plan, job: Callable[[], None]) -> float:
    """Seconds of a job that reads `plan.source` from the disk and leaves nothing unwritten."""
    os.sync()
    for path in plan.source.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begin = time.perf_counter()
    job()
    return time.perf_counter() - begin


def plain_copies(plan: Plan, folder: Path, workers: int) -> None:
    """Read each unit's bytes from the source's shards and write as many as the stage does, fsynced."""
    folder.mkdir()
    sources = sorted(plan.source.glob("*.safetensors"))

    def copy(number: int) -> None:
        unit = plan.units[number]
        buffer = memoryview(bytearray(CHUNK))
        with (
            open(sources[number % len(sources)], "rb", buffering=0) as origin,
            open(folder / unit.name, "wb", 0) as target,
        ):
            read = written = 0
            while read < unit.read or written < unit.written:
                read += origin.readinto(buffer) or unit.read
                while written < min(unit.written, unit.written * read / unit.read):
                    written += target.write(buffer[: min(CHUNK, unit.written - written)])
            os.fsync(target.fileno())

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(copy, range(len(plan.units))))


def write_source(folder: Path, gigabytes: float) -> None:
    """An fp8 checkpoint of one layer with as many experts as the size asks for, in shards of half a gigabyte."""
    expert = 3 * Shape.hidden * Shape.intermediate
    shape = replace(Shape(), experts=max(Shape.top_k, round(gigabytes * 1e9 / expert)))
    write_layers(folder, 1, torch.device("cpu"), shape, shard_bytes=SHARD)


def pretend_awq(workspace: Workspace) -> None:
    """An awq output of the right shapes with arbitrary experts, so that restore can be timed without running awq."""
    source = workspace.source
    journal = workspace.journal.stage("awq")
    journal.begin({})
    folder = workspace.folder(AWQ)
    folder.mkdir()
    weight_map = {}

    def content(spec: TensorSpec, reader) -> torch.Tensor:  # type: ignore[no-untyped-def]
        if spec.name in source.specs:
            return source.read(reader, spec.name)
        return torch.ones(spec.shape, dtype=DTYPES[spec.dtype])

    for layer in layers_and_rest(workspace):
        name = shard_name(workspace, layer)
        with (
            source.checkpoint.reader() as reader,
            write_shard(folder / name, quantized_specs(workspace, layer)) as shard,
        ):
            for spec in shard.specs:
                shard.add(spec.name, content(spec, reader))
                weight_map[spec.name] = name
        journal.finish_unit(name, {f"{AWQ}/{name}": shard.record})
    write_json(folder / INDEX_NAME, {"metadata": {}, "weight_map": weight_map})
    write_json(folder / CONFIG_NAME, source.config)
    journal.finish()


if __name__ == "__main__":
    main()
