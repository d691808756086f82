"""A U-Net wherever a DiT goes: learned, stopped, divided, watched, started from, drawn from; what is a DiT's alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tessera import bundle
from tessera.data import DigitsConfig
from tessera.errors import TesseraError
from tessera.evaluation.features import extractor
from tessera.generation import pipeline
from tessera.interop import load
from tessera.models.dit import DiTConfig
from tessera.models.unet import UNetConfig
from tessera.monitoring import doctor, health, report
from tessera.monitoring.logger import HEALTH, read_log
from tessera.settings import validate
from tessera.studies.tuning.tuner import Tuner, Tuning
from tessera.training import loop
from tessera.training.optimizers import MuonConfig, hidden_matrices
from tessera.training.recipe import read_recipe

pytest.importorskip("sklearn")
UNET = {"kind": "unet", "model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_levels": [2]}
RICH = ("training.micro_batch_size=16", "training.optimizer.grad_clip_norm=0.3", "training.optimizer.kind=muon")


def losses(run: Path) -> np.ndarray:
    return np.array([record["loss"] for record in read_log(run) if "loss" in record])


# In a recipe


def test_one_word_on_the_command_line_makes_it_a_unet(tmp_path):
    path = tmp_path / "digits.yaml"
    path.write_text("data: digits\nnetwork: {patch: 2, width: 32, depth: 2, heads: 2}\n")
    network = read_recipe(path, ["network.kind=unet", "network.hidden_size=16", "network.attention=2"]).network
    assert network == UNetConfig(model_channels=16, attention_levels=(2,))
    assert read_recipe(path, []).network == DiTConfig(patch_size=2, hidden_size=32, depth=2, num_heads=2)
    with pytest.raises(TesseraError, match=r"network: UNet-S/8-gmacs is a U-Net: say network\.kind=unet, too"):
        read_recipe(path, ["network.preset=UNet-S/8-gmacs"])
    path.write_text("data: digits\nnetwork: {preset: UNet-S/8-gmacs}\n")
    assert isinstance(read_recipe(path, []).network, UNetConfig)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("network.channel_mult=[1, 2, 2, 2, 2]", r"network is not valid:\n.*multiples of 16, and the size is 8 x 8"),
        ("sampling.caching=first-block", r"first-block caching .* this network is a diffusion U-Net: set caching=none"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_done(tiny, tmp_path, change, said):
    with pytest.raises(TesseraError, match=said):
        loop.train(tiny("run", change, network=UNET))
    assert not (tmp_path / "run").exists()


# Learned


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns(tiny, optimizer):
    changes = ("training.steps=60", f"training.optimizer.kind={optimizer}", "training.optimizer.learning_rate=0.01")
    found = losses(loop.train(tiny("run", *changes, "diffusion.variance=posterior", network=UNET)))
    assert found[-10:].mean() < 0.8 * found[:3].mean()


def test_stopped_and_gone_on_is_uninterrupted_bit_for_bit(tiny, state, monkeypatch):
    whole = loop.train(tiny("whole", *RICH, network=UNET))
    save = loop.save

    def stops(run, writer, place):
        save(run, writer, place)
        if place.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save", stops)
    changes = (*RICH, "training.checkpoint_every=2")
    with pytest.raises((KeyboardInterrupt, loop.Interrupted)):
        loop.train(tiny("parts", *changes, network=UNET))
    monkeypatch.setattr(loop, "save", save)
    assert state(loop.train(tiny("parts", *changes, network=UNET))) == state(whole)


def train(recipe) -> None:
    loop.train(recipe)


def test_two_processes_that_divide_the_weights_learn_the_same(processes, tiny, tmp_path, weights):
    changes = (*RICH, "training.activation_checkpointing=blocks")
    loop.train(tiny("alone", *changes, network=UNET))
    processes.together(2, train, tiny("two", *changes, "training.fsdp=all", network=UNET))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "alone"), rtol=1e-5)
    expected = weights(tmp_path / "alone")
    for name, tensor in weights(
        tmp_path / "two"
    ).items():  # which Muon makes of what little gradients zeros let through
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0.05 * float(expected[name].abs().max()))


def test_muon_trains_convolutions_as_the_matrices_they_are(make_model):
    """Against torch's own, of each channel by all that it looks at; neither steering nor what comes first and last."""
    network = make_model({"kind": "unet"}).network.requires_grad_(True)
    maps = hidden_matrices(network)
    assert maps["blocks.0.residual.conv1.weight"] == 1
    assert maps["blocks.2.attention.qkv.weight"] == 3
    assert not any("steering" in name or not name.startswith("blocks.") for name in maps)
    weight = network.get_parameter("blocks.0.residual.conv1.weight")
    theirs = nn.Parameter(weight.detach().clone().flatten(1))
    config = MuonConfig(learning_rate=0.01, momentum=0.9)
    muon = torch.optim.Muon(
        [theirs], lr=0.01, weight_decay=0, momentum=0.9, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    ours = config.build(network)
    for seed in range(2):
        for number, each in enumerate(network.parameters()):
            each.grad = torch.randn(each.shape, generator=torch.Generator().manual_seed(100 * seed + number))
        theirs.grad = weight.grad.flatten(1).clone()
        muon.step()
        ours.step()
    torch.testing.assert_close(weight.detach().flatten(1), theirs.detach(), rtol=0, atol=2e-3)


# Watched


def test_what_is_measured_inside(tiny):
    run = loop.train(tiny("run", "training.health_every=2", "diffusion.variance=posterior", network=UNET))
    record = read_log(run, HEALTH)[-1]
    model = bundle.load(bundle.checkpoints(run)[0])
    attends = [block.attention is not None for block in model.network.blocks]
    assert any(attends)
    assert [value is not None for value in record["attention_logits"]] == attends
    assert len(record["activations"]) == len(attends)
    assert "gates" not in record
    assert {health.group_of(name) for name in ("stem.weight", "final_layer.conv.weight")} == {"stem", "readout"}
    assert "largest attention logit" in doctor.page(run)
    assert report.write(run, None).exists()
    assert "# A diffusion U-Net" in bundle.card(model)


# Started from


def test_a_unet_starts_from_a_unet_and_not_from_a_dit(tiny, tmp_path, make_model):
    bundle.save(make_model({"kind": "unet"}), tmp_path / "unet")
    bundle.save(make_model(), tmp_path / "dit")
    start = f"training.init_from={tmp_path / 'unet'}"
    run = loop.train(tiny("on", start, "training.steps=1", "training.optimizer.learning_rate=1e-9", network=UNET))
    before, after = bundle.load(tmp_path / "unet"), bundle.load(bundle.checkpoints(run)[0])
    told = (run / "init.txt").read_text()
    assert "stem.weight" in told.partition("kept: ")[2].partition("\n")[0]
    assert "y_embedder.embedding_table.weight" in told.partition("anew: ")[2] or "resampled" in told
    for name, weight in before.network.state_dict().items():
        if not name.startswith("y_embedder"):
            torch.testing.assert_close(after.network.state_dict()[name], weight, rtol=0, atol=1e-6)
    with pytest.raises(TesseraError, match=r"dit: it is a diffusion transformer, .* network\.kind=dit"):
        loop.train(tiny("over", f"training.init_from={tmp_path / 'dit'}", network=UNET))
    with pytest.raises(TesseraError, match=r"unet: it is a diffusion U-Net, .* set network\.kind=unet, or leave"):
        loop.train(tiny("back", start))
    with pytest.raises(TesseraError, match=r"another architecture; width, multipliers, depth"):
        loop.train(tiny("wide", start, network={**UNET, "width": 16}))


# Drawn from


def test_it_is_saved_described_and_draws_what_it_drew(make_model, tmp_path):
    model = make_model({"kind": "unet"})
    bundle.save(model, tmp_path / "unet")
    again = load.load(tmp_path / "unet")
    assert again.config.network == model.config.network
    assert bundle.describe(again)["network"] == "U-Net, width 8 x (1, 2), depth 1, attention at 1/2"
    drawn = pipeline.generate(model, [0, 1, 2], [0, 1, 2], guidance=1.5)
    assert np.array_equal(pipeline.generate(again, [0, 1, 2], [0, 1, 2], guidance=1.5), drawn)
    alone = pipeline.generate(again, [1], [1], guidance=1.5)
    assert abs(alone[0].astype(int) - drawn[1]).max() <= 1
    assert pipeline.generate(model, [0], size=(12, 8)).shape == (1, 12, 8, 1)
    with pytest.raises(TesseraError, match="multiples of 2 pixels"):
        pipeline.generate(model, [0], size=(9, 8))


def test_a_configuration_without_a_kind_is_a_dit(make_model, tmp_path):
    model = make_model()
    bundle.save(model, tmp_path / "dit")
    path = tmp_path / "dit" / bundle.CONFIG
    told = json.loads(path.read_text())
    assert told["network"].pop("kind") == "dit"
    path.write_text(json.dumps(told))
    assert bundle.load(tmp_path / "dit").config.network == model.config.network


def test_what_is_a_dits_alone_is_refused(make_model, tmp_path):
    model = make_model({"kind": "unet"})
    with pytest.raises(TesseraError, match="set caching=none"):
        pipeline.generate(model, [0], caching={"kind": "first-block"})
    for to, target, place in (
        ("official", "unet.pt", "an official checkpoint"),
        ("diffusers", "folder", "a folder for diffusers' DiTPipeline"),
    ):
        with pytest.raises(TesseraError, match=f"{place} holds a DiT, and this model is a diffusion U-Net: convert to"):
            load.convert(model, tmp_path / target, to)
        assert not (tmp_path / target).exists()
    assert "a bundle, exact" in load.convert(model, tmp_path / "bundle", "bundle")
    with pytest.raises(TesseraError, match="diffusion U-Net, which has no one number of heads: leave heads out"):
        load.load(tmp_path / "bundle", heads=2)


def test_tuning_tries_no_caching(make_model, tmp_path):
    asked = validate(Tuning, {"search": ["caching"], "count": 50, "batch": 50, "budget": 60}, "the test")
    model, digits, said = make_model({"kind": "unet"}), extractor("digits", torch.device("cpu")), list[str]()
    tuner = Tuner(model, DigitsConfig(), digits, tmp_path / "tune", asked, ["steps=2"], said.append)
    assert tuner.run().trials == []
    assert not any("caching" in line for line in said)
