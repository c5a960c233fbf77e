"""config.json's sizes that no decoder layer carries, against the tensors and each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.test_cli import refused, succeed
from conftest import edit_json
from storage.test_storage import edit_tensors

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Change = Callable[[Path], Any]


def config(**values: Any) -> Change:
    return lambda source: edit_json(source / "config.json", lambda content: content.update(values))


def generation(**values: Any) -> Change:
    return lambda source: (source / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")


def tensors(change: Callable[[dict[str, Any]], Any]) -> Change:
    return lambda source: edit_tensors(source, change)


def rows(name: str, count: int) -> Change:
    return tensors(lambda all_: all_.update({name: all_[name][:count].clone()}))


REFUSED: dict[str, tuple[Change, str]] = {
    "a larger vocabulary": (config(vocab_size=513), f"vocab_size is 513, but {EMBEDDING} has 512 rows"),
    "no vocabulary": (config(vocab_size=None), "vocab_size is None"),
    "fewer embeddings": (rows(EMBEDDING, 500), f"vocab_size is 512, but {EMBEDDING} has 500 rows"),
    "a smaller head": (rows(HEAD, 500), f"vocab_size is 512, but {HEAD} has 500 rows"),
    "tied, with a head": (config(tie_word_embeddings=True), f"tie_word_embeddings is true, but the shards hold {HEAD}"),
    "no head": (tensors(lambda all_: all_.pop(HEAD)), f"tie_word_embeddings is false, but the shards lack {HEAD}"),
    "tied in words": (config(tie_word_embeddings="no"), "tie_word_embeddings is 'no' instead of true or false"),
    "no final norm": (tensors(lambda all_: all_.pop(NORM)), f"{NORM} is missing"),
    "a norm of negative numbers": (config(rms_norm_eps=-1.5), "rms_norm_eps is -1.5 instead of a number from 0 to 1"),
    "no number": (config(rms_norm_eps="1e-6"), "rms_norm_eps is '1e-6' instead of a number from 0 to 1"),
    "no positions": (config(max_position_embeddings=0), "max_position_embeddings is 0 instead of a positive number"),
    "an end beyond the embeddings": (config(eos_token_id=512), "eos_token_id is 512, the embeddings have 512 rows"),
    "one of several ends": (config(eos_token_id=[2, 200020]), "eos_token_id is 200020, the embeddings have 512 rows"),
    "padding beyond them": (config(pad_token_id=10**30), "pad_token_id is 1000000000000000000000000000000"),
    "a beginning in words": (config(bos_token_id="<s>"), "bos_token_id is '<s>' instead of a token's number"),
    "generation's end": (generation(eos_token_id=[2, 600]), "generation_config.json: eos_token_id is 600"),
}


@pytest.mark.parametrize("fault", REFUSED)
@pytest.mark.parametrize("command", ["dequant", "run"])
def test_sizes_that_disagree_are_refused(project: Path, fault: str, command: str) -> None:
    change, message = REFUSED[fault]
    change(project / "source")
    assert message in refused(command, project / "recipe.yaml")
    assert not (project / "run" / "bf16").exists()


def test_what_models_have_is_taken(project: Path) -> None:
    """Several ends, no padding or -1 for it, and flags for generation that transformers would refuse to write."""
    source = project / "source"
    config(eos_token_id=[2, 511], pad_token_id=-1, bos_token_id=None)(source)
    generation(eos_token_id=[2, 511], temperature=1.0, top_p=0.95, do_sample=False)(source)
    succeed("run", project / "recipe.yaml", "--quiet", "--set", "awq.source=fp8")
    name = "generation_config.json"
    assert (project / "run/hybrid" / name).read_bytes() == (source / name).read_bytes()


def test_a_tied_model_is_taken_and_evaluated(project: Path) -> None:
    tensors(lambda all_: all_.pop(HEAD))(project / "source")
    config(tie_word_embeddings=True)(project / "source")
    recipe = project / "recipe.yaml"
    succeed("run", recipe, "--quiet", "--set", "awq.source=fp8")
    succeed("eval", recipe, "--quiet", "--set", "awq.source=fp8", "--samples", "2", "--sequence-length", "32")
