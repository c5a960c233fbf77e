"""What the fp8 KV cache adds to a model's KL, and how much of it another scale would take away.

    python scripts/bench_kv_cache.py trained

On the source model of a folder as scripts/train_tiny.py writes it, nothing but keys after rotary and values is rounded.
Scales are found on `calibration.jsonl` and judged on `heldout.jsonl`: the largest magnitude / 448, as mmq stores; times
factors from 1/16 to 16, for all layers together and the best for each layer's attention output; one per head; and, as
the least that scales could give, factors chosen by the judged KL itself, a cache of a layer at a time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from compressed_tensors.modeling.kvcache import initialize_hooked_kv_cache
from tokenizers import Tokenizer

from mmq.families.minimax_m2 import MINIMAX_M2 as ARCH
from mmq.prove.forward import Head, run_layer
from mmq.prove.measures import measure
from mmq.prove.weights import SourceWeights, read_layer
from mmq.quantize.decoder_layer import DecoderLayer, embed, transformers_config
from mmq.quantize.layer import LayerContent
from mmq.source.model import SourceModel
from mmq.source.tokens import Sample, Tokens
from mmq.storage.checkpoint import Checkpoint

CPU = torch.device("cpu")
LARGEST = 448.0
STEPS = [-32, -16, -8, -6, -4, -2, 0, 2, 4, 6, 8, 16, 32]
FACTORS = [2.0 ** (step / 8) for step in STEPS]
Pair = tuple[torch.Tensor, torch.Tensor]


def e4m3(states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Keys or values [B, heads, T, dim] as a cache with a scale [] or [heads] would give them back."""
    wide = scale.view(-1, 1, 1)
    rounded = (states.float() / wide).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float()
    return (rounded * wide).to(states.dtype)


@contextmanager
def cache(decoder: DecoderLayer, function: Callable[[Pair], Pair]) -> Iterator[None]:
    """Put a function between keys and values and the attention that reads them."""
    attention: Any = decoder.module.self_attn
    if not hasattr(attention, "kv_cache"):
        attention.quantization_enabled = False
        initialize_hooked_kv_cache(SimpleNamespace(config=decoder.config), attention)
    handle = attention.kv_cache.register_forward_hook(lambda _cache, _given, result: function(result))
    try:
        yield
    finally:
        handle.remove()


class Model:
    """The source's layers, with the tokens that calibrate and those that judge."""

    def __init__(self, folder: Path, calibration: int, held_out: int, length: int) -> None:
        self.source = SourceModel(Checkpoint.open(folder), ARCH)
        config = self.source.config
        self.config = transformers_config(ARCH, config)
        weights = SourceWeights(self.source)
        self.contents: list[LayerContent] = [
            read_layer(weights, ARCH, layer, CPU) for layer in range(self.source.layer_count())
        ]
        self.decoders = [
            DecoderLayer(ARCH, self.config, layer, content.rest, CPU) for layer, content in enumerate(self.contents)
        ]
        with self.source.checkpoint.reader() as reader:
            self.table = reader[ARCH.embedding].clone()
            self.head = Head(ARCH, self.config, reader[ARCH.final_norm].clone(), reader[ARCH.head].clone())
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.calibration = self._tokens(folder / "calibration.jsonl", tokenizer, calibration, length)
        self.held_out = self._tokens(folder / "heldout.jsonl", tokenizer, held_out, length)
        self.truth = self.forward(lambda _layer, pair: pair)

    @staticmethod
    def _tokens(path: Path, tokenizer: Tokenizer, count: int, length: int) -> Tokens:
        texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()[:count]]
        ids = [tokenizer.encode(text).ids[:length] for text in texts]
        samples = [Sample(0, len(part), 0, False, None) for part in ids]
        return Tokens(torch.tensor([token for part in ids for token in part]), samples, "")

    @torch.no_grad()
    def forward(self, function: Callable[[int, Pair], Pair]) -> torch.Tensor:
        """Hidden states [T, H] of the tokens that judge, with a function on every layer's keys and values."""
        hidden = embed(self.table, self.held_out.ids)
        for layer, (decoder, content) in enumerate(zip(self.decoders, self.contents, strict=True)):
            with cache(decoder, lambda pair, layer=layer: function(layer, pair)):  # type: ignore[misc]
                hidden = run_layer(decoder, content, hidden, self.held_out.lengths, 128)
        return hidden

    def kl(self, scales: list[Pair | None]) -> float:
        """Of the model whose layers' caches have these scales, of keys and of values."""

        def rounded(layer: int, pair: Pair) -> Pair:
            own = scales[layer]
            if own is None:
                return pair
            key, value = (e4m3(part, s) if float(s.max()) else part for part, s in zip(pair, own, strict=True))
            return key, value

        states = {"source": self.truth, "cache": self.forward(rounded)}
        found = measure(states, dict.fromkeys(states, self.head), "source", self.held_out)["cache"].metrics()["kl"]
        assert found is not None
        return found

    @torch.no_grad()
    def calibrate(self) -> tuple[list[Pair], list[Pair], list[tuple[float, float]]]:
        """Of each layer: magnitudes / 448 of all keys and all values, and of each head's; the best scales' factors."""
        hidden = embed(self.table, self.calibration.ids)
        largest, heads, best = [], [], []
        for decoder, content in zip(self.decoders, self.contents, strict=True):
            seen: list[Pair] = []

            def look(pair: Pair, seen: list[Pair] = seen) -> Pair:
                seen.append(pair)
                return pair

            with cache(decoder, look):
                truth = decoder.attend(hidden, self.calibration.lengths).float()
            head = tuple(
                torch.stack([states.float().abs().amax((0, 2, 3)) for states in part]).amax(0) / LARGEST
                for part in zip(*seen, strict=True)
            )
            one: Pair = (head[0].amax(), head[1].amax())
            found = []
            for place in range(2):
                losses = []
                for factor in FACTORS:

                    def only(pair: Pair, place: int = place, scale: torch.Tensor = one[place] * factor) -> Pair:
                        changed = list(pair)
                        changed[place] = e4m3(changed[place], scale)
                        return changed[0], changed[1]

                    with cache(decoder, only):
                        after = decoder.attend(hidden, self.calibration.lengths).float()
                    losses.append(float((after - truth).square().sum(dtype=torch.float64)))
                found.append(FACTORS[min(range(len(losses)), key=losses.__getitem__)])
            largest.append(one)
            heads.append((head[0], head[1]))
            best.append((found[0], found[1]))
            hidden = run_layer(decoder, content, hidden, self.calibration.lengths, 128)
        return largest, heads, best

    def search(self, largest: list[Pair]) -> tuple[float, list[list[float]]]:
        """The least KL that scales within an octave of the largest magnitude's give, one scale varied at a time, and
        their factors: chosen on the tokens that judge, so no calibration can do better by as much."""
        factors = [[1.0, 1.0] for _ in largest]

        def kl() -> float:
            scales: list[Pair | None] = [
                (key * by_key, value * by_value)
                for (key, value), (by_key, by_value) in zip(largest, factors, strict=True)
            ]
            return self.kl(scales)

        least = kl()
        for own in factors:
            for place in range(2):
                for step in range(-3, 5):
                    before, own[place] = own[place], 2.0 ** (step / 4)
                    if (now := kl()) < least:
                        least = now
                    else:
                        own[place] = before
        return least, factors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=96)
    parser.add_argument("--sequence-length", type=int, default=256)
    options = parser.parse_args()
    model = Model(options.model, options.samples, options.held_out, options.sequence_length)
    largest, heads, best = model.calibrate()
    zero = torch.zeros(())
    whole: list[Pair | None] = [*largest]
    print(f"largest magnitude / 448: KL {model.kl(whole):.5f}")
    print(f"the same, keys alone: KL {model.kl([(key, zero) for key, _ in largest]):.5f}")
    print(f"the same, values alone: KL {model.kl([(zero, value) for _, value in largest]):.5f}")
    print(f"a scale per head: KL {model.kl([*heads]):.5f}", flush=True)
    chosen: list[Pair | None] = [
        (key * by_key, value * by_value) for (key, value), (by_key, by_value) in zip(largest, best, strict=True)
    ]
    named = ", ".join(f"{by_key:.3g}/{by_value:.3g}" for by_key, by_value in best)
    print(f"best for each layer's attention output ({named}): KL {model.kl(chosen):.5f}", flush=True)
    least, found = model.search(largest)
    named = ", ".join(f"{by_key:.3g}/{by_value:.3g}" for by_key, by_value in found)
    print(f"best for the judged KL itself ({named}): KL {least:.5f}", flush=True)
    for factor in FACTORS:
        print(f"times {factor:.4g}: KL {model.kl([(k * factor, v * factor) for k, v in largest]):.5f}", flush=True)


if __name__ == "__main__":
    main()
