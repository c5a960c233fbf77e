"""A checkpoint as the source of a run: its weights, scales, and their dequantized values."""

from __future__ import annotations

from functools import cached_property

import torch

from mmq.errors import CheckpointError, shown
from mmq.families.rotary import rope_parameters
from mmq.families.sizes import Dimensions
from mmq.families.table import Architecture
from mmq.machine.transfer import Lane
from mmq.source.formats import FP8, format_of
from mmq.source.outside import check_outside
from mmq.source.stacks import unstacked
from mmq.storage.checkpoint import Checkpoint, TensorReader
from mmq.storage.shards import TensorSpec
from mmq.tensors.fp8 import broken_matrices, dequantize_block, dequantize_blocks, is_finite

# Endings of all formats' scales, which in another one belong to nothing.
SCALES = ("_scale_inv", ".weight_scale")
# fp8 codes on a GPU at one time, before they are dequantized.
STACK_BYTES = 2**28
# Times fp8's largest value, 448, it is still a bf16.
LARGEST_SAFE_SCALE = torch.finfo(torch.bfloat16).max / torch.finfo(torch.float8_e4m3fn).max


class SourceModel:
    """A checkpoint whose headers say that it can be taken.

    Attributes:
        architecture: how it is wired.
        config: config.json's settings of the decoder.
        format: how its matrices are stored.

    Raises:
        CheckpointError: its format is none that mmq reads, or a scale is missing, orphaned or of the wrong shape or
            dtype.
    """

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture) -> None:
        self.architecture = architecture
        self.config = architecture.settings(checkpoint.config)
        try:
            self.format = format_of(self.config)
            self.format.plain(self.config, architecture)  # or it would be met by what counts the result's bytes
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint.folder}: {error}") from None
        self.checkpoint = checkpoint
        self._check_numbers()
        self.checkpoint = checkpoint = unstacked(checkpoint, architecture)
        self._check_sizes()
        for name in self.scales:
            self._check_pair(name)
        self._check_rest()
        self._check_layers()
        check_outside(checkpoint, architecture)
        # A file that can't be carried is met before the hours of work, not after them.
        checkpoint.carried_files()

    @cached_property
    def scales(self) -> dict[str, str]:
        """fp8 weights and the names of their scales."""
        specs, suffix = self.checkpoint.specs, self.format.storage.scale_suffix
        return {name: name + suffix for name, spec in specs.items() if spec.dtype == FP8} if suffix else {}

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors of the dequantized checkpoint."""
        dropped = set(self.scales.values())
        return {
            name: TensorSpec(name, "BF16", spec.shape) if name in self.scales else spec
            for name, spec in self.checkpoint.specs.items()
            if name not in dropped
        }

    def read(
        self,
        reader: TensorReader,
        name: str,
        device: torch.device | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A tensor of the dequantized checkpoint: fp8 weights become bf16, all others are as in the file.

        Args:
            out: bfloat16 of its shape on the device, where the weight is dequantized or copied to.

        Raises:
            CheckpointError: it holds a NaN or an infinity, or its dequantized values would.
        """
        weight = reader[name]
        if device is not None and device.type != "cpu":
            weight = weight.to(device)
        if not is_finite(weight):
            raise CheckpointError(f"{self.checkpoint.folder}: {name} holds NaN or infinite values")
        if name not in self.scales:
            return weight if out is None else out.copy_(weight)
        # In fp32, where a bf16 is exact.
        scale = reader[self.scales[name]].to(weight.device).float()
        if not is_finite(scale):
            raise CheckpointError(f"{self.checkpoint.folder}: {self.scales[name]} holds NaN or infinite values")
        result = dequantize_block(weight, scale, out)
        # Only such a scale can lead out of bf16's range, and looking at every weight again would take its time.
        if float(scale.abs().max()) > LARGEST_SAFE_SCALE and not is_finite(result):
            raise CheckpointError(f"{self.checkpoint.folder}: {name} times {self.scales[name]} is beyond bf16's range")
        return result

    def read_stack(self, reader: TensorReader, names: list[str], lane: Lane, target: torch.Tensor) -> None:
        """Matrices of one shape and format, dequantized into bfloat16 [n, out, in] on the lane's device.

        Raises:
            CheckpointError: as `read`.
        """
        if lane.device.type == "cpu":
            for name, own in zip(names, target, strict=True):
                self.read(reader, name, out=own)
            return
        folder = self.checkpoint.folder
        if names[0] not in self.scales:
            with lane.running():
                for name, own in zip(names, target, strict=True):
                    lane.to_device(reader[name], own)
                found = broken_matrices(target).cpu()
            for name, bad in zip(names, found.tolist(), strict=True):
                if bad:
                    raise CheckpointError(f"{folder}: {name} holds NaN or infinite values")
            return
        together = max(1, STACK_BYTES // target[0].numel())
        scales = torch.stack([reader[self.scales[name]].float() for name in names])
        broken = []
        with lane.running():
            for first in range(0, len(names), together):
                some = slice(first, first + together)
                codes = torch.empty(target[some].shape, dtype=torch.float8_e4m3fn, device=lane.device)
                for name, own in zip(names[some], codes, strict=True):
                    lane.to_device(reader[name], own)
                factors = torch.empty(scales[some].shape, device=lane.device)
                lane.to_device(scales[some], factors)
                dequantize_blocks(codes, factors, target[some])
                broken.append(broken_matrices(codes))
            found = torch.cat(broken).cpu()
        for name, scale, bad in zip(names, scales, found.tolist(), strict=True):
            if bad:
                raise CheckpointError(f"{folder}: {name} holds NaN or infinite values")
            if not is_finite(scale):
                raise CheckpointError(f"{folder}: {self.scales[name]} holds NaN or infinite values")
        for place in (scales.abs().flatten(1).amax(1) > LARGEST_SAFE_SCALE).nonzero().flatten().tolist():
            if not is_finite(target[place]):
                raise CheckpointError(
                    f"{folder}: {names[place]} times {self.scales[names[place]]} is beyond bf16's range"
                )

    def layer_count(self) -> int:
        return int(self.config[self.architecture.layers_key])

    def expert_count(self) -> int:
        return int(self.config[self.architecture.experts_key])

    def kept_scales(self, shared: bool) -> dict[str, str]:
        """fp8 weights that keep the source's bytes, and the names of their scales: of the decoder layers, then of what
        is carried.

        Args:
            shared: what reads the norm before the experts keeps them too.
        """
        arch: Architecture = self.architecture
        result: dict[str, str] = {}
        for layer in range(self.layer_count()):
            prefix = arch.layer_prefix(layer)
            for weight in (*arch.kept(layer), *(arch.scaled(layer) if shared else ())):
                if (name := prefix + weight.name) in self.scales:
                    result[name] = self.scales[name]
        return result | {name: scale for name, scale in self.scales.items() if arch.is_extra(name)}

    def attention_matrices(self) -> frozenset[str]:
        """All of attention's matrices in the decoder layers but those that are too narrow for fp8."""
        arch, layers = self.architecture, range(self.layer_count())
        return frozenset(
            arch.layer_prefix(layer) + weight.name
            for layer in layers
            for weight in arch.attention_of(layer)
            if weight.is_matrix
        )

    def layer_names(self, layer: int) -> list[str]:
        """Dequantized tensors of a decoder layer."""
        return self._by_layer[layer]

    def outside_names(self) -> list[str]:
        """Dequantized tensors outside the decoder layers."""
        return self._by_layer[None]

    @cached_property
    def _by_layer(self) -> dict[int | None, list[str]]:
        result: dict[int | None, list[str]] = {None: []}
        for name in self.specs:
            layer, _ = self.architecture.split(name)
            # Layers past the last are extras such as multi-token prediction; they are carried.
            key = layer if layer is not None and layer < self.layer_count() else None
            result.setdefault(key, []).append(name)
        return result

    def _check_pair(self, name: str) -> None:
        specs, folder = self.checkpoint.specs, self.checkpoint.folder
        scale = specs.get(self.scales[name])
        if scale is None:
            raise CheckpointError(f"{folder}: {name} is fp8, but its scale {self.scales[name]} is missing")
        shape, storage, wanted = specs[name].shape, self.format.storage, self.format.scale_dtypes
        fits = len(shape) == 2 and scale.shape == storage.scale_shape(shape)
        if not fits or scale.dtype not in wanted:
            sizes = str(list(storage.scale_shape(shape))) if len(shape) == 2 else "and a matrix"
            raise CheckpointError(
                f"{folder}: {scale.name} is {scale.dtype} {shown(list(scale.shape))}, but {name} of shape"
                f" {shown(list(shape))} needs {' or '.join(wanted)} {sizes} for {_blocks_text(storage.block)}"
            )
        layer, local = self.architecture.split(name)
        arch = self.architecture
        kept = {w.name for w in (*arch.kept(layer), *arch.scaled(layer))} if layer is not None else set()
        inside = layer is not None and layer < self.layer_count()
        if not arch.is_extra(name) and not (inside and (local in kept or arch.split_expert(local))):
            raise CheckpointError(f"{folder}: {name} is fp8, but neither attention nor an expert of a decoder layer")

    def _check_rest(self) -> None:
        known = set(self.scales.values())
        for name, spec in self.checkpoint.specs.items():
            if spec.dtype == FP8 and name not in self.scales:
                raise CheckpointError(
                    f"{self.checkpoint.folder}: {name} is fp8, but config.json has no quantization_config that says so"
                )
        for name, spec in self.checkpoint.specs.items():
            if name.endswith(SCALES) and name not in known:
                raise CheckpointError(f"{self.checkpoint.folder}: the scale {name} belongs to no fp8 weight")
            layer, _ = self.architecture.split(name)
            inside = layer is not None and layer < self.layer_count()
            if not inside and not self.architecture.is_extra(name) and self.architecture.looks_quantized(name):
                raise CheckpointError(
                    f"{self.checkpoint.folder}: {name} lies outside the decoder layers under the name of what is"
                    " quantized in them"
                )
            if spec.dtype == "F8_E5M2":
                raise CheckpointError(f"{self.checkpoint.folder}: {name} is e5m2; only e4m3 is supported")

    def _check_numbers(self) -> None:
        """config.json's sizes are numbers."""
        arch, config, where = self.architecture, self.config, self.checkpoint.folder / "config.json"
        for key in (arch.layers_key, arch.experts_key, arch.top_k_key, arch.hidden_key, arch.intermediate_key):
            value = config.get(key)
            if type(value) is not int or value < 1:
                raise CheckpointError(f"{where}: {key} is {shown(value)} instead of a positive number")

    def _check_sizes(self) -> None:
        """They are such that the shards can hold them; nothing is allocated by them before."""
        arch, config, where = self.architecture, self.config, self.checkpoint.folder / "config.json"
        layers, experts = self.layer_count(), self.expert_count()
        if (layers - len(arch.dense_at)) * experts * len(arch.expert_linears) > len(self.checkpoint.specs):
            raise CheckpointError(
                f"{where} tells of {shown(layers)} layers with {shown(experts)} experts, the shards hold"
                f" {len(self.checkpoint.specs)} tensors"
            )
        if config[arch.top_k_key] > experts:
            raise CheckpointError(
                f"{where}: {arch.top_k_key} is {shown(config[arch.top_k_key])}, with {experts} experts"
            )
        dims = Dimensions.of(config, arch)
        if dims.heads % dims.kv_heads:
            raise CheckpointError(
                f"{where}: num_attention_heads is {dims.heads}, not a multiple of num_key_value_heads = {dims.kv_heads}"
            )
        if arch.latent and dims.heads != dims.kv_heads:
            raise CheckpointError(
                f"{where}: num_key_value_heads is {dims.kv_heads}, though all {dims.heads} heads share one latent"
            )
        rope_parameters(config, arch)

    def _check_layers(self) -> None:
        """Every layer holds attention, router and all experts, of config.json's sizes, in fp8 where it must be."""
        arch, specs = self.architecture, self.checkpoint.specs
        experts, dims = self.expert_count(), Dimensions.of(self.config, arch)
        hidden = dims.hidden
        for layer in range(self.layer_count()):
            prefix, routed = arch.layer_prefix(layer), range(experts if arch.has_experts(layer) else 0)
            shapes = {
                prefix + weight.name.format(expert=expert): dims.shape(weight)
                for expert in routed
                for weight in arch.experts.weights
            }
            shapes |= {prefix + weight.name: dims.shape(weight) for weight in arch.kept(layer)}
            either = {prefix + weight.name for weight in (arch.shared.weights if arch.shared else ())}
            either |= {prefix + w.name for w in arch.kept(layer) if w.plain or self.format.partly}
            for name in shapes.keys() - either:
                if self.format.quantized and name in specs and name not in self.scales:
                    raise CheckpointError(f"{self.checkpoint.folder}: {name} is {specs[name].dtype} instead of fp8")
            norms = {prefix + w.name: dims.shape(w) for w in arch.attention_of(layer) if len(w.shape) != 2}
            norms[prefix + arch.smooth_norm] = (hidden,)
            dtypes = {prefix + w.name: w.dtypes for w in arch.attention_of(layer)}
            shapes |= {prefix + weight.name: dims.shape(weight) for weight in arch.scaled(layer)}
            plain = [*norms, *(name for name in shapes if name in specs and name not in self.scales)]
            shapes |= norms
            router = [prefix + name for name in (arch.router, arch.router_bias) if name and routed]
            shapes |= dict(zip(router, ((experts, hidden), (experts,)), strict=False))
            for name, expected in shapes.items():
                if name not in specs:
                    raise CheckpointError(f"{self.checkpoint.folder}: {name} is missing")
                if specs[name].shape != expected:
                    raise CheckpointError(
                        f"{self.checkpoint.folder}: {name} has the shape {shown(list(specs[name].shape))},"
                        f" config.json's sizes make it {list(expected)}"
                    )
            for name in plain:
                self._check_dtype(name, *dtypes.get(name, ("BF16",)))
            for name in router:
                self._check_dtype(name, "BF16", "F32")
            for name in self.layer_names(layer):
                parts = arch.split_expert(arch.split(name)[1])
                if parts and parts[0] >= experts:
                    raise CheckpointError(f"{self.checkpoint.folder}: {name} is beyond config.json's {experts} experts")
                if parts and parts[2] != "weight":
                    raise CheckpointError(
                        f"{self.checkpoint.folder}: {name} is neither an expert's weight nor its scale"
                    )
        for name, dimensions in ((arch.embedding, 2), (arch.head, 2), (arch.final_norm, 1)):
            if name in specs:
                self._check_dtype(name, "BF16")
                shape = specs[name].shape
                if len(shape) != dimensions or shape[-1] != hidden:
                    raise CheckpointError(
                        f"{self.checkpoint.folder}: {name} has the shape {shown(list(shape))}, config.json's"
                        f" hidden_size is {hidden}"
                    )

    def _check_dtype(self, name: str, *wanted: str) -> None:
        """Hidden states are bf16, and so is what they pass through; only the router may be finer."""
        dtype = self.checkpoint.specs[name].dtype
        if dtype not in wanted:
            raise CheckpointError(f"{self.checkpoint.folder}: {name} is {dtype} instead of {' or '.join(wanted)}")


def _blocks_text(block: tuple[int, int]) -> str:
    rows, columns = (str(size) if size else "all" for size in block)
    return f"{rows}x{columns} blocks" if block[0] and block[1] else f"blocks of {rows} rows and {columns} columns"
