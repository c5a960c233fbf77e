"""The model card: README.md of the hybrid folder, with what this run measured and nothing else.

The text is card.md.j2. Its front matter is what the hub reads: the source's licence, language and task, as far as its
own README.md names them in a form that the hub takes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path, PurePath
from statistics import median
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from jinja2 import Environment, StrictUndefined

from mmq.errors import CheckpointError, MmqError
from mmq.families.sizes import Dimensions
from mmq.prove import evaluate
from mmq.report.calibration import describe
from mmq.report.facts import RunFacts, StageFacts, loss_share, read_run
from mmq.serve.memory import parallel_problems, serve_command
from mmq.serve.quantization_config import has_two_names
from mmq.source.tokens import CACHE_NAME, kept_tokens
from mmq.storage.atomic import write_bytes
from mmq.storage.checkpoint import CARD_NAME
from mmq.text import bytes_text, duration_text
from mmq.workdir.workspace import HYBRID, STATE, Workspace

TEMPLATE = "card.md.j2"
TAGS = ("mmq", "awq", "int4", "fp8", "compressed-tensors", "moe", "vllm")
# What became of shared experts, by whether the norm is smoothed.
SHARED = {
    True: "scaled with the norm that they read, in bf16",
    False: "in their original fp8 bytes; so the norm that they read is not smoothed",
}
# vLLM's releases with the faults that the plugin mends; docs/serving.md has the table.
ASSERTION_VERSIONS = "0.16 to 0.33"
SCALES_VERSIONS = "0.15.1 to 0.19"
# Of families whose scales more releases don't use: their loader passes over them.
LOADER_VERSIONS = {"qwen3_moe": "0.14 to 0.19"}
EXPERTS_VERSIONS = "0.14 to 0.31"
# How many GPUs the serving command may name.
GPU_COUNTS = (8, 4, 2, 1)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# What the hub takes in each field that is carried over from the source's card.
INHERITED = {
    "license": r"[a-z0-9][a-z0-9.+-]{0,63}",
    "license_name": r"[A-Za-z0-9][\w .+-]{0,95}",
    "license_link": r"https?://[^\s<>\"'`()\[\]]{1,500}|[\w.-]{1,100}",
    "language": r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual",
    "pipeline_tag": r"[a-z0-9][a-z0-9-]{0,63}",
    "library_name": r"[A-Za-z0-9][\w.-]{0,63}",
}


@dataclass(frozen=True)
class Setting:
    """What the card says beyond the run's own figures.

    Attributes:
        model: how the serving command names the checkpoint: a folder or a hub id.
        source: the source's name; of a folder only its last part.
        base_model: the source on the hub; None where it isn't known to be there.
        inherited: front matter of the source's card, as far as the hub takes it.
        gpus: how many GPUs can share the checkpoint, by the model's sizes; descending.
        calibration: what the calibration samples became (`calibration.describe`); None where it was not kept.
        family: the model's, as mmq calls it.
        two_names: its experts have other names on the hub than those that most servers ask for.
    """

    model: str = HYBRID
    source: str = ""
    base_model: str | None = None
    inherited: dict[str, str | list[str]] = field(default_factory=dict)
    gpus: list[int] = field(default_factory=list)
    calibration: dict[str, Any] | None = None
    family: str = ""
    two_names: bool = False


def write_card(workspace: Workspace, facts: RunFacts | None = None) -> Path | None:
    """Write README.md into the hybrid folder; None where restore has not ended or the source is gone.

    Args:
        facts: of the run, where they were read already.

    Raises:
        MmqError: the run can't be read.
    """
    if not workspace.journal.stage("restore").complete or not _has_source(workspace):
        return None
    path = workspace.folder(HYBRID) / CARD_NAME
    write_bytes(path, render(workspace, facts=facts).encode())
    return path


def render(workspace: Workspace, model: str = HYBRID, facts: RunFacts | None = None) -> str:
    """The card of a finished run; writes nothing. Raises MmqError where the run or its source can't be read.

    Args:
        model: see `Setting`.
        facts: of the run, where they were read already.
    """
    facts = facts or read_run(workspace)
    return model_card(facts, setting(workspace, facts, model))


def setting(workspace: Workspace, facts: RunFacts, model: str = HYBRID) -> Setting:
    """Read what the card needs of the source and of the kept calibration tokens."""
    source = workspace.source
    in_folder = workspace.recipe.path(facts.source).is_dir()
    card = front_matter(source.checkpoint.folder / CARD_NAME)
    if in_folder:
        bases = [source.config.get("_name_or_path"), *_listed(card.get("base_model"))]
        base = next((name for name in bases if isinstance(name, str) and HUB_ID.fullmatch(name)), None)
    else:
        base = facts.source
    dims = Dimensions.of(source.config, source.architecture)
    return Setting(
        model=model,
        source=workspace.source_folder.name if in_folder else facts.source,
        base_model=base,
        inherited=inherited(card),
        gpus=[count for count in GPU_COUNTS if not parallel_problems(dims, count)],
        calibration=_calibration(workspace, facts),
        family=source.architecture.model_type,
        two_names=has_two_names(source.architecture),
    )


def front_matter(path: Path) -> dict[str, Any]:
    """A card's front matter; nothing where there is none or it can't be read."""
    try:
        return (metadata_load(path) if path.is_file() else None) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}


def inherited(card: dict[str, Any]) -> dict[str, str | list[str]]:
    """The fields that hold for the result as well, each only in the form that the hub takes."""
    found: dict[str, str | list[str]] = {}
    for key, pattern in INHERITED.items():
        value = card.get(key)
        fitting = [part for part in _listed(value) if isinstance(part, str) and re.fullmatch(pattern, part, re.ASCII)]
        if fitting and (key == "language" or not isinstance(value, list)):
            found[key] = fitting if isinstance(value, list) else fitting[0]
    return found


def model_card(facts: RunFacts, setting: Setting) -> str:
    """The whole text of README.md.

    Raises:
        CheckpointError: the front matter would not be read back as it is meant.
    """
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters |= {"code": _code, "size": bytes_text, "duration": duration_text}
    template = environment.from_string(files("mmq.report").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    reasons = sorted({layer["no_kv_scales"] for layer in facts.all_layers if "no_kv_scales" in layer})
    without = f"{'; '.join(reasons)}" if reasons else None
    none_has = bool(facts.all_layers) and not any(layer["kv_scales"] for layer in facts.all_layers)
    shared = any(part.name == "shared experts" and part.parameters for part in facts.components)
    attention = next((part for part in facts.components if part.name == "attention"), None)
    fp8 = attention is None or "fp8" in attention.dtype_after
    recipe = _fenced(yaml.safe_dump(_public(facts.recipe), sort_keys=False, allow_unicode=True), "yaml")
    body = template.render(
        facts=facts,
        setting=setting,
        awq=facts.recipe["awq"] | ({"kv_cache_scheme": None} if none_has and without else {}),
        no_kv_scales=without,
        fp8_attention=fp8,
        rounded_attention=facts.recipe["restore"].get("attention") == "fp8_block",
        shared_experts=SHARED[_norm_is_smoothed(facts.layers)] if shared else None,
        down_not_smoothed=next((why for layer in facts.layers if (why := layer["down"].get("not_smoothed"))), None),
        weight_only=facts.recipe["restore"]["attention_activations"] == "none",
        hub_names=setting.two_names and facts.recipe["restore"].get("expert_targets") == "hub",
        experts_versions=EXPERTS_VERSIONS,
        components=[part for part in facts.components if part.bytes_before or part.bytes_after],
        layers=_layer_facts(facts.layers, facts.all_layers),
        errors=_expert_errors(facts.verify),
        samples=_sample_rows(setting.calibration),
        held_out=[_place(part["path"]) for part in facts.evaluation["settings"]["data"]] if facts.evaluation else [],
        evaluation=evaluate.rows(facts.evaluation) if facts.evaluation else [],
        by_layer=evaluate.told_by_layer(facts.by_layer, facts.evaluation) if facts.by_layer else None,
        brought=evaluate.brought(facts.evaluation) if facts.evaluation else None,
        kinds=evaluate.kind_rows(facts.evaluation) if facts.evaluation else [],
        command=serve_command(setting.model, setting.gpus[0]) if setting.gpus else None,
        assertion_versions=ASSERTION_VERSIONS,
        scales_versions=LOADER_VERSIONS.get(setting.family, SCALES_VERSIONS),
        recipe=recipe,
        stages=[_stage_row(stage) for stage in facts.stages],
    )
    data = _metadata(setting)
    text = f"---\n{data.to_yaml()}\n---\n\n{body.strip()}\n"
    if ModelCard(text).data.to_dict() != data.to_dict():
        raise CheckpointError("the model card's front matter would not be read back as it is meant")
    return text


def _norm_is_smoothed(layers: list[dict[str, Any]]) -> bool:
    return not any("not_smoothed" in layer["norm"] for layer in layers)


def _has_source(workspace: Workspace) -> bool:
    try:
        return bool(workspace.source.checkpoint.shards)
    except MmqError:
        return False


def _metadata(setting: Setting) -> ModelCardData:
    fields: dict[str, Any] = dict(setting.inherited)
    if setting.base_model:
        fields |= {"base_model": setting.base_model, "base_model_relation": "quantized"}
    return ModelCardData(**fields, tags=list(TAGS))


def _calibration(workspace: Workspace, facts: RunFacts) -> dict[str, Any] | None:
    """What the samples became, if the tokens that the awq stage took can still be told."""
    taken = next((stage.fingerprint.get("awq.calibration") for stage in facts.stages if stage.name == "awq"), None)
    tokens = kept_tokens(workspace.folder(STATE) / CACHE_NAME, taken) if taken else None
    return describe(workspace.recipe, tokens) if tokens else None


def _sample_rows(calibration: dict[str, Any] | None) -> list[dict[str, Any]]:
    """One row a source of samples, and their total."""
    if calibration is None:
        return []
    named = [(_code(_place(source.get("path") or source["hub"])), source) for source in calibration["sources"]]
    return [
        {"name": name} | {key: entry[key] for key in ("samples", "chat", "tokens", "tokens_cut")}
        for name, entry in [*named, ("total", calibration["total"])]
    ]


def _layer_facts(layers: list[dict[str, Any]], everywhere: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Sums over the awq stage's statistics: of the layers with experts, and of all that have a KV cache."""
    if not layers:
        return None
    counts = [count for layer in layers for count in layer["topped_up"]]
    shares = [share for layer in layers if (share := loss_share(layer)) is not None]
    scales = {
        name: [layer["kv_scales"][name] for layer in everywhere if name in layer["kv_scales"]]
        for name in ("k_scale", "v_scale")
    }
    return {
        "count": len(layers),
        "experts": len(counts),
        "topped_up": sum(count > 0 for count in counts),
        "kept": sum(layer["identity_kept"] for layer in layers),
        "share": (min(shares), median(shares), max(shares)) if shares else None,
        "kv": {name: (min(values), max(values)) for name, values in scales.items() if values},
    }


def _expert_errors(verified: dict[str, Any] | None) -> dict[str, tuple[float, float]]:
    """Smallest and largest relative error over the layers, of each of the experts' linear layers."""
    found: dict[str, list[float]] = {}
    for layer in (verified or {}).get("layers", []):
        for linear, error in layer.get("expert_error", {}).items():
            if error is not None:
                found.setdefault(linear, []).append(error)
    return {linear: (min(errors), max(errors)) for linear, errors in found.items()}


def _stage_row(stage: StageFacts) -> dict[str, Any]:
    measured = bool(stage.runs)
    return {
        "name": stage.name,
        "units": len(stage.units),
        "runs": len(stage.runs),
        "seconds": stage.seconds if measured else None,
        "host": stage.peak_host_bytes or None,
        "device": stage.peak_device_bytes or None,
    }


def _public(value: Any) -> Any:
    """A recipe without the folders of the machine that it was run on."""
    if isinstance(value, dict):
        return {key: _public(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_public(part) for part in value]
    return _place(value) if isinstance(value, str) else value


def _place(text: str) -> str:
    """A path that leads elsewhere by its last part; anything else as it is."""
    path = PurePath(text)
    leads_away = path.is_absolute() or text.startswith("~") or ".." in path.parts
    return path.name if leads_away else text


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _code(text: object) -> str:
    """Text in a code span that stays within its line and its table cell."""
    return "`" + " ".join(str(text).split()).replace("`", "'").replace("|", "\\|") + "`"


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
