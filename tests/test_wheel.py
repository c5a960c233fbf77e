"""The wheel: what is in it, what it asks for, and that it does all of the work in an empty folder."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from conftest import ROOT
from test_readme import WHEEL, commands

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Distributions whose module has another name.
MODULES = {"PyYAML": "yaml", "huggingface_hub": "huggingface_hub", "compressed-tensors": "compressed_tensors"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy of the files that a checkout has."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("src", "configs", "calibration_data", "trained"):
        ignored = shutil.ignore_patterns("*.egg-info", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder / "dist"), str(folder)]
    subprocess.run(command, check=True)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a new environment with the wheel, which sees the dependencies that are installed here."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *options, wheel], check=True)
    (own,) = folder.glob("lib/python*/site-packages")
    # As lines of a .pth these folders' own .pth files are not read, so that no editable mmq is seen.
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (own / "dependencies.pth").write_text("\n".join(packages) + "\n", encoding="utf-8")
    return folder / "bin"


def test_the_wheel_holds_all_that_a_user_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        sources = [path for path in (ROOT / "src/mmq").rglob("*") if path.suffix in (".py", ".j2", ".typed")]
        wanted = {path.relative_to(ROOT / "src").as_posix() for path in sources}
        assert wanted <= names
        for folder, pattern, inside in (("calibration_data", "*.jsonl", "samples"), ("configs", "*.yaml", "recipes")):
            files = list((ROOT / folder).glob(pattern))
            assert files
            for path in files:
                assert archive.read(f"mmq/builtin/{inside}/{path.name}") == path.read_bytes()
        assert not [name for name in names if name.startswith(("tests", "scripts"))]


def test_what_is_declared_is_imported() -> None:
    """And nothing else: a dependency that no module imports is none."""
    declared = {name.split(">")[0].split("=")[0].split("<")[0] for name in PYPROJECT["project"]["dependencies"]}
    imported = set()
    for path in (ROOT / "src/mmq").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    missing = {name for name in declared if MODULES.get(name, name.lower()) not in imported}
    assert not missing


def test_an_empty_folder_and_the_wheel_are_enough(installed: Path, tmp_path: Path) -> None:
    """The README's words to a stranger: a recipe, a model to try it on, and a verified checkpoint."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"PATH": f"{installed}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    first = ["set -e", "python -c 'import mmq; print(mmq.__file__)'"]
    script = "\n".join([*first, *commands(WHEEL)])
    assert "mmq run mine.yaml" in script
    run = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[0].startswith(str(installed.parent))
    assert f"verified: {tmp_path}/runs/src/hybrid" in run.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml", "runs", "src"]
