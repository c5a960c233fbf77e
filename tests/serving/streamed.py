"""The project's own streamed evaluation of a hybrid checkpoint, token by token."""

from __future__ import annotations

from enum import Enum
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from compressed_tensors.modeling.kvcache import initialize_hooked_kv_cache, register_key_hook, register_value_hook

from mmq.families.registry import architecture_of
from mmq.prove.forward import run_layer
from mmq.prove.weights import HybridWeights, read_layer, take_kv_scales
from mmq.quantize.decoder_layer import DecoderLayer, embed, transformers_config
from mmq.quantize.head import Head
from mmq.quantize.kv_cache import quantize_kv_cache
from mmq.storage.checkpoint import Checkpoint


class Cache(Enum):
    """What becomes of keys after rotary and of values.

    NEAREST is the project's fp8 cache, and that of vLLM on GPUs. TOWARD_ZERO is that of vLLM 0.32 on a CPU, whose
    `float_to_fp8e4m3_scalar` (csrc/cpu/cpu_attn_fp8.hpp) cuts the mantissa off.
    """

    BF16 = "bf16"
    NEAREST = "nearest"
    TOWARD_ZERO = "toward zero"


def log_probabilities(folder: Path, sequences: list[list[int]], cache: Cache) -> torch.Tensor:
    """Of each token after a sequence's first, given those before it: float32, all sequences one after the other."""
    device, lengths = torch.device("cpu"), [len(ids) for ids in sequences]
    checkpoint = Checkpoint.open(folder)
    arch = architecture_of(checkpoint.config)
    weights, config = HybridWeights(checkpoint, arch), transformers_config(arch, checkpoint.config)
    with checkpoint.reader() as reader:
        hidden = embed(reader[arch.embedding], torch.tensor([*chain(*sequences)])).clone()
        head = Head(arch, config, reader[arch.final_norm].clone(), reader[arch.head].clone())
    for layer in range(config.num_hidden_layers):
        content = read_layer(weights, arch, layer, device)
        scales = take_kv_scales(arch, content)
        decoder = DecoderLayer(arch, config, layer, content.rest, device)
        if not scales:
            pass
        elif cache is Cache.NEAREST:
            quantize_kv_cache(decoder, checkpoint.config["quantization_config"]["kv_cache_scheme"], scales)
        elif cache is Cache.TOWARD_ZERO:
            _truncate_kv_cache(decoder, config, scales)
        hidden = run_layer(decoder, content, hidden, lengths, group_size=128)
    return torch.cat(
        [
            head.log_probabilities(states)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            for states, ids in zip(hidden.split(lengths), sequences, strict=True)
        ]
    )


def toward_zero(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 to multiples of e4m3 values, none larger than what it came from."""
    scaled = (values.float() / scale).clamp(-448, 448)
    nearest = scaled.to(torch.float8_e4m3fn).float()
    # Half a step down from a value that was rounded up, and it is rounded to the one below.
    step = torch.exp2(scaled.abs().clamp(min=2**-6).log2().floor() - 3)
    below = (scaled - scaled.sign() * step / 2).to(torch.float8_e4m3fn).float()
    return torch.where(nearest.abs() > scaled.abs(), below, nearest) * scale


def _truncate_kv_cache(decoder: DecoderLayer, config: Any, scales: dict[str, torch.Tensor]) -> None:
    attention: Any = decoder.module.self_attn
    initialize_hooked_kv_cache(SimpleNamespace(config=config), attention)
    for register, name in ((register_key_hook, "k_scale"), (register_value_hook, "v_scale")):
        register(attention, lambda _, states, scale=scales[name]: toward_zero(states, scale).to(states.dtype))
