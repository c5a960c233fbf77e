"""Recipes: the YAML that says what is quantized and how, as pydantic models.

Relative paths are taken from the recipe's project root: the nearest folder above the recipe (or its own) that holds
`.git` or `pyproject.toml`; where there is none, the recipe's folder, or that folder's parent if it is named `configs`.
What mmq ships is named `builtin:NAME`; relative paths of a shipped recipe start at the current folder.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from mmq import shipped
from mmq.errors import RecipeError, one_line, shown

SIZE_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}

SHOWN_FAULTS = 20
LARGEST = 2**20  # bytes of a recipe

# YAML's true is no number, and a quoted number is no number either.
Count = Annotated[int, Field(strict=True, gt=0, lt=2**53)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]


class Section(BaseModel):
    """A part of a recipe. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    """The checkpoint to quantize."""

    source: str = Field(description="a checkpoint folder, or a hub id fetched with huggingface_hub")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    trust_remote_code: bool = Field(
        False, strict=True, description="run the Python code in the model's folder that its tokenizer may name"
    )


class Dequant(Section):
    """Stage 1: block fp8 to bf16."""

    dtype: Literal["bfloat16"] = Field("bfloat16", description="what the fp8 weights become")


class FileSamples(Section):
    """Calibration samples from a JSONL file."""

    path: str = Field(
        description="JSONL in any form that public sets have (text, messages, ShareGPT, ...), or builtin:NAME"
    )
    samples: Count | None = Field(None, description="how many lines to take from the top; all by default")

    @field_validator("path")
    @classmethod
    def _known(cls, value: str) -> str:
        if shipped.is_builtin(value) and value not in (known := shipped.builtin_samples()):
            raise ValueError(f"mmq ships no such samples; there are {', '.join(known)}")
        return value


class HubSamples(Section):
    """Calibration samples from a dataset on the hub."""

    hub: str = Field(description="a dataset id, or a folder with a dataset's files")
    name: str | None = Field(None, description="the dataset's configuration")
    split: str = "train"
    column: str | None = Field(None, description="the column to use; else the row is read as a line of a file is")
    filter: dict[str, str | int | float | bool | None] | None = Field(
        None, description="only samples whose columns have these values, e.g. {language: en}"
    )
    revision: str | None = Field(None, description="branch, tag or commit")
    samples: Count = Field(description="how many samples to take")
    seed: Seed | None = Field(None, description="of the shuffle before taking; default: the recipe's")


def _samples_kind(value: object) -> str:
    return "hub" if isinstance(value, HubSamples) or (isinstance(value, dict) and "hub" in value) else "file"


Samples = Annotated[
    Annotated[FileSamples, Tag("file")] | Annotated[HubSamples, Tag("hub")], Discriminator(_samples_kind)
]


class Calibration(Section):
    """What the experts are calibrated on."""

    files: list[Samples] = Field(min_length=1)
    sequence_length: Annotated[Count, Field(ge=2)] = Field(1024, description="tokens kept of each sample")
    nonfinite: Literal["error", "exclude"] = Field(
        "error",
        description="a sample whose activations become NaN or infinite ends the run, or is left out from that layer on;"
        " such values among the checkpoint's weights and scales always end it",
    )


class KvCacheScheme(Section):
    """compressed-tensors' arguments for the KV cache."""

    num_bits: Literal[8] = 8
    type: Literal["float"] = "float"
    strategy: Literal["tensor"] = "tensor"
    dynamic: Literal[False] = False
    symmetric: Literal[True] = True
    observer: Literal["static_minmax", "minmax"] = Field(
        "static_minmax",
        description="llmcompressor's observer: the whole range, or a moving average over batches",
    )


class Awq(Section):
    """Stage 2: AWQ of the experts and calibration of the KV cache."""

    calibration: Calibration
    source: Literal["bf16", "fp8"] = Field(
        "fp8", description="read the fp8 checkpoint itself, or the dequant stage's folder, with the same result"
    )
    n_grid: Annotated[int, Field(strict=True, ge=3, le=1000)] = Field(20, description="points of the scale search")
    duo_scaling: Literal[True, False, "both"] = Field(
        True, description="scales from activations and weights, activations only, or half the grid each"
    )
    search: Literal["paired", "full"] = Field(
        "paired",
        description="drop a point of the norm's grid once it is surely worse on the tokens seen, or measure all on all",
    )
    group_size: Literal[32, 64, 128] = Field(128, description="input channels that share an int4 scale")
    min_tokens: Annotated[int, Field(strict=True, ge=0, lt=2**53)] = Field(
        128,
        description="an expert that fewer tokens reach is topped up with those its router score ranks highest",
    )
    rounding: Literal["nearest", "compensated"] = Field(
        "compensated",
        description="after the smoothing: each weight by itself, or each column making up for the errors of others",
    )
    fisher_tokens: Annotated[int, Field(strict=True, ge=0, lt=2**53)] = Field(
        32768,
        description="of rounding: compensated: calibration tokens whose loss's gradient says which errors of a block's"
        " output matter together, and at which tokens; 0 weighs all alike",
    )
    shared_experts: Literal["scaled", "source"] = Field(
        "scaled",
        description="an fp8 shared expert, which reads the smoothed norm too, becomes bf16 and is scaled with it, or"
        " keeps the source's bytes, and the norm is not smoothed",
    )
    propagate_quantized: bool = Field(
        True, description="calibrate each layer on the outputs of the quantized layers before it"
    )
    kv_cache_scheme: KvCacheScheme | None = KvCacheScheme()
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    memory_budget: Count | None = Field(
        None,
        description="working memory on the device beyond the layer and the hidden states, e.g. 4GiB, though never less"
        " than one expert takes; default: fits",
    )

    @property
    def weighs_outputs(self) -> bool:
        """Whether a gradient says which errors of a block's output matter."""
        return self.rounding == "compensated" and self.fisher_tokens > 0

    @field_validator("memory_budget", mode="before")
    @classmethod
    def _parse_memory(cls, value: object) -> object:
        return parse_size(value) if isinstance(value, str) else value


class Restore(Section):
    """Stage 3: the original fp8 attention back into the quantized checkpoint."""

    attention: Literal["source", "fp8_block"] = Field(
        "source",
        description="attention has the source's bytes; that of a bf16 source may be rounded to fp8 in 128x128 blocks,"
        " and is calibrated with so",
    )
    attention_activations: Literal["dynamic", "none"] = Field(
        "dynamic",
        description="dynamic group-128 fp8 activations as the source declares, or the model card's weight-only form",
    )
    expert_targets: Literal["hub", "both"] = Field(
        "both",
        description="config.json names MiniMax's experts as the hub does, w1, w2 and w3, and as gate_proj, up_proj and"
        " down_proj too, for which sglang and vLLM before 0.32 ask; or as the hub does alone",
    )


class Recipe(Section):
    """A whole recipe."""

    model: Model
    work_dir: str = Field(description="the stages write bf16/, awq/, hybrid/ and the journal here")
    dequant: Dequant = Dequant()
    awq: Awq
    restore: Restore = Restore()
    workers: Count | None = Field(None, description="threads over shards; default: the cores, at most 8")
    seed: Seed = Field(0, description="of whatever is drawn by chance: the order of hub samples")

    # Where relative paths start; set by `load`.
    root: Path = Field(default=Path(), exclude=True)

    @model_validator(mode="after")
    def _names(self) -> Recipe:
        if not self.work_dir.strip():
            raise ValueError("work_dir is empty")
        for key, value in (("work_dir", self.work_dir), ("model.source", self.model.source)):
            if shipped.is_builtin(value):
                raise ValueError(f"{key} is {shown(value)}, but mmq ships samples and recipes only")
        return self

    def path(self, value: str) -> Path:
        """A path of the recipe, or the file of samples that mmq ships, resolved.

        Raises:
            RecipeError: the system knows no such path, as with a NUL in it or the home of a user who isn't there; or
                mmq ships no such samples.
        """
        if shipped.is_builtin(value):
            return shipped.samples_path(value)
        try:
            return (self.root / Path(value).expanduser()).resolve()
        except (ValueError, RuntimeError, OSError) as error:
            raise RecipeError(f"{shown(value)} is no path: {one_line(error)}") from None

    @property
    def work_path(self) -> Path:
        return self.path(self.work_dir)

    @property
    def worker_count(self) -> int:
        return self.workers or min(8, len(os.sched_getaffinity(0)))


class _Loader(yaml.SafeLoader):
    """yaml.safe_load, but a key given twice is an error instead of the last one winning, and so is an alias: a few
    lines of them can stand for more than any memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not taken", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable) or key in seen:
                fault = "is given twice" if isinstance(key, Hashable) else "is no name"
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} {fault}", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _parse(text: str) -> Any:
    """YAML's value. Raises ValueError with one line."""
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML raises whatever a tag on the wrong value leads to
        raise ValueError(one_line(error)) from None


def load(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: the YAML file, or builtin:NAME for one that mmq ships.
        overrides: `key.sub=value` strings, each value read as YAML; they replace what the file says.

    Raises:
        RecipeError: the file is missing or not valid; the message names the file and the key.
    """
    file = shipped.recipe_path(str(path)) if shipped.is_builtin(str(path)) else path
    try:
        if file.is_file() and file.stat().st_size > LARGEST:
            raise ValueError(f"it is larger than {LARGEST} bytes")
        content = _parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}") from None
    except (ValueError, OSError) as error:
        raise RecipeError(f"{path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold a mapping with the keys {', '.join(_keys(Recipe))}")
    for override in overrides or []:
        _override(content, override)
    if "root" in content:
        raise RecipeError(f"{path}: unknown key root")
    try:
        return Recipe.model_validate(content | {"root": project_root(path)})
    except ValidationError as error:
        more = f"; and {error.error_count() - SHOWN_FAULTS} more" if error.error_count() > SHOWN_FAULTS else ""
        raise RecipeError(f"{path}: {'; '.join(_sentences(error))}{more}") from None


def project_root(recipe: Path) -> Path:
    """The folder that a recipe's relative paths start from; see the module's text."""
    if shipped.is_builtin(str(recipe)):
        return Path.cwd()
    folder = recipe.resolve().parent
    for candidate in (folder, *folder.parents):
        if (candidate / ".git").exists() or (candidate / "pyproject.toml").exists():
            return candidate
    return folder.parent if folder.name == "configs" else folder


def parse_size(text: str) -> int:
    """'4GiB' -> bytes. Raises ValueError when it is no size."""
    number = text.strip().rstrip("BbIiKkMmGg")
    unit = text.strip()[len(number) :].upper()
    if unit not in SIZE_UNITS:
        raise ValueError(f"{text!r} is not a size such as 4GiB")
    size = float(number) * SIZE_UNITS[unit]
    if not math.isfinite(size):
        raise ValueError(f"{text!r} is not a size such as 4GiB")
    return int(size)


def _override(content: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise RecipeError(f"--set takes key.sub=value, not {shown(override)}")
    try:
        parsed = _parse(value)
    except ValueError as error:
        raise RecipeError(f"--set {key[:100]}: {error}") from None
    node: Any = content
    for part in parts[:-1]:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise RecipeError(f"--set {key[:100]}: {part[:100]} holds no keys")
    node[parts[-1]] = parsed


def _sentences(error: ValidationError) -> list[str]:
    lines = []
    for fault in error.errors()[:SHOWN_FAULTS]:
        location = [str(part)[:100] for part in fault["loc"] if part not in ("file", "hub")]
        key = ".".join(location)
        if fault["type"] == "extra_forbidden":
            close = difflib.get_close_matches(location[-1], sorted(ALL_KEYS), n=1, cutoff=0.6)
            message = f"unknown key {key}" + (f" (did you mean {close[0]}?)" if close else "")
        elif fault["type"] == "missing":
            message = f"the key {key} is missing"
        else:
            message = f"{key}: {fault['msg'].removeprefix('Value error, ')} (it is {shown(fault['input'])})"
        if message not in lines:
            lines.append(message)
    return lines


def _keys(section: type[BaseModel]) -> list[str]:
    return [name for name in section.model_fields if name != "root"]


SECTIONS = (Recipe, Model, Dequant, Awq, Calibration, FileSamples, HubSamples, KvCacheScheme, Restore)
ALL_KEYS = {key for section in SECTIONS for key in _keys(section)}
