"""Runs that take milliseconds: digits of 8 x 8, four tokens, one block."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tessera import bundle
from tessera.settings import apply_overrides, validate
from tessera.training import loop
from tessera.training.recipe import Recipe


def newest_state(run: Path) -> dict[str, Any]:
    """Tensors of the newest checkpoint as bytes (file headers have no fixed order), and its position."""
    newest = bundle.checkpoints(Path(run))[0]
    tensors = {
        f"{path.relative_to(newest)} {name}": tensor.numpy().tobytes()
        for path in sorted(newest.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    position = json.loads((newest / "training.json").read_text())
    return {**tensors, **{name: position[name] for name in ("step", "position", "spike_detector")}}


TINY: dict[str, Any] = {
    "data": {"kind": "digits"},
    "network": {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2},
    "diffusion": {"num_timesteps": 20, "schedule": "cosine", "prediction": "v"},
    "sampling": {"num_steps": 2},
    "training": {
        "steps": 4,
        "global_batch_size": 32,
        "optimizer": {"learning_rate": 1e-3},
        "log_every": 1,
        "sample_every": 1000,
        "sample_seeds": 1,
        "checkpoint_every": 1000,
        "tensorboard": False,
        "device": "cpu",
    },
}


@pytest.fixture
def tiny(tmp_path) -> Callable[..., Recipe]:
    """A recipe with the folder tmp_path / name and dotted changes: tiny("run", "training.steps=2")."""

    def make(name: str = "run", *changes: str, **sections: Any) -> Recipe:
        data = {**TINY, **sections, "run_dir": str(tmp_path / name)}
        return validate(Recipe, apply_overrides(data, list(changes)), "the test's recipe")

    return make


@pytest.fixture
def weights() -> Callable[[Path], dict[str, Tensor]]:
    """The EMA weights of a run's newest checkpoint."""

    def read(run: Path) -> dict[str, Tensor]:
        return load_file(bundle.checkpoints(Path(run))[0] / bundle.WEIGHTS)

    return read


@pytest.fixture
def state() -> Callable[[Path], dict[str, Any]]:
    """Weights, averages, optimizer state and position of a run's newest checkpoint, bit for bit."""
    return newest_state


@pytest.fixture
def stop_after(monkeypatch) -> Callable[[int], None]:
    """Interrupt trainings, as Ctrl-C does, when they have saved the checkpoint of a step: they stop after the next one.

    Undone by monkeypatch.undo().
    """

    def interrupt(step: int) -> None:
        save_checkpoint = loop.save_checkpoint

        def save_and_stop(run, writer, state):
            save_checkpoint(run, writer, state)
            if state.step == step:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(loop, "save_checkpoint", save_and_stop)

    return interrupt
