"""The command started by torchrun."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tessera import bundle
from tessera.monitoring.logger import read_log

pytest.importorskip("sklearn")


@pytest.mark.slow
def test_torchrun_trains_the_same_as_one_process(tessera, recipe, tmp_path, environment):
    words = ("train", str(recipe), "training.fsdp=full")
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tessera", *words],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    run = tmp_path / "run"
    assert process.stdout == f"{run}\n"  # only rank 0 prints
    assert process.stderr.count("trained 4 steps; the model is in") == 1
    newest = bundle.checkpoints(run)[0]
    assert json.loads((newest / "training.json").read_text())["world_size"] == 2
    assert len(list((newest / "state").glob("*.safetensors"))) == 2
    assert tessera("train", recipe, f"run_dir={tmp_path / 'whole'}").code == 0
    losses = [[record["loss"] for record in read_log(tmp_path / name)] for name in ("run", "whole")]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert tessera("sample", run, "--classes", "1", "--out", tmp_path / "samples").code == 0
