"""Failures of distributed runs, after which they resume exactly; benchmarks/faults.py injects more of them."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from tessera import bundle, runtime
from tessera.monitoring.logger import read_log
from tessera.monitoring.spikes import SKIPPED_STEPS, read_skipped_steps
from tessera.training import checkpoint, loop, step
from tessera.training.recipe import read_recipe

pytest.importorskip("sklearn")

CHANGES = ("training.steps=40", "training.checkpoint_every=10", "training.fsdp=full", "training.ema.extra_decays=[0.5]",
           "training.keep_last=9")  # fmt: skip


# Functions of the processes


def train(recipe: Path, *changes: str) -> None:
    loop.train(read_recipe(recipe, [*CHANGES, *changes]))


def train_with_limited_file_size(size: int, rank: int, step: int, recipe: Path) -> None:
    """Train with a limit on the file size of one rank from a step on, like a full disk."""
    import resource

    train_step, remaining = loop.train_step, [step]

    def limited(*args):
        remaining[0] -= 1
        if remaining[0] == 0 and os.environ["RANK"] == str(rank):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return train_step(*args)

    loop.train_step = limited
    train(recipe)


def train_with_a_sample_of_nan(position: int, recipe: Path, *changes: str) -> None:
    prepare_batch = step.prepare_batch

    def with_nan(batch, objective, device):
        x0, condition, positions = prepare_batch(batch, objective, device)
        rows = (batch.position == position).view(-1, 1, 1, 1)
        return torch.where(rows, torch.nan, x0), condition, positions

    step.prepare_batch = with_nan
    train(recipe, *changes)


def join_session(port: int, attempt: int) -> list[tuple[int, int]]:
    """Join like a process that torchrun restarted: with the store of the earlier attempts."""
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with runtime.distributed_session() as world:
        values = world.gather((world.rank, attempt))
        if attempt == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return values


# Tests


@pytest.fixture(scope="module")
def whole(processes, trained, tmp_path_factory) -> Path:
    """An undisturbed run of two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    processes.together(2, train, trained.parent / "tiny.yaml", f"run_dir={folder / 'run'}")
    return folder / "run"


def wait_for_steps(run: Path, steps: int, ranks) -> None:
    """Wait until the log has this many steps."""
    log = run / "log.jsonl"
    while ranks.alive and (not log.exists() or len(log.read_text().splitlines()) < steps):
        time.sleep(0.002)


def check_resumed(processes, recipe: Path, whole: Path, whole_state) -> None:
    """Resume the run: it must end like an undisturbed one."""
    run = recipe.with_name("run")
    processes.together(2, train, recipe)
    assert whole_state(run) == whole_state(whole)
    losses = [[(record["step"], record["loss"]) for record in read_log(folder)] for folder in (run, whole)]
    assert losses[0] == losses[1]
    assert not list(run.rglob("*.partial"))


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_when_one_rank_is_killed_the_others_end_with_an_error(processes, recipe, tmp_path, whole, whole_state, rank):
    ranks = processes.start(2, train, recipe)
    wait_for_steps(tmp_path / "run", 15, ranks)
    ranks.kill(rank)
    outcomes = ranks.outcomes()
    assert outcomes[rank].code == -signal.SIGKILL
    assert outcomes[1 - rank].code == 1
    newest = bundle.checkpoints(tmp_path / "run")[0]
    error = outcomes[1 - rank].error
    assert error.startswith(f"TesseraError: process {1 - rank} of 2 lost the others")
    assert error.endswith(f"the last checkpoint is {newest}; run the same command again to resume")
    assert checkpoint.verify(newest) == []
    check_resumed(processes, recipe, whole, whole_state)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_for_one_rank_ends_all(processes, recipe, tmp_path, whole, whole_state, rank):
    limit = max(path.stat().st_size for path in bundle.checkpoints(whole)[0].glob("state/*")) // 2
    outcomes = processes.start(2, train_with_limited_file_size, limit, rank, 15, recipe).outcomes()
    paths = [tmp_path / f"run/checkpoints/step-{step:09d}" for step in (20, 10)]
    message = f"TesseraError: cannot write {paths[0]}: File too large; the last checkpoint is {paths[1]}; fix the cause"
    for outcome in outcomes:
        assert outcome.code == 1
        assert outcome.error.startswith(message)
    assert not list((tmp_path / "run").rglob("*.partial"))
    check_resumed(processes, recipe, whole, whole_state)


def test_a_log_that_cannot_be_written_ends_the_run_with_an_error_that_names_it(processes, recipe, tmp_path):
    (outcome,) = processes.start(1, train_with_limited_file_size, 500, 0, 15, recipe).outcomes()
    assert outcome.error.startswith(f"TesseraError: cannot write {tmp_path / 'run/log.jsonl'}: File too large")
    assert "run the same command again" in outcome.error
    processes.together(1, train, recipe)
    assert [record["step"] for record in read_log(tmp_path / "run")] == list(range(1, 41))


def test_a_nan_on_one_rank_is_skipped_by_all(processes, recipe, tmp_path, whole_state):
    """The second rank reads the sample; both skip the step, so the weights stay equal."""
    changes = ("training.steps=6",)
    bad = 2 * 32 + 31
    processes.together(2, train_with_a_sample_of_nan, bad, recipe, *changes)
    run = tmp_path / "run"
    (only,) = read_skipped_steps(run)
    assert (only["step"], only["position"], only["outcome"], len(only["samples"])) == (3, 64, "skipped", 32)
    assert [one["skipped_steps"] for one in read_log(run)] == [0, 0, 1, 1, 1, 1]
    excluding = tmp_path / "excluding"
    excluding.mkdir()
    record = {"step": 1, "position": 64, "outcome": "excluded", "samples": []}
    (excluding / SKIPPED_STEPS).write_text(json.dumps(record))
    processes.together(2, train, recipe, "training.steps=5", f"run_dir={excluding}")
    one, other = (
        {name: value for name, value in whole_state(each).items() if name.startswith(("weights/", "optimizer/"))}
        for each in (run, excluding)
    )
    assert len(one) > 10
    assert one == other


def test_restarted_processes_do_not_wait_for_those_that_died(processes):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert [outcome.code for outcome in processes.start(3, join_session, store.port, 0).outcomes()] == [
        -signal.SIGKILL
    ] * 3
    for attempt in (1, 2):
        assert processes.together(3, join_session, store.port, attempt) == [[(rank, attempt) for rank in range(3)]] * 3


def test_several_sigterms_stop_the_run_once(tessera, recipe, tmp_path, monkeypatch):
    """A cluster signals every process, and so does torchrun."""
    train_step = loop.train_step

    def terminated(*args):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", terminated)
    outcome = tessera("train", recipe)
    assert outcome.code == 130
    assert f"stopped at step 1 of 4, everything is saved in {tmp_path / 'run'}" in outcome.err
    assert [path.name for path in bundle.checkpoints(tmp_path / "run")] == ["step-000000001", "step-000000000"]


def test_a_run_that_keeps_diverging_ends_with_a_diagnosis(tessera, recipe, monkeypatch):
    train_step = loop.train_step

    def damaged(state, *rest):
        metrics = train_step(state, *rest)
        with torch.no_grad():
            state.network.final_layer.linear.weight.fill_(torch.nan)
        return metrics

    monkeypatch.setattr(loop, "train_step", damaged)
    outcome = tessera(
        "train",
        recipe,
        "training.steps=60",
        "training.stability.max_consecutive_bad=2",
        "training.stability.max_rollbacks=2",
    )
    assert outcome.code == 1
    assert (
        "error: training diverged at step 3: the loss is not finite, 2 steps in a row, and 2 rollbacks" in outcome.err
    )
    assert "Traceback" not in outcome.err
