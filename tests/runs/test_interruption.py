"""A run that is interrupted, killed at any instant, and gone on with ends as if nothing had happened, bit for bit."""

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

# Forks a life of the command again and again and kills it: what is imported once is not imported again.
KILLER = """
import json, os, pathlib, random, signal, sys, time
import sklearn.datasets, torch
from tessera import cli
from tessera.training import loop
torch.set_num_threads(1)
words, run, kills = json.loads(sys.argv[1])
checkpoints, draw = pathlib.Path(run, "checkpoints"), random.Random(0)

def born():
    child = os.fork()
    if child:
        return child
    code = 0
    try:
        sys.argv = ["tessera", *words]
        cli.main()
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        code = 70
    os._exit(code)

def newest():
    return max((path.name for path in checkpoints.glob("step-" + "[0-9]" * 9) if int(path.name[5:])), default="")

told = []
for life in range(kills):
    child, before = born(), newest()
    if life % 3:  # within a step or two of its first checkpoint
        while newest() == before and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.04))
    else:  # anywhere, from its first instant on
        time.sleep(draw.uniform(0, 0.25))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    told.append({"killed": os.WIFSIGNALED(status), "newest": newest(),
                 "half": any(path.suffix == ".partial" for path in pathlib.Path(run).rglob("*"))})
_, status = os.waitpid(born(), 0)
print("\\ntold:" + json.dumps({"lives": told, "code": os.waitstatus_to_exitcode(status)}))
"""


def state(run: Path) -> dict[str, bytes]:
    """The tensors of the newest checkpoint, byte for byte; headers of files are in no fixed order."""
    newest = bundle.checkpoints(run)[0]
    return {
        f"{path.relative_to(newest)} {name}": tensor.numpy().tobytes()
        for path in sorted(newest.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def untimed(run: Path) -> list[dict]:
    """The log without what differs from time to time."""
    timed = ("images_per_second", "utilisation", "stalled", "memory")
    return [{name: value for name, value in record.items() if name not in timed} for record in read_log(run)]


def killed_and_gone_on(recipe: Path, run: Path, environment: dict[str, str], kills: int, *words: str) -> dict:
    """Kill the command so many times, then let it end; what was seen at each kill."""
    asked = json.dumps([["train", str(recipe), *words], str(run), kills])
    done = subprocess.run(
        [sys.executable, "-c", KILLER, asked], env=environment, capture_output=True, text=True, check=False
    )
    assert "told:" in done.stdout, done.stderr
    return json.loads(done.stdout.rpartition("told:")[2])


def is_whole(run: Path, whole: Path) -> None:
    assert state(run) == state(whole)
    assert [record["step"] for record in read_log(run)] == list(range(1, STEPS + 1))
    assert untimed(run) == untimed(whole)
    assert not list(run.rglob("*.partial"))
    assert len(bundle.checkpoints(run)) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_run_killed_again_and_again_ends_as_an_uninterrupted_one(tessera, recipe, tmp_path, environment):
    words = (f"training.steps={STEPS}", *EVERY_STEP, "training.optimizer=muon", "training.ema.extra_decays=[0.9, 0.99]")
    assert tessera("train", recipe, *words, f"output={tmp_path / 'whole'}", "training.checkpoint_every=40").code == 0
    told = killed_and_gone_on(recipe, tmp_path / "run", environment, 8, *words)
    assert told["code"] == 0
    lives = told["lives"]
    assert sum(life["killed"] for life in lives) >= 4
    steps = [life["newest"] for life in lives]
    assert steps == sorted(steps)
    assert len(set(steps)) >= 4  # killed at different places
    is_whole(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_run_killed_in_the_midst_of_writing(tessera, recipe, tmp_path, environment):
    """Many runs of many kills each; some kills must have left something half-written."""
    words = (f"training.steps={STEPS}", *EVERY_STEP)
    assert tessera("train", recipe, *words, f"output={tmp_path / 'whole'}", "training.checkpoint_every=40").code == 0
    half = 0
    for number in range(3):
        run = tmp_path / f"run{number}"
        told = killed_and_gone_on(recipe, run, environment, 20, *words, f"output={run}")
        assert told["code"] == 0
        half += sum(life["half"] for life in told["lives"])
        is_whole(run, tmp_path / "whole")
    assert half >= 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_ends_and_the_same_command_goes_on(tessera, start, recipe, tmp_path, number):
    words = ("training.steps=200",)
    process = start("train", recipe, *words)
    log = tmp_path / "run/log.jsonl"
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 3):
        time.sleep(0.002)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert out == ""
    said = err.splitlines()[-2:]
    stopped = bundle.checkpoints(tmp_path / "run")
    assert len(stopped) == 2  # with that of step 0
    step = int(stopped[0].name.removeprefix("step-"))
    assert said[0] == f"stopped at step {step} of 200, everything saved in {tmp_path / 'run'}"
    assert said[1] == "run the same command again to go on"
    assert "Traceback" not in err
    assert tessera("train", recipe, *words).code == 0
    assert tessera("train", recipe, *words, f"output={tmp_path / 'whole'}").code == 0
    assert state(tmp_path / "run") == state(tmp_path / "whole")
    assert [record["step"] for record in read_log(tmp_path / "run")] == list(range(1, 201))
