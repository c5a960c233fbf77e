"""What errors of each block's output cost: second moments of the loss's gradients there, through the source and back.

With g the gradient of -log p of a text's next token by a layer's output, an error e of that output changes the loss by
about e^T E[g g^T] e / 2, the empirical Fisher information (as in YAQA, arXiv 2505.22988, with the text's own tokens in
place of drawn ones). One matrix a layer tells which errors of its experts matter to what comes after.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from mmq.machine.device import same_bits
from mmq.machine.team import Team
from mmq.quantize.decoder_layer import DecoderLayer, in_batches
from mmq.quantize.layer import LayerContent
from mmq.quantize.memory import FISHER_BATCH
from mmq.quantize.rounding import Fisher
from mmq.tensors.experts import second_moments
from mmq.tensors.experts_gradient import block_output, contested


def spread_samples(lengths: list[int], tokens: int) -> list[int]:
    """Which samples to take for at least so many tokens, as far apart as can be; all where there are not as many."""
    count = len(lengths)
    if sum(lengths) <= tokens:
        return list(range(count))
    for wanted in range(1, count):
        chosen = [place * count // wanted for place in range(wanted)]
        if sum(lengths[sample] for sample in chosen) >= tokens:
            return chosen
    return list(range(count))


def following(ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The token after each of int64 [T] in its sample; -1 after a sample's last."""
    result = torch.full_like(ids, -1)
    result[:-1] = ids[1:]
    result[torch.tensor(lengths).cumsum(0) - 1] = -1
    return result


class SourceLayer:
    """A layer of the source with all of its experts, forward and back, on bfloat16 [T, H] of concatenated sequences.

    Args:
        content: with all experts, on every rank.
    """

    def __init__(self, decoder: DecoderLayer, content: LayerContent, lengths: list[int], team: Team) -> None:
        self.decoder, self.content, self.lengths, self.team = decoder, content, lengths, team

    @torch.no_grad()
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's output [T, H]."""
        return in_batches(self._output, self.lengths, self.team, hidden, tokens=FISHER_BATCH)

    @torch.no_grad()
    def back(self, hidden: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient by the layer's input [T, H], given that by its output."""
        # transformers' linear attention takes running sums, of which torch has no deterministic form on a GPU.
        with nullcontext() if self.decoder.is_linear else same_bits(hidden.device):
            return in_batches(self._back, self.lengths, self.team, hidden, gradient, tokens=FISHER_BATCH)

    def _output(self, batch: torch.Tensor, contest: bool = False) -> torch.Tensor:
        """[B, T, H] -> [B, T, H]; of contested choices of the router the gradient knows."""
        decoder, content = self.decoder, self.content
        attended = decoder.attend_batch(batch)
        if not decoder.has_experts:
            return attended
        residual = attended.flatten(0, 1)
        x = decoder.block_input(residual)
        logits, weight, index = decoder.route(x)
        if contest and (runner_up := decoder.runner_up(x, index)) is not None:
            weight, index = contested(decoder.scores(logits), weight, index, runner_up, batch.shape[1])
        output = block_output(x, weight, index, content.gate_up, content.down, decoder.activation)
        return (decoder.add_shared(residual, x) + output.to(residual.dtype)).view_as(attended)

    def _back(self, batch: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            leaf = batch.requires_grad_()
            (result,) = torch.autograd.grad(self._output(leaf, contest=True), leaf, gradient)
        return result


def fisher(gradient: torch.Tensor) -> Fisher:
    """Of the rows of [T, H]; those that are no numbers count in no mean."""
    finite = gradient[torch.isfinite(gradient).all(1)]
    result = torch.zeros(1, gradient.shape[1], gradient.shape[1], dtype=torch.float32, device=gradient.device)
    for rows in finite.split(FISHER_BATCH):
        second_moments(rows, torch.tensor([len(rows)], dtype=torch.int32, device=gradient.device), result)
    norms = gradient.norm(dim=1, dtype=torch.float32)
    return Fisher(result[0] / max(1, len(finite)), norms.masked_fill_(~torch.isfinite(norms), torch.nan))
