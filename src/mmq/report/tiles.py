"""The summary at the top of the page: one line each of what matters most."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from mmq.prove import evaluate
from mmq.report.facts import RunFacts, StageFacts, loss_shares
from mmq.text import bytes_text, count_text, duration_text, plain_number, short_count

SLOWEST = 4


@dataclass(frozen=True)
class Tile:
    """A line of the summary at the top; `mood` is "good", "bad" or nothing."""

    name: str
    value: str
    detail: str
    mood: str = ""


def tiles(facts: RunFacts) -> list[Tile]:
    """The summary."""
    found = [_size_tile(facts), _verify_tile(facts), _evaluation_tile(facts), _time_tile(facts)]
    if facts.layers:
        found += [_loss_tile(facts.layers), _tokens_tile(facts)]
    return [*found, _memory_tile(facts.stages), _slowest_tile(facts)]


def slowest(facts: RunFacts) -> list[tuple[str, float]]:
    """Stages, and of awq its layers' parts instead, by seconds, the longest first."""
    seconds: dict[str, float] = {}
    for layer in facts.layers:
        for part, spent in layer["seconds"].items():
            seconds[f"awq: {part}"] = seconds.get(f"awq: {part}", 0.0) + spent
    seconds |= {stage.name: stage.seconds for stage in facts.stages if not (stage.name == "awq" and facts.layers)}
    return sorted(seconds.items(), key=lambda entry: -entry[1])


def _size_tile(facts: RunFacts) -> Tile:
    if not facts.components:
        return Tile("Size", "not known", "the source can't be read")
    change = f"{facts.bytes_after / facts.bytes_before:.0%} of the source; {short_count(facts.parameters)} parameters"
    origin = "" if facts.sizes_measured else "; computed, not written yet"
    # A line may end before the arrow, not inside a number.
    before, after = (bytes_text(size).replace(" ", "\u00a0") for size in (facts.bytes_before, facts.bytes_after))
    return Tile("Size", f"{before} \u2192\u00a0{after}", change + origin)


def _verify_tile(facts: RunFacts) -> Tile:
    if facts.verify is None:
        return Tile("Verification", "not there", "mmq verify compares the result with its source")
    looked = f"{sum(facts.verify['checks'].values()):,} things looked at"
    if facts.verify["ok"]:
        return Tile("Verification", "passed", looked, "good")
    return Tile("Verification", "failed", f"{count_text(len(facts.verify['problems']), 'problem')}; {looked}", "bad")


def _evaluation_tile(facts: RunFacts) -> Tile:
    if facts.evaluation is None:
        return Tile("Evaluation", "not there", "mmq eval compares the result with its source on held-out text")
    variants = {entry["variant"]: entry for entry in facts.evaluation["variants"]}
    truth, result = variants[evaluate.SOURCE.name], variants[evaluate.HYBRID_MODEL.name]
    return Tile(
        "Evaluation",
        f"KL {plain_number(result['kl'], 3)} nats",
        f"to the source; perplexity {plain_number(truth['perplexity'])} \u2192 {plain_number(result['perplexity'])},"
        f" same top-1 token {result['top1_agreement']:.1%}",
    )


def _time_tile(facts: RunFacts) -> Tile:
    runs = [run for stage in facts.stages for run in stage.runs]
    if not runs:
        return Tile("Time", "not measured", "the journal tells of no run")
    began = min(run["began"] for run in runs)[:16].replace("T", " ")
    return Tile("Time", duration_text(facts.seconds), f"since {began} UTC, {count_text(len(runs), 'run')} of stages")


def _loss_tile(layers: list[dict[str, Any]]) -> Tile:
    shares = loss_shares(layers)
    if not shares:
        return Tile("Against plain rounding", "no figure", "no layer's loss before and after is known")
    worst = max(shares, key=lambda layer: shares[layer])
    kept = sum(layer["identity_kept"] for layer in layers)
    return Tile(
        "Against plain rounding",
        f"{median(shares.values()):.0%} of the loss",
        f"median of {count_text(len(layers), 'layer')}; at worst {shares[worst]:.0%}, layer {worst};"
        f" {kept} kept as they were",
    )


def _tokens_tile(facts: RunFacts) -> Tile:
    tokens = [count for layer in facts.layers for count in layer["tokens_per_expert"]]
    topped = sum(count > 0 for layer in facts.layers for count in layer["topped_up"])
    return Tile(
        "Experts topped up",
        f"{topped:,} of {len(tokens):,}",
        f"those below {facts.recipe['awq']['min_tokens']:,} tokens; fewest {min(tokens):,}, median"
        f" {median(tokens):,.0f}, most {max(tokens):,}",
    )


def _memory_tile(stages: list[StageFacts]) -> Tile:
    largest = max(stages, key=lambda stage: stage.peak_host_bytes)
    device = max(stage.peak_device_bytes for stage in stages)
    where = f"in {largest.name}; " if largest.peak_host_bytes else ""
    on_device = f"{bytes_text(device)} on the device" if device else "no device"
    return Tile("Peak memory", bytes_text(largest.peak_host_bytes), where + on_device)


def _slowest_tile(facts: RunFacts) -> Tile:
    found = slowest(facts)[:SLOWEST]
    names = [name for name, _ in found]
    others = [f"{name} {duration_text(seconds)}" for name, seconds in found[1:]]
    return Tile("Slowest part", names[0], "; ".join([duration_text(found[0][1]), *others]))
