"""Scales of the fp8 KV cache: observed on keys after rotary and values, and applied where a cache is simulated."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
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

from mmq.errors import CheckpointError
from mmq.machine.team import ALONE, Team
from mmq.quantize.decoder_layer import DecoderLayer, batches

# Observers whose statistics are extremes, which need no order: several ranks' can be put together.
ORDERLESS = ("static_minmax",)


class _NothingBefore:
    """Stands where a cache would keep the keys by which attention chooses blocks: there are none but those of now."""

    def update_index(self, keys: torch.Tensor) -> torch.Tensor:
        return keys


def _hook(decoder: DecoderLayer, attention: Any) -> None:
    """Have keys and values pass through a hooked cache that keeps none."""
    initialize_hooked_kv_cache(SimpleNamespace(config=decoder.config), attention)
    if decoder.architecture.sparse_weights:
        attention.kv_cache.layers = {attention.layer_idx: _NothingBefore()}


class KvObserver:
    """llmcompressor's observers on a layer's keys after rotary and its values.

    Args:
        scheme: compressed-tensors' arguments, config.json's kv_cache_scheme.
    """

    def __init__(self, decoder: DecoderLayer, scheme: dict[str, Any]) -> None:
        attention: Any = decoder.module.self_attn
        arguments = QuantizationArgs(**scheme)
        attention.quantization_scheme = QuantizationScheme(targets=["self_attn"], input_activations=arguments)
        # Observe only: the hidden states of calibration are not those of a quantized cache.
        attention.quantization_enabled = False
        _hook(decoder, attention)
        self._device = decoder.device
        self._finite: dict[str, list[torch.Tensor]] = {"k": [], "v": []}
        for name, register, hook in (
            ("k", register_key_hook, calibrate_key_hook),
            ("v", register_value_hook, calibrate_value_hook),
        ):
            initialize_observer(attention, name)
            register(attention, partial(self._look, name))
            register(attention, hook)
        self._attention = attention

    def broken(self, lengths: list[int], team: Team = ALONE) -> list[int]:
        """Which samples had NaN or infinite keys or values: indices into the lengths of the one `attend` since."""
        none = torch.empty(0, dtype=torch.bool, device=self._device)
        finite = torch.cat([none, *self._finite["k"]]) & torch.cat([none, *self._finite["v"]])
        whole = list(batches(lengths))
        finite = team.gather(finite, [sum(len(whole[at][0]) for at in part) for part in team.parts(len(whole))])
        starts = [start for group, _ in whole for start in group]
        order = {start: sample for sample, start in enumerate(accumulate(lengths, initial=0))}
        return sorted(order[start] for start, good in zip(starts, finite.tolist(), strict=True) if not good)

    def _look(self, name: str, _attention: torch.nn.Module, states: torch.Tensor) -> None:
        """Note which sequences of a batch [B, heads, T, dim] are finite."""
        self._finite[name].append(torch.isfinite(states).flatten(1).all(1))

    def scales(self, team: Team = ALONE) -> dict[str, torch.Tensor]:
        """`k_scale` and `v_scale`, float32 [1], from all that was observed, on several ranks of which
        the observer is one of ORDERLESS."""
        result = {}
        for name in ("k", "v"):
            observer: Any = getattr(self._attention, f"{name}_observer")
            # The statistics are in the activations' bf16; the scale itself is stored in fp32.
            own = (
                {key: value.float() for key, value in observer.get_statistics().items()}
                if observer.has_statistics
                else {}
            )
            # A rank that no sequence fell to has observed nothing.
            shapes = max(team.everyone({key: [*value.shape] for key, value in own.items()}), key=len)
            for key, shape in shapes.items():
                value = own.get(key)
                if team.size > 1:
                    least = observer._act_sync_dict[key] == dist.ReduceOp.MIN
                    if value is None:
                        value = torch.full(shape, torch.inf if least else -torch.inf, device=self._device)
                    value = team.least(value) if least else team.largest(value)
                setattr(observer, key, value)
            scale = observer.get_qparams()["scale"].float().cpu().reshape(1)
            # A server divides by it, on devices that may read a denormal as zero.
            result[f"{name}_scale"] = scale.clamp(min=torch.finfo(torch.float32).tiny)
        return result


def quantize_kv_cache(decoder: DecoderLayer, scheme: dict[str, Any], scales: dict[str, torch.Tensor]) -> None:
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
    _hook(decoder, attention)
    # The scales are fp32, and so is what they multiply; attention wants the query's dtype.
    attention.kv_cache.register_forward_hook(
        lambda _cache, given, result: tuple(
            after.to(before.dtype) for before, after in zip(given, result, strict=False)
        )
    )
