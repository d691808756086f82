"""Studies of tiny runs, and synthetic results."""

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tessera.studies.study import Study, read_study

RECIPE = """
data: {kind: digits}
network: {patch_size: 4, hidden_size: 16, depth: 1, num_heads: 2}
diffusion: {num_timesteps: 20, schedule: cosine, prediction: v}
sampling: {num_steps: 3}
training:
  global_batch_size: 32
  optimizer: {learning_rate: 0.001}
  log_every: 2
  sample_every: 1000
  sample_seeds: 1
  checkpoint_every: 1
  health_every: null
  tensorboard: false
  device: cpu
evaluation: {num_samples: 40, batch_size: 40, metrics: [kid, fd]}
"""
STUDY = """
question: Does width help?
recipe: tiny.yaml
axes:
  size:
    S: {network.hidden_size: 16}
    L: {network.hidden_size: 32}
budget: {steps: 6}
marks: {steps: [3]}
sampling_steps: [2]
"""


@pytest.fixture(scope="session")
def synthetic() -> SimpleNamespace:
    """The functions of `synthetic.py`."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("synthetic.py"))))


@pytest.fixture
def write_study(tmp_path) -> Callable[..., Study]:
    """Writes a study into a temporary folder and reads it with dotted overrides."""
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "study.yaml").write_text(STUDY)

    def write(*overrides: str, output: str = "out") -> Study:
        return read_study(tmp_path / "study.yaml", [f"output={tmp_path / output}", *overrides])

    return write


@pytest.fixture(scope="session")
def cost() -> SimpleNamespace:
    """The plan of any member, in place of planning, which takes seconds."""
    times = {"seconds": 60.0, "evaluation_seconds": 30.0, "call_seconds": 1e-3, "extract_seconds": 1e-4}
    return SimpleNamespace(**times, memory_bytes=2**20, fits=True)
