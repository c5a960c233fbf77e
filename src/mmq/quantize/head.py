"""Final norm and head: from the last hidden states to predictions, and back."""

from __future__ import annotations

from typing import Any

import torch

from mmq.families.table import Architecture
from mmq.quantize.memory import LOGITS


class Head:
    """Final norm and head: hidden states to logits in fp32.

    Args:
        norm: the final norm's weight [H].
        head: [V, H].
    """

    def __init__(self, arch: Architecture, config: Any, norm: torch.Tensor, head: torch.Tensor) -> None:
        with torch.device("meta"):
            layer = arch.transformers_class(arch.layer_class)(config, 0)
        # The final norm is of the kind that the layers have.
        self.norm = layer.get_submodule(arch.module_name(arch.smooth_norm).removesuffix(".weight"))
        self.norm.weight = torch.nn.Parameter(norm, requires_grad=False)
        self.weight = head if head.device.type == "cuda" else head.float()

    @torch.no_grad()
    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """bfloat16 [n, H] -> float32 [n, V]; the logits are not rounded to bf16 on the way."""
        return self._log_probabilities(self.norm(hidden))

    def _log_probabilities(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cuda" and x.dtype == self.weight.dtype == torch.bfloat16:
            logits = torch.mm(x, self.weight.T, out_dtype=torch.float32)
        else:
            logits = x.float() @ self.weight.T.float()
        return logits.log_softmax(-1)

    @torch.no_grad()
    def gradient(self, hidden: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """The gradient of -log p of the tokens that follow, summed, by the last hidden states [n, H]: [n, H].

        Args:
            following: int64 [n]; -1 where none follows.
        """
        parts = []
        step = max(1, LOGITS // self.weight.shape[0])
        for states, tokens in zip(hidden.split(step), following.split(step), strict=True):
            with torch.enable_grad():
                leaf = states.detach().requires_grad_()
                x = self.norm(leaf)
            by_logits = self._log_probabilities(x.detach()).exp_()
            known = (tokens >= 0).unsqueeze(1)
            by_logits.scatter_add_(1, tokens.clamp(min=0).unsqueeze(1), -torch.ones_like(by_logits[:, :1]))
            by_logits.mul_(known)
            by_x = by_logits.to(self.weight.dtype) @ self.weight
            parts += torch.autograd.grad(x, leaf, by_x.to(x.dtype))
        return torch.cat(parts)
