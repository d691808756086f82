"""Checkpoints: complete or absent, restored bit for bit, verified, pruned, and safe on a full disk."""

import errno
import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from tessera import bundle, checkpoint_files, generation
from tessera.bundle import Model
from tessera.errors import TesseraError
from tessera.training import checkpoint, loop
from tessera.training.checkpoint import TrainerState, write
from tessera.training.ema import EMA
from tessera.training.optimizers import AdamWConfig, MuonConfig, hidden_matrices
from tessera.training.recipe import EMAConfig

ADAMW_KEYS, MUON_KEYS = ("exp_avg", "exp_avg_sq", "step"), ("momentum",)
SHARD = "state/shard-00001-model-00001-of-00001.safetensors"


def make_trained(model, config, extra_decays=()):
    """Arguments of `CheckpointWriter.save` after three steps: EMA model, network, EMA, optimizer."""
    network = model.config.network.build()
    ema, optimizer = EMA(network, EMAConfig(decay=0.5, extra_decays=extra_decays)), config.build(network)
    for step in range(1, 4):
        for weight in network.parameters():
            weight.grad = torch.randn_like(weight) if weight.requires_grad else None
        optimizer.step()
        ema.update(step)
    provenance = bundle.Provenance(ema_decay=0.5)
    return Model(model.config.model_copy(update={"provenance": provenance}), ema.network), network, ema, optimizer


@pytest.fixture
def trained(tiny_model):
    return make_trained(tiny_model, AdamWConfig())


def save(run, state, *trained):
    """Save a checkpoint and return its path."""
    writer = checkpoint.CheckpointWriter(run)
    writer.save(state, *trained)
    writer.wait()
    writer.close()
    return checkpoint.checkpoint_path(run, state.step)


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("config", "extra_decays"), [(AdamWConfig(), ()), (MuonConfig(), ()), (MuonConfig(), (0.9, 0.25, 1e-5))]
)
def test_a_saved_state_is_restored_bit_for_bit(tiny_model, tmp_path, config, extra_decays):
    model, network, ema, optimizer = make_trained(tiny_model, config, extra_decays)
    path = save(tmp_path, TrainerState(12, 3072), model, network, ema, optimizer)
    assert path == tmp_path / "checkpoints/step-000000012"
    new_network = model.config.network.build()
    new_ema = EMA(new_network, EMAConfig(decay=0.5, extra_decays=extra_decays))
    new_optimizer = config.build(new_network)
    assert checkpoint.restore(path, new_network, new_ema, new_optimizer) == TrainerState(12, 3072)
    assert checkpoint.missing_state(path, new_network, new_ema, new_optimizer) == []
    assert equal(new_network, network)
    for decay in (0.5, *extra_decays):
        assert equal(new_ema.networks[decay], ema.networks[decay])
        assert not equal(new_ema.networks[decay], network)
    keys = set()
    for new, old in zip(new_network.parameters(), network.parameters()):
        if new.requires_grad:
            keys.add(tuple(sorted(new_optimizer.state[new])))
            assert set(new_optimizer.state[new]) == set(optimizer.state[old])
            assert all(torch.equal(value, optimizer.state[old][key]) for key, value in new_optimizer.state[new].items())
    assert keys == ({ADAMW_KEYS, MUON_KEYS} if config.kind == "muon" else {ADAMW_KEYS})


@pytest.mark.parametrize(("before", "after"), [(AdamWConfig(), MuonConfig()), (MuonConfig(), AdamWConfig())])
def test_another_kind_of_optimizer_starts_without_the_state_that_it_cannot_use(tiny_model, tmp_path, before, after):
    path = save(tmp_path, TrainerState(3, 24), *make_trained(tiny_model, before))
    network = tiny_model.config.network.build()
    ema, optimizer = EMA(network, EMAConfig(decay=0.5)), after.build(network)
    checkpoint.restore(path, network, ema, optimizer)
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    missing = [name for name, weight in trained.items() if weight not in optimizer.state]
    assert missing == [name for name in trained if name in hidden_matrices(network)]
    expected = f"the optimizer state of {len(missing)} of {len(trained)} tensors"
    assert checkpoint.missing_state(path, network, ema, optimizer) == [expected]
    for weight in network.parameters():
        weight.grad = torch.ones_like(weight) if weight.requires_grad else None
    optimizer.step()  # training continues


def test_new_averages_start_from_the_weights_and_a_new_first_one_from_the_old_first_one(tiny_model, tmp_path):
    model, network, ema, optimizer = make_trained(tiny_model, AdamWConfig(), extra_decays=(0.9,))
    path = save(tmp_path, TrainerState(3, 24), model, network, ema, optimizer)
    new_network = model.config.network.build()
    new_ema = EMA(new_network, EMAConfig(decay=0.25, extra_decays=(0.5, 0.75)))
    checkpoint.restore(path, new_network, new_ema, AdamWConfig().build(new_network))
    assert equal(new_ema.network, ema.network)
    assert equal(new_ema.networks[0.5], ema.networks[0.5])
    assert equal(new_ema.networks[0.75], network)
    swapped = EMA(new_network, EMAConfig(decay=0.9, extra_decays=(0.5,)))
    checkpoint.restore(path, new_network, swapped, AdamWConfig().build(new_network))
    assert all(equal(swapped.networks[decay], ema.networks[decay]) for decay in (0.5, 0.9))


def test_ema_weights_are_loaded_by_their_decay(tiny_model, tmp_path):
    model, network, ema, optimizer = make_trained(tiny_model, AdamWConfig(), extra_decays=(0.9, 0.25))
    path = save(tmp_path, TrainerState(3, 24), model, network, ema, optimizer)
    assert equal(bundle.load(path).network, ema.network)
    for decay in (0.5, 0.9, 0.25):
        loaded = bundle.load(path, ema=decay)
        assert equal(loaded.network, ema.networks[decay])
        assert loaded.config.provenance.ema_decay == decay
    with pytest.raises(TesseraError, match=r"decay 0\.99; it has 0\.5, 0\.25, 0\.9"):
        bundle.load(path, ema=0.99)
    bundle.save(bundle.load(path, ema=0.9), tmp_path / "copy")
    assert equal(bundle.load(tmp_path / "copy", ema=0.9).network, ema.networks[0.9])
    with pytest.raises(TesseraError, match=r"decay 0\.5; it has 0\.9"):
        bundle.load(tmp_path / "copy", ema=0.5)
    bundle.save(tiny_model, tmp_path / "bare")
    with pytest.raises(TesseraError, match=r"weights of unknown decay"):
        bundle.load(tmp_path / "bare", ema=0.5)


def test_a_checkpoint_is_a_bundle_for_sampling(trained, tmp_path):
    loaded = bundle.load(save(tmp_path, TrainerState(1, 8), *trained))
    expected = generation.generate(trained[0], [0, 1], [0, 1])
    assert (generation.generate(loaded, [0, 1], [0, 1]) == expected).all()


def test_a_missing_tensor_is_named(trained, tmp_path):
    _, network, ema, optimizer = trained
    path = save(tmp_path, TrainerState(1, 8), *trained)
    file = next((path / checkpoint.STATE_DIR).iterdir())
    tensors = load_file(file)
    for missing, message in (
        ("weights/final_layer.linear.bias", r"missing final_layer\.linear\.bias"),
        ("optimizer/exp_avg/final_layer.linear.bias", r"no optimizer state of final_layer\.linear\.bias"),
    ):
        save_file({key: value for key, value in tensors.items() if key != missing}, file)
        with pytest.raises(TesseraError, match=message):
            checkpoint.restore(path, network, ema, optimizer)


@pytest.mark.parametrize("name", ["model.safetensors", SHARD])
def test_truncated_or_missing_weights_are_an_error_that_names_the_file(trained, tmp_path, name):
    _, network, ema, optimizer = trained
    path = save(tmp_path, TrainerState(1, 8), *trained)
    assert checkpoint.verify(path) == []
    content = (path / name).read_bytes()
    for size in (0, 100, len(content) - 1):
        (path / name).write_bytes(content[:size])
        assert checkpoint.verify(path) == [f"{name} has a wrong checksum"]
        with pytest.raises(TesseraError, match=r"(model.safetensors|state) is damaged"):
            checkpoint.restore(path, network, ema, optimizer)
    (path / name).unlink()
    assert checkpoint.verify(path) == [f"{name}: No such file or directory"]
    with pytest.raises(TesseraError, match=r"missing"):
        checkpoint.restore(path, network, ema, optimizer)


@pytest.mark.parametrize("name", ["config.json", "ema/0.9.safetensors", SHARD])
def test_a_flipped_bit_is_detected(tiny_model, tmp_path, name):
    path = save(tmp_path, TrainerState(1, 8), *make_trained(tiny_model, AdamWConfig(), extra_decays=(0.9,)))
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 4
    (path / name).write_bytes(content)
    assert checkpoint.verify(path) == [f"{name} has a wrong checksum"]


def test_the_newest_valid_checkpoint_is_found_and_damaged_ones_are_quarantined(trained, tmp_path):
    path = {step: save(tmp_path, TrainerState(step, 8 * step), *trained) for step in (1, 2, 3, 4)}
    (path[4] / checkpoint.TRAINER_STATE).unlink()
    (path[3] / SHARD).write_bytes(b"half")
    valid, damaged = checkpoint.latest_valid(tmp_path)
    assert valid == path[2]
    assert damaged == {
        path[4]: [f"{path[4]} is not a training checkpoint: training.json is missing or damaged"],
        path[3]: [f"{SHARD} has a wrong checksum"],
    }
    for damaged_path in damaged:
        checkpoint.quarantine(damaged_path)
    names = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000000001", "step-000000002", "step-000000003.damaged", "step-000000004.damaged"]
    save(tmp_path, TrainerState(3, 24), *trained)  # the name is free again
    for step in (1, 2, 3):
        (path[step] / SHARD).unlink()
    with pytest.raises(TesseraError, match="every checkpoint in .* is damaged"):
        checkpoint.latest_valid(tmp_path)


@pytest.mark.parametrize(("content", "version"), [({}, "0.6.0 or earlier"), ({"tessera_version": "9.1"}, "9.1")])
def test_a_checkpoint_of_another_version_is_an_error_with_that_version_and_not_damage(
    trained, tmp_path, content, version
):
    path = save(tmp_path, TrainerState(7, 56), *trained)
    (path / checkpoint.TRAINER_STATE).write_text(json.dumps({"step": 7, "position": 56, **content}))
    for read in (checkpoint.verify, checkpoint.read_state, lambda path: checkpoint.latest_valid(tmp_path)):
        with pytest.raises(TesseraError, match=f"was written by Tessera {version}.*another run_dir="):
            read(path)


def test_training_does_not_change_a_checkpoint_that_is_being_written(trained, tmp_path):
    _, network, ema, optimizer = trained
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    averages = {name: value.clone() for name, value in ema.network.state_dict().items()}
    parameters = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    moments = {name: optimizer.state[weight]["exp_avg"].clone() for name, weight in parameters.items()}
    writer = checkpoint.CheckpointWriter(tmp_path)
    writer.save(TrainerState(1, 8), *trained)
    with torch.no_grad():  # at once, before the thread can have written everything
        for weight in (*network.parameters(), *ema.network.parameters()):
            weight.fill_(7.0)
        for state in optimizer.state.values():
            state["exp_avg"].fill_(7.0)
    writer.wait()
    writer.close()
    path = checkpoint.checkpoint_path(tmp_path, 1)
    saved, saved_averages = load_file(path / SHARD), load_file(path / bundle.WEIGHTS)
    assert all(torch.equal(saved[f"weights/{name}"], value) for name, value in weights.items())
    assert all(torch.equal(saved[f"optimizer/exp_avg/{name}"], value) for name, value in moments.items())
    assert all(torch.equal(saved_averages[name], value) for name, value in averages.items())


@pytest.mark.parametrize(
    ("options", "expected"), [({"keep_last": 2}, [20, 25]),
                              ({"keep_last": 1, "keep_every_n_steps": 10, "best_step": 5}, [5, 10, 20, 25])]
)  # fmt: skip
def test_the_newest_the_regular_and_the_best_checkpoints_are_kept(trained, tmp_path, options, expected):
    for step in (0, 5, 10, 15, 20, 25):
        save(tmp_path, TrainerState(step, 8 * step), *trained)
    checkpoint.prune(tmp_path, **options)
    assert sorted(int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir()) == expected


@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"step": 3}', '{"step": "many"}', '{"step": null}'])
def test_a_folder_without_a_position_is_not_a_checkpoint(tmp_path, text):
    if text is not None:
        (tmp_path / checkpoint.TRAINER_STATE).write_text(text)
    with pytest.raises(TesseraError, match="is not a training checkpoint"):
        checkpoint.read_state(tmp_path)


# A full disk


@pytest.mark.parametrize("part", ["bundle", "state"])
def test_a_full_disk_during_a_save_leaves_the_previous_checkpoint(tiny, state, monkeypatch, tmp_path, part):
    whole = loop.train(tiny("whole", "training.steps=6"))
    write_tensors, write_data = write.write_tensors, HuggingFaceStorageWriter.write_data
    modules = [module for module in (bundle, write) if hasattr(module, "write_tensors")]

    def fail_tensors(tensors, path):
        if "000000004" in str(path):
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        write_tensors(tensors, path)

    def fail_data(self, plan, planner):
        if "000000004" in str(self.path):
            Path(self.path, "shard-00001").write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_data(self, plan, planner)

    if part == "bundle":
        for module in modules:
            monkeypatch.setattr(module, "write_tensors", fail_tensors)
    else:
        monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", fail_data)
    recipe = tiny("run", "training.steps=6", "training.checkpoint_every=2")
    with pytest.raises(TesseraError, match=r"cannot write .*step-000000004: No space left on device") as caught:
        loop.train(recipe)
    assert "\n" not in str(caught.value)
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert saved == ["step-000000000", "step-000000002"]
    assert f"the last checkpoint is {tmp_path / 'run/checkpoints/step-000000002'}" in str(caught.value)
    assert bundle.load(tmp_path / "run/checkpoints/step-000000002").config.provenance.steps == 2
    monkeypatch.undo()
    loop.train(recipe)
    assert state(recipe.run_dir) == state(whole)


def test_an_error_of_safetensors_is_an_error_of_the_disk(trained, tmp_path, monkeypatch):
    def fail(tensors, path, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint_files, "save_file", fail)
    with pytest.raises(TesseraError, match=r"cannot write .*step-000000001: I/O error: No space left on device"):
        save(tmp_path, TrainerState(1, 8), *trained)
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        result = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if result.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("tensorboard", ["false", "true"])
def test_a_run_on_a_disk_that_is_really_full_can_be_resumed(tiny, small_disk, state, tensorboard):
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
    assert state(recipe.run_dir) == state(whole)
