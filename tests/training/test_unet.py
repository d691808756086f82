"""A U-Net in place of a DiT: training, resumption, sharding, health, initialization, sampling; what only DiTs have."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tessera import bundle, generation, model_card
from tessera.data import DigitsConfig
from tessera.errors import TesseraError
from tessera.evaluation.features import load_extractor
from tessera.interop import load
from tessera.layers.modulation import Modulation
from tessera.models.dit import DiTConfig
from tessera.models.unet import UNetConfig
from tessera.monitoring import doctor, health, report
from tessera.monitoring.logger import HEALTH, read_log
from tessera.settings import validate
from tessera.studies.tuning.tuner import Tuner, TuningConfig
from tessera.training import loop
from tessera.training.optimizers import MuonConfig, hidden_matrices
from tessera.training.recipe import Recipe, read_recipe

pytest.importorskip("sklearn")
UNET = {"kind": "unet", "model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_levels": [2]}
RICH = ("training.micro_batch_size=16", "training.optimizer.grad_clip_norm=0.3", "training.optimizer.kind=muon")


def losses(run: Path) -> np.ndarray:
    return np.array([record["loss"] for record in read_log(run) if "loss" in record])


# In a recipe


def test_one_override_makes_the_network_a_unet(tmp_path):
    path = tmp_path / "digits.yaml"
    path.write_text("data: digits\nnetwork: {patch_size: 2, hidden_size: 32, depth: 2, num_heads: 2}\n")
    changes = ["network.kind=unet", "network.model_channels=16", "network.attention_levels=2"]
    assert read_recipe(path, changes).network == UNetConfig(model_channels=16, attention_levels=(2,))
    assert read_recipe(path, []).network == DiTConfig(patch_size=2, hidden_size=32, depth=2, num_heads=2)
    with pytest.raises(TesseraError, match=r"network: UNet-S/8-gmacs is a U-Net: set network\.kind=unet"):
        read_recipe(path, ["network.preset=UNet-S/8-gmacs"])
    path.write_text("data: digits\nnetwork: {preset: UNet-S/8-gmacs}\n")
    assert isinstance(read_recipe(path, []).network, UNetConfig)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("network.channel_mult=[1, 2, 2, 2, 2]", r"network is not valid:\n.*multiples of 16, and the size is 8 x 8"),
        ("sampling.caching=first-block", r"first-block caching .* this network is a diffusion U-Net: set caching=none"),
    ],
)
def test_an_invalid_setting_is_an_error_before_anything_is_written(tiny, tmp_path, change, message):
    with pytest.raises(TesseraError, match=message):
        loop.train(tiny("run", change, network=UNET))
    assert not (tmp_path / "run").exists()


# Training


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loss_decreases(tiny, optimizer):
    changes = ("training.steps=60", f"training.optimizer.kind={optimizer}", "training.optimizer.learning_rate=0.01")
    values = losses(loop.train(tiny("run", *changes, "diffusion.variance=posterior", network=UNET)))
    assert values[-10:].mean() < 0.8 * values[:3].mean()


def test_a_resumed_run_is_the_same_bit_for_bit(tiny, state, monkeypatch):
    whole = loop.train(tiny("whole", *RICH, network=UNET))
    save_checkpoint = loop.save_checkpoint

    def save_and_stop(run, writer, state):
        save_checkpoint(run, writer, state)
        if state.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", save_and_stop)
    changes = (*RICH, "training.checkpoint_every=2")
    with pytest.raises(KeyboardInterrupt):
        loop.train(tiny("parts", *changes, network=UNET))
    monkeypatch.setattr(loop, "save_checkpoint", save_checkpoint)
    assert state(loop.train(tiny("parts", *changes, network=UNET))) == state(whole)


def train(recipe) -> None:
    loop.train(recipe)


def test_two_ranks_that_shard_the_weights_train_the_same(processes, tiny, tmp_path, weights):
    changes = (*RICH, "training.activation_checkpointing=blocks")
    loop.train(tiny("alone", *changes, network=UNET))
    processes.together(2, train, tiny("two", *changes, "training.fsdp=full", network=UNET))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "alone"), rtol=1e-5)
    expected = weights(tmp_path / "alone")
    # The tolerance is for Muon, which scales up the small gradients behind zero-initialized layers.
    for name, tensor in weights(tmp_path / "two").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0.05 * float(expected[name].abs().max()))


def test_muon_trains_convolutions_as_matrices(make_model):
    """Against that of torch on the flattened kernels; modulation, stem and head are not trained by Muon."""
    network = make_model({"kind": "unet"}).network.requires_grad_(True)
    matrices = hidden_matrices(network)
    assert matrices["blocks.0.residual.conv1.weight"] == 1
    assert matrices["blocks.2.attention.qkv.weight"] == 3
    modulation = {f"{name}.linear.weight" for name, part in network.named_modules() if isinstance(part, Modulation)}
    assert modulation
    assert not modulation & matrices.keys()
    assert all(name.startswith("blocks.") for name in matrices)
    weight = network.get_parameter("blocks.0.residual.conv1.weight")
    reference = nn.Parameter(weight.detach().clone().flatten(1))
    config = MuonConfig(learning_rate=0.01, momentum=0.9)
    muon = torch.optim.Muon(
        [reference], lr=0.01, weight_decay=0, momentum=0.9, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    ours = config.build(network)
    for seed in range(2):
        for number, each in enumerate(network.parameters()):
            each.grad = torch.randn(each.shape, generator=torch.Generator().manual_seed(100 * seed + number))
        reference.grad = weight.grad.flatten(1).clone()
        muon.step()
        ours.step()
    torch.testing.assert_close(weight.detach().flatten(1), reference.detach(), rtol=0, atol=2e-3)


# Health


def test_the_health_records_of_a_unet(tiny):
    run = loop.train(tiny("run", "training.health_every=2", "diffusion.variance=posterior", network=UNET))
    record = read_log(run, HEALTH)[-1]
    model = bundle.load(bundle.checkpoints(run)[0])
    attends = [block.attention is not None for block in model.network.blocks]
    assert any(attends)
    assert [value is not None for value in record["attention_logits"]] == attends
    assert len(record["activations"]) == len(attends)
    assert "gates" not in record
    assert {health.parameter_group(name) for name in ("stem.weight", "final_layer.conv.weight")} == {"stem", "head"}
    assert "largest attention logit" in doctor.as_text(run)
    assert report.write(run, Recipe).exists()
    assert "diffusion U-Net" in model_card.render(model)


# Initial weights from another model


def test_a_unet_starts_from_a_unet_and_not_from_a_dit(tiny, tmp_path, make_model):
    bundle.save(make_model({"kind": "unet"}), tmp_path / "unet")
    bundle.save(make_model(), tmp_path / "dit")
    start = f"training.init_from={tmp_path / 'unet'}"
    run = loop.train(tiny("on", start, "training.steps=1", "training.optimizer.learning_rate=1e-9", network=UNET))
    before, after = bundle.load(tmp_path / "unet"), bundle.load(bundle.checkpoints(run)[0])
    text = (run / "init_report.txt").read_text()
    assert "stem.weight" in text.partition("copied: ")[2].partition("\n")[0]
    assert "y_embedder.embedding_table.weight" in text.partition("initialized: ")[2] or "resampled" in text
    for name, weight in before.network.state_dict().items():
        if not name.startswith("y_embedder"):
            torch.testing.assert_close(after.network.state_dict()[name], weight, rtol=0, atol=1e-6)
    with pytest.raises(TesseraError, match=r"dit: it is a diffusion transformer, .* network\.kind=dit"):
        loop.train(tiny("over", f"training.init_from={tmp_path / 'dit'}", network=UNET))
    with pytest.raises(TesseraError, match=r"unet: it is a diffusion U-Net, .* set network\.kind=unet, or leave"):
        loop.train(tiny("back", start))
    with pytest.raises(TesseraError, match=r"another architecture; model_channels, channel_mult"):
        loop.train(tiny("wide", start, network={**UNET, "model_channels": 16}))


# Sampling


def test_a_saved_unet_samples_the_same_images(make_model, tmp_path):
    model = make_model({"kind": "unet"})
    bundle.save(model, tmp_path / "unet")
    loaded = load.load(tmp_path / "unet")
    assert loaded.config.network == model.config.network
    assert model_card.describe(loaded)["network"] == "U-Net, width 8 x (1, 2), depth 1, attention at 1/2"
    samples = generation.generate(model, [0, 1, 2], [0, 1, 2], guidance_scale=1.5)
    assert np.array_equal(generation.generate(loaded, [0, 1, 2], [0, 1, 2], guidance_scale=1.5), samples)
    alone = generation.generate(loaded, [1], [1], guidance_scale=1.5)
    assert abs(alone[0].astype(int) - samples[1]).max() <= 1
    assert generation.generate(model, [0], size=(12, 8)).shape == (1, 12, 8, 1)
    with pytest.raises(TesseraError, match="multiples of 2 pixels"):
        generation.generate(model, [0], size=(9, 8))


def test_a_configuration_without_a_kind_is_a_dit(make_model, tmp_path):
    model = make_model()
    bundle.save(model, tmp_path / "dit")
    path = tmp_path / "dit" / bundle.CONFIG
    config = json.loads(path.read_text())
    assert config["network"].pop("kind") == "dit"
    path.write_text(json.dumps(config))
    assert bundle.load(tmp_path / "dit").config.network == model.config.network


def test_features_of_dits_only_are_errors(make_model, tmp_path):
    model = make_model({"kind": "unet"})
    with pytest.raises(TesseraError, match="set caching=none"):
        generation.generate(model, [0], caching={"kind": "first-block"})
    for to, target, name in (
        ("official", "unet.pt", "an official checkpoint"),
        ("diffusers", "folder", "a folder of diffusers' DiTPipeline"),
    ):
        with pytest.raises(TesseraError, match=f"{name} holds a DiT, and this model is a diffusion U-Net"):
            load.convert(model, tmp_path / target, to)
        assert not (tmp_path / target).exists()
    assert "a bundle, exact" in load.convert(model, tmp_path / "bundle", "bundle")
    with pytest.raises(TesseraError, match="diffusion U-Net, which has no num_heads: leave it out"):
        load.load(tmp_path / "bundle", num_heads=2)


def test_tuning_does_not_try_caching(make_model, tmp_path):
    config = validate(
        TuningConfig, {"search": ["caching"], "num_samples": 50, "batch_size": 50, "budget": 60}, "the test"
    )
    model, extractor, output = make_model({"kind": "unet"}), load_extractor("digits", torch.device("cpu")), list[str]()
    tuner = Tuner(model, DigitsConfig(), extractor, tmp_path / "tune", config, ["num_steps=2"], output.append)
    assert tuner.run().trials == []
    assert not any("caching" in line for line in output)
