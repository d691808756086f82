"""Data that changed since a checkpoint, and classes without a usable image: both are reported."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessera import bundle
from tessera.data import index
from tessera.training import checkpoint, loop


def write_images(folder: Path, *names: str) -> dict:
    """Write images of noise, and return the data section of a recipe."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(sum(name.encode())).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return {"path": str(folder), "size": 8}


NAMES = [f"{label}/{number:02}.png" for label in ("cat", "dog") for number in range(10, 20)]
BATCH = "training.global_batch_size=8"


def reports(output: str) -> list[str]:
    return [line for line in output.splitlines() if "of the data" in line]


def indexes(run: Path) -> list[Path]:
    return sorted(run.glob("index-*.parquet"))


def test_the_same_data_are_not_reported_wherever_they_are(tiny, tmp_path, capsys):
    run = loop.train(tiny("run", BATCH, data=write_images(tmp_path / "data", *NAMES)))
    (kept,) = indexes(run)
    assert index.read(kept)["path"].to_pylist() == NAMES
    (tmp_path / "data").rename(tmp_path / "moved")
    loop.train(tiny("run", BATCH, "training.steps=6", data=write_images(tmp_path / "moved", *NAMES)))
    assert reports(capsys.readouterr().err) == []
    assert indexes(run) == [kept]


@pytest.mark.parametrize("change", ["add", "remove", "rename"])
def test_changed_samples_are_reported_once_and_the_index_restores_the_order(tiny, state, tmp_path, capsys, change):
    data = write_images(tmp_path / "data", *NAMES)
    whole = loop.train(tiny("whole", BATCH, "training.steps=8", data=data))
    run = loop.train(tiny("run", BATCH, data=data))
    (kept,) = indexes(run)
    if change == "add":
        write_images(tmp_path / "data", "cat/00.png")
    elif change == "remove":
        (tmp_path / "data/dog/19.png").unlink()
    else:
        (tmp_path / "data/cat/10.png").rename(tmp_path / "data/cat/99.png")
    capsys.readouterr()
    loop.train(tiny("run", BATCH, "training.steps=5", data=data))
    (report,) = reports(capsys.readouterr().err)
    now = {"add": 21, "remove": 19, "rename": 20}[change]
    assert f"the samples of the data (20, now {now}), and with them their order" in report
    assert f"data.path={kept} reads the old samples in the old order" in report
    loop.train(tiny("run", BATCH, "training.steps=6", data=data))
    assert reports(capsys.readouterr().err) == []  # the second version is that of the checkpoint now
    assert len(indexes(run)) == 2
    if change == "add":  # from the first checkpoint, with its index
        again = loop.train(tiny("again", BATCH, data=data | {"path": str(kept)}))
        loop.train(tiny("again", BATCH, "training.steps=8", data=data | {"path": str(kept)}))
        assert reports(capsys.readouterr().err) == []
        assert state(again) == state(whole)


def test_changed_labels_and_captions_are_reported_without_another_order(tiny, tmp_path, capsys):
    write_images(tmp_path / "data", *NAMES)
    data = {"path": str(tmp_path / "data"), "size": 8}
    rows = [{"file_name": name, "label": name[:3], "text": f"a {name[:3]}"} for name in NAMES]
    metadata = tmp_path / "data/metadata.jsonl"
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loop.train(tiny("run", BATCH, data=data))
    rows[3] |= {"label": "dog", "text": "a dog"}
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loop.train(tiny("run", BATCH, "training.steps=5", data=data))
    (report,) = reports(capsys.readouterr().err)
    assert "the labels and captions of the data." in report
    assert "order of the samples" not in report


def test_a_checkpoint_without_fingerprint_and_data_without_index_resume_as_before(tiny, tmp_path, capsys):
    data = write_images(tmp_path / "data", *NAMES)
    run = loop.train(tiny("run", BATCH, data=data))
    path = bundle.checkpoints(run)[0] / checkpoint.TRAINER_STATE
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "data"}))
    write_images(tmp_path / "data", "cat/00.png")
    loop.train(tiny("run", BATCH, "training.steps=5", data=data))
    digits = loop.train(tiny("digits"))
    loop.train(tiny("digits", "training.steps=5"))
    assert reports(capsys.readouterr().err) == []
    assert indexes(digits) == []


def test_classes_without_a_usable_image_are_reported_once(tiny, tmp_path, capsys):
    data = write_images(tmp_path / "data", *NAMES)
    for name in ("fox/0.png", "fox/1.png", "cat/10.png"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_bytes(b"no image")
    loop.train(tiny("run", BATCH, "training.steps=8", data=data))
    lines = [line for line in capsys.readouterr().err.splitlines() if "none of the images" in line]
    assert len(lines) == 1
    assert "of 1 classes can be used (fox)" in lines[0]
