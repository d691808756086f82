"""A run on disk: written whole or not at all, read back bit for bit, and what a full disk leaves behind."""

import errno
import json
import subprocess

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tessera import bundle, drawing
from tessera.bundle import Model
from tessera.errors import TesseraError
from tessera.training import checkpoint, loop
from tessera.training.checkpoint import Place
from tessera.training.ema import Average
from tessera.training.optimizers import Adam, Muon, hidden_matrices
from tessera.training.recipe import EMA

MOMENTS, MOMENTUM = {"step", "exp_avg", "exp_avg_sq"}, {"momentum"}


def used(model, config, also=()):
    """A model, another network of the same make, its averages, of which the model holds the first, and its optimizer,
    all of them used.
    """
    network = model.config.network.build()
    average, optimizer = Average(network, EMA(decay=0.5, also=also)), config.build(network)
    for step in range(1, 4):
        for weight in network.parameters():
            weight.grad = torch.randn_like(weight) if weight.requires_grad else None
        optimizer.step()
        average.update(step)
    origin = {"EMA decay": 0.5}
    return Model(model.config.model_copy(update={"origin": origin}), average.network), network, average, optimizer


@pytest.fixture
def trained(tiny_model):
    return used(tiny_model, Adam())


def same(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@pytest.mark.parametrize(("config", "also"), [(Adam(), ()), (Muon(), ()), (Muon(), (0.9, 0.25, 1e-5))])
def test_what_is_saved_is_restored_bit_for_bit(tiny_model, tmp_path, config, also):
    model, network, average, optimizer = used(tiny_model, config, also)
    saved = checkpoint.save(tmp_path, Place(12, 3072), model, network, average, optimizer)
    assert saved == tmp_path / "checkpoints/step-000000012"
    other = model.config.network.build()
    means, fresh = Average(other, EMA(decay=0.5, also=also)), config.build(other)
    assert checkpoint.restore(saved, other, means, fresh) == Place(12, 3072)
    assert checkpoint.begun_anew(saved, other, means, fresh) == []
    assert same(other, network)
    for decay in (0.5, *also):
        assert same(means.networks[decay], average.networks[decay])
        assert not same(means.networks[decay], network)
    kinds = set()
    for one, two in zip(other.parameters(), network.parameters()):
        if one.requires_grad:
            kinds.add(tuple(sorted(fresh.state[one])))
            assert set(fresh.state[one]) == set(optimizer.state[two])
            assert all(torch.equal(value, optimizer.state[two][key]) for key, value in fresh.state[one].items())
    assert kinds == {tuple(sorted(keys)) for keys in ([MOMENTS, MOMENTUM] if config.kind == "muon" else [MOMENTS])}


@pytest.mark.parametrize(("before", "now"), [(Adam(), Muon()), (Muon(), Adam())])
def test_another_kind_of_optimizer_starts_without_a_memory_where_it_has_none_and_says_so(
    tiny_model, tmp_path, before, now
):
    model, network, average, optimizer = used(tiny_model, before)
    saved = checkpoint.save(tmp_path, Place(3, 24), model, network, average, optimizer)
    other = model.config.network.build()
    means, fresh = Average(other, EMA(decay=0.5)), now.build(other)
    checkpoint.restore(saved, other, means, fresh)
    matrices = [name for name, weight in other.named_parameters() if weight in hidden_matrices(other)]
    anew = [name for name, weight in other.named_parameters() if weight.requires_grad and weight not in fresh.state]
    assert anew == matrices
    count = sum(weight.requires_grad for weight in other.parameters())
    told = f"the optimizer's state of {len(matrices)} of {count} tensors"
    assert checkpoint.begun_anew(saved, other, means, fresh) == [told]
    for weight in other.parameters():
        weight.grad = torch.ones_like(weight) if weight.requires_grad else None
    fresh.step()  # and goes on


def test_averages_that_are_new_start_from_the_weights_and_the_first_from_the_first(tiny_model, tmp_path):
    model, network, average, optimizer = used(tiny_model, Adam(), also=(0.9,))
    saved = checkpoint.save(tmp_path, Place(3, 24), model, network, average, optimizer)
    other = model.config.network.build()
    means = Average(other, EMA(decay=0.25, also=(0.5, 0.75)))
    checkpoint.restore(saved, other, means, Adam().build(other))
    assert same(means.network, average.network)
    assert same(means.networks[0.5], average.networks[0.5])
    assert same(means.networks[0.75], network)
    swapped = Average(other, EMA(decay=0.9, also=(0.5,)))
    checkpoint.restore(saved, other, swapped, Adam().build(other))
    assert all(same(swapped.networks[decay], average.networks[decay]) for decay in (0.5, 0.9))


def test_an_average_is_chosen_by_its_decay(tiny_model, tmp_path):
    model, *rest = used(tiny_model, Adam(), also=(0.9, 0.25))
    saved = checkpoint.save(tmp_path, Place(3, 24), model, *rest)
    means = rest[1]
    assert same(bundle.load(saved).network, means.network)
    for decay in (0.5, 0.9, 0.25):
        loaded = bundle.load(saved, ema=decay)
        assert same(loaded.network, means.networks[decay])
        assert loaded.config.origin["EMA decay"] == decay
    with pytest.raises(TesseraError, match=r"no average of decay 0\.99; it has 0\.5, 0\.25, 0\.9"):
        bundle.load(saved, ema=0.99)
    bundle.save(bundle.load(saved, ema=0.9), tmp_path / "alone")
    assert same(bundle.load(tmp_path / "alone", ema=0.9).network, means.networks[0.9])
    with pytest.raises(TesseraError, match=r"no average of decay 0\.5; it has 0\.9"):
        bundle.load(tmp_path / "alone", ema=0.5)
    bundle.save(tiny_model, tmp_path / "bare")
    with pytest.raises(TesseraError, match=r"it does not say how they were averaged"):
        bundle.load(tmp_path / "bare", ema=0.5)


def test_a_checkpoint_is_a_bundle_that_draws(trained, tmp_path):
    model = trained[0]
    loaded = bundle.load(checkpoint.save(tmp_path, Place(1, 8), *trained))
    assert (drawing.generate(loaded, [0, 1], [0, 1]) == drawing.generate(model, [0, 1], [0, 1])).all()


def test_only_the_newest_are_kept(trained, tmp_path):
    for step in (1, 2, 10, 100):
        checkpoint.save(tmp_path, Place(step, 8 * step), *trained)
    checkpoint.prune(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000000010", "step-000000100"]


def test_a_missing_piece_is_named(trained, tmp_path):
    _, network, average, optimizer = trained
    saved = checkpoint.save(tmp_path, Place(1, 8), *trained)
    tensors = load_file(saved / checkpoint.STATE)
    for gone, said in (
        ("weights/final_layer.linear.bias", r"missing final_layer\.linear\.bias"),
        ("optimizer/exp_avg/final_layer.linear.bias", r"lacks the optimizer's state of final_layer\.linear\.bias"),
    ):
        save_file({key: value for key, value in tensors.items() if key != gone}, saved / checkpoint.STATE)
        with pytest.raises(TesseraError, match=said):
            checkpoint.restore(saved, network, average, optimizer)


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors"])
def test_truncated_weights_are_an_error_that_names_the_file(trained, tmp_path, name):
    _, network, average, optimizer = trained
    saved = checkpoint.save(tmp_path, Place(1, 8), *trained)
    whole = (saved / name).read_bytes()
    for size in (0, 100, len(whole) - 1):
        (saved / name).write_bytes(whole[:size])
        with pytest.raises(TesseraError, match=rf"{name} is damaged"):
            checkpoint.restore(saved, network, average, optimizer)
    (saved / name).unlink()
    with pytest.raises(TesseraError, match=rf"{name} is missing"):
        checkpoint.restore(saved, network, average, optimizer)


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
