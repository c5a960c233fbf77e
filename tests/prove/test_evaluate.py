"""mmq eval: its figures against the plain fp32 forward of reference.py, and that it goes on where it was stopped."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors import safe_open

import mmq.prove.evaluate
from cli.test_cli import events, refused, succeed
from conftest import DEVICE, TINY, digests, edit_json
from mmq.errors import JournalError
from mmq.families.minimax_m2 import MINIMAX_M2
from mmq.prove.compare import cache_share, compare
from mmq.prove.evaluate import (
    HYBRID_FP8_KV,
    HYBRID_MODEL,
    NEAREST,
    SOURCE,
    evaluate_checkpoint,
    kind_rows,
    rows,
    told_routing,
    worst,
)
from mmq.prove.forward import run_layer
from mmq.prove.measures import measure, other_experts, relative_error
from mmq.prove.streamed import EvalSettings, eval_recipe
from mmq.prove.weights import HybridWeights, SourceWeights, read_layer
from mmq.quantize.decoder_layer import DecoderLayer, transformers_config
from mmq.quantize.head import Head
from mmq.quantize.kv_cache import quantize_kv_cache
from mmq.quantize.layer import LayerContent
from mmq.recipe import load
from mmq.source.calibration import load_tokens
from mmq.source.tokens import Tokens
from mmq.storage.checkpoint import Checkpoint
from mmq.text import bytes_text
from mmq.workdir.workspace import Workspace
from prove.stops import raising
from reference import (
    Weights,
    chosen_experts,
    dequantized,
    divergence,
    hidden_states,
    keys_and_values,
    logits,
    read_folder,
    rms_norm,
    round_to_nearest,
)
from stages.test_resume import stopped

VARIANTS = [SOURCE.name, HYBRID_MODEL.name, HYBRID_FP8_KV.name, NEAREST.name]
SAMPLES, LENGTH = 10, 64
OPTIONS = ("--samples", SAMPLES, "--sequence-length", LENGTH, "--quiet")
Report = dict[str, Any]


@pytest.fixture(scope="module")
def ready(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished project, to be evaluated on the samples that mmq ships. Don't write."""
    folder = tmp_path_factory.mktemp("ready")
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def evaluated(ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the ready project that was evaluated. Don't write."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(ready, folder, dirs_exist_ok=True)
    succeed("eval", folder / "recipe.yaml", *OPTIONS)
    return folder


@pytest.fixture
def copy(ready: Path, tmp_path: Path) -> Path:
    """A copy of the ready project, to do anything with."""
    folder = tmp_path / "copy"
    shutil.copytree(ready, folder)
    return folder


@pytest.fixture(scope="module")
def tokens(ready: Path) -> Tokens:
    return load_tokens(eval_recipe(load(ready / "recipe.yaml"), settings()), ready / "source")


@pytest.fixture(scope="module")
def models(ready: Path) -> tuple[Report, dict[str, Weights]]:
    """config.json and fp32 weights of the variants, by their definition."""
    config, tensors = read_folder(ready / "source")
    source = dequantized(tensors)
    # From bf16, as the baseline is made: fp8 codes often lie in the middle of two int4 codes, and bf16 decides.
    nearest = {n: round_to_nearest(w.bfloat16().float()) if ".experts." in n else w for n, w in source.items()}
    hybrid = dequantized(read_folder(ready / "run/hybrid")[1])
    return config, {SOURCE.name: source, HYBRID_MODEL.name: hybrid, NEAREST.name: nearest}


def settings() -> EvalSettings:
    return EvalSettings(samples=SAMPLES, sequence_length=LENGTH)


def report_of(project: Path) -> Report:
    content: Report = json.loads((project / "run/eval.json").read_text(encoding="utf-8"))
    return content


def metrics_of(project: Path) -> dict[str, Report]:
    return {entry["variant"]: entry for entry in report_of(project)["variants"]}


def comparable(project: Path) -> Report:
    """eval.json but for what differs between two equal runs: seconds and folders."""
    report = report_of(project)
    del report["seconds"], report["settings"]["source"], report["settings"]["hybrid"]
    return report


def test_metrics_are_those_of_the_plain_fp32_model(
    evaluated: Path, tokens: Tokens, models: tuple[Report, dict[str, Weights]]
) -> None:
    """Perplexity and KL over all positions that have a next token. The streamed model computes in bf16, which
    moves the routing of a few tokens: its loss may be off by 0.05 nats and its KL by a fifth."""
    config, weights = models
    found = metrics_of(evaluated)
    assert list(found) == VARIANTS
    samples = tokens.ids.split(tokens.lengths)
    for variant, mine in weights.items():
        loss = kl = agreed = 0.0
        for ids in samples:
            truth, other = (logits(ids, w, config)[:-1] for w in (weights[SOURCE.name], mine))
            loss += float(F.cross_entropy(other, ids[1:], reduction="sum"))
            kl += divergence(truth, other) * (len(ids) - 1)
            agreed += float((truth.argmax(-1) == other.argmax(-1)).sum())
        count = sum(tokens.lengths) - len(samples)
        assert report_of(evaluated)["tokens"]["predicted"] == count
        entry = found[variant]
        assert entry["negative_log_likelihood"] == pytest.approx(loss / count, abs=0.05)
        assert entry["perplexity"] == pytest.approx(float(torch.tensor(loss / count).exp()), rel=0.05)
        assert entry["kl"] == pytest.approx(kl / count, rel=0.2, abs=1e-9)
        assert entry["top1_agreement"] == pytest.approx(agreed / count, abs=0.06)


def test_hidden_state_errors_are_those_of_the_plain_fp32_model(
    evaluated: Path, tokens: Tokens, models: tuple[Report, dict[str, Weights]]
) -> None:
    config, weights = models
    samples = tokens.ids.split(tokens.lengths)
    states = {
        variant: [torch.cat(parts) for parts in zip(*(hidden_states(ids, w, config) for ids in samples), strict=True)]
        for variant, w in weights.items()
    }
    for entry in report_of(evaluated)["layers"]:
        truth = states[SOURCE.name][entry["layer"] + 1]
        assert list(entry["relative_error"]) == list(entry["other_experts"]) == VARIANTS
        for variant in weights:
            expected = float((states[variant][entry["layer"] + 1] - truth).norm() / truth.norm())
            assert entry["relative_error"][variant] == pytest.approx(expected, rel=0.2, abs=1e-9)


def test_in_fp32_the_streamed_model_is_the_plain_one(
    ready: Path, tokens: Tokens, models: tuple[Report, dict[str, Weights]]
) -> None:
    """The same functions without bf16's rounding: reading, layers, head, sums."""
    config, weights = models
    transformers = transformers_config(MINIMAX_M2, config)
    readers = {
        SOURCE.name: SourceWeights(Workspace.of(load(ready / "recipe.yaml")).source),
        HYBRID_MODEL.name: HybridWeights(Checkpoint.open(ready / "run/hybrid"), MINIMAX_M2),
    }
    routed: dict[str, list[torch.Tensor]] = {variant: [] for variant in readers}
    states, heads, samples = {}, {}, tokens.ids.split(tokens.lengths)
    for variant, reader in readers.items():
        # Dequantized weights are rounded to bf16 once.
        plain = {
            name: w.bfloat16().float() if "_proj" in name or ".experts." in name else w
            for name, w in weights[variant].items()
        }
        hidden = plain["model.embed_tokens.weight"][tokens.ids].to(DEVICE)
        for layer in range(config["num_hidden_layers"]):
            found = read_layer(reader, MINIMAX_M2, layer, DEVICE)
            rest = {name: tensor.float() for name, tensor in found.rest.items() if "_scale" not in name}
            content = LayerContent(found.gate_up.float(), found.down.float(), rest)
            decoder = DecoderLayer(MINIMAX_M2, transformers, layer, rest, DEVICE)
            hidden = run_layer(decoder, content, hidden, tokens.lengths, 128, routed=routed[variant].append)
        expected = torch.cat([hidden_states(ids, plain, config)[-1] for ids in samples])
        hidden = hidden.cpu()
        assert relative_error(hidden, expected) < 1e-5
        states[variant] = hidden
        heads[variant] = Head(MINIMAX_M2, transformers, plain["model.norm.weight"], plain["lm_head.weight"])
        weights = weights | {variant: plain}
    measured = measure(states, heads, SOURCE.name, tokens)
    chosen = {
        variant: [
            torch.cat(parts)
            for parts in zip(*(chosen_experts(ids, weights[variant], config) for ids in samples), strict=True)
        ]
        for variant in readers
    }
    for variant in readers:
        for layer, index in enumerate(routed[variant]):
            pairs = zip(chosen[variant][layer].tolist(), chosen[SOURCE.name][layer].tolist(), strict=True)
            expected = sum(len({*own} - {*truth}) for own, truth in pairs)
            found = other_experts(index, routed[SOURCE.name][layer]) * index.numel()
            assert found == pytest.approx(expected, abs=2), "a hair between two scores may decide otherwise"
            # The first layer's router is before any quantized expert.
            assert found > 0 or variant == SOURCE.name or layer == 0
    metrics = {variant: found.metrics() for variant, found in measured.items()}
    count = sum(tokens.lengths) - len(samples)
    for variant in readers:
        both = [[logits(ids, weights[v], config)[:-1] for v in (SOURCE.name, variant)] for ids in samples]
        losses = [F.cross_entropy(own, ids[1:], reduction="sum") for (_, own), ids in zip(both, samples, strict=True)]
        kl = sum(divergence(*pair) * len(pair[0]) for pair in both) / count
        same = sum(int((truth.argmax(-1) == own.argmax(-1)).sum()) for truth, own in both) / count
        entry = metrics[variant]
        # Of each sample as well, and how sure the mean over samples is.
        own = [divergence(*pair) * len(pair[0]) for pair in both]
        assert measured[variant].kl.tolist() == pytest.approx(own, rel=1e-3, abs=1e-6)
        rest = [k - kl * len(pair[0]) for k, pair in zip(own, both, strict=True)]
        error = (len(own) / (len(own) - 1) * sum(r * r for r in rest)) ** 0.5 / count
        assert entry["kl_standard_error"] == pytest.approx(error, rel=1e-3, abs=1e-9)
        assert entry["negative_log_likelihood"] == pytest.approx(float(sum(losses)) / count, rel=1e-5)
        assert entry["kl"] == pytest.approx(kl, rel=1e-4, abs=1e-9)
        assert entry["top1_agreement"] == pytest.approx(same, abs=2 / count)


def test_the_source_is_itself_and_the_hybrid_beats_round_to_nearest(evaluated: Path) -> None:
    found = metrics_of(evaluated)
    assert found[SOURCE.name]["kl"] == 0
    assert found[SOURCE.name]["top1_agreement"] == 1
    layers = report_of(evaluated)["layers"]
    assert all(entry[key][SOURCE.name] == 0 for entry in layers for key in ("relative_error", "other_experts"))
    shares = {
        variant: sum(entry["other_experts"][variant] for entry in layers) / len(layers)
        for variant in (HYBRID_MODEL.name, NEAREST.name)
    }
    assert min(shares.values()) > 0
    assert f"; {NEAREST.name} {shares[NEAREST.name]:.2%}" in str(told_routing(report_of(evaluated)))
    assert 0 < found[HYBRID_MODEL.name]["kl"] < 0.75 * found[NEAREST.name]["kl"]
    assert found[HYBRID_MODEL.name]["kl"] != found[HYBRID_FP8_KV.name]["kl"] < found[NEAREST.name]["kl"]


def test_kinds_and_samples_make_up_the_whole(evaluated: Path) -> None:
    """The shipped samples name their kinds; ten from the top are eight of code and two of languages."""
    report = report_of(evaluated)
    samples = report["samples"]
    assert [sample["kind"] for sample in samples] == ["code"] * 8 + ["languages"] * 2
    assert samples[0]["name"] == "eval-code-python-changeringing-01"
    tokens = sum(sample["tokens"] for sample in samples)
    assert tokens == report["tokens"]["predicted"]
    for entry in report["variants"]:
        for key in ("kl", "negative_log_likelihood", "top1_agreement"):
            parts = [sample["tokens"] * sample["variants"][entry["variant"]][key] for sample in samples]
            assert sum(parts) / tokens == pytest.approx(entry[key], abs=1e-12)
            assert sum(parts[:8]) / (tokens * 8 / 10) == pytest.approx(entry["kinds"]["code"][key], abs=1e-12)
    (row,) = (row for row in rows(report) if row["variant"] == HYBRID_MODEL.name)
    assert float(row["KL ±"]) > 0
    assert [list(row) for row in kind_rows(report)] == [["KL by kind of text", "code", "languages"]] * 3
    worst_first = [float(place["KL (nats)"]) for place in worst(report, 10)]
    assert worst_first == sorted(worst_first, reverse=True) and len(worst_first) == 10


def test_two_results_are_compared_sample_by_sample(evaluated: Path, tmp_path: Path) -> None:
    """The same model rounded the other way, against the one rounded as by default, both by the command."""
    folder = tmp_path / "two"
    shutil.copytree(evaluated, folder)
    other = folder / "other.yaml"
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    own = load(folder / "recipe.yaml").awq.rounding
    recipe["awq"]["rounding"] = "compensated" if own == "nearest" else "nearest"
    recipe["work_dir"], recipe["awq"]["source"] = "other", "fp8"
    other.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    succeed("run", other, "--quiet")
    output = succeed("eval", folder / "recipe.yaml", "--against", other, *OPTIONS[:-1])
    assert "p = " in output and "nearer in" in output
    found = json.loads((folder / "run/comparison.json").read_text(encoding="utf-8"))["found"]
    theirs = json.loads((folder / "other/eval.json").read_text(encoding="utf-8"))
    both = [metrics_of(folder), {entry["variant"]: entry for entry in theirs["variants"]}]
    assert [entry["variant"] for entry in found] == [HYBRID_MODEL.name, HYBRID_FP8_KV.name]
    for entry in found:
        kl = [metrics[entry["variant"]]["kl"] for metrics in both]
        assert entry["kl"] == pytest.approx(kl, rel=1e-9)
        assert entry["difference"] == pytest.approx(kl[0] - kl[1], rel=1e-9)
        assert entry["interval"][0] < entry["difference"] < entry["interval"][1] and 0 < entry["p"] <= 1
    one, two = report_of(folder), report_of(folder)
    kl = {entry["variant"]: entry["kl"] for entry in one["variants"]}
    added = f"the fp8 KV cache adds {kl[HYBRID_FP8_KV.name] - kl[HYBRID_MODEL.name]:.5f} ± "
    assert added in output and added in str(cache_share(one))
    two["tokens"]["fingerprint"] = "another"
    with pytest.raises(JournalError, match="not of the same samples"):
        compare(one, two, HYBRID_MODEL.name)
    del two["samples"]
    with pytest.raises(JournalError, match="--restart"):
        compare(one, two, HYBRID_MODEL.name)


@pytest.mark.parametrize(("shift", "sure"), [(0.0, False), (0.05, True)])
def test_a_difference_is_told_from_chance(shift: float, sure: bool) -> None:
    """Pairs that differ by noise alone, and pairs of which one is always a little better; p by all exchanges of 12."""
    generator = torch.Generator().manual_seed(3)
    large = torch.rand(12, generator=generator, dtype=torch.float64) * 3
    noise = torch.randn(12, generator=generator, dtype=torch.float64) * 0.02
    counts = torch.randint(20, 90, (12,), generator=generator)

    def report(kl: torch.Tensor) -> Report:
        samples = [
            {"tokens": int(n), "variants": {"hybrid": {"kl": float(k)}}} for n, k in zip(counts, kl, strict=True)
        ]
        return {"samples": samples, "settings": {"source_fingerprint": "s"}, "tokens": {"fingerprint": "t"}}

    result = compare(report(large + noise), report(large + shift), "hybrid")
    difference = (noise - shift) * counts
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=12)), dtype=torch.float64)
    exact = float(((signs @ difference).abs() >= difference.sum().abs() - 1e-9).double().mean())
    assert result["p"] == pytest.approx(exact, abs=0.02)
    assert (result["p"] < 0.01) == sure == (result["interval"][1] < 0)
    assert result["difference"] == pytest.approx(float(difference.sum() / counts.sum()))


def test_keys_and_values_are_rounded_with_the_stored_scales(
    ready: Path, models: tuple[Report, dict[str, Weights]]
) -> None:
    """What the layer's attention reads, against the plain model's keys and values rounded by definition."""
    config, weights = models
    hybrid = weights[HYBRID_MODEL.name]
    stored = read_folder(ready / "run/hybrid")[1]
    ids = torch.arange(100, 148)
    prefix = "model.layers.0."
    hidden = hybrid["model.embed_tokens.weight"][ids]
    x = rms_norm(hidden, hybrid[prefix + "input_layernorm.weight"], config["rms_norm_eps"])
    scales = {name: stored[f"{prefix}self_attn.{name}"] for name in ("k_scale", "v_scale")}
    # In fp32, so that nothing but the rounding to e4m3 is between the two.
    local = {n.removeprefix(prefix): w for n, w in hybrid.items() if n.startswith(prefix) and ".experts." not in n}
    transformers = transformers_config(MINIMAX_M2, config)
    decoder = DecoderLayer(MINIMAX_M2, transformers, 0, local, DEVICE)
    scheme = json.loads((ready / "run/hybrid/config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    quantize_kv_cache(decoder, scheme, scales)
    captured: list[torch.Tensor] = []
    attention: Any = decoder.module.self_attn
    attention.kv_cache.register_forward_hook(lambda _module, _given, result: captured.extend(result))
    decoder.attend(hidden.to(DEVICE), [len(ids)])
    for given, seen, scale in zip(keys_and_values(x, hybrid, prefix, config), captured, scales.values(), strict=True):
        rounded = (given / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        # A value in the middle of two codes may go either way.
        assert float((seen[0].cpu() - rounded).norm() / rounded.norm()) < 0.002
        assert 0.01 < float((given - rounded).norm() / given.norm()) < 0.05


@pytest.mark.parametrize(("factor", "worse"), [(1000.0, 1.05), (30000.0, 1.5), (0.001, 1.5)])
def test_absurd_kv_scales_make_the_fp8_cache_worse(evaluated: Path, copy: Path, factor: float, worse: float) -> None:
    """e4m3 spans 18 binades: a scale 1000 times too large costs the small values, one 30000 times too large nearly all,
    one too small clips."""
    for shard in sorted((copy / "run/hybrid").glob("*.safetensors")):
        multiply(shard, ("k_scale", "v_scale"), factor)
    succeed("eval", copy / "recipe.yaml", *OPTIONS)
    before, after = metrics_of(evaluated), metrics_of(copy)
    assert after[HYBRID_FP8_KV.name]["kl"] > worse * before[HYBRID_FP8_KV.name]["kl"]
    for variant in (SOURCE.name, HYBRID_MODEL.name, NEAREST.name):
        assert after[variant] == before[variant]


def multiply(shard: Path, endings: tuple[str, ...], factor: float) -> None:
    """Multiply fp32 [1] tensors in place: the file's size stays."""
    raw = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    with safe_open(shard, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name.endswith(endings):
                begin, end = (start + offset for offset in header[name]["data_offsets"])
                raw[begin:end] = (file.get_tensor(name) * factor).numpy().tobytes()
    shard.write_bytes(raw)


@pytest.mark.parametrize(("function", "call"), [("read_layer", 1), ("read_layer", 3), ("save_tensors", 2),
                                                ("relative_error", 5), ("measure", 1)])  # fmt: skip
def test_a_stopped_evaluation_goes_on_to_the_same_result(evaluated: Path, copy: Path, function: str, call: int) -> None:
    with raising(mmq.prove.evaluate, function, call):
        evaluate_checkpoint(Workspace.of(load(copy / "recipe.yaml")), settings())
    assert not (copy / "run/eval.json").exists()
    done = [event["unit"] for event in resumed(copy) if event["event"] == "unit"]
    whole = ["layer-00000", "layer-00001", "head"]
    assert done == whole[{"read_layer": call // 2, "save_tensors": 1, "relative_error": 1, "measure": 2}[function] :]
    assert comparable(copy) == comparable(evaluated)
    assert_clean(copy)


@pytest.mark.parametrize("rename", [3, 8])
def test_a_killed_evaluation_goes_on_to_the_same_result(evaluated: Path, copy: Path, rename: int) -> None:
    code, _ = stopped(copy, "eval", "replace", rename, options=list(map(str, OPTIONS)))
    assert code == -signal.SIGKILL, "the moment never came"
    succeed("eval", copy / "recipe.yaml", *OPTIONS)
    assert comparable(copy) == comparable(evaluated)
    assert_clean(copy)


def resumed(project: Path) -> list[dict[str, Any]]:
    """The events of a run that goes on."""
    return events(succeed("eval", project / "recipe.yaml", *OPTIONS[:-1], "--json"))


def assert_clean(project: Path) -> None:
    assert not list((project / "run").rglob("*.mmq-tmp"))
    assert not list((project / "run").rglob("hidden-*"))
    assert json.loads((project / "run/journal.json").read_text())["stages"]["eval"]["complete"]


def test_a_complete_evaluation_is_shown_again_and_restart_begins_anew(evaluated: Path, copy: Path) -> None:
    shutil.copytree(evaluated / "run", copy / "run", dirs_exist_ok=True)
    (result,) = (event for event in resumed(copy) if event["event"] == "result")
    assert {key: result[key] for key in report_of(copy)} == report_of(copy) == report_of(evaluated)
    table = succeed("eval", copy / "recipe.yaml", *OPTIONS[:-1])
    assert all(variant in table for variant in VARIANTS)
    assert "mmq eval --restart" in refused("eval", copy / "recipe.yaml", "--samples", 3)
    found = events(succeed("eval", copy / "recipe.yaml", "--samples", 3, "--restart", "--json"))
    assert [event["unit"] for event in found if event["event"] == "unit"] == ["layer-00000", "layer-00001", "head"]
    assert report_of(copy)["tokens"]["samples"] == 3
    (copy / "run/eval.json").unlink()
    assert "is gone" in refused("eval", copy / "recipe.yaml", "--samples", 3)


def test_without_kv_scales_there_is_no_such_column(copy: Path) -> None:
    edit_json(copy / "run/hybrid/config.json", lambda config: config["quantization_config"].pop("kv_cache_scheme"))
    succeed("eval", copy / "recipe.yaml", "--samples", 1, "--quiet")
    assert list(metrics_of(copy)) == [SOURCE.name, HYBRID_MODEL.name, NEAREST.name]


def test_bad_input_is_refused(copy: Path, project: Path, tmp_path: Path) -> None:
    recipe = copy / "recipe.yaml"
    missing = tmp_path / "missing.jsonl"
    assert f"there is no calibration file {missing}" in refused("eval", recipe, "--data", missing)
    assert "has 24 samples" in refused("eval", recipe, "--samples", 25)
    message = refused("eval", recipe, "--sequence-length", 5000)
    assert message == "the sequence length is 5000, the model has 4096 positions"
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "a"}\n', encoding="utf-8")
    assert "nothing to predict" in refused("eval", recipe, "--data", short)
    assert "run `mmq restore` first" in refused("eval", project / "recipe.yaml")
    shard = next((copy / "run/hybrid").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert str(shard) in refused("eval", recipe)


def test_a_dry_run_says_what_was_looked_at_and_touches_nothing(copy: Path) -> None:
    recipe, before = copy / "recipe.yaml", digests(copy)
    (found,) = events(succeed("eval", recipe, *OPTIONS[:-1], "--by-layer", "--dry-run", "--json"))
    assert digests(copy) == before
    looked_at = {(check["stage"], check["checked"]): check["found"] for check in found["checks"]}
    assert {stage for stage, _ in looked_at} == {"eval", "eval --by-layer"}
    assert looked_at["eval", "held-out samples"] == f"{SAMPLES} samples, {SAMPLES * LENGTH} tokens"
    # Hidden states of four variants, in bf16, twice for a moment; of two layers and the source.
    for stage, streams in (("eval", 4), ("eval --by-layer", 3)):
        needed = 2 * streams * SAMPLES * LENGTH * TINY.hidden * 2
        assert looked_at[stage, "disk"].startswith(f"{bytes_text(needed)} needed, ")
    assert "has 24 samples" in refused("eval", recipe, "--samples", 25, "--dry-run")
    assert digests(copy) == before


@pytest.mark.parametrize("command", ["eval", "eval --by-layer", "verify"])
def test_a_report_that_could_not_be_written_is_refused_first(
    copy: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after hours; a dry run says so as well."""
    name = {"eval": "eval.json", "eval --by-layer": "by_layer.json", "verify": "verify.json"}[command]
    (copy / "run" / name).mkdir()
    sentence = f"work_dir: {copy / 'run' / name} is a folder, a file of that name is to be written"
    for module in ("prove.evaluate.read_layer", "prove.by_layer.read_layer", "prove.verify.check_tensors"):
        monkeypatch.setattr(f"mmq.{module}", lambda *_, **__: pytest.fail("work was begun"))
    first, *options = command.split()
    assert refused(first, copy / "recipe.yaml", *options) == sentence
    assert refused(first, copy / "recipe.yaml", *options, "--dry-run") == sentence


def test_a_changed_source_is_refused(copy: Path) -> None:
    edit_json(copy / "source/config.json", lambda config: config.update(rope_theta=10000))
    assert "another source" in refused("eval", copy / "recipe.yaml", *OPTIONS)
