"""A Ray cluster of three nodes on this machine: the bytes of one process, lost nodes, a cluster that is idle."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tessera import bundle

pytestmark = [pytest.mark.slow, pytest.mark.run, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[2]
WIDTHS = {"S": 16, "M": 24, "L": 32}  # of the members of the study
LAUNCH = ("--launch", "ray", "--tasks", "3")


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that runs no tasks and three nodes with a core each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(3):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def tessera(environment, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """`python -m tessera` in a process, which must succeed. address: of a Ray cluster"""

    def run(*words: object, address: str | None = None, folder: Path = tmp_path) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, "-m", "tessera", *map(str, words)],
            cwd=folder, env=environment | ({"RAY_ADDRESS": address} if address else {}),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture
def images(tmp_path) -> Path:
    """1100 images: three parts of a check, six files of a cache."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "images"
    for number in range(1100):
        path = folder / f"{number % 2}/{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (8, 8, 3), np.uint8)).save(path)
    return folder


def without_date(content: bytes) -> bytes:
    """Without the time of a check."""
    return re.sub(rb"\d{4}-\d\d-\d\d \d\d:\d\d UTC", b"", content)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {
        str(path.relative_to(folder)): without_date(path.read_bytes()) for path in files if "launch" not in path.parts
    }


def test_every_command_gives_the_bytes_of_one_process(
    cluster, write_recipes, tessera, images, autoencoder_folder, tmp_path, whole_state
):
    write_recipes(steps=4, widths=WIDTHS)
    tessera("train", "tiny.yaml")
    caching = ("data", "cache", images, f"codec.source={autoencoder_folder}", "--size", 8, "--shard-size", 200)
    commands = [
        ("data", "check", images, "--out", "check"),
        (*caching, "--out", "cache", "--device", "cpu"),
        ("sample", tmp_path / "run", "--npz", "a.npz", "--num-samples", 700),
        ("evaluate", tmp_path / "run", "--num-samples", 700, "--metrics", "fd,kid", "--out", "scores"),
    ]
    for name, launch, address in (("one", (), None), ("ray", LAUNCH, cluster.address)):
        (tmp_path / name).mkdir()
        for words in commands:
            done = tessera(*words, *launch, folder=tmp_path / name, address=address)
        study = ("study", tmp_path / "study.yaml", f"output={tmp_path / name}-study", "--hardware", "h100")
        tessera(*study, *launch, address=address)
    assert "shard 3/3 is done" in done.stderr
    files = contents(tmp_path / "one")
    assert {"a.npz", "check/decisions.jsonl", "scores/scores.json"} < set(files)
    assert files == contents(tmp_path / "ray")
    for member in "SML":
        runs = [tmp_path / f"{name}-study/members" / member for name in ("one", "ray")]
        assert whole_state(runs[0]) == whole_state(runs[1])
        scores = [sorted((run / "evaluation").glob("step-*.json")) for run in runs]
        assert [path.read_bytes() for path in scores[0]] == [path.read_bytes() for path in scores[1]]


def test_a_node_that_is_killed_loses_nothing(cluster, write_recipes, tessera, environment, tmp_path, whole_state):
    """While its member of a study trains."""
    import ray

    write_recipes(steps=4, widths=WIDTHS)
    words = ("study", tmp_path / "study.yaml", "budget.steps=400", "--hardware", "h100")
    tessera(*words, f"output={tmp_path / 'one'}")
    out = tmp_path / "ray"
    with subprocess.Popen(
        [sys.executable, "-m", "tessera", *map(str, words), f"output={out}", *LAUNCH],
        env=environment | {"RAY_ADDRESS": cluster.address}, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        while len(bundle.checkpoints(out / "members/S")) < 2 and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None
        node = next(node for node in cluster.list_all_nodes() if node is not cluster.head_node)
        ray.init(address=cluster.address, log_to_driver=False)
        assert len([each for each in ray.nodes() if each["Alive"]]) == 4
        cluster.remove_node(node, allow_graceful=False)
        ray.shutdown()
        _, err = process.communicate()
    assert process.returncode == 0, err
    assert "3 of 3" in err
    for member in "SML":
        runs = [tmp_path / name / "members" / member for name in ("one", "ray")]
        assert whole_state(runs[0]) == whole_state(runs[1])
    starts = [path.read_text().count("resum") for path in sorted((out / "launch").glob("*.log"))]
    assert sum(starts) >= 1  # the task of the lost node resumed elsewhere


def test_a_training_on_two_nodes_survives_a_lost_one(
    cluster, write_recipes, tessera, environment, tmp_path, whole_state
):
    write_recipes(steps=4, widths=WIDTHS, run="whole")
    words = ("train", "tiny.yaml", "training.steps=120", "training.fsdp=full")
    launch = ("--launch", "ray", "--nodes", "2")
    tessera(*words, *launch, address=cluster.address)
    out = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-m", "tessera", *words, f"run_dir={out}", *launch], cwd=tmp_path,
        env=environment | {"RAY_ADDRESS": cluster.address}, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        while len(bundle.checkpoints(out)) < 2 and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None
        used = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]
        cluster.remove_node(used[0], allow_graceful=False)
        cluster.remove_node(used[1], allow_graceful=False)  # of three, at least one of the two trained
        cluster.add_node(num_cpus=1)
        _, err = process.communicate()
    assert process.returncode == 0, err
    assert "in attempt 1 of 4" in err
    assert whole_state(out) == whole_state(tmp_path / "whole")


def test_ctrl_c_stops_the_tasks_and_a_repetition_resumes(cluster, write_recipes, environment, tmp_path):
    import signal

    write_recipes(steps=4, widths=WIDTHS)
    out = tmp_path / "out"
    words = ["study", str(tmp_path / "study.yaml"), "budget.steps=400", f"output={out}", "--hardware", "h100", *LAUNCH]
    settings: dict[str, Any] = {"env": environment | {"RAY_ADDRESS": cluster.address}, "text": True}
    with subprocess.Popen([sys.executable, "-m", "tessera", *words], stderr=subprocess.PIPE, **settings) as process:
        while len(bundle.checkpoints(out / "members/L")) < 2 and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130, err
    assert "repeat the command to resume" in err
    assert "Traceback" not in err
    before = {path: path.read_bytes() for path in out.glob("members/*/log.jsonl")}
    time.sleep(3)
    assert before == {path: path.read_bytes() for path in out.glob("members/*/log.jsonl")}  # nothing runs
    done = subprocess.run([sys.executable, "-m", "tessera", *words], stderr=subprocess.PIPE, check=False, **settings)
    assert done.returncode == 0, done.stderr
