"""Several captions of a sample, from every layout that has them, through the index to training."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from tessera.data import index
from tessera.data.captions import Captions
from tessera.data.columns import read_texts

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("layout_files.py"))))

CAPTIONS = [["one", "uno", "eins"], ["two"], [], None, ["three", "drei"]]
EXPECTED = [["one", "uno", "eins"], ["two"], [""], [], ["three", "drei"]]  # an empty list is an empty text


def captions_of(dataset) -> list[list[str]]:
    """All captions of each sample, as training reads them."""
    captions = Captions.of(dataset)
    texts = [captions.texts[number].as_py() for number in captions.numbers]
    ends = captions.counts.cumsum()
    return [texts[end - count : end] for end, count in zip(ends, captions.counts)]


def write_parquet(folder):
    made.table(folder / "a.parquet", *range(5), caption=CAPTIONS)


def write_arrow(folder):
    rows = pyarrow.table({"image": [made.png(value) for value in range(5)], "caption": CAPTIONS})
    folder.mkdir(exist_ok=True)
    with pyarrow.ipc.new_stream(str(folder / "a.arrow"), rows.schema) as writer:
        writer.write_table(rows, max_chunksize=2)


def write_json_lines(folder):
    rows = [{"file_name": f"{number}.png", "caption": texts} for number, texts in enumerate(CAPTIONS)]
    made.put(folder / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    for number in range(5):
        made.put(folder / f"{number}.png", made.png(number))


def write_metadata_table(folder):
    write_json_lines(folder)
    (folder / "metadata.jsonl").unlink()
    rows = pyarrow.table({"file_name": [f"{number}.png" for number in range(5)], "caption": CAPTIONS})
    parquet.write_table(rows, folder / "metadata.parquet")


def write_tar(folder):
    members = []
    for number, texts in enumerate(CAPTIONS):
        members.append((f"{number}.png", made.png(number)))
        if texts is not None:
            members.append((f"{number}.json", json.dumps({"caption": texts})))
    made.tar(folder / "a.tar", *members)


LAYOUTS = [write_parquet, write_arrow, write_json_lines, write_metadata_table, write_tar]


@pytest.mark.parametrize("write", LAYOUTS)
def test_every_layout(write, tmp_path):
    write(tmp_path)
    dataset = made.open_data(tmp_path)
    expected = EXPECTED if write is not write_tar else [texts or [] for texts in CAPTIONS]
    assert captions_of(dataset) == expected
    assert [dataset.caption(number) for number in range(5)] == [texts[0] if texts else None for texts in expected]
    assert not [note for note in dataset.notes if "caption" in note.text]
    index.write(dataset.table, tmp_path / "index.parquet")
    assert captions_of(made.open_data(tmp_path / "index.parquet")) == expected


def test_indexes_of_several_data_sets_and_parts(tmp_path):
    write_parquet(tmp_path / "a")
    write_tar(tmp_path / "b")
    made.put(tmp_path / "c" / "0.png", made.png())
    made.put(tmp_path / "c" / "0.txt", "alone")
    dataset = made.open_data([tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    assert captions_of(dataset) == [*EXPECTED, *(texts or [] for texts in CAPTIONS), ["alone"]]
    index.write(dataset.table.take([4, 10, 0]), tmp_path / "part.parquet")
    assert captions_of(made.open_data(tmp_path / "part.parquet")) == [EXPECTED[4], ["alone"], EXPECTED[0]]


def test_an_index_without_the_column_is_read(tmp_path):
    made.put(tmp_path / "0.png", made.png())
    made.put(tmp_path / "0.txt", "alone")
    table = made.open_data(tmp_path).table
    fingerprint = index.fingerprint(table)
    index.write(table.drop_columns(["other_captions"]), tmp_path / "index.parquet")
    dataset = made.open_data(tmp_path / "index.parquet")
    assert captions_of(dataset) == [["alone"]]
    assert index.fingerprint(dataset.table) == fingerprint


def test_the_fingerprint_depends_on_further_captions(tmp_path):
    tables = []
    for name, texts in (("a", [["one", "two"]]), ("b", [["one", "other"]]), ("c", [["one"]]), ("d", ["one"])):
        made.table(tmp_path / name / "a.parquet", 0, caption=texts)
        tables.append(index.fingerprint(made.open_data(tmp_path / name).table))
    assert tables[0]["captions"] != tables[1]["captions"] != tables[2]["captions"]
    assert tables[2] == tables[3]


def test_json_of_mixed_values(tmp_path):
    values = ["text", ["a", None, 3, {"x": 1}], [["b", ["c"]], "d"], 7, None, {"x": 1}, [None]]
    rows = [{"file_name": f"{number}.png", "caption": value} for number, value in enumerate(values)]
    made.put(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    for number in range(len(values)):
        made.put(tmp_path / f"{number}.png", made.png(number))
    expected = [["text"], ["a", "3"], ["b", "c", "d"], ["7"], [], [], []]
    assert captions_of(made.open_data(tmp_path)) == expected


LISTS = st.lists(
    st.none() | st.lists(st.none() | st.text(st.characters(codec="utf-8"), max_size=3), max_size=3), max_size=8
)


@given(LISTS, st.integers(0, 8), st.booleans())
def test_lists_are_read_as_python_reads_them(lists, cut, as_large):
    """In chunks and slices, with null values anywhere."""
    kind = pyarrow.large_list(pyarrow.large_string()) if as_large else pyarrow.list_(pyarrow.string())
    whole = pyarrow.array([["before", "x"], *lists], kind)[1:]
    column = pyarrow.chunked_array([whole[:cut], whole[cut:]])
    texts = read_texts(column)
    others = [None] * len(lists) if texts.others is None else texts.others.to_pylist()
    expected = [[] if each is None else [text for text in each if text is not None] for each in lists]
    expected = [[""] if each == [] else texts for each, texts in zip(lists, expected)]
    assert texts.texts.to_pylist() == [each[0] if each else None for each in expected]
    assert [each or [] for each in others] == [each[1:] for each in expected]
    assert all(each is None or each for each in others)


def test_lists_of_a_fixed_size():
    kind = pyarrow.list_(pyarrow.string(), 2)
    texts = read_texts(pyarrow.chunked_array([pyarrow.array([["a", "b"], None, ["c", None]], kind)]))
    assert (texts.texts.to_pylist(), texts.others.to_pylist()) == (["a", None, "c"], [["b"], None, None])


def test_bytes_of_another_encoding_in_lists():
    values = [[b"ok"], ["Löwe".encode("cp1252"), b"lion"], [b"\0\xff"]]
    texts = read_texts(pyarrow.chunked_array([pyarrow.array(values, pyarrow.list_(pyarrow.binary()))]))
    assert texts.texts.to_pylist() == ["ok", "Löwe", None]
    assert (texts.guessed, texts.unreadable) == ([1], [2])
    assert np.all(texts.others.to_pylist()[1] == ["lion"])
