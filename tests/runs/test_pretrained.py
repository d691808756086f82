"""The models that come with the package."""

import pytest
import torch

from tessera import bundle, pretrained
from tessera.checkpoint_files import read_tensors
from tessera.data.resolve import EMBEDDED
from tessera.interop import load


@pytest.fixture
def shipped(monkeypatch, tmp_path, make_model):
    """A model "tiny" that comes with the package, and the model that it was made of."""
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "pretrained")
    model = make_model()
    load.convert(model, tmp_path / "pretrained/tiny", "bundle", dtype=torch.bfloat16, about="noise", license="CC0")
    return model


def test_a_name_stands_for_a_shipped_model(shipped, tessera, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pretrained.names() == ["tiny"]
    loaded = load.load("tiny")
    assert (loaded.config.provenance.about, loaded.config.provenance.license) == ("noise", "CC0")
    done = tessera("sample", "tiny", "--classes", "0", "num_steps=2", "--out", "grid.png")
    assert done.code == 0, done.err
    assert "noise" in tessera("models").out
    assert tessera("info", "tiny").code == 0


def test_weights_are_rounded_in_the_file_and_float32_in_memory(shipped):
    stored = read_tensors(pretrained.FOLDER / "tiny" / bundle.WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    network = load.load("tiny").network
    for name, tensor in shipped.network.state_dict().items():
        assert network.state_dict()[name].dtype == torch.float32
        torch.testing.assert_close(network.state_dict()[name], tensor, rtol=2**-8, atol=0)


def test_a_file_or_folder_of_that_name_comes_first(shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundle.save(shipped, tmp_path / "tiny")
    assert load.load("tiny").config.provenance.about is None


def test_a_shipped_model_is_not_changed(shipped, tessera):
    done = tessera("tune", "tiny", "--budget", "1")
    assert done.code == 1
    assert "comes with Tessera and is not changed: give --save-to" in done.err


@pytest.mark.parametrize("option", [["--dtype", "bfloat16"], ["--about", "x"], ["--license", "x"]])
def test_options_of_bundles_are_refused_for_other_formats(shipped, tessera, tmp_path, option):
    done = tessera("convert", "tiny", tmp_path / "x.pt", "--to", "official", *option)
    assert (done.code, "are for bundles" in done.err) == (1, True)
    assert not (tmp_path / "x.pt").exists()


def test_a_name_of_a_model_is_not_also_that_of_data():
    """`tessera evaluate` and other commands take both."""
    assert not {*pretrained.names()} & {*EMBEDDED}
