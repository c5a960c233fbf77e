"""llmcompressor's own AWQModifier on one random MiniMax-M2 block: what mmq's search is compared with and timed against.

Not a program. `tests/quantize/test_awq_stock.py` and `scripts/bench_awq.py` import it:

    layer = random_layer(experts=8, hidden=256, intermediate=128, dtype=torch.bfloat16, device=torch.device("cpu"))
    hidden = random_hidden(tokens=256, hidden=256, dtype=torch.bfloat16, device=torch.device("cpu"))
    model = build_model(layer, top_k=2)
    found = run_stock(model, hidden.split(128), duo_scaling=True, n_grid=20, all_experts=False)

Shapes: T tokens, k experts a token, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from llmcompressor.core import LifecycleCallbacks, create_session
from llmcompressor.modeling.moe.context import moe_calibration_context
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.utils import calibration_forward_context
from llmcompressor.utils.helpers import DisableQuantization
from pydantic import PrivateAttr
from transformers.models.minimax_m2.configuration_minimax_m2 import MiniMaxM2Config
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2RMSNorm, MiniMaxM2SparseMoeBlock

from mmq.families.minimax_m2 import MINIMAX_M2
from mmq.quantize.search import awq_mappings

GROUP_SIZE = 128
EXPERT_LINEARS = r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"
NORM = MINIMAX_M2.smooth_norm.removesuffix(".weight")


@dataclass
class Layer:
    """The part of a decoder layer that AWQ touches.

    Attributes:
        norm: [H], of the norm before the block.
        router: float32 [E, H].
        bias: float32 [E], added to the router's scores for choosing only.
        gate_up: [E, 2I, H], gate rows above up rows.
        down: [E, H, I].
    """

    norm: torch.Tensor
    router: torch.Tensor
    bias: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


def random_layer(
    experts: int,
    hidden: int,
    intermediate: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    unreached: Sequence[int] = (),
    negative: float = 1.0,
    spread: float = 0.7,
    outliers: float = 12.0,
) -> Layer:
    """A layer with random weights and a norm with outlier channels, without which every scale search ends at ratio 0.

    Args:
        unreached: experts whose bias keeps every token away.
        negative: factor on the experts' negative weights. The scale of a group is max|w| / 7.5, so a group's extreme
            weight, if negative, lies halfway between the codes -7 and -8, and an ulp in the smoothing scales decides.
            A small factor keeps the extremes positive, and makes the losses comparable digit for digit.
        spread: log-normal deviation of the norm and of the rows of the up layers.
        outliers: factor on eight channels of the norm.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=kind, device=device)

    norm = normal(hidden, kind=torch.float32).mul_(spread).exp_()
    norm[:: max(1, hidden // 8)] *= outliers
    gate_up = normal(experts, 2 * intermediate, hidden).mul_(hidden**-0.5)
    # Some of down's inputs are larger than others, as they are in a trained model.
    gate_up[:, intermediate:] *= normal(intermediate, 1, kind=torch.float32).mul_(spread).exp_().to(dtype)
    bias = normal(experts, kind=torch.float32).mul_(0.05).add_(8)
    bias[list(unreached)] = -8
    down = normal(experts, hidden, intermediate).mul_(intermediate**-0.5)
    if negative != 1:
        for weight in (gate_up, down):
            weight.mul_(torch.where(weight < 0, negative, 1.0))
    return Layer(
        norm=norm.to(dtype),
        router=normal(experts, hidden, kind=torch.float32).mul_(hidden**-0.5),
        bias=bias,
        gate_up=gate_up,
        down=down,
    )


def random_hidden(tokens: int, hidden: int, dtype: torch.dtype, device: torch.device, seed: int = 1) -> torch.Tensor:
    """A residual stream [T, H]."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tokens, hidden, generator=generator, dtype=dtype, device=device)


def minimax_config(layer: Layer, top_k: int) -> MiniMaxM2Config:
    """transformers' config of a model with this layer's sizes."""
    experts, hidden, intermediate = layer.down.shape
    return MiniMaxM2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        dtype=layer.down.dtype,
    )


def build_block(layer: Layer, top_k: int) -> MiniMaxM2SparseMoeBlock:
    """transformers' own block; it shares the layer's memory."""
    with torch.device("meta"):
        block = MiniMaxM2SparseMoeBlock(minimax_config(layer, top_k))
    tensors = {
        "gate.weight": layer.router,
        "e_score_correction_bias": layer.bias,
        "experts.gate_up_proj": layer.gate_up,
        "experts.down_proj": layer.down,
    }
    block.load_state_dict(tensors, strict=True, assign=True)
    return block.requires_grad_(False).eval()


class Model(torch.nn.Module):
    """`model.layers.0`, the smallest tree in which AWQ's mappings find what they name."""

    def __init__(self, layer: Layer, top_k: int) -> None:
        super().__init__()
        self.config = minimax_config(layer, top_k)
        norm = MiniMaxM2RMSNorm(layer.norm.shape[0], self.config.rms_norm_eps)
        # The search divides the norm's weight where it lies.
        norm.weight = torch.nn.Parameter(layer.norm.clone(), requires_grad=False)
        inner = torch.nn.Module()
        inner.add_module(NORM, norm)
        inner.add_module(MINIMAX_M2.moe_module, build_block(layer, top_k))
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList([inner])

    @property
    def norm(self) -> MiniMaxM2RMSNorm:
        return self.model.layers[0].get_submodule(NORM)

    @property
    def block(self) -> MiniMaxM2SparseMoeBlock:
        return self.model.layers[0].get_submodule(MINIMAX_M2.moe_module)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, S, H] -> [B, S, H], without the residual connection."""
        return self.block(self.norm(hidden_states))


def build_model(layer: Layer, top_k: int) -> Model:
    """Norm and block with llmcompressor's linear experts, which are copies of the layer's weights."""
    model = Model(layer, top_k)
    # The router's weight would be scaled where it lies.
    model.block.gate.weight = torch.nn.Parameter(layer.router.clone(), requires_grad=False)
    with torch.device(layer.down.device):
        linearize_moe(model)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def block_inputs(layer: Layer, hidden: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What mmq's search starts from, by transformers' norm and router, as `decoder_layer.DecoderLayer` does.

    Args:
        hidden: [T, H], the residual stream.

    Returns:
        x [T, H]; index int64 and weight float32 [T, k], sorted by expert.
    """
    tree = Model(layer, top_k)
    x = torch.cat([tree.norm(part) for part in hidden.split(2**14)])
    parts = [tree.block.gate(part, layer.bias) for part in x.split(2**14)]
    weight, index = torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])
    order = index.argsort(dim=1)
    return x, index.gather(1, order), weight.gather(1, order).float()


@dataclass
class Search:
    """One mapping's grid.

    Attributes:
        losses: as the stock modifier computed them, in the order of the grid.
        scales: float32 [in], the best.
        ratio, duo: the point they belong to.
    """

    losses: list[float]
    scales: torch.Tensor
    ratio: float
    duo: bool


@dataclass
class StockResult:
    """What the stock search found.

    Attributes:
        norm: of the norm before the block.
        down: of each expert's down layer; an expert that no token reached has none.
        grid: (ratio, duo scaling) of every point.
    """

    norm: Search
    down: dict[int, Search]
    grid: list[tuple[float, bool]]


class RecordingAWQModifier(AWQModifier):
    """AWQModifier that remembers the loss of every point it tries."""

    _searches: dict[str, Search] = PrivateAttr(default_factory=dict)
    _losses: list[float] = PrivateAttr(default_factory=list)

    def _compute_best_scale(self, mapping: Any, *args: Any) -> torch.Tensor:
        self._losses = []
        scales = super()._compute_best_scale(mapping, *args)
        best = min(range(len(self._losses)), key=self._losses.__getitem__)
        ratio, duo = self._get_grid_search_params()[best]
        self._searches[mapping.balance_names[-1]] = Search(self._losses, scales.float(), ratio, duo)
        return scales

    def _compute_loss(self, fp16_outputs: list[torch.Tensor], int_w_outputs: list[torch.Tensor]) -> float:
        loss = super()._compute_loss(fp16_outputs, int_w_outputs)
        self._losses.append(loss)
        return loss

    def result(self) -> StockResult:
        """All that was recorded."""
        down = {
            int(name.rsplit(".", 2)[1]): search
            for name, search in self._searches.items()
            if name.endswith(".down_proj")
        }
        (norm,) = (search for name, search in self._searches.items() if not name.endswith(".down_proj"))
        return StockResult(norm, down, self._get_grid_search_params())


@contextlib.contextmanager
def without_pinning() -> Iterator[None]:
    """Where there is no accelerator, the stock modifier raises when it pins memory; here it leaves memory as it is."""
    if torch.accelerator.is_available():
        yield
        return
    with mock.patch.object(IntermediatesCache, "pin_memory", lambda *_args, **_kwargs: None):
        yield


def run_stock(
    model: Model,
    batches: Sequence[torch.Tensor],
    duo_scaling: bool | str = True,
    n_grid: int = 20,
    all_experts: bool = True,
    pinning: bool = False,
) -> StockResult:
    """Calibration pass, search and smoothing by the stock modifier; the model's weights are smoothed, not quantized.

    The order of things is that of llmcompressor's sequential pipeline with one subgraph.

    Args:
        model: from `build_model`; good for one run.
        batches: of the residual stream, each [t, H].
        all_experts: llmcompressor's default, `moe_calibrate_all_experts`; else an expert sees its own tokens only.
        pinning: pin memory even where there is nothing to pin it for, and fail.
    """
    awq = RecordingAWQModifier(mappings=awq_mappings(MINIMAX_M2), duo_scaling=duo_scaling, n_grid=n_grid)
    weights = QuantizationModifier(scheme="W4A16", targets=[EXPERT_LINEARS])
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(create_session())
        if not pinning:
            stack.enter_context(without_pinning())
        if all_experts:
            stack.enter_context(moe_calibration_context())
        session.initialize(model=model, recipe=[awq, weights], start=-1)
        LifecycleCallbacks.calibration_start()
        stack.enter_context(calibration_forward_context(model))
        stack.enter_context(DisableQuantization(model))
        for number, batch in enumerate(batches):
            session.state.current_batch_idx = number
            model(hidden_states=batch.unsqueeze(0))
        # Without modules, the modifier that quantizes has nothing to do: only the search is of interest.
        LifecycleCallbacks.sequential_epoch_end([])
        LifecycleCallbacks.calibration_end()
        result = awq.result()
        session.finalize()
    return result
