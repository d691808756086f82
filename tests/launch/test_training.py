"""`tessera train --launch`: the script for SLURM, restarts on Ray, errors."""

import os
import subprocess
from pathlib import Path

import pytest

from tessera.errors import TesseraError
from tessera.launch import training
from tessera.launch.task import Outcome, Task
from tessera.launch.training import Training


def make(tmp_path: Path, **changes) -> Training:
    settings = {"nodes": 2, "ranks": 4, "cpus": 16, "gpus": 4, "retries": 1, "options": {}} | changes
    return Training(("train", "a b.yaml"), tmp_path, tmp_path / "run.launch/train.log", **settings)


def test_the_script_has_resources_options_and_torchrun(tmp_path):
    script = training.slurm_script(
        make(tmp_path, options={"partition": "gpu", "exclusive": "", "dependency": "after:1"})
    )
    lines = script.splitlines()
    for line in ("nodes=2", "ntasks-per-node=1", "cpus-per-task=16", "gpus-per-node=4", "requeue", "partition=gpu"):
        assert f"#SBATCH --{line}" in lines
    assert "#SBATCH --exclusive" in lines
    assert "#SBATCH --dependency=after:1" in lines  # options of the user replace the defaults
    assert "--nnodes=2 --nproc-per-node=4 --max-restarts=1" in script
    assert "-m tessera train 'a b.yaml'" in script
    assert "gpus-per-node" not in training.slurm_script(make(tmp_path, gpus=0))
    escaped = training.slurm_script(make(tmp_path / "50%job"))  # %j would be the number of the job
    assert f"#SBATCH --output={tmp_path}/50%%job/" in escaped
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("code", "restarts", "state", "is_queued"),
    [
        (137, 0, "RUNNING", True),  # killed
        (1, 0, "RUNNING", False),  # failed by itself
        (0, 0, "RUNNING", False),
        (137, 0, "COMPLETING", False),  # cancelled
        (137, 1000, "RUNNING", False),
    ],
)
def test_a_killed_job_is_queued_again_and_a_failed_one_is_not(tmp_path, code, restarts, state, is_queued):
    """The script itself, with programs in place of SLURM's."""
    programs = {
        "srun": f"#!/bin/sh\nexit {code}",
        "squeue": f"#!/bin/sh\necho {state}",
        "scontrol": f'#!/bin/sh\necho "$@" > {tmp_path}/requeued',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o700)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment["SLURM_RESTART_COUNT"] = str(restarts)
    done = subprocess.run(
        ["bash"], input=training.slurm_script(make(tmp_path)), text=True, env=environment, check=False
    )
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() == is_queued
    assert not is_queued or (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_a_refused_job_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text('#!/bin/sh\necho "sbatch: error: invalid partition" >&2; exit 1')
    (tmp_path / "sbatch").chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(TesseraError, match="sbatch refused the job: sbatch: error: invalid partition"):
        training.submit(make(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(TesseraError, match="SLURM's sbatch, which is not on this machine"):
        training.submit(make(tmp_path))


def test_a_failed_training_starts_again_and_then_is_an_error_with_its_log(tmp_path, monkeypatch):
    node = Task("node 1", (), tmp_path, tmp_path / "train-1.log")
    attempts = [[Outcome(node, 1, "lost")], [Outcome(node, 0)]]
    messages = []
    monkeypatch.setattr(training, "_attempt", lambda *_: attempts.pop(0))
    training.train_on_ray(make(tmp_path), messages.append)
    assert "node 1 failed with exit code 1 in attempt 1 of 2" in messages
    attempts += [[Outcome(node, 1, "lost")], [Outcome(node, 1, "lost again")]]
    with pytest.raises(TesseraError, match="failed 2 times; log: .*train-1.log\n    lost again"):
        training.train_on_ray(make(tmp_path), messages.append)
