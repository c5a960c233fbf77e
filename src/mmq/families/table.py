"""How a model family is wired, as a table: a new family is a new entry, not a new branch.

Names are those of the hub's checkpoint; `{layer}` and `{expert}` stand for numbers. Shapes are in words, which
`sizes.Dimensions.of` makes numbers of with config.json.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

# One spelling a number, so that two names never stand for one tensor; no sign, leading zero or other script's digits.
NUMBER = "(0|[1-9][0-9]{0,8})"
# No model has more, and what is listed layer by layer stays small.
MOST_LAYERS = 10**6
# No setting comes near it.
LARGEST_NUMBER = 1e6
# Nor a tower more blocks, which are written down one by one.
MOST_BLOCKS = 1000
# No layer of a model: one past the last, with experts and full attention.
BEYOND = MOST_LAYERS + 1

# What every family may use. hidden: the residual stream. query, key: all heads of queries, of keys or values, side by
# side. head: one head. experts: how many there are. expert, dense: the inner width of a routed expert, of a dense
# layer. pair: two hidden ones. one: 1.
SIZES = ("hidden", "query", "key", "head", "experts", "expert", "dense", "vocabulary", "pair", "one")
# One of these, or of a table's own `sizes`.
Size = str
# A size from config.json: a sum of products of its keys and of numbers.
Formula = tuple[tuple[str | int, ...], ...]


# What transformers and vLLM read beside a section or in it.
BOTH_PLACES = ("tie_word_embeddings", "quantization_config")
# The component of what predicts further tokens.
MTP = "multi-token prediction"
LATENT_SCALES = "vLLM takes no calibrated scales for the latent that this attention caches"


@dataclass(frozen=True)
class Weight:
    """A tensor of a decoder layer.

    Attributes:
        name: in the layer.
        shape: [out, in] of a matrix, [n] of a norm or a bias.
        when: the key of config.json that must be there, and neither null, false nor 0, for it to exist.
        unless: the key that must not be so.
        plain: a matrix that an fp8 release leaves in bf16.
        whole: a server has all of it on each GPU.
        dtypes: what it may be where it is not fp8.
    """

    name: str
    shape: tuple[Size, ...]
    when: str | None = None
    unless: str | None = None
    plain: bool = False
    whole: bool = False
    dtypes: tuple[str, ...] = ("BF16",)

    @property
    def is_matrix(self) -> bool:
        """Whether it is of the kind that formats with scales may store."""
        return len(self.shape) == 2 and not self.plain

    def exists(self, config: Mapping[str, Any]) -> bool:
        return (self.when is None or bool(config.get(self.when))) and not (self.unless and config.get(self.unless))

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")


@dataclass(frozen=True)
class Mlp:
    """A gated unit: gate and up read its input, down reads act(gate) * up."""

    prefix: str
    width: Size
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    @property
    def inputs(self) -> tuple[Weight, Weight]:
        """What reads the unit's input."""
        gate, up, _ = self.weights
        return gate, up

    @property
    def weights(self) -> tuple[Weight, Weight, Weight]:
        wide: tuple[Size, ...] = (self.width, "hidden")
        return (
            Weight(f"{self.prefix}{self.gate}.weight", wide),
            Weight(f"{self.prefix}{self.up}.weight", wide),
            Weight(f"{self.prefix}{self.down}.weight", ("hidden", self.width)),
        )


@dataclass(frozen=True)
class Clamped:
    """A gated unit that clamps: gate from above and up from both sides at a limit, then gate * sigmoid(alpha * gate) *
    (1 + up). Scales of up don't pass through, so none are moved from it into down.

    Attributes:
        names: what config.json may call it in `hidden_act`.
        alpha, limit: keys of config.json.
    """

    names: tuple[str, ...]
    alpha: str
    limit: str

    def of(self, config: Mapping[str, Any]) -> tuple[float, float]:
        """alpha and limit. Raises ValueError where the activation is another, or they are no positive numbers; the
        message is a clause."""
        if config.get("hidden_act") not in self.names:
            raise ValueError(f"hidden_act is none of {', '.join(self.names)}")
        found = []
        for key in (self.alpha, self.limit):
            value = config.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < LARGEST_NUMBER:
                raise ValueError(f"{key} is no positive number")
            found.append(float(value))
        return found[0], found[1]


@dataclass(frozen=True)
class Stack:
    """All experts of a layer in one tensor, as some releases store them: [experts, rows, in].

    Attributes:
        name: in the layer.
        linears: what each expert's rows are, one above the other.
    """

    name: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class Blocks:
    """Blocks of one kind outside the decoder, as a vision tower has them.

    Attributes:
        prefix: of a block's tensors; `{block}` stands for its number.
        count: where config.json says how many there are.
        weights: of each block.
    """

    prefix: str
    count: str
    weights: tuple[Weight, ...]

    def of(self, config: Mapping[str, Any]) -> Iterator[Weight]:
        """All their weights by full names. Raises ValueError where the key holds no such number."""
        count = _whole(config, self.count, 0)
        if count > MOST_BLOCKS:
            raise ValueError(f"{self.count} is {count}, more than {MOST_BLOCKS}")
        for block in range(count):
            for weight in self.weights:
                yield replace(weight, name=self.prefix.format(block=block) + weight.name)


@dataclass(frozen=True)
class SomeLayers:
    """Where config.json says which layers are of a kind: have one dense MLP instead of experts, or linear attention.

    Attributes:
        leading: key of a number: so many layers from the first.
        listed: key of a list of layers.
        step: key of a number n: of every n layers all but the last.
        step_default: n where there is no such key.
        typed: key of a list with each layer's kind, and the kind that is meant; where it is there, it decides alone.
        flagged: key of a list with 0 or 1 for each layer, and which of them is meant; the same where that one is not.
    """

    leading: str | None = None
    listed: str | None = None
    step: str | None = None
    step_default: int = 1
    typed: tuple[str, str] | None = None
    flagged: tuple[str, int] | None = None

    def of(self, config: Mapping[str, Any], layers: int) -> frozenset[int]:
        """The layers. Raises ValueError where a key holds something else; the message is a clause."""
        found: set[int] = set()
        if self.typed and config.get(self.typed[0]) is not None:
            key, kind = self.typed
            kinds = config[key]
            if not isinstance(kinds, list) or len(kinds) != layers or any(type(own) is not str for own in kinds):
                raise ValueError(f"{key} does not name the kind of each layer")
            return frozenset(layer for layer, own in enumerate(kinds) if own == kind)
        if self.flagged and (flags := value_at(config, self.flagged[0])) is not None:
            key, meant = self.flagged
            if not isinstance(flags, list) or len(flags) != layers or any(own not in (0, 1) for own in flags):
                raise ValueError(f"{key} is no list of 0 or 1 for each layer")
            return frozenset(layer for layer, own in enumerate(flags) if own == meant)
        if self.leading:
            found |= set(range(min(_whole(config, self.leading, 0), layers)))
        if self.listed:
            listed = config.get(self.listed) or []
            if not isinstance(listed, list) or any(type(layer) is not int for layer in listed):
                raise ValueError(f"{self.listed} is no list of layers")
            found |= {layer for layer in listed if 0 <= layer < layers}
        if self.step:
            step = _whole(config, self.step, self.step_default)
            if step < 1:
                raise ValueError(f"{self.step} is {step}")
            found |= {layer for layer in range(layers) if (layer + 1) % step}
        return frozenset(found)


@dataclass(frozen=True)
class Architecture:
    """One model family.

    Attributes:
        model_type: config.json's `model_type`.
        modeling: the transformers module with the classes named below; remote code is never used.
        section: the section of config.json that holds the decoder's settings, where those of a vision tower stand
            beside it; `settings` finds them.
        renamed: keys of config.json, or of sections in it, and the key that the table and transformers' class know each
            by.
        assumed: what is so where config.json does not say, as in transformers' class.
        layer: prefix of a decoder layer's tensors.
        attention_weights: attention's matrices, whose original bytes are restored, and the norms and biases that its
            output and the KV cache depend on; none of them is ever changed.
        sparse_weights: more of them in the layers that `sparse_layers` names: what chooses the tokens to attend to.
        sparse_module, sparse_reach: transformers' module that chooses them, and keys whose product says of how many
            tokens all are chosen.
        sparse_key: what a cache holds of a token in these layers beside keys and values: one vector by which it is
            chosen, for all heads.
        linear_weights: the same of linear attention, which has no KV cache, in the layers that `linear_layers` names.
        latent: what a KV cache holds of a token where it is one vector for all heads, as in multi-head latent
            attention; vLLM takes no calibrated scales for it.
        sizes: what the table's own words for sizes amount to.
        smooth_norm: the norm before the block; its scales are moved into all that reads it, `norm_readers`.
        norm_offset: what the hidden states' norms add to their stored weights: 1 where these are kept around zero.
        router, router_bias: the router's weight, and the bias added to its scores for choosing only.
        router_stored, router_served: the router's dtype in the hub's files, and in the server: what is smoothed,
            calibrated with, written and evaluated is what the server will hold.
        routed_scale_key: what multiplies the routed experts' weights, where the router's own class leaves that to the
            block.
        expert: prefix of one expert's linear layers: gate and up read the block's input, down reads
            act(gate) * up.
        clamped: how gate and up become down's input where it is another way.
        shared: the expert that all tokens go through beside the routed ones; it reads the smoothed norm as they do.
        shared_gate: what reads it too, and weighs the shared expert's output through a sigmoid.
        extra_weights: of a layer past the last, beside what a layer with experts has; such layers, which predict
            further tokens, are carried as they are.
        carried: beginnings of names outside the decoder layers that are carried as they are, and the component of each.
        carried_layers: of these, layers that are wired as a decoder layer with experts and full attention.
        carried_weights: the other tensors there that releases have, by their full names.
        carried_blocks: more of them, that repeat.
        stacks: tensors of all of a layer's experts, where releases have them instead of each expert's own.
        dense: the MLP that stands for the experts in the layers that `dense_layers` names.
        fused: linear layers that transformers' class holds as one, their rows one above the other, and its name.
        module_names: (checkpoint prefix, transformers prefix) of modules inside a layer that are named otherwise there.
        default_rotary_share: the share of head dimensions that turn where config.json names none.
        default_theta: the base of the rotary frequencies where config.json names none, as in transformers' class.
        config keys: where config.json keeps sizes.
        rotary_dim_key: where config.json says how many dimensions of a head turn, if it says so in a number.
        rotary_axes: how many positions a token has, three where images have time, height and width; text has the same
            in all.
        head_dim_key: where it says how wide a head is, or the part of one that rotary settings are about.
        config_fields: what the layer class reads of the config beside the config class's own fields.
        dense_at, linear_at, sparse_at: numbers of such layers, once `resolved`.
        extra_at: numbers of the layers past the last, once `resolved`.
        example: config.json of a small model of the family, beyond sizes and rotary settings; for synthetic ones. What
            stands in the section is in its own.
    """

    model_type: str
    causal_lm: str
    modeling: str
    config_class: str
    layer_class: str
    rotary_class: str
    layer: str
    attention_weights: tuple[Weight, ...]
    smooth_norm: str
    router: str
    router_bias: str | None
    expert: str
    gate: str
    up: str
    down: str
    module_names: tuple[tuple[str, str], ...]
    moe_module: str
    section: str | None = None
    renamed: tuple[tuple[str, str], ...] = ()
    assumed: Mapping[str, Any] = field(default_factory=dict)
    router_stored: Literal["BF16", "F32"] = "F32"
    router_served: Literal["BF16", "F32"] = "F32"
    routed_scale_key: str | None = None
    clamped: Clamped | None = None
    fused: tuple[tuple[tuple[str, ...], str], ...] = ()
    dense: Mlp | None = None
    dense_layers: SomeLayers = SomeLayers()
    dense_at: frozenset[int] = frozenset()
    sparse_weights: tuple[Weight, ...] = ()
    sparse_layers: SomeLayers = SomeLayers()
    sparse_at: frozenset[int] = frozenset()
    sparse_module: str = ""
    sparse_reach: tuple[str, ...] = ()
    sparse_key: Size | None = None
    linear_weights: tuple[Weight, ...] = ()
    linear_layers: SomeLayers = SomeLayers()
    linear_at: frozenset[int] = frozenset()
    latent: Size | None = None
    sizes: Mapping[Size, Formula] = field(default_factory=dict)
    norm_offset: float = 0.0
    shared: Mlp | None = None
    shared_gate: Weight | None = None
    carried: tuple[tuple[str, str], ...] = ()
    carried_layers: tuple[str, ...] = ()
    carried_weights: tuple[Weight, ...] = ()
    carried_blocks: tuple[Blocks, ...] = ()
    stacks: tuple[Stack, ...] = ()
    extra_weights: tuple[Weight, ...] = ()
    extra_at: tuple[int, ...] = ()
    default_rotary_share: float = 1.0
    default_theta: float = 10000.0
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    layers_key: str = "num_hidden_layers"
    experts_key: str = "num_local_experts"
    top_k_key: str = "num_experts_per_tok"
    hidden_key: str = "hidden_size"
    intermediate_key: str = "intermediate_size"
    dense_key: str = "intermediate_size"
    extra_layers_key: str | None = None
    rotary_dim_key: str | None = None
    rotary_axes: int = 1
    head_dim_key: str = "head_dim"
    config_fields: tuple[str, ...] = ()
    example: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, config: dict[str, Any]) -> dict[str, Any]:
        """The decoder's settings: config.json's own, and before them its section's where the family has one, under the
        keys that the table knows. Of what has no section, as these settings themselves, all of it."""
        section = config.get(self.section) if self.section else None
        if isinstance(section, dict):
            given = {key: value for key, value in section.items() if value is not None or key not in config}
            config = {key: value for key, value in config.items() if key != self.section} | given
        named = {key: value for there, key in self.renamed if (value := value_at(config, there)) is not None}
        missing = {key: value for key, value in self.assumed.items() if config.get(key) is None}
        return config | missing | named if named or missing else config

    def check_section(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError where the section is missing or no object, or says other than what is beside it of what
        servers read at either place; the message is a clause."""
        if self.section is None:
            return
        section = config.get(self.section)
        if not isinstance(section, dict):
            raise ValueError(f"{self.section} is missing" if section is None else f"{self.section} is no object")
        for key in BOTH_PLACES:
            inside, beside = section.get(key), config.get(key)
            if inside is not None and beside is not None and inside != beside:
                raise ValueError(f"{key} says one thing, {self.section}.{key} another")

    def resolved(self, config: dict[str, Any]) -> Architecture:
        """The table for one config.json: weights that it has not are gone, and it is known which layers are dense.

        Raises:
            ValueError: a key that decides so holds something else; the message is a clause.
        """
        config = self.settings(config)
        layers = config.get(self.layers_key)
        # A number of layers that is none is refused by who needs it.
        layers = layers if type(layers) is int and 0 < layers <= MOST_LAYERS else 0
        extra = _whole(config, self.extra_layers_key, 0) if self.extra_layers_key else 0
        if self.clamped:
            self.clamped.of(config)
        return replace(
            self,
            attention_weights=tuple(w for w in self.attention_weights if w.exists(config)),
            linear_weights=tuple(w for w in self.linear_weights if w.exists(config)),
            dense_at=self.dense_layers.of(config, layers),
            linear_at=self.linear_layers.of(config, layers),
            sparse_at=self.sparse_layers.of(config, layers),
            carried_weights=(
                *(w for w in self.carried_weights if w.exists(config)),
                *(weight for blocks in self.carried_blocks for weight in blocks.of(config)),
            ),
            carried_blocks=(),
            extra_at=tuple(range(layers, layers + min(extra, MOST_LAYERS))),
        )

    def transformers_class(self, name: str) -> Any:
        """A class of the family's transformers module."""
        return getattr(importlib.import_module(self.modeling), name)

    def layer_prefix(self, layer: int) -> str:
        return self.layer.format(layer=layer)

    def expert_weight(self, layer: int, expert: int, linear: str) -> str:
        """Full name of an expert's linear layer, without the parameter, e.g. `...experts.3.w1`."""
        return f"{self.layer_prefix(layer)}{self.expert.format(expert=expert)}{linear}"

    @cached_property
    def experts(self) -> Mlp:
        """A routed expert's layers; `{expert}` stands for its number."""
        return Mlp(self.expert, "expert", self.gate, self.up, self.down)

    @property
    def expert_linears(self) -> tuple[str, str, str]:
        return (self.gate, self.up, self.down)

    def attention_of(self, layer: int) -> tuple[Weight, ...]:
        """Matrices, norms and biases of a layer's attention."""
        if layer in self.linear_at:
            return self.linear_weights
        return (*self.attention_weights, *self.sparse_weights) if layer in self.sparse_at else self.attention_weights

    def attention_inputs(self, layer: int) -> tuple[str, ...]:
        """What attention's output and KV cache depend on beside its matrices, as of `kept`."""
        return tuple(weight.name for weight in self.attention_of(layer) if len(weight.shape) != 2)

    @cached_property
    def attention(self) -> tuple[str, ...]:
        """Attention's linear layers of all kinds, without the parameter."""
        weights = (*self.attention_weights, *self.sparse_weights, *self.linear_weights)
        return tuple(weight.module for weight in weights if len(weight.shape) == 2)

    @property
    def attention_module(self) -> str:
        """The module that holds them where there is a KV cache, and its scales: `self_attn`."""
        return self.attention[0].rpartition(".")[0]

    @property
    def has_kv_cache_scales(self) -> bool:
        """Whether servers take scales of the KV cache for any layer."""
        return self.latent is None

    def has_kv_scales(self, layer: int) -> bool:
        """Whether a layer has a KV cache that servers take scales for."""
        return self.has_kv_cache_scales and layer not in self.linear_at

    def without_kv_scales(self, layer: int) -> str | None:
        """Why a layer gets no scales; None where it gets them."""
        if layer in self.linear_at:
            return "linear attention has no KV cache"
        return None if self.has_kv_cache_scales else LATENT_SCALES

    @cached_property
    def extra_prefixes(self) -> tuple[str, ...]:
        """Beginnings of the names of what is carried as it is: layers past the last, and `carried`."""
        return (*map(self.layer_prefix, self.extra_at), *(prefix for prefix, _ in self.carried))

    def is_extra(self, name: str) -> bool:
        return bool(self.extra_prefixes) and name.startswith(self.extra_prefixes)

    @property
    def smooths_down(self) -> bool:
        """Whether scales may be moved from up into down: what is between them lets them through."""
        return self.clamped is None

    @property
    def powers_of_two(self) -> bool:
        """Whether the norm's scales must be such: what reads it in bf16 would be rounded by others, and another router
        chooses other experts. With `norm_offset` the rounded norm leaves most channels such a scale only nearly; the
        router is then rounded as a server would, and calibrated with."""
        return self.router_served == "BF16" or self.shared is not None

    def has_experts(self, layer: int) -> bool:
        return layer not in self.dense_at

    def kept(self, layer: int) -> tuple[Weight, ...]:
        """A layer's matrices whose bytes are always the source's in the end: not routed, and not reading the smoothed
        norm."""
        matrices = tuple(weight for weight in self.attention_of(layer) if len(weight.shape) == 2)
        if layer in self.dense_at:
            return matrices + (self.dense.weights if self.dense else ())
        return matrices + (self.shared.weights[2:] if self.shared else ())

    @cached_property
    def _beside_experts(self) -> tuple[Weight, ...]:
        inputs = self.shared.inputs if self.shared else ()
        return (*inputs, self.shared_gate) if self.shared_gate else inputs

    def scaled(self, layer: int) -> tuple[Weight, ...]:
        """A layer's matrices beside the router that read the norm before its experts. In bf16 they are scaled; in fp8
        they become bf16 for it, or keep their bytes, and the norm is left alone."""
        return () if layer in self.dense_at else self._beside_experts

    def is_scaled(self, name: str) -> bool:
        """Whether a tensor's name ends as that of one which `scaled` lists."""
        return any(name.endswith(f".{weight.name}") for weight in self._beside_experts)

    def layer_weights(self, layer: int, experts: int) -> Iterator[Weight]:
        """All tensors of a layer, by kind: attention, norm, router, shared expert, experts or dense MLP."""
        yield from self.attention_of(layer)
        yield Weight(self.smooth_norm, ("hidden",))
        if self.dense and layer in self.dense_at:
            yield from self.dense.weights
            return
        yield Weight(self.router, ("experts", "hidden"))
        if self.router_bias:
            yield Weight(self.router_bias, ("experts",), dtypes=("F32",))
        if self.shared:
            yield from self.shared.weights
        if self.shared_gate:
            yield self.shared_gate
        for expert in range(experts):
            for weight in self.experts.weights:
                yield Weight(weight.name.format(expert=expert), weight.shape)

    def extra_tensors(self) -> Iterator[Weight]:
        """What is carried as it is, as releases have it, by full names; `{expert}` stands for each expert's number."""
        layers = [(self.layer_prefix(layer), self.extra_weights) for layer in self.extra_at]
        for prefix, more in [*layers, *((prefix, ()) for prefix in self.carried_layers)]:
            plain = {self.router, *(weight.name for weight in more)}
            for weight in (*self.layer_weights(BEYOND, experts=0), *self.experts.weights, *more):
                yield replace(weight, name=prefix + weight.name, plain=weight.plain or weight.name in plain)
        for weight in self.carried_weights:
            yield replace(weight, plain=True)

    def norm_readers(self, experts: int) -> Iterator[str]:
        """Every weight of a layer with experts whose columns the smoothed norm multiplies."""
        yield self.router
        for weight in self._beside_experts:
            yield weight.name
        for expert in range(experts):
            for weight in self.experts.inputs:
                yield weight.name.format(expert=expert)

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

    def transformers_name(self, name: str) -> str:
        """A module, or a tensor, of the whole model under transformers' name."""
        layer, local = self.split(name)
        return name if layer is None else self.layer_prefix(layer) + self.module_name(local)

    def head_of(self, names: Container[str]) -> str:
        """The head among a checkpoint's tensors: the embeddings, where they are tied."""
        return self.head if self.head in names else self.embedding

    def component(self, name: str) -> str:
        """The model card's component that a tensor belongs to."""
        for prefix, component in self.carried:
            if name.startswith(prefix):
                return component
        layer, local = self.split(name)
        if layer is not None and layer in self.extra_at:
            return MTP
        if self.split_expert(local):
            return "experts"
        if any(local.startswith(f"{linear}.weight") for linear in self.attention):
            return "attention"
        if self.dense and any(local.startswith(weight.name) for weight in self.dense.weights):
            return "dense layers"
        shared = (*(self.shared.weights if self.shared else ()), *self._beside_experts)
        if any(local.startswith(weight.name) for weight in shared):
            return "shared experts"
        if name == self.embedding:
            return "embeddings"
        if name == self.head:
            return "head"
        if local == self.router:
            return "router"
        if local.endswith(("k_scale", "v_scale")):
            return "kv_scales"
        return "norms and biases"


def value_at(config: Mapping[str, Any], key: str) -> Any:
    """What config.json has at a key, or at one of its sections' as `vision_config.depth`; None where it has nothing."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _whole(config: Mapping[str, Any], key: str, default: int) -> int:
    value = value_at(config, key)
    value = default if value is None else value
    if type(value) is not int or value < 0:
        raise ValueError(f"{key} is no number of layers")
    return value


def grouped_query(query_norm: Size, key_norm: Size, norms: str | None = None) -> tuple[Weight, ...]:
    """Attention with q, k, v, o and norms on queries and keys: over one head, or over all side by side.

    Args:
        norms: the key of config.json that must be true for these norms to exist.
    """
    return (
        Weight("self_attn.q_proj.weight", ("query", "hidden")),
        Weight("self_attn.k_proj.weight", ("key", "hidden")),
        Weight("self_attn.v_proj.weight", ("key", "hidden")),
        Weight("self_attn.o_proj.weight", ("hidden", "query")),
        Weight("self_attn.q_norm.weight", (query_norm,), norms),
        Weight("self_attn.k_norm.weight", (key_norm,), norms),
        Weight("input_layernorm.weight", ("hidden",)),
    )
