"""One decoder layer at a time, built from transformers' own classes with a checkpoint's tensors.

The mixture-of-experts block is left out of the module: a stand-in records its input and returns zeros, so that the
layer's own forward gives the residual stream, and the block itself is computed on stacked weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.activations import ACT2FN

from mmq.errors import CalibrationError, CheckpointError, one_line, shown
from mmq.families.rotary import rope_parameters
from mmq.families.table import Architecture
from mmq.machine.team import ALONE, Team
from mmq.storage.shards import DTYPES
from mmq.tensors.experts import Activation, ClampedGate

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
    config = architecture.settings(config)
    config_class = architecture.transformers_class(architecture.config_class)
    # Its own fields alone: of those that all models share, num_labels alone fills any memory.
    fields = {*config_class.__annotations__, *architecture.config_fields}
    known = {key: value for key, value in config.items() if key in fields}
    known["rope_parameters"] = rope_parameters(config, architecture)
    activation = known.get("hidden_act", "silu")
    if architecture.clamped is None and (not isinstance(activation, str) or activation not in ACT2FN):
        raise CheckpointError(f"config.json: transformers knows no activation {shown(activation)}")
    try:
        result = config_class.from_dict(known)
        result._attn_implementation = "sdpa"
    except Exception as error:  # it raises whatever an odd value leads to
        raise CheckpointError(f"config.json: transformers refuses it: {one_line(error)}") from None
    return result


def embed(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of the embeddings [V, H] for int64 [T]: [T, H].

    Raises:
        CalibrationError: the tokenizer made a token that the model does not know.
    """
    check_tokens(table.shape[0], ids)
    return table[ids]


def check_tokens(rows: int, ids: torch.Tensor) -> None:
    """Raises CalibrationError where one of int64 [T] has no row in embeddings of so many."""
    largest = int(ids.max())
    if largest >= rows:
        raise CalibrationError(f"the tokenizer made token {largest}, the model knows {rows}")


class _Recorder(torch.nn.Module):
    """Stands where the mixture-of-experts block would: keeps its input, adds nothing to the residual stream.

    Args:
        parts: modules of the block that are no routed experts, by their names in it.
    """

    def __init__(self, parts: dict[str, torch.nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.inputs: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.inputs = hidden_states
        return torch.zeros_like(hidden_states)


class DecoderLayer:
    """A transformers decoder layer without its experts; one that has none is whole.

    The router is in the dtype that the server holds it in.

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
        self.has_experts = architecture.has_experts(layer)
        self.is_linear = layer in architecture.linear_at
        self.device = device
        self.config = config
        try:
            with torch.device("meta"):
                module = architecture.transformers_class(architecture.layer_class)(config, layer)
            self._rotary(torch.empty(1), torch.zeros(1, 1, dtype=torch.int64))
        except Exception as error:  # it raises whatever an odd value leads to
            raise CheckpointError(f"config.json: transformers can't build a layer from it: {one_line(error)}") from None
        # The router's bias, and whether the router is given it instead of holding it itself.
        self._bias: torch.Tensor | None = None
        self._bias_is_given = False
        self._shared: torch.nn.Module | None = None
        self._shared_gate: torch.nn.Module | None = None
        inside = {architecture.router, architecture.router_bias}
        named = {architecture.module_name(name): t.to(device) for name, t in tensors.items() if name not in inside}
        named = _fused(named, architecture)
        try:
            if self.has_experts:
                router = architecture.module_name(architecture.router).removesuffix(".weight")
                self._router = module.get_submodule(router)
                self._shared = self._take_shared(module)
                self.set_router(tensors[architecture.router].to(device))
                self._set_bias(router, tensors)
            module.load_state_dict(named, strict=True, assign=True)
            sparse = layer in architecture.sparse_at
            self._chooser = module.get_submodule(architecture.sparse_module) if sparse else None
        except (RuntimeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"layer {layer} does not fit {architecture.layer_class}: {one_line(error)}") from None
        # Nothing here is trained: without a gradient to follow from the inputs, none is recorded.
        self.module = module.eval().requires_grad_(False)

    def _rotary(self, x: torch.Tensor, positions: torch.Tensor) -> Any:
        """cos and sin [1, T, rotated dimensions] in the dtype of x for the positions int64 [1, T] of text.

        Made anew each time: transformers' module remembers the longest sequence that it saw, and rotates those after it
        otherwise (`dynamic`).
        """
        rotary = self.architecture.transformers_class(self.architecture.rotary_class)(self.config).to(x.device)
        axes = self.architecture.rotary_axes
        return rotary(x, positions.expand(axes, *positions.shape) if axes > 1 else positions)

    def set_router(self, weight: torch.Tensor) -> None:
        """Replace the router's weight, [E, H]."""
        served = weight.to(DTYPES[self.architecture.router_served])
        self._router.weight = torch.nn.Parameter(served, requires_grad=False)

    def _take_shared(self, module: torch.nn.Module) -> torch.nn.Module | None:
        """Put the stand-in where the block was; the shared expert, if there is one, stays in it."""
        arch, shared, parts = self.architecture, None, {}
        if arch.shared is not None:
            name = arch.module_name(arch.shared.prefix).removesuffix(".")
            shared = module.get_submodule(name)
            parts[name.removeprefix(f"{arch.moe_module}.")] = shared
        if arch.shared_gate is not None:
            name = arch.module_name(arch.shared_gate.module)
            self._shared_gate = parts[name.removeprefix(f"{arch.moe_module}.")] = module.get_submodule(name)
        setattr(module, arch.moe_module, _Recorder(parts))
        return shared

    def _set_bias(self, router: str, tensors: dict[str, torch.Tensor]) -> None:
        """Give the router the bias by which it chooses, as a buffer of its own or beside each of its inputs."""
        if self.architecture.router_bias is None:
            return
        self._bias = tensors[self.architecture.router_bias].to(self.device)
        name = self.architecture.module_name(self.architecture.router_bias)
        self._bias_is_given = not name.startswith(f"{router}.")
        if not self._bias_is_given:
            setattr(self._router, name.removeprefix(f"{router}."), self._bias)

    def set_norm(self, weight: torch.Tensor) -> None:
        """Replace the weight of the norm before the block, [H]."""
        name = self.architecture.module_name(self.architecture.smooth_norm).removesuffix(".weight")
        self.module.get_submodule(name).weight = torch.nn.Parameter(weight, requires_grad=False)

    def attend(self, hidden: torch.Tensor, lengths: list[int], team: Team = ALONE) -> torch.Tensor:
        """Everything before the experts: [T, H] of concatenated sequences -> the residual stream after attention; of a
        layer that has none, its output. Each rank computes its part of the batches, and is given the others'.
        """
        return in_batches(self.attend_batch, lengths, team, hidden)

    def attend_batch(self, batch: torch.Tensor) -> torch.Tensor:
        """`attend` for sequences of equal length, [B, T, H] -> [B, T, H]; autograd can follow it."""
        batch, length = batch.to(self.device), batch.shape[1]
        positions = torch.arange(length, device=self.device).unsqueeze(0)
        self._choose_of(length)
        output: torch.Tensor = self.module(
            batch,
            position_embeddings=self._rotary(batch, positions),
            attention_mask=None,
            position_ids=positions,
        )
        return output

    def _choose_of(self, length: int) -> None:
        """Have sparse attention choose its tokens only where a sequence has more than it chooses: its mask takes a
        number for each two tokens and head."""
        if self._chooser is None:
            return
        parent, _, name = self.architecture.sparse_module.rpartition(".")
        reach = math.prod(getattr(self.config, key) for key in self.architecture.sparse_reach)
        setattr(self.module.get_submodule(parent), name, self._chooser if length > reach else None)

    def block_input(self, residual: torch.Tensor, step: int = 2**14) -> torch.Tensor:
        """The norm before the block, applied to the residual stream [T, H]."""
        name = self.architecture.module_name(self.architecture.smooth_norm).removesuffix(".weight")
        norm = self.module.get_submodule(name)
        return torch.cat([norm(part) for part in residual.split(step)])

    def add_shared(self, residual: torch.Tensor, x: torch.Tensor, step: int = 2**14) -> torch.Tensor:
        """The residual stream [T, H] with what the shared expert makes of the block's input [T, H]."""
        if self._shared is None:
            return residual
        outputs = []
        for part in x.split(step):
            output = self._shared(part)
            outputs.append(output if self._shared_gate is None else self._shared_gate(part).sigmoid() * output)
        return residual + torch.cat(outputs)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """transformers' router on [T, H]: logits float32 [T, E], weights float32 [T, k], indices int64 [T, k].

        The choices of a token come sorted by expert, so that sums over them have one order on every device.
        """
        step = 2**14 if x.device.type != "cpu" else max(1, ONE_THREAD // self._router.weight.shape[0])
        given = (self._bias,) if self._bias_is_given else ()
        parts = [self._router(part, *given) for part in x.split(step)]
        logits, weights, index = (torch.cat(column) for column in zip(*parts, strict=True))
        order = index.argsort(dim=1)
        weights = weights.gather(1, order).float()
        if self.architecture.routed_scale_key is not None:
            weights = weights * getattr(self.config, self.architecture.routed_scale_key)
        return logits.float(), weights, index.gather(1, order)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """What the router chooses by, of its logits float32 [T, E]: a bias is added to their sigmoid, and without one
        all that comes between keeps their order."""
        return logits if self._bias is None else logits.sigmoid() + self._bias

    @torch.no_grad()
    def runner_up(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor | None:
        """The expert that a token [T, H] would choose next, given its choices: int64 [T, 1]; None where it has all."""
        if self._router.top_k >= self._router.weight.shape[0]:
            return None
        self._router.top_k += 1
        try:
            _, _, more = self.route(x)
        finally:
            self._router.top_k -= 1
        new = (more.unsqueeze(2) != index.unsqueeze(1)).all(2)
        return more.gather(1, new.byte().argmax(1, keepdim=True))

    @property
    def activation(self) -> Activation:
        if (clamped := self.architecture.clamped) is not None:
            return ClampedGate(getattr(self.config, clamped.alpha), getattr(self.config, clamped.limit))
        function: Activation = ACT2FN[self.config.hidden_act]
        return function


def _fused(named: dict[str, torch.Tensor], arch: Architecture) -> dict[str, torch.Tensor]:
    """A layer's tensors with those in one that transformers' class holds so."""
    result = dict(named)
    for parts, whole in arch.fused:
        for name in named:
            if name.endswith(f".{parts[0]}.weight"):
                prefix = name.removesuffix(f"{parts[0]}.weight")
                result[f"{prefix}{whole}.weight"] = torch.cat([result.pop(f"{prefix}{part}.weight") for part in parts])
    return result


def batches(lengths: list[int], tokens: int = BATCH_TOKENS) -> Iterator[tuple[list[int], int]]:
    """Sequences of equal length, as many as so many tokens allow at a time: (first tokens, length)."""
    starts: dict[int, list[int]] = {}
    position = 0
    for length in lengths:
        starts.setdefault(length, []).append(position)
        position += length
    for length, group in starts.items():
        size = max(1, tokens // length)
        for first in range(0, len(group), size):
            yield group[first : first + size], length


def in_batches(
    compute: Callable[..., torch.Tensor],
    lengths: list[int],
    team: Team,
    *given: torch.Tensor,
    tokens: int = BATCH_TOKENS,
) -> torch.Tensor:
    """A function of sequences of equal length, for concatenated sequences of any. Each rank computes its part of the
    batches, which are the same for any number of ranks, and is given the others'.

    Args:
        compute: [B, T, ...] of each of the given -> [B, T, ...], shaped as the first.
        given: [sum of the lengths, ...].
        tokens: in a batch, where a sequence has not more.
    """
    result = torch.empty_like(given[0])
    whole = list(batches(lengths, tokens))
    for starts, length in (whole[number] for number in team.part(len(whole))):
        stacked = [torch.stack([tensor[start : start + length] for start in starts]) for tensor in given]
        for start, sequence in zip(starts, compute(*stacked), strict=True):
            result[start : start + length] = sequence
    if team.size == 1:
        return result
    spans = [
        [(start, length) for at in part for (starts, length) in [whole[at]] for start in starts]
        for part in team.parts(len(whole))
    ]
    own = [result[start : start + length] for start, length in spans[team.rank]]
    gathered = team.gather(torch.cat([result[:0], *own]), [sum(length for _, length in span) for span in spans])
    done = 0
    for start, length in (one for span in spans for one in span):
        result[start : start + length] = gathered[done : done + length]
        done += length
    return result
