"""How a model family is wired, as a table: a new family is a new entry, not a new branch.

Names are those of the hub's checkpoint; `{layer}` and `{expert}` stand for numbers.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

# One spelling a number, so that two names never stand for one tensor; no sign, leading zero or other script's digits.
NUMBER = "(0|[1-9][0-9]{0,8})"


@dataclass(frozen=True)
class Architecture:
    """One model family.

    Attributes:
        model_type: config.json's `model_type`.
        modeling: the transformers module with the classes named below; remote code is never used.
        layer: prefix of a decoder layer's tensors.
        attention: the linear layers whose original fp8 bytes are restored.
        attention_inputs: other tensors that attention's output and KV cache depend on; never changed.
        smooth_norm: the norm whose output feeds router and experts; its scales are moved into them.
        router, router_bias: the router's weight, and the bias added to its scores for choosing only.
        expert: prefix of one expert's linear layers: gate and up read the block's input, down reads
            act(gate) * up.
        module_names: (checkpoint prefix, transformers prefix) of modules inside a layer that are named otherwise there.
        default_theta: the base of the rotary frequencies where config.json names none, as in transformers' class.
        config keys: where config.json keeps sizes.
    """

    model_type: str
    causal_lm: str
    modeling: str
    config_class: str
    layer_class: str
    rotary_class: str
    layer: str
    attention: tuple[str, ...]
    attention_inputs: tuple[str, ...]
    smooth_norm: str
    router: str
    router_bias: str | None
    expert: str
    gate: str
    up: str
    down: str
    module_names: tuple[tuple[str, str], ...]
    moe_module: str
    default_theta: float = 10000.0
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    layers_key: str = "num_hidden_layers"
    experts_key: str = "num_local_experts"
    top_k_key: str = "num_experts_per_tok"
    hidden_key: str = "hidden_size"
    intermediate_key: str = "intermediate_size"

    def transformers_class(self, name: str) -> Any:
        """A class of the family's transformers module."""
        return getattr(importlib.import_module(self.modeling), name)

    def layer_prefix(self, layer: int) -> str:
        return self.layer.format(layer=layer)

    def expert_weight(self, layer: int, expert: int, linear: str) -> str:
        """Full name of an expert's linear layer, without the parameter, e.g. `...experts.3.w1`."""
        return f"{self.layer_prefix(layer)}{self.expert.format(expert=expert)}{linear}"

    @property
    def expert_linears(self) -> tuple[str, str, str]:
        return (self.gate, self.up, self.down)

    @cached_property
    def _layer_pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.layer).replace(r"\{layer\}", NUMBER) + "(.+)")

    @cached_property
    def _expert_pattern(self) -> re.Pattern[str]:
        linears = "|".join(map(re.escape, self.expert_linears))
        return re.compile(re.escape(self.expert).replace(r"\{expert\}", NUMBER) + f"({linears})" + r"\.(.+)")

    def split(self, name: str) -> tuple[int | None, str]:
        """`model.layers.7.x.y` -> (7, `x.y`); a tensor outside the layers -> (None, its name)."""
        match = self._layer_pattern.fullmatch(name)
        return (int(match[1]), match[2]) if match else (None, name)

    def split_expert(self, local: str) -> tuple[int, str, str] | None:
        """`...experts.3.w1.weight` inside a layer -> (3, `w1`, `weight`); anything else -> None."""
        match = self._expert_pattern.fullmatch(local)
        return (int(match[1]), match[2], match[3]) if match else None

    @cached_property
    def _quantized_pattern(self) -> re.Pattern[str]:
        attention, experts = ("|".join(map(re.escape, names)) for names in (self.attention, self.expert_linears))
        return re.compile(rf"(.*\.)?(({attention})|experts\.\d+\.({experts}))\.weight")

    def looks_quantized(self, name: str) -> bool:
        """Whether the outputs' config.json, whose patterns name no layer, takes a tensor for one that is quantized."""
        return self._quantized_pattern.fullmatch(name) is not None

    def module_name(self, local: str) -> str:
        """A layer's tensor under transformers' name."""
        for checkpoint, transformers in self.module_names:
            if local.startswith(checkpoint):
                return transformers + local[len(checkpoint) :]
        return local

    def component(self, name: str) -> str:
        """The model card's component that a tensor belongs to."""
        _, local = self.split(name)
        if self.split_expert(local):
            return "experts"
        if any(local.startswith(f"{linear}.weight") for linear in self.attention):
            return "attention"
        if name == self.embedding:
            return "embeddings"
        if name == self.head:
            return "head"
        if local == self.router:
            return "router"
        if local.endswith(("k_scale", "v_scale")):
            return "kv_scales"
        return "norms and biases"
