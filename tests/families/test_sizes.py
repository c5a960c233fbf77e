"""Sizes from config.json against the model card and against real shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmq.errors import CheckpointError
from mmq.families import sizes
from mmq.families.minimax_m2 import MINIMAX_M2 as ARCH
from mmq.families.sizes import Dimensions, Tensors, tensors_of
from mmq.source.synth import Sizes, model_config
from mmq.stages.plan import FORMS

M2_5 = Dimensions.of(model_config(Sizes(62, 3072, 1536, 256, 8, 48, 8, 128, 200064)), ARCH)
FOLDERS = {"source": "source", "bf16": "run/bf16", "awq": "run/awq", "hybrid": "run/hybrid"}
# The model card's breakdown, in billions; norms and biases are "below 0.01".
CARD = {"experts": "224.7", "attention": "2.7", "embeddings": "0.6", "head": "0.6", "router": "0.05"}


def headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Every tensor of a folder as the shards' headers have it: dtype, shape, bytes. Read by hand."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = (entry["dtype"], tuple(entry["shape"]), end - begin)
    return found


def expanded(tensors: list[Tensors], dims: Dimensions) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The same from the plan: one entry a tensor, numbers put into the names."""
    result = {}
    for tensor in tensors:
        experts = range(dims.experts) if "{expert}" in tensor.name else range(1)
        layers = range(dims.layers) if tensor.in_layer else range(1)
        names = {tensor.name.format(layer=layer, expert=expert) for layer in layers for expert in experts}
        assert len(names) == tensor.count
        result |= dict.fromkeys(names, (tensor.dtype, tensor.shape))
    return result


def synthetic(project: Path) -> Dimensions:
    return Dimensions.of(json.loads((project / "source/config.json").read_text(encoding="utf-8")), ARCH)


def test_the_model_cards_parameters() -> None:
    for form in FORMS:
        found = sizes.components(tensors_of(M2_5, ARCH, form))
        for component, billions in CARD.items():
            decimals = len(billions.partition(".")[2])
            assert f"{found[component].parameters / 1e9:.{decimals}f}" == billions
        assert 0 < found["norms and biases"].parameters < 0.01e9
        assert found["kv_scales"].parameters == 0
        assert 228.6e9 < sum(own.parameters for own in found.values()) < 229.5e9


def test_the_model_cards_dtypes() -> None:
    before, after = (sizes.components(tensors_of(M2_5, ARCH, form)) for form in ("source", "hybrid"))
    assert before["experts"].dtypes == before["attention"].dtypes == after["attention"].dtypes == ("F8_E4M3", "F32")
    assert after["experts"].dtypes == ("I32", "BF16", "I64")
    for component, dtypes in {"embeddings": ("BF16",), "head": ("BF16",), "router": ("F32",)}.items():
        assert before[component].dtypes == after[component].dtypes == dtypes
    assert after["norms and biases"].dtypes == ("BF16", "F32")


@pytest.mark.parametrize("form", FORMS)
def test_the_tensors_are_those_of_the_shards(form: sizes.Form, finished: Path) -> None:
    """Names, dtypes and shapes of a real run, and so the bytes of each component."""
    dims = synthetic(finished)
    tensors = tensors_of(dims, ARCH, form)
    found = headers(finished / FOLDERS[form])
    assert expanded(tensors, dims) == {name: (dtype, shape) for name, (dtype, shape, _) in found.items()}
    by_component = dict.fromkeys(sizes.COMPONENTS, 0)
    for name, (_, _, nbytes) in found.items():
        by_component[ARCH.component(name)] += nbytes
    assert {name: own.nbytes for name, own in sizes.components(tensors).items()} == by_component
    assert (by_component["kv_scales"] > 0) == (form in ("awq", "hybrid"))


@pytest.mark.parametrize("form", ["bf16", "awq", "hybrid"])
def test_disk_covers_headers_and_index_and_little_more(form: sizes.Form, finished: Path) -> None:
    tensors = tensors_of(synthetic(finished), ARCH, form)
    written = sum(path.stat().st_size for path in (finished / FOLDERS[form]).glob("model*"))
    raw = sum(tensor.nbytes for tensor in tensors)
    assert raw < written <= sizes.disk_bytes(tensors) <= raw + 256 * len(headers(finished / FOLDERS[form]))


def test_a_group_size_and_no_kv_scales_change_the_tensors(finished: Path) -> None:
    dims = synthetic(finished)
    coarse, fine = (sizes.components(tensors_of(dims, ARCH, "awq", group, False)) for group in (128, 64))
    assert coarse["kv_scales"].nbytes == 0
    assert fine["experts"].nbytes - coarse["experts"].nbytes == coarse["experts"].parameters // 128 * 2
    narrow = Dimensions.of(model_config(Sizes(intermediate=192)), ARCH)
    with pytest.raises(CheckpointError, match=r"192 input channels wide, not a multiple of awq\.group_size = 128"):
        tensors_of(narrow, ARCH, "awq")


def test_head_dim_and_tied_embeddings() -> None:
    config = model_config(Sizes()) | {"head_dim": None, "tie_word_embeddings": True}
    dims = Dimensions.of(config, ARCH)
    assert dims.head_dim == 256 // 4
    assert sizes.components(tensors_of(dims, ARCH, "source"))["head"].nbytes == 0
