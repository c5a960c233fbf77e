"""Recipes: what is taken, what is refused and how it is named, and the recipes that the project ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import ROOT, SAMPLES, write_recipe
from mmq.errors import RecipeError
from mmq.recipe import FileSamples, HubSamples, Recipe, load, parse_size

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MINIMAX = ROOT / "configs" / "minimax-m2.5.yaml"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A small valid recipe."""
    return write_recipe(tmp_path)


def with_value(path: Path, key: str, value: Any) -> Path:
    """Put a value at `a.b.0.c` of a recipe, making mappings on the way."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    *parents, last = key.split(".")
    node = content
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    node[last] = value
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def refusal(path: Path, overrides: list[str] | None = None) -> str:
    """The sentence that a recipe is refused with."""
    with pytest.raises(RecipeError) as caught:
        load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_recipes_load(path: Path) -> None:
    assert load(path).root == ROOT


def test_the_project_ships_recipes() -> None:
    assert {path.name for path in CONFIGS} >= {"minimax-m2.5.yaml", "tiny.yaml"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_recipes_are_known_by_name(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named, they are the same, but their relative paths start at the current folder."""
    monkeypatch.chdir(tmp_path)
    named, filed = load(Path(f"builtin:{path.stem}")), load(path)
    assert named == filed.model_copy(update={"root": tmp_path})
    assert named.work_path.is_relative_to(tmp_path)


def test_shipped_samples_are_known_by_name(recipe: Path) -> None:
    for path in (ROOT / "calibration_data").glob("*.jsonl"):
        loaded = load(with_value(recipe, "awq.calibration.files.0.path", f"builtin:{path.stem}"))
        (source,) = loaded.awq.calibration.files
        assert isinstance(source, FileSamples)
        assert loaded.path(source.path).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("awq.calibration.files.0.path", "builtin:cod", "builtin:code"),
        ("awq.calibration.files.0.path", "builtin:", "builtin:code"),
        ("awq.calibration.files.0.path", "builtin:../samples/code", "builtin:code"),
        ("work_dir", "builtin:tiny", "work_dir"),
        ("model.source", "builtin:tiny", "model.source"),
    ],
)
def test_names_of_what_is_not_shipped_are_refused(recipe: Path, key: str, value: str, told: str) -> None:
    message = refusal(with_value(recipe, key, value))
    assert told in message
    assert value in message


def test_a_recipe_that_is_not_shipped_is_refused() -> None:
    assert "builtin:tiny" in refusal(Path("builtin:large"))


def test_the_recipe_that_init_begins_with_spells_out_the_defaults() -> None:
    content = yaml.safe_load(MINIMAX.read_text(encoding="utf-8"))
    smallest = {
        "model": content["model"],
        "work_dir": content["work_dir"],
        "awq": {"calibration": {"files": content["awq"]["calibration"]["files"]}},
    }
    assert Recipe.model_validate(smallest).model_dump() == Recipe.model_validate(content).model_dump()


def test_the_real_recipe_has_the_model_cards_settings() -> None:
    awq = load(MINIMAX).awq
    wanted = {"code": 40, "multilingual": 40, "reasoning": 24, "diverse": 24}
    found = {f.path.removeprefix("builtin:"): f.samples for f in awq.calibration.files if isinstance(f, FileSamples)}
    assert found == wanted
    assert sum(wanted.values()) == 128
    assert awq.calibration.sequence_length == 1024
    assert awq.n_grid == 20
    assert awq.group_size == 128
    assert awq.duo_scaling is True
    assert awq.kv_cache_scheme is not None
    scheme = awq.kv_cache_scheme.model_dump()
    del scheme["observer"]
    assert scheme == {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_recipes_find_enough_samples(path: Path) -> None:
    recipe = load(path)
    files = [source for source in recipe.awq.calibration.files if isinstance(source, FileSamples)]
    assert files
    for source in files:
        lines = recipe.path(source.path).read_text(encoding="utf-8").splitlines()
        samples = [json.loads(line) for line in lines]
        assert all(sample.get("messages") or sample.get("text") for sample in samples)
        assert source.samples is not None
        assert len(samples) >= source.samples


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("work_dirr", "work_dir"),
        ("workes", "workers"),
        ("model.sorce", "source"),
        ("dequant.dtyp", "dtype"),
        ("awq.n_gird", "n_grid"),
        ("awq.min_token", "min_tokens"),
        ("awq.calibration.sequence_lenght", "sequence_length"),
        ("awq.calibration.files.0.sampels", "samples"),
        ("awq.kv_cache_scheme.num_bit", "num_bits"),
        ("restore.attention_activation", "attention_activations"),
    ],
)
def test_unknown_keys_are_refused_with_a_suggestion(recipe: Path, key: str, meant: str) -> None:
    message = refusal(with_value(recipe, key, 1))
    assert str(recipe) in message
    assert f"unknown key {key} (did you mean {meant}?)" in message


@pytest.mark.parametrize("key", ["zzz", "awq.zzz", "root"])
def test_unknown_keys_like_no_other_are_refused_too(recipe: Path, key: str) -> None:
    message = refusal(with_value(recipe, key, "x"))
    assert f"unknown key {key}" in message
    assert "did you mean" not in message


def test_a_typo_in_a_file_source_does_not_make_its_right_keys_wrong(recipe: Path) -> None:
    """`path` is right and `hub` is not wanted; the one unknown key is all that there is to say."""
    message = refusal(with_value(recipe, "awq.calibration.files.0.sampels", 1))
    assert message.count("unknown key") == 1
    assert "hub" not in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "source"),
        ("model.source", 5),
        ("work_dir", ""),
        ("work_dir", ["run"]),
        ("dequant.dtype", "float16"),
        ("awq", None),
        ("awq.n_grid", "many"),
        ("awq.n_grid", 2),
        ("awq.n_grid", 20.5),
        ("awq.group_size", 100),
        ("awq.duo_scaling", "sometimes"),
        ("awq.min_tokens", -1),
        ("awq.propagate_quantized", "perhaps"),
        ("awq.source", "fp16"),
        ("awq.memory_budget", "4 apples"),
        ("awq.memory_budget", "GiB"),
        ("awq.memory_budget", "infGiB"),
        ("awq.memory_budget", "-4GiB"),
        ("awq.memory_budget", 0),
        ("awq.calibration.files", []),
        ("awq.calibration.files", "samples.jsonl"),
        ("awq.calibration.files.0.samples", 0),
        ("awq.calibration.sequence_length", 1),
        ("awq.kv_cache_scheme.num_bits", 4),
        ("awq.kv_cache_scheme.observer", "mse"),
        ("restore.attention_activations", "static"),
        ("workers", 0),
        ("workers", "two"),
    ],
)
def test_wrong_values_are_refused_by_the_keys_name(recipe: Path, key: str, value: Any) -> None:
    message = refusal(with_value(recipe, key, value))
    assert str(recipe) in message
    assert key in message


@pytest.mark.parametrize("key", ["workers", "awq.memory_budget", "awq.calibration.files.0.samples"])
def test_yes_is_no_number(recipe: Path, key: str) -> None:
    """YAML's `yes` is true, which Python would take for 1."""
    assert key in refusal(with_value(recipe, key, True))


@pytest.mark.parametrize("key", ["model", "model.source", "work_dir", "awq", "awq.calibration.files.0.path"])
def test_missing_keys_are_named(recipe: Path, key: str) -> None:
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    *parents, last = key.split(".")
    node = content
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    del node[last]
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    message = refusal(recipe)
    assert str(recipe) in message
    assert key in message
    assert "missing" in message


def test_several_faults_are_told_at_once(recipe: Path) -> None:
    with_value(recipe, "awq.n_grid", 0)
    message = refusal(with_value(recipe, "workers", 0))
    assert "awq.n_grid" in message
    assert "workers" in message


@pytest.mark.parametrize("text", ["", "- a\n", "words", "model: [\n", "a: b: c\n", "\x00"])
def test_what_is_no_mapping_is_refused(recipe: Path, text: str) -> None:
    recipe.write_text(text, encoding="utf-8")
    assert str(recipe) in refusal(recipe)


def test_bytes_that_are_no_text_are_refused(recipe: Path) -> None:
    recipe.write_bytes(b"model: \xff\xfe\n")
    assert str(recipe) in refusal(recipe)


def test_a_missing_recipe_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert str(tmp_path / "nothing.yaml") in refusal(tmp_path / "nothing.yaml")
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.system", "!!python/object/new:os.system", "!!python/object/apply:subprocess.call"],
)
def test_yaml_tags_run_nothing(recipe: Path, tmp_path: Path, tag: str) -> None:
    marker = tmp_path / "marker"
    text = recipe.read_text(encoding="utf-8") + f'revision: {tag} ["touch {marker}"]\n'
    recipe.write_text(text, encoding="utf-8")
    assert str(recipe) in refusal(recipe)
    refusal(write_recipe(tmp_path), [f'model.revision={tag} ["touch {marker}"]'])
    assert not marker.exists()


def test_overrides_replace_what_the_file_says(recipe: Path) -> None:
    loaded = load(
        recipe,
        [
            "awq.n_grid=7",
            "model.revision=main",
            "awq.calibration.files=[{path: a.jsonl}, {hub: owner/set, samples: 3}]",
            "awq.calibration.sequence_length=5",
            "awq.kv_cache_scheme=null",
            "awq.duo_scaling=both",
            "dequant.dtype=bfloat16",
            "restore.attention_activations=none",
            "workers=null",
            "work_dir=a=b",
        ],
    )
    assert loaded.awq.n_grid == 7
    assert loaded.model.revision == "main"
    assert loaded.awq.calibration.files == [FileSamples(path="a.jsonl"), HubSamples(hub="owner/set", samples=3)]
    assert loaded.awq.calibration.sequence_length == 5
    assert loaded.awq.kv_cache_scheme is None
    assert loaded.awq.duo_scaling == "both"
    assert loaded.restore.attention_activations == "none"
    assert loaded.workers is None
    assert loaded.work_dir == "a=b"


def test_the_last_override_counts(recipe: Path) -> None:
    assert load(recipe, ["awq.n_grid=7", "awq.n_grid=8"]).awq.n_grid == 8


def test_no_override_leaves_the_file_as_it_is(recipe: Path) -> None:
    assert load(recipe).awq.calibration.files == [FileSamples(path="samples.jsonl", samples=SAMPLES)]
    assert load(recipe, []) == load(recipe)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("awq.n_gird=5", "did you mean n_grid?"),
        ("awk.n_grid=5", "unknown key awk (did you mean awq?)"),
        ("awq.n_grid", "key.sub=value"),
        ("=5", "key.sub=value"),
        ("awq..n_grid=5", "key.sub=value"),
        ("awq.n_grid.deep=5", "n_grid"),
        ("awq.calibration.files.0.samples=5", "files"),
        ("awq.n_grid=[", "awq.n_grid"),
        ("awq.n_grid=", "awq.n_grid"),
        ("root=/", "unknown key root"),
    ],
)
def test_wrong_overrides_are_refused(recipe: Path, override: str, part: str) -> None:
    assert part in refusal(recipe, [override])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 * 1024**3),
        ("4 GiB", 4 * 1024**3),
        ("1.5gib", 3 * 1024**3 // 2),
        ("512MiB", 512 * 1024**2),
        ("16KiB", 16384),
        ("2GB", 2_000_000_000),
        ("7mb", 7_000_000),
        ("9kB", 9000),
        ("123B", 123),
        ("123", 123),
    ],
)
def test_sizes(recipe: Path, text: str, size: int) -> None:
    assert parse_size(text) == size
    assert load(recipe, [f"awq.memory_budget={text}"]).awq.memory_budget == size


@pytest.mark.parametrize(
    ("markers", "folder", "root"),
    [
        ([".git"], "project/deep/er", "project"),
        (["pyproject.toml"], "project/configs", "project"),
        (["pyproject.toml"], "project", "project"),
        ([], "project/configs", "project"),
        ([], "project/elsewhere", "project/elsewhere"),
        ([], "project", "project"),
    ],
)
def test_relative_paths_start_at_the_project(tmp_path: Path, markers: list[str], folder: str, root: str) -> None:
    (tmp_path / folder).mkdir(parents=True)
    for marker in markers:
        (tmp_path / "project" / marker).touch()
    recipe = load(write_recipe(tmp_path / folder))
    assert recipe.root == tmp_path / root
    assert recipe.work_path == tmp_path / root / "run"


def test_the_nearest_project_counts(tmp_path: Path) -> None:
    inner = tmp_path / "outer" / "inner" / "configs"
    inner.mkdir(parents=True)
    (tmp_path / "outer" / ".git").mkdir()
    (tmp_path / "outer" / "inner" / "pyproject.toml").touch()
    assert load(write_recipe(inner)).root == tmp_path / "outer" / "inner"


def test_the_working_directory_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project").mkdir()
    write_recipe(tmp_path / "project")
    monkeypatch.chdir(tmp_path)
    assert load(Path("project/recipe.yaml")).work_path == tmp_path / "project" / "run"


def test_absolute_and_home_paths_stay(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    loaded = load(recipe, ["work_dir=/elsewhere/run"])
    assert loaded.work_path == Path("/elsewhere/run")
    assert loaded.path("~/models") == tmp_path / "home" / "models"


def test_workers_default_to_the_cores_at_hand(recipe: Path) -> None:
    assert load(recipe, ["workers=3"]).worker_count == 3
    assert 1 <= load(recipe, ["workers=null"]).worker_count <= 8


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("work_dir: a\nmodel: {source: b}\nwork_dir: c\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"recipe.yaml.*work_dir is given twice"):
        load(path)
