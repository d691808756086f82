"""`tessera classes`: list the classes of a model, and write a model with other classes."""

import numpy as np
import pytest
from PIL import Image

from tessera import bundle
from tessera.interop.load import load


@pytest.fixture
def folder(make_model, tmp_path):
    bundle.save(make_model(network={"num_classes": 4}, class_names=("cat", "dog", "red, blue", "a=b")), tmp_path / "m")
    return tmp_path / "m"


def test_without_a_new_folder_the_classes_are_listed(tessera, folder):
    done = tessera("classes", folder)
    assert done.code == 0, done.err
    assert done.out.splitlines() == ["0     cat", "1     dog", '2     "red, blue"', "3     a=b"]


def test_all_changes_in_one_command(tessera, folder, tmp_path):
    words = ["--add", 'wolf=dog,"red, blue"', "--add", '"x=y"', "--remove", "cat", "--rename", "hound=dog"]
    done = tessera("classes", folder, tmp_path / "new", *words, "--merge", "two=red, blue,a=b")
    assert done.code == 1  # a name with a comma needs quotes among others
    done = tessera("classes", folder, tmp_path / "new", *words, "--merge", 'two="red, blue",a=b')
    assert done.code == 0, done.err
    assert "4 classes; removed cat; renamed dog to hound; merged red, blue, a=b into two; added wolf" in done.out
    model = load(tmp_path / "new", device="cpu")
    assert model.class_names == ["hound", "two", "wolf", "x=y"]
    for source, name in ((folder, "dog"), (tmp_path / "new", "hound")):
        assert tessera("sample", source, "--classes", name, "--seeds", "5", "--out", tmp_path / f"{name}.png").code == 0
    before, after = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("dog", "hound"))
    np.testing.assert_array_equal(before, after)
    assert "classes changed" in tessera("info", tmp_path / "new").out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rename", "dog=hound"], "known: a=b, cat, dog, red, blue; --rename is written NEW=OLD"),
        (["--rename", "hound"], "--rename hound needs one class"),
        (["--rename", "x=cat,dog"], "--rename x needs one class"),
        (["--merge", "x=cat"], "from one class"),
        (["--add", "x", "--add", "x=cat"], "--add has the new class 'x' twice"),
        (["--add", "x,y=cat"], "--add x,y=cat has several new names: repeat the option"),
        (["--add", '"x"y=cat'], "is not valid"),
        (["--remove", "all"], "no class would be left of 4"),
        ([], "nothing to change: give --add, --remove, --rename, --merge or --add-word"),
    ],
)  # fmt: skip
def test_unclear_commands_are_errors_and_nothing_is_written(tessera, folder, tmp_path, words, message):
    done = tessera("classes", folder, tmp_path / "new", *words)
    assert (done.code, message in done.err) == (1, True), done.err
    assert not (tmp_path / "new").exists()


def test_the_new_folder_is_named_and_new(tessera, folder):
    assert "tessera classes MODEL OUT" in tessera("classes", folder, "--add", "x").err
    assert "exists already" in tessera("classes", folder, folder, "--add", "x").err


def test_a_model_without_classes_has_none_to_list(tessera, make_model, tmp_path):
    bundle.save(make_model(network={"num_classes": 0}), tmp_path / "m")
    done = tessera("classes", tmp_path / "m")
    assert (done.code, "unconditional" in done.err) == (1, True)
