"""What MiniMax-M3 alone has: a unit that clamps, attention that chooses blocks, settings under two kinds of keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.conftest import DEVICE
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts

from mmq.errors import CheckpointError
from mmq.families.minimax_m3_vl import MINIMAX_M3_VL
from mmq.families.registry import architecture_of
from mmq.families.sizes import Dimensions
from mmq.prove.weights import SourceWeights, read_layer
from mmq.quantize.decoder_layer import DecoderLayer, transformers_config
from mmq.serve.memory import kv_bytes_per_token
from mmq.source.model import SourceModel
from mmq.source.synth import STORED, Sizes, model_config, write_checkpoint
from mmq.storage.checkpoint import Checkpoint
from mmq.tensors.experts import ClampedGate, gated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clamped_gate_is_transformers(dtype: torch.dtype) -> None:
    x = (8 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))).to(dtype)
    before = x.clone()
    unit: Any = SimpleNamespace(swiglu_alpha=1.702, swiglu_limit=7.0)
    wanted = MiniMaxM3VLExperts._apply_gate(unit, x)
    assert float(wanted.abs().max()) > 7 and torch.equal(gated(x, ClampedGate(1.702, 7.0)), wanted)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(hidden_act="gelu"), "hidden_act is none of swigluoai, silu"),
        (lambda c: c.update(swiglu_limit="7"), "swiglu_limit is no positive number"),
        (lambda c: c.update(swiglu_limit=0), "swiglu_limit is no positive number"),
        (lambda c: c.update(swiglu_alpha=True), "swiglu_alpha is no positive number"),
        (lambda c: c.update(moe_layer_freq=[0]), "moe_layer_freq is no list of 0 or 1 for each layer"),
        (lambda c: c.update(moe_layer_freq="01"), "moe_layer_freq is no list of 0 or 1 for each layer"),
        (lambda c: c.update(moe_layer_freq=[0, 0]), "no layer has experts"),
        (lambda c: c.update(mlp_layer_types=["dense"]), "mlp_layer_types does not name the kind of each layer"),
        (
            lambda c: c["sparse_attention_config"].update(sparse_attention_freq=[0, 2]),
            "sparse_attention_freq is no list of 0 or 1",
        ),
        (lambda c: c["sparse_attention_config"].update(sparse_index_dim="64"), "index_head_dim is '64'"),
    ],
)
def test_settings_that_are_none_are_refused(change: Callable[[dict[str, Any]], Any], words: str) -> None:
    config = model_config(Sizes(), MINIMAX_M3_VL, STORED["bf16"])
    config["text_config"]["sparse_attention_config"] = dict(config["text_config"]["sparse_attention_config"])
    change(config["text_config"])
    with pytest.raises(CheckpointError, match=words):
        Dimensions.of(config, architecture_of(config))


def test_the_releases_keys_and_transformers_say_the_same() -> None:
    named = {
        "moe_layer_freq": None,
        "mlp_layer_types": ["dense", "sparse"],
        "sparse_attention_config": None,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_n_heads": 2,
        "index_head_dim": 64,
    }
    first, second = (model_config(Sizes(), MINIMAX_M3_VL, STORED["bf16"], more) for more in ({}, named))
    arch, other = architecture_of(first), architecture_of(second)
    assert arch == other and (arch.dense_at, arch.sparse_at) == ({0}, {1})
    assert Dimensions.of(first, arch) == Dimensions.of(second, other)


def test_a_cache_holds_what_blocks_are_chosen_by() -> None:
    """As transformers' cache does: one index key a token and sparse layer, for all heads, in bf16 on each GPU."""
    config = model_config(Sizes(layers=3), MINIMAX_M3_VL, STORED["bf16"])
    arch = architecture_of(config)
    assert arch.sparse_at == {1, 2}
    made = transformers_config(arch, config)
    made.num_hidden_layers, made.layer_types = 1, ["minimax_m3_sparse"]
    class_ = arch.transformers_class("MiniMaxM3VLTextModel")
    cache = class_(made).bfloat16()(torch.tensor([[1, 2, 3, 4, 5]]), use_cache=True).past_key_values.layers[0]
    index, keys = cache.idx_keys.nbytes // 5, cache.keys.nbytes // 5
    dims = Dimensions.of(config, arch)
    assert kv_bytes_per_token(dims, 1, 2) == 3 * 2 * keys + 2 * index
    # Of two KV heads each GPU has one, of the index keys all.
    assert kv_bytes_per_token(dims, 2, 1) == 3 * 2 * keys // 4 + 2 * index
    config["text_config"]["sparse_attention_config"] = None
    assert kv_bytes_per_token(Dimensions.of(config, architecture_of(config)), 1, 2) == 3 * 2 * keys


@pytest.mark.parametrize(("layers", "dense"), [(1, set()), (2, {0}), (5, {0})])
def test_synthetic_models_have_as_many_layers_as_wanted(layers: int, dense: set[int]) -> None:
    arch = architecture_of(model_config(Sizes(layers=layers), MINIMAX_M3_VL, STORED["bf16"]))
    assert (arch.dense_at, arch.sparse_at) == (dense, set(range(layers)) - dense)


def test_a_sequence_within_reach_is_attended_to_as_a_whole(tmp_path: Path) -> None:
    """Two blocks of 32 tokens are chosen: of 64 tokens all, so that nothing needs to be chosen, of more not all."""
    write_checkpoint(tmp_path / "m", Sizes(), family=MINIMAX_M3_VL, stored=STORED["bf16"])
    checkpoint = Checkpoint.open(tmp_path / "m")
    source = SourceModel(checkpoint, architecture_of(checkpoint.config))
    arch = source.architecture
    content = read_layer(SourceWeights(source), arch, 1, DEVICE)
    decoder = DecoderLayer(arch, transformers_config(arch, source.config), 1, content.rest, DEVICE)
    attention: Any = decoder.module.self_attn
    indexer = attention.indexer
    hidden = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    decoder._choose_of = lambda length: None  # type: ignore[method-assign]
    found: dict[tuple[int, bool], torch.Tensor] = {}
    for length in (64, 96):
        for chooses in (True, False):
            attention.indexer = indexer if chooses else None
            found[length, chooses] = decoder.attend(hidden[:length], [length]).float()
    assert float((found[64, True] - found[64, False]).norm()) < 0.01 * float((found[64, True] - hidden[:64]).norm())
    assert float((found[96, True] - found[96, False]).norm()) > 0.05 * float((found[96, True] - hidden).norm())
    del decoder._choose_of
    for length, chooses in ((64, False), (96, True), (64, False)):
        assert torch.equal(decoder.attend(hidden[:length], [length]).float(), found[length, chooses])
