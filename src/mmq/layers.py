"""One decoder layer at a time, built from transformers' own classes with a checkpoint's tensors.

The mixture-of-experts block is left out of the module: a stand-in records its input and returns zeros, so that the
layer's own forward gives the residual stream, and the block itself is computed on stacked weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
from compressed_tensors.modeling.kvcache import (
    initialize_hooked_kv_cache,
    register_key_hook,
    register_value_hook,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStatus
from llmcompressor.modifiers.quantization.calibration import (
    calibrate_key_hook,
    calibrate_value_hook,
    initialize_observer,
)
from transformers.activations import ACT2FN

from mmq.architectures import Architecture
from mmq.errors import CalibrationError, CheckpointError, one_line, shown
from mmq.tensors.experts import Activation

# Tokens in one attention call; sequences of equal length share a call.
BATCH_TOKENS = 8192
# Elements that torch gives to one thread of a CPU. Of more, each thread gets a part whose last few values, no vector's
# width, go through other code for the sigmoid, and come out an ulp apart.
ONE_THREAD = 2**15 - 1


def transformers_config(architecture: Architecture, config: dict[str, Any]) -> Any:
    """transformers' config object of a hub config.json, with the rotary dimensions right.

    transformers up to 5.17 ignores MiniMax-M2's `rotary_dim` and rotates every head dimension
    (huggingface/transformers issue 48241).

    Raises:
        CheckpointError: the activation is unknown, or transformers refuses a value.
    """
    config_class = architecture.transformers_class(architecture.config_class)
    # Its own fields alone: of those that all models share, num_labels alone fills any memory.
    known = {key: value for key, value in config.items() if key in config_class.__annotations__}
    known["rope_parameters"] = rope_parameters(config)
    activation = known.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in ACT2FN:
        raise CheckpointError(f"config.json: transformers knows no activation {shown(activation)}")
    try:
        result = config_class.from_dict(known)
        result._attn_implementation = "sdpa"
    except Exception as error:  # it raises whatever an odd value leads to
        raise CheckpointError(f"config.json: transformers refuses it: {one_line(error)}") from None
    return result


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """config.json's rotary settings in transformers' form: theta, type and the share of head dimensions that turn.

    Raises:
        CheckpointError: one is of a wrong kind, or more than all dimensions would turn.
    """
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key) or {}, dict):
            raise CheckpointError(f"config.json: {key} is {shown(config[key])} instead of an object")
    given = dict(config.get("rope_parameters") or {})
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if config.get("rotary_dim"):
        given["partial_rotary_factor"] = config["rotary_dim"] / head_dim
    given.setdefault("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if "rope_theta" not in given:
        given["rope_theta"] = config.get("rope_theta", 10000.0)
    given.setdefault("rope_type", (config.get("rope_scaling") or {}).get("rope_type", "default"))
    share = given["partial_rotary_factor"]
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise CheckpointError(
            f"config.json: partial_rotary_factor is {shown(share)} instead of a share of head dimensions"
        )
    return given


def embed(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of the embeddings [V, H] for int64 [T]: [T, H].

    Raises:
        CalibrationError: the tokenizer made a token that the model does not know.
    """
    largest = int(ids.max())
    if largest >= table.shape[0]:
        raise CalibrationError(f"the tokenizer made token {largest}, the model knows {table.shape[0]}")
    return table[ids]


class _Recorder(torch.nn.Module):
    """Stands where the mixture-of-experts block would: keeps its input, adds nothing to the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.inputs = hidden_states
        return torch.zeros_like(hidden_states)


class DecoderLayer:
    """A transformers decoder layer without its experts.

    Args:
        tensors: the layer's tensors but for the experts, by their names in the layer, in the checkpoint's dtypes.
    """

    def __init__(
        self,
        architecture: Architecture,
        config: Any,
        layer: int,
        tensors: dict[str, torch.Tensor],
        device: torch.device,
    ) -> None:
        self.architecture = architecture
        self.device = device
        self._config = config
        try:
            with torch.device("meta"):
                module = architecture.transformers_class(architecture.layer_class)(config, layer)
                # Outside the meta context, so that its buffer is real.
            self._rotary = architecture.transformers_class(architecture.rotary_class)(config).to(device)
        except Exception as error:  # it raises whatever an odd value leads to
            raise CheckpointError(f"config.json: transformers can't build a layer from it: {one_line(error)}") from None
        block = getattr(module, architecture.moe_module)
        self._router = block.gate
        self._bias: torch.Tensor | None = None
        setattr(module, architecture.moe_module, _Recorder())
        inside = {architecture.router, architecture.router_bias}
        named = {architecture.module_name(name): t.to(device) for name, t in tensors.items() if name not in inside}
        try:
            module.load_state_dict(named, strict=True, assign=True)
            self.set_router(tensors[architecture.router].to(device))
            if architecture.router_bias:
                self._bias = tensors[architecture.router_bias].to(device)
        except (RuntimeError, KeyError) as error:
            raise CheckpointError(f"layer {layer} does not fit {architecture.layer_class}: {one_line(error)}") from None
        self.module = module.eval()

    def set_router(self, weight: torch.Tensor) -> None:
        """Replace the router's weight, [E, H]."""
        self._router.weight = torch.nn.Parameter(weight, requires_grad=False)

    def set_norm(self, weight: torch.Tensor) -> None:
        """Replace the weight of the norm before the block, [H]."""
        name = self.architecture.module_name(self.architecture.smooth_norm).removesuffix(".weight")
        self.module.get_submodule(name).weight = torch.nn.Parameter(weight, requires_grad=False)

    @torch.no_grad()
    def attend(self, hidden: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Everything before the block: [T, H] of concatenated sequences -> the residual stream after attention."""
        result = torch.empty_like(hidden)
        for starts, length in _batches(lengths):
            batch = torch.stack([hidden[start : start + length] for start in starts]).to(self.device)
            positions = torch.arange(length, device=self.device).unsqueeze(0)
            output = self.module(
                batch,
                position_embeddings=self._rotary(batch, positions),
                attention_mask=None,
                position_ids=positions,
            )
            for start, sequence in zip(starts, output, strict=True):
                result[start : start + length] = sequence
        return result

    @torch.no_grad()
    def block_input(self, residual: torch.Tensor, step: int = 2**14) -> torch.Tensor:
        """The norm before the block, applied to the residual stream [T, H]."""
        name = self.architecture.module_name(self.architecture.smooth_norm).removesuffix(".weight")
        norm = self.module.get_submodule(name)
        return torch.cat([norm(part) for part in residual.split(step)])

    @torch.no_grad()
    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """transformers' router on [T, H]: logits float32 [T, E], weights float32 [T, k], indices int64 [T, k].

        The choices of a token come sorted by expert, so that sums over them have one order on every device.
        """
        step = 2**14 if x.device.type != "cpu" else max(1, ONE_THREAD // self._router.weight.shape[0])
        parts = [
            self._router(part, self._bias) if self._bias is not None else self._router(part) for part in x.split(step)
        ]
        logits, weights, index = (torch.cat(column) for column in zip(*parts, strict=True))
        order = index.argsort(dim=1)
        return logits.float(), weights.gather(1, order).float(), index.gather(1, order)

    @property
    def activation(self) -> Activation:
        function: Activation = ACT2FN[self._config.hidden_act]
        return function

    def observe_kv_cache(self, scheme: dict[str, Any]) -> KvObserver:
        """Attach llmcompressor's observers to keys after rotary and values."""
        return KvObserver(self.module.self_attn, self._config, scheme)


class KvObserver:
    """llmcompressor's KV-cache observers on one attention module."""

    def __init__(self, attention: Any, config: Any, scheme: dict[str, Any]) -> None:
        arguments = QuantizationArgs(**scheme)
        attention.quantization_scheme = QuantizationScheme(targets=["self_attn"], input_activations=arguments)
        # Observe only: the hidden states of calibration are not those of a quantized cache.
        attention.quantization_enabled = False
        initialize_hooked_kv_cache(SimpleNamespace(config=config), attention)
        self._finite: dict[str, list[torch.Tensor]] = {"k": [], "v": []}
        for name, register, hook in (
            ("k", register_key_hook, calibrate_key_hook),
            ("v", register_value_hook, calibrate_value_hook),
        ):
            initialize_observer(attention, name)
            register(attention, partial(self._look, name))
            register(attention, hook)
        self._attention = attention

    def broken(self, lengths: list[int]) -> list[int]:
        """Which samples had NaN or infinite keys or values: indices into the lengths of the one `attend` since."""
        finite = torch.cat(self._finite["k"]) & torch.cat(self._finite["v"])
        starts = [start for group, _ in _batches(lengths) for start in group]
        order = {start: sample for sample, start in enumerate(accumulate(lengths, initial=0))}
        return sorted(order[start] for start, good in zip(starts, finite.tolist(), strict=True) if not good)

    def _look(self, name: str, _attention: torch.nn.Module, states: torch.Tensor) -> None:
        """Note which sequences of a batch [B, heads, T, dim] are finite."""
        self._finite[name].append(torch.isfinite(states).flatten(1).all(1))

    def scales(self) -> dict[str, torch.Tensor]:
        """`k_scale` and `v_scale`, float32 [1], from all that was observed."""
        result = {}
        for name in ("k", "v"):
            observer: Any = getattr(self._attention, f"{name}_observer")
            # The statistics are in the activations' bf16; the scale itself is stored in fp32.
            for attribute, value in observer.get_statistics().items():
                setattr(observer, attribute, value.float())
            scale = observer.get_qparams()["scale"].float().cpu().reshape(1)
            # A server divides by it, on devices that may read a denormal as zero.
            result[f"{name}_scale"] = scale.clamp(min=torch.finfo(torch.float32).tiny)
        return result


def quantize_kv_cache(
    decoder: DecoderLayer, config: Any, scheme: dict[str, Any], scales: dict[str, torch.Tensor]
) -> None:
    """Round keys after rotary and values to fp8 and back in all that the layer computes from now on.

    Args:
        scheme: compressed-tensors' arguments, config.json's kv_cache_scheme.
        scales: `k_scale` and `v_scale`, float32 [1].
    """
    if scales.keys() != {"k_scale", "v_scale"}:
        raise CheckpointError(
            "a layer of the hybrid checkpoint has no KV scales, though its config.json speaks of them"
        )
    attention: Any = decoder.module.self_attn
    attention.quantization_scheme = QuantizationScheme(
        targets=["self_attn"], input_activations=QuantizationArgs(**scheme)
    )
    attention.quantization_status = QuantizationStatus.FROZEN
    attention.quantization_enabled = True
    for scale, value in scales.items():
        attention.register_buffer(scale, value.to(decoder.device), persistent=False)
    initialize_hooked_kv_cache(SimpleNamespace(config=config), attention)
    # The scales are fp32, and so is what they multiply; attention wants the query's dtype.
    attention.kv_cache.register_forward_hook(
        lambda _cache, given, result: tuple(
            after.to(before.dtype) for before, after in zip(given, result, strict=False)
        )
    )


def _batches(lengths: list[int]) -> Iterator[tuple[list[int], int]]:
    """Sequences of equal length, as many as BATCH_TOKENS allows at a time: (first tokens, length)."""
    starts: dict[int, list[int]] = {}
    position = 0
    for length in lengths:
        starts.setdefault(length, []).append(position)
        position += length
    for length, group in starts.items():
        size = max(1, BATCH_TOKENS // length)
        for first in range(0, len(group), size):
            yield group[first : first + size], length
