"""`tessera data check` as people type it."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tessera.data import index


def png(number: int) -> bytes:
    held = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST).save(held, "PNG")
    return held.getvalue()


@pytest.fixture
def data(tmp_path):
    """Fifty images of two classes; one is a copy, one is empty."""
    for number in range(50):
        path = tmp_path / f"my data/{('cat', 'dog')[number % 2]}/{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number % 48) if number != 5 else b"")
    return tmp_path / "my data"


def test_table_page_and_decisions(tessera, data, tmp_path):
    done = tessera("data", "check", data, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "wrong" in done.out
    assert "1 file has no content" in done.out
    assert f"47 of 50 samples are kept; report in {tmp_path / 'out/report.html'}" in done.out
    decisions = [json.loads(line) for line in (tmp_path / "out/decisions.jsonl").read_text().splitlines()]
    assert [one["name"] for one in decisions if not one["keep"]] == ["cat/48.png", "dog/05.png", "dog/49.png"]
    assert {tuple(one) for one in decisions} == {("name", "keep", "reasons")}
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<img") == 4  # two pairs of copies; the empty one has no picture
    assert "<script" not in page
    assert "http" not in page


def test_the_command_it_suggests_does_what_it_says(tessera, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = tessera("data", "check", data, "--json")
    told = {finding["kind"]: finding for finding in json.loads(done.out)["findings"]}
    assert set(told) == {"empty", "duplicates"}
    assert told["duplicates"]["groups"] == [[0, 24], [25, 49]]
    command, _, line = told["duplicates"]["advice"][0].partition(", then ")
    assert line == "data.path=kept.parquet"
    assert f"'{data}'" in command
    import shlex

    done = tessera(*shlex.split(command)[1:])
    assert done.code == 0, done.err
    assert len(index.open(tmp_path / "kept.parquet")) == 47


def test_shards_and_then_the_whole(tessera, data, tmp_path):
    words = ("data", "check", data, "--out", tmp_path / "out")
    for shard in ("1/2", "0/2"):
        done = tessera(*words, "--shard", shard)
        assert done.code == 0, done.err
        assert f"shard {shard} of {data} is looked at" in done.out
        assert not (tmp_path / "out/report.html").exists()
    assert tessera(*words).code == 0
    assert (tmp_path / "out/report.html").exists()


@pytest.mark.parametrize("shard", ["2/2", "1", "a/b", "0/0"])
def test_shards_that_are_none(tessera, data, shard):
    done = tessera("data", "check", data, "--shard", shard)
    assert done.code == 1
    assert done.err == f"error: --shard {shard} is not understood; write 0/4 to 3/4 for four shards\n"


def test_what_is_asked_wrongly(tessera, data, tmp_path):
    assert "did you mean 'duplicates'" in tessera("data", "check", data, "--drop", "duplicate").err
    assert "must end in .parquet" in tessera("data", "check", data, "--apply", "kept.csv").err
    assert "no data at" in tessera("data", "check", tmp_path / "nowhere").err


def test_a_recipe_says_the_size_and_the_background(tessera, data, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"data: {{kind: files, path: '{data}', size: 64}}\n")
    done = tessera("data", "check", tmp_path / "mine.yaml", "--out", tmp_path / "out", "--json")
    told = {finding["kind"]: finding["count"] for finding in json.loads(done.out)["findings"]}
    assert told == {"empty": 1, "duplicates": 2, "small": 49}


def test_processes_of_torchrun_are_the_shards(data, tmp_path):
    for number in range(100, 1200):
        (data / f"cat/{number}.png").hardlink_to(data / "cat/00.png")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tessera"]
    words += ["data", "check", str(data), "--out", str(tmp_path / "out"), "--workers", "1"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("samples are kept") == 1
    assert len((tmp_path / "out/decisions.jsonl").read_text().splitlines()) == 1150


def test_interrupted_it_ends_with_one_line_and_goes_on(data, tmp_path):
    for number in range(100, 20_000):
        (data / f"cat/{number}.png").hardlink_to(data / "cat/00.png")
    words = [sys.executable, "-m", "tessera", "data", "check", str(data), "--out", str(tmp_path / "out")]
    words += ["--workers", "2"]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while running.poll() is None and not list((tmp_path / "out/parts").glob("*.arrow")):
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to all of its processes
    out, err = running.communicate()
    told = f"stopped, with what was seen kept in {tmp_path / 'out'}: run the same command to go on\n"
    assert (running.returncode, out, err) == (130, "", told)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/parts").glob("*.arrow")}
    assert kept
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {name: (tmp_path / "out/parts" / name).stat().st_mtime_ns for name in kept} == kept
