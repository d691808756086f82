"""Clips as files: what is written is read again, with its settings."""

import numpy as np
import pytest
from PIL import Image

import tessera
from tessera import clips
from tessera.data.clips import open_frames, read_clip
from tessera.errors import TesseraError

SETTINGS = {"seeds": [3], "prompts": ["<a> & \"b\" 'ü' 日本"], "fps": 8}


def moving(frames=6, size=(16, 24), channels=3) -> np.ndarray:
    """A bright square that moves to the right on a gradient."""
    clip = np.empty((frames, *size, channels), np.uint8)
    clip[:] = np.linspace(0, 120, size[1]).astype(np.uint8)[None, None, :, None]
    for number in range(frames):
        clip[number, 4:12, 2 * number : 2 * number + 8] = 240
    return clip


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.gif", "a.mp4", "a.mov", "a.webm", "a"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_clip_is_read_as_it_was_written(tmp_path, name, channels):
    pytest.importorskip("av")
    path, clip = tmp_path / name, moving(channels=channels)
    tessera.save_clip(path, clip, 8, SETTINGS)
    assert clips.read_settings(path) == SETTINGS
    assert clips.holds(path, SETTINGS)
    assert not clips.holds(path, SETTINGS | {"fps": 9})
    result = read_clip(path, channels=channels)
    assert result.shape == clip.shape
    difference = np.abs(result.astype(int) - clip)
    if path.suffix in ("", ".webp", ".png"):
        assert not difference.any()
    assert difference.mean() < 6  # compressed
    with open_frames(path) as frames:
        if path.suffix:
            assert frames.times[-1] == pytest.approx(6 / 8, abs=0.02)


@pytest.mark.parametrize("name", ["a.webp", "a.gif", "a.png"])
def test_equal_frames_are_not_lost(tmp_path, name):
    clip = moving()[[0, 1, 1, 1, 1, 2, 2, 3]]
    tessera.save_clip(tmp_path / name, clip, 5)
    result = read_clip(tmp_path / name, fps=5)
    assert result.shape == clip.shape
    assert np.abs(result.astype(int) - clip).max() <= (6 if name == "a.gif" else 0)


@pytest.mark.parametrize("name", ["a.webp", "a.gif", "a.png"])
@pytest.mark.parametrize("fps", [8, 12, 24, 30, 60])
def test_no_frame_is_lost_to_the_rounding_of_durations(tmp_path, name, fps):
    """The files have hundredths or thousandths of a second, and five frames at 24 per second take 208.3 ms."""
    clip = moving()[:5]
    tessera.save_clip(tmp_path / name, clip, fps)
    result = read_clip(tmp_path / name, fps=fps)
    assert result.shape == clip.shape
    assert np.abs(result.astype(int) - clip).max() <= (6 if name == "a.gif" else 0)


def test_videos_are_h264_with_even_sides(tmp_path):
    av = pytest.importorskip("av")
    tessera.save_clip(tmp_path / "odd.mp4", moving(size=(15, 21)), 12.5)
    with av.open(str(tmp_path / "odd.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert (stream.pix_fmt, stream.height, stream.width) == ("yuv420p", 16, 22)
        assert float(stream.average_rate) == 12.5


@pytest.mark.parametrize(
    ("name", "clip", "fps", "words"),
    [
        ("a.avi", moving(), 8, "expected a name that ends in .mp4"),
        ("a.webp", moving(), 0, "fps is 0; expected more than 0"),
        ("a.webp", moving(), 1e9, "at most 1000 frames"),
        ("a.webp", moving()[0], 8, "a clip is uint8"),
        ("a.webp", moving()[:0], 8, "a clip is uint8"),
        ("a.webp", moving() / 255, 8, "a clip is uint8"),
    ],
)
def test_what_cannot_be_written(tmp_path, name, clip, fps, words):
    with pytest.raises(TesseraError, match=words):
        tessera.save_clip(tmp_path / name, clip, fps)
    assert not list(tmp_path.iterdir())


def test_without_pyav_a_video_is_an_error_with_advice(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(TesseraError, match=r"needs PyAV: pip install 'tessera\[video\]', or give a .webp or .gif"):
        tessera.save_clip(tmp_path / "a.mp4", moving())
    tessera.save_clip(tmp_path / "a.webp", moving())
    assert Image.open(tmp_path / "a.webp").size == (24, 16)


def test_files_without_settings(tmp_path):
    for name in ("a.webp", "a.gif", "a.mp4", "a"):
        tessera.save_clip(tmp_path / name, moving())
        assert clips.read_settings(tmp_path / name) is None
    (tmp_path / "broken.webp").write_bytes(b"RIFF")
    assert not clips.holds(tmp_path / "broken.webp", SETTINGS)
