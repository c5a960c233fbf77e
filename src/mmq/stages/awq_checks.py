"""What the awq stage will refuse, known before it begins."""

from __future__ import annotations

from collections.abc import Set

import torch

from mmq.errors import CheckpointError, JournalError, RecipeError
from mmq.families.registry import architecture_of
from mmq.families.rotary import check_length
from mmq.machine.device import present_device
from mmq.quantize.decoder_layer import DecoderLayer, check_tokens, transformers_config
from mmq.quantize.kv_cache import ORDERLESS
from mmq.quantize.memory import awq_memory, fisher_memory
from mmq.quantize.routed_experts import LEAST_BUDGET
from mmq.recipe import FileSamples, Recipe
from mmq.source.calibration import load_tokens
from mmq.source.hub import source_config
from mmq.source.model import SourceModel
from mmq.source.outside import check_tokenizer
from mmq.source.samples import most_fisher_tokens
from mmq.source.tokenizer import load_tokenizer
from mmq.source.tokens import CACHE_NAME, Tokens
from mmq.stages.base import Check, check_memory
from mmq.workdir.output_shards import layers_and_rest, quantized_specs
from mmq.workdir.workspace import AWQ, BF16, HYBRID, STATE, Workspace


def checks(workspace: Workspace, before: Set[str]) -> list[Check]:
    order = [Check("dequant output", dequant_output, weights=False)]
    return [
        Check("group size", lambda w: check_groups(w.source, w.recipe.awq.group_size)),
        *(order if workspace.recipe.awq.source == "bf16" and "dequant" not in before else []),
        Check("device", _device, weights=False),
        Check("ranks", _ranks),
        Check("sequence length", _length, weights=False),
        Check("calibration samples, tokenizer and chat template", _calibration, weights=False),
        Check("decoder layers", _layers),
        Check("vocabulary", _vocabulary),
        Check("memory", _memory),
    ]


def calibration_tokens(workspace: Workspace) -> Tokens:
    """The run's calibration tokens, made once or kept from an earlier run; the stage keeps them."""
    if workspace.calibration is None:
        cache = workspace.folder(STATE) / CACHE_NAME
        workspace.calibration = load_tokens(workspace.recipe, workspace.tokenizer_folder, cache)
    return workspace.calibration


def dequant_output(workspace: Workspace) -> str:
    """The dequantized folder is whole. Raises JournalError."""
    folder, journal = workspace.folder(BF16), workspace.journal.stage("dequant")
    if not journal.complete:
        raise JournalError(f"{folder} is not complete; run `mmq dequant` first, or set awq.source: fp8")
    journal.check_files(BF16)
    return f"{len(journal.units)} units in {folder}"


def check_groups(source: SourceModel, group_size: int) -> str:
    """Raises CheckpointError where the experts' input channels can't be cut into groups."""
    widths, arch = [], source.architecture
    layer = next(filter(arch.has_experts, range(source.layer_count())))
    for linear in arch.expert_linears:
        spec = source.specs[f"{arch.expert_weight(layer, 0, linear)}.weight"]
        widths.append(spec.shape[1])
        if spec.shape[1] % group_size:
            raise CheckpointError(
                f"{source.checkpoint.folder}: {spec.name} has {spec.shape[1]} input channels, not a multiple of"
                f" awq.group_size = {group_size}"
            )
    return f"{group_size} of {' and '.join(map(str, sorted(set(widths))))} input channels"


def widest_layer(source: SourceModel) -> int:
    """Bytes of the largest dequantized layer."""
    return max(sum(source.specs[n].nbytes for n in source.layer_names(i)) for i in range(source.layer_count()))


def _device(workspace: Workspace) -> str:
    return str(present_device(workspace.recipe.awq.device))


def _ranks(workspace: Workspace) -> str:
    """Each has experts to work on, and what they observe can be put together."""
    team, experts = workspace.team, workspace.source.expert_count()
    if team.size > experts:
        raise RecipeError(f"{team.size} ranks can't share {experts} experts a layer; start at most as many")
    scheme = workspace.kv_cache_scheme
    if team.size > 1 and scheme is not None and scheme.observer not in ORDERLESS:
        raise RecipeError(
            f"awq.kv_cache_scheme.observer: {scheme.observer} follows the order of the samples, which {team.size} ranks"
            f" share; on several, {' or '.join(ORDERLESS)}"
        )
    return f"{team.size} for {experts} experts a layer"


def _length(workspace: Workspace) -> str:
    """The model has a position for every token that is kept."""
    config = source_config(workspace.recipe, workspace.offline)
    length = workspace.recipe.awq.calibration.sequence_length
    positions = check_length(length, "awq.calibration.sequence_length", config, architecture_of(config))
    return f"{length:,} of {f'{positions:,} positions' if positions else 'as many positions as transformers allows'}"


def _calibration(workspace: Workspace) -> str:
    """Every sample read, rendered and tokenized; the tokens are those that the stage takes."""
    _check_apart(workspace.recipe)
    tokens = calibration_tokens(workspace)
    kept = ", kept from before" if tokens.cached else ""
    return f"{len(tokens.samples):,} samples, {tokens.ids.numel():,} tokens{kept}"


def _check_apart(recipe: Recipe) -> None:
    """Raises RecipeError where samples lie in a folder that is written, and that `--restart` removes."""
    for entry in recipe.awq.calibration.files:
        path = recipe.path(entry.path if isinstance(entry, FileSamples) else entry.hub)
        for name in (BF16, AWQ, HYBRID, STATE):
            folder = (recipe.work_path / name).resolve()
            if path.exists() and path.is_relative_to(folder):
                raise RecipeError(f"awq.calibration.files: {path} lies in {folder}, which mmq writes")


def _layers(workspace: Workspace) -> str:
    """Every decoder layer is one that transformers' class takes: its names, its shapes, and config.json's values."""
    source, arch = workspace.source, workspace.architecture
    config = transformers_config(arch, source.config)
    nowhere = torch.device("meta")
    for layer in range(source.layer_count()):
        tensors = {}
        for name in source.layer_names(layer):
            local = arch.split(name)[1]
            if arch.split_expert(local) is None:
                tensors[local] = torch.empty(source.specs[name].shape, device=nowhere)
        DecoderLayer(arch, config, layer, tensors, nowhere)
    return (
        f"{source.layer_count()} of {arch.layer_class}, rotary settings of type {config.rope_parameters['rope_type']}"
    )


def _vocabulary(workspace: Workspace) -> str:
    """Every token has its embedding: those of the samples, and all that the tokenizer knows."""
    source, tokens = workspace.source, calibration_tokens(workspace)
    rows = source.specs[workspace.architecture.embedding].shape[0]
    check_tokens(rows, tokens.ids)
    if tokens.cached:  # made with a tokenizer that was looked at then
        return f"largest token {int(tokens.ids.max()):,} of {rows:,}"
    tokenizer = load_tokenizer(workspace.tokenizer_folder, workspace.recipe.model.trust_remote_code)
    return f"the tokenizer's largest is {check_tokenizer(tokenizer, rows):,} of {rows:,}"


def gradient_memory(source: SourceModel, calibration: int, tokens: int, longest: int, gpu: bool) -> int:
    """Bytes that the gradient of so many of the calibration's tokens takes where it is computed; the longest sample has
    `longest`."""
    arch, config = source.architecture, source.config
    hidden, inner, top_k = (int(config[key]) for key in (arch.hidden_key, arch.intermediate_key, arch.top_k_key))
    rows = source.specs[arch.embedding].shape[0]
    return fisher_memory(widest_layer(source), calibration, tokens, longest, hidden, inner, top_k, rows, gpu)


def _memory(workspace: Workspace) -> str:
    """The device, and the host, could hold what the stage can't do without, were nothing else there."""
    source, recipe = workspace.source, workspace.recipe
    device = present_device(recipe.awq.device)
    largest = max(
        sum(spec.nbytes for spec in quantized_specs(workspace, layer)) for layer in layers_and_rest(workspace)
    )
    states = calibration_tokens(workspace).ids.numel() * int(source.config[source.architecture.hidden_key])
    gpu = device.type != "cpu"
    widest, tokens = widest_layer(source), calibration_tokens(workspace)
    compensated = recipe.awq.rounding == "compensated"
    least = awq_memory(widest, largest, states, LEAST_BUDGET if gpu else 0, gpu, compensated)
    if recipe.awq.weighs_outputs:
        taken = min(tokens.ids.numel(), most_fisher_tokens(recipe))
        least = least.at_least(gradient_memory(source, tokens.ids.numel(), taken, max(tokens.lengths), gpu), gpu)
    return check_memory("awq", least, device, "fewer or shorter calibration samples need less")
