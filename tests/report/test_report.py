"""The report: one HTML file that needs nothing else, whose figures are those of the run's own files."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from conftest import digests, edit_json
from mmq.cli.app import app
from mmq.recipe import load
from mmq.report.facts import Component, RunFacts, StageFacts, read_run
from mmq.report.layer_plots import expert_tokens
from mmq.report.page import render, write_report
from mmq.report.plots import PLOTS, Drawn
from mmq.report.style import DPI
from mmq.storage.checkpoint import Checkpoint
from mmq.text import bytes_text, duration_text
from mmq.workdir.workspace import Workspace

MARKUP = "<script>alert('1')</script>&\"'"
LAYERS, EXPERTS = 62, 256


class Page(HTMLParser):
    """What a browser would find: references, scripts, text, and tables by their id."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.captions: dict[str, str] = {}
        self.text = ""
        self.open: list[str] = []
        self._table = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.references += [found[key] or "" for key in ("src", "srcset", "href", "data", "action") if key in found]
        assert not any(name.startswith("on") for name in found), "no event handlers"
        if tag == "table":
            self._table = found["id"] or ""
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append("")
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "elements are nested"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[self._table][-1][-1] += data

    def rows(self, table: str) -> list[dict[str, str]]:
        head, *body = self.tables[table]
        return [dict(zip(head, row, strict=True)) for row in body]


@pytest.fixture(scope="module")
def evaluated(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished project, verified and evaluated, with its report. Don't write."""
    folder = tmp_path_factory.mktemp("evaluated") / "project"
    shutil.copytree(finished, folder)
    data = ["--data", str(folder / "samples.jsonl"), "--samples", "4"]
    for arguments in (["verify"], ["eval", "--by-layer", *data], ["report"]):
        result = CliRunner().invoke(app, [arguments[0], str(folder / "recipe.yaml"), *arguments[1:], "--quiet"])
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def evaluated_copy(evaluated: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    shutil.copytree(evaluated, folder)
    return folder


def workspace(folder: Path) -> Workspace:
    return Workspace.of(load(folder / "recipe.yaml"), offline=True)


def page_of(folder: Path) -> Page:
    return Page((folder / "run/report/report.html").read_text(encoding="utf-8"))


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def synthetic_layers() -> list[dict[str, Any]]:
    """Statistics as the awq stage writes them, of 62 layers and 256 experts, some of them without tokens."""
    random = np.random.default_rng(0)
    layers = []
    for layer in range(LAYERS):
        weights = np.exp(random.normal(0, 1.4, EXPERTS))
        tokens = random.multinomial(8 * 131072, weights / weights.sum())
        tokens[random.random(EXPERTS) < 0.002] = 0
        before = float(10 ** (-6 + layer / 20))
        layers.append(
            {
                "layer": layer,
                "tokens_per_expert": tokens.tolist(),
                "topped_up": np.maximum(0, 128 - tokens).tolist(),
                "loss_round_to_nearest": before,
                "loss_chosen": before * (1.0 if layer == 5 else 0.6),
                "loss_propagated": before * 0.8,
                "identity_kept": layer == 5,
                "norm": {"ratio": layer % 19 / 18},
                "down": {"ratio": (random.integers(0, 19, EXPERTS) / 18).tolist()},
                "kv_scales": {"k_scale": 0.05 + 0.001 * layer, "v_scale": 0.002 * 1.05**layer},
                "seconds": {"reading": 0.5, "attention": 9.0, "searching": 480.0, "writing": 5.0},
                "peak_host_bytes": 13 * 10**9,
                "host_bytes": 10 * 10**9 + layer,
                "peak_device_bytes": 38 * 10**9,
                "open_files": 14,
                "excluded_samples": [7, 12] if layer == 3 else [],
            }
        )
    return layers


def synthetic_facts() -> RunFacts:
    """A run of the size of MiniMax-M2.5."""
    layers = synthetic_layers()
    variants = ("source", "hybrid", "hybrid, fp8 KV cache", "round-to-nearest")
    errors = [
        {
            "layer": layer,
            "relative_error": {name: 0.002 * place * (layer + 1) for place, name in enumerate(variants)},
            "other_experts": {name: 0.01 * place for place, name in enumerate(variants)},
        }
        for layer in range(LAYERS)
    ]
    metrics = {"perplexity": 7.25, "kl": 0.0125, "top1_agreement": 0.953}
    run = {"began": "2026-01-02T03:04:05+00:00", "seconds": 31800.0, "peak_host_bytes": 13 * 10**9, "units": 63}
    run["peak_device_bytes"] = 38 * 10**9
    linears = dict.fromkeys(("w1", "w3", "w2"), 0.09)
    return RunFacts(
        recipe={"awq": {"min_tokens": 128}, "model": {"source": MARKUP}},
        source=MARKUP,
        work_dir=Path("/runs") / MARKUP.replace("/", "|"),
        layers=layers,
        stages=[
            StageFacts(name, True, [MARKUP], 63, {"model.source": MARKUP}, [run])
            for name in ("dequant", "awq", "restore", "eval")
        ],
        components=[
            Component(
                "experts", 224_680_476_672, 224_735_330_304, 117_000_000_000, "fp8 + fp32", "int4 in int32 + bf16"
            ),
            Component("attention", 2_730_491_904, 2_731_158_528, 2_731_158_528, "fp8 + fp32", "fp8 + fp32"),
            Component("kv_scales", 0, 0, 496, "", "fp32"),
        ],
        sizes_measured=True,
        verify={
            "ok": False,
            "problems": [f"{MARKUP} is missing"] * 105,
            "checks": {MARKUP: 1},
            "layers": [{"layer": layer, "expert_error": linears} for layer in range(LAYERS)],
        },
        evaluation={
            "settings": {"rounding": "nearest"},
            "tokens": {"samples": 4, "predicted": 4000},
            "variants": [{"variant": name} | metrics for name in variants],
            "layers": errors,
        },
        by_layer={
            "tokens": {"fingerprint": MARKUP},
            "layers": [
                {"layer": layer, "relative_error": 0.03}
                | {"kl": 2.0**-layer, "kl_standard_error": None, "top1_agreement": 0.5}
                for layer in range(LAYERS)
            ],
        },
        versions={"torch": MARKUP},
        missing=[f"{MARKUP} is not there."],
    )


def check_self_contained(html: str) -> None:
    """Nothing in the page is fetched or executed."""
    page = Page(html)
    assert not page.open, "every element is closed"
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "a"} & set(page.tags)
    assert page.references
    for reference in page.references:
        assert reference.startswith("data:image/png;base64,")
        image = Image.open(io.BytesIO(base64.b64decode(reference.partition(",")[2], validate=True)))
        image.load()
        assert image.format == "PNG"
    assert not re.search(r"https?:|@import|url\(|javascript:|//", re.sub(r"base64,[\w+/=]+", "", html))


def test_the_page_needs_nothing_else(evaluated: Path) -> None:
    check_self_contained((evaluated / "run/report/report.html").read_text(encoding="utf-8"))


def test_all_plots_are_written_as_files(evaluated: Path) -> None:
    files = {path.name for path in (evaluated / "run/report").iterdir()}
    assert files == {"report.html"} | {f"{plot.name}.png" for plot in PLOTS}
    for plot in PLOTS:
        with Image.open(evaluated / f"run/report/{plot.name}.png") as image:
            image.load()
            assert image.format == "PNG"
            assert min(image.size) > 300
            assert image.convert("L").getextrema()[0] < 50, "something is drawn on the white ground"


def test_layers_are_those_of_the_statistics(evaluated: Path) -> None:
    rows, layers = page_of(evaluated).rows("layers"), read(evaluated / "run/state/awq/layers.json")
    assert len(rows) == len(layers) == 2
    for row, layer in zip(rows, layers, strict=True):
        tokens = layer["tokens_per_expert"]
        assert int(row["layer"]) == layer["layer"]
        assert int(row["fewest tokens"]) == min(tokens)
        assert int(row["most"]) == max(tokens)
        assert int(row["topped up"]) == sum(1 for count in layer["topped_up"] if count)
        for column, key in (
            ("loss before", "loss_round_to_nearest"),
            ("loss after", "loss_chosen"),
            ("as served", "loss_propagated"),
        ):
            assert float(row[column]) == pytest.approx(layer[key], rel=1e-3)
        assert float(row["of before"].rstrip("%")) == pytest.approx(
            100 * layer["loss_chosen"] / layer["loss_round_to_nearest"], abs=0.06
        )
        assert float(row["norm's ratio"]) == pytest.approx(layer["norm"]["ratio"], abs=0.006)
        for scale in ("k_scale", "v_scale"):
            assert float(row[scale]) == pytest.approx(layer["kv_scales"][scale], rel=1e-3)
        assert float(row["all (s)"]) == pytest.approx(sum(layer["seconds"].values()), rel=1e-3)
        assert row["host peak"] == bytes_text(layer["peak_host_bytes"])


def test_verification_and_evaluation_are_those_of_their_files(evaluated: Path) -> None:
    page = page_of(evaluated)
    verify, evaluation = read(evaluated / "run/verify.json"), read(evaluated / "run/eval.json")
    assert {row["check"]: int(row["looked at"]) for row in page.rows("checks")} == verify["checks"]
    rows = page.rows("evaluation")
    assert [row["variant"] for row in rows] == [entry["variant"] for entry in evaluation["variants"]]
    for row, entry in zip(rows, evaluation["variants"], strict=True):
        assert float(row["perplexity"]) == pytest.approx(entry["perplexity"], rel=1e-4)
        assert float(row["KL (nats)"]) == pytest.approx(entry["kl"], abs=1e-5)
    alone = read(evaluated / "run/by_layer.json")["layers"]
    for row, entry in zip(page.rows("by-layer"), alone, strict=True):
        assert float(row["KL (nats)"]) == pytest.approx(entry["kl"], abs=1e-6) and int(row["layer"]) == entry["layer"]
    together = next(entry["kl"] for entry in evaluation["variants"] if entry["variant"] == "hybrid")
    told = f"{sum(entry['kl'] for entry in alone):.5f} summed up, {together:.5f} with all of them"
    assert told in page.text and told in (evaluated / "run/hybrid/README.md").read_text(encoding="utf-8")
    assert "passed" in page.text
    assert f"KL {evaluation['variants'][1]['kl']:.3g} nats" in page.text


def test_stages_are_those_of_the_journal(evaluated: Path) -> None:
    page, stages = page_of(evaluated), read(evaluated / "run/journal.json")["stages"]
    rows = page.rows("stages")
    assert [row["stage"] for row in rows] == ["dequant", "awq", "restore", "eval", "eval --by-layer"]
    for row in rows:
        (run,) = stages[row["stage"]]["runs"]
        assert row["time"] == duration_text(run["seconds"])
        assert row["peak host"] == bytes_text(run["peak_host_bytes"])
        done = len(stages[row["stage"]]["units"])
        assert row["units"] == f"{done} of {done}"
    versions = {row["package"]: row["version"] for row in page.rows("versions")}
    assert versions == stages["awq"]["runs"][0]["versions"]
    fingerprints = {(row["stage"], row["input"]): row["value"] for row in page.rows("fingerprints")}
    assert fingerprints["awq", "model.source"] == stages["awq"]["fingerprint"]["model.source"]
    assert len(fingerprints) == sum(len(stage["fingerprint"]) for stage in stages.values())


def test_sizes_are_those_of_the_files(evaluated: Path) -> None:
    """Against a plain sum over the safetensors headers of both folders, by names that tell experts from the rest."""
    facts = read_run(workspace(evaluated))
    assert facts.sizes_measured
    found = {part.name: part for part in facts.components}
    for folder, side in (("source", "bytes_before"), ("run/hybrid", "bytes_after")):
        total, experts = 0, 0
        for path in (evaluated / folder).glob("*.safetensors"):
            content = path.read_bytes()
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            for name, entry in header.items():
                if name != "__metadata__":
                    size = entry["data_offsets"][1] - entry["data_offsets"][0]
                    total += size
                    experts += size if ".experts." in name else 0
        assert getattr(facts, side) == total
        assert getattr(found["experts"], side) == experts
    assert found["experts"].dtype_before == "fp8 + fp32"
    assert found["experts"].dtype_after == "int4 in int32 + bf16 + int64"
    source = Checkpoint.open(evaluated / "source").specs.values()
    assert facts.parameters == sum(int(np.prod(spec.shape)) for spec in source if not spec.name.endswith("_scale_inv"))
    (total,) = (row for row in page_of(evaluated).rows("components") if row["component"] == "total")
    assert (total["before"], total["after"]) == (bytes_text(facts.bytes_before), bytes_text(facts.bytes_after))


@pytest.fixture(scope="module")
def large() -> str:
    """The page of a run of MiniMax-M2.5's size whose names are markup."""
    facts = synthetic_facts()
    return render(facts, [found for plot in PLOTS if (found := Drawn.of(plot, facts))])


def test_markup_in_the_run_is_text(large: str) -> None:
    check_self_contained(large)
    assert "<script" not in large
    page = Page(large)
    # Title, heading, notes, problem, check, fingerprints, version, recipe.
    assert page.text.count(MARKUP) >= 110
    assert "failed" in page.text and "and 5 more, in verify.json" in page.text
    assert "Layer 3 left out the calibration samples 7, 12" in page.text


def test_62_layers_of_256_experts(large: str) -> None:
    assert len(large) < 3_000_000
    page = Page(large)
    rows = page.rows("layers")
    assert [int(row["layer"]) for row in rows] == list(range(LAYERS))
    tokens = np.array([layer["tokens_per_expert"] for layer in synthetic_layers()])
    assert [int(row["most"].replace(",", "")) for row in rows] == tokens.max(1).tolist()
    assert len(page.references) == len(PLOTS) + 1
    sizes = [Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))).size for image in page.references]
    assert max(width for width, _ in sizes) > 6 * EXPERTS, "an expert is several pixels wide"
    assert max(height for _, height in sizes) > 5 * EXPERTS, "and several pixels high on a telephone"


def test_a_hostile_recipe_and_files(evaluated_copy: Path) -> None:
    """Names that reach the page from the recipe and from files on the disk."""
    run = evaluated_copy / "run"
    edit_json(run / "verify.json", lambda content: content["checks"].update({MARKUP: 3}))
    edit_json(run / "eval.json", lambda content: content["variants"][3].update({"variant": MARKUP}))
    edit_json(
        run / "eval.json",
        lambda content: [
            layer[key].update({MARKUP: layer[key].pop("round-to-nearest")})
            for layer in content["layers"]
            for key in ("relative_error", "other_experts")
        ],
    )
    shutil.copytree(evaluated_copy / "source", evaluated_copy / "<script>x")
    recipe = load(evaluated_copy / "recipe.yaml", ['model.source="<script>x"'])
    facts = read_run(Workspace.of(recipe, offline=True))
    html = render(facts, [found for plot in PLOTS if plot.section == "result" and (found := Drawn.of(plot, facts))])
    check_self_contained(html)
    assert "<script" not in html
    page = Page(html)
    assert MARKUP in {row["variant"] for row in page.rows("evaluation")}
    assert MARKUP in {row["check"] for row in page.rows("checks")}
    assert "<script>x" in page.text


@pytest.mark.parametrize("upright", [False, True])
def test_every_expert_has_its_cell_and_every_topped_up_one_its_dot(upright: bool) -> None:
    """Drawn without text on it, the picture has the empty experts' colour and the dots where the statistics say."""
    layers = synthetic_layers()
    figure = expert_tokens(layers, upright)
    axes = figure.axes[0]
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(DPI)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[:, :, :3].astype(int)
    tokens = np.array([layer["tokens_per_expert"] for layer in layers])
    topped = np.array([layer["topped_up"] for layer in layers]) > 0
    assert (tokens == 0).any() and (topped & (tokens > 0)).any()

    def colour(layer: int, expert: int) -> list[int]:
        place = (layer, expert) if upright else (expert, layer)
        x, y = axes.transData.transform(place)
        return pixels[pixels.shape[0] - 1 - int(y), int(x)].tolist()

    for layer, expert in zip(*np.nonzero(topped), strict=True):
        assert min(colour(layer, expert)) > 200, "a white dot"
    plain = [tuple(place) for place in np.argwhere(~topped)[::97]]
    assert all(min(colour(*place)) < 200 for place in plain)
    # The more tokens, the greener: viridis rises in green from end to end.
    ordered = sorted(plain, key=lambda place: tokens[place])
    greens = [colour(*place)[1] for place in ordered]
    assert greens == sorted(greens)


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.name)
def test_no_text_is_cut_off(plot: Any) -> None:
    facts = synthetic_facts()
    drawings: list[Callable[[RunFacts], Figure | None]] = [plot.draw]
    if plot.draw_upright:
        drawings.append(plot.draw_upright)
    for draw in drawings:
        figure = draw(facts)
        assert figure is not None
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        # Of all that is drawn, in inches from the lower left corner.
        box, (width, height) = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
        assert min(box.x0, box.y0) >= 0 and box.x1 <= width and box.y1 <= height
        assert box.width > 0.9 * width and box.height > 0.9 * height, "and the picture has no empty rim"


def test_an_unfinished_run(finished_copy: Path) -> None:
    """Killed after its first layer: the page shows that layer, and says what is missing."""
    run = finished_copy / "run"

    def undo(journal: dict[str, Any]) -> None:
        stages = journal["stages"]
        stages["awq"]["complete"] = False
        for unit in ("layer-00001", "outside"):
            del stages["awq"]["units"][unit]
        del stages["restore"]

    edit_json(run / "journal.json", undo)
    (run / "state/awq/layers.json").unlink()
    shutil.rmtree(run / "hybrid")
    shutil.rmtree(run / "awq")
    result = CliRunner().invoke(app, ["report", str(finished_copy / "recipe.yaml"), "--json"])
    assert result.exit_code == 0, result.output
    (found,) = (json.loads(line) for line in result.stdout.splitlines() if '"result"' in line)
    assert found["missing"] == [
        "awq is not complete: 1 of 3 units are done.",
        "restore is not complete: 0 of 3 units are done.",
    ]
    page = page_of(finished_copy)
    assert [row["layer"] for row in page.rows("layers")] == ["0"]
    assert all(sentence in page.text for sentence in found["missing"])
    assert "Not finished yet" in page.text
    assert "computed, not written yet" in page.text
    assert "checks" not in page.tables and "evaluation" not in page.tables
    names = {Path(path).name for path in found["plots"]}
    assert "expert-tokens.png" in names and "weight-errors.png" not in names


@pytest.mark.parametrize("layers", [[0], [0, 1]], ids=["one layer", "all layers"])
def test_losses_too_large_for_a_number(finished_copy: Path, layers: list[int]) -> None:
    path = finished_copy / "run/state/awq/layers.json"
    statistics = read(path)
    for layer in layers:
        for key in ("loss_round_to_nearest", "loss_chosen", "loss_propagated"):
            statistics[layer][key] = None
    path.write_text(json.dumps(statistics), encoding="utf-8")
    result = CliRunner().invoke(app, ["report", str(finished_copy / "recipe.yaml")])
    assert result.exit_code == 0, result.output
    page = page_of(finished_copy)
    rows = page.rows("layers")
    for layer, row in enumerate(rows):
        assert (row["loss after"] == row["of before"] == "-") == (layer in layers)
    assert "nan" not in page.text


def test_before_the_first_layer(finished_copy: Path) -> None:
    """Only dequant has run: nothing of the experts can be shown. Plots of an earlier report go, and nothing else."""
    run = finished_copy / "run"

    def undo(journal: dict[str, Any]) -> None:
        del journal["stages"]["awq"], journal["stages"]["restore"]

    edit_json(run / "journal.json", undo)
    (run / "report").mkdir()
    for name in ("ratios.png", "mine.png"):
        (run / "report" / name).write_bytes(b"old")
    before = digests(finished_copy)
    written = write_report(read_run(workspace(finished_copy)))
    assert {path.name for path in written.plots} == {"sizes.png", "stage-costs.png"}
    after = digests(finished_copy)
    new = {f"run/report/{name}" for name in ("report.html", "sizes.png", "stage-costs.png")}
    assert after.keys() == before.keys() - {"run/report/ratios.png"} | new
    assert all(after[name] == before[name] for name in after.keys() - new)
    assert "layers" not in page_of(finished_copy).tables


def test_sizes_of_an_unfinished_run_are_those_of_the_finished_one(finished: Path, finished_copy: Path) -> None:
    edit_json(finished_copy / "run/journal.json", lambda journal: journal["stages"].pop("restore"))
    planned, real = read_run(workspace(finished_copy)), read_run(workspace(finished))
    assert (planned.sizes_measured, real.sizes_measured) == (False, True)
    assert planned.components == real.components


def test_results_of_another_checkpoint_are_not_shown(evaluated_copy: Path) -> None:
    """The result changed since verify and eval looked at it: a small file first, then what restore wrote."""
    edit_json(evaluated_copy / "run/hybrid/config.json", lambda config: config.update({"changed": True}))
    facts = read_run(workspace(evaluated_copy))
    assert facts.verify is None and facts.evaluation is not None
    (sentence,) = facts.missing
    assert "config.json differs" in sentence and "`mmq verify`" in sentence
    assert "passed" not in Page(render(facts, [])).text

    def restored_anew(journal: dict[str, Any]) -> None:
        for files in journal["stages"]["restore"]["units"].values():
            for entry in files.values():
                entry[1] = "0" * 32

    edit_json(evaluated_copy / "run/journal.json", restored_anew)
    facts = read_run(workspace(evaluated_copy))
    assert facts.verify is None and facts.evaluation is None
    assert "eval.json is of an earlier result: run `mmq eval --restart`." in facts.missing


def test_a_source_that_is_gone(evaluated_copy: Path) -> None:
    shutil.rmtree(evaluated_copy / "source")
    facts = read_run(workspace(evaluated_copy))
    assert facts.components == []
    assert any("source" in sentence for sentence in facts.missing)
    assert [row["layer"] for row in Page(render(facts, [])).rows("layers")] == ["0", "1"]


def test_a_journal_without_runs() -> None:
    """Taken over from an mmq that did not time them."""
    facts = synthetic_facts()
    stages = [replace(stage, runs=[]) for stage in facts.stages]
    facts = replace(facts, stages=stages, layers=[], verify=None, evaluation=None)
    html = render(facts, [found for plot in PLOTS if (found := Drawn.of(plot, facts))])
    assert [row["time"] for row in Page(html).rows("stages")] == ["0.00 s"] * 4
    assert Page(html).text.count("not measured") == 1


@pytest.mark.parametrize("damage", ["{", "[]x", "", "7"])
def test_damaged_statistics_are_one_sentence(evaluated_copy: Path, damage: str) -> None:
    (evaluated_copy / "run/state/awq/layers.json").write_text(damage)
    result = CliRunner().invoke(app, ["report", str(evaluated_copy / "recipe.yaml")])
    assert result.exit_code == 2
    assert str(evaluated_copy / "run/state/awq/layers.json") in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_nothing_has_begun(project: Path) -> None:
    before = digests(project)
    result = CliRunner().invoke(app, ["report", str(project / "recipe.yaml")])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line == f"error: nothing has begun in {project / 'run'}; run `mmq run` first"
    assert digests(project) == before
    assert not (project / "run").exists()


def test_run_writes_it(finished_copy: Path) -> None:
    result = CliRunner().invoke(app, ["run", str(finished_copy / "recipe.yaml")])
    assert result.exit_code == 0, result.output
    page = finished_copy / "run/report/report.html"
    assert f"report: {page}" in result.stdout
    check_self_contained(page.read_text(encoding="utf-8"))
    assert "passed" in page_of(finished_copy).text
