"""The index: a data set as one table, in memory and on disk."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tessera.data import index
from tessera.errors import TesseraError

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def made(root: Path, class_names=("cat", "dog"), **changes):
    columns = {"path": ["a.png", "b.png", "c/d.png"], "label": [1, 0, None], "caption": ["one", None, ""]}
    return index.build(root, class_names, **{**columns, **changes})


def test_what_is_not_given_is_null(tmp_path):
    table = index.build(tmp_path, path=["a.png"], height=np.array([3], np.int32))
    assert table.to_pylist() == [
        {name: {"path": "a.png", "height": 3}.get(name) for name in index.COLUMNS},
    ]
    assert index.metadata(table) == (tmp_path, ())
    with pytest.raises(ValueError, match="hight"):
        index.build(tmp_path, path=["a.png"], hight=[3])


def test_an_index_reads_back_as_it_was_written(tmp_path):
    table = made(tmp_path, hash=np.array([2**64 - 1, 0, 5], np.uint64), offset=[512, None, 2**40])
    index.write(table, tmp_path / "index.parquet")
    found = index.read(tmp_path / "index.parquet")
    assert found.equals(table)
    assert index.metadata(found) == (tmp_path, ("cat", "dog"))
    np.testing.assert_array_equal(index.labels(found), [1, 0, -1])
    assert index.labels(found).dtype == np.int32


def test_rows_that_are_filtered_stay_an_index(tmp_path):
    table = made(tmp_path).filter(arrow.array([True, False, True]))
    index.write(table, tmp_path / "index.parquet")
    found = index.read(tmp_path / "index.parquet")
    assert found["path"].to_pylist() == ["a.png", "c/d.png"]
    assert index.metadata(found) == (tmp_path, ("cat", "dog"))


@pytest.mark.parametrize("place", ["index.parquet", "deep/index.parquet", "../index.parquet"])
def test_an_index_and_its_files_move_together(tmp_path, place):
    root = tmp_path / "before/data"
    root.mkdir(parents=True)
    index.write(made(root), root / place)
    shutil.move(tmp_path / "before", tmp_path / "after")
    assert index.metadata(index.read(tmp_path / "after/data" / place))[0] == tmp_path / "after/data"


def test_an_index_elsewhere_keeps_the_whole_path_of_its_root(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    index.write(made(root), tmp_path / "lists/index.parquet")
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "lists").rename(tmp_path / "deep/er/lists")
    assert index.metadata(index.read(tmp_path / "deep/er/lists/index.parquet"))[0] == root


def test_a_root_that_is_gone(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    index.write(made(root), tmp_path / "lists/index.parquet")
    root.rmdir()
    with pytest.raises(TesseraError, match="is of files in .*data, which is no folder"):
        index.read(tmp_path / "lists/index.parquet")


def test_a_newer_format(tmp_path):
    told = {"format": index.FORMAT + 1, "root": ".", "class_names": []}
    table = made(tmp_path).replace_schema_metadata({index.METADATA_KEY: json.dumps(told).encode()})
    parquet.write_table(table, tmp_path / "index.parquet")
    with pytest.raises(TesseraError, match="newer than this Tessera"):
        index.read(tmp_path / "index.parquet")


@pytest.mark.parametrize("told", [b"", b"{", b"[]", b"{}", b'{"format": "x"}', b'{"format": 1, "root": 5}'])
def test_metadata_that_is_damaged(tmp_path, told):
    parquet.write_table(made(tmp_path).replace_schema_metadata({index.METADATA_KEY: told}), tmp_path / "index.parquet")
    with pytest.raises(TesseraError, match="index.parquet is damaged"):
        index.read(tmp_path / "index.parquet")


def test_columns_that_are_missing(tmp_path):
    parquet.write_table(made(tmp_path).drop_columns(["label"]), tmp_path / "index.parquet")
    with pytest.raises(TesseraError, match="has not the columns of an index"):
        index.read(tmp_path / "index.parquet")


def test_other_files_are_no_index(tmp_path):
    parquet.write_table(arrow.table({"path": ["a.png"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no more")
    index.write(made(tmp_path), tmp_path / "c.parquet")
    found = [index.is_index(tmp_path / name) for name in ("a.parquet", "b.parquet", "gone.parquet", "c.parquet")]
    assert found == [False, False, False, True]


def test_several_are_joined_by_the_names_of_their_classes(tmp_path):
    one = made(tmp_path / "one")
    other = made(tmp_path / "deep/other", ("bird", "cat"), path=["x.png", "y.png", "z.png"], label=[0, 1, 1])
    found = index.concat([one, other])
    assert index.metadata(found) == (tmp_path, ("cat", "dog", "bird"))
    assert found["path"].to_pylist() == [
        *("one/a.png", "one/b.png", "one/c/d.png"),
        *("deep/other/x.png", "deep/other/y.png", "deep/other/z.png"),
    ]
    assert found["label"].to_pylist() == [1, 0, None, 2, 0, 0]
    assert found["caption"].to_pylist() == ["one", None, ""] * 2


def test_joined_with_one_that_has_no_classes(tmp_path):
    found = index.concat([made(tmp_path), made(tmp_path, (), label=None)])
    assert index.metadata(found) == (tmp_path, ("cat", "dog"))
    assert found["label"].to_pylist() == [1, 0, None, None, None, None]
    assert index.concat([found]) is found
