"""What the roundings leave of a model: KL to its source on held-out text, medians over calibrations drawn anew.

    python scripts/bench_quality.py trained --samples 16 64 256 --seeds 3

The model is a folder as scripts/train_tiny.py writes it, with `calibration.jsonl` and `heldout.jsonl`. For every number
of samples and every seed, samples are drawn from the former, and `mmq run` and `mmq eval` run as processes of their
own. Each hybrid's KL is put beside that of rounding to nearest and of AWQ (`awq.rounding: nearest`) on the same
samples.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

WAYS = ("nearest", "compensated")


def measure(model: Path, samples: int, seed: int, length: int) -> dict[str, float]:
    """KL of round-to-nearest, and of the hybrid under each rounding; with the fp8 KV cache as well."""
    lines = (model / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        drawn = random.Random(seed).sample(lines, samples)
        (folder / "samples.jsonl").write_text("\n".join(drawn) + "\n", encoding="utf-8")
        for way in WAYS:
            recipe = {
                "model": {"source": str(model.resolve())},
                "work_dir": way,
                "awq": {
                    "calibration": {"files": [{"path": "samples.jsonl"}], "sequence_length": length},
                    "source": "fp8",
                    "rounding": way,
                    "device": "cpu",
                },
            }
            path = folder / f"{way}.yaml"
            path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
            data = ["--data", model / "heldout.jsonl", "--samples", 96, "--sequence-length", length]
            for arguments in (["run", path, "--quiet"], ["eval", path, *data, "--quiet"]):
                subprocess.run([sys.executable, "-m", "mmq", *map(str, arguments)], check=True)
            content = json.loads((folder / way / "eval.json").read_text(encoding="utf-8"))
            kl = {variant["variant"]: variant["kl"] for variant in content["variants"]}
            found["round-to-nearest"] = kl["round-to-nearest"]
            found[way] = kl["hybrid"]
            found[f"{way}, fp8 cache"] = kl["hybrid, fp8 KV cache"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sequence-length", type=int, default=256)
    options = parser.parse_args()
    for samples in options.samples:
        runs = [measure(options.model, samples, seed, options.sequence_length) for seed in range(options.seeds)]
        kl = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        shares = [
            statistics.median(run["compensated"] / run[key] for run in runs) for key in ("round-to-nearest", "nearest")
        ]
        print(
            f"{samples} samples: KL "
            + ", ".join(f"{key} {value:.5f}" for key, value in kl.items())
            + f"; compensated is {shares[0]:.3f} of round-to-nearest's, {shares[1]:.3f} of AWQ's",
            flush=True,
        )


if __name__ == "__main__":
    main()
