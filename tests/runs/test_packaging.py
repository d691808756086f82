"""The wheel and the source distribution: what they hold, and that an installed package works outside the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from tessera import pretrained

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """A folder with a wheel and a source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, check=True, cwd=PROJECT, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory) -> Path:
    """The wheel, installed into a folder without what it requires."""
    folder = tmp_path_factory.mktemp("installed")
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(installed: Path, *words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command of the installed package, run in a folder outside the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "tessera", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_distributions_hold_what_a_user_needs_and_nothing_else(distributions):
    (wheel,) = distributions.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    recipes = {path.relative_to(PROJECT).as_posix() for path in (PROJECT / "recipes").rglob("*.yaml")}
    assert {f"tessera/{name}" for name in recipes} <= set(names)
    assert {f"tessera/pretrained/{name}/config.json" for name in pretrained.names()} <= set(names)
    assert "tessera/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "docs/"))]
    (source,) = distributions.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "tessera/cli/__init__.py", *recipes} <= files
    assert not [name for name in files if name.startswith((".venv", "runs/", "demo/"))]
    assert wheel.stat().st_size < 25 * 2**20


def test_an_installed_package_finds_its_models_and_recipes(installed, tmp_path):
    listed = run(installed, "models", folder=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert [line.partition(":")[0] for line in listed.stdout.splitlines() if not line.startswith(" ")] == (
        pretrained.names()
    )
    for model, *words in (
        ("dit-digits", "--classes", "3"),
        ("emoji", "--prompt", "blue heart"),
        ("sprites", "--classes", "walk left"),
    ):
        sampled = run(installed, "sample", model, *words, "num_steps=2", "--out", f"{model}.png", folder=tmp_path)
        assert sampled.returncode == 0, sampled.stderr
        assert (tmp_path / f"{model}.png").exists()
    where = "import tessera, sys; print(tessera.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    place = subprocess.run([sys.executable, "-c", where], env=environment, capture_output=True, text=True).stdout
    assert place.startswith(str(installed))


@pytest.mark.slow
def test_an_installed_recipe_is_used_by_its_name(installed, tmp_path):
    done = run(installed, "train", "recipes/digits.yaml", "training.steps=1", "--dry-run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((installed / "tessera/recipes/digits.yaml").read_text())["data"]["kind"] == "digits"


def test_shipped_models_are_small():
    sizes = [file.stat().st_size for file in pretrained.FOLDER.rglob("*") if file.is_file()]
    assert sum(sizes) < 20 * 10**6


@pytest.mark.slow
@pytest.mark.skipif(shutil.disk_usage("/tmp").free < 8 * 2**30, reason="an environment with torch needs some gigabytes")
def test_the_wheel_installs_into_an_empty_environment(distributions, tmp_path):
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    (wheel,) = distributions.glob("*.whl")
    pip = [str(environment / "bin/python"), "-m", "pip", "install", "--quiet", "-c", str(PROJECT / "constraints.txt")]
    torch = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__version__.partition('+')[0])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    subprocess.run([*pip, f"torch=={torch}"], check=True)
    subprocess.run([*pip, str(wheel)], check=True)
    command = [str(environment / "bin/tessera"), "sample", "dit-digits", "--classes", "all", "--out", "grid.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "grid.png").exists()
