"""How much memory quantizing a layer takes, before anything is read."""

from __future__ import annotations

from dataclasses import dataclass

# Tokens of a batch that a gradient goes through, where a sequence has not more, and logits at one time.
FISHER_BATCH, LOGITS = 4096, 2**26


@dataclass(frozen=True)
class Peaks:
    """Most memory that something takes, in bytes, beyond the process itself."""

    host: int
    device: int

    def at_least(self, needed: int, gpu: bool) -> Peaks:
        """The same where something before it needs so much, on a GPU or on the host."""
        return Peaks(self.host if gpu else max(self.host, needed), max(self.device, needed) if gpu else self.device)


def awq_memory(
    layer: int,
    shard: int,
    hidden_states: int,
    budget: int,
    gpu: bool,
    compensated: bool = False,
    ranks: int = 1,
    top_k: int = 0,
) -> Peaks:
    """Peaks of the awq stage, on each of some ranks.

    Args:
        layer: bytes of the widest decoder layer in bf16.
        shard: bytes of the largest output shard.
        hidden_states: elements, calibration tokens times hidden size.
        budget: bytes that the search may work with; small models stay far below it.
        gpu: the search runs on a GPU, not on the host.
        compensated: rounding compensates errors. It takes half of the budget, and keeps the experts twice as they may
            be stored, with and without smoothing.
        ranks: how many share the experts.
        top_k: of several ranks: experts a token.
    """
    layer, shard = layer // ranks, shard // ranks
    # bf16 hidden states, residual stream and block input; fp32 reference and output; the packed layer being written.
    working = layer + shard + 6 * hidden_states + 8 * hidden_states // ranks
    if ranks > 1:
        # Rows that are sent and rows that arrive, in bf16, of the largest share: half of the tokens.
        working += 2 * top_k * hidden_states // ranks
    kept = 2 * shard if compensated else 0
    searching = min(budget, 4 * (layer + hidden_states))
    if not gpu:
        return Peaks(working + kept + searching, 0)
    # On a GPU the search is seen to take three tenths of its budget, and the most is held after it: two packed layers,
    # one of which is being fetched, the block's input before and after smoothing, and outputs in bf16 as well.
    after = layer + 2 * shard + 18 * hidden_states + searching // 8
    share = 5 if compensated else 3
    return Peaks(working, max(working + kept + searching * share // 10, after))


def fisher_memory(
    layer: int,
    calibration: int,
    tokens: int,
    longest: int,
    hidden: int,
    inner: int,
    top_k: int,
    vocabulary: int,
    gpu: bool,
) -> int:
    """Bytes that weighing errors of the outputs takes at its peak, on each rank, where it computes.

    Args:
        layer: of the widest decoder layer in bf16, with all experts.
        calibration: tokens in all, whose hidden states wait.
        tokens: those that the gradient is of.
        longest: tokens of the longest sample.
        hidden, inner: widths of the model and of an expert.
    """
    # Hidden states, gradient, and what is made of them; the matrix, and what is added to it.
    states = 2 * calibration * hidden + 8 * tokens * hidden + 8 * hidden**2
    # Of each row gate and up, their product, its gradient and theirs in bf16 and fp32; inputs and gradients in bf16.
    # On the way back a token has one expert more, its router's runner-up.
    batch = max(FISHER_BATCH, longest) * ((top_k + 1) * (4 * hidden + 20 * inner) + 64 * hidden)
    head = vocabulary * hidden * (2 if gpu else 4) + 3 * 4 * max(LOGITS, vocabulary)
    return states + max(layer + batch, head)


def fisher_state(layers: int, tokens: int, hidden: int) -> int:
    """Bytes that the pass keeps on the disk, at most: every layer's output, two gradients, every layer's matrix."""
    return 2 * (layers + 2) * tokens * hidden + 4 * layers * hidden**2
