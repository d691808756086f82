"""`tessera data check` and `tessera data build` on the command line."""

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
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path):
    """Fifty images of two classes. Two are copies, one is empty."""
    for number in range(50):
        path = tmp_path / f"my data/{('cat', 'dog')[number % 2]}/{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number % 48) if number != 5 else b"")
    return tmp_path / "my data"


def test_table_report_and_decisions(tessera, data, tmp_path):
    done = tessera("data", "check", data, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "error" in done.out
    assert "files without content" in done.out
    assert f"47 of 50 samples accepted; report in {tmp_path / 'out/report.html'}" in done.out
    decisions = [json.loads(line) for line in (tmp_path / "out/decisions.jsonl").read_text().splitlines()]
    assert [one["name"] for one in decisions if not one["keep"]] == ["cat/48.png", "dog/05.png", "dog/49.png"]
    assert {tuple(one) for one in decisions} == {("name", "keep", "reasons")}
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<img") == 3 + 4  # charts, and two pairs of copies; the empty file has no thumbnail
    assert "<script" not in page
    assert "http" not in page


def test_the_suggested_command_writes_the_index(tessera, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = tessera("data", "check", data, "--json")
    findings = {finding["kind"]: finding for finding in json.loads(done.out)["findings"]}
    assert set(findings) == {"empty", "duplicates"}
    assert findings["duplicates"]["groups"] == [[0, 24], [25, 49]]
    (command,) = findings["duplicates"]["commands"]
    assert "data.path=accepted.parquet" in findings["duplicates"]["advice"]
    assert f"'{data}'" in command
    import shlex

    done = tessera(*shlex.split(command)[1:])
    assert done.code == 0, done.err
    assert len(index.read(tmp_path / "accepted.parquet")) == 47


def test_shards_and_then_the_report(tessera, data, tmp_path):
    words = ("data", "check", data, "--out", tmp_path / "out")
    for shard in ("2/2", "1/2"):
        done = tessera(*words, "--shard", shard)
        assert done.code == 0, done.err
        assert f"shard {shard} of {data} is done" in done.out
        assert not (tmp_path / "out/report.html").exists()
    assert tessera(*words).code == 0
    assert (tmp_path / "out/report.html").exists()


def test_wrong_arguments(tessera, data, tmp_path):
    assert "did you mean 'duplicates'" in tessera("data", "check", data, "--exclude", "duplicate").err
    assert "must end in .parquet" in tessera("data", "check", data, "--write-index", "accepted.csv").err
    assert "--shard 3/2 is not valid" in tessera("data", "check", data, "--shard", "3/2").err
    assert "no data at" in tessera("data", "check", tmp_path / "nowhere").err


def test_a_recipe_sets_the_size(tessera, data, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"data: {{kind: files, path: '{data}', size: 64}}\n")
    done = tessera("data", "check", tmp_path / "mine.yaml", "--out", tmp_path / "out", "--json")
    counts = {finding["kind"]: finding["count"] for finding in json.loads(done.out)["findings"]}
    assert counts == {"empty": 1, "duplicates": 2, "small": 49}


@pytest.mark.slow
def test_processes_of_torchrun_are_the_shards(data, tmp_path):
    for number in range(100, 1200):
        (data / f"cat/{number}.png").hardlink_to(data / "cat/00.png")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tessera"]
    words += ["data", "check", str(data), "--out", str(tmp_path / "out"), "--workers", "1"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("samples accepted") == 1
    assert len((tmp_path / "out/decisions.jsonl").read_text().splitlines()) == 1150


def test_an_interrupted_check_resumes(data, tmp_path):
    for number in range(100, 6_000):
        (data / f"cat/{number}.png").hardlink_to(data / "cat/00.png")
    words = [sys.executable, "-m", "tessera", "data", "check", str(data), "--out", str(tmp_path / "out")]
    words += ["--workers", "2"]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while running.poll() is None and not list((tmp_path / "out/parts").glob("*.arrow")):
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)  # to all its processes, as a terminal does
    out, err = running.communicate()
    message = f"interrupted; measurements so far are in {tmp_path / 'out'}: repeat the command to resume\n"
    assert (running.returncode, out, err) == (130, "", message)
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/parts").glob("*.arrow")}
    assert written
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {name: (tmp_path / "out/parts" / name).stat().st_mtime_ns for name in written} == written


def test_a_data_set_is_built_in_shards_of_the_work(tessera, data, tmp_path):
    recipe = tmp_path / "build.yaml"
    recipe.write_text(f"{{sources: {data}, output: {tmp_path / 'out'}, size: 512}}")
    words = ("data", "build", recipe, "size=16", "samples_per_shard=20", "exclude=[duplicates]", "--workers", 1)
    first = tessera(*words, "--shard", "1/2")
    assert first.code == 0, first.err
    assert "2 of 3 files exist" in first.out
    done = tessera(*words)
    assert done.out.startswith("47 of 50 samples in 3 files, ")
    assert "left out:            2 duplicates\n  left out:            1 empty" in done.out
    assert f"to train on it: data.path={tmp_path / 'out/index.parquet'}" in done.out
    failed = tessera(*words, "size=8")
    assert failed.code == 1
    assert "begun with another recipe:\n  size: 16 there, 8 now" in failed.err
    assert "unknown key 'siz'; did you mean 'size'?" in tessera("data", "build", recipe, "siz=8").err
    assert "no recipe at" in tessera("data", "build", tmp_path / "none.yaml").err
