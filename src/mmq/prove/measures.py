"""What eval measures: perplexity, KL divergence, top-1 agreement, the error of hidden states."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mmq.prove.forward import Head
from mmq.source.tokens import Tokens

# Logits computed at one time; a few tensors of this many float32 are alive together.
HEAD_ELEMENTS = 2**25
# exp of more would not fit into a float.
LARGEST_LOSS = 700.0


def relative_error(hidden: torch.Tensor, truth: torch.Tensor) -> float:
    """||hidden - truth|| / ||truth|| of [T, H]."""
    difference = torch.linalg.vector_norm(hidden.float() - truth.float(), dtype=torch.float64)
    return float(difference / torch.linalg.vector_norm(truth.float(), dtype=torch.float64))


def predictions(tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions that have a next token in their sample, and that token: int64 [P] each."""
    last = torch.tensor(tokens.lengths).cumsum(0) - 1
    keep = torch.ones_like(tokens.ids, dtype=torch.bool)
    keep[last] = False
    positions = keep.nonzero().flatten()
    return positions, tokens.ids[positions + 1]


@dataclass
class Sums:
    """Sums over predicted tokens, in float64."""

    loss: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    def add(self, found: torch.Tensor, truth: torch.Tensor, following: torch.Tensor) -> None:
        """Add a chunk: log-probabilities float32 [n, V] of the variant and of the source, next tokens int64 [n]."""
        self.loss -= float(found.gather(1, following.unsqueeze(1)).sum(dtype=torch.float64))
        self.kl += float((truth.exp() * (truth - found)).sum(dtype=torch.float64))
        self.agreed += int((found.argmax(-1) == truth.argmax(-1)).sum())

    def metrics(self, count: int) -> dict[str, float]:
        loss = self.loss / count
        return {
            "negative_log_likelihood": loss,
            "perplexity": math.exp(min(loss, LARGEST_LOSS)),
            "kl": self.kl / count,
            "top1_agreement": self.agreed / count,
        }


def measure(
    hidden: dict[str, torch.Tensor], heads: dict[str, Head], truth: str, tokens: Tokens
) -> dict[str, dict[str, float]]:
    """Metrics of each variant over all predicted tokens.

    Args:
        hidden: bfloat16 [T, H] after the last layer, by variant.
        heads: of each variant.
        truth: the variant that the others are compared with.
    """
    positions, following = predictions(tokens)
    device = hidden[truth].device
    positions, following = positions.to(device), following.to(device)
    sums = {variant: Sums() for variant in hidden}
    step = max(1, HEAD_ELEMENTS // heads[truth].weight.shape[0])
    for where, wanted in zip(positions.split(step), following.split(step), strict=True):
        expected = heads[truth].log_probabilities(hidden[truth][where])
        for variant, states in hidden.items():
            found = expected if variant == truth else heads[variant].log_probabilities(states[where])
            sums[variant].add(found, expected, wanted)
    return {variant: sums[variant].metrics(positions.numel()) for variant in hidden}
