"""Which of two ways of computing the same is taken."""

from __future__ import annotations

import torch

# Numbers at one time from which on the second that a function takes to compile is well spent.
COMPILED_FROM = 2**18


def worth_compiling(tensor: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether a function of `compiled` is the faster way. Where it is not, the module need not be imported, which
    takes a second as well."""
    return tensor.device.type == "cpu" and tensor.dtype == dtype and tensor.numel() >= COMPILED_FROM
