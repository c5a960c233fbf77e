"""What the installed vLLM makes of each family, read from its source files without importing them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from mmq.families.table import Architecture
from mmq.serve.vllm_plugin import FAULTS, Definition, Sources, passes_over_scales

MODELS = "vllm.model_executor.models"
# What maps the names of KV scales to parameters: for all models' loaders, or in a model's own.
SCALE_NAMES = ("get_cache_scale_mapper", "get_cache_scale", "maybe_remap_kv_scale_name")
GATES = ("GateLinear", "ReplicatedLinear")


@dataclass(frozen=True)
class Support:
    """A family in a vLLM.

    Attributes:
        module: which of its models' modules loads the family; None where none does.
        router: the dtype that it holds the router in; None where that is not told by the source as mmq knows it.
        kv_scales: whether its own loader takes KV scales by their names.
        faults: what is not as mmq's table has it, a clause each.
    """

    family: str
    module: str | None
    router: str | None
    kv_scales: bool
    faults: tuple[str, ...]


def support(sources: Sources, arch: Architecture) -> Support:
    """What this vLLM can do with a family's checkpoint."""
    module = _module_of(sources, arch.causal_lm)
    if module is None:
        return Support(arch.model_type, None, None, False, (f"it has no {arch.causal_lm}",))
    router = _router_dtype(sources, module)
    own, common = ({name for node in sources.body(at) for name in _names(node)} for at in (module, f"{MODELS}.utils"))
    scales, passed = any(name in own | common for name in SCALE_NAMES), _passes_over(sources, module)
    faults = []
    if router is not None and router != arch.router_served:
        faults.append(f"it holds the router in {router}, mmq smooths for {arch.router_served}")
    if passed and arch.has_kv_cache_scales:
        mending = " but for the plugin" if any(fault.module == module for fault in FAULTS) else ""
        faults.append(f"its loader passes over KV scales: the cache would run at scale 1{mending}")
    elif not scales and arch.has_kv_cache_scales:
        faults.append("its loader knows no names of KV scales: the cache would run at scale 1")
    found = module.removeprefix(f"{MODELS}.")
    return Support(arch.model_type, found, router, scales and not passed, tuple(faults))


def _passes_over(sources: Sources, module: str) -> bool:
    """Whether one of a module's loaders passes over KV scales."""
    classes = [node for node in sources.body(module) if isinstance(node, ast.ClassDef)]
    return any(passes_over_scales(sources, Definition(module, node)) for node in classes)


def _module_of(sources: Sources, causal_lm: str) -> str | None:
    """The module that vLLM's registry has for a class: an entry `"NAME": ("module", "Class")` of one of its dicts."""
    for statement in sources.body(f"{MODELS}.registry"):
        for node in ast.walk(statement):
            if not isinstance(node, ast.Dict):
                continue
            for key, value in zip(node.keys, node.values, strict=True):
                named = isinstance(key, ast.Constant) and key.value == causal_lm
                first = value.elts[0] if named and isinstance(value, ast.Tuple) and value.elts else None
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    return f"{MODELS}.{first.value}"
    return None


def _router_dtype(sources: Sources, module: str) -> str | None:
    """By `params_dtype` of the layer that becomes `self.gate`: the model's own dtype without it."""
    found = {
        next((_dtype(own.value) for own in call.keywords if own.arg == "params_dtype"), "BF16")
        for call in _gates(sources, module)
    }
    return found.pop() if len(found) == 1 else None


def _gates(sources: Sources, module: str) -> Iterator[ast.Call]:
    for statement in sources.body(module):
        for node in ast.walk(statement):
            if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
                continue
            gate = any(isinstance(to, ast.Attribute) and to.attr == "gate" for to in node.targets)
            if gate and isinstance(node.value.func, ast.Name) and node.value.func.id in GATES:
                yield node.value


def _dtype(value: ast.expr) -> str | None:
    name = value.attr if isinstance(value, ast.Attribute) else None
    return {"float32": "F32", "bfloat16": "BF16"}.get(name or "")


def _names(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Attribute):
            yield part.attr
