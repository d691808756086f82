"""Inputs from reports of users of other programs: what happens to each today.

The scripts that make the inputs are shared data. Nothing is lost: what is not read is in the notes or the findings.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tessera.cli import image_files
from tessera.data import FilesConfig, files
from tessera.data.images import InvalidSample
from tessera.data.resolve import check_classes, open_data, resolve_data
from tessera.errors import TesseraError
from tessera.evaluation.sources import DatasetSource, FolderSource, NpzSource
from tessera.interop import load
from tessera.training.recipe import read_recipe

SHARED = Path(os.environ.get("TESSERA_SHARED") or Path(__file__).parents[2] / "../shared/data")
FIELD = SHARED.parent / "field"
findings = runpy.run_path(str(Path(__file__).parents[1] / "data/layout_files.py"))["findings"]

RECIPE = """
data: {kind: files, path: X, size: 16, hflip: false}
network: {patch_size: 8, hidden_size: 16, depth: 1, num_heads: 2}
diffusion: {kind: flow}
sampling: {num_steps: 1}
training: {steps: 1, global_batch_size: 4, device: cpu, tensorboard: false, sample_seeds: 1}
"""


@pytest.fixture(scope="session")
def field_inputs(tmp_path_factory):
    """The folder with the inputs of a script, which is run once."""
    folder = tmp_path_factory.mktemp("field")

    def make(number: str, *arguments: object) -> Path:
        script = FIELD / number / "make.py"
        if not script.exists():
            pytest.skip(f"{number}/make.py is absent: set TESSERA_SHARED to the folder of shared data beside field/")
        if not (folder / number).exists():
            shutil.copy(FIELD / "common.py", folder)
            (folder / number).mkdir()
            shutil.copy(script, folder / number)
            command = [sys.executable, str(folder / number / "make.py"), *map(str, arguments)]
            subprocess.run(command, check=True, capture_output=True)
        return folder / number

    return make


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / ".caches"))


# Data: training and the check read the same


@dataclass
class Case:
    """What a folder is read as. notes: kinds of what training prints; found: kinds of findings of the check, those of
    `notes` by default; refused: of the error of training."""

    folder: str
    count: int
    names: str = ""  # of classes
    captions: dict[int, str] = field(default_factory=dict)
    notes: str = ""
    found: str | None = None
    unusable: int = 0
    refused: str = ""


ARTIST = "the artist’s café, “late” – 1900"
CASES = [
    Case("01/in", 18, "odd plain", found="odd-metadata"),
    *(Case(f"04/{name}", 8, "0 1", {0: "caption 0", 7: "caption 7"}) for name in ("tar", "TARS")),
    *(Case(f"04/{name}", 8, "a b", {0: "caption 0", 7: "caption 7"}) for name in ("meta", "cols")),
    Case("04/in", 8, captions={0: "caption 0", 7: "caption 7"}),
    *(Case(f"05/{name}", 8, captions={3: f"{ARTIST} 3"}, notes="encoding") for name in ("csv", "txt")),
    Case("05/jsonl", 8, captions={3: "the artist’s café 3"}, notes="encoding"),
    Case("05/labels", 8, "café thé", notes="encoding"),
    Case("05/names", 8, captions={7: "last"}, notes="encoding unlisted-images",
         found="encoding missing unlisted-images", unusable=1),
    *(Case(f"05/{name}", 8, captions={3: "plain 3"}) for name in ("utf16", "txt16")),
    *(Case(f"07/{name}", 8, "False True") for name in ("boollabel", "csvbool")),
    *(Case(f"07/{name}", 8, "0 1") for name in ("floatlabel", "csvfloat", "mixedlabel")),
    Case("07/csvzeros", 8, "001 002"),
    Case("07/csvdate", 8, "2020-01-01 2020-01-02"),
    Case("07/csvminus", 8, refused="4 of 8 rows have no label", found="missing-labels unused-classes"),
    Case("07/csvnames", 8, captions={0: "c 0"}, notes="unlisted-images", found="missing unlisted-images", unusable=8),
    Case("07/csvnumbercaption", 8, captions={7: "7"}),
    Case("07/numbercaption", 8, captions={7: "1907"}),
    *(Case(f"07/{name}", 8, captions={7: "c 7"}) for name in ("nested", "extra", "listcaption")),
    Case("07/emptylist", 8, captions={0: "", 7: "c 7"}, found="empty-captions"),
    Case("07/hugeline", 8, captions={3: "very " * 400_000 + "long 3"}),
    Case("08/in", 6, captions={0: "a cat 0"}, notes="unlisted-images"),
    Case("08/part", 5, captions={4: "c 4"}, notes="unlisted-images"),
    Case("09/in", 8, captions={0: "from jsonl 0"}, notes="repeated-rows"),
    Case("09/deep", 8, captions={0: "own 0"}, notes="repeated-rows"),
    Case("09/twice", 16, captions={0: "one 0", 1: "two 0"}, notes="repeated-rows"),
    *(Case(f"10/{name}", 8, captions={7: "c 7"}) for name in ("dotslash", "absolute", "absdeep", "above")),
    *(Case(f"10/{name}", 8, captions={7: "c 7"}, notes="rows-without-file")
      for name in ("null", "nokey", "emptyname", "csvblank")),
    Case("10/missing", 9, captions={8: "gone"}, found="missing", unusable=1),
    Case("10/isfolder", 9, captions={8: "a folder"}, found="unreadable", unusable=1),
    Case("11/hub", 10, "0 1", notes="other-splits"),
    Case("11/imagenet", 12, "cat dog", notes="other-splits"),
    Case("11/tars", 6, "0 1", notes="other-splits"),
    Case("14/in", 6, notes="invalid-names"),
    Case("14/badtxt", 4, captions={3: "c 3"}, notes="invalid-names"),
    Case("14/classes", 4, refused="only one class ('tea')", found="invalid-names one-class"),
    Case("14/odd", 22),
    *(Case(f"14/{name}", 6) for name in ("set", "set #3", "2024_11_28", "a: b", "[x]", "007")),
    Case("15/in", 48, notes="ignored-files", found="other-files"),
    *(Case(f"15/{name}", 6) for name in ("onlyjfif", "onlyavif")),
    Case("31/two", 8, "cat dog", notes="repeated-folders"),
    Case("31/three", 12, "cat dog fox", notes="repeated-folders"),
    Case("31/six", 24, "ant bee cat cow dog fox", notes="repeated-folders"),
    Case("31/up", 8, "cat dog", notes="broken-link repeated-folders"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.folder)
def test_a_data_set_is_read_and_the_rest_is_named(field_inputs, tmp_path, case):
    number, _, name = case.folder.partition("/")
    path = field_inputs(number) / name
    config = FilesConfig(path=str(path), size=32)
    expected = case.notes if case.found is None else case.found
    assert sorted(findings(path, tmp_path)) == expected.split()
    if case.refused:
        with pytest.raises(TesseraError, match=re.escape(case.refused)):
            check_classes(config.open().class_names, config)
        return
    source = config.open()
    assert (len(source), " ".join(source.class_names)) == (case.count, case.names)
    assert {row: source.caption(row) for row in case.captions} == case.captions
    assert sorted(note.kind for note in source.notes if note.severity == "warning") == case.notes.split()
    unusable = 0
    for row in range(len(source)):
        try:
            assert source.pixels(row).shape == (3, 32, 32)
        except InvalidSample:
            unusable += 1
    assert unusable == case.unusable


def test_one_image_with_bad_metadata_has_the_pixels_of_the_plain_image(field_inputs):
    folder = field_inputs("01")
    common = SimpleNamespace(**runpy.run_path(str(folder.parent / "common.py")))
    source = FilesConfig(path=str(folder / "in/odd"), size=48).open()
    numbers = {"ztxt": 20, "itxt": 21, "iccp": 22, "text": 23, "badcrc": 24, "after": 25}
    for row in range(len(source)):
        expected = common.picture(numbers[Path(source.name(row)).stem])
        np.testing.assert_array_equal(source.pixels(row).transpose(1, 2, 0), expected)


def test_long_metadata_with_late_captions(field_inputs):
    source = FilesConfig(path=str(field_inputs("07") / "latetext"), size=32).open()
    assert [source.caption(row) for row in (0, 29_999, 30_000, 39_999)] == [
        None,
        None,
        "caption 30000",
        "caption 39999",
    ]


@pytest.mark.slow
def test_long_metadata_are_checked(field_inputs, tmp_path):
    assert sorted(findings(field_inputs("07") / "latetext", tmp_path)) == ["missing-captions", "repeated-rows"]


def test_any_name_keeps_its_caption(field_inputs):
    source = FilesConfig(path=str(field_inputs("14") / "odd"), size=32).open()
    for row in range(len(source)):
        assert source.caption(row) == Path(source.name(row)).with_suffix(".txt").read_text()


@pytest.mark.parametrize(
    ("name", "split", "count"),
    [("hub", "validation", 4), ("hub", "test", 6), ("imagenet", "val", 12), ("tars", "val", 6)],
)
def test_another_split_is_selected(field_inputs, name, split, count):
    path = field_inputs("11") / name
    assert len(FilesConfig(path=str(path), size=32, split=split).open()) == count
    assert len(open_data(resolve_data(f"{path}:{split}", (32, 32)))) == count


FOLDERS = [
    "01/in",
    "04/TARS",
    "05/csv",
    "07/boollabel",
    "08/in",
    "09/deep",
    "10/null",
    "11/hub",
    "14/in",
    "15/in",
    "31/three",
]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_run_prints_what_it_does_not_read(field_inputs, tessera, tmp_path, name):
    number, _, folder = name.partition("/")
    path = field_inputs(number) / folder
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    files._print_once.cache_clear()
    done = tessera("train", tmp_path / "tiny.yaml", f"data.path={path}", f"run_dir={tmp_path / 'run'}")
    assert done.code == 0, done.err
    for note in FilesConfig(path=str(path), size=16).open().notes:
        assert note.severity != "warning" or f"data: {note.text}\n" in done.err


@pytest.mark.parametrize("name", ["set #3", "2024_11_28", "a: b", "[x]", "007"])
def test_a_path_on_the_command_line_is_taken_as_it_is(field_inputs, tmp_path, monkeypatch, name):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    monkeypatch.chdir(field_inputs("14"))
    recipe = read_recipe(tmp_path / "tiny.yaml", [f"data.path={name}", f"run_dir={name}"])
    assert isinstance(recipe.data, FilesConfig)
    assert (recipe.data.path, recipe.run_dir) == (name, name)
    assert Path(recipe.data.open().name(0)).parent.name == name


# Images: evaluation and editing read what training reads


def images_of(source) -> np.ndarray:
    return source.shard(0).images


@pytest.mark.parametrize("name", ["plain", "grey", "greyfirst", "turned", "clear", "nonsquare"])
def test_a_folder_is_scored_as_it_is_trained_on(field_inputs, name):
    path = field_inputs("17") / name
    size = (48, 32) if name == "nonsquare" else (32, 32)
    folder, data = FolderSource(path), DatasetSource(FilesConfig(path=str(path), size=size, caption=None))
    assert (folder.size, folder.channels) == (size, 3)
    np.testing.assert_array_equal(images_of(folder), images_of(data))


def test_another_size_and_arrays_of_another_kind_are_named(field_inputs):
    path = field_inputs("17")
    with pytest.raises(TesseraError, match=r"zz\.png is 48 x 32, but .* is 32 x 32.*--size"):
        images_of(FolderSource(path / "other"))
    np.testing.assert_array_equal(images_of(NpzSource(path / "plain.npz")), images_of(FolderSource(path / "plain")))
    for name, message in (
        ("nchw.npz", r"\[40, 3, 32, 32\]; expected uint8 \[N, H, W, 3 or 1\]"),
        ("float.npz", "arr_0 is float64"),
        ("named.npz", "holds samples; expected the images as arr_0"),
        ("plain.npy", "not an .npz file"),
    ):
        with pytest.raises(TesseraError, match=message):
            NpzSource(path / name)


def test_an_image_to_edit_is_upright_and_of_any_type(field_inputs, make_model):
    path, model = field_inputs("29"), make_model({"in_channels": 3, "out_channels": 3, "input_size": 32})

    def read(name: str, mask: str | None = None, size=(32, 32)) -> dict:
        return image_files.read_inputs(model, None, str(path / name), None, mask and str(path / mask), size)[0]

    photo = read("photo.jpg", "mask.png", (48, 32))
    expected = np.asarray(Image.open(path / "upright.png")).astype(int)
    assert np.abs(photo["init_image"].astype(int) - expected).mean() < 3  # JPEG
    np.testing.assert_array_equal(photo["mask"], expected[..., 0] > 128)
    square = np.asarray(Image.open(path / "square.png"))
    np.testing.assert_array_equal(read("rgba.png")["init_image"], square)
    np.testing.assert_array_equal(read("sixteen.png")["init_image"], np.repeat(square[..., :1], 3, -1))
    for name in ("square.jpg", "cmyk.jpg"):
        assert np.abs(read(name, "mask32.png")["init_image"].astype(int) - square).mean() < 12
    with pytest.raises(TesseraError, match="both need the same size"):
        read("square.png", "mask.png")


# Checkpoints


def test_a_state_dict_is_found_in_any_wrapper(field_inputs, make_model, tmp_path, caplog):
    model = make_model({"depth": 2}, {"prediction": "epsilon"})
    torch.save(model.network.state_dict(), tmp_path / "tiny.pt")
    folder = field_inputs("19", tmp_path / "tiny.pt")
    expected = model.network.state_dict()
    rounded = {"half.pt": torch.float16, "bf16.pt": torch.bfloat16}
    paths = sorted(path for path in folder.iterdir() if path.name != "make.py")
    assert len(paths) > 30
    for path in paths:
        caplog.clear()
        if path.name == "nopos.pt":
            with pytest.raises(TesseraError, match="no position table"):
                load.load(path, "cpu", num_heads=2)
            assert load.load(path, "cpu", num_heads=2, size=8).config.network == model.config.network
        elif path.name == "wholemodule.pt":
            with pytest.raises(TesseraError, match="could run a program as it is loaded"):
                load.load(path, "cpu", num_heads=2)
        elif path.name in ("nan.pt", "inf.pt"):
            load.load(path, "cpu", num_heads=2)
        elif path.name == "repa.pt":
            assert load.load(path, "cpu", num_heads=2).config.diffusion.kind == "flow"
            assert "projectors" in caplog.text
        else:
            tensors = load.load(path, "cpu", num_heads=2).network.state_dict()
            for name, tensor in expected.items():
                assert torch.equal(tensors[name], tensor.to(rounded.get(path.name)).float()), (path.name, name)
