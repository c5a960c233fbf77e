"""Operations of mmq that a device must compute as a CPU does, each with its inputs, and how near it must come.

Not a program: `scripts/gpu_check.py --parts kernels` goes through them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from mmq.families.minimax_m2 import MINIMAX_M2
from mmq.machine.team import ALONE
from mmq.quantize.decoder_layer import DecoderLayer, transformers_config
from mmq.quantize.fisher import SourceLayer, fisher
from mmq.quantize.head import Head
from mmq.quantize.layer import LayerContent
from mmq.quantize.rounding import ENOUGH, Compensation, Metric, Smoothing, judge
from mmq.quantize.routed_experts import ExpertBlock, Weights, top_up
from mmq.source.synth import model_config
from mmq.tensors import experts, fp8, int4, rounding, smoothing
from mmq.tensors.experts_gradient import block_output, contested
from mmq.tensors.int4 import QuantizedStack
from mmq.tensors.rounding import Factor, factorize
from real_layers import Draw, Shape, layer_in_memory

# The fp32 sum of a row's 3072 products in another order, and its rounding to bf16.
SUMS, ROUNDED = 1e-4, 2**-6
# Factors of damped matrices; a sum of squared errors, of which a few come to another code; losses of a block in bf16.
FACTOR, SQUARES, JUDGED = 1e-4, 1e-3, 0.05
# The share of codes or scales that may be others: one that lay on an edge, and those in its row that make up for it.
OTHERS = 0.01
GROUP = 128
# Numbers of a matrix that a CPU rounds by compiled code.
WHOLE = 2**30
SHAPE = Shape(8, 256, 128, 2, 4, 2, 64)


@dataclass(frozen=True)
class Check:
    """An operation, given its inputs on a device: what must be the same there and on the CPU.

    Attributes:
        tolerance: of the largest magnitude; 0 for the same bits.
        others: the share of the numbers that may have other bits.
    """

    name: str
    inputs: Callable[[Any], list[Any]]
    operation: Callable[..., Any]
    tolerance: float = 0.0
    others: float = 0.0


def checks() -> list[Check]:
    """One line an operation: further ones come here."""
    return [*_of_the_search(), *_of_rounding(), *_of_the_gradient()]


def normal(g: Any, *shape: int) -> Any:
    return torch.randn(*shape, generator=g)


def _of_the_search() -> list[Check]:

    def weights(g: Any) -> list[Any]:
        """Weights with zero groups, ties, denormal and large numbers."""
        weight = normal(g, 3, 64, 512) * 2.0 ** torch.randint(-20, 20, (3, 64, 1), generator=g)
        weight[0, 0] = 0
        weight[0, 1] = torch.arange(512).remainder(15).sub(7).add(0.5)
        weight[0, 2] *= 1e-38
        weight[1, 0, 5] = 3e38
        return [weight.to(torch.bfloat16), normal(g, 512).exp()]

    def codes(g: Any) -> list[Any]:
        every = torch.arange(256, dtype=torch.uint8)
        every[[0x7F, 0xFF]] = 0
        weight = every[torch.randint(0, 256, (3, 300, 384), generator=g)].view(torch.float8_e4m3fn)
        return [weight, normal(g, 3, 3, 3).mul(3).exp()]

    counts = torch.tensor([0, 700, 1, 33, 1290, 0, 24])
    ends = counts.cumsum(0).to(torch.int32)

    def routed(g: Any, inner: int, width: int) -> list[Any]:
        rows = normal(g, int(ends[-1]), inner).to(torch.bfloat16)
        return [rows, (normal(g, 7, width, inner) * inner**-0.5).to(torch.bfloat16), ends]

    def gathered(g: Any) -> list[Any]:
        x = normal(g, 300, 1024).to(torch.bfloat16)
        token = torch.randint(0, 300, (int(ends[-1]),), generator=g)
        return [x, token, (normal(g, 7, 512, 1024) / 32).to(torch.bfloat16), ends]

    def combined(g: Any) -> list[Any]:
        outputs = normal(g, 512 * 4, 1000).to(torch.bfloat16)
        place = torch.randperm(512 * 4, generator=g).view(512, 4).sort(1).values
        return [outputs, place, torch.rand(512, 4, generator=g), normal(g, 512, 1000)]

    silu = torch.nn.functional.silu
    return [
        Check("fake_quantize_scaled", weights, lambda w, s: int4.fake_quantize_scaled(w, s, 128)),
        Check("fake_quantize_scaled, groups of 32", weights, lambda w, s: int4.fake_quantize_scaled(w, s, 32)),
        Check(
            "fake_quantize_scaled, the change",
            weights,
            lambda w, s: int4.fake_quantize_scaled(w, s.expand(3, 1, -1), 128, change=True),
        ),
        Check("normalized_mean", weights, lambda w, s: int4.normalized_mean(w, 128), 1e-6),
        Check(
            "quantize_in_place, codes",
            weights,
            lambda w, s: int4.quantize_in_place(w.clone(), s, None, 128)[0],
        ),
        Check("quantize_in_place, scales", weights, lambda w, s: int4.quantize_in_place(w.clone(), s, None, 128)[1]),
        Check("dequantize_blocks", codes, lambda w, s: fp8.dequantize_blocks(w, s)),
        Check("dequantize_block", codes, lambda w, s: fp8.dequantize_block(w[1], s[1])),
        Check("broken_matrices", codes, lambda w, s: fp8.broken_matrices(w)),
        Check("grouped_linear", lambda g: routed(g, 1024, 384), experts.grouped_linear, ROUNDED),
        Check(
            "grouped_rows into a part",
            lambda g: routed(g, 512, 1000),
            lambda r, w, e: experts.grouped_rows(r, w, e, r.new_zeros(len(r) + 9, 1000)[4:-5]),
            ROUNDED,
        ),
        Check("gated_rows", gathered, lambda x, t, w, e: experts.gated_rows(x, t, w, e, silu), ROUNDED),
        Check("combine", combined, lambda o, p, w, r: experts.combine(o, p, w, r.clone()), 1e-6),
        Check("combine, a batch", combined, lambda o, p, w, r: experts.combine(o[500:900], p, w, r.clone(), 500), 1e-6),
        Check("token_losses", combined, lambda o, p, w, r: experts.token_losses(o, p, w, r), SUMS),
        Check("token_losses, a batch", combined, lambda o, p, w, r: experts.token_losses(o[:900], p, w, r), SUMS),
        Check(
            "squares_by_expert",
            lambda g: routed(g, 1024, 8),
            lambda r, w, e: experts.squares_by_expert(r.clone(), e),
            2**-7,
        ),
        Check("magnitude_sums", lambda g: routed(g, 1024, 8), _magnitudes, SUMS),
        Check("second_moments", lambda g: routed(g, 512, 8), _moments, SUMS),
        Check(
            "quadratic_form",
            lambda g: [normal(g, 3, 96, 256).to(torch.bfloat16), normal(g, 3, 256, 256)],
            lambda d, m: experts.quadratic_form(d, m @ m.transpose(1, 2)),
            ROUNDED,
        ),
        Check("row_squares", lambda g: [normal(g, 700, 1000)], lambda x: experts.row_squares(x.clone()), 1e-6),
        Check("gated_rows, rows given", lambda g: routed(g, 512, 256), _gated, ROUNDED),
        Check(
            "gated_rows, one row",
            lambda g: routed(g, 512, 256),
            lambda r, w, e: _gated(r[:1], w[:1], e[1:2] // 700),
            ROUNDED,
        ),
        Check(
            "grouped_linear, one row",
            lambda g: routed(g, 512, 256),
            lambda r, w, e: experts.grouped_linear(r[:1], w[:1], e[1:2] // 700),
            ROUNDED,
        ),
        Check(
            "grouped_linear, no rows",
            lambda g: routed(g, 512, 256),
            lambda r, w, e: experts.grouped_linear(r[:0], w, e * 0),
        ),
        Check("grouped_linear, no tile's width", lambda g: routed(g, 520, 248), experts.grouped_linear, ROUNDED),
        Check(
            "Rows.of, order",
            lambda g: [torch.randint(0, 9, (700, 4), generator=g)],
            lambda i: experts.Rows.of(i, 9).token,
        ),
        Check(
            "Rows.of, places",
            lambda g: [torch.randint(0, 9, (700, 4), generator=g)],
            lambda i: experts.Rows.of(i, 9).place,
        ),
        Check(
            "smooth_norm",
            lambda g: [normal(g, 512).to(torch.bfloat16), normal(g, 512).exp()],
            lambda n, s: smoothing.smooth_norm(n, s)[0],
        ),
        Check(
            "smooth_norm, applied",
            lambda g: [normal(g, 512).to(torch.bfloat16), normal(g, 512).exp()],
            lambda n, s: smoothing.smooth_norm(n, s)[1],
        ),
        Check(
            "top_up",
            lambda g: [normal(g, 300, 16), torch.rand(300, 16, generator=g).topk(2).indices.sort(1).values],
            _topped_up,
        ),
        Check(
            "candidate_scales",
            lambda g: [normal(g, 512).exp(), normal(g, 512).exp()],
            lambda x, w: smoothing.candidate_scales(x, w, [(0.0, False), (0.35, True), (1.0, True)]),
            1e-5,
        ),
    ]


def _of_rounding() -> list[Check]:
    def inputs(g: Any, count: int, rows: int) -> Any:
        """Channels that go together, and differ: [count, rows, 512]."""
        mix = normal(g, count, 512, 512) / 512**0.5 + torch.eye(512)
        return normal(g, count, rows, 512) @ mix * normal(g, count, 1, 512).mul(0.7).exp()

    def second(g: Any, count: int = 3) -> Any:
        x = inputs(g, count, 900)
        return x.mT @ x / x.shape[1]

    def odd(g: Any) -> list[Any]:
        """To factorize: a good one, of zeros, of NaN, beyond fp32, positive once one is added to its diagonal, not even
        then, negative, of rank one."""
        good, eye = second(g, 1)[0], torch.eye(512)
        mean = good.diagonal().mean()
        broken, apart = good.clone(), good.clone()
        broken[3, 4] = torch.nan
        apart[0, 1] = apart[1, 0] = 40 * mean
        return [
            torch.stack([
                good, good * 0, broken, good * 1e38 * 1e3, good - 0.5 * mean * eye, apart, good - 3 * mean * eye,
                torch.ones(512, 512),
            ])
        ]  # fmt: skip

    def shrunk(g: Any) -> list[Any]:
        return [second(g) * 900, torch.tensor([900.0, 0.0, 7.0]), second(g)]

    def weighed(g: Any) -> list[Any]:
        """W^T W, all tokens' moments, and mean squares."""
        grams = second(g)
        grams[1, 5], grams[1, :, 5] = 0.0, 0.0
        return [grams, second(g, 1)[0], torch.rand(3, 512, generator=g)]

    def ready(g: Any) -> list[Any]:
        """Weights, their inputs' moments as they are factorized, group scales, and the factor's parts."""
        weight, moments = normal(g, 3, 96, 512), second(g)
        weight[0, 3], weight[1, :, GROUP : 2 * GROUP], weight[2, 5, 7] = 0.0, 0.0, 1e-39
        factor = factorize(moments, 0.1)
        scale = rounding.searched_scale(weight, factor.diagonal, GROUP)
        return [weight, moments, scale, *parts_of(factor)]

    def parts_of(factor: Factor) -> list[Any]:
        return [getattr(factor, field.name) for field in fields(factor)]

    def rounded(weight: Any, moments: Any, scale: Any, *factor: Any) -> QuantizedStack:
        return rounding.round_compensated(weight, Factor(*factor), scale, GROUP)

    def twice(weight: Any, moments: Any, scale: Any, *factor: Any) -> QuantizedStack:
        return rounding.round_twice(weight, Factor(*factor), scale, GROUP, WHOLE)

    def corrected(weight: Any, moments: Any, scale: Any, *factor: Any) -> Any:
        return rounding.corrected(weight.clone(), moments * 0.1, Factor(*factor))

    def swept(weight: Any, moments: Any, scale: Any, *factor: Any) -> QuantizedStack:
        stack = twice(weight, moments, scale, *factor)
        return rounding.descend(weight.clone(), moments, Factor(*factor), stack, WHOLE)

    def squares(stack: QuantizedStack, weight: Any, moments: Any) -> Any:
        change = stack.dequantize(torch.float64) - weight.double()
        return ((change @ moments.double()) * change).sum((1, 2))

    def searched(weight: Any, importance: Any) -> Any:
        """The share of each group's weighted squares that rounding to nearest under the scales found changes."""
        scale = rounding.searched_scale(weight, importance, GROUP)
        steps = scale.double().repeat_interleave(GROUP, -1)
        change = (weight.double() / steps).round().clamp(-8, 7) * steps - weight.double()
        factors = importance.double().unsqueeze(1)
        parts = [(part.square() * factors).unflatten(-1, (-1, GROUP)).sum(-1) for part in (change, weight.double())]
        return parts[0] / parts[1].clamp(min=1e-300)

    def columns(g: Any, width: int) -> list[Any]:
        """A block's aims and its weights, the factor's part, the weights' scales."""
        left = normal(g, 3, 100, width)
        lower = normal(g, 3, width, width).mul(0.1).tril(-1) + torch.eye(width)
        return [left + 0.1 * normal(g, 3, 100, width), lower, torch.rand(3, 100, width, generator=g) + 0.05, left]

    def column_by_column(aim: Any, lower: Any, scale: Any, left: Any) -> Any:
        """Codes beside the errors that are left."""
        left, codes = left.clone(), torch.empty_like(left, dtype=torch.int8)
        rounding._columns_by(left.new_empty(3, 512, 512))(aim.clone(), lower, scale, left, codes)
        return torch.cat([codes.float(), left])

    def routed(g: Any) -> list[Any]:
        """Tokens, router's scores, gate and up, and down; few tokens choose the first expert."""
        scores = torch.rand(800, 6, generator=g)
        scores[:, 0] -= 0.8
        gate_up, down = normal(g, 6, 512, 512) * 512**-0.5, normal(g, 6, 512, 256) / 16
        return [inputs(g, 1, 800)[0].to(torch.bfloat16), scores, gate_up.to(torch.bfloat16), down.to(torch.bfloat16)]

    def block(x: Any, scores: Any, gate_up: Any, down: Any) -> ExpertBlock:
        index = scores.topk(2).indices.sort(1).values
        # So little working memory that rows come in pieces.
        return ExpertBlock(
            x, index, scores.gather(1, index).abs(), gate_up, down, torch.nn.functional.silu, GROUP,
            top_up(scores, index, 400), 2**22,
        )  # fmt: skip

    def step(x: Any, *parts: Any, weighed: bool = False) -> Compensation:
        metric = Metric.of(fisher(x), 800, ENOUGH) if weighed else None
        return Compensation(block(x, *parts), torch.arange(0, 800, 3, device=x.device), 800, metric)

    def middles(*parts: Any, weighed: bool = False) -> Any:
        own = step(*parts, weighed=weighed)
        return own._middles(own.block.gate_up.float() * 1.1, 0, 6)

    def verdict(weighed: bool) -> Callable[..., Any]:
        def judged(x: Any, *parts: Any) -> Any:
            own, inner = block(x, *parts), x.new_ones(6, 256, dtype=torch.float32)
            inner[:, ::3] = 1.5
            norm = torch.linspace(0.5, 2.0, 512, device=x.device)
            costs = fisher(x) if weighed else None
            found = judge(own, own.outputs(Weights(own)), [80] * 10, 800, Smoothing(norm, inner), fisher=costs)
            stated = {**found.statistics["losses"], **found.statistics.get("costs", {})}
            losses = [loss for way, loss in stated.items() if not way.endswith("compensated")]
            return torch.tensor([*losses, found.statistics["loss_chosen"]], dtype=torch.float64)

        return judged

    def by_rows(g: Any) -> list[Any]:
        """What `ready` has, and the same of a factor of the outputs."""
        x = normal(g, 300, 96) @ (normal(g, 96, 96) / 96**0.5 + torch.eye(96))
        outputs = factorize((x.T @ x).unsqueeze(0) / 300, 0.1)
        return [*ready(g), *parts_of(outputs)]

    def rounded_rows(weight: Any, moments: Any, scale: Any, *factors: Any) -> QuantizedStack:
        def by_columns(weight: Any, scale: Any) -> QuantizedStack:
            return swept(weight, moments, scale, *factors[: len(fields(Factor))])

        return rounding.round_rows(weight, Factor(*factors[len(fields(Factor)) :]), scale, GROUP, by_columns)

    def stack(g: Any) -> list[Any]:
        return [torch.randint(-8, 8, (3, 64, 512), generator=g, dtype=torch.int8), torch.rand(3, 64, 4, generator=g)]

    return [
        Check("shrink", shrunk, lambda m, c, t: rounding.shrink(m.clone(), c, t, 0.5), 1e-6),
        Check("expected beside moments", weighed, lambda w, p, d: rounding.expected(w.clone(), 96, p, 3.0), 1e-6),
        Check("expected beside squares", weighed, lambda w, p, d: rounding.expected(w.clone(), 96, d, 1.0), 1e-6),
        Check("factorize, what is positive", odd, lambda m: factorize(m.clone(), 0.1).compensates),
        Check("factorize, order", odd, lambda m: factorize(m.clone(), 0.1).order),
        Check("factorize, factor", odd, lambda m: factorize(m.clone(), 0.1).unit_lower, FACTOR),
        Check(
            "searched_scale", ready, lambda w, m, s, o, u, d, *_: rounding.searched_scale(w, d, GROUP), others=OTHERS
        ),
        Check("searched_scale, squares", ready, lambda w, m, s, o, u, d, *_: searched(w, d), 1e-5),
        Check("columns of a block", lambda g: columns(g, 64), column_by_column),
        Check("columns of a group", lambda g: columns(g, GROUP), column_by_column),
        Check("columns of an odd block", lambda g: columns(g, 40), column_by_column),
        Check("round_compensated, codes", ready, lambda *given: rounded(*given).values, others=OTHERS),
        Check("round_compensated, squares", ready, lambda *given: squares(rounded(*given), *given[:2]), SQUARES),
        Check("round_twice, codes", ready, lambda *given: twice(*given).values, others=OTHERS),
        Check("round_twice, squares", ready, lambda *given: squares(twice(*given), *given[:2]), SQUARES),
        Check("corrected", ready, corrected, FACTOR),
        Check("descend, codes", ready, lambda *given: swept(*given).values, others=OTHERS),
        Check("descend, scales", ready, lambda *given: swept(*given).scale, others=OTHERS),
        Check("descend, squares", ready, lambda *given: squares(swept(*given), *given[:2]), SQUARES),
        Check("round_rows, codes", by_rows, lambda *given: rounded_rows(*given).values, others=OTHERS),
        Check("round_rows, squares", by_rows, lambda *given: squares(rounded_rows(*given), *given[:2]), SQUARES),
        Check("moments of a step, inputs", routed, lambda *parts: step(*parts)._inputs(0, 6)[0], SUMS),
        Check("moments of a step, down's inputs", routed, lambda *parts: middles(*parts)[0], ROUNDED),
        Check("moments of a step, squares", routed, lambda *parts: middles(*parts)[3], ROUNDED),
        Check("moments of a step, tokens weighed", routed, lambda *parts: middles(*parts, weighed=True)[0], ROUNDED),
        Check("costs of a step", routed, lambda *parts: step(*parts)._costs(0, 6), ROUNDED),
        Check("judge, losses", routed, verdict(False), JUDGED),
        Check("judge, costs", routed, verdict(True), JUDGED),
        Check("pack", stack, lambda v, s: QuantizedStack(v.clone(), s.bfloat16(), GROUP).pack()),
        Check(
            "unpack, dequantize",
            stack,
            lambda v, s: QuantizedStack.unpack(
                QuantizedStack(v.clone(), s.bfloat16(), GROUP).pack(), s.bfloat16(), GROUP
            ).dequantize(torch.float32),
        ),
    ]


def _of_the_gradient() -> list[Check]:
    def routed(g: Any) -> list[Any]:
        """Inputs, the router's weights and choices, gate and up, down, and the gradient by the output."""
        index = torch.rand(600, 7, generator=g).topk(3).indices.sort(1).values
        gate_up, down = normal(g, 7, 512, 256) / 16, normal(g, 7, 256, 256) / 16
        weight, above = torch.rand(600, 3, generator=g), normal(g, 600, 256)
        return [normal(g, 600, 256).bfloat16(), weight, index, gate_up.bfloat16(), down.bfloat16(), above]

    def back(which: int) -> Callable[..., Any]:
        def gradient(x: Any, weight: Any, index: Any, gate_up: Any, down: Any, above: Any) -> Any:
            leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
            with torch.enable_grad():
                output = block_output(*leaves, index, gate_up, down, torch.nn.functional.silu)
                return torch.autograd.grad(output, leaves, above)[which].float()

        return gradient

    def predicted(g: Any) -> list[Any]:
        """Hidden states, a norm's weight, a head, tokens that follow, none for some."""
        ids = torch.randint(-1, 900, (500,), generator=g)
        return [
            normal(g, 500, 256).bfloat16(),
            normal(g, 256).exp().bfloat16(),
            normal(g, 900, 256).bfloat16() / 16,
            ids,
        ]

    def by_states(hidden: Any, norm: Any, head: Any, ids: Any) -> Any:
        return Head(MINIMAX_M2, _config(), norm, head).gradient(hidden, ids).float()

    def layer(g: Any) -> list[Any]:
        content, _, hidden = layer_in_memory(SHAPE, 512, torch.device("cpu"), seed=3)
        rest = [content.rest[name] for name in sorted(content.rest)]
        return [hidden / hidden.float().square().mean().sqrt(), content.gate_up, content.down, *rest]

    def through(hidden: Any, gate_up: Any, down: Any, *rest: Any) -> SourceLayer:
        names = sorted(name for name, _ in Draw(torch.device("cpu"), 0).outside_experts(SHAPE))
        content = LayerContent(gate_up, down, dict(zip(names, rest, strict=True)))
        decoder = DecoderLayer(MINIMAX_M2, _config(), 0, content.rest, hidden.device)
        return SourceLayer(decoder, content, [64] * 8, ALONE)

    def spread(states: Any) -> Any:
        """Of each channel the mean square: tokens whose choice of experts bf16 turns over hardly show."""
        return states.float().square().mean(0).sqrt()

    def middle(gradient: Any) -> Any:
        """Of each channel the median magnitude: in its mean square a few tokens count alone, whose choice bf16 nearly
        turns over."""
        return gradient.float().abs().median(0).values

    def choices(g: Any) -> list[Any]:
        """Scores, weights and choices sorted by expert, who is next, and what each of them is worth."""
        score = normal(g, 600, 7)
        best = score.topk(4).indices
        return [score, torch.rand(600, 3, generator=g), best[:, :3].sort(1).values, best[:, 3:], normal(g, 600, 4)]

    def tipped(score: Any, weight: Any, index: Any, runner_up: Any, worth: Any) -> Any:
        leaf = score.clone().requires_grad_()
        with torch.enable_grad():
            more, _ = contested(leaf, weight, index, runner_up, 60)
            (found,) = torch.autograd.grad((more * worth).sum(), leaf)
        return found

    return [
        Check("block_output, by its inputs", routed, back(0), ROUNDED),
        Check("block_output, by the router's weights", routed, back(1), ROUNDED),
        Check("choices that may tip, by the scores", choices, tipped, ROUNDED),
        Check("the loss's gradient", predicted, by_states, ROUNDED),
        Check("a layer, forward", layer, lambda h, *parts: spread(through(h, *parts).forward(h)), ROUNDED),
        Check("a layer, back", layer, lambda h, *parts: middle(through(h, *parts).back(h, h.flip(0))), ROUNDED),
        Check("second moments of gradients", layer, lambda h, *parts: fisher(h).matrix, SUMS),
    ]


def _config() -> Any:
    return transformers_config(MINIMAX_M2, model_config(SHAPE.sizes(1)))


def _gated(rows: Any, weight: Any, ends: Any) -> Any:
    return experts.gated_rows(rows, None, weight, ends, torch.nn.functional.silu)


def _topped_up(logits: Any, index: Any) -> Any:
    rows = top_up(logits, index, 50)
    assert rows is not None
    return rows.token


def _magnitudes(rows: Any, weight: Any, ends: Any) -> Any:
    out = rows.new_ones(len(ends), rows.shape[1]).float()
    experts.magnitude_sums(rows, ends, out)
    return out


def _moments(rows: Any, weight: Any, ends: Any) -> Any:
    out = rows.new_ones(len(ends), rows.shape[1], rows.shape[1]).float()
    experts.second_moments(rows, ends, out)
    return out


def compared(found: Any, expected: Any, tolerance: float, others: float = 0.0) -> dict[str, Any]:
    """Bit for bit where the tolerance is 0, but for a share of others; else by the largest difference, as a part of the
    largest number."""
    if tolerance == 0:
        differing = int((integers(found) != integers(expected)).sum())
        return {"differing": differing, "ok": differing <= others * found.numel() and found.shape == expected.shape}
    a, b = found.double(), expected.double()
    known = torch.isfinite(b)
    off = float((a - b)[known].abs().max()) / float(b[known].abs().max())
    return {"off": off, "ok": torch.equal(torch.isfinite(a), known) and off <= tolerance}


def tails() -> list[tuple[str, float, Callable[[Any, int], tuple[Any, Any]]]]:
    """Operations on more numbers than 32 bits count: on a device, the end of the result, and the CPU's of that end
    alone. Each with its tolerance, as a `Check` has it."""
    bf16 = torch.bfloat16
    hidden, last, top_k = 3072, 100, 8

    def drawn(device: Any, *shape: int) -> Any:
        return torch.empty(*shape, dtype=bf16, device=device).normal_()

    def weights(device: Any, numbers: int) -> tuple[Any, Any]:
        weight = drawn(device, numbers // hidden**2 + 2, hidden, hidden)
        return weight, (torch.rand(hidden, device=device) + 0.5)

    def quantized(device: Any, numbers: int) -> tuple[Any, Any]:
        weight, scales = weights(device, numbers)
        found = int4.fake_quantize_scaled(weight, scales, 128)[-1:].cpu()
        return found, int4.fake_quantize_scaled(weight[-1:].cpu(), scales.cpu(), 128)

    def normalized(device: Any, numbers: int) -> tuple[Any, Any]:
        weight, _ = weights(device, numbers)
        return int4.normalized_mean(weight, 128)[-1].cpu(), int4.normalized_mean(weight[-1:].cpu(), 128)[0]

    def dequantized(device: Any, numbers: int) -> tuple[Any, Any]:
        shape = (numbers // hidden**2 + 2, hidden, hidden)
        codes = torch.randint(0, 0x7F, shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        scale = torch.rand(shape[0], *fp8.scale_shape(shape[1:]), device=device)
        found = fp8.dequantize_blocks(codes, scale)[-1:].cpu()
        return found, fp8.dequantize_blocks(codes[-1:].cpu(), scale[-1:].cpu())

    def summed(device: Any, numbers: int, combine: bool) -> tuple[Any, Any]:
        tokens = numbers // hidden // top_k + last
        outputs = drawn(device, tokens * top_k, hidden)
        place = torch.randperm(tokens * top_k, device=device).view(tokens, top_k).sort(1).values
        weight, reference = torch.rand(tokens, top_k, device=device), torch.randn(tokens, hidden, device=device)
        own = outputs[place[-last:].flatten()].cpu()
        there = torch.arange(last * top_k).view(last, top_k)
        operation = experts.combine if combine else experts.token_losses
        # The first is overwritten.
        expected = operation(own, there, weight[-last:].cpu(), reference[-last:].cpu())
        return operation(outputs, place, weight, reference)[-last:].cpu(), expected

    def rows(device: Any, numbers: int, width: int) -> tuple[Any, Any]:
        count = numbers // width + 2 * last
        each = torch.arange(1, 9, device=device) * ((count - last) // 7)
        each[-1] = count
        each[-2] = count - last
        return drawn(device, count, width), each.to(torch.int32)

    end = torch.tensor([last], dtype=torch.int32)

    def gated(device: Any, numbers: int) -> tuple[Any, Any]:
        x, ends = rows(device, numbers, hidden)
        weight = drawn(device, 8, 512, hidden).mul_(hidden**-0.5)
        return _gated(x, weight, ends)[-last:].cpu(), _gated(x[-last:].cpu(), weight[-1:].cpu(), end)

    def multiplied(device: Any, numbers: int) -> tuple[Any, Any]:
        x, ends = rows(device, numbers * 256 // hidden, 256)
        weight = drawn(device, 8, hidden, 256).mul_(1 / 16)
        out = torch.empty(x.shape[0], hidden, dtype=bf16, device=device)
        found = experts.grouped_rows(x, weight, ends, out)[-last:].cpu()
        return found, experts.grouped_linear(x[-last:].cpu(), weight[-1:].cpu(), end)

    def squared(device: Any, numbers: int) -> tuple[Any, Any]:
        x, ends = rows(device, numbers, hidden)
        return experts.squares_by_expert(x, ends)[-1:].cpu(), experts.squares_by_expert(x[-last:].cpu(), end)

    def magnitudes(device: Any, numbers: int) -> tuple[Any, Any]:
        x, ends = rows(device, numbers, hidden)
        return _magnitudes(x, None, ends)[-1:].cpu(), _magnitudes(x[-last:].cpu(), None, end)

    def moments(device: Any, numbers: int) -> tuple[Any, Any]:
        x, ends = rows(device, numbers, 1536)
        return _moments(x, None, ends)[-1:].cpu(), _moments(x[-last:].cpu(), None, end)

    def measured(device: Any, numbers: int) -> tuple[Any, Any]:
        count = numbers // (hidden * 1536) + 2
        change, moments = drawn(device, count, hidden, 1536), torch.rand(count, 1536, 1536, device=device)
        moments += moments.transpose(1, 2).clone()
        found = experts.quadratic_form(change, moments)[-1:].cpu()
        return found, experts.quadratic_form(change[-1:].cpu(), moments[-1:].cpu())

    def searched(device: Any, numbers: int) -> tuple[Any, Any]:
        weight = torch.empty(numbers // hidden**2 + 2, hidden, hidden, device=device).normal_()
        importance = torch.rand(weight.shape[0], hidden, device=device) + 0.1
        found = rounding.searched_scale(weight, importance, GROUP)[-1:, -last:].float().cpu()
        return found, rounding.searched_scale(weight[-1:, -last:].cpu(), importance[-1:].cpu(), GROUP).float()

    def rounded(device: Any, numbers: int) -> tuple[Any, Any]:
        """A block of columns in the midst of weights and codes that are as many."""
        left = torch.empty(numbers // hidden**2 + 2, hidden, hidden, device=device).normal_()
        codes, part = torch.zeros_like(left, dtype=torch.int8), slice(1024, 1024 + rounding.COLUMNS)
        lower = torch.randn(left.shape[0], rounding.COLUMNS, rounding.COLUMNS, device=device).mul_(0.1)
        scale = torch.rand(*left.shape[:2], rounding.COLUMNS, device=device) + 0.05
        aim = left[:, :, part].clone()
        own = [aim[-1:].to("cpu", copy=True) for _ in range(2)]
        there = [own[0], lower[-1:].cpu(), scale[-1:].cpu(), own[1], torch.zeros(own[0].shape).char()]
        rounding._columns_by(left)(aim, lower, scale, left[:, :, part], codes[:, :, part])
        rounding._columns_by(left[-1:].cpu())(*there)
        return torch.cat([codes[-1:, :, part].float(), left[-1:, :, part]]).cpu(), torch.cat(
            [there[4].float(), there[3]]
        )

    return [
        ("fake_quantize_scaled", 0.0, quantized),
        ("normalized_mean", 1e-6, normalized),
        ("dequantize_blocks", 0.0, dequantized),
        ("combine", 1e-6, lambda device, numbers: summed(device, numbers, True)),
        ("token_losses", SUMS, lambda device, numbers: summed(device, numbers, False)),
        ("gated_rows", ROUNDED, gated),
        ("grouped_rows", ROUNDED, multiplied),
        ("squares_by_expert", SUMS, squared),
        ("magnitude_sums", SUMS, magnitudes),
        ("second_moments", SUMS, moments),
        ("quadratic_form", ROUNDED, measured),
        # Of two shares that are as good, sums in another order take either: they are 2 % apart.
        ("searched_scale", 0.1, searched),
        ("columns", 0.0, rounded),
    ]


def integers(tensor: Any) -> Any:
    """A tensor's bits, with one NaN for all: which of them an operation gives is its own affair."""
    tensor = tensor.contiguous()
    if tensor.is_floating_point() and tensor.element_size() > 1:
        tensor = torch.where(tensor.isnan(), torch.nan, tensor)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor if tensor.dtype == torch.bool else tensor.view(kinds[tensor.element_size()])
