"""How often the paired search finds the full search's point, at what part of its work, over many layer searches.

    python scripts/bench_race.py --searches 120
    python scripts/bench_race.py --model FOLDER --searches 120

Without a model, layers are random, with norms of little, some and strong outliers, on a stream with heavy tails whose
neighbours are alike. With one (an fp8 checkpoint, e.g. of scripts/train_tiny.py), every layer is searched on samples
drawn anew each time from a JSONL file of texts, each layer on the outputs of the unquantized ones before it.

Every point's losses on every share are measured once, and the race is run on them, so that both searches see the same
numbers. Work is counted in passes over all tokens and in quantizations of all of a layer's gate and up weights, each as
a part of the full search's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["LLM_COMPRESSOR_LOG_DISABLED"] = "true"

import torch
from transformers.activations import ACT2FN

import stock_awq
from mmq.families.minimax_m2 import MINIMAX_M2
from mmq.quantize.decoder_layer import DecoderLayer, embed, transformers_config
from mmq.quantize.race import parts, race
from mmq.quantize.routed_experts import ExpertBlock, SmoothedGateUp, Weights
from mmq.quantize.search import StackedAWQModifier, awq_mappings, grid_of_norm, lines

CPU = torch.device("cpu")
DUO_SCALING: tuple[Any, ...] = (True, False, "both")


def heavy_tailed(tokens: int, hidden: int, seed: int) -> torch.Tensor:
    """A residual stream with a few shared directions; neighbours are alike, and some tokens are large."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    stream = normal(tokens, hidden) + normal(tokens, 24) @ normal(24, hidden) * 0.6
    stream *= normal(tokens // 64, 1).mul(0.7).exp().repeat_interleave(64, 0) * normal(tokens, 1).mul(0.5).exp()
    return stream.to(torch.bfloat16)


def random_blocks(searches: int, tokens: int) -> Iterator[ExpertBlock]:
    for seed in range(searches):
        spread, outliers = (0.3, 0.7, 1.0)[seed // 3 % 3], (2.0, 12.0, 30.0)[seed // 9 % 3]
        layer = stock_awq.random_layer(8, 256, 128, torch.bfloat16, CPU, seed, spread=spread, outliers=outliers)
        x, index, weight = stock_awq.block_inputs(layer, heavy_tailed(tokens, 256, seed), 2)
        yield block_of(x, index, weight, layer.gate_up, layer.down)


def block_of(
    x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> ExpertBlock:
    shares = parts(index.numel() / gate_up.shape[0])
    return ExpertBlock(x, index, weight, gate_up, down, ACT2FN["silu"], stock_awq.GROUP_SIZE, parts=shares)


def model_blocks(folder: Path, data: Path, searches: int, tokens: int) -> Iterator[ExpertBlock]:
    """Blocks of a checkpoint's layers, by turns, until there are enough."""
    from tokenizers import Tokenizer

    from mmq.prove.weights import SourceWeights, read_layer
    from mmq.source.model import SourceModel
    from mmq.storage.checkpoint import Checkpoint

    source = SourceModel(Checkpoint.open(folder), MINIMAX_M2)
    weights, config = SourceWeights(source), transformers_config(MINIMAX_M2, source.config)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [json.loads(line)["text"] for line in data.read_text(encoding="utf-8").splitlines()]
    done, chooser = 0, random.Random(0)
    while done < searches:
        ids: list[list[int]] = []
        while sum(map(len, ids)) < tokens:
            ids.append(tokenizer.encode(chooser.choice(texts)).ids[:256])
        lengths = [len(part) for part in ids]
        with source.checkpoint.reader() as reader:
            hidden = embed(reader[MINIMAX_M2.embedding], torch.tensor([token for part in ids for token in part]))
        for number in range(source.layer_count()):
            content = read_layer(weights, MINIMAX_M2, number, CPU)
            decoder = DecoderLayer(MINIMAX_M2, config, number, content.rest, CPU)
            residual = decoder.attend(hidden, lengths)
            x = decoder.block_input(residual)
            _, weight, index = decoder.route(x)
            block = block_of(x, index, weight, content.gate_up, content.down)
            yield block
            done += 1
            hidden = residual + block.output(Weights(block)).to(residual.dtype)


def compare(block: ExpertBlock, duo_scaling: Any, n_grid: int) -> dict[str, Any]:
    """The race on a block against the sum of all losses."""
    modifier = StackedAWQModifier(mappings=awq_mappings(MINIMAX_M2), duo_scaling=duo_scaling, n_grid=n_grid)
    reference = block.outputs(Weights(block))
    grid, scales = grid_of_norm(modifier, block)
    losses = {
        (point, number): block.losses(share, SmoothedGateUp(block, scales[point]), reference[number])
        for point in range(len(grid))
        for number, share in enumerate(block.shares)
    }
    tokens, shares = block.x.shape[0], len(block.shares)
    total = [
        sum(float(losses[point, number].sum(dtype=torch.float64)) for number in range(shares))
        for point in range(len(grid))
    ]
    outcome = race(lines(grid), shares, tokens, lambda point, share: losses[point, share])
    best = min(range(len(grid)), key=lambda point: (total[point], point))
    return {
        "same": outcome.best == best,
        "regret": total[outcome.best] / total[best] - 1,
        "passes": sum(runner.seen for runner in outcome.runners.values()) / tokens / len(grid),
        "quantizations": sum(len(runner.losses) for runner in outcome.runners.values()) / len(grid),
        "shares": shares,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=120)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--n-grid", type=int, default=20)
    parser.add_argument("--model", type=Path, help="an fp8 checkpoint of MiniMax-M2's family")
    parser.add_argument("--data", type=Path, help="JSONL of texts; default: calibration.jsonl beside the model")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    if options.model:
        data = options.data or options.model / "calibration.jsonl"
        blocks = model_blocks(options.model, data, options.searches, options.tokens)
    else:
        blocks = random_blocks(options.searches, options.tokens)
    found = []
    for number, block in enumerate(blocks):
        found.append(compare(block, DUO_SCALING[number % 3], options.n_grid))
        if not found[-1]["same"]:
            print(f"search {number}: another point, its loss {found[-1]['regret']:+.3%}", flush=True)
    same = sum(entry["same"] for entry in found)
    print(
        f"{same} of {len(found)} searches found the same point ({same / len(found):.1%}), the largest loss above the"
        f" full search's is {max(entry['regret'] for entry in found):.3%}\n"
        f"passes over the tokens: {statistics.mean(entry['passes'] for entry in found):.3f} of the full search's,"
        f" at most {max(entry['passes'] for entry in found):.3f}; quantizations:"
        f" {statistics.mean(entry['quantizations'] for entry in found):.3f}; shares: {found[0]['shares']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
