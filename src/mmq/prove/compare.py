"""Results of one source on the same held-out samples: which is nearer to the source, and how sure that is.

Samples are the pairs: what makes a text's KL large makes it large for both, and tokens of one text are alike.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmq.errors import JournalError
from mmq.prove.evaluate import HYBRID_FP8_KV, HYBRID_MODEL

COMPARISON_NAME = "comparison.json"
FLIPS = 9999
# Of a normal distribution, 95 % lie within so many standard errors.
WITHIN = 1.96


def compared(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The variants of the results themselves that both evaluations have: with and without the fp8 cache."""
    names = [entry["variant"] for entry in other["variants"]]
    return [entry["variant"] for entry in one["variants"] if "hybrid" in entry["variant"] and entry["variant"] in names]


def compare(one: dict[str, Any], other: dict[str, Any], variant: str, rival: str | None = None) -> dict[str, Any]:
    """A variant of two evaluations, or two variants.

    Args:
        one, other: contents of eval.json.
        variant: of `one`, and of `other` unless `rival` is given.

    Returns:
        JSON: both KLs, the mean difference per token (one less other), its standard error over samples, the interval
        that holds it in 95 of 100 cases, and p, the share of random exchanges of the two within samples after which
        the difference is as large as it is.

    Raises:
        JournalError: they are of other samples or of another source, or were made before samples were kept.
    """
    for report in (one, other):
        if "samples" not in report or "source_fingerprint" not in report["settings"]:
            raise JournalError("an evaluation has no figures of its samples; run `mmq eval --restart` to have them")
    for what, values in (
        ("samples", [report["tokens"]["fingerprint"] for report in (one, other)]),
        ("source", [report["settings"]["source_fingerprint"] for report in (one, other)]),
    ):
        if values[0] != values[1]:
            raise JournalError(f"the two evaluations are not of the same {what}, so they say nothing of each other")
    predicting = [[sample for sample in report["samples"] if sample["tokens"]] for report in (one, other)]
    counts = np.array([sample["tokens"] for sample in predicting[0]], dtype=np.float64)
    sums = [
        np.array([sample["variants"][name]["kl"] * sample["tokens"] for sample in samples])
        for name, samples in zip((variant, rival or variant), predicting, strict=True)
    ]
    difference, total = sums[0] - sums[1], counts.sum()
    mean, samples = difference.sum() / total, len(difference)
    rest = difference - mean * counts
    error = float(np.sqrt(np.square(rest).sum() * samples / (samples - 1)) / total) if samples > 1 else None
    signs = np.random.default_rng(0).integers(0, 2, (FLIPS, samples)) * 2 - 1
    # The sum as it is counts as one of the exchanges; a hair of rounding is no difference.
    as_large = np.count_nonzero(np.abs(signs @ difference) >= abs(difference.sum()) * (1 - 1e-12))
    return {
        "variant": variant,
        "kl": [float(part.sum() / total) for part in sums],
        "difference": float(mean),
        "standard_error": error,
        "interval": None if error is None else [float(mean - WITHIN * error), float(mean + WITHIN * error)],
        "p": float((as_large + 1) / (FLIPS + 1)),
        "samples": samples,
        "nearer_in": int(np.count_nonzero(difference < 0)),
    }


def cache_share(report: dict[str, Any]) -> str | None:
    """What the fp8 KV cache adds to the experts' KL, in words; None where it was not evaluated.

    Args:
        report: content of eval.json.
    """
    kl, cache = {entry["variant"]: entry["kl"] for entry in report["variants"]}, HYBRID_FP8_KV.name
    if not {HYBRID_MODEL.name, cache} <= kl.keys() or "samples" not in report or not kl[cache]:
        return None
    found = compare(report, report, cache, HYBRID_MODEL.name)
    error = "" if found["standard_error"] is None else f" ± {found['standard_error']:.5f}"
    return f"the fp8 KV cache adds {found['difference']:.5f}{error} to the experts' KL of {kl[HYBRID_MODEL.name]:.5f}"


def sentence(result: dict[str, Any], one: str, other: str) -> str:
    """What the comparison says, in words."""
    kl, share = result["kl"], result["kl"][0] / result["kl"][1] if result["kl"][1] else float("nan")
    interval = result["interval"]
    within = "" if interval is None else f" (95 %: {interval[0]:+.5f} to {interval[1]:+.5f})"
    sure = "sure" if result["p"] < 0.05 else "not sure"
    return (
        f"{result['variant']}: KL {kl[0]:.5f} of {one}, {kl[1]:.5f} of {other}, ratio {share:.3f}; difference"
        f" {result['difference']:+.5f} a token{within}, p = {result['p']:.4f}, {sure};"
        f" nearer in {result['nearer_in']} of {result['samples']} samples"
    )
