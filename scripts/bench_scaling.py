"""How much faster several ranks quantize one layer than one does.

    python scripts/bench_scaling.py                                    # 1 and 2 processes on a CPU, one thread each
    python scripts/bench_scaling.py --processes 1 2 4 8 --device cuda --preset gpu

Every number of processes quantizes the same layer, in turns; what is printed are ratios to one process. `wall` is of
the clock, and says what is to be had where the processor's cores are free. `busy` is of the processor time that the
busiest rank took, which other programs on the machine don't change: what the ranks could reach if none waited for a
core. `waited` is the share of the time that a rank's computations stood still for the others.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["LLM_COMPRESSOR_LOG_DISABLED"] = "true"

import torch

from mmq.families.minimax_m2 import MINIMAX_M2
from mmq.machine.device import present_device
from mmq.machine.team import Team
from mmq.quantize.layer import LayerContent, LayerQuantizer
from mmq.recipe import Awq
from real_layers import Shape, layer_in_memory

# experts, hidden, intermediate, top-k, tokens
PRESETS = {"cpu": (64, 512, 512, 4, 4096), "gpu": (256, 3072, 1536, 8, 131072)}


def worker(preset: str, device_name: str, out: Path) -> None:
    """One rank: quantize the layer, and write down what it took."""
    experts, hidden, inner, top_k, tokens = PRESETS[preset]
    team = Team.join(device_name)
    device = present_device(device_name)
    shape = Shape(experts, hidden, inner, top_k, 8, 4, 64)
    content, config, states = layer_in_memory(shape, tokens, device)
    own = team.part(experts)
    part = LayerContent(
        content.gate_up[own.start : own.stop].clone(), content.down[own.start : own.stop].clone(), content.rest
    )
    del content
    settings = Awq.model_validate({"calibration": {"files": [{"path": "unused", "samples": 1}]}, "rounding": "nearest"})
    lengths = [min(512, tokens)] * (tokens // min(512, tokens))
    # Once on few tokens: what is compiled is compiled then.
    some = LayerContent(part.gate_up.clone(), part.down.clone(), part.rest)
    LayerQuantizer(MINIMAX_M2, config, settings, lengths[:1], torch.arange(lengths[0]), device, team=team).quantize(
        0, some, states[: lengths[0]]
    )
    quantizer = LayerQuantizer(MINIMAX_M2, config, settings, lengths, torch.arange(sum(lengths)), device, team=team)
    team.together()
    before, begin, waited = _busy(), time.perf_counter(), team.waited
    result = quantizer.quantize(0, part, states)
    team.together()
    took: dict[str, Any] = {
        "wall": time.perf_counter() - begin,
        "busy": _busy() - before,
        "waited": team.waited - waited,
        "searching": result.statistics["seconds"]["searching"],
        "point": result.statistics["norm"]["ratio"],
        "loss": result.statistics["loss_chosen"],
    }
    everyone = team.everyone(took)
    if team.leads:
        out.write_text(json.dumps(everyone))


def _busy() -> float:
    """Processor seconds of this process, those that wait in the kernel for the others' bytes included."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(processes: int, preset: str, device: str) -> list[dict[str, Any]]:
    """What each of so many ranks took."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "took.json"
        own = [__file__, "--worker", str(out), "--preset", preset, "--device", device]
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(several if processes > 1 else []), *own]
        subprocess.run(
            command, check=True, env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        )
        found: list[dict[str, Any]] = json.loads(out.read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.preset, given.device, given.worker)
        return
    counts = list(dict.fromkeys([1, *given.processes]))
    rounds = [{count: measure(count, given.preset, given.device) for count in counts} for _ in range(given.rounds)]
    for count in counts:
        found = [one[count] for one in rounds]
        line: dict[str, Any] = {"processes": count, "point": found[0][0]["point"], "loss": found[0][0]["loss"]}
        for what in ("wall", "searching", "busy"):
            ratios = [max(r[what] for r in one[1]) / max(r[what] for r in one[count]) for one in rounds]
            line[what] = [round(ratio, 2) for ratio in sorted(ratios)]
        line["waited"] = round(statistics.median(max(r["waited"] / r["wall"] for r in one) for one in found), 3)
        print(json.dumps(line))


if __name__ == "__main__":
    main()
