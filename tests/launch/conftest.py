"""Recipes of the tests on clusters."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml

RECIPE = {
    "data": {"kind": "digits"},
    "network": {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2},
    "diffusion": {"num_timesteps": 20, "schedule": "cosine", "prediction": "v"},
    "sampling": {"num_steps": 3},
}
TRAINING = {
    "global_batch_size": 32, "sample_every": 1000, "sample_seeds": 1, "checkpoint_every": 5, "health_every": None,
    "tensorboard": False, "device": "cpu",
}  # fmt: skip


@pytest.fixture
def write_recipes(tmp_path) -> Callable[..., Path]:
    """Write tiny.yaml and study.yaml, the same network in several widths; returns the folder of the run."""

    def write(*, steps: int, widths: Mapping[str, int], fsdp: int | str = 1, run: str = "run") -> Path:
        training = {**TRAINING, "steps": steps, "fsdp": fsdp}
        recipe = {"run_dir": str(tmp_path / run), **RECIPE, "training": training}
        study = {
            "question": "Does width help?",
            "recipe": "tiny.yaml",
            "axes": {"size": {name: {"network.hidden_size": width} for name, width in widths.items()}},
            "set": {
                "evaluation": {"num_samples": 40, "batch_size": 40, "metrics": ["kid"]},
                "training.fsdp": 1,  # a member trains in one process
            },
            "budget": {"steps": 10},
        }
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
        return tmp_path / run

    return write
