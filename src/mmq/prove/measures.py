"""What eval measures: perplexity, KL divergence, top-1 agreement, the error of hidden states."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mmq.machine.team import ALONE, Team
from mmq.quantize.fisher import following
from mmq.quantize.head import Head
from mmq.source.tokens import Tokens

# Logits computed at one time; a few tensors of this many float32 are alive together.
HEAD_ELEMENTS = 2**25
# exp of more would not fit into a float.
LARGEST_LOSS = 700.0


def relative_error(hidden: torch.Tensor, truth: torch.Tensor) -> float:
    """||hidden - truth|| / ||truth|| of [T, H]."""
    difference = torch.linalg.vector_norm(hidden.float() - truth.float(), dtype=torch.float64)
    return float(difference / torch.linalg.vector_norm(truth.float(), dtype=torch.float64))


def other_experts(choices: torch.Tensor, truth: torch.Tensor) -> float:
    """The share of a router's choices, int64 [T, k], that are none of the same token's true ones."""
    return 1 - float((choices.unsqueeze(2) == truth.unsqueeze(1)).any(2).double().mean())


def predictions(tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions that have a next token in their sample, and that token: int64 [P] each."""
    after = following(tokens.ids, tokens.lengths)
    positions = (after >= 0).nonzero().flatten()
    return positions, after[positions]


@dataclass(frozen=True)
class Measured:
    """What was measured of a variant: sums over each sample's predicted tokens.

    Attributes:
        count, agreed: int64 [S], predicted tokens, and those whose most likely next token is the source's.
        loss, kl: float64 [S], negative log-likelihood and KL divergence from the source, in nats.
    """

    count: torch.Tensor
    agreed: torch.Tensor
    loss: torch.Tensor
    kl: torch.Tensor

    def of(self, samples: list[int]) -> Measured:
        """Some of the samples."""
        return Measured(self.count[samples], self.agreed[samples], self.loss[samples], self.kl[samples])

    def metrics(self) -> dict[str, float | None]:
        """Means over tokens, and how sure the mean KL is; see `standard_error`."""
        count = int(self.count.sum())
        loss = float(self.loss.sum()) / count
        return {
            "negative_log_likelihood": loss,
            "perplexity": math.exp(min(loss, LARGEST_LOSS)),
            "kl": float(self.kl.sum()) / count,
            "kl_standard_error": standard_error(self.kl, self.count),
            "top1_agreement": float(self.agreed.sum()) / count,
        }


def standard_error(sums: torch.Tensor, counts: torch.Tensor) -> float | None:
    """Of a mean over tokens that come in samples: tokens of one text are alike, so samples are what was drawn.

    Args:
        sums: float64 [S], of each sample's tokens.
        counts: int64 [S].

    Returns:
        sqrt(S / (S - 1) * sum of (k_s - m n_s)^2) / N, with m the mean and N all tokens; None for a single sample.

    Source: the ratio estimator's error in cluster sampling (Cochran, Sampling Techniques, section 9A.2).
    """
    samples = sums.numel()
    if samples < 2:
        return None
    rest = sums - sums.sum() / counts.sum() * counts
    return float((rest.square().sum() * samples / (samples - 1)).sqrt() / counts.sum())


def measure(
    hidden: dict[str, torch.Tensor], heads: dict[str, Head], truth: str, tokens: Tokens, team: Team = ALONE
) -> dict[str, Measured]:
    """What is predicted by each variant, sample by sample; samples of one token predict nothing. Each rank looks at its
    part of the tokens.

    Args:
        hidden: bfloat16 [T, H] after the last layer, by variant.
        heads: of each variant.
        truth: the variant that the others are compared with.
    """
    positions, following = predictions(tokens)
    owner = torch.repeat_interleave(torch.tensor(tokens.lengths) - 1)
    device = hidden[truth].device
    positions, following = positions.to(device), following.to(device)
    parts: dict[str, list[torch.Tensor]] = {variant: [] for variant in hidden}
    step = max(1, HEAD_ELEMENTS // heads[truth].weight.shape[0])
    chunks = list(zip(positions.split(step), following.split(step), strict=True))
    shares = [sum(len(chunks[number][0]) for number in part) for part in team.parts(len(chunks))]
    for where, wanted in (chunks[number] for number in team.part(len(chunks))):
        expected = heads[truth].log_probabilities(hidden[truth][where])
        for variant, states in hidden.items():
            found = expected if variant == truth else heads[variant].log_probabilities(states[where])
            loss = found.gather(1, wanted.unsqueeze(1)).squeeze(1).neg()
            kl = (expected.exp() * (expected - found)).sum(1, dtype=torch.float64)
            agreed = found.argmax(-1) == expected.argmax(-1)
            parts[variant].append(torch.stack([loss.double(), kl, agreed.double()], 1))
    count = torch.bincount(owner, minlength=len(tokens.lengths))
    result = {}
    for variant, own in parts.items():
        none = torch.empty(0, 3, dtype=torch.float64, device=device)
        found = team.gather(torch.cat([none, *own]), shares).cpu().T
        # On the host, so that the sums have one order.
        sums = torch.zeros(3, len(tokens.lengths), dtype=torch.float64).index_add_(1, owner, found)
        result[variant] = Measured(count, sums[2].long(), sums[0], sums[1])
    return result
