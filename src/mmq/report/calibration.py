"""What the calibration samples become, told: for `mmq calibration` and the model card."""

from __future__ import annotations

from collections import Counter
from typing import Any

from mmq.recipe import FileSamples, HubSamples, Recipe
from mmq.source.tokens import Sample, Tokens


def describe(recipe: Recipe, tokens: Tokens) -> dict[str, Any]:
    """What each source of the mix becomes, and the whole, as JSON."""
    settings = recipe.awq.calibration
    sources = []
    for index, source in enumerate(settings.files):
        own = [sample for sample in tokens.samples if sample.source == index]
        sources.append(_origin(recipe, source) | _measures(own, settings.sequence_length))
    return {
        "sequence_length": settings.sequence_length,
        "packing": False,
        "padding": False,
        "sources": sources,
        "total": _measures(tokens.samples, settings.sequence_length),
        "tokens_fingerprint": tokens.fingerprint(),
        "inputs_fingerprint": tokens.inputs,
    }


def _origin(recipe: Recipe, source: FileSamples | HubSamples) -> dict[str, Any]:
    if isinstance(source, HubSamples):
        is_folder = recipe.path(source.hub).is_dir()
        return {"kind": "hub", "folder": is_folder} | source.model_dump(exclude={"samples"})
    return {"kind": "file", "path": source.path}


def _measures(samples: list[Sample], window: int) -> dict[str, Any]:
    """Counts, and shares of the window of `sequence_length` tokens that samples fill."""
    filled = [sample.tokens / window for sample in samples]
    languages = Counter(sample.language for sample in samples if sample.language is not None)
    return {
        "samples": len(samples),
        "forms": dict(
            Counter(sample.form or ("messages" if sample.chat else "text") for sample in samples).most_common()
        ),
        "chat": sum(sample.chat for sample in samples),
        "text": sum(not sample.chat for sample in samples),
        "tokens": sum(sample.tokens for sample in samples),
        "tokens_cut": sum(sample.cut for sample in samples),
        "samples_cut": sum(sample.cut > 0 for sample in samples),
        "filled_mean": sum(filled) / len(filled),
        "filled_min": min(filled),
        "languages": dict(languages.most_common()),
    }
