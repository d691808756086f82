"""What befalls runs of several processes, and that they end as if nothing had; benchmarks/faults.py does more."""

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
from tessera.monitoring.spikes import read_skipped_steps
from tessera.training import loop, step
from tessera.training.checkpoint import checkpoint
from tessera.training.recipe import read_recipe

pytest.importorskip("sklearn")

CHANGES = ("training.steps=40", "training.checkpoint_every=10", "training.fsdp=all", "training.ema.extra_decays=[0.5]",
           "training.keep_last=9")  # fmt: skip


# What runs in the processes


def train(recipe: Path, *changes: str) -> None:
    loop.train(read_recipe(recipe, [*CHANGES, *changes]))


def train_with_files_no_longer_than(size: int, rank: int, after: int, recipe: Path) -> None:
    """As a disk that is full for one process alone."""
    import resource

    original, left = loop.train_step, [after]

    def limited(*given):
        left[0] -= 1
        if left[0] == 0 and os.environ["RANK"] == str(rank):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return original(*given)

    loop.train_step = limited
    train(recipe)


def train_with_one_sample_that_is_not_a_number(position: int, recipe: Path, *changes: str) -> None:
    original = step.prepare_batch

    def spoilt(batch, task, device):
        x0, condition, positions = original(batch, task, device)
        there = (batch.position == position).view(-1, 1, 1, 1)
        return torch.where(there, torch.nan, x0), condition, positions

    step.prepare_batch = spoilt
    train(recipe, *changes)


def meet_at(port: int, started: int) -> list[tuple[int, int]]:
    """As torchrun starts processes again: with the store that served those before."""
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with runtime.distributed_session() as ranks:
        seen = ranks.gather((ranks.rank, started))
        if started == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return seen


# What is asked of them


@pytest.fixture(scope="module")
def whole(processes, trained, tmp_path_factory) -> Path:
    """A run of two processes that nothing befell."""
    folder = tmp_path_factory.mktemp("whole")
    processes.together(2, train, trained.parent / "tiny.yaml", f"run_dir={folder / 'run'}")
    return folder / "run"


def reach(run: Path, steps: int, going) -> None:
    """Until the log tells of so many steps."""
    log = run / "log.jsonl"
    while going.alive and (not log.exists() or len(log.read_text().splitlines()) < steps):
        time.sleep(0.002)


def goes_on(processes, recipe: Path, whole: Path, whole_state) -> None:
    """The same command again, and nothing shows what befell it."""
    run = recipe.with_name("run")
    processes.together(2, train, recipe)
    assert whole_state(run) == whole_state(whole)
    assert [(one["step"], one["loss"]) for one in read_log(run)] == [
        (one["step"], one["loss"]) for one in read_log(whole)
    ]
    assert not list(run.rglob("*.partial"))


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_when_one_process_is_killed_the_others_end_by_themselves(processes, recipe, tmp_path, whole, whole_state, rank):
    going = processes.start(2, train, recipe)
    reach(tmp_path / "run", 15, going)
    going.kill(rank)
    outcomes = going.outcomes()
    assert outcomes[rank].code == -signal.SIGKILL
    assert outcomes[1 - rank].code == 1
    newest = bundle.checkpoints(tmp_path / "run")[0]
    assert outcomes[1 - rank].error == (
        f"TesseraError: process {1 - rank} of 2 lost the others: one of them ended, or the network between them did; "
        f"the last checkpoint is {newest}; run the same command again to go on"
    )
    assert checkpoint.verify(newest) == []
    goes_on(processes, recipe, whole, whole_state)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_for_one_process_ends_all(processes, recipe, tmp_path, whole, whole_state, rank):
    limit = max(path.stat().st_size for path in bundle.checkpoints(whole)[0].glob("state/*")) // 2
    outcomes = processes.start(2, train_with_files_no_longer_than, limit, rank, 15, recipe).outcomes()
    places = [tmp_path / f"run/checkpoints/step-{step:09d}" for step in (20, 10)]
    said = f"TesseraError: cannot write {places[0]}: File too large; the last checkpoint is {places[1]}; mend that"
    for outcome in outcomes:
        assert outcome.code == 1
        assert outcome.error.startswith(said)
    assert not list((tmp_path / "run").rglob("*.partial"))
    goes_on(processes, recipe, whole, whole_state)


def test_a_log_that_cannot_be_written_ends_the_run_with_its_name(processes, recipe, tmp_path):
    (outcome,) = processes.start(1, train_with_files_no_longer_than, 500, 0, 15, recipe).outcomes()
    assert outcome.error == (
        f"TesseraError: cannot write {tmp_path / 'run/log.jsonl'}: File too large; mend that and run the same command "
        "again to go on"
    )
    processes.together(1, train, recipe)
    assert [one["step"] for one in read_log(tmp_path / "run")] == list(range(1, 41))


def test_what_is_not_a_number_to_one_process_is_kept_out_by_all(processes, recipe, tmp_path, whole_state):
    """The sample falls to the second process; both leave the step undone, so that weights stay alike."""
    changes = ("training.steps=6",)
    bad = 2 * 32 + 31
    processes.together(2, train_with_one_sample_that_is_not_a_number, bad, recipe, *changes)
    run = tmp_path / "run"
    (only,) = read_skipped_steps(run)
    assert (only["step"], only["position"], only["outcome"], len(only["samples"])) == (3, 64, "skipped", 32)
    assert [one["skipped_steps"] for one in read_log(run)] == [0, 0, 1, 1, 1, 1]
    told = tmp_path / "told"
    told.mkdir()
    (told / "skipped_steps.jsonl").write_text(json.dumps({"step": 1, "position": 64, "outcome": "excluded", "samples": []}))
    processes.together(2, train, recipe, "training.steps=5", f"run_dir={told}")
    one, other = (
        {name: value for name, value in whole_state(each).items() if name.startswith(("weights/", "optimizer/"))}
        for each in (run, told)
    )
    assert len(one) > 10
    assert one == other


def test_processes_started_again_do_not_look_for_those_that_died(processes):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert [one.code for one in processes.start(3, meet_at, store.port, 0).outcomes()] == [-signal.SIGKILL] * 3
    for started in (1, 2):
        assert processes.together(3, meet_at, store.port, started) == [[(rank, started) for rank in range(3)]] * 3


def test_sigterm_said_twice_is_the_same_wish(tessera, recipe, tmp_path, monkeypatch):
    """A cluster signals every process, and so does torchrun."""
    original = loop.train_step

    def terminated(*given):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*given)

    monkeypatch.setattr(loop, "train_step", terminated)
    done = tessera("train", recipe)
    assert done.code == 130
    assert f"stopped at step 1 of 4, everything saved in {tmp_path / 'run'}" in done.err
    assert [path.name for path in bundle.checkpoints(tmp_path / "run")] == ["step-000000001", "step-000000000"]


def test_a_run_that_cannot_be_helped_ends_with_a_diagnosis(tessera, recipe, monkeypatch):
    original = loop.train_step

    def ruined(learner, *rest):
        told = original(learner, *rest)
        with torch.no_grad():
            learner.network.final_layer.linear.weight.fill_(torch.nan)
        return told

    monkeypatch.setattr(loop, "train_step", ruined)
    done = tessera(
        "train",
        recipe,
        "training.steps=60",
        "training.stability.max_consecutive_bad=2",
        "training.stability.max_rollbacks=2",
    )
    assert done.code == 1
    said = (
        "error: training diverged at step 3: the loss is not a number, 2 steps in a row, and going back 2 times did not"
    )
    assert said in done.err
    assert "Traceback" not in done.err
