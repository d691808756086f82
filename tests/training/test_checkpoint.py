"""A run on disk: written whole or not at all, read back bit for bit, and what a full disk leaves behind."""

import errno
import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from tessera import bundle
from tessera.bundle import Model
from tessera.errors import TesseraError
from tessera.generation import pipeline
from tessera.training import loop
from tessera.training.checkpoint import checkpoint
from tessera.training.checkpoint.checkpoint import TrainerState
from tessera.training.ema import EMA
from tessera.training.optimizers import AdamWConfig, MuonConfig, hidden_matrices
from tessera.training.recipe import EMAConfig

MOMENTS, MOMENTUM = {"step", "exp_avg", "exp_avg_sq"}, {"momentum"}


def used(model, config, also=()):
    """A model, another network of the same make, its averages, of which the model holds the first, and its optimizer,
    all of them used.
    """
    network = model.config.network.build()
    average, optimizer = EMA(network, EMAConfig(decay=0.5, extra_decays=also)), config.build(network)
    for step in range(1, 4):
        for weight in network.parameters():
            weight.grad = torch.randn_like(weight) if weight.requires_grad else None
        optimizer.step()
        average.update(step)
    origin = {"EMA decay": 0.5}
    return Model(model.config.model_copy(update={"origin": origin}), average.network), network, average, optimizer


@pytest.fixture
def trained(tiny_model):
    return used(tiny_model, AdamWConfig())


def saved_at(run, place, *trained):
    """A checkpoint of what was trained."""
    writer = checkpoint.CheckpointWriter(run)
    writer.save(place, *trained)
    writer.wait()
    writer.close()
    return checkpoint.checkpoint_path(run, place.step)


def same(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("config", "also"), [(AdamWConfig(), ()), (MuonConfig(), ()), (MuonConfig(), (0.9, 0.25, 1e-5))]
)
def test_what_is_saved_is_restored_bit_for_bit(tiny_model, tmp_path, config, also):
    model, network, average, optimizer = used(tiny_model, config, also)
    saved = saved_at(tmp_path, TrainerState(12, 3072), model, network, average, optimizer)
    assert saved == tmp_path / "checkpoints/step-000000012"
    other = model.config.network.build()
    means, fresh = EMA(other, EMAConfig(decay=0.5, extra_decays=also)), config.build(other)
    assert checkpoint.restore(saved, other, means, fresh) == TrainerState(12, 3072)
    assert checkpoint.missing_state(saved, other, means, fresh) == []
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


@pytest.mark.parametrize(("before", "now"), [(AdamWConfig(), MuonConfig()), (MuonConfig(), AdamWConfig())])
def test_another_kind_of_optimizer_starts_without_a_memory_where_it_has_none_and_says_so(
    tiny_model, tmp_path, before, now
):
    model, network, average, optimizer = used(tiny_model, before)
    saved = saved_at(tmp_path, TrainerState(3, 24), model, network, average, optimizer)
    other = model.config.network.build()
    means, fresh = EMA(other, EMAConfig(decay=0.5)), now.build(other)
    checkpoint.restore(saved, other, means, fresh)
    matrices = [name for name, weight in other.named_parameters() if name in hidden_matrices(other)]
    anew = [name for name, weight in other.named_parameters() if weight.requires_grad and weight not in fresh.state]
    assert anew == matrices
    count = sum(weight.requires_grad for weight in other.parameters())
    told = f"the optimizer's state of {len(matrices)} of {count} tensors"
    assert checkpoint.missing_state(saved, other, means, fresh) == [told]
    for weight in other.parameters():
        weight.grad = torch.ones_like(weight) if weight.requires_grad else None
    fresh.step()  # and goes on


def test_averages_that_are_new_start_from_the_weights_and_the_first_from_the_first(tiny_model, tmp_path):
    model, network, average, optimizer = used(tiny_model, AdamWConfig(), also=(0.9,))
    saved = saved_at(tmp_path, TrainerState(3, 24), model, network, average, optimizer)
    other = model.config.network.build()
    means = EMA(other, EMAConfig(decay=0.25, extra_decays=(0.5, 0.75)))
    checkpoint.restore(saved, other, means, AdamWConfig().build(other))
    assert same(means.network, average.network)
    assert same(means.networks[0.5], average.networks[0.5])
    assert same(means.networks[0.75], network)
    swapped = EMA(other, EMAConfig(decay=0.9, extra_decays=(0.5,)))
    checkpoint.restore(saved, other, swapped, AdamWConfig().build(other))
    assert all(same(swapped.networks[decay], average.networks[decay]) for decay in (0.5, 0.9))


def test_an_average_is_chosen_by_its_decay(tiny_model, tmp_path):
    model, *rest = used(tiny_model, AdamWConfig(), also=(0.9, 0.25))
    saved = saved_at(tmp_path, TrainerState(3, 24), model, *rest)
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
    loaded = bundle.load(saved_at(tmp_path, TrainerState(1, 8), *trained))
    assert (pipeline.generate(loaded, [0, 1], [0, 1]) == pipeline.generate(model, [0, 1], [0, 1])).all()


def test_only_the_newest_are_kept(trained, tmp_path):
    for step in (1, 2, 10, 100):
        saved_at(tmp_path, TrainerState(step, 8 * step), *trained)
    checkpoint.prune(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000000010", "step-000000100"]


def test_a_missing_piece_is_named(trained, tmp_path):
    _, network, average, optimizer = trained
    saved = saved_at(tmp_path, TrainerState(1, 8), *trained)
    file = next((saved / checkpoint.STATE).iterdir())
    tensors = load_file(file)
    for gone, said in (
        ("weights/final_layer.linear.bias", r"missing final_layer\.linear\.bias"),
        ("optimizer/exp_avg/final_layer.linear.bias", r"lacks the optimizer's state of final_layer\.linear\.bias"),
    ):
        save_file({key: value for key, value in tensors.items() if key != gone}, file)
        with pytest.raises(TesseraError, match=said):
            checkpoint.restore(saved, network, average, optimizer)


SHARD = "state/shard-00001-model-00001-of-00001.safetensors"


@pytest.mark.parametrize("name", ["model.safetensors", SHARD])
def test_truncated_weights_are_an_error_that_names_the_file(trained, tmp_path, name):
    _, network, average, optimizer = trained
    saved = saved_at(tmp_path, TrainerState(1, 8), *trained)
    assert checkpoint.verify(saved) == []
    whole = (saved / name).read_bytes()
    for size in (0, 100, len(whole) - 1):
        (saved / name).write_bytes(whole[:size])
        assert checkpoint.verify(saved) == [f"{name} is not what was written"]
        with pytest.raises(TesseraError, match=r"(model.safetensors|state) is damaged"):
            checkpoint.restore(saved, network, average, optimizer)
    (saved / name).unlink()
    assert checkpoint.verify(saved) == [f"{name}: No such file or directory"]
    with pytest.raises(TesseraError, match=r"missing"):
        checkpoint.restore(saved, network, average, optimizer)


@pytest.mark.parametrize("name", ["config.json", "ema/0.9.safetensors", SHARD])
def test_one_flipped_bit_is_seen(tiny_model, tmp_path, name):
    saved = saved_at(tmp_path, TrainerState(1, 8), *used(tiny_model, AdamWConfig(), also=(0.9,)))
    content = bytearray((saved / name).read_bytes())
    content[len(content) // 2] ^= 4
    (saved / name).write_bytes(content)
    assert checkpoint.verify(saved) == [f"{name} is not what was written"]


def test_the_newest_whole_one_is_found_and_the_damaged_are_named(trained, tmp_path):
    for step in (1, 2, 3, 4):
        saved_at(tmp_path, TrainerState(step, 8 * step), *trained)
    path = {step: checkpoint.checkpoint_path(tmp_path, step) for step in (1, 2, 3, 4)}
    (path[4] / checkpoint.PLACE).unlink()
    (path[3] / SHARD).write_bytes(b"half")
    found, damaged = checkpoint.latest_valid(tmp_path)
    assert found == path[2]
    assert damaged == {
        path[4]: [f"{path[4]} is no training checkpoint: training.json is missing or damaged"],
        path[3]: [f"{SHARD} is not what was written"],
    }
    for one in damaged:
        checkpoint.quarantine(one)
    left = sorted(one.name for one in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-000000001", "step-000000002", "step-000000003.damaged", "step-000000004.damaged"]
    saved_at(tmp_path, TrainerState(3, 24), *trained)  # their places are free again
    for step in (1, 2, 3):
        (path[step] / SHARD).unlink()
    with pytest.raises(TesseraError, match="every checkpoint in .* is damaged"):
        checkpoint.latest_valid(tmp_path)
    assert checkpoint.latest_valid(tmp_path / "nothing") == (None, {})


def test_a_checkpoint_of_an_older_version_is_read(tiny_model, tmp_path):
    """Before 0.4 one file beside the bundle held the state, and there were no checksums."""
    model, network, average, optimizer = used(tiny_model, AdamWConfig())
    saved = saved_at(tmp_path, TrainerState(7, 56), model, network, average, optimizer)
    (saved / SHARD).rename(saved / "training.safetensors")
    (saved / checkpoint.STATE).rmdir()
    save_file(load_file(saved / "training.safetensors"), saved / "training.safetensors")  # without DCP's notes
    (saved / checkpoint.PLACE).write_text('{"step": 7, "position": 56}')
    assert checkpoint.verify(saved) == []
    other = model.config.network.build()
    means, fresh = EMA(other, EMAConfig(decay=0.5)), AdamWConfig().build(other)
    assert checkpoint.restore(saved, other, means, fresh) == TrainerState(7, 56)
    assert same(other, network)
    assert same(means.network, average.network)
    for one, two in zip(other.parameters(), network.parameters()):
        if one.requires_grad:
            assert all(torch.equal(value, optimizer.state[two][key]) for key, value in fresh.state[one].items())


def test_what_training_does_meanwhile_does_not_reach_the_file(trained, tmp_path):
    _, network, average, optimizer = trained
    before = {name: value.clone() for name, value in network.state_dict().items()}
    moments = {
        name: optimizer.state[one]["exp_avg"].clone() for name, one in network.named_parameters() if one.requires_grad
    }
    mean = {name: value.clone() for name, value in average.network.state_dict().items()}
    writer = checkpoint.CheckpointWriter(tmp_path)
    writer.save(TrainerState(1, 8), *trained)
    with torch.no_grad():  # at once, before the thread can have written all
        for one in (*network.parameters(), *average.network.parameters()):
            one.fill_(7.0)
        for state in optimizer.state.values():
            state["exp_avg"].fill_(7.0)
    writer.wait()
    writer.close()
    saved = checkpoint.checkpoint_path(tmp_path, 1)
    kept = load_file(saved / SHARD)
    assert all(torch.equal(kept[f"weights/{name}"], value) for name, value in before.items())
    assert all(torch.equal(kept[f"optimizer/exp_avg/{name}"], value) for name, value in moments.items())
    assert all(torch.equal(value, mean[name]) for name, value in load_file(saved / bundle.WEIGHTS).items())


def test_those_of_every_so_many_steps_and_the_best_are_kept_for_good(trained, tmp_path):
    for step in (0, 5, 10, 15, 20, 25):
        saved_at(tmp_path, TrainerState(step, 8 * step), *trained)
    checkpoint.prune(tmp_path, 1, every=10, best=5)
    left = sorted(int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir())
    assert left == [5, 10, 20, 25]


@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"step": 3}', '{"step": "many"}', '{"step": null}'])
def test_what_does_not_say_its_place_is_no_checkpoint(tmp_path, text):
    if text is not None:
        (tmp_path / checkpoint.PLACE).write_text(text)
    with pytest.raises(TesseraError, match="is no training checkpoint"):
        checkpoint.read_state(tmp_path)


# A full disk


@pytest.mark.parametrize("where", ["bundle", "state"])
def test_a_full_disk_in_mid_save_leaves_the_previous_checkpoint(tiny, state, monkeypatch, tmp_path, where):
    whole = loop.train(tiny("whole", "training.steps=6"))
    write, write_data = bundle.write_tensors, HuggingFaceStorageWriter.write_data

    def on_a_full_disk(tensors, path):
        if "000000004" in str(path):
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path)

    def state_on_a_full_disk(self, plan, planner):
        if "000000004" in str(self.path):
            Path(self.path, "shard-00001").write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_data(self, plan, planner)

    if where == "bundle":
        monkeypatch.setattr(bundle, "write_tensors", on_a_full_disk)
    else:
        monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", state_on_a_full_disk)
    recipe = tiny("run", "training.steps=6", "training.checkpoint_every=2")
    with pytest.raises(TesseraError, match=r"cannot write .*step-000000004: No space left on device") as caught:
        loop.train(recipe)
    assert "\n" not in str(caught.value)
    present = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert present == ["step-000000000", "step-000000002"]
    assert f"the last checkpoint is {tmp_path / 'run/checkpoints/step-000000002'}" in str(caught.value)
    assert bundle.load(tmp_path / "run/checkpoints/step-000000002").config.origin["steps"] == 2
    monkeypatch.undo()
    loop.train(recipe)
    assert state(recipe.output) == state(whole)


def test_safetensors_own_error_is_an_error_of_the_disk(trained, tmp_path, monkeypatch):
    def fails(tensors, path, **more):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(bundle, "save_file", fails)
    with pytest.raises(TesseraError, match=r"cannot write .*step-000000001: I/O error: No space left on device"):
        saved_at(tmp_path, TrainerState(1, 8), *trained)
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of two mebibytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
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
    assert len(bundle.checkpoints(small_disk / "run")) == 2
    ballast.unlink()
    loop.train(recipe)
    assert state(recipe.output) == state(whole)
