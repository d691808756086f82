"""Recipes of clip networks: from a model of images, with temporal layers alone, and with every mode."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tessera import bundle, generation
from tessera.conditioning import Condition
from tessera.errors import TesseraError
from tessera.training import loop
from tessera.training.run import build_run

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "data/clip_files.py")))
BASE = ("training.steps=2", "training.global_batch_size=8", "training.ema.decay=0")


@pytest.fixture
def data(tmp_path):
    """Data of images, and of clips with the same classes."""
    for number in range(8):
        made.clip(tmp_path / f"data/{'up' if number % 2 else 'down'}/{number}.gif", 4)
    common = {"kind": "files", "size": 8, "channels": 1}
    images = {"path": str(tmp_path / "data"), **common, "frames": 1}
    return images, {"path": str(tmp_path / "data"), **common, "frames": 4}


def newest(run) -> bundle.Model:
    return bundle.load(bundle.checkpoints(run)[0])


@pytest.fixture
def trained(tiny, data):
    """A run on images of the classes up and down, whose weights are not those of a new network."""
    run = loop.train(tiny("images", *BASE, "training.optimizer.learning_rate=0.05", data=data[0]))
    return run


@pytest.mark.run
@pytest.mark.parametrize("attention", ["full", "alternating", "causal", "previous"])
def test_a_clip_network_starts_from_an_image_network(tiny, trained, data, attention):
    """Exact on images; then it trains and resumes with times of frames."""
    settings = (f"training.init_from={trained}", f"network.attention={attention}", "training.frame_times=mixed")
    recipe = tiny("clips", *BASE, *settings, data=data[1])
    source, network = newest(trained), build_run(recipe).state.network
    assert network.config.input_size == (4, 8, 8)
    x, t, condition = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 12.0]), Condition(torch.tensor([0, 1]))
    with torch.no_grad():
        assert torch.equal(network(x[:, :, None], t, condition)[:, :, 0], source.network(x, t, condition))
    model = newest(loop.train(recipe))
    assert model.config.network.model_dump()["attention"]["kind"] == attention
    assert generation.generate(model, [0], num_steps=2).shape == (1, 4, 8, 8, 1)
    again = tiny("again", *BASE, f"training.init_from={recipe.run_dir}", "network.attention=window", data=data[1])
    weights, new = model.network.state_dict(), build_run(again).state.network.state_dict()
    assert all(torch.equal(weights[name], new[name]) for name in weights)


@pytest.mark.run
def test_temporal_layers_alone_are_trained(tiny, trained, data, whole_state):
    """Each frame begins as the image model; its weights stay, through a resumed run, too."""
    network = "network={attention: spatial, temporal_attention: true, frame_positions: temporal}"
    settings = (f"training.init_from={trained}", network, "training.trainable=temporal")
    recipe = tiny("clips", *BASE, *settings, data=data[1])
    source, network = newest(trained), build_run(recipe).state.network.eval()
    x, t, condition = torch.randn(2, 1, 4, 8, 8), torch.tensor([3.0, 12.0]), Condition(torch.tensor([0, 1]))
    with torch.no_grad():
        clip = network(x, t, condition)
        for frame in range(4):
            torch.testing.assert_close(clip[:, :, frame], source.network(x[:, :, frame], t, condition))
    loop.train(recipe)
    resumed = tiny("clips", *BASE, *settings, "training.steps=4", data=data[1])
    once = tiny("once", *BASE, *settings, "training.steps=4", data=data[1])
    result, expected = newest(loop.train(resumed)), newest(loop.train(once))
    before = source.network.state_dict()
    for name, weight in result.network.state_dict().items():
        assert torch.equal(weight, expected.network.state_dict()[name])
        assert (".temporal." in name) or torch.equal(weight, before[name])
    trained_names = [name for name in result.network.state_dict() if ".temporal.attn.proj.weight" in name]
    assert all(result.network.state_dict()[name].any() for name in trained_names)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((), "trains new layers of a trained model: set training.init_from"),
        (("training.init_from=RUN",), "needs network.temporal_attention=true"),
        (("training.init_from=RUN", "network.temporal_attention=true", "data.channels=3"), "other weights, such as"),
    ],
)
def test_impossible_recipes_of_temporal_layers(tiny, trained, data, settings, message):
    words = [word.replace("RUN", str(trained)) for word in settings]
    with pytest.raises(TesseraError, match=message):
        build_run(tiny("clips", *BASE, *words, "training.trainable=temporal", data=data[1]))
