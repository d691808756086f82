"""Studies run, resume after any interruption, and end with the results of an undisturbed one."""

import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

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
def start_fast(monkeypatch, cost):
    """Members are forked from this process, in which everything is imported, and are not planned."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    for name in ("matplotlib.figure", "torch.distributed.checkpoint", "torch.distributed.fsdp"):
        pytest.importorskip(name)
    monkeypatch.setattr(runner, "START_METHOD", "fork")
    monkeypatch.setattr(study_plan, "plan_for_recipe", lambda recipe, hardware: cost)


def run(config, retry: bool = False, shard: str = "1/1") -> list[str]:
    """Run a study as the command does. Returns the log."""
    log: list[str] = []
    plan = study_plan.plan_study(
        config, study_plan.resolve_members(config), study_plan.read_plan(Path(config.output)), "h100"
    )
    study_plan.write_plan(config, plan)
    runner.run_study(config, plan, study_plan.shard_members(plan, parse_shard(shard)), retry, log.append)
    return log


def read(config) -> dict[str, results.MemberResult]:
    return {result.name: result for result in results.read_results(config, Path(config.output))}


def numbers(folder: Path) -> dict[str, list]:
    """All scores of a study, without their environment."""
    return {
        str(path.relative_to(folder)): [(score.metric, score.value, score.low, score.high) for score in scores]
        for path in sorted(folder.glob("members/*/*/step*-*.json"))
        for scores in [protocol.load(path)]
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("saved") / "whole"


@pytest.fixture
def whole(write_study, saved):
    """A finished study that was not interrupted. Do not modify it."""
    config = write_study(output="whole")
    if not saved.exists():
        run(config)
        shutil.copytree(config.output, saved)
    return config.model_copy(update={"output": str(saved)})


def test_a_study_runs_and_its_results_are_read_from_its_files(whole):
    members = read(whole)
    assert list(members) == ["S", "L"]
    for name, result in members.items():
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
        (sampled,) = result.sampling_points
        assert (sampled.num_steps, sampled.macs) == (2, 2 * result.macs)
        steps = [(one.scores["kid"].protocol.sampling or {})["num_steps"] for one in (sampled, result.points[-1])]
        assert steps == [2, 3]
        assert sampled.scores["kid"].value != result.points[-1].scores["kid"].value
        assert result.sample_grid == folder / "samples/step-000000006.png"
        assert (folder / "samples/step-000000006.png").exists()
    assert len({result.points[-1].scores["fd"].fingerprint for result in members.values()}) == 1


def test_features_of_the_reference_are_extracted_once(whole):
    folder = Path(whole.output)
    assert len(list(folder.glob("reference/reference-*/pool.npy"))) == 1
    assert not list(folder.glob("members/*/evaluation/reference*"))
    assert not list(folder.rglob("*.work"))


def test_finished_members_are_not_repeated(write_study, whole, tmp_path):
    shutil.copytree(whole.output, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/members").rglob("*")}
    config = write_study()
    assert run(config) == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out/members").rglob("*")} == before
    more = write_study("sampling_steps=[2, 3]")  # 3 is the recipe's number, scored at the end
    assert {result.state for result in read(config).values()} == {"done"}
    assert len(run(more)) == 2
    for result in read(more).values():
        assert [point.num_steps for point in result.sampling_points] == [2, 3]
        assert result.sampling_points[1].scores == result.points[-1].scores


def test_a_failed_member_does_not_stop_the_others(write_study):
    """One diverges, the process of another is killed."""
    config = write_study(
        "axes.size={D: {training.optimizer.learning_rate: 1.0e+30, training.stability.max_rollbacks: 1}, K: {}, S: {}}",
        "sampling_steps=[]",
    )
    original = worker.run_member

    def run_member(recipe, sampling_steps):
        if Path(recipe.run_dir).name == "K" and not (Path(config.output) / "fixed").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        original(recipe, sampling_steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "run_member", run_member)
        with pytest.raises(runner.MembersFailed, match=r"2 of 3 members failed: D, K; D: .*diverged.*; .*--retry"):
            run(config)
        members = read(config)
        assert {name: result.state for name, result in members.items()} == {"D": "failed", "K": "failed", "S": "done"}
        assert "diverged" in str(members["D"].error)
        assert "SIGKILL" in str(members["K"].error)
        with pytest.raises(runner.MembersFailed):
            run(config)
        assert not bundle.checkpoints(Path(config.output) / "members/K")  # failed members are skipped
        (Path(config.output) / "fixed").touch()
        with pytest.raises(runner.MembersFailed, match="1 of 3 members failed: D"):
            run(config, retry=True)
    members = read(config)
    assert {name: result.state for name, result in members.items()} == {"D": "failed", "K": "done", "S": "done"}
    assert (members["K"].error, members["S"].error) == (None, None)


def test_a_member_whose_end_could_not_be_scored_has_failed(write_study, monkeypatch):
    def score(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(loop.scores.Scorer, "score", score)
    config = write_study()
    with pytest.raises(runner.MembersFailed):
        run(config)
    assert {str(result.error).partition(",")[0] for result in read(config).values()} == {"step 6"}


def test_a_member_is_run_by_one_command_at_a_time(write_study):
    config = write_study("sampling_steps=[]", "marks={}", "budget.steps=2")
    with exclusive_lock(Path(config.output) / runner.LOCKS / "S"):
        assert "S is being run by another command" in run(config)
    assert {name: result.state for name, result in read(config).items()} == {"S": "not started", "L": "done"}
    assert any("member 1 of 1: S, planned 1 min 30 s" in line for line in run(config, shard="2/2"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_study_reports_how_to_resume(write_study, processes, number, cost):
    config = write_study("budget.steps=2000", "marks={}", "sampling_steps=[]")
    group = processes.start(1, command, config, cost)
    while not read_log(Path(config.output) / "members/S") and group.alive:
        time.sleep(0.01)
    os.kill(group.processes[0].pid, number)
    (outcome,) = group.outcomes()
    assert outcome.error.startswith("Interrupted: stopped, everything saved in")
    assert "1 unfinished, 1 not started; run the same command again to resume" in outcome.error
    member = read(config)["S"]
    assert (member.state, member.points) == ("unfinished", [])
    step = max(record["step"] for record in read_log(Path(config.output) / "members/S"))
    saved = bundle.checkpoints(Path(config.output) / "members/S")[0].name
    assert int(saved.removeprefix("step-")) >= step


def command(config, cost) -> None:
    """A command in its own process group, with its members."""
    os.setpgrp()
    vars(multiprocessing.current_process())["_config"]["daemon"] = False  # so that it may have children
    runner.START_METHOD = "fork"
    plan = study_plan.read_plan(Path(config.output))
    if plan is None:
        study_plan.plan_for_recipe = lambda recipe, hardware: cost
        plan = study_plan.plan_study(config, study_plan.resolve_members(config), None, "h100")
        study_plan.write_plan(config, plan)
    runner.run_study(config, plan, list(plan.members), False, lambda text: None)


def kill(processes, config, cost, ready: Callable[[], bool], delay: float) -> None:
    """Kill a command and its members `delay` seconds after the condition is met."""
    group = processes.start(1, command, config, cost)
    while group.alive and not ready():
        time.sleep(0.002)
    time.sleep(delay)
    try:
        os.killpg(group.processes[0].pid, signal.SIGKILL)
    except ProcessLookupError:  # it does not lead a group yet
        group.kill()
    group.outcomes()


def state(folder: Path) -> tuple:
    """The progress of a study, by the names of its files."""
    names = ("members/*/checkpoints/step-?????????", "members/*/evaluation/step*.json", "members/*/sampling/*.json")
    return tuple(len(list(folder.glob(name))) for name in names), max(
        (path.name for path in folder.glob(names[0])), default=""
    )


def check_equal_results(config, whole, whole_state) -> None:
    assert {result.state for result in read(config).values()} == {"done"}
    assert numbers(Path(config.output)) == numbers(Path(whole.output))
    for name, result in read(config).items():
        one, other = (Path(each.output) / "members" / name for each in (config, whole))
        assert whole_state(one) == whole_state(other)
        assert result.sample_grid is not None
        assert result.sample_grid.read_bytes() == (other / "samples" / result.sample_grid.name).read_bytes()
        steps = [record["step"] for record in read_log(one) if "images_per_second" in record]
        assert steps == sorted(set(steps))
        assert math.isfinite(result.points[-1].seconds)


def test_a_study_killed_several_times_has_equal_results(write_study, whole, processes, whole_state, cost):
    """While scoring, while scoring with other sampling steps, and in the next member."""
    config, delays = write_study(), random.Random(0)
    for pattern in ("S/evaluation/*.work", "S/sampling", "L/evaluation/*3.json"):
        folder = Path(config.output) / "members"
        kill(processes, config, cost, lambda: bool(list(folder.glob(pattern))), delays.uniform(0, 0.05))  # noqa: B023
        assert read(config)["L"].state != "done"
    processes.together(1, command, config, cost)
    check_equal_results(config, whole, whole_state)


@pytest.mark.slow
def test_a_study_killed_thirty_times_has_equal_results(write_study, processes, whole_state, cost):
    words = ("budget.steps=40", "marks={steps: [3, 8, 12, 20, 31]}", "sampling_steps=[1, 2, 4, 5]")
    whole, config = write_study(*words, output="calm"), write_study(*words)
    run(whole)
    delays, folder, states = random.Random(0), Path(config.output), set()
    for number in range(30):
        before = state(folder)
        ready = (lambda: state(folder) != before) if number % 5 else (lambda: True)  # noqa: B023
        kill(processes, config, cost, ready, delays.uniform(0, 0.3))
        states.add(state(folder))
    assert len(states) >= 10
    processes.together(1, command, config, cost)
    check_equal_results(config, whole, whole_state)
