"""Clips on the command line: training, samples as files of every kind, and the commands that reproduce them."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessera.data.clips import read_clip
from tessera.evaluation.sources import FolderSource
from tessera.generation import generate
from tessera.interop.load import load

pytestmark = pytest.mark.run


@pytest.fixture
def run(tessera, clips_recipe, tmp_path) -> Path:
    """A trained model of clips of four frames, at 5 frames per second."""
    done = tessera("train", clips_recipe)
    assert done.code == 0, done.err
    return tmp_path / "run"


def test_clips_in_a_folder(tessera, run, tmp_path):
    done = tessera("sample", run, "--classes", "up", "--seeds", "1,2", "--out", tmp_path / "s")
    assert (done.code, done.out.strip()) == (0, f"2 clips and grid.webp in {tmp_path / 's'}")
    names = ["class-up-seed-1.webp", "class-up-seed-2.webp"]
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [*names, "grid.webp", "metadata.jsonl"]
    expected = generate(load(run), ["up"], [1, 2])
    for name, clip in zip(names, expected):
        result = read_clip(tmp_path / "s" / name, fps=5, channels=1)
        assert np.array_equal(result, clip)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("class*")}
    again = tessera("sample", run, "--classes", "up", "--seeds", "1,2", "--out", tmp_path / "s")
    assert again.code == 0
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("class*")}


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webp", "clip.gif"])
def test_one_clip_and_the_command_that_reproduces_it(tessera, run, tmp_path, name):
    pytest.importorskip("av")
    out = tmp_path / name
    words = ("--classes", "down", "--frames", "6", "--fps", "12", "--seeds", "3")
    done = tessera("sample", run, *words, "--out", out)
    assert (done.code, done.out.strip()) == (0, str(out)), done.err
    assert read_clip(out, fps=12).shape == (6, 8, 8, 3)
    command = tessera("info", out).out.splitlines()[0]
    assert "--size 6x8x8" in command
    assert "--fps 12" in command
    again = tmp_path / f"again{out.suffix}"
    assert tessera(*shlex.split(command)[1:], "--out", again).code == 0
    assert np.array_equal(read_clip(again), read_clip(out))


def test_several_clips_in_one_file_are_a_grid(tessera, run, tmp_path):
    assert tessera("sample", run, "--classes", "up,down", "--out", tmp_path / "grid.webp").code == 0
    with Image.open(tmp_path / "grid.webp") as image:
        assert image.size == (64, 2 * 64 + 1)
    assert tessera("sample", run, "--classes", "up,down", "--out", tmp_path / "sheet.png").code == 0
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (4 * 64, 2 * 64 + 1)


@pytest.mark.parametrize("kind", ["frames", "mp4", "gif"])
def test_other_formats_of_a_folder(tessera, run, tmp_path, kind):
    pytest.importorskip("av")
    done = tessera("sample", run, "--num-samples", "3", "--format", kind, "--out", tmp_path / "s")
    assert done.code == 0, done.err
    files = [path for path in sorted((tmp_path / "s").iterdir()) if path.stem.startswith("class")]
    assert len(files) == 3
    assert all(len(read_clip(path, fps=5)) == 4 for path in files)
    again = tessera("sample", run, "--num-samples", "3", "--format", kind, "--out", tmp_path / "s")
    assert again.code == 0, again.err
    assert "tessera sample" in tessera("info", files[0]).out


@pytest.mark.parametrize("kind", ["mp4", "webp"])
def test_files_of_another_shape_do_not_end_a_resumed_command(tessera, run, tmp_path, kind, monkeypatch):
    """A video of odd sides has even ones, and an animation of equal frames is one image."""
    pytest.importorskip("av")
    clip = np.zeros((2, 4, 9, 7, 1), np.uint8)  # as a model whose clips stand still

    def generated(model, request, **options):
        return clip[: len(request)]

    monkeypatch.setattr("tessera.generation.generate_request", generated)
    monkeypatch.setattr("tessera.generation.image_size", lambda model: (4, 9, 7))
    words = ("sample", run, "--classes", "up", "--format", kind, "--out", tmp_path / "s")
    assert tessera(*words, "--seeds", "1").code == 0
    done = tessera(*words, "--seeds", "1,2")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "clip.avi"], "cannot write a clip to clip.avi"),
        (["--fps", "0"], "fps is 0; expected more than 0"),
        (["--fps", "1e9"], "at most 1000 frames"),
        (["--format", "gif", "--out", "clip.mp4"], "--format is for a folder of clips"),
        (["--size", "4x8x8", "--frames", "3"], "leave out --frames"),
        (["--npz", "a.npz", "--fps", "3"], "--npz has no frame rate"),
    ],
)
def test_options_that_exclude_each_other(tessera, run, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    done = tessera("sample", run, "--classes", "up", *words)
    assert done.code == 1
    assert message in done.err


@pytest.mark.parametrize("words", [["--frames", "3"], ["--fps", "3"], ["--format", "gif"], ["--out", "a.mp4"]])
def test_options_of_clips_are_errors_for_a_model_of_images(tessera, trained, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    done = tessera("sample", trained, "--classes", "1", *words)
    assert done.code == 1
    assert "clip" in done.err


def test_a_folder_of_clips_is_scored_as_the_model_is(tessera, run, tmp_path):
    assert tessera("sample", run, "--num-samples", "6", "--out", tmp_path / "s").code == 0
    source = FolderSource(tmp_path / "s")
    assert (source.size, source.channels, source.count) == ((4, 8, 8), 1, 6)
    shard = source.shard(0)
    assert shard.labels is not None
    model = load(run)
    expected = {(label, seed): generate(model, [label], [seed])[0] for label in range(2) for seed in range(6)}
    for path, clip, label in zip(source.paths, shard.images, shard.labels):
        assert np.array_equal(clip, expected[int(label), int(path.stem.rpartition("-")[2])])


def test_info_of_a_model_of_clips(tessera, run):
    assert "4 x 8 x 8" in tessera("info", run).out
