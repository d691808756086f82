"""A study runs, goes on after whatever ended it, and ends as one that nothing disturbed."""

import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tessera import bundle
from tessera.cli.options import parse_shard
from tessera.evaluation import protocol
from tessera.files import exclusive_lock
from tessera.monitoring.logger import read_log
from tessera.studies import results, runner, study_plan, worker
from tessera.training import loop

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def begins_at_once(monkeypatch):
    """Members begin as copies of this process, in which all is imported, and are not planned, which takes seconds."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    for name in ("matplotlib.figure", "torch.distributed.checkpoint", "torch.distributed.fsdp"):
        pytest.importorskip(name)
    monkeypatch.setattr(runner, "START", "fork")
    taken = SimpleNamespace(seconds=60.0, scoring_seconds=30.0, memory_bytes=2**20, fits=True)
    taken.call_seconds, taken.look_seconds = 1e-3, 1e-4
    monkeypatch.setattr(study_plan, "plan_for_recipe", lambda recipe, hardware: taken)


def run(asked, retry: bool = False, shard: str = "1/1") -> list[str]:
    """As the command does; what was said."""
    said: list[str] = []
    found = study_plan.plan_study(
        asked, study_plan.resolve_members(asked), study_plan.read_plan(Path(asked.output)), "h100"
    )
    study_plan.write_plan(asked, found)
    runner.run_study(asked, found, study_plan.shard_members(found, parse_shard(shard)), retry, said.append)
    return said


def told(asked) -> dict[str, results.MemberResult]:
    return {result.name: result for result in results.read_results(asked, Path(asked.output))}


def numbers(folder: Path) -> dict[str, list]:
    """All scores of a study, without where they were made."""
    return {
        str(path.relative_to(folder)): [(score.metric, score.value, score.low, score.high) for score in found]
        for path in sorted(folder.glob("members/*/*/step*-*.json"))
        for found in [protocol.load(path)]
    }


@pytest.fixture(scope="module")
def keep(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kept") / "whole"


@pytest.fixture
def whole(write_study, keep, tmp_path):
    """A study that nothing disturbed; not to be changed."""
    asked = write_study(output="whole")
    if not keep.exists():
        run(asked)
        shutil.copytree(asked.output, keep)
    return asked.model_copy(update={"output": str(keep)})


def test_a_study_runs_and_its_results_are_read_from_its_files(whole):
    found = told(whole)
    assert list(found) == ["S", "L"]
    for name, result in found.items():
        folder = Path(whole.output) / "members" / name
        assert (result.state, result.error, result.seed, result.values) == ("done", None, 0, {"size": name})
        assert [point.step for point in result.points] == [3, 6]
        network = bundle.load(bundle.checkpoints(folder)[0]).network
        assert result.parameters == sum(parameter.numel() for parameter in network.parameters())
        assert result.macs == network.macs()
        assert result.planned_seconds == 60
        for point in result.points:
            assert point.samples == 32 * point.step
            assert point.flops == 6 * result.macs * point.samples
            assert list(point.scores) == ["kid", "fd"]
            assert point.scores["kid"].protocol.samples == 40
        first, last = (point.seconds for point in result.points)
        assert 0 < first < last
        each = [32 / record["images_per_second"] for record in read_log(folder) if "images_per_second" in record]
        assert last == pytest.approx(2 * sum(each))  # a record every two steps
        (drawn,) = result.sampling_points
        assert (drawn.num_steps, drawn.macs) == (2, 2 * result.macs)
        steps = [(one.scores["kid"].protocol.sampling or {})["num_steps"] for one in (drawn, result.points[-1])]
        assert steps == [2, 3]
        assert drawn.scores["kid"].value != result.points[-1].scores["kid"].value
        assert result.sample_grid == folder / "samples/step-000000006.png"
        assert (folder / "samples/step-000000006.png").exists()
    assert len({result.points[-1].scores["fd"].fingerprint for result in found.values()}) == 1


def test_the_reference_is_looked_at_once(whole):
    folder = Path(whole.output)
    assert len(list(folder.glob("reference/reference-*/pool.npy"))) == 1
    assert not list(folder.glob("members/*/evaluation/reference*"))
    assert not list(folder.rglob("*.work"))


def test_what_is_done_is_not_done_again(write_study, whole, tmp_path):
    shutil.copytree(whole.output, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/members").rglob("*")}
    asked = write_study()
    assert run(asked) == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out/members").rglob("*")} == before
    more = write_study("sampling_steps=[2, 3]")  # as many as at the end, whose scores these are
    assert {result.state for result in told(asked).values()} == {"done"}
    assert len(run(more)) == 2
    for result in told(more).values():
        assert [drawn.num_steps for drawn in result.sampling_points] == [2, 3]
        assert result.sampling_points[1].scores == result.points[-1].scores


def test_a_member_that_fails_does_not_end_the_others(write_study):
    """One diverges, the process of another is killed."""
    asked = write_study(
        "axes.size={D: {training.optimizer.learning_rate: 1.0e+30, training.stability.max_rollbacks: 1}, K: {}, S: {}}",
        "sampling_steps=[]",
    )
    ended = worker.run_member

    def go(recipe, sampling_steps):
        if Path(recipe.run_dir).name == "K" and not (Path(asked.output) / "mended").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        ended(recipe, sampling_steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "run_member", go)
        with pytest.raises(runner.MembersFailed, match=r"2 of 3 members failed: D, K; .*--retry"):
            run(asked)
        found = told(asked)
        assert {name: result.state for name, result in found.items()} == {"D": "failed", "K": "failed", "S": "done"}
        assert "diverged" in str(found["D"].error)
        assert "SIGKILL" in str(found["K"].error)
        with pytest.raises(runner.MembersFailed):
            run(asked)
        assert not bundle.checkpoints(Path(asked.output) / "members/K")  # failed members are passed over
        (Path(asked.output) / "mended").touch()
        with pytest.raises(runner.MembersFailed, match="1 of 3 members failed: D"):
            run(asked, retry=True)
    found = told(asked)
    assert {name: result.state for name, result in found.items()} == {"D": "failed", "K": "done", "S": "done"}
    assert (found["K"].error, found["S"].error) == (None, None)


def test_a_member_whose_end_could_not_be_scored_has_failed(write_study, monkeypatch):
    def score(*anything, **more):
        raise OSError("no space left on device")

    monkeypatch.setattr(loop.scores.Scorer, "score", score)
    asked = write_study()
    with pytest.raises(runner.MembersFailed):
        run(asked)
    assert {str(result.error).partition(",")[0] for result in told(asked).values()} == {"the end"}


def test_a_member_is_run_by_one_command_at_a_time(write_study):
    asked = write_study("sampling_steps=[]", "marks={}", "budget.steps=2")
    with exclusive_lock(Path(asked.output) / runner.LOCKS / "S"):
        assert "S is being run by another command" in run(asked)
    assert {name: result.state for name, result in told(asked).items()} == {"S": "not begun", "L": "done"}
    assert any("member 1 of 1: S, planned 1 min 30 s" in line for line in run(asked, shard="2/2"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_study_that_is_asked_to_stop_says_how_to_go_on(write_study, processes, number, whole):
    asked = write_study("budget.steps=2000", "marks={}", "sampling_steps=[]")
    fellows = processes.start(1, life, asked)
    while not read_log(Path(asked.output) / "members/S") and fellows.alive:
        time.sleep(0.01)
    os.kill(fellows.processes[0].pid, number)
    (outcome,) = fellows.outcomes()
    assert outcome.error.startswith("Interrupted: stopped, everything saved in")
    assert "1 unfinished, 1 not begun; run the same command again to go on" in outcome.error
    found = told(asked)["S"]
    assert (found.state, found.points) == ("unfinished", [])
    step = max(record["step"] for record in read_log(Path(asked.output) / "members/S"))
    saved = bundle.checkpoints(Path(asked.output) / "members/S")[0].name
    assert int(saved.removeprefix("step-")) >= step


def life(asked) -> None:
    """One life of a command, its members in one group with it."""
    os.setpgrp()
    vars(multiprocessing.current_process())["_config"]["daemon"] = False  # so that it may have children
    runner.START_METHOD = "fork"
    found = study_plan.read_plan(Path(asked.output))
    if found is None:
        taken = SimpleNamespace(seconds=60.0, scoring_seconds=30.0, memory_bytes=2**20, fits=True)
        taken.call_seconds, taken.look_seconds = 1e-3, 1e-4
        study_plan.plan_for_recipe = lambda recipe, hardware: taken
        found = study_plan.plan_study(asked, study_plan.resolve_members(asked), None, "h100")
        study_plan.write_plan(asked, found)
    runner.run_study(asked, found, list(found.members), False, lambda text: None)


def killed(processes, asked, ready: Callable[[], bool], more: float) -> None:
    """Kill a life of a study, its members with it, so many seconds after it is ready for that."""
    fellows = processes.start(1, life, asked)
    while fellows.alive and not ready():
        time.sleep(0.002)
    time.sleep(more)
    try:
        os.killpg(fellows.processes[0].pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not come so far as to lead a group
        fellows.kill()
    fellows.outcomes()


def state(folder: Path) -> tuple:
    """How far a study has come, by the names of its files."""
    names = ("members/*/checkpoints/step-?????????", "members/*/evaluation/step*.json", "members/*/sampling/*.json")
    return tuple(len(list(folder.glob(name))) for name in names), max(
        (path.name for path in folder.glob(names[0])), default=""
    )


def ends_as(asked, whole, whole_state) -> None:
    assert {result.state for result in told(asked).values()} == {"done"}
    assert numbers(Path(asked.output)) == numbers(Path(whole.output))
    for name, result in told(asked).items():
        one, other = (Path(each.output) / "members" / name for each in (asked, whole))
        assert whole_state(one) == whole_state(other)
        assert result.sample_grid is not None
        assert result.sample_grid.read_bytes() == (other / "samples" / result.sample_grid.name).read_bytes()
        steps = [record["step"] for record in read_log(one) if "images_per_second" in record]
        assert steps == sorted(set(steps))
        assert math.isfinite(result.points[-1].seconds)


def test_a_study_killed_again_and_again_ends_as_one_that_nothing_disturbed(write_study, whole, processes, whole_state):
    """Amid scoring, amid drawing with other steps, and in the next member."""
    asked, draw = write_study(), random.Random(0)
    for place in ("S/evaluation/*.work", "S/sampling", "L/evaluation/*3.json"):
        found = Path(asked.output) / "members"
        killed(processes, asked, lambda: bool(list(found.glob(place))), draw.uniform(0, 0.05))  # noqa: B023
        assert told(asked)["L"].state != "done"
    processes.together(1, life, asked)
    ends_as(asked, whole, whole_state)


@pytest.mark.slow
def test_a_study_killed_thirty_times(write_study, processes, whole_state):
    words = ("budget.steps=40", "marks={steps: [3, 8, 12, 20, 31]}", "sampling_steps=[1, 2, 4, 5]")
    whole, asked = write_study(*words, output="calm"), write_study(*words)
    run(whole)
    draw, folder, places = random.Random(0), Path(asked.output), set()
    for number in range(30):
        before = state(folder)
        ready = (lambda: state(folder) != before) if number % 5 else (lambda: True)  # noqa: B023
        killed(processes, asked, ready, draw.uniform(0, 0.3))
        places.add(state(folder))
    assert len(places) >= 10
    processes.together(1, life, asked)
    ends_as(asked, whole, whole_state)
