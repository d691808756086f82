"""--launch: commands as tasks, with the bytes of one process; errors."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessera.cli import launching
from tessera.errors import TesseraError


def test_the_words_of_a_task_are_those_of_the_command_with_its_shard():
    words = ["study", "s.yaml", "--launch", "ray", "a=1", "--tasks=4", "--launch-option", "gpus=1", "--retry"]
    assert launching.own_words(words) == ["study", "s.yaml", "a=1", "--retry"]
    assert launching.task_words(["study", "s.yaml"], 1, 4) == ("study", "s.yaml", "--shard", "2/4")
    assert launching.task_words(["a", "--", "-x"], 0, 2) == ("a", "--shard", "1/2", "--", "-x")
    assert launching.parse_options(["partition=gpu", "--exclusive", "gres=gpu:1"]) == {
        "partition": "gpu", "exclusive": "", "gres": "gpu:1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tasks", "2"), "--tasks and --launch-option are for --launch"),
        (("--launch", "local"), "--launch local needs the number of tasks: add --tasks 4"),
        (("--launch", "local", "--tasks", "2", "--shard", "1/2"), "leave --shard out"),
        (("--launch", "local", "--tasks", "2", "--launch-option", "partition=x"), "partition is not known to --launch"),
        (("--launch", "local", "--tasks", "2", "--launch-option", "cpus=few"), "cpus=few is not valid"),
        (("--launch", "local", "--tasks", "2", "--launch-option", "cpus=0"), "at least 1"),
    ],
)
def test_errors_of_the_options(tessera, tmp_path, words, message):
    done = tessera("data", "check", tmp_path, *words)
    assert done.code == 1
    assert message in done.err


@pytest.mark.parametrize(("kind", "module", "extra"), [("ray", "ray", "ray"), ("slurm", "submitit", "slurm")])
def test_a_launcher_that_is_not_installed_names_its_extra(monkeypatch, kind, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TesseraError, match=rf"not installed: pip install 'tessera\[{extra}\]'"):
        launching.Launch.parse(kind, 2, None)


def test_slurm_needs_its_programs(monkeypatch, tmp_path):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TesseraError, match="SLURM's sbatch, which is not on this machine"):
        launching.Launch.parse("slurm", 2, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--nodes", "2"), "--nodes and --launch-option are for --launch"),
        (("--launch", "ray"), "--launch ray needs the number of machines: add --nodes 2"),
        (("--launch", "ray", "--nodes", "2", "run_dir=s3://bucket/run"), "works for the processes of one machine"),
        (("--launch", "slurm", "--nodes", "2", "--resume", "never"), "--resume never would refuse the restart"),
        (("--launch", "ray", "--nodes", "2", "--launch-option", "partition=x"), "partition is not known to --launch"),
    ],
)
def test_errors_of_a_launched_training(tessera, recipe, words, message):
    done = tessera("train", recipe, *words)
    assert (done.code, message in done.err) == (1, True), done.err


def test_sampling_into_a_folder_cannot_be_launched(tessera, trained):
    done = tessera("sample", trained, "--launch", "local", "--tasks", "2")
    assert (done.code, "add --npz FILE" in done.err) == (1, True)
    assert "add --npz FILE" in tessera("sample", trained, "--shard", "1/2").err


def without_date(content: bytes) -> bytes:
    """Without the time of a check."""
    return re.sub(rb"\d{4}-\d\d-\d\d \d\d:\d\d UTC", b"", content)


def contents(folder: Path, pattern: str = "**/*") -> dict[str, bytes]:
    files = (path for path in folder.glob(pattern) if path.is_file() and path.name != ".lock")
    return {
        str(path.relative_to(folder)): without_date(path.read_bytes())
        for path in files
        if launching.FOLDER not in path.parts
    }


@pytest.fixture
def images(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    folder = tmp_path / "images"
    for number in range(1100):  # three parts of a check
        path = folder / f"{number % 2}/{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (8, 8), np.uint8)).save(path)
    return folder


def test_a_check_as_tasks_writes_the_same_files(command, images, tmp_path):
    for name, words in {"one": (), "tasks": ("--launch", "local", "--tasks", "2")}.items():
        (tmp_path / name).mkdir()
        done = command("data", "check", images, "--out", "check", *words, cwd=tmp_path / name)
        assert done.code == 0, done.err
    assert contents(tmp_path / "one") == contents(tmp_path / "tasks")
    assert "shard 1/2 is done" in done.err
    assert "accepted; report in" in done.out
    assert "shard 2/2" in (tmp_path / "tasks/check/launch/shard-2.log").read_text()


@pytest.mark.slow
def test_samples_and_scores_as_tasks_are_the_same(command, trained, tmp_path):
    launch = ("--launch", "local", "--tasks", "2")
    for name, words in {"one": (), "tasks": launch}.items():
        (tmp_path / name).mkdir()
        done = command("sample", trained, "--npz", "a.npz", "--num-samples", 300, *words, cwd=tmp_path / name)
        assert (done.code, done.out) == (0, "300 images in a.npz\n"), done.err
        score = ("evaluate", tmp_path / "one/a.npz", "--reference", "digits", "--metrics", "fd", "--out", "scores")
        done = command(*score, *words, cwd=tmp_path / name)
        assert done.code == 0, done.err
    assert contents(tmp_path / "one") == contents(tmp_path / "tasks")


@pytest.mark.slow
def test_a_task_that_fails_is_named_with_its_log(command, images, tmp_path):
    (tmp_path / "check").mkdir()
    (tmp_path / "check/parts").write_text("a file in place of the folder")
    words = ("--launch", "local", "--tasks", "2", "--launch-option", "retries=1", "--out", "check")
    done = command("data", "check", images, *words, cwd=tmp_path)
    assert done.code == 1
    assert "error: 2 of 2 tasks failed 2 times" in done.err
    assert "shard 1/2: exit code 1; log: " in done.err
    assert "    error: cannot write check/parts" in done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_a_cache_as_tasks_has_the_same_files(command, images, autoencoder_folder, tmp_path):
    words = ("data", "cache", images, f"codec.source={autoencoder_folder}", "--size", 8, "--shard-size", 300)
    for name, launch in {"one": (), "tasks": ("--launch", "local", "--tasks", "3")}.items():
        done = command(*words, "--out", tmp_path / name, "--device", "cpu", *launch)
        assert done.code == 0, done.err
        assert "to train on it: " in done.err
    files = contents(tmp_path / "one")
    assert len([name for name in files if name.endswith(".safetensors")]) == 4 + 1
    assert files == contents(tmp_path / "tasks")


@pytest.mark.slow
def test_a_build_as_tasks_has_the_same_files(command, images, tmp_path):
    (tmp_path / "build.yaml").write_text("size: 8\nsamples_per_shard: 300\n")
    for name, launch in {"one": (), "tasks": ("--launch", "local", "--tasks", "2")}.items():
        words = (f"sources={images}", "output=built")
        (tmp_path / name).mkdir()
        done = command("data", "build", tmp_path / "build.yaml", *words, *launch, cwd=tmp_path / name)
        assert done.code == 0, done.err
    files = contents(tmp_path / "one")
    assert len([name for name in files if name.endswith(".tar")]) == 4
    assert {name for name in files if "/work/" not in name} == {
        name for name in contents(tmp_path / "tasks") if "/work/" not in name
    }
    for name, content in contents(tmp_path / "tasks").items():
        assert "/work/" in name or content == files[name], name


@pytest.fixture
def clips(tmp_path) -> Path:
    """550 clips of three to six frames with captions, one of them damaged: two parts of a check."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "clips"
    for number in range(550):
        pixels = generator.integers(0, 255, (3 + number % 4, 16, 16, 3), np.uint8)
        path = folder / f"{number % 2}/{number:04d}.gif"
        path.parent.mkdir(parents=True, exist_ok=True)
        images = [Image.fromarray(frame) for frame in pixels]
        images[0].save(path, save_all=True, append_images=images[1:], duration=200)
        path.with_suffix(".txt").write_text(f"noise {number}")
    path.write_bytes(path.read_bytes()[:40])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["check", "build", "cache"])
def test_clips_as_tasks_are_the_same_files(command, clips, autoencoder_folder, tmp_path, verb):
    (tmp_path / "build.yaml").write_text("{size: 8, frames: 4, fps: 5, encoding: webp, samples_per_shard: 100}")
    settings = ("data.frames=4", "data.fps=5", f"codec.source={autoencoder_folder}")
    words, pattern, count = {
        "check": (("check", clips, "--frames", 4, "--fps", 5, "--size", 8), "out/parts/*", 2),
        "build": (("build", tmp_path / "build.yaml", f"sources={clips}"), "out/shards/*", 5),  # of long clips
        "cache": (("cache", clips, *settings, "--size", 8, "--shard-size", 150), "out/*/0*.safetensors", 4),
    }[verb]
    out = ("output=out",) if verb == "build" else ("--out", "out")
    for name, launch in {"one": (), "tasks": ("--launch", "local", "--tasks", "2")}.items():
        (tmp_path / name).mkdir()
        done = command("data", *words, *out, *launch, cwd=tmp_path / name)
        assert done.code == 0, done.err
    assert "shard 2/2 is done" in done.err
    one, tasks = (contents(tmp_path / name) for name in ("one", "tasks"))
    assert len(list((tmp_path / "one").glob(pattern))) == count
    assert one.keys() == tasks.keys()
    assert [name for name in one if one[name] != tasks[name]] == []


def test_a_build_into_a_bucket_on_several_machines_needs_a_shared_folder(
    tessera, images, tmp_path, fresh_storage, monkeypatch
):
    monkeypatch.setattr(launching.Launch, "check", lambda self: None)  # Ray need not be installed
    (tmp_path / "build.yaml").write_text("size: 8\n")
    words = (f"sources={images}", f"output=file://{tmp_path}/built", "--launch", "ray", "--tasks", "2")
    done = tessera("data", "build", tmp_path / "build.yaml", *words)
    assert (done.code, "set work= to a folder that all machines see" in done.err) == (1, True), done.err
    assert not (tmp_path / "built").exists()


STUDY = """
question: Does width help?
recipe: tiny.yaml
axes:
  size:
    S: {network.hidden_size: 16}
    L: {network.hidden_size: 32}
set: {evaluation: {num_samples: 40, batch_size: 40, metrics: [kid]}}
budget: {steps: 2}
"""


@pytest.mark.slow
def test_a_study_as_tasks_has_the_same_weights_and_scores(command, recipe, tmp_path, whole_state):
    (tmp_path / "study.yaml").write_text(STUDY)
    outputs = {"one": (), "tasks": ("--launch", "local", "--tasks", "2")}
    for name, launch in outputs.items():
        done = command("study", tmp_path / "study.yaml", f"output={tmp_path / name}", "--hardware", "h100", *launch)
        assert (done.code, done.out) == (0, f"{tmp_path / name}/report.md\n"), done.err
    for member in "SL":
        one, tasks = (tmp_path / name / "members" / member for name in outputs)
        assert whole_state(one) == whole_state(tasks)
        assert contents(one, "evaluation/*.json") == contents(tasks, "evaluation/*.json")
    failing = ("axes.size.L.training.optimizer.learning_rate=1e30", "set.training.stability.max_rollbacks=1")
    words = (f"output={tmp_path / 'failing'}", "budget.steps=40", "--hardware", "h100", *outputs["tasks"])
    done = command("study", tmp_path / "study.yaml", *failing, *words)
    assert done.code == 3
    assert "1 of 2 members failed: L" in done.err
    assert "attempt" not in done.err  # a task whose members failed is not repeated
