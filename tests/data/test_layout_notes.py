"""What an index leaves out or reads otherwise: training prints it or refuses it, and the check reports the same."""

import json
import os
import runpy
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
from PIL import Image

from tessera.data.check import CheckRequest, report_findings, scan_data
from tessera.data.folders import image_suffixes, list_folder
from tessera.data.resolve import open_data as open_resolved
from tessera.data.resolve import resolve_data
from tessera.errors import TesseraError

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("layout_files.py"))))
open_data, png, put, samples, table, tar = made.open_data, made.png, made.put, made.samples, made.table, made.tar


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / ".caches"))


def hub(*names: str, column: str = "label") -> bytes:
    return json.dumps({"info": {"features": {column: {"names": names, "_type": "ClassLabel"}}}}).encode()


def jsonl(path: Path, *rows: dict) -> Path:
    return put(path, "".join(json.dumps(row) + "\n" for row in rows))


def images(folder: Path, *names: str) -> Path:
    for value, name in enumerate(names):
        put(folder / name, png(value))
    return folder


# Labels


def test_labels_of_several_files_are_joined_by_name(tmp_path):
    table(tmp_path / "a.parquet", 0, 1, label=[0, 1], metadata=hub("cat", "dog"))
    table(tmp_path / "b.parquet", 2, 3, label=[0, 1], metadata=hub("dog", "cat"))
    table(tmp_path / "c.parquet", 4, 5, label=["dog", "emu"])
    source = open_data(tmp_path)
    assert source.class_names == ("cat", "dog", "emu")
    assert [name for _, name, _ in samples(source)] == ["cat", "dog", "dog", "cat", "dog", "emu"]


def test_numbers_of_several_types_are_one_column(tmp_path):
    for number, kind in enumerate(("int32", "int64", "uint8", "float32")):
        table(tmp_path / f"{number}.parquet", 2 * number, 2 * number + 1, label=pyarrow.array([0, 1], kind))
    assert [name for _, name, _ in samples(open_data(tmp_path))] == ["0", "1"] * 4


def test_names_beside_numbers_are_refused_and_no_index_loses_them(tmp_path):
    table(tmp_path / "data/a.parquet", 0, 1, label=[0, 1])
    table(tmp_path / "data/b.parquet", 2, 3, label=["cat", "dog"])
    with pytest.raises(TesseraError, match="different columns in different files"):
        open_data(tmp_path / "data")
    assert "label-types" in made.findings(tmp_path / "data", tmp_path / "out")
    with pytest.raises(TesseraError, match="no index is written, which would lose the labels"):
        made.findings(tmp_path / "data", tmp_path / "out", write_index=tmp_path / "index.parquet")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("001 002", ("001", "002")),
        ("1 0", ("0", "1")),
        ("1.0 0.0", ("0", "1")),
        ("True False", ("False", "True")),
        ("2020-01-01 2020-01-02", ("2020-01-01", "2020-01-02")),
        ("7 cat", ("7", "cat")),
    ],
)
def test_labels_in_csv(tmp_path, text, names, capfd):
    images(tmp_path, "0.png", "1.png")
    rows = [f"{number}.png,{label}" for number, label in enumerate(text.split())]
    put(tmp_path / "metadata.csv", "\n".join(["file_name,label", *rows]))
    source = open_data(tmp_path)
    assert source.class_names == names
    if not text.startswith(("1", "0")):
        assert [name for _, name, _ in samples(source)] == text.split()
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([True, False], ["True", "False"]),
        ([1.0, 0.0], ["1", "0"]),
        ([1, "0"], ["1", "0"]),
        ([1, "cat"], ["1", "cat"]),
        (["1", "0"], ["1", "0"]),
    ],
)
def test_labels_in_json_lines(tmp_path, labels, names):
    images(tmp_path, "0.png", "1.png")
    jsonl(tmp_path / "metadata.jsonl", *({"file_name": f"{i}.png", "label": x} for i, x in enumerate(labels)))
    assert [name for _, name, _ in samples(open_data(tmp_path))] == names


@pytest.mark.parametrize("label", [-1, 0.5, None, "", [1]])
@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
def test_the_check_names_what_training_refuses_and_keeps_the_other_labels(tmp_path, label, layout):
    if layout == "parquet" and not isinstance(label, float | int | None):
        pytest.skip("a column of parquet has one type")
    folder, count = tmp_path / "data", 6
    labels = [number % 2 for number in range(count)]
    labels[3] = label
    if layout == "jsonl":
        images(folder, *(f"{number}.png" for number in range(count)))
        jsonl(folder / "metadata.jsonl", *({"file_name": f"{i}.png", "label": x} for i, x in enumerate(labels)))
    else:
        table(folder / "a.parquet", *range(count), label=labels)
    with pytest.raises(TesseraError, match="1 of 6 rows have no label"):
        open_data(folder)
    assert made.findings(folder, tmp_path / "out")["missing-labels"] == [3]
    target = tmp_path / "index.parquet"
    made.findings(folder, tmp_path / "out", exclude=("missing-labels",), write_index=target)
    assert [name for _, name, _ in samples(open_data(target))] == ["0", "1", "0", "0", "1"]


def test_without_valid_labels_evaluation_states_what_it_does_not_read(tmp_path, capfd):
    table(tmp_path / "a.parquet", 0, 1, label=[0.5, 1.5])
    source = open_resolved(resolve_data(str(tmp_path / "a.parquet"), (8, 8)))
    assert source.class_names == ()
    assert "read without classes: column 'label' contains neither class numbers nor names" in capfd.readouterr().err
    assert "invalid-labels" in made.findings(tmp_path / "a.parquet", tmp_path / "out")


def test_numbers_without_samples_are_reported(tmp_path, capfd):
    table(tmp_path / "a.parquet", 0, 1, label=[5, 905])
    assert len(open_data(tmp_path / "a.parquet").class_names) == 906
    assert "904 of 906 classes have no sample (such as 0)" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind"),
    [("Label", "label"), ("CLASS", "label"), ("Text", "caption"), ("Caption", "caption")],
)
def test_columns_are_recognized_in_any_case(tmp_path, name, kind):
    images(tmp_path / "a", "0.png", "1.png")
    put(tmp_path / "a/Metadata.CSV", f"File_Name,{name}\n0.png,one\n1.png,two\n")
    table(tmp_path / "b.parquet", 0, 1, **{name: ["one", "two"]})
    for path in ("a", "b.parquet"):
        position = {"label": 1, "caption": 2}[kind]
        assert [row[position] for row in samples(open_data(tmp_path / path))] == ["one", "two"]


@pytest.mark.parametrize("name", ["labels", "fine_label", "Category", "prompt", "description"])
def test_columns_that_look_like_labels_or_captions_are_named(tmp_path, name, capfd):
    kind = "caption" if name in ("prompt", "description") else "label"
    images(tmp_path / "a", "0.png", "1.png")
    put(tmp_path / "a/metadata.csv", f"file_name,{name}\n0.png,one\n1.png,two\n")
    table(tmp_path / "b.parquet", 0, 1, **{name: ["one", "two"]})
    members = [(f"{key}.json", json.dumps({name: key})) for key in "01"]
    tar(tmp_path / "c.tar", ("0.png", png(0)), ("1.png", png(1)), *members)
    for path in ("a", "b.parquet", "c.tar"):
        open_data(tmp_path / path)
        assert f"looks like {kind}s and is not used (such as {name}): set data.{kind}={name}" in capfd.readouterr().err
        assert "unused-columns" in made.findings(tmp_path / path, tmp_path / f"out-{path}")
        open_data(tmp_path / path, **{kind: name})
        assert not capfd.readouterr().err


def test_declared_labels_of_another_name_are_named(tmp_path, capfd):
    table(tmp_path / "a.parquet", 0, 1, cultivar=[0, 1], metadata=hub("a", "b", column="cultivar"))
    open_data(tmp_path / "a.parquet")
    assert "set data.label=cultivar" in capfd.readouterr().err


# Captions


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(["one", "two"]).dictionary_encode(),
        pyarrow.array([b"one", b"two"]),
        pyarrow.array(["one", "two"], pyarrow.large_string()),
        pyarrow.array(["one", "two"], pyarrow.string_view()),
        pyarrow.array([["one", "uno"], ["two"]]),
        pyarrow.array([["one"], ["two"]], pyarrow.large_list(pyarrow.binary())),
        pyarrow.array([["one"], ["two"]], pyarrow.list_(pyarrow.string(), 1)),
    ],
    ids=lambda column: str(column.type)[:30],
)
def test_captions_of_any_type_of_text(tmp_path, column):
    table(tmp_path / "a.parquet", 0, 1, text=column)
    assert [text for _, _, text in samples(open_data(tmp_path / "a.parquet"))] == ["one", "two"]


def test_captions_that_are_numbers(tmp_path):
    table(tmp_path / "a.parquet", 0, 1, text=[1900, 1901])
    images(tmp_path / "b", "0.png", "1.png")
    put(tmp_path / "b/metadata.csv", "file_name,text\n0.png,007\n1.png,1901\n")
    assert open_data(tmp_path / "a.parquet").caption(0) == "1900"
    assert open_data(tmp_path / "b").caption(0) == "007"


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-8-sig"])
def test_metadata_in_other_encodings(tmp_path, encoding, capfd):
    images(tmp_path, "0.png", "café.png")
    put(tmp_path / "metadata.csv", "file_name,text,label\n0.png,“one”,thé\ncafé.png,two,lait\n".encode(encoding))
    assert samples(open_data(tmp_path)) == [(0, "thé", "“one”"), (1, "lait", "two")]
    assert ("1 texts are not UTF-8 and were read as Windows-1252" in capfd.readouterr().err) == (encoding == "cp1252")


# Metadata


def test_images_that_the_metadata_does_not_list_are_reported(tmp_path, capfd):
    folder = images(tmp_path / "data", "cat/0.png", "cat/1.png", "dog/2.png")
    jsonl(folder / "cat/metadata.jsonl", {"file_name": "0.png", "text": "a cat"})
    assert samples(open_data(folder)) == [(0, None, "a cat")]
    assert "2 images are not in the metadata and are not used (such as cat/1.png)" in capfd.readouterr().err
    assert made.findings(folder, tmp_path / "out")["unlisted-images"] == ["cat/1.png", "dog/2.png"]


def test_an_image_in_several_metadata_files_is_one_sample(tmp_path, capfd):
    folder = images(tmp_path / "data", "a/0.png", "b/1.png", "b/2.png")
    put(folder / "metadata.csv", "file_name,text\na/0.png,csv 0\nb/1.png,csv 1\n")
    jsonl(folder / "metadata.jsonl", {"file_name": "a/0.png", "text": "jsonl 0"})
    put(folder / "b/metadata.csv", "file_name,text\n1.png,near 1\n2.png,near 2\n")
    assert sorted(samples(open_data(folder))) == [(0, None, "jsonl 0"), (1, None, "near 1"), (2, None, "near 2")]
    assert "2 images have another description (such as a/0.png): that in metadata.jsonl" in capfd.readouterr().err
    assert made.findings(folder, tmp_path / "out")["repeated-rows"] == ["a/0.png", "b/1.png"]


def test_an_image_with_two_captions_is_two_samples(tmp_path, capfd):
    images(tmp_path, "0.png")
    put(tmp_path / "metadata.csv", "file_name,text\n0.png,one\n0.png,two\n")
    assert samples(open_data(tmp_path)) == [(0, None, "one"), (0, None, "two")]
    assert "1 images are listed more than once" in capfd.readouterr().err


BAD_NAMES = [None, "", " ", 7, ["0.png"], "\ud800.png"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_row_without_a_file_name_does_not_end_the_others(tmp_path, name, capfd):
    folder = images(tmp_path / "data", "0.png", "1.png")
    rows = ({"file_name": each, "text": f"of {each}"} for each in ("0.png", name, "1.png"))
    jsonl(folder / "metadata.jsonl", *rows, {"text": "no key"})
    assert [value for value, _, _ in samples(open_data(folder))] == [0, 1]
    assert "2 rows have no valid file_name (such as line 2" in capfd.readouterr().err
    assert len(made.findings(folder, tmp_path / "out")["rows-without-file"]) == 2


@pytest.mark.parametrize("name", ["./0.png", "../data/0.png", "a/../0.png", "{root}/0.png", ".\\0.png"])
@pytest.mark.parametrize("place", ["", "sub"])
def test_any_spelling_of_a_path(tmp_path, name, place):
    folder = images(tmp_path / "data", "0.png", "1.png")
    name = name.format(root=folder)
    if place and not name.startswith("/"):
        name = f"../{name}"
    jsonl(folder / place / "metadata.jsonl", {"file_name": name, "text": "zero"}, {"file_name": f"{folder}/1.png"})
    source = open_data(folder)
    assert samples(source) == [(0, None, "zero"), (1, None, None)]
    assert source.table["path"].to_pylist() == ["0.png", "1.png"]


def test_files_outside_the_folder_of_the_metadata(tmp_path):
    images(tmp_path, "images/0.png", "images/1.png")
    jsonl(tmp_path / "meta/metadata.jsonl", {"file_name": "../images/0.png"}, {"file_name": f"{tmp_path}/images/1.png"})
    images(tmp_path / "more", "0.png")
    assert [value for value, _, _ in samples(open_data(tmp_path / "meta"))] == [0, 1]
    assert [value for value, _, _ in samples(open_data([tmp_path / "meta", tmp_path / "more"]))] == [0, 1, 0]


@pytest.mark.parametrize(
    ("name", "bad", "reason"),
    [
        ("metadata.jsonl", '{"file_name": "1.png"', "not JSON"),
        ("metadata.jsonl", "[1]", "no JSON object"),
        ("metadata.csv", "1.png,a, b", "3 values instead of 2"),
        ("metadata.csv", "1.png", "1 values instead of 2"),
        ("metadata.csv", '1.png,"no end', "damaged"),
        ("metadata.csv", '1.png,"a" b', "damaged"),
    ],
)
def test_a_damaged_row_does_not_end_the_others(tmp_path, name, bad, reason, capfd):
    images(tmp_path, "0.png", "1.png", "2.png")
    rows = ["0.png,zero", bad, "2.png,two"]
    if name.endswith("jsonl"):
        rows = [json.dumps({"file_name": "0.png", "text": "zero"}), bad, '{"file_name": "2.png", "text": "two"}']
    else:
        rows = ["file_name,text", *rows]
    put(tmp_path / name, "\n".join(rows) + "\n")
    assert samples(open_data(tmp_path)) == [(0, None, "zero"), (2, None, "two")]
    printed = capfd.readouterr().err
    assert f"1 rows cannot be read and are left out (such as line {2 + name.endswith('csv')}: " in printed
    assert reason in printed


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiters_and_line_breaks_in_csv(tmp_path, delimiter):
    images(tmp_path, "0.png", "1.png")
    rows = [["file_name", "text"], ["0.png", '"two\r\nlines, ""quoted"""'], ["1.png", 'say "so"']]
    put(tmp_path / "metadata.csv", "\r\n".join(delimiter.join(row) for row in rows))
    assert samples(open_data(tmp_path)) == [(0, None, 'two\r\nlines, "quoted"'), (1, None, 'say "so"')]


# Files and folders


@pytest.mark.parametrize("suffix", [".JPG", ".jpe", ".jfif", ".Png", ".avif", ".apng", ".tga", ".jp2", ".pnm", ".dib"])
def test_every_suffix_of_an_image_that_pillow_reads(tmp_path, suffix):
    kind = Image.registered_extensions()[suffix.lower()]
    put(tmp_path / f"folder/a{suffix}", png(100, kind=kind))
    put(tmp_path / "folder/a.TXT", "words")
    tar(tmp_path / "A.TAR", (f"a{suffix}", png(100, kind=kind)), ("a.TXT", "words"), ("a.CLS", "x"))
    for path, label in (("folder", None), ("A.TAR", "x")):
        source = open_data(tmp_path / path, **({} if label is None else {"classes": "none"}))
        ((value, _, caption),) = samples(source)
        assert abs(value - 100) < 3
        assert caption == "words"


def test_suffixes_are_those_of_images():
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"} <= image_suffixes()
    assert not {".pdf", ".mpg", ".h5", ".eps", ".txt", ".json"} & image_suffixes()


def test_files_that_are_not_read_are_reported(tmp_path, capfd):
    folder = images(tmp_path / "data", "0.png")
    for name in ("phone.heic", "0.json", "captions.csv", "README.md"):
        put(folder / name, "content")
    open_data(folder)
    assert "files that are not read: 1 .json, 1 .csv, 1 .heic (such as 0.json)" in capfd.readouterr().err
    assert made.findings(folder, tmp_path / "out") == {"other-files": ["0.json", "captions.csv", "phone.heic"]}


def test_names_that_are_not_utf8_do_not_end_the_others(tmp_path, capfd):
    folder = images(tmp_path / "data", "a/0.png", "b/1.png")
    try:
        with open(os.fsencode(folder / "a") + b"/caf\xe9.png", "wb") as file:
            file.write(png(2))
    except OSError:
        pytest.skip("the file system accepts UTF-8 only")
    assert [value for value, _, _ in samples(open_data(folder))] == [0, 1]
    assert "1 names that are not valid UTF-8" in capfd.readouterr().err
    assert list(made.findings(folder, tmp_path / "out")) == ["invalid-names"]


def test_folders_of_systems_are_no_classes(tmp_path):
    names = ("cat/0.png", "dog/1.png", "@eaDir/2.png", "$RECYCLE.BIN/3.png", "lost+found/4.png", "cat/@eaDir/5.png")
    folder = images(tmp_path / "data", *names)
    assert samples(open_data(folder)) == [(0, "cat", None), (1, "dog", None)]
    hidden = made.findings(folder, tmp_path / "out")["hidden-files"]
    assert hidden == ["$RECYCLE.BIN/", "@eaDir/", "cat/@eaDir/", "lost+found/"]


def test_class_folders_without_images_are_reported(tmp_path, capfd):
    folder = images(tmp_path / "data", "cat/0.png", "dog/1.png")
    put(folder / "fox/a.heic", "content")
    (folder / "emu").mkdir()
    assert open_data(folder).class_names == ("cat", "dog")
    assert "2 folders without images are no classes (such as emu)" in capfd.readouterr().err


def test_every_real_folder_is_listed_once(tmp_path):
    """Links from each folder to each other, to itself, to the parent, to the root of the file system."""
    outside = images(tmp_path / "outside", "8.png", "deep/9.png")
    folder = images(tmp_path / "data", *(f"{name}/{name}.png" for name in "abcdef"))
    for name in "abcdef":
        for other in "abcdef":
            (folder / name / f"see-{other}").symlink_to(f"../{other}")
        (folder / name / "up").symlink_to("..")
        (folder / name / "root").symlink_to("/")
        (folder / name / "outside").symlink_to(outside)
        (folder / name / "loop").symlink_to("loop")
    listing = list_folder(folder)
    outer = ["a/outside/8.png", "a/outside/deep/9.png"]
    assert listing.files == sorted([*(f"{name}/{name}.png" for name in "abcdef"), *outer])
    assert len(listing.repeated) == 6 * (6 + 1 + 1 + 1) - 1
    assert listing.broken == [f"{name}/loop" for name in "abcdef"]
    kinds = made.findings(folder, tmp_path / "out")
    assert sorted(kinds) == ["broken-link", "repeated-folders"]


# Tars


def test_images_with_one_key_are_reported(tmp_path, capfd):
    members = [(f"v1.{number}.png", png(number)) for number in range(12)]
    path = tar(tmp_path / "a.tar", *members, ("b.png", png(20)), ("b.png", png(21)), ("c.d/e.f.png", png(22)))
    assert [value for value, _, _ in samples(open_data(path))] == [20, 0, 22]
    assert "12 images have the key of another image and are not read (such as v1.1.png)" in capfd.readouterr().err
    assert len(made.findings(path, tmp_path / "out")["repeated-keys"]) == 12


def test_members_that_are_not_read_are_reported(tmp_path, capfd):
    path = tar(tmp_path / "a.tar", ("a.png", png()), ("a.caption.txt", "x"), ("a.npy", b""), ("a.json", "{broken"))
    open_data(path)
    printed = capfd.readouterr().err
    assert "members that are not read: 1 .caption.txt, 1 .npy" in printed
    assert "1 texts cannot be decoded and are left out (such as a.json)" in printed


def test_what_is_cached_of_a_tar_is_still_reported(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("tessera.data.tars.MIN_CACHED_MEMBERS", 1)
    path = tar(tmp_path / "a.tar", ("a.0.png", png()), ("a.1.png", png()))
    for _ in range(2):
        assert list(made.findings(path, tmp_path / "out")) == ["repeated-keys"]


def test_a_damaged_file_does_not_end_the_check_of_the_others(tmp_path):
    for name in ("tars/a.tar", "tars/c.tar"):
        tar(tmp_path / name, (f"{name[5]}.png", png(1)))
    put(tmp_path / "tars/b.tar", b"no tar" * 1000)
    table(tmp_path / "tables/a.parquet", 1)
    put(tmp_path / "tables/b.parquet", b"no table")
    for folder, count in (("tars", 2), ("tables", 1)):
        with pytest.raises(TesseraError, match="b.* is damaged"):
            open_data(tmp_path / folder)
        request = CheckRequest(str(tmp_path / folder), tmp_path / f"out-{folder}")
        scan_data(request)
        checked = report_findings(request)
        assert len(checked.keep) == count
        assert "damaged-files" in [finding.kind for finding in checked.findings]


# Patterns


@pytest.mark.parametrize("pattern", ["*.tar", "{0..2}.tar", "{0,1,2}.tar", "[012].tar", "?.tar"])
def test_patterns_are_the_same_for_training_check_and_evaluation(tmp_path, pattern):
    folder = tmp_path / "a [x] {b}"
    for number in range(3):
        tar(folder / f"{number}.tar", (f"{number}.png", png(number)))
    path = folder / pattern
    assert [value for value, _, _ in samples(open_data(path))] == [0, 1, 2]
    assert [value for value, _, _ in samples(open_resolved(resolve_data(str(path), (8, 8))))] == [0, 1, 2]
    assert made.findings(path, tmp_path / "out") == {}


def test_braces_with_leading_zeros_and_gaps(tmp_path):
    for number in (8, 9, 10):
        tar(tmp_path / f"{number:03}.tar", (f"{number}.png", png(number)))
    assert [value for value, _, _ in samples(open_data(tmp_path / "{008..010}.tar"))] == [8, 9, 10]
    with pytest.raises(TesseraError, match=r"1 of 4 do not exist, such as .*011\.tar"):
        open_data(tmp_path / "{008..011}.tar")
    with pytest.raises(TesseraError, match="does not exist"):
        open_data(tmp_path / "{1,2}.tar")
