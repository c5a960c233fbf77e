"""How long ranks take for a layer, and what they send each other: a model, from parts that were measured on one GPU.

docs/scaling.md has the arithmetic in words. Bytes are exact; seconds are those of a card as fast as the one that the
parts were measured on, and assume that exchanges run beside the products, as they do but for each pass's last batch.
"""

from __future__ import annotations

from dataclasses import dataclass

# One H200: a layer of 131,072 tokens, 8 experts each, 3072 x 1536, by scripts/gpu_check.py.
TOKENS, HIDDEN, INNER, TOP_K = 131_072, 3072, 1536, 8
EXPERTS_SECONDS, ATTENTION_SECONDS = 0.59, 0.08
# What every rank does for itself beside these, by arithmetic: the router's fp32 product (0.2 TFLOP), sorting rows,
# a few passes of the norm and of means over the tokens.
REPLICATED_SECONDS = 0.01
# Passes over all tokens whose outputs are exchanged: the reference, the search's, smoothing against none, as served.
PASSES = 6
# Of a pass, what nothing hides: the last of its batches.
UNHIDDEN = 1 / 4
# How much more rows than on average the experts of a rank get.
IMBALANCE = 1.1
# Bytes a second that a GPU sends, by what connects it with the others.
LINKS = {"NVLink": 200e9, "PCIe 4": 20e9}


@dataclass(frozen=True)
class RankCosts:
    """One rank's part of a layer.

    Attributes:
        exchanged: bytes of routed outputs that it sends, in all passes.
        gathered: bytes of the hidden states that it sends, after attention and after the experts.
        seconds: for the layer, by link.
    """

    exchanged: int
    gathered: int
    seconds: dict[str, float]


def rank_costs(tokens: int, hidden: int, inner: int, top_k: int, ranks: int) -> RankCosts:
    """A layer's costs on one of so many ranks.

    Args:
        tokens: of the calibration.
        inner: width of a routed expert.
        top_k: experts a token.
    """
    others = ranks - 1
    # bf16 rows: of a rank's experts, those of tokens that another rank sums up.
    exchanged = PASSES * tokens * top_k * hidden * 2 * others // ranks**2
    # A ring's: each rank's part goes to all others.
    gathered = 2 * tokens * hidden * 2 * others // ranks
    work = tokens * top_k * hidden * inner / (TOKENS * TOP_K * HIDDEN * INNER)
    experts = EXPERTS_SECONDS * work / ranks * (IMBALANCE if others else 1)
    attention = ATTENTION_SECONDS * tokens * hidden**2 / (TOKENS * HIDDEN**2) / ranks
    replicated = REPLICATED_SECONDS * tokens * hidden / (TOKENS * HIDDEN)
    seconds = {}
    for link, rate in LINKS.items():
        sending = exchanged / rate
        hidden_by_products = min(sending * (1 - UNHIDDEN), experts)
        seconds[link] = replicated + attention + experts + sending - hidden_by_products + gathered / rate
    return RankCosts(exchanged, gathered, seconds)
