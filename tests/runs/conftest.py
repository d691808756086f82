"""Whole commands, in this process where possible, else in a process of their own."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from tessera import cli

ROOT = Path(__file__).parents[2]
RECIPE = """
data: {kind: digits}
network: {patch_size: 4, hidden_size: 16, depth: 1, num_heads: 2}
diffusion: {num_timesteps: 20, schedule: cosine, prediction: v}
sampling: {num_steps: 3}
training:
  steps: 4
  global_batch_size: 32
  optimizer: {learning_rate: 0.001}
  log_every: 1
  sample_every: 1000
  sample_seeds: 1
  checkpoint_every: 1000
  tensorboard: false
  device: cpu
"""


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A recipe of a run that takes milliseconds, in tmp_path / run."""
    path = tmp_path / "tiny.yaml"
    path.write_text(f"run_dir: {tmp_path / 'run'}\n" + RECIPE)
    return path


@pytest.fixture
def tessera(capsys, monkeypatch) -> Callable[..., Outcome]:
    """The command line as `tessera` runs it, in this process."""

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["tessera", *map(str, words)])
        monkeypatch.setenv("TESSERA_DEBUG", "1")  # unexpected exceptions fail the test
        code = 0
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        output = capsys.readouterr()
        return Outcome(code, output.out, output.err)

    return run


@pytest.fixture
def environment() -> dict[str, str]:
    """Environment variables for a process that imports this package and uses one thread."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def command(environment) -> Callable[..., Outcome]:
    """`python -m tessera` in its own process."""

    def run(*words: object, cwd: Path | None = None) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "tessera", *map(str, words)],
            cwd=cwd, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def start(environment) -> Iterator[Callable[..., subprocess.Popen]]:
    """`python -m tessera` in its own process, running in the background. It is killed at the end of the test."""
    started = []

    def run(*words: object) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", "tessera", *map(str, words)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A run on digits. Tests must not change it."""
    from tessera.training import loop
    from tessera.training.recipe import read_recipe

    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(RECIPE)
    return loop.train(read_recipe(folder / "tiny.yaml", [f"run_dir={folder / 'run'}", "training.ema.decay=0"]))


@pytest.fixture
def clips_recipe(recipe, tmp_path) -> Path:
    """The recipe, with clips of four frames, at 5 frames per second, in files."""
    made = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "data/clip_files.py")))
    for number in range(4):
        made.clip(tmp_path / f"data/{'up' if number % 2 else 'down'}/{number}.gif", 6)
    text = recipe.read_text().replace(
        "data: {kind: digits}",
        f"data: {{path: {tmp_path}/data, size: 8, channels: 1, frames: 4, fps: 5, short: pad, stride: 2}}",
    )
    recipe.write_text(text)
    return recipe
