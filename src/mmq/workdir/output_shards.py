"""Which tensors lie in which shard of the quantized outputs: one shard per decoder layer and one for the rest."""

from __future__ import annotations

from mmq.families.sizes import BLOCK_FP8
from mmq.storage.shards import TensorSpec
from mmq.workdir.workspace import Workspace

SCALE_NAME = "weight_scale"
LAYER = "layer-"  # how the names of decoder layers in the journal begin
PACK = 8  # int4 codes in an int32


def layers_and_rest(workspace: Workspace) -> list[int | None]:
    """All decoder layers, then None for what lies outside them."""
    return [*range(workspace.source.layer_count()), None]


def layer_unit(layer: int) -> str:
    """A decoder layer's name in the journal."""
    return f"{LAYER}{layer:05d}"


def shard_name(workspace: Workspace, layer: int | None) -> str:
    """The file that holds a layer, or the rest."""
    count = workspace.source.layer_count()
    number = count + 1 if layer is None else layer + 1
    return f"model-{number:05d}-of-{count + 1:05d}.safetensors"


def quantized_specs(workspace: Workspace, layer: int | None) -> list[TensorSpec]:
    """A shard of the awq output: packed experts and KV scales, everything else as in the dequantized checkpoint."""
    source, arch, awq = workspace.source, workspace.architecture, workspace.recipe.awq
    if layer is None:
        return [source.specs[tensor] for tensor in source.outside_names()]
    specs = []
    for tensor in source.layer_names(layer):
        spec = source.specs[tensor]
        local = arch.split(tensor)[1]
        if local == arch.router:
            specs.append(TensorSpec(tensor, arch.router_served, spec.shape))
            continue
        if arch.split_expert(local) is None:
            specs.append(spec)
            continue
        rows, columns = spec.shape
        specs.append(TensorSpec(f"{tensor}_packed", "I32", (rows, columns // PACK)))
        specs.append(TensorSpec(f"{tensor}_scale", "BF16", (rows, columns // awq.group_size)))
        specs.append(TensorSpec(f"{tensor}_shape", "I64", (2,)))
    if awq.kv_cache_scheme is not None and arch.has_kv_scales(layer):
        prefix = arch.layer_prefix(layer) + arch.attention_module
        specs += [TensorSpec(f"{prefix}.{scale}", "F32", (1,)) for scale in ("k_scale", "v_scale")]
    return specs


def hybrid_specs(workspace: Workspace, layer: int | None) -> list[TensorSpec]:
    """A shard of the hybrid checkpoint: the awq output's, with what else was fp8, and its scales, as in the source."""
    originals = workspace.source.checkpoint.specs
    specs = []
    for spec in quantized_specs(workspace, layer):
        scale = workspace.kept_scales.get(spec.name)
        if spec.name in workspace.rounded:
            specs.append(TensorSpec(spec.name, BLOCK_FP8.dtype, spec.shape))
            specs.append(TensorSpec(scale_name(spec.name), "F32", BLOCK_FP8.scale_shape(spec.shape)))
        elif scale is None:
            specs.append(spec)
        else:
            specs.append(originals[spec.name])
            specs.append(TensorSpec(scale_name(spec.name), originals[scale].dtype, originals[scale].shape))
    return specs


def scale_name(weight: str) -> str:
    """`...q_proj.weight` -> `...q_proj.weight_scale`, compressed-tensors' name."""
    return weight.removesuffix("weight") + SCALE_NAME
