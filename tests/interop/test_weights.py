"""Weights as training programs save them: wrappers, nested dictionaries, other networks beside, folders."""

import argparse
import json
import pathlib
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tessera import bundle
from tessera.conditioning import Condition
from tessera.errors import TesseraError
from tessera.interop import load
from tessera.interop.weights import WRAPPERS

PAPER = {"prediction": "epsilon"}


@pytest.fixture
def model(make_model):
    return make_model(None, PAPER)


def state(model) -> dict:
    return {name: tensor.detach().clone() for name, tensor in model.network.state_dict().items()}


def zeros(model) -> dict:
    return {name: torch.zeros_like(tensor) for name, tensor in state(model).items()}


def prefixed(prefix: str, tensors: dict) -> dict:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def read(path, stored=None, **options):
    if stored is not None:
        torch.save(stored, path)
    return load.load(path, "cpu", **{"num_heads": 2, "num_classes": 3, **options})


def read_error(path, stored=None, **options) -> str:
    with pytest.raises(TesseraError) as caught:
        read(path, stored, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def is_same(one, two) -> bool:
    return bundle.weights_hash(one.network) == bundle.weights_hash(two.network)


# Names


def wrapped(tensors: dict, choose: random.Random) -> dict:
    """The tensors by names with wrappers at random places; each module has the same in all names."""
    wrappers, result = {}, {}
    for name, tensor in tensors.items():
        words = []
        for depth, word in enumerate(name.split(".")):
            module = tuple(name.split(".")[:depth])
            wrappers.setdefault(module, choose.choices(sorted(WRAPPERS), k=choose.choice([0, 0, 1, 2])))
            words += [*wrappers[module], word]
        result[".".join(words)] = tensor
    return result


def test_wrappers_are_removed_at_any_place_in_any_order(model, tmp_path):
    for seed in range(20):
        choose = random.Random(seed)
        prefix = choose.choice(["", "model.", "net.dit.", "model.diffusion_model."])
        stored = prefixed(prefix, wrapped(state(model), choose))
        assert is_same(read(tmp_path / "a.pt", choose.choice([stored, {"state_dict": stored}])), model)


def test_two_tensors_of_one_name_are_refused(model, tmp_path):
    stored = {**state(model), **prefixed("module.", zeros(model))}
    assert "two tensors named" in read_error(tmp_path / "a.pt", stored)
    assert is_same(read(tmp_path / "a.pt", {**state(model), **prefixed("module.", state(model))}), model)


# Dictionaries


@pytest.mark.parametrize(
    "make",
    [
        lambda good, bad: {"state_dict": prefixed("model.", good), "epoch": 1, "pytorch-lightning_version": "2.1"},
        lambda good, bad: {"module": good, "ds_version": "0.14", "optimizer": None},
        lambda good, bad: {
            "model_state_dict": good,
            "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
        },
        lambda good, bad: {"model": bad, "model_ema": good},
        lambda good, bad: {"state_dict": bad, "state_dict_ema": prefixed("module.", good)},
        lambda good, bad: {"model": bad, "ema": {"decay": 0.99, "module": good}},
        lambda good, bad: {"state_dict": prefixed("net.", bad) | prefixed("ema_net.module.", good)},
        lambda good, bad: prefixed("online_model.", bad) | prefixed("ema_model.", good) | {"step": torch.ones(())},
        lambda good, bad: {"ema": {}, "model": good},
        lambda good, bad: {"ema": {"decay": 0.999}, "model": good},
        lambda good, bad: {"app": {"model": {"net": good}, "optim": {}}},
        lambda good, bad: {**good, "epoch": 7},
        lambda good, bad: (good, 7),
    ],
)
def test_the_dictionary_that_holds_the_network_is_found(model, tmp_path, make):
    assert is_same(read(tmp_path / "a.pt", make(state(model), zeros(model))), model)


def test_the_choice_is_reported(model, tmp_path):
    stored = {"model": prefixed("module.", zeros(model)), "ema_model": prefixed("dit.", state(model))}
    assert read(tmp_path / "a.pt", stored).config.provenance.converted_from.endswith("a.pt (ema_model: dit.*)")


def test_a_choice_between_equals_is_logged(model, tmp_path, caplog):
    stored = {"ema_0.9999": state(model), "ema_0.999": zeros(model), "model": zeros(model)}
    provenance = read(tmp_path / "a.pt", stored).config.provenance
    assert provenance.converted_from.endswith("(ema_0.9999)")
    assert provenance.not_converted == "other weights of the same network: ema_0.999"
    assert "left out: other weights of the same network: ema_0.999" in caplog.text


def test_averaged_weights_that_cannot_be_used_are_named(model, tmp_path):
    shadow = {"decay": 0.999, "shadow_params": list(zeros(model).values())}
    unnamed = read(tmp_path / "a.pt", {"model": state(model), "ema": shadow})
    assert is_same(unnamed, model)
    assert unnamed.config.provenance.not_converted == "weights without names: ema.shadow_params"
    part = {name: tensor for name, tensor in zeros(model).items() if name != "pos_embed"}
    incomplete = read(tmp_path / "a.pt", {"model": state(model), "ema": part})
    assert is_same(incomplete, model)
    assert incomplete.config.provenance.not_converted == "incomplete weights: ema"


def test_other_networks_beside_it_are_named_and_left_out(model, tmp_path):
    others = {
        "vae.encoder.conv.weight": torch.ones(2, 2),
        "vae.encoder.conv.bias": torch.ones(2),
        "logvar": torch.ones(1),
    }
    read_model = read(tmp_path / "a.ckpt", {"state_dict": prefixed("model.", state(model)) | others})
    assert is_same(read_model, model)
    assert read_model.config.provenance.not_converted == "vae (2 tensors); logvar (1 tensor)"


def test_what_the_network_depends_on_is_never_left_out(model, tmp_path):
    for name in ("feat_rope.freqs_cos", "s_embedder.mlp.0.weight", "blocks.0.attn.q_norm.weight", "wg_norm.weight"):
        with pytest.raises(TesseraError, match=f"unexpected {name}"):
            read(tmp_path / "a.pt", {**state(model), name: torch.ones(4)})


def test_plain_objects_of_training_programs_are_read(model, tmp_path):
    stored = {"model": state(model), "best": np.float64(3.5), "steps": np.int64(7), "cfg": argparse.Namespace(lr=1e-4)}
    stored["args"] = argparse.Namespace(out=pathlib.Path("runs/1"), num_classes=3)
    assert is_same(read(tmp_path / "a.pt", stored, num_classes=None), model)


def test_a_file_without_positions_needs_the_size(model, tmp_path):
    tensors = {name: tensor for name, tensor in state(model).items() if name != "pos_embed"}
    assert "pass size=(height, width)" in read_error(tmp_path / "a.pt", tensors)
    assert is_same(read(tmp_path / "a.pt", size=8), model)  # the sin-cos table of the network


# Files and folders


@pytest.mark.parametrize("name", ["a.ckpt", "a.bin", "A.PT", "a.pt.tar", "a.pth.tar", "a.Pth"])
def test_names_of_pickles(model, tmp_path, name):
    assert is_same(read(tmp_path / name, state(model)), model)
    assert load.is_model(tmp_path / name)


def test_safetensors_with_wrappers(model, tmp_path):
    save_file(prefixed("_orig_mod.module.", state(model)), tmp_path / "a.SAFETENSORS")
    assert is_same(read(tmp_path / "a.SAFETENSORS"), model)


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_a_folder_of_weights_or_shards(model, tmp_path, variant):
    """As accelerate writes them, and with a variant."""
    save_file(state(model), tmp_path / f"model{variant}.safetensors")
    torch.save({}, tmp_path / "optimizer.bin")
    assert is_same(read(tmp_path), model)
    assert load.is_model(tmp_path)
    (tmp_path / f"model{variant}.safetensors").unlink()
    weight_map = {}
    for number in (1, 2):
        part = dict(list(state(model).items())[number - 1 :: 2])
        file = f"model{variant}-0000{number}-of-00002.safetensors"
        save_file(part, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / f"model.safetensors.index{variant}.json").write_text(json.dumps({"weight_map": weight_map}))
    shards = read(tmp_path)
    assert is_same(shards, model)
    assert ("variant fp16" in shards.config.provenance.converted_from) == (variant != "")


def test_full_precision_is_preferred_to_a_variant_and_two_variants_are_refused(model, tmp_path):
    save_file(state(model), tmp_path / "model.safetensors")
    for variant in ("fp16", "bf16"):
        save_file(zeros(model), tmp_path / f"model.{variant}.safetensors")
    assert is_same(read(tmp_path), model)
    (tmp_path / "model.safetensors").unlink()
    assert "variants bf16, fp16" in read_error(tmp_path)


def test_a_folder_of_deepspeed(model, tmp_path):
    folder = tmp_path / "global_step7"
    folder.mkdir()
    torch.save({"module": state(model), "ds_version": "0.14"}, folder / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text("global_step7")
    assert is_same(read(tmp_path), model)
    assert is_same(read(folder), model)
    torch.save({"module": {}}, folder / "mp_rank_01_model_states.pt")
    assert "split between 2 files" in read_error(tmp_path)


# The null label


def test_bare_weights_do_not_record_whether_there_is_a_null_label(make_model, tmp_path, caplog):
    model = make_model({"num_classes": 10, "learn_null_class": False}, PAPER, class_names=())
    read_model = read(tmp_path / "a.pt", state(model), num_classes=None)
    assert (read_model.config.network.num_classes, read_model.config.sampling.guidance_scale) == (9, 4)
    for text in (read_model.config.provenance.assumed, caplog.text):
        assert "it has 9 classes" in text
        assert "pass num_classes=10 (--num-classes 10, in a recipe training.init_num_classes)" in text
    caplog.clear()
    read_model = read(tmp_path / "a.pt", num_classes=10)
    network = read_model.config.network
    assert (network.num_classes, network.learn_null_class, network == model.config.network) == (10, False, True)
    assert read_model.config.sampling.guidance_scale == 1
    assert read(tmp_path / "a.pt", num_classes=9).config.network.learn_null_class
    assert "expected 7, or one more for the null label" in read_error(tmp_path / "a.pt", num_classes=7)
    assert not caplog.records


def test_a_file_that_records_its_classes_needs_no_assumption(model, tmp_path, caplog):
    stored = {"ema": state(model), "args": argparse.Namespace(num_classes=3)}
    assert read(tmp_path / "a.pt", stored, num_classes=None).config.provenance.assumed is None
    assert "has 3 classes, not 4: leave out num_classes" in read_error(_saved_bundle(model, tmp_path), num_classes=4)
    assert not caplog.records


def _saved_bundle(model, folder):
    bundle.save(model, folder / "bundle")
    return folder / "bundle"


# REPA: SiT with time from data (0) to noise (1), as in Tessera, and heads that training alone uses


def repa(make_model):
    model = make_model({"in_channels": 3, "out_channels": 3}, {"kind": "flow", "network_times": (0, 1)})
    heads = {f"projectors.0.{layer}.{kind}": torch.ones(4) for layer in (0, 2, 4) for kind in ("weight", "bias")}
    return model, {**state(model), **heads}


@pytest.mark.parametrize(("path_type", "path"), [("linear", "linear"), ("cosine", "gvp")])
def test_repa_is_read_with_its_own_direction_of_time(make_model, tmp_path, caplog, path_type, path):
    model, tensors = repa(make_model)
    args = argparse.Namespace(path_type=path_type, prediction="v", num_classes=3)
    read_model = read(tmp_path / "a.pt", {"ema": tensors, "model": tensors, "args": args}, num_classes=None)
    assert is_same(read_model, model)  # neither reversed nor cut
    diffusion, provenance = read_model.config.diffusion, read_model.config.provenance
    assert (diffusion.path, diffusion.prediction, diffusion.network_times) == (path, "velocity", (0, 1))
    assert provenance.converted_from == "REPA checkpoint a.pt (ema)"
    assert provenance.not_converted == "heads of training (6 tensors: projectors)"
    assert "projectors" in caplog.text
    # REPA's velocity: the derivative of alpha x0 + sigma eps by its time, at that time.
    x, label = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    t = torch.tensor([0.25, 0.75], dtype=torch.float64)
    with torch.no_grad():
        velocity = model.network(x, t.float(), Condition(label=label))
        raw = read_model.network(x, read_model.diffusion.model_time(t), Condition(label=label))
    assert torch.equal(raw, velocity)
    prediction = read_model.diffusion.predict(raw, x, t)
    half_pi, at = np.pi / 2, t.view(-1, 1, 1, 1)
    rates = (-1, 1) if path == "linear" else (-half_pi * torch.sin(at * half_pi), half_pi * torch.cos(at * half_pi))
    expected = rates[0] * prediction.x0 + rates[1] * prediction.eps
    torch.testing.assert_close(expected.float(), velocity, rtol=0, atol=1e-5)


def test_bare_weights_of_repa_need_their_type(make_model, tmp_path):
    model, tensors = repa(make_model)
    assert "pass checkpoint_type='repa' (--checkpoint-type repa" in read_error(tmp_path / "a.pt", tensors)
    read_model = read(tmp_path / "a.pt", checkpoint_type="repa")
    assert is_same(read_model, model)
    assert read_model.config.diffusion.network_times == (0, 1)
    assert read(tmp_path / "a.pt", checkpoint_type="repa-cosine").config.diffusion.path == "gvp"


def test_another_prediction_of_repa_is_named(make_model, tmp_path):
    _, tensors = repa(make_model)
    stored = {"ema": tensors, "args": argparse.Namespace(path_type="linear", prediction="velocity")}
    assert "is a REPA that predicts the velocity; Tessera supports v" in read_error(tmp_path / "a.pt", stored)


# Damage


def damaged(tensors: dict, choose: random.Random):
    """A checkpoint with one fault, of the kinds that occur: names, shapes, types, containers."""
    name = choose.choice(sorted(tensors))
    tensor = tensors[name]
    values = [
        tensor.to(torch.int8), tensor.to("meta"), tensor[..., :0], tensor.flatten(), tensor[None], tensor.bool(),
        tensor.to(torch.complex64), torch.zeros(()), None, "text", [tensor], {"weight": tensor}, torch.zeros(2, 0, 3),
    ]  # fmt: skip
    names = ["", ".", "module", f"{name}.", f".{name}", "blocks.99999999999.attn.qkv.weight", "blocks..x", f"x.{name}"]
    args = [{"path_type": ["a"]}, {"num_classes": "many"}, {"prediction": 3, "path_type": "Linear"}, {1: 2}, {}]
    without = {key: value for key, value in tensors.items() if key != name}
    return choose.choice(
        [
            lambda: {**tensors, name: choose.choice(values)},
            lambda: {**without, choose.choice(names): tensor},
            lambda: {**tensors, choose.choice(names): tensor},
            lambda: {"model": tensors, "args": choose.choice(args)},
            lambda: {"ema": {**tensors, name: choose.choice(values)}, "model": tensors},
            lambda: without,
            lambda: {**prefixed("a.", tensors), **prefixed("a.a.", without)},
        ]
    )()


def test_a_damaged_checkpoint_is_an_error_that_names_it_or_is_read(model, tmp_path):
    """Never another exception, and never other weights; without a label table it is an unconditional network."""
    messages = []
    for seed in range(150):
        stored = damaged(state(model), random.Random(seed))
        try:
            read_model = read(tmp_path / "a.pt", stored, num_classes=None)
        except TesseraError as error:
            messages.append(str(error))
        else:
            assert is_same(read_model, model) or not read_model.config.network.num_classes, seed
    assert all("a.pt" in message for message in messages)
    assert 30 < len(messages) < 140


def test_what_averaged_weights_lack_is_named(model, tmp_path):
    part = {name: tensor for name, tensor in state(model).items() if not name.startswith("y_embedder")}
    provenance = read(tmp_path / "a.pt", {"ema": part, "model": state(model)}, num_classes=None).config.provenance
    assert provenance.not_converted == "what only model has: y_embedder.embedding_table.weight"
