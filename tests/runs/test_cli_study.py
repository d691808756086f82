"""`tessera study`: plan, members in their own processes, report, errors."""

import os
import signal
import time
from types import SimpleNamespace

import pytest

from tessera import bundle
from tessera.monitoring.logger import read_log
from tessera.studies import runner, study_plan

pytest.importorskip("sklearn")
STUDY = """
question: Does width help?
recipe: tiny.yaml
axes:
  size:
    S: {network.hidden_size: 16}
    L: {network.hidden_size: 32}
set: {evaluation: {num_samples: 40, batch_size: 40, metrics: [kid, fd]}}
budget: {steps: 2}
"""
GPU = ("--hardware", "h100")


@pytest.fixture
def study(recipe, tmp_path, monkeypatch):
    """The file of a study. Its members are forked from this process, and planning is replaced, as both take seconds."""
    plan = SimpleNamespace(seconds=60.0, evaluation_seconds=30.0, memory_bytes=2**20, fits=True)
    plan.call_seconds, plan.extract_seconds = 1e-3, 1e-4
    monkeypatch.setattr(study_plan, "plan_for_recipe", lambda recipe, hardware: plan)
    monkeypatch.setattr(runner, "START_METHOD", "fork")
    path = tmp_path / "study.yaml"
    path.write_text(f"output: {tmp_path / 'out'}\n{STUDY}")
    return path


def test_a_dry_run_prints_the_plan_and_writes_nothing(tessera, study, tmp_path):
    done = tessera("study", study, "--dry-run", *GPU, "--shard", "1/3")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].split() == ["member", "parameters", "GMACs", "steps", "FLOPs", "memory", "training", "evaluation"]
    assert [line.split()[0] for line in lines[1:3]] == ["S", "L"]
    assert "2 members" in lines[3]
    assert "3 min 0 s" in lines[3]
    assert lines[4] == "shard 1/3: L"
    assert "shard 3/3: empty" in tessera("study", study, "--dry-run", *GPU, "--shard", "3/3").out
    assert not (tmp_path / "out").exists()


def test_a_study_over_its_limit_is_refused_below_its_plan(tessera, study, tmp_path):
    dry = tessera("study", study, "--dry-run", *GPU, "limit_minutes=1")
    assert dry.code == 1
    assert [line.split()[0] for line in dry.out.splitlines()] == ["member", "S", "L", "2"]
    assert dry.err.startswith("error: the study takes about 3 min 0 s on one machine, and limit_minutes is 1: ")
    assert dry.err.endswith("limit_minutes=10\n")
    refused = tessera("study", study, *GPU, "limit_minutes=1")
    assert (refused.code, refused.out) == (1, "")
    assert refused.err.startswith("member ")
    assert not (tmp_path / "out").exists()


def test_shards_share_the_members_and_each_writes_the_report(tessera, study, tmp_path):
    first = tessera("study", study, *GPU, "--shard", "1/2")
    assert first.code == 0, first.err
    assert first.out == f"{tmp_path / 'out/report.md'}\n"
    assert "member 1 of 1: L" in first.err
    assert [path.name for path in (tmp_path / "out/members").iterdir()] == ["L"]
    second = tessera("study", study, *GPU, "--shard", "2/2")
    assert second.code == 0, second.err
    assert len(bundle.checkpoints(tmp_path / "out/members/S")) > 0
    again = tessera("study", study, "--report")
    assert (again.code, again.out) == (0, first.out)
    assert tessera("doctor", tmp_path / "out/members/S").code == 0  # a run like any other
    assert tessera("info", tmp_path / "out/members/S").code == 0
    other = tessera("study", study, "set.training.global_batch_size=16", *GPU)
    assert other.code == 1
    assert "training.global_batch_size was 32, is 16" in other.err


def test_a_study_with_failed_members_has_a_report_and_exit_code_3(tessera, study, tmp_path):
    words = (
        "axes.size.L.training.optimizer.learning_rate=1e30",
        "set.training.stability.max_rollbacks=1",
        "budget.steps=40",
    )
    done = tessera("study", study, *words, *GPU)
    assert done.code == 3
    assert done.out == f"{tmp_path / 'out/report.md'}\n"
    assert "error: 1 of 2 members failed: L; L: " in done.err
    assert "diverged" in (tmp_path / "out/members/L/failed.txt").read_text()
    assert "L" in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shard", "3/2"), "--shard 3/2 is not valid"),
        (("axes.size.S.network.hidden_size=17",), "S: recipe"),
        (("budget.step=3",), "unknown key 'step'; did you mean 'steps'?"),
        (("--hardware", "abacus"), "abacus"),
        (("--report",), "no study"),
    ],
)
def test_errors_are_one_message_and_write_nothing(tessera, study, tmp_path, words, message):
    done = tessera("study", study, *words)
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_members_end_with_a_killed_command_and_it_can_be_repeated(start, command, study, tmp_path):
    """With members that are spawned, not forked."""
    out = tmp_path / "out"
    words = ("study", study, "budget.steps=200", "set.training.checkpoint_every=5", *GPU)
    killed = start(*words)
    while not (out / "members/S/checkpoints/step-000000005").exists() and killed.poll() is None:
        time.sleep(0.01)
    member_pids = children(killed.pid)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    while any(alive(pid) for pid in member_pids):
        time.sleep(0.01)
    before = read_log(out / "members/S")
    stopped = start(*words)
    while read_log(out / "members/S") == before and stopped.poll() is None:
        time.sleep(0.01)
    stopped.send_signal(signal.SIGINT)
    _, err = stopped.communicate()
    assert (stopped.returncode, "Traceback" in err) == (130, False)
    assert str(out) in err.rstrip().splitlines()[-1]
    done = command(*words)
    assert done.code == 0, done.err
    assert done.out == f"{out / 'report.md'}\n"


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
