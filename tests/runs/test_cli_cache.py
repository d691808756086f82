"""`tessera data cache`: the same bytes after any number of kills and with any number of processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessera.data.latents import LatentsDataset

pytest.importorskip("diffusers")

# Forks the command repeatedly and kills it; the fork saves the imports.
KILLER = """
import json, os, pathlib, random, signal, sys, time
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from tessera import cli
from tessera.data import cache
from tessera.training import recipe
torch.set_num_threads(1)
words, out, kills = json.loads(sys.argv[1])
generator = random.Random(0)

def start_command():
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

def has_ended(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

def num_shards():
    return len(list(pathlib.Path(out).glob("*/0*.safetensors")))

results = []
for attempt in range(kills):
    partials = set(pathlib.Path(out).rglob("0*.partial"))
    child, before = start_command(), num_shards()
    if attempt % 4 == 3:  # while writing
        while set(pathlib.Path(out).rglob("0*.partial")) <= partials and not has_ended(child):
            pass
    elif attempt % 4:  # within a shard or two of its first one
        while num_shards() == before and not has_ended(child):
            time.sleep(0.0005)
        time.sleep(generator.uniform(0, 0.04))
    else:  # at any time
        time.sleep(generator.uniform(0, 0.3))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    results.append({"killed": os.WIFSIGNALED(status), "shards": num_shards(),
                 "partial": not set(pathlib.Path(out).rglob("0*.partial")) <= partials})
_, status = os.waitpid(start_command(), 0)
print("\\nresults:" + json.dumps({"attempts": results, "code": os.waitstatus_to_exitcode(status)}))
"""


@pytest.fixture
def recipe(tmp_path, autoencoder_folder) -> Path:
    """Rendered shapes and an autoencoder with random weights: 128 samples are 16 shards of 8."""
    path = tmp_path / "latent.yaml"
    path.write_text(
        f"run_dir: {tmp_path / 'run'}\ndata: {{kind: shapes, count: 128}}\n"
        f"codec: {{kind: autoencoder-kl, source: {autoencoder_folder}}}\n"
    )
    return path


def words(recipe: Path, out: Path, *more: object) -> tuple[str, ...]:
    command = ("data", "cache", recipe, "--out", out, "--shard-size", 8, "--batch-size", 4, "--device", "cpu", *more)
    return tuple(map(str, command))


def content(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def cache_folder(out: Path) -> Path:
    return next(out.iterdir())


def kill_and_resume(environment: dict[str, str], command: tuple[str, ...], out: Path, kills: int) -> dict:
    """Kill the command `kills` times, then let it finish; returns the state at each kill."""
    arguments = json.dumps([command, str(out), kills])
    done = subprocess.run(
        [sys.executable, "-c", KILLER, arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert "results:" in done.stdout, done.stderr
    return json.loads(done.stdout.rpartition("results:")[2])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize(("kills", "count"), [(2, 200), pytest.param(20, 1600, marks=pytest.mark.slow)])
def test_a_cache_killed_repeatedly_equals_an_uninterrupted_one(tessera, recipe, tmp_path, environment, kills, count):
    many = f"data.count={count}"
    assert tessera(*words(recipe, tmp_path / "whole", "--workers", 1, many)).code == 0
    results = kill_and_resume(
        environment, words(recipe, tmp_path / "out", "--workers", 1, many), tmp_path / "out", kills
    )
    assert results["code"] == 0
    assert all(attempt["killed"] for attempt in results["attempts"])
    shards = [attempt["shards"] for attempt in results["attempts"]]
    assert shards == sorted(shards)
    assert shards[-1] < count // 8
    assert len(set(shards)) >= kills // 2  # killed at different times
    assert sum(attempt["partial"] for attempt in results["attempts"]) >= kills // 8  # some while writing
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_shards_and_processes_write_the_same_bytes(tessera, recipe, tmp_path):
    whole, two, parts = (tmp_path / name for name in ("whole", "two", "parts"))
    done = tessera(*words(recipe, whole, "--workers", 1))
    assert done.code == 0, done.err
    assert done.out == f"{cache_folder(whole)}\n"
    assert "128 samples" in done.err
    assert f"data.cache={whole}" in done.err
    assert tessera(*words(recipe, two, "--workers", 2)).code == 0
    assert content(two) == content(whole)

    first = tessera(*words(recipe, parts, "--workers", 1, "--shard", "2/2"))
    assert "shard 2/2 is done: 8 of 16 files exist" in first.err
    assert not (cache_folder(parts) / "cache.json").exists()
    last = tessera(*words(recipe, parts, "--workers", 1, "--shard", "1/2"))
    assert "128 samples" in last.err
    assert content(parts) == content(whole)


@pytest.mark.slow
def test_processes_of_torchrun_write_the_same_bytes(tessera, recipe, tmp_path, environment):
    assert tessera(*words(recipe, tmp_path / "whole", "--workers", 1)).code == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tessera"]
    command = [*torchrun, *words(recipe, tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{cache_folder(tmp_path / 'out')}\n"  # only one process prints
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_verify_finds_damage_and_the_next_run_repairs_it(tessera, recipe, tmp_path):
    out = tmp_path / "out"
    assert tessera(*words(recipe, out, "--workers", 1)).code == 0
    whole = content(out)
    for target in (words(recipe, out, "--verify"), ("data", "cache", cache_folder(out), "--verify")):
        done = tessera(*target)
        assert (done.code, done.out) == (0, f"{cache_folder(out)}: 128 samples in 16 files, all checksums match\n")
    shard = cache_folder(out) / "000003.safetensors"
    changed = bytearray(shard.read_bytes())
    changed[-100] ^= 4
    shard.write_bytes(changed)
    done = tessera("data", "cache", cache_folder(out), "--verify")
    assert done.code == 1
    assert f"1 of 16 files in {cache_folder(out)} are damaged: 000003.safetensors\n" in done.err
    shard.write_bytes(changed[:-50])
    done = tessera("data", "cache", cache_folder(out), "--verify")
    assert "000003.safetensors" in done.err
    assert tessera(*words(recipe, out, "--workers", 1)).code == 0
    assert content(out) == whole


def test_verify_of_another_cache_reports_the_differences_and_the_command(tessera, recipe, tmp_path):
    out = tmp_path / "out"
    assert tessera(*words(recipe, out, "--workers", 1)).code == 0
    done = tessera(*words(recipe, out, "--verify", "data.split=test"))
    assert done.code == 1
    assert "data was " in done.err
    assert f"create it: tessera data cache {recipe} --out {out} --shard-size 8" in done.err
    assert "--verify" not in done.err


def test_a_folder_of_images_is_cached_without_a_recipe(tessera, tmp_path, autoencoder_folder):
    from PIL import Image

    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8))
        image.save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos/9.png").write_bytes(b"no image")
    command = ("data", "cache", tmp_path / "photos", "--out", tmp_path / "out", "--size", "16", "--device", "cpu")
    done = tessera(*command)
    assert done.code == 1
    assert "codec.source=FOLDER" in done.err
    done = tessera(*command, f"codec.source={autoencoder_folder}")
    assert done.code == 0, done.err
    assert "5 samples, 1 invalid images, listed in skipped.jsonl" in done.err
    dataset = LatentsDataset(cache_folder(tmp_path / "out"))
    assert dataset.gather(np.arange(5), np.ones(5, bool)).shape == (5, 8, 8, 8)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--shard", "3/2"), "--shard 3/2 is not valid"),
        (("codec=pixels",), "is pixels, which has no latents to cache"),
        (("--size", "32"), "give data.size="),
    ],
)
def test_wrong_arguments(tessera, recipe, tmp_path, more, message):
    done = tessera(*words(recipe, tmp_path / "out", *more))
    assert done.code == 1
    assert message in done.err
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_starts_from_a_model_uses_its_codec(tessera, tmp_path):
    """`emoji` has a tiny autoencoder, and the recipe names none. A LoRA then trains on the cache."""
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(image).save(tmp_path / "images/a.png")
    (tmp_path / "images/a.txt").write_text("blue heart")
    settings = ("training.init_from=emoji", f"data.path={tmp_path / 'images'}", f"data.cache={tmp_path / 'latents'}")
    done = tessera("data", "cache", "recipes/lora.yaml", *settings, "--workers", 1)
    assert done.code == 0, done.err
    training = (
        "training.steps=1",
        "training.global_batch_size=1",
        "training.sample_every=null",
        f"run_dir={tmp_path / 'run'}",
    )
    done = tessera("train", "recipes/lora.yaml", *settings, *training)
    assert done.code == 0, done.err


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="this system does not list processes")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_processes_end_with_the_command(tessera, start, recipe, tmp_path, number):
    out = tmp_path / "out"
    many = "data.count=100000"
    process = start(*words(recipe, out, "--workers", 2, many))
    while process.poll() is None and not list(out.glob("*/0*.safetensors")):
        time.sleep(0.01)
    started = children(process.pid)
    assert len([child for child in started if alive(child)]) >= 2
    process.send_signal(number)
    output, err = process.communicate()
    assert output == ""
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert err.splitlines()[-1] == f"interrupted; the complete files are in {out}: repeat the command to resume"
        assert "Traceback" not in err
    while any(map(alive, started)):
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="this system does not list processes")
def test_a_killed_process_is_an_error_and_the_same_command_resumes(tessera, start, recipe, tmp_path):
    out = tmp_path / "out"
    process = start(*words(recipe, out, "--workers", 2, "data.count=1000"))
    while process.poll() is None and not list(out.glob("*/0*.safetensors")):
        time.sleep(0.01)
    workers = [one for one in children(process.pid) if "spawn_main" in Path(f"/proc/{one}/cmdline").read_text()]
    os.kill(workers[0], signal.SIGKILL)
    output, err = process.communicate()
    assert (process.returncode, output) == (1, "")
    assert err.splitlines()[-1].startswith("error: a worker process died")
    assert "Traceback" not in err
    assert tessera(*words(recipe, out, "--workers", 1, "data.count=1000")).code == 0
    assert tessera(*words(recipe, tmp_path / "whole", "--workers", 1, "data.count=1000")).code == 0
    assert content(out) == content(tmp_path / "whole")
