"""A run on disk: written whole or not at all, read back bit for bit, and what a full disk leaves behind."""

import errno
import json
import subprocess

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tessera import bundle, drawing
from tessera.errors import TesseraError
from tessera.training import checkpoint, loop
from tessera.training.checkpoint import Place
from tessera.training.recipe import Adam
from tessera.training.step import optimizer_for


@pytest.fixture
def trained(tiny_model):
    """A model, another network of the same make with a used optimizer, and that optimizer."""
    network = tiny_model.config.network.build()
    optimizer = optimizer_for(network, Adam())
    for _ in range(3):
        for weight in network.parameters():
            weight.grad = torch.randn_like(weight) if weight.requires_grad else None
        optimizer.step()
    return tiny_model, network, optimizer


def test_what_is_saved_is_restored_bit_for_bit(trained, tmp_path):
    model, network, optimizer = trained
    saved = checkpoint.save(tmp_path, Place(12, 3072), model, network, optimizer)
    assert saved == tmp_path / "checkpoints/step-000000012"
    other, average = model.config.network.build(), model.config.network.build()
    fresh = optimizer_for(other, Adam())
    assert checkpoint.restore(saved, other, average, fresh) == Place(12, 3072)
    for mine, theirs in ((other, network), (average, model.network)):
        assert all(torch.equal(one, two) for one, two in zip(mine.state_dict().values(), theirs.state_dict().values()))
    for one, two in zip(other.parameters(), network.parameters()):
        if one.requires_grad:
            assert set(fresh.state[one]) == set(optimizer.state[two]) == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(value, optimizer.state[two][key]) for key, value in fresh.state[one].items())


def test_a_checkpoint_is_a_bundle_that_draws(trained, tmp_path):
    model, network, optimizer = trained
    loaded = bundle.load(checkpoint.save(tmp_path, Place(1, 8), model, network, optimizer))
    assert (drawing.generate(loaded, [0, 1], [0, 1]) == drawing.generate(model, [0, 1], [0, 1])).all()


def test_only_the_newest_are_kept(trained, tmp_path):
    for step in (1, 2, 10, 100):
        checkpoint.save(tmp_path, Place(step, 8 * step), *trained)
    checkpoint.prune(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000000010", "step-000000100"]


def test_a_missing_piece_is_named(trained, tmp_path):
    model, network, optimizer = trained
    saved = checkpoint.save(tmp_path, Place(1, 8), *trained)
    tensors = load_file(saved / checkpoint.STATE)
    for gone, said in (
        ("weights/final_layer.linear.bias", r"missing final_layer\.linear\.bias"),
        ("optimizer/exp_avg/final_layer.linear.bias", r"lacks the optimizer's state of final_layer\.linear\.bias"),
    ):
        save_file({key: value for key, value in tensors.items() if key != gone}, saved / checkpoint.STATE)
        with pytest.raises(TesseraError, match=said):
            checkpoint.restore(saved, network, model.network, optimizer)


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors"])
def test_truncated_weights_are_an_error_that_names_the_file(trained, tmp_path, name):
    model, network, optimizer = trained
    saved = checkpoint.save(tmp_path, Place(1, 8), *trained)
    whole = (saved / name).read_bytes()
    for size in (0, 100, len(whole) - 1):
        (saved / name).write_bytes(whole[:size])
        with pytest.raises(TesseraError, match=rf"{name} is damaged"):
            checkpoint.restore(saved, network, model.network, optimizer)
    (saved / name).unlink()
    with pytest.raises(TesseraError, match=rf"{name} is missing"):
        checkpoint.restore(saved, network, model.network, optimizer)


@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"step": 3}', '{"step": "many"}', '{"step": null}'])
def test_what_does_not_say_its_place_is_no_checkpoint(tmp_path, text):
    if text is not None:
        (tmp_path / checkpoint.PLACE).write_text(text)
    with pytest.raises(TesseraError, match="is no training checkpoint"):
        checkpoint.place_of(tmp_path)


# A full disk


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors"])
def test_a_full_disk_in_mid_save_leaves_the_previous_checkpoint(tiny, state, monkeypatch, tmp_path, file):
    whole = loop.train(tiny("whole", "training.steps=6"))
    write = bundle.write_tensors
    full = False

    def on_a_full_disk(tensors, path):
        if full and path.name == file and "000000004" in str(path):
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(bundle, "write_tensors", on_a_full_disk)
    full = True
    recipe = tiny("run", "training.steps=6", "training.checkpoint_every=2")
    with pytest.raises(TesseraError, match=r"cannot write .*step-000000004: No space left on device") as caught:
        loop.train(recipe)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000000002"]
    assert bundle.load(tmp_path / "run/checkpoints/step-000000002").config.origin["steps"] == 2
    full = False
    loop.train(recipe)
    assert state(recipe.output) == state(whole)


def test_safetensors_own_error_is_an_error_of_the_disk(trained, tmp_path, monkeypatch):
    def fails(tensors, path, **more):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(bundle, "save_file", fails)
    with pytest.raises(TesseraError, match=r"cannot write .*step-000000001: I/O error: No space left on device"):
        checkpoint.save(tmp_path, Place(1, 8), *trained)
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of one mebibyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("tensorboard", ["false", "true"])
def test_a_really_full_disk(tiny, small_disk, state, tensorboard):
    changes = ("training.steps=6", "training.checkpoint_every=2", f"training.tensorboard={tensorboard}")
    whole = loop.train(tiny("whole", *changes))
    recipe = tiny("disk/run", *changes)
    loop.train(tiny("disk/run", *changes, "training.steps=2"))
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as file:  # noqa: PT012
        while True:
            file.write(b"x" * 4096)
    with pytest.raises((TesseraError, OSError), match="No space left on device") as caught:
        loop.train(recipe)
    assert "\n" not in str(caught.value)
    assert json.loads((small_disk / "run/checkpoints/step-000000002/training.json").read_text())["step"] == 2
    bundle.load(small_disk / "run/checkpoints/step-000000002")
    assert len(bundle.checkpoints(small_disk / "run")) == 1
    ballast.unlink()
    loop.train(recipe)
    assert state(recipe.output) == state(whole)
