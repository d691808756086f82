"""`tessera data build` of clips: what is written, what is left out, and the same bytes in any order of the work."""

import json
import os
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tessera.data import FilesConfig, build
from tessera.data.build import BuildRecipe, write
from tessera.data.check import scan
from tessera.data.check.scan import ScanShard
from tessera.data.clips import Span, open_frames
from tessera.errors import TesseraError
from tessera.settings import validate

pytest.importorskip("av")
made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("clip_files.py"))))
moving = made.moving


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six clips of two classes with captions, 8 to 13 frames at 10 fps."""
    for number in range(6):
        path = made.video(tmp_path / f"clips/{('cat', 'dog')[number % 2]}/{number}.mp4", moving(number, 8 + number))
        path.with_suffix(".txt").write_text(f"animal {number}")
    return tmp_path / "clips"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(scan, "PART_SIZE", 2)


def recipe(source: Any, output: Path, **changes: Any) -> BuildRecipe:
    plain = {"size": 16, "frames": 6, "fps": 10, "samples_per_shard": 2}
    return validate(BuildRecipe, {"sources": str(source), "output": str(output), **plain, **changes}, "the recipe")


def outputs(output: Path) -> dict[str, bytes]:
    """All files that are written, without the recipe, which holds the name of the folder, and the work."""
    files = [path for path in output.rglob("*") if path.is_file() and build.WORK not in path.parts]
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files if path.name != build.RECIPE}


def reasons(output: Path) -> dict[str, tuple[str, str | None]]:
    records = map(json.loads, (output / build.LEFT_OUT).read_text().splitlines())
    return {record["name"]: (record["reason"], record.get("detail")) for record in records}


@pytest.mark.parametrize("form", ["tar", "parquet"])
@pytest.mark.parametrize("encoding", ["auto", "webp"])
def test_clips_are_resized_resampled_and_readable(folder, tmp_path, form, encoding):
    config = recipe(folder, tmp_path / "out", format=form, encoding=encoding, fps=5, frames=3, max_frames=5)
    summary = build.build(config).summary
    assert summary is not None
    assert (summary["samples"], summary["written"]) == (6, 6)
    assert summary["notes"] == ["2 clips had more than 5 frames, of which the first are written (max_frames)"]
    source = FilesConfig(path=str(folder), frames=3, fps=5, size=(16, 24)).open()
    for path in ("index.parquet", "shards"):
        data = FilesConfig(path=str(tmp_path / "out" / path), frames=3, fps=5, size=(16, 24)).open()
        assert data.class_names == ("cat", "dog")
        for row in range(6):
            assert (data.label(row), data.caption(row)) == (source.label(row), source.caption(row))
            assert data.shape(row) == (16, 24)
            with open_frames(data.encoded(row)) as frames:
                count = min((8 + int(Path(source.name(row)).stem)) // 2, 5)
                assert len(frames.times) == count + 1
                assert frames.times[-1] == pytest.approx(count / 5, abs=0.01)
            difference = data.pixels(row).astype(float) - source.pixels(row)
            # Of 255: colors of single pixels are stored at half the size, and the filters differ.
            assert np.abs(difference).mean() < (12 if encoding == "auto" else 20)


def test_frames_are_those_of_the_times_and_sides_become_even(tmp_path):
    # Frame k is gray of the level 20 + 20 k. At half the rate every second one is written.
    path = made.video(tmp_path / "clips/a.mp4", made.grey(made.levels(10), (32, 50)))
    config = recipe(tmp_path / "clips", tmp_path / "out", fps=5, frames=2, size=15)
    clip = write.read_clip(path, Span(), config, FilesConfig(path="", size=(1, 1), frames=2, fps=5))
    assert [round(np.asarray(image).mean(), -1) for image in clip.images] == [20, 60, 100, 140, 180]
    assert (clip.fps, clip.original_size, clip.is_cut) == (5, (32, 50), False)
    assert clip.images[0].size == (23, 15)
    # A still clip is one of the findings that are left in unless the recipe excludes them.
    build.build(config)
    data = FilesConfig(path=str(tmp_path / "out/index.parquet"), frames=2, size=16).open()
    with open_frames(data.encoded(0)) as frames:
        assert frames.read([0])[0].size == (24, 16)
    assert data.shape(0) == (16, 24)
    every = write.read_clip(path, Span(0.2, 0.6), config.model_copy(update={"fps": None}), data.config)
    assert [round(np.asarray(image).mean(), -1) for image in every.images] == [60, 80, 100, 120]
    assert every.fps == pytest.approx(10, abs=0.1)


def test_findings_of_clips_are_left_out_with_their_reason(folder, tmp_path):
    made.video(folder / "cat/short.mp4", moving(10, 3))
    made.video(folder / "cat/still.mp4", np.repeat(moving(11, 1), 8, axis=0))
    made.video(folder / "cat/cut.mp4", np.concatenate((moving(12, 5), 255 - moving(13, 5))))
    made.video(folder / "cat/small.mp4", moving(14, size=(12, 48)))
    (folder / "dog/copy.mp4").write_bytes((folder / "cat/0.mp4").read_bytes())
    (folder / "dog/text.mp4").write_text("no video " * 100)
    exclude = [*BuildRecipe.model_fields["exclude"].default, "frozen", "scene-cuts"]
    summary = build.build(recipe(folder, tmp_path / "out", exclude=exclude, max_aspect=None)).summary
    assert summary is not None
    assert summary["written"] == 6
    left_out = reasons(tmp_path / "out")
    assert left_out.pop("dog/text.mp4")[0] in ("damaged", "no-image", "truncated")
    assert left_out.pop("dog/copy.mp4")[0] == "duplicates"
    assert left_out == {
        "cat/short.mp4": ("short-clips", "3 frames"),
        "cat/still.mp4": ("frozen", None),
        "cat/cut.mp4": ("scene-cuts", "at 0.50 s"),
        "cat/small.mp4": ("small", "12 x 48"),
    }


def test_shards_of_the_work_and_interruptions_give_the_same_bytes(folder, tmp_path):
    whole = recipe(folder, tmp_path / "whole", shuffle=0)
    build.build(whole)
    expected = outputs(tmp_path / "whole")
    assert sum(name.startswith("shards/") for name in expected) == 3
    parts = recipe(folder, tmp_path / "parts", shuffle=0)
    for _ in range(2):  # to measure and to write
        for number in (2, 0, 1):
            build.build(parts, shard=ScanShard(number, 3))
    assert outputs(tmp_path / "parts") == expected
    if not hasattr(os, "fork"):
        return
    killed = recipe(folder, tmp_path / "killed", shuffle=0)
    process = os.fork()
    if process == 0:
        function, count = write.encode_frames, 0

        def counted(*arguments: Any) -> bytes:
            nonlocal count
            count += 1
            if count == 4:
                os._exit(9)
            return function(*arguments)

        write.encode_frames = counted
        try:
            build.build(killed)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    build.build(killed)
    assert outputs(tmp_path / "killed") == expected
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.tar")}
    build.build(killed)
    assert times == {path: path.stat().st_mtime_ns for path in times}  # complete: left as it is


def test_folders_of_frames_and_parts_of_files(tmp_path):
    for number in range(7):
        path = tmp_path / f"frames/a/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(moving(1, 7)[number]).save(path)
    sources = [{"path": str(tmp_path / "frames"), "kind": "frame-folders"}]
    made.video(tmp_path / "long.mp4", np.concatenate([moving(seed, 8) for seed in range(20, 23)]))
    rows = ["path,start,end", *(f"long.mp4,{0.8 * k},{0.8 * k + 0.8}" for k in range(3))]
    (tmp_path / "parts.csv").write_text("\n".join(rows))
    sources.append({"path": str(tmp_path / "parts.csv")})
    config = validate(
        BuildRecipe, {"sources": sources, "output": str(tmp_path / "out"), "size": 32, "frames": 7}, "the recipe"
    )
    summary = build.build(config).summary
    assert summary is not None
    assert (summary["written"], summary["left_out"]) == (4, {})
    data = FilesConfig(path=str(tmp_path / "out/index.parquet"), frames=7, size=(32, 48)).open()
    expected = [moving(1, 7), *(moving(seed, 8)[:7] for seed in range(20, 23))]
    for row, pixels in enumerate(expected):
        assert np.abs(data.pixels(row).astype(float) - np.moveaxis(pixels, -1, 0)).mean() < 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoding": "jpeg"}, "encoding jpeg is not for clips: give mp4 or webp"),
        ({"frames": None, "fps": None, "encoding": "mp4"}, "encoding mp4 is not for images: give jpeg or png or webp"),
        ({"frames": None}, "fps is for clips: set frames"),
        ({"frames": None, "fps": None, "exclude": ["frozen"]}, "exclude frozen is for clips: set frames"),
        ({"max_frames": 4}, "max_frames 4 is less than frames 6"),
        ({"exclude": ["short-clips"]}, "'short-clips' has a setting of its own: set frames"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path, changes, message):
    with pytest.raises(TesseraError, match=message):
        recipe("clips", tmp_path / "out", **changes)


def test_videos_without_frames_are_an_error_that_names_the_setting(folder, tmp_path):
    with pytest.raises(TesseraError, match="it has 6 videos: set data.frames"):
        build.build(recipe(folder, tmp_path / "out", frames=None, fps=None))
