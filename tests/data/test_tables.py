"""Tables of images: parquet files as the Hugging Face hub has them, and as they go wrong; arrow files."""

import contextlib
import io
import json
import random
from datetime import date

import numpy as np
import pytest
from PIL import Image

from tessera.data import FilesConfig
from tessera.data.images import InvalidSample
from tessera.errors import TesseraError

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def png(value: int = 0, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(buffer, format="png")
    return buffer.getvalue()


def struct(*images: bytes) -> list[dict]:
    return [{"bytes": image, "path": f"{number}.png"} for number, image in enumerate(images)]


def put(path, metadata: dict | bytes | None = None, **columns):
    table = arrow.table(columns)
    if metadata is not None:
        raw = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
        table = table.replace_schema_metadata({b"huggingface": raw})
    parquet.write_table(table, path)
    return path


def hub(*names: str, column: str = "label") -> dict:
    return {"info": {"features": {"image": {"_type": "Image"}, column: {"names": list(names), "_type": "ClassLabel"}}}}


def open_data(path, **changes):
    return FilesConfig(path=str(path), size=8, **changes).open()


def read(source) -> list[tuple[int, int]]:
    return [(int(source.pixels(i)[0, 0, 0]), source.label(i)) for i in range(len(source))]


def test_structs_of_bytes_and_path(tmp_path):
    source = open_data(put(tmp_path / "a.parquet", image=struct(png(5), png(6)), label=[1, 0]))
    assert source.pixels(0).shape == (3, 8, 8)
    assert read(source) == [(5, 1), (6, 0)]
    assert source.class_names == ("0", "1")
    assert source.name(1) == f"{tmp_path / 'a.parquet'} row 1"


def test_raw_bytes_and_other_columns(tmp_path):
    path = put(tmp_path / "a.parquet", img=[png(5), png(6)], y=[0, 1], more=["a", "b"])
    source = open_data(path, image="img", label="y")
    assert read(source) == [(5, 0), (6, 1)]


def test_labels_in_words_are_classes_in_alphabetical_order(tmp_path):
    source = open_data(put(tmp_path / "a.parquet", image=[png()] * 4, label=["emu", "cat", "dog", "cat"]))
    assert source.class_names == ("cat", "dog", "emu")
    assert [source.label(i) for i in range(4)] == [2, 0, 1, 0]


def test_labels_in_a_dictionary_column(tmp_path):
    labels = arrow.array(["dog", "cat"]).dictionary_encode()
    source = open_data(put(tmp_path / "a.parquet", image=[png(), png()], label=labels))
    assert source.class_names == ("cat", "dog")
    assert [source.label(i) for i in range(2)] == [1, 0]


def test_class_names_come_from_the_hub_s_metadata(tmp_path):
    path = put(tmp_path / "a.parquet", hub("cat", "dog", "emu"), image=[png(), png()], label=[2, 0])
    assert open_data(path).class_names == ("cat", "dog", "emu")


@pytest.mark.parametrize("metadata", [b"{broken", {}, {"info": None}, {"info": {"features": {"label": {}}}}, [1]])
def test_other_metadata_gives_numbers_for_names(tmp_path, metadata):
    path = put(tmp_path / "a.parquet", metadata, image=[png(), png()], label=[2, 0])
    assert open_data(path).class_names == ("0", "1", "2")


def test_more_classes_than_names_is_an_error(tmp_path):
    path = put(tmp_path / "a.parquet", hub("cat", "dog"), image=[png(), png()], label=[2, 0])
    with pytest.raises(TesseraError, match="class 2, but the file names 2 classes"):
        open_data(path)


def test_without_labels(tmp_path):
    source = open_data(put(tmp_path / "a.parquet", image=[png(5), png(6)]), label=None)
    assert source.class_names == ()
    assert read(source) == [(5, 0), (6, 0)]


def test_a_folder_of_files_is_read_in_the_order_of_their_names(tmp_path):
    (tmp_path / "deep").mkdir()
    put(tmp_path / "train-00001.parquet", image=[png(2), png(3)], label=["b", "a"])
    put(tmp_path / "train-00000.parquet", image=[png(1)], label=["a"])
    put(tmp_path / "deep/x.parquet", image=[png(0)], label=["b"])
    assert read(open_data(tmp_path)) == [(0, 1), (1, 0), (2, 1), (3, 0)]


def test_files_with_different_columns(tmp_path):
    put(tmp_path / "0.parquet", image=[png()], label=["a"])
    put(tmp_path / "1.parquet", image=[png()], label=[1])
    with pytest.raises(TesseraError, match="different columns"):
        open_data(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "imag"}, r"unknown column 'imag'; did you mean 'image'\?"),
        ({"label": "lable"}, r"unknown column 'lable'; did you mean 'label'\?"),
        ({"label": "zzz"}, r"unknown column 'zzz'; known: image, label"),
    ],
)
def test_a_missing_column_names_the_nearest(tmp_path, changes, message):
    path = put(tmp_path / "a.parquet", image=[png()], label=[0])
    with pytest.raises(TesseraError, match=message):
        open_data(path, **changes)


def test_missing_labels_are_counted(tmp_path):
    path = put(tmp_path / "a.parquet", image=[png()] * 3, label=[0, None, None])
    with pytest.raises(TesseraError, match="2 of 3 rows have no label in column 'label'"):
        open_data(path)


@pytest.mark.parametrize("labels", [[0.5, 1.5], [-1, -2], [[0], [1]], [date(2020, 1, 1), date(2020, 1, 2)]])
def test_labels_that_are_neither_numbers_nor_names(tmp_path, labels):
    with pytest.raises(TesseraError, match="neither class numbers nor names"):
        open_data(put(tmp_path / "a.parquet", image=[png(), png()], label=labels))


@pytest.mark.parametrize("label", [-1, 0.5, None])
def test_rows_without_a_usable_label_are_named(tmp_path, label):
    path = put(tmp_path / "a.parquet", image=[png()] * 3, label=[0, 1, label])
    reason = "" if label is None else rf" \(such as row 2: {label}\)"
    with pytest.raises(TesseraError, match=f"1 of 3 rows have no label in column 'label'{reason}; give them one"):
        open_data(path)


@pytest.mark.parametrize("labels", [[1.0, 0.0], [True, False]])
def test_whole_numbers_and_truth_values_are_labels(tmp_path, labels):
    source = open_data(put(tmp_path / "a.parquet", image=[png(), png()], label=labels))
    assert source.class_names == (("False", "True") if labels[0] is True else ("0", "1"))
    assert [source.label(i) for i in range(2)] == [1, 0]


def test_identifiers_are_not_class_numbers(tmp_path):
    with pytest.raises(TesseraError, match=r"1 of 2 rows .*row 1: 987654321012, which is not a class number"):
        open_data(put(tmp_path / "a.parquet", image=[png(), png()], label=[0, 987654321012]))


def test_one_class_only(tmp_path):
    source = open_data(put(tmp_path / "a.parquet", image=[png(), png()], label=["cat", "cat"]))
    assert (source.class_names, [source.label(i) for i in range(2)]) == (("cat",), [0, 0])


def test_a_truncated_file(tmp_path):
    path = put(tmp_path / "a.parquet", image=[png(i) for i in range(9)], label=list(range(9)))
    whole = path.read_bytes()
    for share in (0.1, 0.5, 0.9, 0.99):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(TesseraError, match=r"a\.parquet is damaged or not a valid parquet file"):
            open_data(path)


def test_garbage_in_the_middle(tmp_path):
    path = put(tmp_path / "a.parquet", image=[png(i) for i in range(9)], label=list(range(9)))
    whole = bytearray(path.read_bytes())
    whole[4:400] = b"\xff" * 396  # of the images
    path.write_bytes(whole)
    source = open_data(path)
    for row in range(9):
        with pytest.raises(InvalidSample, match="cannot be unpacked"):
            source.pixels(row)
    path.write_bytes(whole[:-100] + b"\xff" * 100)  # of the description of the file
    with pytest.raises(TesseraError, match="is damaged or not a valid parquet file"):
        open_data(path)


def test_random_damage_raises_nothing_but_tessera_errors(tmp_path):
    whole = put(
        tmp_path / "a.parquet", hub("a", "b", "c"), image=struct(*[png()] * 6), label=[0, 1, 2] * 2
    ).read_bytes()
    generator = random.Random(0)
    opens = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(generator.randrange(1, 5)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        (tmp_path / "a.parquet").write_bytes(damaged)
        with contextlib.suppress(TesseraError):
            source = open_data(tmp_path / "a.parquet")
            opens += 1
            for index in range(len(source)):
                with contextlib.suppress(InvalidSample):
                    source.pixels(index)
    assert 0 < opens < 300


@pytest.mark.parametrize("column", ["image", "label"])
def test_invalid_utf8(tmp_path, column, capfd):
    broken = arrow.Array.from_buffers(
        arrow.string(), 2, [*arrow.array(["ab", "cd"]).buffers()[:2], arrow.py_buffer(b"\xe9tcd")]
    )
    images = arrow.StructArray.from_arrays([arrow.array([png(3), png(4)]), broken], ["bytes", "path"])
    path = put(tmp_path / "a.parquet", image=images, label=broken if column == "label" else ["a", "b"])
    if column == "label":
        assert open_data(path).class_names == ("cd", "ét")
        assert "1 texts are not UTF-8 and were read as Windows-1252" in capfd.readouterr().err
    else:
        assert [source_pixel for source_pixel, _ in read(open_data(path))] == [3, 4]


def test_no_file_at_all(tmp_path):
    for path in (tmp_path, tmp_path / "gone.parquet"):
        with pytest.raises(TesseraError, match="contains no parquet file"):
            open_data(path, kind="parquet")


def test_no_rows(tmp_path):
    empty = arrow.array([], arrow.binary())
    with pytest.raises(TesseraError, match="contains no rows"):
        open_data(put(tmp_path / "a.parquet", image=empty, label=arrow.array([], arrow.int64())))


@pytest.mark.parametrize("image", [None, {"bytes": None, "path": "a.png"}])
def test_a_row_without_bytes_is_invalid(tmp_path, image):
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    images = arrow.array([image, {"bytes": png(3), "path": None}], kind)
    source = open_data(put(tmp_path / "a.parquet", image=images, label=[0, 1]))
    with pytest.raises(InvalidSample, match="no image bytes"):
        source.pixels(0)
    np.testing.assert_array_equal(source.pixels(1), np.full((3, 8, 8), 3))


# Detection of columns


def test_the_column_of_images_is_detected_by_its_type(tmp_path):
    source = open_data(put(tmp_path / "a.parquet", img=struct(png(5), png(6)), text=["five", "six"], label=[0, 1]))
    assert read(source) == [(5, 0), (6, 1)]
    assert [source.caption(i) for i in range(2)] == ["five", "six"]


def test_the_column_of_images_is_detected_by_the_metadata_of_datasets(tmp_path):
    features = {"info": {"features": {"photo": {"_type": "Image"}}}}
    assert read(open_data(put(tmp_path / "a.parquet", features, mask=[png(1)], photo=[png(5)]))) == [(5, 0)]


def test_two_columns_of_images_are_an_error(tmp_path):
    path = put(tmp_path / "a.parquet", mask=[png(1)], photo=[png(5)])
    with pytest.raises(TesseraError, match=r"set data\.image .*columns are mask, photo"):
        open_data(path)
    assert read(open_data(path, image="photo")) == [(5, 0)]


def test_without_a_label_column_there_are_no_classes(tmp_path):
    source = open_data(put(tmp_path / "a.parquet", image=[png(5)], group=["a"]))
    assert source.class_names == ()


def test_captions_by_another_name(tmp_path):
    path = put(tmp_path / "a.parquet", image=[png(5)], text=["no"], title=["yes"], number=[7])
    assert open_data(path, caption="title").caption(0) == "yes"
    assert open_data(path, caption="number").caption(0) == "7"
    assert open_data(path, caption=None).caption(0) is None
    with pytest.raises(TesseraError, match=r"unknown column 'tile'; did you mean 'title'\? \(data\.caption\)"):
        open_data(path, caption="tile")


def test_the_first_of_several_captions_is_the_caption(tmp_path):
    texts = [["one", "uno"], ["two"], [], None]
    source = open_data(put(tmp_path / "a.parquet", image=[png()] * 4, caption=texts))
    assert [source.caption(i) for i in range(4)] == ["one", "two", "", None]


def test_captions_that_are_not_text(tmp_path):
    path = put(tmp_path / "a.parquet", image=[png()], text=[{"a": 1}])
    assert open_data(path).caption(0) is None
    with pytest.raises(TesseraError, match=r"column 'text' is not text .*; set data\.caption"):
        open_data(path, caption="text")


def test_class_folders_do_not_apply_to_tables(tmp_path):
    with pytest.raises(TesseraError, match=r"data\.classes=folders, but .* contains tables"):
        open_data(put(tmp_path / "a.parquet", image=[png()]), classes="folders")


def test_hive_style_folder_names_are_not_columns(tmp_path):
    (tmp_path / "label=7").mkdir()
    put(tmp_path / "label=7/a.parquet", image=[png(1), png(2)], label=["x", "y"])
    assert open_data(tmp_path).class_names == ("x", "y")


# Access to the images


def test_large_files_are_unpacked_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "caches"))
    images = struct(*(png(value) for value in range(40)))
    images[7] = {"bytes": None, "path": None}
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    table = arrow.table({"image": arrow.array(images, kind), "label": [value % 3 for value in range(40)]})
    (tmp_path / "data").mkdir()
    path = tmp_path / "data/a.parquet"
    parquet.write_table(table, path, row_group_size=11)
    in_memory = open_data(path)
    monkeypatch.setattr("tessera.data.tables.MAX_IN_MEMORY", 100)
    monkeypatch.setattr("tessera.data.tables.ROWS_PER_BATCH", 3)
    for message in ("unpacking a.parquet once into", ""):
        mapped = open_data(path)
        assert message in capfd.readouterr().err if message else not capfd.readouterr().err
        for row in (39, 0, 22, 10, 11):
            assert mapped.encoded(row) == in_memory.encoded(row) == table["image"][row]["bytes"].as_py()
        with pytest.raises(InvalidSample, match="no image bytes"):
            mapped.encoded(7)
    assert len(list((tmp_path / "caches/tables").glob("*.arrow"))) == 1
    parquet.write_table(table.slice(20), path)  # another file of the same name
    assert open_data(path).encoded(0) == table["image"][20]["bytes"].as_py()


def test_a_row_may_name_a_file_instead(tmp_path):
    (tmp_path / "a.png").write_bytes(png(9))
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    images = arrow.array([{"bytes": None, "path": "a.png"}, {"bytes": None, "path": "b.png"}], kind)
    source = open_data(put(tmp_path / "a.parquet", image=images))
    assert source.encoded(0) == tmp_path / "a.png"
    with pytest.raises(InvalidSample, match="no image bytes"):
        source.encoded(1)


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_files(tmp_path, kind):
    table = arrow.table({"image": [png(5), png(6)], "label": ["b", "a"]})
    new = arrow.ipc.new_stream if kind == "stream" else arrow.ipc.new_file
    with new(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert read(open_data(tmp_path / "a.arrow")) == [(5, 1), (6, 0)]
    (tmp_path / "a.arrow").write_bytes((tmp_path / "a.arrow").read_bytes()[:200])
    with pytest.raises(TesseraError, match=r"a\.arrow is damaged or not a valid arrow file"):
        open_data(tmp_path / "a.arrow")


def test_damaged_bytes_cost_the_rows_of_their_row_group_only(tmp_path, monkeypatch):
    images = struct(*(png(value, 64) for value in range(40)))
    table = arrow.table({"image": images, "label": [value % 2 for value in range(40)]})
    path = tmp_path / "a.parquet"
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "caches"))
    parquet.write_table(table, path, row_group_size=10, compression="zstd", use_dictionary=False)
    column = parquet.read_metadata(path).row_group(2).column(0)
    content = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 50] = b"\xff" * 50
    path.write_bytes(content)
    for limit in (1 << 30, 100):  # in memory, and unpacked to the disk
        monkeypatch.setattr("tessera.data.tables.MAX_IN_MEMORY", limit)
        source = open_data(path)
        assert source.class_names == ("0", "1")
        for row in range(40):
            if 20 <= row < 30:
                with pytest.raises(InvalidSample, match="cannot be unpacked"):
                    source.pixels(row)
            else:
                assert source.pixels(row)[0, 0, 0] == row


def test_images_in_a_dictionary_column(tmp_path):
    images = arrow.array([png(5), png(6), png(5)]).dictionary_encode()
    source = open_data(put(tmp_path / "a.parquet", image=images), image="image")
    assert [int(source.pixels(row)[0, 0, 0]) for row in range(3)] == [5, 6, 5]
