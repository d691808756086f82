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


def make_index(root: Path, class_names=("cat", "dog"), **changes):
    columns = {"path": ["a.png", "b.png", "c/d.png"], "label": [1, 0, None], "caption": ["one", None, ""]}
    return index.build(root, class_names, **{**columns, **changes})


def test_missing_columns_are_null(tmp_path):
    table = index.build(tmp_path, path=["a.png"], height=np.array([3], np.int32))
    assert table.to_pylist() == [
        {name: {"path": "a.png", "height": 3}.get(name) for name in index.COLUMNS},
    ]
    assert index.metadata(table) == (tmp_path, ())
    with pytest.raises(ValueError, match="hight"):
        index.build(tmp_path, path=["a.png"], hight=[3])


def test_an_index_reads_back_as_it_was_written(tmp_path):
    table = make_index(tmp_path, hash=np.array([2**64 - 1, 0, 5], np.uint64), offset=[512, None, 2**40])
    index.write(table, tmp_path / "index.parquet")
    result = index.read(tmp_path / "index.parquet")
    assert result.equals(table)
    assert index.metadata(result) == (tmp_path, ("cat", "dog"))
    np.testing.assert_array_equal(index.labels(result), [1, 0, -1])
    assert index.labels(result).dtype == np.int32


def test_rows_that_are_filtered_stay_an_index(tmp_path):
    table = make_index(tmp_path).filter(arrow.array([True, False, True]))
    index.write(table, tmp_path / "index.parquet")
    result = index.read(tmp_path / "index.parquet")
    assert result["path"].to_pylist() == ["a.png", "c/d.png"]
    assert index.metadata(result) == (tmp_path, ("cat", "dog"))


@pytest.mark.parametrize("path", ["index.parquet", "deep/index.parquet", "../index.parquet"])
def test_an_index_and_its_files_move_together(tmp_path, path):
    root = tmp_path / "before/data"
    root.mkdir(parents=True)
    index.write(make_index(root), root / path)
    shutil.move(tmp_path / "before", tmp_path / "after")
    assert index.metadata(index.read(tmp_path / "after/data" / path))[0] == tmp_path / "after/data"


def test_an_index_elsewhere_keeps_the_whole_path_of_its_root(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    index.write(make_index(root), tmp_path / "lists/index.parquet")
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "lists").rename(tmp_path / "deep/er/lists")
    assert index.metadata(index.read(tmp_path / "deep/er/lists/index.parquet"))[0] == root


def test_a_root_that_is_gone(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    index.write(make_index(root), tmp_path / "lists/index.parquet")
    root.rmdir()
    with pytest.raises(TesseraError, match="expected in .*data, which is not a folder"):
        index.read(tmp_path / "lists/index.parquet")


def test_another_format(tmp_path):
    metadata = {"format": index.FORMAT + 1, "root": ".", "class_names": []}
    table = make_index(tmp_path).replace_schema_metadata({index.METADATA_KEY: json.dumps(metadata).encode()})
    parquet.write_table(table, tmp_path / "index.parquet")
    with pytest.raises(TesseraError, match=f"has format {index.FORMAT + 1}.* reads format {index.FORMAT} only"):
        index.read(tmp_path / "index.parquet")


@pytest.mark.parametrize("metadata", [b"", b"{", b"[]", b"{}", b'{"format": "x"}', b'{"format": 1, "root": 5}'])
def test_damaged_metadata(tmp_path, metadata):
    parquet.write_table(
        make_index(tmp_path).replace_schema_metadata({index.METADATA_KEY: metadata}), tmp_path / "index.parquet"
    )
    with pytest.raises(TesseraError, match="index.parquet is damaged"):
        index.read(tmp_path / "index.parquet")


def test_missing_columns(tmp_path):
    parquet.write_table(make_index(tmp_path).drop_columns(["label"]), tmp_path / "index.parquet")
    with pytest.raises(TesseraError, match="is damaged.*label"):
        index.read(tmp_path / "index.parquet")


def test_other_files_are_not_an_index(tmp_path):
    parquet.write_table(arrow.table({"path": ["a.png"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no more")
    index.write(make_index(tmp_path), tmp_path / "c.parquet")
    result = [index.is_index(tmp_path / name) for name in ("a.parquet", "b.parquet", "gone.parquet", "c.parquet")]
    assert result == [False, False, False, True]


def test_several_indexes_are_concatenated_by_class_name(tmp_path):
    one = make_index(tmp_path / "one")
    other = make_index(tmp_path / "deep/other", ("bird", "cat"), path=["x.png", "y.png", "z.png"], label=[0, 1, 1])
    result = index.concat([one, other])
    assert index.metadata(result) == (tmp_path, ("cat", "dog", "bird"))
    assert result["path"].to_pylist() == [
        *("one/a.png", "one/b.png", "one/c/d.png"),
        *("deep/other/x.png", "deep/other/y.png", "deep/other/z.png"),
    ]
    assert result["label"].to_pylist() == [1, 0, None, 2, 0, 0]
    assert result["caption"].to_pylist() == ["one", None, ""] * 2


def test_concatenation_with_an_index_without_classes(tmp_path):
    result = index.concat([make_index(tmp_path), make_index(tmp_path, (), label=None)])
    assert index.metadata(result) == (tmp_path, ("cat", "dog"))
    assert result["label"].to_pylist() == [1, 0, None, None, None, None]
    assert index.concat([result]) is result


def test_the_fingerprint_depends_on_samples_order_labels_and_captions_only(tmp_path):
    columns: dict = {"path": ["a.png", "b.tar", "b.tar"], "offset": [None, 512, 2048], "length": [None, 99, 98]}
    columns |= {"label": [0, 1, None], "caption": ["ä", None, ""], "height": [8, 8, 8]}
    base = index.build(tmp_path, ["x", "y"], **columns)
    expected = index.fingerprint(base)
    assert expected["count"] == 3
    index.write(base, tmp_path / "index.parquet")
    chunks = arrow.concat_tables([base.slice(0, 1), base.slice(1)]).replace_schema_metadata(base.schema.metadata)
    moved = index.with_metadata(base, tmp_path / "elsewhere", ["x", "y"])
    unmeasured = index.build(tmp_path, ["x", "y"], **{**columns, "height": None})
    for same in (index.read(tmp_path / "index.parquet"), chunks, moved, unmeasured):
        assert index.fingerprint(same) == expected
    changes = [
        ("samples", {"path": ["a.pn", "gb.tar", "b.tar"]}),
        ("samples", {"offset": [None, 512, 1024]}),
        ("labels", {"label": [0, 1, 1]}),
        ("captions", {"caption": ["ä", "", None]}),
    ]
    for part, change in changes:
        other = index.fingerprint(index.build(tmp_path, ["x", "y"], **columns | change))
        assert [name for name in expected if other[name] != expected[name]] == [part]
    assert index.fingerprint(base.take([0, 2, 1]))["samples"] != expected["samples"]
    assert index.fingerprint(index.build(tmp_path, ["x", "z"], **columns))["labels"] != expected["labels"]


def test_a_large_index_is_memory_mapped_and_equal(tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    table = make_index(tmp_path)
    index.write(table, tmp_path / "index.parquet")
    monkeypatch.setattr(index, "MAX_ROWS_IN_MEMORY", 2)
    before = arrow.total_allocated_bytes()
    mapped = index.read(tmp_path / "index.parquet")
    assert mapped.equals(table)
    assert arrow.total_allocated_bytes() - before < 4096
    np.testing.assert_array_equal(index.labels(mapped), index.labels(table))
    index.write(make_index(tmp_path, caption=["new", "and", "longer"]), tmp_path / "index.parquet")
    assert index.read(tmp_path / "index.parquet")["caption"].to_pylist() == ["new", "and", "longer"]
    assert len(list((tmp_path / "cache/indexes").iterdir())) == 2


def test_an_index_written_in_parts_equals_one_written_whole(tmp_path):
    paths = [f"{row:03d}.png" for row in range(10)]
    table = index.build(tmp_path, ("a", "b"), path=paths, label=np.arange(10, dtype=np.int32) % 3 - 1)
    index.write(table, tmp_path / "whole.parquet")
    index.write_parts((table.slice(start, 4) for start in (0, 4, 8)), table, tmp_path / "parts.parquet")
    assert index.read(tmp_path / "parts.parquet").equals(index.read(tmp_path / "whole.parquet"), check_metadata=True)
