"""Splits by the names of files and folders: that for training is read, the others are reported and can be selected."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
from pyarrow import parquet

from tessera.data import index
from tessera.data.resolve import resolve_data
from tessera.data.splits import split_depth, split_of_file
from tessera.errors import TesseraError

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("layout_files.py"))))
open_data, png, put, samples, table, tar = made.open_data, made.png, made.put, made.samples, made.table, made.tar


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / ".caches"))


def greys(source) -> list[int]:
    return [value for value, _, _ in samples(source)]


@pytest.fixture(params=["files", "folders", "tars", "classes", "classes-above", "metadata", "one-metadata"])
def data(request, tmp_path):
    """Two images for training (1, 2), one for validation (3), one for tests (4)."""
    folder = tmp_path / "data"
    splits = {"train": (1, 2), "validation": (3,), "test": (4,)}
    if request.param == "files":
        for split, values in splits.items():
            table(folder / f"data/{split}-00000-of-00001.parquet", *values)
    elif request.param == "folders":
        for split, values in splits.items():
            table(folder / f"plain/{split}/0000.parquet", *values)
    elif request.param == "tars":
        for split, values in splits.items():
            tar(folder / f"{split}-0.tar", *((f"{value}.png", png(value)) for value in values))
    else:
        lines = {"": ""}
        for split, values in zip(("train", "val", "test"), splits.values()):
            for value in values:
                word = ("cat", "dog")[value % 2]
                name = {"classes": f"{split}/{word}", "classes-above": f"{word}/{split}"}.get(request.param, split)
                put(folder / f"{name}/{value}.png", png(value))
                lines[""] += f"{name}/{value}.png,{word}\n"
                lines[name] = lines.get(name, "") + f"{value}.png,{word}\n"
        for name, text in lines.items():
            if "metadata" in request.param and (request.param == "one-metadata") == (name == ""):
                put(folder / name / "metadata.csv", f"file_name,text\n{text}")
    return folder


def test_the_split_for_training_is_read_and_the_others_are_reported(data, capfd, tmp_path):
    assert sorted(greys(open_data(data))) == [1, 2]
    printed = capfd.readouterr().err
    assert "the split train is read, and not" in printed
    assert "validation (1 " in printed
    assert "test (1 " in printed
    assert list(made.findings(data, tmp_path / "out")) == ["other-splits"]


@pytest.mark.parametrize(("word", "value"), [("validation", 3), ("val", 3), ("test", 4)])
def test_another_split_can_be_selected(data, word, value, capfd):
    assert greys(open_data(data, split=word, classes="none")) == [value]
    assert greys(open_data(f"{data}:{word}", classes="none")) == [value]
    config = resolve_data(f"{data}:{word}", (8, 8)).model_copy(update={"classes": "none"})
    assert greys(config.open()) == [value]
    assert not capfd.readouterr().err


def test_a_split_that_does_not_exist(data, tmp_path):
    with pytest.raises(TesseraError, match=r"has no split 'extra' \(data\.split\): it has t"):
        open_data(data, split="extra")
    put(tmp_path / "plain/a.png", png(1))
    with pytest.raises(TesseraError, match=r"has no split 'test' .*: its files and folders name none"):
        open_data(tmp_path / "plain", split="test")


def test_classes_are_below_or_above_the_folders_of_splits(tmp_path):
    for name in ("a/train/cat/1", "a/train/dog/2", "a/val/cat/3", "b/cat/train/1", "b/dog/train/2", "b/dog/val/3"):
        put(tmp_path / f"{name}.png", png(int(name[-1])))
    for folder in ("a", "b"):
        assert samples(open_data(tmp_path / folder)) == [(1, "cat", None), (2, "dog", None)]


def test_without_a_split_for_training_one_must_be_chosen(tmp_path):
    for name in ("val/cat/1", "val/dog/2", "test/cat/3", "test/dog/4"):
        put(tmp_path / f"data/{name}.png", png(int(name[-1])))
    with pytest.raises(TesseraError, match=r"has the splits test, validation: give one of them, data\.split=test"):
        open_data(tmp_path / "data")
    assert greys(open_data(tmp_path / "data", split="test")) == [3, 4]
    assert greys(open_data(tmp_path / "data/val")) == [1, 2]


def test_files_without_a_split_are_for_training(tmp_path):
    for value, name in enumerate(("more", "train-0", "test-0")):
        table(tmp_path / f"{name}.parquet", value)
    assert greys(open_data(tmp_path)) == [0, 1]


def test_folders_with_the_names_of_splits_among_others_are_classes(tmp_path, capfd):
    for value, name in enumerate(("bus", "test", "train")):
        put(tmp_path / name / "a.png", png(value))
    assert open_data(tmp_path).class_names == ("bus", "test", "train")
    assert "2 folders are classes, although their names are those of splits (such as test)" in capfd.readouterr().err


def test_an_index_has_no_splits(tmp_path):
    put(tmp_path / "a.png", png(1))
    index.write(open_data(tmp_path).table, tmp_path / "index.parquet")
    with pytest.raises(TesseraError, match=r"is an index, which has no splits: leave data\.split=test out"):
        open_data(tmp_path / "index.parquet", split="test")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("data/Train.parquet", "train"),
        ("cifar_test.parquet", "test"),
        ("val/0.tar", "validation"),
        ("dev.parquet", "validation"),
        ("pretrain-0.tar", None),
        ("latest.parquet", None),
        ("training_set/0.parquet", None),
        ("valley.tar", None),
    ],
)
def test_the_split_of_a_file(name, split):
    assert split_of_file(name) == split


def test_the_depth_of_splits():
    assert split_depth(["train/cat/a", "val/dog/b"]) == 0
    assert split_depth(["data/train/a", "data/VAL/b"]) == 1
    assert split_depth(["train/a", "cat/b"]) is None
    assert split_depth(["a", "train/b"]) is None
    assert split_depth([]) is None


def test_splits_equal_those_of_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / ".hf"))
    folder = tmp_path / "data"
    for value, name in enumerate(("train-0", "train-1", "dev", "my_eval_set")):
        table(folder / f"{name}.parquet", value)
    theirs = datasets.load_dataset(str(folder))
    for split in ("train", "validation", "test"):
        truth = [datasets.Image().decode_example({"bytes": row["image"], "path": None}) for row in theirs[split]]
        assert greys(open_data(folder, split=split)) == [image.getpixel((0, 0))[0] for image in truth]


# A column of splits


ROWS = [("0.png", "train"), ("1.png", "Val"), ("2.png", ""), ("3.png", "test"), ("4.png", "train")]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_column_of_metadata_selects_the_split(tmp_path, kind):
    for value, (name, _) in enumerate(ROWS):
        put(tmp_path / name, png(value))
    if kind == "csv":
        put(tmp_path / "metadata.csv", "file_name,Split\n" + "".join(f"{name},{split}\n" for name, split in ROWS))
    elif kind == "jsonl":
        lines = [json.dumps({"file_name": name, "split": split or None}) for name, split in ROWS]
        put(tmp_path / "metadata.jsonl", "\n".join(lines))
    else:
        names, splits = zip(*ROWS)
        parquet.write_table(
            pyarrow.table({"file_name": list(names), "split": list(splits)}), tmp_path / "metadata.parquet"
        )
    source = open_data(tmp_path)
    assert [grey for grey, _, _ in samples(source)] == [0, 2, 4]
    (note,) = source.notes
    assert note.kind == "other-splits"
    assert "the split train is read, and not validation (1 rows), test (1 rows)" in note.text
    assert [grey for grey, _, _ in samples(open_data(tmp_path, split="validation"))] == [1]
    assert [grey for grey, _, _ in samples(open_data(tmp_path, split="test"))] == [3]


def test_a_column_of_other_words_is_named_and_every_row_is_read(tmp_path):
    for value, name in enumerate(("0.png", "1.png")):
        put(tmp_path / name, png(value))
    put(tmp_path / "metadata.csv", "file_name,split\n0.png,1\n1.png,fold2\n")
    source = open_data(tmp_path)
    assert len(source) == 2
    (note,) = source.notes
    assert (note.kind, note.names) == ("unused-columns", ("1", "fold2"))
    with pytest.raises(TesseraError, match="has no split 'test'"):
        open_data(tmp_path, split="test")


def test_a_column_of_tables_is_named(tmp_path):
    table(tmp_path / "a.parquet", 0, 1, split=["train", "train"])
    assert open_data(tmp_path).notes == []
    table(tmp_path / "b.parquet", 2, 3, split=["train", "test"])
    (note,) = open_data(tmp_path).notes
    assert (note.kind, note.names) == ("unused-columns", ("test", "train"))
