"""Class names in files and commands: numbers, commas, spaces, quotes, slashes. `tessera info` prints each as given."""

import shlex

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tessera import bundle
from tessera.cli.image_files import file_stems, parse_classes
from tessera.cli.options import split_names
from tessera.errors import TesseraError
from tessera.images import read_settings
from tessera.reporting.text import join_names

NAMES = (
    "5", "0", "red, blue", "red", "blue", " left", "right ", 'say "hi"', '"', "a/b", "..", "-1", "--npz", "all",
    "é日本", "Cat", "cat", "x" * 300, "C:\\new*", "%2F", "a%2Fb", "~1", "#3", "it's", "two\nlines", "", "null",
)  # fmt: skip


@pytest.fixture
def model(make_model):
    return make_model(network={"num_classes": len(NAMES)}, class_names=NAMES)


@pytest.fixture
def folder(model, tmp_path):
    bundle.save(model, tmp_path / "model")
    return tmp_path / "model"


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_every_name_has_a_file_of_its_own_and_a_command_that_reproduces_it(tessera, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = tessera("sample", folder, "--classes", "all", "--seeds", "7", "--batch-size", len(NAMES), "--out", "first")
    assert done.code == 0, done.err
    files = {tuple(read_settings(path)["class_names"]): path for path in (tmp_path / "first").glob("class-*.png")}
    assert files.keys() == {(name,) for name in NAMES}
    for number, name in enumerate(NAMES):
        path = files[(name,)]
        settings = read_settings(path)
        assert (settings["classes"], settings["seeds"]) == ([number], [7])
        info = tessera("info", path)
        assert info.code == 0, info.err
        command = shlex.split(info.out.rpartition("\n# weights")[0])
        assert tessera(*command[1:], "--out", f"again-{number}").code == 0
        again = tmp_path / f"again-{number}" / path.name
        np.testing.assert_array_equal(pixels(again), pixels(path))
        assert read_settings(again)["class_names"] == [name]


def test_file_names_are_the_class_names_where_a_system_allows_them(tmp_path):
    stems = file_stems(NAMES)
    assert len({stem.casefold() for stem in stems}) == len(NAMES)
    assert all(len(f"class-{stem}-seed-{2**63}.png".encode()) < 255 for stem in stems)
    expected = {
        "5": "5", "red, blue": "red, blue", " left": " left", "a/b": "a%2Fb", "a%2Fb": "a%252Fb", "..": "..",
        "é日本": "é日本", "Cat": "Cat~15", "cat": "cat~16", "C:\\new*": "C%3A%5Cnew%2A", "~1": "%7E1", '"': "%22",
        "two\nlines": "two%0Alines", "x" * 300: "x" * 150 + "~17",
    }  # fmt: skip
    assert {name: stems[NAMES.index(name)] for name in expected} == expected
    for stem in stems:
        (tmp_path / f"class-{stem}-seed-0.png").touch()
    assert len(list(tmp_path.iterdir())) == len(NAMES)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=8, unique=True))
def test_any_names_have_different_file_names(names):
    stems = file_stems(names)
    assert len(set(stems)) == len(names)
    assert not set("".join(stems)) & set('/\\:*?"<>|\0\n')


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1, max_size=8))
def test_names_survive_joining_and_splitting(names):
    assert split_names("--classes", join_names(names)) == names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('"red, blue"', ["red, blue"]),
        ('"red, blue",red', ["red, blue", "red"]),
        ("5,0", ["5", "0"]),
        (" 5 , 0 ", ["5", "0"]),
        ("right ", ["right "]),
        ('" left",red', [" left", "red"]),
        ('"say ""hi"""', ['say "hi"']),
        ('say "hi"', ['say "hi"']),
        ('""""', ['"']),
        ("a/b,..,-1,--npz,#3", ["a/b", "..", "-1", "--npz", "#3"]),
        ('"all"', ["all"]),
        ("all", list(NAMES)),
        ("it's", ["it's"]),
        ("", [""]),
    ],
)
def test_names_on_the_command_line(model, text, names):
    assert [NAMES[label] for label in parse_classes(text, model)] == names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("red, blue", "the name of one class and of 2 classes; write a name with a comma in double quotes"),
        ("red,green", "unknown class 'green'; did you mean 'red'?; write a name with a comma in double quotes"),
        ("1", "unknown class '1'"),  # not the second class, because other classes have numbers as names
        ("26", "unknown class '26'"),
        ('"red', "is not valid: unexpected end of data; write a name with a comma in double quotes"),
        ('"red"x', "is not valid"),
        ("red\nblue", "has several lines"),
        ("²", "unknown class '²'"),
    ],
)  # fmt: skip
def test_names_that_are_not_clear_are_an_error(model, text, words):
    with pytest.raises(TesseraError) as caught:
        parse_classes(text, model)
    assert words in str(caught.value)


def test_one_class_with_a_comma_needs_no_quotes_where_its_parts_are_no_classes(make_model):
    model = make_model(class_names=("tench, Tinca tinca", "cat", "dog"))
    assert parse_classes("tench, Tinca tinca", model) == [0]
    assert parse_classes('cat,"tench, Tinca tinca"', model) == [1, 0]
    assert parse_classes("2,0", model) == [2, 0]  # no name is a number


def test_a_name_of_several_classes_is_an_error_and_their_commands_have_numbers(tessera, make_model, tmp_path):
    """The labels of ImageNet have the name crane twice."""
    model = make_model(class_names=("crane", "cat", "crane"))
    with pytest.raises(TesseraError, match="several classes have the name 'crane': give the number, 0, 2"):
        parse_classes("crane", model)
    bundle.save(model, tmp_path / "model")
    assert tessera("sample", tmp_path / "model", "--out", tmp_path / "s").code == 0
    names = sorted(path.name for path in (tmp_path / "s").glob("*.png"))
    assert names == ["class-cat-seed-0.png", "class-crane~0-seed-0.png", "class-crane~2-seed-0.png", "grid.png"]
    assert "--classes 2 --seeds 0" in tessera("info", tmp_path / "s/class-crane~2-seed-0.png").out


def test_a_model_whose_folder_begins_with_a_dash(tessera, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder.rename(tmp_path / "-m")
    assert tessera("sample", "--classes", "red", "--out", "one.png", "--", "-m").code == 0
    command = shlex.split(tessera("info", "one.png").out, comments=True)
    assert tessera(*command[1:], "--out", "two.png").code == 0
    np.testing.assert_array_equal(pixels("one.png"), pixels("two.png"))


@pytest.mark.parametrize("damage", ["text", "json", "list", "older", "none"])
def test_info_of_an_image_without_complete_settings(tessera, tmp_path, damage):
    from PIL.PngImagePlugin import PngInfo

    from tessera.images import KEY

    path, texts = tmp_path / "x.png", PngInfo()
    stored = {"json": "{", "list": "[1]", "older": '{"sampling": {}, "classes": [4]}'}
    if damage in stored:
        texts.add_text(KEY, stored[damage])
    Image.new("L", (4, 4)).save(path, pnginfo=texts)
    if damage == "text":
        path.write_bytes(path.read_bytes()[:40])
    done = tessera("info", path)
    assert (done.code, done.err.startswith("error: "), str(path) in done.err) == (1, True, True)
