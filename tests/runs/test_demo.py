"""`tessera demo`, shortened."""

import numpy as np
import pytest
from PIL import Image, ImageSequence

from tessera import demo
from tessera.monitoring.logger import read_log

pytest.importorskip("sklearn")


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(demo, "FEWEST", 6)
    monkeypatch.setattr(demo, "PER_CLASS", 4)
    monkeypatch.setattr(demo, "COUNT", 40)


def test_the_demo_shows_a_shipped_model_trains_and_writes_a_report(tessera, short, tmp_path):
    done = tessera("demo", "--seconds", "0.01", "--out", tmp_path / "demo")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert ["emoji.png" in lines[0], "sprites.webp" in lines[1]] == [True, True]  # before the training
    assert Image.open(tmp_path / "demo/emoji.png").size == (6 * 68 - 4, 2 * 68 - 4)
    assert read_log(tmp_path / "demo/run")[-1]["step"] == 6
    assert [line for line in lines if line.startswith("sampled")][-1] == "sampled 40 of 40"
    with Image.open(tmp_path / "demo/sprites.webp") as sprites:
        assert (sprites.n_frames, sprites.size) == (8, (6 * 132 - 4, 128))
        frames = np.stack([np.asarray(frame.convert("L"), int) for frame in ImageSequence.Iterator(sprites)])
    assert (frames[0] < 20).mean() > 0.4  # a dark ground around the characters
    assert np.abs(frames[4] - frames[0]).max() > 60  # which move
    assert Image.open(tmp_path / "demo/grid.png").size == (10 * 52 - 4, 8 * 52 - 4)
    report = (tmp_path / "demo/report.md").read_text()
    assert "of 40 samples are classified as their class" in report
    assert {"denoising.gif", "loss.png"} <= {path.name for path in (tmp_path / "demo").iterdir()}


@pytest.mark.slow
def test_a_demo_in_the_same_folder_resumes(tessera, short, tmp_path):
    for seconds in ("0.01", "60"):
        done = tessera("demo", "--seconds", seconds, "--out", tmp_path / "demo")
        assert done.code == 0, done.err
    assert "6 steps, as started before" in done.out
