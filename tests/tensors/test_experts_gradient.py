"""A choice of experts that may tip: the values as they are, the gradient of the mean over what tips it."""

from __future__ import annotations

import math

import pytest
import torch

from mmq.tensors.experts_gradient import ERRING, contested

LENGTH, EXPERTS, K = 12, 7, 3


def routed(score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights and choices [T, k], sorted by expert, and who is next [T, 1]."""
    best = score.detach().topk(K + 1)
    index = best.indices[:, :K].sort(1).values
    weight = score.sigmoid().gather(1, index)
    return weight / weight.sum(1, keepdim=True), index, best.indices[:, K:]


def test_the_gradient_is_that_of_a_mean_over_errors() -> None:
    torch.manual_seed(0)
    score, worth = torch.randn(2 * LENGTH, EXPERTS, requires_grad=True), torch.randn(2 * LENGTH, EXPERTS)
    weight, index, runner_up = routed(score)
    # What choosing is worth, apart from what the weights' own gradient is.
    weight = weight.detach()
    more, choices = contested(score, weight, index, runner_up, LENGTH)
    assert torch.equal(choices, choices.sort(1).values) and choices.shape == (2 * LENGTH, K + 1)
    assert torch.equal(
        torch.zeros_like(score).scatter(1, choices, more), torch.zeros_like(score).scatter(1, index, weight)
    )
    (found,) = torch.autograd.grad((more * worth.gather(1, choices)).sum(), score)
    best = score.detach().sort(1, descending=True)
    margin = (best.values[:, K - 1] - best.values[:, K]).double()
    for token in range(2 * LENGTH):
        first = token // LENGTH * LENGTH
        errs = float(margin[first : first + LENGTH].mean()) * ERRING
        last, after = best.indices[token, K - 1 : K + 1].tolist()
        share = float(weight[token, index[token].tolist().index(last)])

        def mean(m: float, errs: float = errs, token: int = token, last: int = last, after: int = after) -> float:
            tipped = 0.5 * math.erfc(m / errs / math.sqrt(2))
            return float(worth[token, last]) * (1 - tipped) + float(worth[token, after]) * tipped

        own, step = float(margin[token]), 1e-4 * errs
        slope = share * (mean(own + step) - mean(own - step)) / (2 * step)
        wanted = torch.zeros(EXPERTS)
        wanted[last], wanted[after] = slope, -slope
        assert torch.allclose(found[token], wanted, rtol=1e-3, atol=1e-5), token
    assert found.abs().max() > 0.1


@pytest.mark.parametrize("broken", ["all equal", "no numbers", "one token's are no numbers"])
def test_of_odd_scores_no_other_token_learns_anything(broken: str) -> None:
    torch.manual_seed(1)
    score = torch.randn(LENGTH, EXPERTS)
    weight, index, runner_up = routed(score)
    if broken == "all equal":
        score = torch.zeros_like(score)
    else:
        score[0 if broken == "one token's are no numbers" else slice(None)] = torch.nan
    score.requires_grad_()
    more, choices = contested(score, weight, index, runner_up, LENGTH)
    (found,) = torch.autograd.grad((more * torch.rand(LENGTH, K + 1)).sum(), score)
    if broken == "all equal":
        assert not found.any()
    elif broken == "one token's are no numbers":
        assert torch.isfinite(found[1:]).all() and torch.isfinite(more[1:]).all() and found[1:].any()
    assert torch.equal(choices, torch.cat([index, runner_up], 1).sort(1).values)
