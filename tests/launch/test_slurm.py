"""A real SLURM of a controller and two node daemons on this machine: a study as an array, a training that is killed."""

import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tessera import bundle

pytestmark = [pytest.mark.slow, pytest.mark.run, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[2]
daemons = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("slurm_cluster.py"))))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The variables of a process that uses the cluster."""
    if reason := daemons.missing():
        pytest.skip(f"no SLURM here: {reason}")
    folder = tmp_path_factory.mktemp("slurm")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with daemons.cluster(folder) as environment:
        yield {**os.environ, **environment, **variables}
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def run(cluster, tmp_path, write_recipes) -> Callable[..., subprocess.CompletedProcess]:
    """`python -m tessera`, or a program of SLURM, which must succeed."""
    write_recipes(steps=120, widths={"S": 16, "L": 32}, fsdp="full")

    def run(*words: object, program: tuple[str, ...] = (sys.executable, "-m", "tessera")):
        done = subprocess.run(
            [*program, *map(str, words)], cwd=tmp_path, env=cluster, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done

    return run


def test_a_study_as_an_array_has_the_weights_and_scores_of_one_process(run, tmp_path, whole_state):
    outputs = {"one": (), "array": ("--launch", "slurm", "--tasks", "2", "--launch-option", "time=30")}
    for name, launch in outputs.items():
        done = run("study", "study.yaml", f"output={name}", "--hardware", "h100", *launch)
        assert done.stdout == f"{name}/report.md\n"
    assert "2 of 2" in done.stderr
    jobs = list((tmp_path / "array/launch/jobs").glob("*_result.pkl"))
    assert len({path.name.split("_")[0] for path in jobs}) == 1  # one array
    assert len(jobs) == 2
    for member in "SL":
        one, array = (tmp_path / name / "members" / member for name in outputs)
        assert whole_state(one) == whole_state(array)
        scores = [
            [path.read_bytes() for path in sorted((each / "evaluation").glob("step-*.json"))] for each in (one, array)
        ]
        assert scores[0] == scores[1]


def test_a_refused_job_is_one_clear_error(cluster, run, tmp_path):
    words = ["data", "check", "digits-folder", "--launch", "slurm", "--tasks", "2", "--launch-option", "partition=none"]
    (tmp_path / "digits-folder").mkdir()
    (tmp_path / "digits-folder/a.png").write_bytes((ROOT / "docs/figures").rglob("*.png").__next__().read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "tessera", *words],
        cwd=tmp_path,
        env=cluster,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "error: sbatch refused the job" in done.stderr
    assert "invalid partition" in done.stderr.lower()
    assert "Traceback" not in done.stderr


def wait_for_job(run, job: str, seconds: float = 900) -> str:
    """The last state of a job."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state = run("--noheader", "--states=all", "--jobs", job, "--format=%T", program=("squeue",)).stdout.strip()
        if state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"):
            return state
        time.sleep(0.5)
    raise AssertionError(f"job {job} is {state}")


def test_a_training_on_two_nodes_that_is_killed_ends_with_the_same_bits(run, tmp_path, whole_state):
    launch = ("--launch", "slurm", "--nodes", "2", "--launch-option", "time=30")
    job = run("train", "tiny.yaml", f"run_dir={tmp_path / 'whole'}", *launch).stdout.strip()
    assert wait_for_job(run, job) == "COMPLETED", (tmp_path / "whole.launch/train.log").read_text()
    job = run("train", "tiny.yaml", *launch).stdout.strip()
    log = tmp_path / "run.launch/train.log"
    deadline = time.monotonic() + 600
    while len(bundle.checkpoints(tmp_path / "run")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    run("--signal=KILL", f"{job}.0", program=("scancel",))  # its step: that of a whole job counts as a cancellation
    assert wait_for_job(run, job) == "COMPLETED", log.read_text()
    text = log.read_text()
    assert "queued again after code 137" in text
    assert "resuming from step" in text
    assert whole_state(tmp_path / "run") == whole_state(tmp_path / "whole")
