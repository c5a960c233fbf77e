#!/usr/bin/env python3
"""Train a MiniMax-M2 in small and write it as a block-fp8 checkpoint: a model whose perplexity means something.

    python scripts/train_tiny.py FOLDER                        # the model that `mmq synth --trained` gives
    python scripts/train_tiny.py FOLDER --seed 1 --text DIR    # another one, of other text
    python scripts/train_tiny.py FOLDER --experts 12 --intermediate 256    # of twice the width

The text is the running Python's standard library (sources and pydoc's topics) and the repository's calibration data,
never eval.jsonl; one file in forty is held out. The same seed, text, Python and torch give the same bytes. The folder
holds the checkpoint, `heldout.jsonl`, `calibration.jsonl` and a card with what was measured.

The router is balanced as the family's is: no auxiliary loss, but a bias that moves against an expert's load
(arXiv 2408.15664).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import platform
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from mmq.families.minimax_m2 import MINIMAX_M2 as ARCH
from mmq.source.synth import Sizes, model_config, quantize_block, save_checkpoint, write_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SIZES = Sizes(layers=3, hidden=256, intermediate=128, experts=16, heads=4, kv_heads=2, head_dim=64, vocabulary=1024)
WINDOW, BATCH = 256, 8
LEARNING_RATE, WARM_UP, BALANCE = 3e-3, 100, 0.002
LARGEST_FILE, ONE_HELD_OUT_IN = 2**17, 40
HELD_OUT_SAMPLES, CALIBRATION_SAMPLES = 96, 256
WHAT = "A MiniMax-M2 in small, trained to measure quantization on: it knows some Python and writes none worth reading."


# ------------------------------------------------------------------------------------------------ text


def documents(folder: Path, chats: Path | None) -> Iterator[tuple[str, str]]:
    """Name and text of every document, in one order on every machine that has the same files."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.suffix not in (".py", ".txt", ".rst") or {"site-packages", "__pycache__"} & {*parts}:
            continue
        if path.is_file() and 256 < path.stat().st_size < LARGEST_FILE:
            try:
                yield "/".join(parts), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
    for name in ("code", "multilingual", "reasoning", "diverse") if chats else ():
        for number, line in enumerate((chats / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()):
            messages = json.loads(line)["messages"]
            yield f"{name}/{number}", "".join(f"]~b]{m['role']}\n{m['content']}[e~[\n" for m in messages)


def held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % ONE_HELD_OUT_IN == 0


def windows(tokenizer: Tokenizer, texts: list[str], chooser: random.Random, count: int) -> list[str]:
    """Pieces of documents drawn by chance, each at least WINDOW tokens long, as text."""
    result = []
    for text in chooser.sample(texts, len(texts)):
        encoding = tokenizer.encode(text)
        if len(encoding.ids) >= WINDOW + 8:
            start = chooser.randrange(len(encoding.ids) - WINDOW - 7)
            piece = text[encoding.offsets[start][0] : encoding.offsets[start + WINDOW + 7][1]]
            if len(tokenizer.encode(piece).ids) >= WINDOW:
                result.append(piece)
        if len(result) == count:
            break
    return result


# ------------------------------------------------------------------------------------------------ model


class Model(torch.nn.Module):
    """fp32 parameters by their names in the checkpoint, dots as slashes; experts stacked until they are written."""

    def __init__(self, sizes: Sizes, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        s, self.sizes = sizes, sizes
        query, key = s.heads * s.head_dim, s.kv_heads * s.head_dim

        def weight(*shape: int, gain: float = 1.0) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, generator=generator) * gain * shape[-1] ** -0.5)

        def ones(width: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.ones(width))

        self.embedding = torch.nn.Parameter(torch.randn(s.vocabulary, s.hidden, generator=generator) * 0.02 * 8)
        self.head, self.final_norm = weight(s.vocabulary, s.hidden), ones(s.hidden)
        deep = (2 * s.layers) ** -0.5
        self.layers = torch.nn.ModuleList()
        for _ in range(s.layers):
            layer = torch.nn.Module()
            layer.norm, layer.smooth_norm = ones(s.hidden), ones(s.hidden)
            layer.q, layer.k, layer.v = weight(query, s.hidden), weight(key, s.hidden), weight(key, s.hidden)
            layer.o = weight(s.hidden, query, gain=deep)
            layer.q_norm, layer.k_norm = ones(query), ones(key)
            layer.router = weight(s.experts, s.hidden)
            layer.register_buffer("bias", torch.full((s.experts,), 8.0))
            layer.gate, layer.up = (weight(s.experts, s.intermediate, s.hidden) for _ in range(2))
            layer.down = weight(s.experts, s.hidden, s.intermediate, gain=deep)
            self.layers.append(layer)
        half = s.head_dim // 4
        frequencies = 5e6 ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = torch.arange(WINDOW, dtype=torch.float32)[:, None] * frequencies
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.loads = [torch.zeros(s.experts)] * s.layers

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [B, T] -> logits [B, T, V]."""
        x = self.embedding[ids]
        for number, layer in enumerate(self.layers):
            x = x + self._attention(layer, rms_norm(x, layer.norm))
            y = rms_norm(x, layer.smooth_norm)
            x = x + self._experts(number, layer, y.flatten(0, 1)).view_as(x)
        return rms_norm(x, self.final_norm) @ self.head.T

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        half, length = self.cos.shape[1], x.shape[2]
        cos, sin = self.cos[:length], self.sin[:length]
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)

    def _attention(self, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        s, (batch, length, _) = self.sizes, x.shape
        query, key, value = x @ layer.q.T, x @ layer.k.T, x @ layer.v.T
        query, key = rms_norm(query, layer.q_norm), rms_norm(key, layer.k_norm)
        query, key, value = (t.view(batch, length, -1, s.head_dim).transpose(1, 2) for t in (query, key, value))
        query, key = self._rotate(query), self._rotate(key)
        key, value = (t.repeat_interleave(s.heads // s.kv_heads, 1) for t in (key, value))
        out = F.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value, is_causal=True)
        return out.transpose(1, 2).flatten(2) @ layer.o.T

    def _experts(self, number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            scores = (x.float() @ layer.router.T).sigmoid()
        index = (scores.detach() + layer.bias).topk(self.sizes.top_k, -1).indices
        share = scores.gather(1, index)
        share = share / share.sum(-1, keepdim=True)
        order = index.flatten().argsort(stable=True)
        token = order // self.sizes.top_k
        counts = torch.bincount(index.flatten(), minlength=self.sizes.experts)
        self.loads[number] = counts.float()
        parts = []
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
        stacks = [x.to(dtype)[token].split(counts.tolist()), *(w.to(dtype) for w in (layer.gate, layer.up, layer.down))]
        for rows, gate, up, down in zip(*stacks, strict=True):
            parts.append((F.silu(rows @ gate.T) * (rows @ up.T)) @ down.T)
        outputs = torch.cat(parts) * share.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, token, outputs.to(x.dtype))

    @torch.no_grad()
    def balance(self) -> None:
        """Move each router's bias against the load of the last batch."""
        for layer, load in zip(self.layers, self.loads, strict=True):
            layer.bias += BALANCE * (load.mean() - load).sign()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The checkpoint: fp8 in 128x128 blocks, fp32 router and bias, bf16 for the rest."""
        result = {ARCH.embedding: self.embedding.bfloat16()}

        def fp8(name: str, weight: torch.Tensor) -> None:
            result[f"{name}.weight"], result[f"{name}.weight_scale_inv"] = quantize_block(weight)

        for number, layer in enumerate(self.layers):
            prefix = ARCH.layer_prefix(number)
            for name, weight in zip(ARCH.attention, (layer.q, layer.k, layer.v, layer.o), strict=True):
                fp8(prefix + name, weight)
            for name in ("q_norm", "k_norm"):
                result[f"{prefix}self_attn.{name}.weight"] = getattr(layer, name).bfloat16()
            result[f"{prefix}input_layernorm.weight"] = layer.norm.bfloat16()
            result[prefix + ARCH.smooth_norm] = layer.smooth_norm.bfloat16()
            result[prefix + ARCH.router] = layer.router.clone()
            result[prefix + ARCH.router_bias] = layer.bias.clone()
            for expert in range(self.sizes.experts):
                for name, stack in ((ARCH.gate, layer.gate), (ARCH.up, layer.up), (ARCH.down, layer.down)):
                    fp8(ARCH.expert_weight(number, expert, name), stack[expert])
        result[ARCH.final_norm], result[ARCH.head] = self.final_norm.bfloat16(), self.head.bfloat16()
        return {name: tensor.detach().contiguous() for name, tensor in result.items()}


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


# ------------------------------------------------------------------------------------------------ training


def train(model: Model, ids: torch.Tensor, check: torch.Tensor, steps: int, seed: int) -> None:
    """AdamW with a linear decay; every window of the text once, in random order, before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    order = torch.empty(0, dtype=torch.int64)
    begin = time.perf_counter()
    for step in range(steps):
        if order.numel() < BATCH:
            order = torch.cat([order, torch.randperm(len(ids), generator=generator)])
        batch, order = ids[order[:BATCH]], order[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / WARM_UP, 1 - step / steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.balance()
        if step % 100 == 99 or step == steps - 1:
            seconds = time.perf_counter() - begin
            load = torch.stack(model.loads)
            spread = float(load.max() / load.mean())
            held = f" held out {evaluate(model, check[:16]):.3f}" if step % 500 == 499 else ""
            print(
                f"step {step + 1} loss {float(loss.detach()):.3f}{held} load {spread:.2f} {seconds:.0f} s", flush=True
            )


@torch.no_grad()
def evaluate(model: Model, ids: torch.Tensor) -> float:
    """Mean loss on int64 [N, T], in fp32."""
    losses = []
    for batch in ids.split(16):
        logits = model(batch)[:, :-1].flatten(0, 1)
        losses.append(F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="none"))
    return float(torch.cat(losses).mean())


def card(
    settings: argparse.Namespace, s: Sizes, text: str, corpus: str, size: int, tokens: int, loss: float, load: float
) -> str:
    return f"""# A small trained MiniMax-M2

{WHAT}

Made by `scripts/train_tiny.py` with `--seed {settings.seed} --steps {settings.steps}`; not to be edited.

| | |
|---|---|
| architecture | `MiniMaxM2ForCausalLM` |
| sizes | {s.layers} layers, hidden {s.hidden}, {s.experts} experts of {s.intermediate}, top {s.top_k} |
| attention | {s.heads} heads of {s.head_dim}, {s.kv_heads} KV heads, half rotary |
| tokenizer | byte-level BPE of {s.vocabulary} tokens, trained on the same text |
| format | fp8 e4m3 in 128x128 blocks, fp32 router and bias, bf16 for the rest |
| text | {text}; {size:,} bytes |
| sha256 of the text | {corpus} |
| trained on | {tokens:,} tokens, windows of {WINDOW} |
| Python, torch | {platform.python_version()}, {torch.__version__.split("+")[0]} |
| perplexity of `heldout.jsonl` ({HELD_OUT_SAMPLES} x {WINDOW} tokens, fp32) | {math.exp(loss):.2f} |
| largest load of an expert there | {load:.2f} times the mean |

`heldout.jsonl` holds pieces of documents that were not trained on, `calibration.jsonl` pieces of those that were; both
are Python's own text (PSF licence) or calibration data of this repository (Apache-2.0).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2600, help=f"of {BATCH * WINDOW} tokens")
    parser.add_argument("--text", type=Path, help="a folder of text and sources, instead of the standard library")
    parser.add_argument("--layers", type=int, default=SIZES.layers)
    parser.add_argument("--experts", type=int, default=SIZES.experts)
    parser.add_argument("--intermediate", type=int, default=SIZES.intermediate, help="width of an expert")
    parser.add_argument("--vocabulary", type=int, default=SIZES.vocabulary, help="tokens of the BPE")
    settings = parser.parse_args()
    given = {name: getattr(settings, name) for name in ("layers", "experts", "intermediate", "vocabulary")}
    sizes = dataclasses.replace(SIZES, **given)
    torch.set_num_threads(1)
    source = settings.text or Path(sysconfig.get_paths()["stdlib"])
    texts = dict(documents(source, None if settings.text else ROOT / "calibration_data"))
    digest = hashlib.sha256("".join(f"{name}\0{text}\0" for name, text in texts.items()).encode()).hexdigest()
    training = [text for name, text in texts.items() if not held_out(name)]
    kept = [text for name, text in texts.items() if held_out(name)]
    size = sum(len(text.encode()) for text in texts.values())
    print(f"{len(texts)} documents, {size} bytes, sha256 {digest}", flush=True)
    settings.folder.mkdir(parents=True)
    chooser = random.Random(settings.seed)
    write_tokenizer(settings.folder, sizes.vocabulary, training)
    tokenizer = Tokenizer.from_file(str(settings.folder / "tokenizer.json"))
    stream = [token for part in tokenizer.encode_batch(chooser.sample(training, len(training))) for token in part.ids]
    ids = torch.tensor(stream[: len(stream) // WINDOW * WINDOW]).view(-1, WINDOW)
    print(f"{ids.numel()} tokens, {size / len(stream):.2f} bytes each", flush=True)
    samples = {
        "heldout.jsonl": windows(tokenizer, kept * 8, chooser, HELD_OUT_SAMPLES),
        "calibration.jsonl": windows(tokenizer, training, chooser, CALIBRATION_SAMPLES),
    }
    for name, pieces in samples.items():
        lines = (json.dumps({"text": piece}, ensure_ascii=False) + "\n" for piece in pieces)
        (settings.folder / name).write_text("".join(lines), encoding="utf-8")
    check = torch.tensor([tokenizer.encode(text).ids[:WINDOW] for text in samples["heldout.jsonl"]])
    model = Model(sizes, settings.seed)
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    train(model, ids, check, settings.steps, settings.seed)
    loss = evaluate(model, check)
    load = max(float(load.max() / load.mean()) for load in model.loads)
    print(f"held out: loss {loss:.4f}, perplexity {math.exp(loss):.2f}", flush=True)
    save_checkpoint(settings.folder, model.tensors(), model_config(sizes), shards=2)
    what = (
        f"{settings.text.name}" if settings.text else "Python's standard library and this repository's calibration data"
    )
    tokens = settings.steps * BATCH * WINDOW
    text = card(settings, sizes, what, digest, size, tokens, loss, load)
    (settings.folder / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
