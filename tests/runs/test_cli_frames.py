"""Given frames on the command line: from a first frame to a last one, a clip continued and led to."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessera.clips import save_clip
from tessera.data.clips import read_clip

pytestmark = pytest.mark.run


@pytest.fixture
def run(tessera, clips_recipe, tmp_path) -> Path:
    """A trained model of clips of four frames, some of which were given in training; two images, and a clip."""
    done = tessera("train", clips_recipe, "training.frame_times=mixed")
    assert done.code == 0, done.err
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).save(tmp_path / f"{name}.png")
    save_clip(tmp_path / "clip.webp", random.integers(0, 256, (3, 8, 8, 1), np.uint8), 5)
    return tmp_path / "run"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))[..., None]


def test_from_a_first_frame_to_a_last_one(tessera, run, tmp_path):
    out, a, b = tmp_path / "out.webp", tmp_path / "a.png", tmp_path / "b.png"
    words = ("--classes", "up", "--seeds", "3", "--from", a, "--last", b)
    done = tessera("sample", run, *words, "--out", out)
    assert done.code == 0, done.err
    result = read_clip(out, channels=1)
    assert result.shape == (4, 8, 8, 1)
    assert (result[0] == pixels(a)).all()
    assert (result[3] == pixels(b)).all()
    assert (result[1] != result[2]).any()
    command = tessera("info", out).out.splitlines()[0]
    assert "--from" in command
    assert "--last" in command
    again = tmp_path / "again.webp"
    assert tessera(*shlex.split(command)[1:], "--out", again).code == 0
    assert np.array_equal(read_clip(again), read_clip(out))
    numbered = ("--given", f"0={a}", "--given", f"3={b}")
    assert tessera("sample", run, *words[:4], *numbered, "--out", tmp_path / "numbered.webp").code == 0
    assert np.array_equal(read_clip(tmp_path / "numbered.webp", channels=1), result)


def test_a_clip_is_continued_and_led_to(tessera, run, tmp_path):
    clip = tmp_path / "clip.webp"
    words = ("--classes", "up", "--frames", "7", "frame_schedule=sliding", "frame_schedule.overlap=3")
    for option, frames in (("--extend", slice(0, 3)), ("--precede", slice(4, 7))):
        out = tmp_path / f"{option[2:]}.webp"
        done = tessera("sample", run, *words, option, clip, "--out", out)
        assert done.code == 0, done.err
        result = read_clip(out, channels=1)
        assert result.shape == (7, 8, 8, 1)
        assert (result[frames] == read_clip(clip, channels=1)).all()


def test_a_model_of_every_frame_continues_every_frame(tessera, clips_recipe, tmp_path):
    assert tessera("train", clips_recipe, "training.frame_times=mixed", "data.fps=null").code == 0
    clip, out = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8), tmp_path / "out.webp"
    save_clip(tmp_path / "clip.webp", clip, 2)
    words = ("--classes", "up", "--extend", tmp_path / "clip.webp", "--out", out)
    done = tessera("sample", tmp_path / "run", *words)
    assert done.code == 0, done.err
    assert (read_clip(out, channels=1)[:3] == clip).all()
    done = tessera("sample", tmp_path / "run", *words, "--fps", 4)  # asks for each frame twice
    assert "has 6 frames, and the whole clip 4" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from", "gone.png"], "cannot read the frame gone.png: there is no such file"),
        (["--given", "a.png"], "--given a.png is not valid: write NUMBER=IMAGE"),
        (["--given", "9=a.png"], "given_indices has 9, and the clip has frames 0 to 3"),
        (["--from", "a.png", "--given", "0=b.png"], "name a frame of 4 twice"),
        (["--extend", "gone.mp4"], "cannot read --extend gone.mp4"),
        (["--extend", "recipe.yaml"], "cannot read --extend recipe.yaml"),
        (["--extend", "clip.webp", "--frames", "3"], "has 3 frames, and the whole clip 3: set --frames to more"),
        (["--from", "a.png", "frame_schedule=pyramid", "sampler=dpm++"], "pyramid needs a sampler"),
        (["--from", "a.png", "--npz", "x.npz"], "takes one model and no image"),
    ],
)
def test_errors(tessera, run, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    done = tessera("sample", run, "--classes", "up", *words, "--out", "s")
    assert done.code == 1
    assert message in " ".join(done.err.split())
    assert "Traceback" not in done.err


def test_a_model_of_images(tessera, recipe, tmp_path):
    assert tessera("train", recipe).code == 0
    done = tessera("sample", tmp_path / "run", "--classes", "3", "--from", "a.png", "--out", tmp_path / "s")
    assert done.code == 1
    assert "need a model of clips, not of images" in " ".join(done.err.split())
