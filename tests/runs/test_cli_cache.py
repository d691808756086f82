"""`tessera data cache`: however often it is killed and however many share the work, the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tessera.data.latents import LatentsSource

pytest.importorskip("diffusers")

# Forks a life of the command again and again and kills it: what is imported once is not imported again.
KILLER = """
import json, os, pathlib, random, signal, sys, time
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from tessera import cli
from tessera.data import cache
from tessera.training import recipe
torch.set_num_threads(1)
words, out, kills = json.loads(sys.argv[1])
draw = random.Random(0)

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

def ended(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

def there():
    return len(list(pathlib.Path(out).glob("*/0*.safetensors")))

told = []
for life in range(kills):
    halves = set(pathlib.Path(out).rglob("0*.partial"))
    child, before = born(), there()
    if life % 4 == 3:  # in the midst of writing
        while set(pathlib.Path(out).rglob("0*.partial")) <= halves and not ended(child):
            pass
    elif life % 4:  # within a shard or two of its first one
        while there() == before and not ended(child):
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.04))
    else:  # anywhere, from its first instant on
        time.sleep(draw.uniform(0, 0.3))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    told.append({"killed": os.WIFSIGNALED(status), "shards": there(),
                 "half": not set(pathlib.Path(out).rglob("0*.partial")) <= halves})
_, status = os.waitpid(born(), 0)
print("\\ntold:" + json.dumps({"lives": told, "code": os.waitstatus_to_exitcode(status)}))
"""


@pytest.fixture
def recipe(tmp_path, autoencoder_folder) -> Path:
    """Drawn shapes, and an autoencoder of random weights: 128 samples are 16 shards of 8."""
    path = tmp_path / "latent.yaml"
    path.write_text(
        f"output: {tmp_path / 'run'}\ndata: {{kind: shapes, count: 128}}\n"
        f"codec: {{kind: autoencoder-kl, source: {autoencoder_folder}}}\n"
    )
    return path


def words(recipe: Path, out: Path, *more: object) -> tuple[str, ...]:
    told = ("data", "cache", recipe, "--out", out, "--samples", 8, "--batch", 4, "--device", "cpu", *more)
    return tuple(map(str, told))


def content(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def home(out: Path) -> Path:
    return next(out.iterdir())


def killed_and_gone_on(environment: dict[str, str], told: tuple[str, ...], out: Path, kills: int) -> dict:
    """Kill the command so many times, then let it end; what was seen at each kill."""
    asked = json.dumps([told, str(out), kills])
    done = subprocess.run(
        [sys.executable, "-c", KILLER, asked], env=environment, capture_output=True, text=True, check=False
    )
    assert "told:" in done.stdout, done.stderr
    return json.loads(done.stdout.rpartition("told:")[2])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize(("kills", "count"), [(4, 400), pytest.param(20, 1600, marks=pytest.mark.slow)])
def test_a_cache_killed_again_and_again_is_that_of_an_undisturbed_run(
    tessera, recipe, tmp_path, environment, kills, count
):
    many = f"data.count={count}"
    assert tessera(*words(recipe, tmp_path / "whole", "--workers", 1, many)).code == 0
    told = killed_and_gone_on(
        environment, words(recipe, tmp_path / "out", "--workers", 1, many), tmp_path / "out", kills
    )
    assert told["code"] == 0
    assert all(life["killed"] for life in told["lives"])
    shards = [life["shards"] for life in told["lives"]]
    assert shards == sorted(shards)
    assert shards[-1] < count // 8
    assert len(set(shards)) >= kills // 2  # killed at different places
    assert sum(life["half"] for life in told["lives"]) >= kills // 8  # some in the midst of writing
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_machines_and_processes_share_the_work_and_write_the_same_bytes(tessera, recipe, tmp_path):
    whole, two, parts = (tmp_path / name for name in ("whole", "two", "parts"))
    done = tessera(*words(recipe, whole, "--workers", 1))
    assert done.code == 0, done.err
    assert done.out == f"{home(whole)}\n"
    assert "128 samples" in done.err
    assert f"data.cache={whole}" in done.err
    assert tessera(*words(recipe, two, "--workers", 2)).code == 0
    assert content(two) == content(whole)

    first = tessera(*words(recipe, parts, "--workers", 1, "--shard", "1/2"))
    assert "part 1 of 2 is done: 8 of 16 files are there" in first.err
    assert not (home(parts) / "cache.json").exists()
    last = tessera(*words(recipe, parts, "--workers", 1, "--shard", "0/2"))
    assert "128 samples" in last.err
    assert content(parts) == content(whole)


@pytest.mark.slow
def test_processes_of_torchrun_write_the_same_bytes(tessera, recipe, tmp_path, environment):
    assert tessera(*words(recipe, tmp_path / "whole", "--workers", 1)).code == 0
    told = words(recipe, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tessera", *told],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{home(tmp_path / 'out')}\n"  # one speaks for all
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_verify_finds_what_is_damaged_and_the_next_run_mends_it(tessera, recipe, tmp_path):
    out = tmp_path / "out"
    assert tessera(*words(recipe, out, "--workers", 1)).code == 0
    whole = content(out)
    for target in (words(recipe, out, "--verify"), ("data", "cache", home(out), "--verify")):
        done = tessera(*target)
        assert (done.code, done.out) == (0, f"{home(out)}: 128 samples in 16 files, all as they were written\n")
    shard = home(out) / "000003.safetensors"
    changed = bytearray(shard.read_bytes())
    changed[-100] ^= 4
    shard.write_bytes(changed)
    done = tessera("data", "cache", home(out), "--verify")
    assert done.code == 1
    assert f"1 of 16 files in {home(out)} are damaged: 000003.safetensors\n" in done.err
    shard.write_bytes(changed[:-50])
    done = tessera("data", "cache", home(out), "--verify")
    assert "000003.safetensors is damaged" in done.err
    assert tessera(*words(recipe, out, "--workers", 1)).code == 0
    assert content(out) == whole


def test_verify_of_a_stale_cache_says_what_differs_and_the_command(tessera, recipe, tmp_path):
    out = tmp_path / "out"
    assert tessera(*words(recipe, out, "--workers", 1)).code == 0
    done = tessera(*words(recipe, out, "--verify", "data.split=test"))
    assert done.code == 1
    assert "data was " in done.err
    assert f"make it: tessera data cache {recipe} --out {out} --samples 8" in done.err
    assert "--verify" not in done.err


def test_a_folder_of_images_is_cached_without_a_recipe(tessera, tmp_path, autoencoder_folder):
    from PIL import Image

    (tmp_path / "photos").mkdir()
    draw = np.random.default_rng(0)
    for number in range(5):
        picture = Image.fromarray(draw.integers(0, 256, (20, 24, 3), np.uint8))
        picture.save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos/9.png").write_bytes(b"no image")
    told = ("data", "cache", tmp_path / "photos", "--out", tmp_path / "out", "--size", "16", "--device", "cpu")
    refused = tessera(*told)
    assert refused.code == 1
    assert "codec.source=FOLDER" in refused.err
    done = tessera(*told, f"codec.source={autoencoder_folder}")
    assert done.code == 0, done.err
    assert "5 samples, 1 images could not be used: skipped.jsonl says why" in done.err
    source = LatentsSource(home(tmp_path / "out"))
    assert source.gather(np.arange(5), np.ones(5, bool)).shape == (5, 8, 8, 8)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--dtype", "float32"), "--dtype is float32; expected float16 or bfloat16"),
        (("--shard", "2/2"), "--shard 2/2 is not understood"),
        (("--shard", "1"), "--shard 1 is not understood"),
        (("codec=pixels",), "is pixels: there are no latents to cache"),
        (("--size", "32"), "give data.size="),
    ],
)
def test_what_cannot_be_asked_is_one_message(tessera, recipe, tmp_path, more, said):
    done = tessera(*words(recipe, tmp_path / "out", *more))
    assert done.code == 1
    assert said in done.err
    assert not (tmp_path / "out").exists()


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="this system does not tell of its processes")
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_whatever_ends_the_command_ends_its_processes(tessera, start, recipe, tmp_path, number):
    out = tmp_path / "out"
    many = "data.count=100000"
    process = start(*words(recipe, out, "--workers", 2, many))
    while process.poll() is None and not list(out.glob("*/0*.safetensors")):
        time.sleep(0.01)
    started = children(process.pid)
    assert len([child for child in started if alive(child)]) >= 2
    process.send_signal(number)
    told, err = process.communicate()
    assert told == ""
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert err.splitlines()[-1] == f"stopped, with all whole files kept in {out}: run the same command to go on"
        assert "Traceback" not in err
    while any(map(alive, started)):
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="this system does not tell of its processes")
def test_a_process_that_is_killed_is_a_message_and_the_same_command_goes_on(tessera, start, recipe, tmp_path):
    out = tmp_path / "out"
    process = start(*words(recipe, out, "--workers", 2, "data.count=1000"))
    while process.poll() is None and not list(out.glob("*/0*.safetensors")):
        time.sleep(0.01)
    encoding = [one for one in children(process.pid) if "spawn_main" in Path(f"/proc/{one}/cmdline").read_text()]
    os.kill(encoding[0], signal.SIGKILL)
    told, err = process.communicate()
    assert (process.returncode, told) == (1, "")
    assert err.splitlines()[-1].startswith("error: a process that encodes ended before its work was done")
    assert "Traceback" not in err
    assert tessera(*words(recipe, out, "--workers", 1, "data.count=1000")).code == 0
    assert tessera(*words(recipe, tmp_path / "whole", "--workers", 1, "data.count=1000")).code == 0
    assert content(out) == content(tmp_path / "whole")
