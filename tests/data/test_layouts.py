"""Detection of every layout, compared with the libraries that wrote the files."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from tessera.data import FilesConfig, index
from tessera.errors import TesseraError

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """The tests do not write into the user's cache folder."""
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / ".caches"))


def png(value: int = 0, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(buffer, format="png")
    return buffer.getvalue()


def put(path, content: bytes | str = b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def tar(path, *members: tuple[str, bytes | str], format: int = tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members:
            raw = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return path


def open_data(path, **changes):
    return FilesConfig(
        path=[str(one) for one in path] if isinstance(path, list) else str(path), size=8, **changes
    ).open()


def samples(source) -> list[tuple[int, str | None, str | None]]:
    """Gray level, class name and caption of every sample."""
    return [
        (
            int(source.pixels(i)[0, 0, 0]),
            source.class_names[source.label(i)] if source.class_names else None,
            source.caption(i),
        )
        for i in range(len(source))
    ]


# Captions in text files


def test_text_files_beside_images_are_captions(tmp_path):
    for number, name in enumerate(("a", "b.c", "d")):
        put(tmp_path / f"{name}.png", png(number))
    put(tmp_path / "a.txt", "a cat, sleeping\n")
    put(tmp_path / "b.c.txt", "\ufeffein Löwe".encode())
    put(tmp_path / "readme.txt", "no image")
    assert samples(open_data(tmp_path)) == [(0, None, "a cat, sleeping"), (1, None, "ein Löwe"), (2, None, None)]


def test_text_files_and_class_folders_combine(tmp_path):
    for number, name in enumerate(("cat/a", "dog/b")):
        put(tmp_path / f"{name}.png", png(number))
        put(tmp_path / f"{name}.txt", f"caption {number}")
    assert samples(open_data(tmp_path)) == [(0, "cat", "caption 0"), (1, "dog", "caption 1")]
    assert samples(open_data(tmp_path, caption=None)) == [(0, "cat", None), (1, "dog", None)]


TEXT = "the artist’s café, “late” – 1900"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"])
def test_captions_in_other_encodings_are_decoded_and_a_guess_is_reported(tmp_path, encoding, capfd):
    put(tmp_path / "a.png", png())
    put(tmp_path / "a.txt", TEXT.encode(encoding))
    assert open_data(tmp_path).caption(0) == TEXT
    assert ("read as Windows-1252" in capfd.readouterr().err) == (encoding == "cp1252")


def test_captions_that_cannot_be_decoded_are_reported(tmp_path, capfd):
    put(tmp_path / "a.png", png())
    put(tmp_path / "a.txt", b"\x81\x8d\x00")
    assert open_data(tmp_path).caption(0) is None
    assert "1 texts cannot be decoded and are left out (such as a.txt)" in capfd.readouterr().err


# Metadata files


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("label", ["label", "class"])
@pytest.mark.parametrize("caption", ["text", "caption"])
def test_a_metadata_file_names_images_labels_and_captions(tmp_path, kind, label, caption):
    rows = [("images/b.png", "dog", "two\nlines"), ("images/a.png", "cat", 'with "quotes", twice')]
    for number, (name, _, _) in enumerate(rows):
        put(tmp_path / name, png(number))
    table = arrow.table(dict(zip(("file_name", label, caption), map(list, zip(*rows)))))
    if kind == "jsonl":
        put(tmp_path / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    elif kind == "csv":
        import csv

        with (tmp_path / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([table.column_names, *rows])
    else:
        parquet.write_table(table, tmp_path / "metadata.parquet")
    assert samples(open_data(tmp_path)) == [(0, "dog", "two\nlines"), (1, "cat", 'with "quotes", twice')]
    assert samples(open_data(tmp_path, classes="none", caption=None)) == [(0, None, None), (1, None, None)]


def test_metadata_equals_the_imagefolder_of_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / ".hf"))
    folder = tmp_path / "data"
    lines = []
    for number in range(5):
        put(folder / f"some/{number}.png", png(number))
        lines.append(json.dumps({"file_name": f"some/{number}.png", "text": f"caption {number}"}))
    put(folder / "metadata.jsonl", "\n".join(lines))
    theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    truth = [(np.asarray(row["image"])[0, 0, 0], None, row["text"]) for row in theirs]
    assert samples(open_data(folder)) == truth


def test_every_folder_may_have_its_own_metadata(tmp_path):
    for number, folder in enumerate(("a", "b")):
        put(tmp_path / folder / "x.png", png(number))
        put(tmp_path / folder / "metadata.csv", f"file_name,text,label\nx.png,caption {number},{number}\n")
    assert samples(open_data(tmp_path)) == [(0, "0", "caption 0"), (1, "1", "caption 1")]


def test_metadata_with_class_folders(tmp_path):
    for number, name in enumerate(("cat/a.png", "dog/b.png")):
        put(tmp_path / name, png(number))
    put(tmp_path / "metadata.csv", "file_name,text\ncat/a.png,one\ndog/b.png,two\n")
    assert samples(open_data(tmp_path)) == [(0, None, "one"), (1, None, "two")]
    assert samples(open_data(tmp_path, classes="folders")) == [(0, "cat", "one"), (1, "dog", "two")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", "filename,text\na.png,x\n", "unknown column 'file_name'; did you mean 'filename'"),
        ("metadata.csv", "file_name,text\na.png\n", "metadata.csv is damaged"),
        ("metadata.csv", "file_name,label\na.png,x\nb.png,\n", "1 of 2 rows have no label in the metadata"),
        ("metadata.csv", "", "metadata.csv is damaged"),
        ("metadata.jsonl", '{"file_name": "a.png"\n', "metadata.jsonl is damaged"),
        ("metadata.jsonl", '{"file_name": "a", "label": "x"}\n{"file_name": "b"}\n', "1 of 2 rows have no label"),
    ],
)
def test_invalid_metadata(tmp_path, name, content, message):
    put(tmp_path / "a.png", png())
    put(tmp_path / name, content)
    with pytest.raises(TesseraError, match=message):
        open_data(tmp_path)


# Tars


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_images_captions_and_labels_in_tars(tmp_path, format):
    members = []
    for number in range(6):
        key = f"part/{number:06d}"
        members += [(f"{key}.txt", f"caption {number}\n"), (f"{key}.png", png(number)), (f"{key}.cls", str(number % 3))]
    path = tar(tmp_path / "shard.tar", *members, format=format)
    source = open_data(path)
    assert samples(source) == [(number, str(number % 3), f"caption {number}") for number in range(6)]
    assert source.name(4) == f"{path} part/000004.png"


def test_the_content_of_tar_members_equals_tarfile(tmp_path):
    long = "folder/" * 30  # longer than fits into a header
    path = tar(tmp_path / "a.tar", (f"{long}a.png", png(1)), ("b.jpg", b"no image at all"), ("c.webp", b""))
    source = open_data(path)
    with tarfile.open(path) as archive:
        truth = [archive.extractfile(member).read() for member in archive]
    assert [source.encoded(i) for i in range(3)] == truth


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("name", ["ü.png", "日本.png", "a b.png", f"{'folder/' * 30}a.png", f"{'long' * 200}.png"])
def test_the_name_of_a_tar_member(tmp_path, format, name):
    path = tar(tmp_path / "a.tar", ("first.png", png(0)), (name, png(1)), ("last.png", png(2)), format=format)
    source = open_data(path)
    assert [source.name(row) for row in range(3)] == [f"{path} {each}" for each in ("first.png", name, "last.png")]


def test_tars_equal_the_webdataset_of_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / ".hf"))
    for shard, numbers in enumerate((range(4), range(4, 9))):
        members = [
            (f"{i}.{ending}", content) for i in numbers for ending, content in (("png", png(i)), ("txt", f"of {i}"))
        ]
        tar(tmp_path / f"train-{shard}.tar", *members)
    theirs = datasets.load_dataset("webdataset", data_files=str(tmp_path / "*.tar"), split="train")
    truth = [(np.asarray(row["png"])[0, 0, 0], None, row["txt"]) for row in theirs]
    assert samples(open_data(tmp_path)) == truth
    assert samples(open_data(tmp_path / "*.tar")) == truth


def test_json_beside_images_in_tars(tmp_path):
    metadata = [
        {"caption": "one", "label": "dog"},
        {"text": "two", "class": "cat"},
        {"caption": "three", "label": "cat"},
    ]
    members = [("2.txt", "three, in a file of its own")]
    for number, fields in enumerate(metadata):
        members += [(f"{number}.png", png(number)), (f"{number}.json", json.dumps(fields))]
    path = tar(tmp_path / "a.tar", *members)
    assert samples(open_data(path)) == [(0, "dog", "one"), (1, "cat", "two"), (2, "cat", "three, in a file of its own")]
    others = [
        ("0.png", png(0)),
        ("0.json", '{"y": 0, "z": "0!"}'),
        ("1.png", png(1)),
        ("1.json", '{"y": 1, "z": "1!"}'),
    ]
    tar(tmp_path / "b.tar", *others)
    assert samples(open_data(tmp_path / "b.tar", label="y", caption="z")) == [(0, "0", "0!"), (1, "1", "1!")]


def test_the_key_of_a_member_ends_at_the_first_dot(tmp_path):
    members = [("a.mask.png", png(9)), ("a.png", png(1)), ("a.txt", "a"), ("b.jpg.png", png(2)), ("b.txt", "b")]
    assert samples(open_data(tar(tmp_path / "a.tar", *members))) == [(1, None, "a"), (2, None, "b")]


def test_large_tars_are_listed_once(tmp_path, monkeypatch):
    monkeypatch.setattr("tessera.data.tars.MIN_CACHED_MEMBERS", 2)
    path = tar(tmp_path / "a.tar", ("a.png", png(1)), ("a.txt", "one"), ("b.png", png(2)), ("b.txt", "two"))
    first = samples(open_data(path))
    monkeypatch.setattr(tarfile, "open", None)
    assert samples(open_data(path)) == first == [(1, None, "one"), (2, None, "two")]
    monkeypatch.undo()
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / ".caches"))
    tar(
        path,
        ("a.png", png(3)),
        ("a.txt", "another"),
        ("b.png", png(4)),
        ("b.txt", "and another, longer"),
        ("c.png", png(5)),
    )
    assert samples(open_data(path))[:2] == [(3, None, "another"), (4, None, "and another, longer")]


@pytest.mark.parametrize("extra", [0, 100], ids=["between members", "within a header"])
def test_a_tar_that_was_cut_is_named(tmp_path, extra):
    """The file has a header and one block of content for each image."""
    members = [(f"{number}.png", png(number)) for number in range(4)]
    whole = tar(tmp_path / "whole.tar", *members).read_bytes()
    assert not open_data(tmp_path / "whole.tar").notes
    cut = open_data(put(tmp_path / "cut.tar", whole[: 4 * tarfile.BLOCKSIZE + extra]))
    assert [value for value, *_ in samples(cut)][:2] == [0, 1]
    (note,) = cut.notes
    assert (note.kind, note.severity) == ("damaged-files", "warning")
    assert "cut.tar has no end-of-archive block, so it was probably cut off: 2 samples are read" in note.text


def test_invalid_tars(tmp_path):
    whole = tar(tmp_path / "a.tar", ("a.png", png(size=64)), ("b.png", png(size=64))).read_bytes()
    put(tmp_path / "cut.tar", whole[: len(whole) // 20])
    with pytest.raises(TesseraError, match=r"cut\.tar is damaged"):
        open_data(tmp_path / "cut.tar")
    import gzip

    put(tmp_path / "packed.tar", gzip.compress(whole))
    with pytest.raises(TesseraError, match=r"packed\.tar is damaged, or compressed"):
        open_data(tmp_path / "packed.tar")
    with pytest.raises(TesseraError, match="contain no images"):
        open_data(tar(tmp_path / "empty.tar", ("a.txt", "no image")))
    with pytest.raises(TesseraError, match="1 of 2 rows have no label in the tars"):
        open_data(tar(tmp_path / "half.tar", ("a.png", png()), ("a.cls", "1"), ("b.png", png())))


def test_a_zip_must_be_unpacked(tmp_path):
    put(tmp_path / "a.zip", b"PK")
    with pytest.raises(TesseraError, match="is compressed.*unpack it first"):
        open_data(tmp_path / "a.zip")


# Data sets of Hugging Face


@pytest.fixture
def hf_dataset():
    """A small data set of `datasets`, with class names and captions."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "text": datasets.Value("string"),
        }
    )
    rows = [{"image": {"bytes": png(i), "path": None}, "label": i % 2, "text": f"caption {i}"} for i in range(6)]
    return datasets.Dataset.from_list(rows, features=features)


SIX = [(i, ("cat", "dog")[i % 2], f"caption {i}") for i in range(6)]


def test_a_data_set_saved_by_datasets(tmp_path, hf_dataset):
    hf_dataset.save_to_disk(tmp_path / "saved", num_shards=2)
    assert samples(open_data(tmp_path / "saved")) == SIX
    rows = [4, 1, 3]
    hf_dataset.select(rows).save_to_disk(tmp_path / "chosen")
    assert samples(open_data(tmp_path / "chosen")) == [SIX[i] for i in rows]


def test_splits_saved_by_datasets(tmp_path, hf_dataset):
    import datasets

    datasets.DatasetDict(train=hf_dataset, test=hf_dataset.select([0])).save_to_disk(tmp_path / "saved")
    assert samples(open_data(tmp_path / "saved")) == SIX
    assert samples(open_data(tmp_path / "saved/test", classes="none")) == [(0, None, "caption 0")]
    datasets.DatasetDict(a=hf_dataset, b=hf_dataset).save_to_disk(tmp_path / "others")
    with pytest.raises(TesseraError, match="has the splits a, b: give one of them"):
        open_data(tmp_path / "others")


def test_a_data_set_of_the_hub(tmp_path, hf_dataset, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / ".hf"))
    (tmp_path / "data").mkdir()
    hf_dataset.to_parquet(tmp_path / "data/train.parquet")
    hf_dataset.select([5]).to_parquet(tmp_path / "data/test.parquet")
    assert samples(open_data(f"hub:{tmp_path / 'data'}")) == SIX
    monkeypatch.chdir(tmp_path)
    assert samples(open_data("hub:./data:test", classes="none")) == [(5, None, "caption 5")]
    with pytest.raises(TesseraError, match="has the splits .*train"):
        open_data("hub:./data:gone")


def test_a_data_set_that_the_hub_does_not_have(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def absent(name, config, **_):
        raise datasets.exceptions.DatasetNotFoundError(f"no {name} as {config}")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TesseraError, match="hub:nobody/nothing cannot be loaded: no nobody/nothing as None"):
        open_data("hub:nobody/nothing")
    with pytest.raises(TesseraError, match="no nobody/nothing as small"):
        open_data("hub:nobody/nothing/small:test")


# Several layouts


def test_a_list_merges_classes_by_name_and_keeps_captions(tmp_path, hf_dataset):
    put(tmp_path / "folder/dog/a.png", png(20))
    put(tmp_path / "folder/bird/b.png", png(21))
    put(tmp_path / "folder/bird/b.txt", "a bird")
    put(tmp_path / "loose/c.png", png(22))
    tar(tmp_path / "a.tar", ("d.png", png(23)), ("d.cls", "cat"), ("e.png", png(24)), ("e.cls", "emu"))
    hf_dataset.to_parquet(tmp_path / "train.parquet")
    source = open_data([tmp_path / name for name in ("train.parquet", "folder", "loose", "a.tar")])
    assert source.class_names == ("cat", "dog", "bird", "emu")
    assert [source.label(i) for i in range(6, 11)] == [2, 1, -1, 0, 3]  # the loose image has no label
    rows = samples(source)
    assert rows[:6] == SIX
    assert rows[6:8] == [(21, "bird", "a bird"), (20, "dog", None)]
    assert [value for value, _, _ in rows[8:]] == [22, 23, 24]


def test_two_folders_of_one_class_each_are_two_classes(tmp_path):
    put(tmp_path / "a/cat/a.png", png(1))
    put(tmp_path / "b/dog/b.png", png(2))
    assert samples(open_data([tmp_path / "a", tmp_path / "b"])) == [(1, "cat", None), (2, "dog", None)]


def test_a_folder_of_several_layouts_asks_which_is_meant(tmp_path):
    put(tmp_path / "preview.png", png(1))
    parquet.write_table(arrow.table({"image": [png(2)]}), tmp_path / "a.parquet")
    with pytest.raises(TesseraError, match=r"1 images \(such as preview\.png\) and 1 parquet files"):
        open_data(tmp_path)
    assert samples(open_data(tmp_path, kind="folder")) == [(1, None, None)]
    assert samples(open_data(tmp_path, kind="parquet")) == [(2, None, None)]


def test_an_index_beside_the_images_is_no_sample(tmp_path):
    for number in range(3):
        put(tmp_path / f"{number}.png", png(number))
    source = open_data(tmp_path)
    index.write(source.table.slice(1), tmp_path / "checked.parquet")
    assert [value for value, _, _ in samples(open_data(tmp_path))] == [0, 1, 2]
    assert [value for value, _, _ in samples(open_data(tmp_path / "checked.parquet"))] == [1, 2]


def test_an_empty_list(tmp_path):
    with pytest.raises(TesseraError, match=r"data\.path is an empty list"):
        open_data([])
