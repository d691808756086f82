"""Launchers: repeated tasks, errors, Ctrl-C; processes of this machine."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tessera.errors import Interrupted, TesseraError
from tessera.launch import launcher, local, ray, slurm, task
from tessera.launch.local import LocalLauncher
from tessera.launch.task import Outcome, Task

pytestmark = pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")


class Scripted:
    """A launcher whose tasks end with the listed codes, attempt by attempt."""

    def __init__(self, codes: dict[str, list[int]], interrupt: bool = False) -> None:
        self.codes, self.interrupt, self.submitted, self.stopped = codes, interrupt, [], False

    def submit(self, tasks):
        self.submitted += list(tasks)

    def wait(self):
        if self.interrupt:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        last = self.submitted[-1]
        waiting = [each for each in self.submitted if self.codes[each.name]]
        each = last if self.codes[last.name] else waiting[0]
        return [Outcome(each, self.codes[each.name].pop(0), f"line of {each.name}")]

    def stop(self):
        self.stopped = True


def tasks(*names: str) -> list[Task]:
    return [Task(name, ("--version",), Path(), Path(f"{name}.log")) for name in names]


def run(scripted, names, retries=2):
    counts, messages = [], []
    outcomes = launcher.run(scripted, tasks(*names), retries, lambda *pair: counts.append(pair), messages.append)
    return outcomes, counts, messages


def test_failed_tasks_are_repeated_and_progress_counts_finished_ones():
    scripted = Scripted({"a": [0], "b": [1, -9, 0]})
    outcomes, counts, messages = run(scripted, "ab")
    assert [(outcome.task.name, outcome.code) for outcome in outcomes] == [("a", 0), ("b", 0)]
    assert counts == [(1, 2), (2, 2)]
    assert [each.name for each in scripted.submitted] == ["a", "b", "b", "b"]
    assert "b failed with exit code 1; attempt 2 of 3" in messages
    assert "b failed with SIGKILL; attempt 3 of 3" in messages


def test_a_task_that_fails_too_often_is_named_with_its_log_when_the_others_are_done():
    scripted = Scripted({"a": [0], "b": [1, 1], "c": [0]})
    with pytest.raises(TesseraError) as error:
        run(scripted, "abc", retries=1)
    text = str(error.value)
    assert text.startswith("1 of 3 tasks failed 2 times; the others are done")
    assert "b: exit code 1; log: b.log\n    line of b" in text
    assert not any(scripted.codes.values())  # c has run


def test_a_task_whose_work_failed_for_good_is_not_repeated():
    assert [outcome.code for outcome in run(Scripted({"a": [3]}), "a")[0]] == [3]


def test_a_signal_stops_the_tasks():
    scripted, before = Scripted({"a": []}, interrupt=True), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="0 of 1 tasks were done.*repeat the command to resume"):
        run(scripted, "a")
    assert scripted.stopped
    assert signal.getsignal(signal.SIGTERM) is before


PYTHON = sys.executable

# Processes: a program in place of `python -m tessera`.

PROGRAM = """#!{python}
import os, sys, time
kind = sys.argv[3]
if kind == "print":
    print(os.environ["TESSERA_CPUS"], os.environ["OMP_NUM_THREADS"], os.environ.get("CUDA_VISIBLE_DEVICES"))
elif kind == "fail":
    print("first\\nlast"); sys.exit(7)
elif kind == "wait":
    sys.path.insert(0, {root!r})
    from tessera.launch.task import exit_with_parent
    exit_with_parent()
    open(sys.argv[4], "w").write(str(os.getpid()))
    time.sleep(600)
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(python=sys.executable, root=str(Path(__file__).parents[2])))
    path.chmod(0o700)
    monkeypatch.setattr(task.sys, "executable", str(path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")

    def make(name: str, *words: str, **resources) -> Task:
        return Task(name, words, tmp_path, tmp_path / f"logs/{name}.log", **resources)

    return make


def test_a_process_has_its_cores_and_gpus_and_a_log(program):
    launched = LocalLauncher(cpus=6, gpus=3)
    each = [program(name, "print", cpus=2, gpus=1) for name in "abc"]
    outcomes = launcher.run(launched, each, 0, lambda *_: None, lambda _: None)
    launched.stop()
    assert sorted(outcome.tail for outcome in outcomes) == ["2 2 4", "2 2 5", "2 2 6"]
    assert each[0].log.read_text().strip() == outcomes[0].tail


def test_a_failed_process_returns_the_end_of_its_log(program):
    each = program("a", "fail")
    outcome = task.run_task(each)
    assert (outcome.code, outcome.tail) == (7, "first\nlast")
    assert task.run_task(each).tail == "first\nlast"  # of this attempt alone
    assert each.log.read_text() == "first\nlast\n" * 2


def test_at_most_as_many_tasks_run_as_fit(program):
    assert len(LocalLauncher(4, 0)._slots(tasks("a", "b", "c", "d", "e"))) == 4
    assert len(LocalLauncher(4, 0, parallel=2)._slots(tasks("a", "b", "c"))) == 2
    assert len(LocalLauncher(4, 0)._slots([program("a", cpus=3), program("b", cpus=3)])) == 1
    assert LocalLauncher(9, 3)._slots([program("a", gpus=2), program("b", gpus=2)]) == [["4", "5"]]
    with pytest.raises(TesseraError, match="needs 2 GPUs, and this machine has 1"):
        LocalLauncher(9, 1)._slots([program("a", gpus=2)])


def test_a_stopped_launcher_ends_its_tasks(program, tmp_path):
    launched = LocalLauncher(1, 0)
    launched.submit([program("a", "wait", str(tmp_path / "pid"))])
    pid = _wait_for_pid(tmp_path / "pid")
    launched.stop()
    assert not _alive(pid)


def test_a_task_ends_with_the_process_that_started_it(program, tmp_path):
    """Even if that one is killed. Another Python starts the task, as the one of a Ray worker does."""
    each = program("a", "wait", str(tmp_path / "pid"))
    code = (
        "import sys; from pathlib import Path; from tessera.launch import task; python = sys.executable\n"
        f"sys.executable = {task.sys.executable!r}\n"
        f"task.run_task(task.Task('a', {each.words!r}, Path({str(tmp_path)!r}), Path({str(each.log)!r})))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([PYTHON, "-c", code], env=environment) as process:
        pid = _wait_for_pid(tmp_path / "pid")
        process.kill()
    deadline = time.monotonic() + 20
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def _wait_for_pid(path: Path) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError("the task did not start")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_exception_in_a_slot_reaches_the_caller(monkeypatch):
    def fail(*_):
        raise OSError("no room for logs")

    monkeypatch.setattr(local, "run_task", fail)
    launched = LocalLauncher(1, 0)
    with pytest.raises(OSError, match="no room for logs"):
        launcher.run(launched, tasks("a"), 2, lambda *_: None, lambda _: None)
    assert not any(thread.is_alive() for thread in launched._threads)
    assert threading.current_thread() is threading.main_thread()


# SLURM without a cluster


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90:30", 91), ("4:00:00", 240), ("1-12", 2160), ("1-12:30", 2190), ("0-0:1:30", 2)],
)
def test_times_of_slurm(text, expected):
    assert slurm.minutes(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "0", "1:2:3:4"])
def test_a_time_that_slurm_does_not_know_is_an_error(text):
    with pytest.raises(TesseraError, match="time=.* is not valid"):
        slurm.minutes(text)


FAKE = {
    "sbatch": '#!/bin/sh\ncp "$1" "$(dirname "$0")/script.sh"; echo "Submitted batch job 7"',
    "srun": "#!/bin/sh\nexit 1",
    "squeue": '#!/bin/sh\ncat "$(dirname "$0")/states"',
    "scancel": '#!/bin/sh\necho "$@" > "$(dirname "$0")/cancelled"',
}


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch) -> Path:
    """Programs that answer as SLURM does, in place of a cluster."""
    pytest.importorskip("submitit")
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in FAKE.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o700)
    (folder / "states").write_text("7_0 RUNNING\n7_1 PENDING\n")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.01)
    return folder


def test_slurm_jobs_are_an_array_with_resources_and_options(fake_slurm, tmp_path):
    launched = slurm.SlurmLauncher(tmp_path / "jobs", {"partition": "gpu", "time": "2:00:00", "exclusive": ""})
    launched.submit([Task(name, (), tmp_path, tmp_path / name, cpus=4, gpus=1) for name in ("a", "b")])
    script = (fake_slurm / "script.sh").read_text()
    for line in ("array=0-1%2", "cpus-per-task=4", "gpus-per-node=1", "partition=gpu", "time=120", "requeue"):
        assert f"#SBATCH --{line}\n" in script
    assert "#SBATCH --exclusive\n" in script
    assert "#SBATCH --signal=USR2@90" in script


def test_slurm_results_are_read_and_lost_jobs_are_outcomes(fake_slurm, tmp_path, monkeypatch):
    from submitit.core.utils import cloudpickle_dump

    launched = slurm.SlurmLauncher(tmp_path / "jobs", {})
    a, b = tasks("a", "b")
    launched.submit([a, b])
    cloudpickle_dump(("success", Outcome(a, 0)), tmp_path / "jobs/7_0_0_result.pkl")
    assert launched.wait() == [Outcome(a, 0)]
    (fake_slurm / "states").write_text("7_1 PREEMPTED\n")  # and queued again later
    assert launched._outcome("7_1", launched._states()) is None
    (fake_slurm / "states").write_text("7_1 NODE_FAIL\n")
    assert launched._outcome("7_1", launched._states()) is None  # its result may appear late
    monkeypatch.setattr(slurm, "LATE_SECONDS", 0)
    (outcome,) = launched.wait()
    assert (outcome.task, outcome.code) == (b, 1)
    assert "job 7_1 ended without a result: NODE_FAIL" in outcome.tail


def test_slurm_errors_and_stop(fake_slurm, tmp_path):
    launched = slurm.SlurmLauncher(tmp_path / "jobs", {})
    launched.submit(tasks("a", "b"))
    (fake_slurm / "states").write_text("7_0 CANCELLED\n7_1 CANCELLED\n")
    launched.stop()
    assert (fake_slurm / "cancelled").read_text().split() == ["7_0", "7_1"]
    (fake_slurm / "sbatch").write_text('#!/bin/sh\necho "Invalid partition name specified" >&2; exit 1')
    with pytest.raises(TesseraError, match="sbatch refused the job: .*Invalid partition name"):
        launched.submit(tasks("c"))


@pytest.mark.parametrize(("mode", "advice"), [("", "set RAY_AUTH_MODE=token"), ("token", "may want another token")])
def test_a_ray_cluster_that_refuses_is_named_with_what_to_do_about_its_token(monkeypatch, mode, advice):
    def init(**options):
        raise ConnectionError("Failed to connect to Ray cluster at 192.0.2.2:6379")

    monkeypatch.setattr(ray, "import_ray", lambda: SimpleNamespace(is_initialized=lambda: False, init=init))
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.2:6379")
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with pytest.raises(TesseraError, match=rf"cannot reach the Ray cluster 192.0.2.2:6379: Failed .*{advice}"):
        ray.connect()
