"""KV cache and tensor parallelism: by hand, and beside what the model card and vLLM say."""

from __future__ import annotations

import re

import pytest

from families.test_sizes import M2_5
from mmq.families import sizes
from mmq.families.deepseek_v3 import DEEPSEEK_V3
from mmq.families.minimax_m2 import MINIMAX_M2 as ARCH
from mmq.families.sizes import GIB, Dimensions, tensors_of
from mmq.serve import memory
from mmq.serve.memory import Gpus
from mmq.source.synth import STORED, Sizes, model_config

A6000S = Gpus(4, 48 * GIB)


def test_kv_bytes_by_hand() -> None:
    assert memory.kv_bytes_per_token(M2_5, 1, 2) == 62 * 2 * 8 * 128 * 2 == 253_952
    assert memory.kv_bytes_per_token(M2_5, 4, 2) == 63_488
    assert memory.kv_bytes_per_token(M2_5, 4, 1) == 31_744
    # With more GPUs than KV heads each holds one.
    assert memory.kv_bytes_per_token(M2_5, 16, 1) == memory.kv_bytes_per_token(M2_5, 8, 1) == 62 * 2 * 128


def test_kv_bytes_as_vllm_reports_them() -> None:
    """vLLM on M2.7, two GPUs, bf16: 196,608 tokens need 23.25 GiB on each (eugr/spark-vllm-docker issue 396)."""
    assert memory.kv_bytes_per_token(M2_5, 2, 2) * 196_608 == 23.25 * GIB


def test_weights_per_gpu_by_hand() -> None:
    tensors = tensors_of(M2_5, ARCH, "hybrid")
    nbytes = {name: own.nbytes for name, own in sizes.components(tensors).items()}
    replicated = nbytes["router"] + nbytes["norms and biases"] + nbytes["kv_scales"]
    split = sum(nbytes.values()) - replicated
    assert memory.weights_per_gpu(tensors, M2_5, 1) == sum(nbytes.values())
    assert memory.weights_per_gpu(tensors, M2_5, 4) == split // 4 + replicated
    # k and v of one head each: 128 rows of 3072 fp8 values and 24 block scales.
    key_value = 62 * 2 * 8 * (128 * 3072 + 24 * 4)
    assert memory.weights_per_gpu(tensors, M2_5, 16) == (split - key_value) // 16 + key_value // 8 + replicated


def test_the_model_cards_cache() -> None:
    """The one formula on 4 x 48 GiB: what it explains of the card's figures, and what its own text says."""

    def tokens(form: sizes.Form, itemsize: int) -> int:
        fit = memory.serving(tensors_of(M2_5, ARCH, form), M2_5, A6000S, 0.9, memory.DEFAULT_RESERVE, itemsize)
        weights = memory.weights_per_gpu(tensors_of(M2_5, ARCH, form), M2_5, 4)
        assert fit.tokens == (int(48 * GIB * 0.9) - weights - 4 * GIB) // (31_744 * itemsize)
        return fit.tokens

    fp8, bf16, attention_bf16 = tokens("hybrid", 1), tokens("hybrid", 2), tokens("awq", 2)
    assert fp8 == pytest.approx(370_000, rel=0.02)
    assert attention_bf16 == pytest.approx(160_000, rel=0.1)
    assert fp8 // 2 == bf16
    assert fp8 / attention_bf16 == pytest.approx(2.12, abs=0.005)
    for figure in (fp8, bf16, attention_bf16):
        assert f"{figure:,} tokens" in str(memory.__doc__)
    hybrid = memory.weights_per_gpu(tensors_of(M2_5, ARCH, "hybrid"), M2_5, 4)
    awq = memory.weights_per_gpu(tensors_of(M2_5, ARCH, "awq"), M2_5, 4)
    assert (48 * GIB * 0.9 - hybrid - 370_000 * 31_744) / GIB == pytest.approx(3.9, abs=0.01)
    assert (awq - hybrid) / GIB == pytest.approx(0.64, abs=0.005)
    assert (attention_bf16 - 160_000) * 63_488 / GIB == pytest.approx(0.74, abs=0.005)


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (1, []),
        (2, []),
        (4, []),
        (3, ["8 KV heads"]),
        (5, ["307.2 of an expert's", "48 query heads", "8 KV heads"]),
        (8, ["gets 192 of an expert's 1536 .* --enable-expert-parallel gives each GPU 32 whole experts"]),
    ],
)
def test_tensor_parallelism_that_vllm_refuses(gpus: int, expected: list[str]) -> None:
    problems = memory.parallel_problems(M2_5, gpus)
    assert len(problems) == len(expected)
    for problem, pattern in zip(problems, expected, strict=True):
        assert re.search(pattern, problem)


def test_what_predicts_further_tokens_is_not_served() -> None:
    """It is on the disk; vLLM loads it for speculative decoding alone."""
    config = model_config(Sizes(layers=3), DEEPSEEK_V3)
    arch = DEEPSEEK_V3.resolved(config)
    dims = Dimensions.of(config, arch)
    tensors = tensors_of(dims, arch, "hybrid")
    parts = {name: own.nbytes for name, own in sizes.components(tensors).items()}
    assert parts["multi-token prediction"] > 0
    assert memory.weights_per_gpu(tensors, dims, 1) == sum(parts.values()) - parts["multi-token prediction"]


def test_rows_that_are_no_whole_blocks() -> None:
    dims = Dimensions.of(model_config(Sizes(hidden=320, intermediate=256, heads=2, kv_heads=2, head_dim=64)), ARCH)
    assert [problem.partition(",")[0] for problem in memory.parallel_problems(dims, 2)] == [
        "the hidden size 320 is not a multiple of 128",
        "each of 2 GPUs gets 64 rows of q",
        "each of 2 GPUs gets 64 rows of k and v",
    ]
    assert [problem.partition(",")[0] for problem in memory.parallel_problems(dims, 2, blocks=False)] == [
        "the hidden size 320 is not a multiple of 128"
    ]


@pytest.mark.parametrize(
    ("stored", "blocks"), [("fp8", True), ("ct-block", True), ("ct-channel", False), ("bf16", False)]
)
def test_attention_in_blocks(stored: str, blocks: bool) -> None:
    """Or by rows, or in bf16: where no rows of a GPU's part have to be whole blocks."""
    tensors = tensors_of(M2_5, ARCH, "hybrid", storage=STORED[stored].format.storage)
    assert memory.attention_in_blocks(tensors) == blocks
