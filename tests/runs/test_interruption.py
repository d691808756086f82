"""A run that is interrupted or killed at any instant and resumed ends bit for bit like one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tessera import bundle
from tessera.monitoring.logger import read_log

STEPS = 80
EVERY_STEP = ("training.checkpoint_every=1", "training.sample_every=7", "training.keep_last=2")

# Forks the command again and again and kills it. A fork does not repeat the imports.
KILLER = """
import json, os, pathlib, random, signal, sys, time
import sklearn.datasets, torch
from tessera import cli
from tessera.training import loop
torch.set_num_threads(1)
words, run, kills = json.loads(sys.argv[1])
checkpoints, rng = pathlib.Path(run, "checkpoints"), random.Random(0)

def fork():
    child = os.fork()
    if child:
        return child
    code = 0
    try:
        sys.argv = ["tessera", *words]
        cli.main()
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:
        code = 70
    os._exit(code)

def newest():
    return max((path.name for path in checkpoints.glob("step-" + "[0-9]" * 9) if int(path.name[5:])), default="")

records = []
for number in range(kills):
    child, before = fork(), newest()
    if number % 3:  # within a step or two of its first checkpoint
        while newest() == before and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.04))
    else:  # at any time from the start
        time.sleep(rng.uniform(0, 0.25))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    records.append({"killed": os.WIFSIGNALED(status), "newest": newest(),
                 "partial": any(path.suffix == ".partial" for path in pathlib.Path(run).rglob("*"))})
_, status = os.waitpid(fork(), 0)
print("\\nresult:" + json.dumps({"kills": records, "code": os.waitstatus_to_exitcode(status)}))
"""


def state(run: Path) -> dict[str, bytes]:
    """The tensors of the newest checkpoint as bytes; the headers of the files have no fixed order."""
    newest = bundle.checkpoints(run)[0]
    return {
        f"{path.relative_to(newest)} {name}": tensor.numpy().tobytes()
        for path in sorted(newest.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def untimed(run: Path) -> list[dict]:
    """The log without timings and memory."""
    timed = ("images_per_second", "mfu", "data_wait", "memory")
    return [{name: value for name, value in record.items() if name not in timed} for record in read_log(run)]


def kill_and_resume(recipe: Path, run: Path, environment: dict[str, str], kills: int, *words: str) -> dict:
    """Kill the command repeatedly, then let it end. Returns a record of each kill."""
    arguments = json.dumps([["train", str(recipe), *words], str(run), kills])
    process = subprocess.run(
        [sys.executable, "-c", KILLER, arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert "result:" in process.stdout, process.stderr
    return json.loads(process.stdout.rpartition("result:")[2])


def check_equal(run: Path, whole: Path) -> None:
    assert state(run) == state(whole)
    assert [record["step"] for record in read_log(run)] == list(range(1, STEPS + 1))
    assert untimed(run) == untimed(whole)
    assert not list(run.rglob("*.partial"))
    assert len(bundle.checkpoints(run)) == 2


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_run_killed_again_and_again_ends_like_an_uninterrupted_one(tessera, recipe, tmp_path, environment):
    words = (f"training.steps={STEPS}", *EVERY_STEP, "training.optimizer=muon", "training.ema.extra_decays=[0.9, 0.99]")
    assert tessera("train", recipe, *words, f"run_dir={tmp_path / 'whole'}", "training.checkpoint_every=40").code == 0
    result = kill_and_resume(recipe, tmp_path / "run", environment, 8, *words)
    assert result["code"] == 0
    assert sum(kill["killed"] for kill in result["kills"]) >= 4
    steps = [kill["newest"] for kill in result["kills"]]
    assert steps == sorted(steps)
    assert len(set(steps)) >= 4  # killed at different steps
    check_equal(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_run_killed_while_it_writes(tessera, recipe, tmp_path, environment):
    """Many runs with many kills each; some kills must leave partial files."""
    words = (f"training.steps={STEPS}", *EVERY_STEP)
    assert tessera("train", recipe, *words, f"run_dir={tmp_path / 'whole'}", "training.checkpoint_every=40").code == 0
    partial = 0
    for number in range(3):
        run = tmp_path / f"run{number}"
        result = kill_and_resume(recipe, run, environment, 20, *words, f"run_dir={run}")
        assert result["code"] == 0
        partial += sum(kill["partial"] for kill in result["kills"])
        check_equal(run, tmp_path / "whole")
    assert partial >= 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_a_checkpoint_and_the_same_command_resumes(tessera, start, recipe, tmp_path, number):
    words = ("training.steps=200",)
    process = start("train", recipe, *words)
    log = tmp_path / "run/log.jsonl"
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 3):
        time.sleep(0.002)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert out == ""
    message = err.splitlines()[-2:]
    saved = bundle.checkpoints(tmp_path / "run")
    assert len(saved) == 2  # with that of step 0
    step = int(saved[0].name.removeprefix("step-"))
    assert message[0] == f"stopped at step {step} of 200, everything is saved in {tmp_path / 'run'}"
    assert message[1] == "run the same command again to resume"
    assert "Traceback" not in err
    assert tessera("train", recipe, *words).code == 0
    assert tessera("train", recipe, *words, f"run_dir={tmp_path / 'whole'}").code == 0
    assert state(tmp_path / "run") == state(tmp_path / "whole")
    assert [record["step"] for record in read_log(tmp_path / "run")] == list(range(1, 201))
