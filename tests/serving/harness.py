"""What the tests change in vLLM 0.32 so that MiniMax-M2 runs on a CPU, and what they watch.

Runs in the environment of vLLM, in the engine's own process (VLLM_ENABLE_V1_MULTIPROCESSING=0), or as a plugin of
vLLM's in each process of a server. No patch touches
config parsing, the plugin's entry point, the loader, attention, the KV cache and its scales, or the sampler. The only
arithmetic that is ever replaced is that of the int4 experts, by `Experts(plain=True)`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

# Patches: vLLM's GPU backends know MiniMax-M2's routing and these kinds of weights, its CPU backend does not.


def minimax_routing() -> None:
    """Sigmoid routing with a bias. The CPU router knows it only with groups of experts: here there is one group."""
    from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt4
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    route, supports = CPURouter._compute_routing, CPUExpertsInt4._supports_routing_method

    def one_group(self: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self.scoring_func == "sigmoid" and not self.use_grouped_topk:
            self.use_grouped_topk, self.num_expert_group, self.topk_group = True, 1, 1
        return route(self, *args, **kwargs)

    def supports_minimax(method: Any, *args: Any) -> bool:
        return method == RoutingMethodType.MiniMax2 or supports(method, *args)

    CPURouter._compute_routing = one_group
    CPUExpertsInt4._supports_routing_method = staticmethod(supports_minimax)


def kernels_without_amx() -> None:
    """The int4 and the fp8 kernel ask for AMX, but compute the same with AVX-512: admit them there.

    Does nothing on a processor that has AMX.
    """
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt4

    if torch.cpu._is_amx_tile_supported() or not torch.cpu._is_avx512_supported():
        return
    CPUExpertsInt4._supports_current_device = staticmethod(lambda: True)
    CPUFp8BlockScaledMMKernel.is_supported = classmethod(lambda *_: (True, None))


def weight_only_linear() -> None:
    """The list of weight-only fp8 kernels is empty for CPUs: enter the block-fp8 kernel, which is weight-only."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
    from vllm.platforms import PlatformEnum

    class WeightOnly(CPUFp8BlockScaledMMKernel):
        def __init__(self, config: Any, layer_param_names: list[str]) -> None:
            super().__init__(config)

    linear._POSSIBLE_WFP8A16_KERNELS[PlatformEnum.CPU].append(WeightOnly)


PATCHES: dict[str, Callable[[], None]] = {
    patch.__name__: patch for patch in (minimax_routing, kernels_without_amx, weight_only_linear)
}


# Watching.


class LoadedTensors:
    """Writes all parameters to a file as the loader filled them, before they are repacked for a kernel."""

    def __init__(self, path: Path) -> None:
        from vllm.model_executor.model_loader import base_loader

        process = base_loader.process_weights_after_loading

        def watch(model: torch.nn.Module, *args: Any) -> None:
            save_file({name: tensor.detach().clone() for name, tensor in model.named_parameters()}, path)
            process(model, *args)

        base_loader.process_weights_after_loading = watch


class Experts:
    """Computes the int4 experts a second time, plainly, from the tensors that the loader filled.

    vLLM's CPU kernel rounds activations to int8, which no GPU kernel of this scheme does.

    Args:
        plain: the model goes on with the plain result, so that nothing but the kernel's int8 is taken out.

    Attributes:
        errors: ||kernel - plain|| / ||plain|| of each call.
    """

    def __init__(self, plain: bool) -> None:
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt4
        from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
            compressed_tensors_moe_wna16,
        )

        self.errors: list[float] = []
        method = compressed_tensors_moe_wna16.CompressedTensorsWNA16MoEMethod
        process, kernel = method.process_weights_after_loading, CPUExpertsInt4.apply

        def keep_weights(layer_method: Any, layer: torch.nn.Module) -> None:
            names = ("w13", "w2")
            weights = [
                _unpacked(getattr(layer, f"{w}_weight_packed"), getattr(layer, f"{w}_weight_scale")) for w in names
            ]
            process(layer_method, layer)
            layer_method.moe_kernel.fused_experts.plain_weights = weights

        def apply(experts: Any, **call: Any) -> None:
            x, output = call["hidden_states"].clone(), call["output"]
            kernel(experts, **call)
            expected = _experts(x, *experts.plain_weights, call["topk_weights"], call["topk_ids"])
            self.errors.append(float((output.float() - expected).norm() / expected.norm()))
            if plain:
                output.copy_(expected)

        method.process_weights_after_loading = keep_weights
        CPUExpertsInt4.apply = apply


def _unpacked(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int32 [E, N, K/8] with the lowest nibble first, scales [E, N, K/g]: fp32 [E, N, K], each rounded to bf16."""
    codes = torch.stack([packed >> shift & 15 for shift in range(0, 32, 4)], dim=-1).flatten(2) - 8
    values = codes.float() * scale.float().repeat_interleave(codes.shape[2] // scale.shape[2], dim=2)
    return values.bfloat16().float()


def _experts(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, share: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """[T, H] in fp32 from x [T, H], gate above up [E, 2I, H], down [E, H, I], shares and experts [T, k]."""
    result = torch.zeros(x.shape, dtype=torch.float32)
    for expert in range(w13.shape[0]):
        token, slot = (index == expert).nonzero(as_tuple=True)
        gate, up = (x[token].float() @ w13[expert].T).chunk(2, dim=-1)
        result.index_add_(0, token, share[token, slot, None] * ((F.silu(gate) * up) @ w2[expert].T))
    return result
