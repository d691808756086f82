"""`tessera data check` of clips: what each finding finds, and nothing in clips without faults."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tessera.data import FilesConfig, index
from tessera.data.check import CheckRequest, report_findings, scan_data
from tessera.errors import TesseraError

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("clip_files.py"))))
clip, moving, video = made.clip, made.moving, made.video


def check(folder, out, **options):
    request = CheckRequest(str(folder), out, **{"size": (16, 16), "frames": 6, "fps": 10.0, **options})
    scan_data(request)
    result = report_findings(request)
    return {finding.kind: finding for finding in result.findings}, result


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        video(tmp_path / f"clips/{number}.mp4", moving(number))
    return tmp_path / "clips"


def found(findings, kind, dataset_names):
    return [dataset_names[row] for row in findings[kind].samples]


def names(out):
    return [json.loads(line)["name"] for line in (out / "decisions.jsonl").read_text().splitlines()]


def test_clips_without_faults_have_no_findings(folder, tmp_path):
    findings, result = check(folder, tmp_path / "out")
    assert findings == {}
    assert dict(result.summary)["frames"] == "8 to 8 at 10 to 10 fps"
    assert "<html" in (tmp_path / "out/report.html").read_text()


def test_each_finding_names_its_clips(folder, tmp_path):
    video(folder / "a-short.mp4", moving(10, 3))
    video(folder / "b-frozen.mp4", np.repeat(moving(11, 1), 8, axis=0))
    video(folder / "c-cut.mp4", np.concatenate((moving(12, 5), 255 - moving(13, 5))))
    video(folder / "d-slow.mp4", moving(14, 8), fps=4)
    video(folder / "e-fast.mkv", moving(15, 300), fps=500)
    video(folder / "f-variable.mkv", moving(16), times=[0, 0.1, 0.2, 0.6, 0.7, 0.8, 0.9, 1.0])
    video(folder / "g-rotated.mp4", moving(17), rotated=True)
    (folder / "h-copy.mp4").write_bytes((folder / "0.mp4").read_bytes())
    (folder / "i-empty.mp4").write_bytes(b"")
    (folder / "j-half.mp4").write_bytes((folder / "1.mp4").read_bytes()[:900])
    (folder / "k-text.mp4").write_text("no video " * 100)
    clip(folder / "l-still.png", 1)
    findings, result = check(folder, tmp_path / "out")
    listed = names(tmp_path / "out")
    expected = {
        "short-clips": ["a-short.mp4", "l-still.png"],
        "frozen": ["b-frozen.mp4"],
        "scene-cuts": ["c-cut.mp4"],
        "low-fps": ["d-slow.mp4", "f-variable.mkv"],
        "odd-fps": ["e-fast.mkv"],
        "variable-fps": ["f-variable.mkv"],
        "rotated": ["g-rotated.mp4"],
        "duplicates": ["h-copy.mp4"],
        "empty": ["i-empty.mp4"],
    }
    for kind, files in expected.items():
        assert found(findings, kind, listed) == files, kind
    broken = {
        name
        for kind in ("truncated", "no-image", "damaged", "no-video")
        for name in (found(findings, kind, listed) if kind in findings else [])
    }
    assert broken == {"j-half.mp4", "k-text.mp4"}
    cut = findings["scene-cuts"]
    assert " --frames 6 --fps 10 " in cut.commands[0]
    assert cut.reason(int(cut.samples[0])) == "at 0.50 s"
    rejected = {name for name, keep in zip(listed, result.keep) if not keep}
    assert rejected == {"h-copy.mp4", "i-empty.mp4", "j-half.mp4", "k-text.mp4"}


def test_parts_of_one_file_are_no_duplicates(folder, tmp_path):
    video(folder / "long.mp4", np.concatenate([moving(seed, 8) for seed in range(20, 23)]))
    rows = ["path,start,end", *(f"long.mp4,{0.8 * k},{0.8 * k + 0.8}" for k in range(3)), "long.mp4,0,0.8"]
    (folder / "parts.csv").write_text("\n".join(rows))
    findings, _ = check(folder / "parts.csv", tmp_path / "out")
    assert set(findings) == {"duplicates"}
    assert list(findings["duplicates"].samples) == [3]


def test_the_accepted_index_trains(folder, tmp_path):
    video(folder / "short.mp4", moving(10, 3))
    request = CheckRequest(str(folder), tmp_path / "out", size=(16, 16), frames=6)
    scan_data(request)
    report_findings(request, exclude=["short-clips"], write_index=tmp_path / "accepted.parquet")
    dataset = FilesConfig(path=str(tmp_path / "accepted.parquet"), size=(16, 16), frames=6).open()
    assert len(dataset) == 4
    assert dataset.pixels(0).shape == (3, 6, 16, 16)
    assert index.read(tmp_path / "accepted.parquet")["width"].to_pylist() == [48] * 4


def test_several_frame_rates_need_a_common_one(folder, tmp_path):
    video(folder / "fast.mp4", moving(30, 12), fps=30)
    findings, _ = check(folder, tmp_path / "out", fps=None)
    assert "10 to 30 frames per second" in findings["several-fps"].message


def test_fps_without_frames_is_an_error(folder, tmp_path):
    with pytest.raises(TesseraError, match="--fps is for clips: add --frames"):
        check(folder, tmp_path / "out", frames=None)
