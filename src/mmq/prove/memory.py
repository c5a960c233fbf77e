"""How much memory an evaluation takes, before anything is read."""

from __future__ import annotations

from mmq.prove.measures import HEAD_ELEMENTS
from mmq.quantize.decoder_layer import BATCH_TOKENS
from mmq.quantize.memory import Peaks


def eval_memory(
    layer: int,
    tokens: int,
    hidden: int,
    vocabulary: int,
    top_k: int,
    streams: int,
    budget: int,
    gpu: bool,
    ranks: int = 1,
) -> Peaks:
    """Peaks of an evaluation, on each of some ranks; with S = tokens * hidden:

        at a layer  = 2 * 2 S * streams + layer + 12 S + the larger of attention and experts
        attention   = 32 * hidden * the tokens of one call
        experts     = half of the budget, or 3 * 2 S * top_k + layer where that is less
        at the head = 2 S * streams + 8 * vocabulary * hidden + (24 * vocabulary + 6 * hidden) * the tokens of one call

    Every stream's states are there before a layer and after it, in bf16. The stream at work has its residual and the
    experts' input in bf16, their outputs' sum in fp32 and in bf16, and its result. Attention takes about sixteen
    vectors of a token. The routed rows - their inputs, what is between gate and down, their outputs - and the weights
    of a step take half of the budget at most. The head is there in fp32, and in bf16 for as long as the other
    checkpoint's is compared with it; then the source's log-probabilities are, a stream's, what of them is summed, the
    same in fp64, and as much as one of them to spare.

    Args:
        layer: bytes of the widest decoder layer in bf16.
        streams: models that go through the layers at one time.
        budget: bytes of working memory.
        gpu: it is computed on a GPU, from which states come to the host on their way to the disk.
        ranks: how many share the experts and the tokens.
    """
    states, routed = tokens * hidden, 2 * tokens * hidden * top_k // ranks
    held = 2 * states * streams
    attention = 32 * hidden * min(tokens, BATCH_TOKENS)
    experts = min(budget // 2, 3 * routed + layer // ranks)
    if ranks > 1:
        # Rows that arrive, and all tokens' outputs as the ranks give them.
        experts += routed + 2 * states
    at_layer = 2 * held + layer // ranks + 12 * states + max(attention, experts)
    rows = min(tokens, max(1, HEAD_ELEMENTS // vocabulary))
    at_head = held + 8 * vocabulary * hidden + (24 * vocabulary + 6 * hidden) * rows
    peak = max(at_layer, at_head)
    return Peaks(held, peak) if gpu else Peaks(peak, 0)
