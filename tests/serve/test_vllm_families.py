"""What doctor says of each family, against small stand-ins for vLLM's registry and models."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmq.families.registry import ARCHITECTURES
from mmq.serve.vllm_families import support
from mmq.serve.vllm_plugin import Sources

REGISTRY = """
_TEXT = {"Glm4MoeForCausalLM": ("glm4_moe", "Glm4MoeForCausalLM"), "Other": ("glm4_moe", "Other")}
_MORE = {"Qwen3MoeForCausalLM": ("qwen3_moe", "Qwen3MoeForCausalLM")}
"""
GATE = """
class Block:
    def __init__(self, config):
        self.gate = GateLinear(config.hidden_size, config.num_experts{dtype})
        self.other = GateLinear(1, 2, params_dtype=torch.float16)

    def load_weights(self, weights):
        return {loader}(weights)
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sources:
    models = tmp_path / "vllm/model_executor/models"
    models.mkdir(parents=True)
    for folder in (tmp_path / "vllm", models.parent, models):
        (folder / "__init__.py").write_text("")
    (models / "registry.py").write_text(REGISTRY)
    (models / "glm4_moe.py").write_text(GATE.format(dtype=", params_dtype=torch.float32", loader="AutoWeightsLoader"))
    (models / "qwen3_moe.py").write_text(GATE.format(dtype="", loader="maybe_remap_kv_scale_name"))
    monkeypatch.syspath_prepend(tmp_path)
    found = Sources()
    assert found.folders == [tmp_path / "vllm"]
    return found


def test_what_is_as_the_table_has_it(sources: Sources) -> None:
    found = support(sources, ARCHITECTURES["qwen3_moe"])
    assert (found.module, found.router, found.kv_scales, found.faults) == ("qwen3_moe", "BF16", True, ())


def test_names_of_kv_scales_that_no_loader_knows(sources: Sources) -> None:
    found = support(sources, ARCHITECTURES["glm4_moe"])
    assert found.module == "glm4_moe" and found.router == "F32" and not found.kv_scales
    assert found.faults == ("its loader knows no names of KV scales: the cache would run at scale 1",)
    (sources.folders[0] / "model_executor/models/utils.py").write_text("mapper |= config.get_cache_scale_mapper()\n")
    assert support(Sources(), ARCHITECTURES["glm4_moe"]).faults == ()


def test_a_loader_that_passes_over_scales(sources: Sources) -> None:
    """Qwen3-MoE's before pull request 35656, which renames too, but too late; and after it. The plugin mends that one's
    alone."""
    late = """
    def load_weights(self, weights):
        suffixes = (".bias", ".k_scale", ".v_scale")
        for name, weight in weights:
            if name.endswith(suffixes):
                continue
            name = maybe_remap_kv_scale_name(name, {})
"""
    sound = late.replace('".k_scale", ', "")
    models = sources.folders[0] / "model_executor/models"
    for family, mended in (("qwen3_moe", " but for the plugin"), ("glm4_moe", "")):
        path = models / f"{family}.py"
        dtype = ", params_dtype=torch.float32" if family == "glm4_moe" else ""
        head = GATE.partition("    def load_weights")[0].format(dtype=dtype)
        path.write_text(head + late)
        found = support(Sources(), ARCHITECTURES[family])
        assert found.faults == (f"its loader passes over KV scales: the cache would run at scale 1{mended}",)
        assert not found.kv_scales
        path.write_text(head + sound)
        found = support(Sources(), ARCHITECTURES[family])
        assert found.faults == () and found.kv_scales


def test_a_router_in_another_dtype(sources: Sources) -> None:
    (sources.folders[0] / "model_executor/models/qwen3_moe.py").write_text(
        GATE.format(dtype=", params_dtype=torch.float32", loader="get_cache_scale")
    )
    found = support(Sources(), ARCHITECTURES["qwen3_moe"])
    assert found.faults == ("it holds the router in F32, mmq smooths for BF16",)


def test_a_family_that_it_has_not(sources: Sources) -> None:
    found = support(sources, ARCHITECTURES["deepseek_v3"])
    assert found.module is None and found.faults == ("it has no DeepseekV3ForCausalLM",)
