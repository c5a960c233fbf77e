"""What the roundings leave of a model: KL to its source on held-out text, medians over calibrations drawn anew.

    python scripts/bench_quality.py trained --samples 16 256 --seeds 3
    python scripts/bench_quality.py trained --planted --samples 64      # outlier channels in every layer's norm
    python scripts/bench_quality.py trained --random --samples 64       # mmq synth's random weights at the same size
    python scripts/bench_quality.py trained --narrow --samples 16       # calibrated on a few dozen words

The model is a folder as scripts/train_tiny.py writes it, with `calibration.jsonl` and `heldout.jsonl`. For every number
of samples and every seed, samples are drawn from the former, and mmq's stages and its evaluation run. Each hybrid's KL
is put beside that of rounding to nearest and of AWQ (`awq.rounding: nearest`) on the same samples; figures are medians
over the seeds, with the least and the largest in brackets.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

import mmq
from mmq.families.minimax_m2 import MINIMAX_M2
from mmq.source.synth import Sizes, quantize_block, write_checkpoint
from mmq.stages.pipeline import run_stages
from mmq.tensors.fp8 import dequantize_block
from mmq.workdir.workspace import Workspace

# Settings of the awq section by the name of what they do.
WAYS: dict[str, dict[str, Any]] = {
    "nearest": {"rounding": "nearest"},
    "compensated": {"rounding": "compensated", "fisher_tokens": 0},
    "two-sided": {"rounding": "compensated", "fisher_tokens": 2**53 - 1},
}
WORDS = [
    "the",
    "a",
    "model",
    "of",
    "and",
    "to",
    "in",
    "weight",
    "layer",
    "is",
    "for",
    "every",
    "token",
    "its",
    "error",
    "was",
    "small",
    "with",
    "no",
    "other",
    "text",
    "here",
]
OUTLIERS, FACTOR = 0.02, 16.0


def planted(model: Path, folder: Path, seed: int) -> None:
    """The model with a few channels of each block's norm larger, and what reads them as much smaller: its function, but
    for fp8's rounding of the smaller weights."""
    shutil.copytree(model, folder)
    generator = torch.Generator().manual_seed(seed)
    shards = {path: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    layers = sorted({layer for name in tensors if (layer := MINIMAX_M2.split(name)[0]) is not None})
    changed: dict[str, torch.Tensor] = {}
    for layer in layers:
        prefix = MINIMAX_M2.layer_prefix(layer)
        norm = tensors[prefix + MINIMAX_M2.smooth_norm]
        factor = torch.where(torch.rand(norm.shape[0], generator=generator) < OUTLIERS, FACTOR, 1.0)
        changed[prefix + MINIMAX_M2.smooth_norm] = (norm.float() * factor).to(norm.dtype)
        changed[prefix + MINIMAX_M2.router] = tensors[prefix + MINIMAX_M2.router] / factor
        for name in tensors:
            found = MINIMAX_M2.split_expert(MINIMAX_M2.split(name)[1]) if name.startswith(prefix) else None
            if found and found[1] != MINIMAX_M2.down and name.endswith(".weight"):
                wide = dequantize_block(tensors[name], tensors[f"{name}_scale_inv"]).float() / factor
                changed[name], changed[f"{name}_scale_inv"] = quantize_block(wide)
    for path, shard in shards.items():
        save_file({name: changed.get(name, tensor) for name, tensor in shard.items()}, path, {"format": "pt"})


def random_model(model: Path, folder: Path, seed: int) -> None:
    """mmq synth's weights, of the model's sizes, with the model's text."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    sizes = Sizes(
        config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"], config["num_local_experts"],
        config["num_experts_per_tok"], config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"],
    )  # fmt: skip
    write_checkpoint(folder, sizes, seed)
    for name in ("calibration.jsonl", "heldout.jsonl"):
        shutil.copy(model / name, folder / name)


def samples_of(model: Path, count: int, seed: int, narrow: bool, length: int) -> list[str]:
    """Lines of JSON."""
    chooser = random.Random(seed)
    if narrow:
        return [json.dumps({"text": " ".join(chooser.choices(WORDS, k=length))}) for _ in range(count)]
    return chooser.sample((model / "calibration.jsonl").read_text(encoding="utf-8").splitlines(), count)


def measure(model: Path, samples: list[str], length: int, ways: list[str], awq: dict[str, Any]) -> dict[str, float]:
    """KL of round-to-nearest, and of the hybrid under each rounding; with the fp8 KV cache as well; seconds of awq."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "samples.jsonl").write_text("\n".join(samples) + "\n", encoding="utf-8")
        for way in ways:
            recipe = {
                "model": {"source": str(model.resolve())},
                "work_dir": way,
                "awq": {
                    "calibration": {"files": [{"path": "samples.jsonl"}], "sequence_length": length},
                    "source": "fp8",
                    "device": "cpu",
                }
                | WAYS[way]
                | awq,
            }
            path = folder / f"{way}.yaml"
            path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
            run_stages(Workspace.of(mmq.load_recipe(path)), ["awq", "restore"])
            content = mmq.evaluate(path, model / "heldout.jsonl", 96, 256)
            kl = {variant["variant"]: variant["kl"] for variant in content["variants"]}
            found["round-to-nearest"] = kl["round-to-nearest"]
            found[way] = kl["hybrid"]
            found[f"{way}, fp8 cache"] = kl["hybrid, fp8 KV cache"]
            layers = json.loads((folder / way / "state/awq/layers.json").read_text(encoding="utf-8"))
            parts = ("searching", "rounding", "quantizing")
            found[f"{way}, s"] = sum(layer["seconds"].get(part, 0.0) for layer in layers for part in parts)
    return found


def told(values: list[float], digits: int) -> str:
    """The median, and the range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sequence-length", type=int, default=256)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--planted", action="store_true", help="outlier channels in the norm before the experts")
    kinds.add_argument("--random", action="store_true", help="random weights as mmq synth makes them")
    parser.add_argument("--narrow", action="store_true", help="calibrate on a few dozen words")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of rounding")
    parser.add_argument("--set", action="append", default=[], help="a field of the recipe's awq section, field=value")
    options = parser.parse_args()
    awq = {key: yaml.safe_load(value) for key, _, value in (field.partition("=") for field in options.set)}
    with tempfile.TemporaryDirectory() as name:
        for count in options.samples:
            runs = []
            for seed in range(options.seeds):
                model = options.model
                if options.planted or options.random:
                    model = Path(name) / f"model-{seed}"
                    if not model.exists():
                        (planted if options.planted else random_model)(options.model, model, seed)
                lines = samples_of(model, count, seed, options.narrow, options.sequence_length)
                runs.append(measure(model, lines, options.sequence_length, options.ways, awq))
            for key in runs[0]:
                print(f"{count} samples, {key}: {told([run[key] for run in runs], 1 if key.endswith(', s') else 5)}")
            for way in options.ways:
                for key in ("round-to-nearest", "nearest"):
                    if way == key or key not in runs[0]:
                        continue
                    shares = [run[way] / run[key] for run in runs]
                    print(f"{count} samples, {way} of {key}: {told(shares, 3)}", flush=True)


if __name__ == "__main__":
    main()
