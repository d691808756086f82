"""Latte against arrays that the official code computed, and its checkpoints there and back.

`config` holds the settings of the network. Each weight is generated from its name, so that both codes use equal
weights. The official code has frames before channels.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tessera import generation
from tessera.codecs import PixelsConfig
from tessera.conditioning import Condition
from tessera.errors import TesseraError
from tessera.interop import load
from tessera.interop.common import relative_difference
from tessera.layers.frames import Alternating
from tessera.models import DiTConfig, LatteConfig, parameter_count
from tessera.sampling import Denoiser
from tessera.training.initialization import init_from

GOLDEN = np.load(Path(__file__).with_name("latte_tiny.npz"))
CONFIG = json.loads(str(GOLDEN["config"]))


def fill(shape: tuple[int, ...], name: str, scale: float) -> Tensor:
    generator = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode())))
    return torch.from_numpy((scale * generator.standard_normal(shape)).astype(np.float32))


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def frames_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


@torch.no_grad()
def state(classes: bool) -> dict[str, Tensor]:
    """The official state dict: names and shapes are those of our network, values follow from the names."""
    config = LatteConfig(
        input_size=(CONFIG["num_frames"], CONFIG["input_size"], CONFIG["input_size"]),
        num_classes=CONFIG["num_classes"] if classes else 0,
        hidden_size=CONFIG["hidden_size"], depth=CONFIG["depth"], num_heads=CONFIG["num_heads"],
    )  # fmt: skip
    tensors = {}
    for name, parameter in config.build().state_dict().items():
        scale = 0.2 if name == "y_embedder.embedding_table.weight" else 0.06
        stored = name in ("pos_embed", "temp_embed")
        tensors[name] = golden(name) if stored else fill(tuple(parameter.shape), name, scale)
    return tensors


@pytest.fixture(scope="module", params=[True, False], ids=["classes", "unconditional"])
def checkpoint(request, tmp_path_factory):
    """The file and the model that it is read as."""
    path = tmp_path_factory.mktemp("latte") / "latte.pt"
    torch.save({"ema": state(request.param), "args": {}}, path)
    return path, load.load(path, "cpu", num_heads=CONFIG["num_heads"]), request.param


def check(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).norm() / expected.norm()) < 1e-5


@torch.no_grad()
def test_forward(checkpoint):
    _, model, classes = checkpoint
    x, t = frames_first(golden("x")), golden("t").float()
    if not classes:
        check(frames_first(model.network(x, t, Condition())), golden("forward_uncond"))
        return
    check(frames_first(model.network(x, t, Condition(golden("y")))), golden("forward"))
    null = Condition(golden("y")).null()
    check(frames_first(model.network(x, t, null)), golden("forward_null"))


@torch.no_grad()
def test_guidance_is_on_four_channels(checkpoint):
    """The conditional half; the variance of each half is its own there."""
    _, model, classes = checkpoint
    if not classes:
        return
    assert model.config.sampling.guidance_channels == "all"
    assert model.config.sampling.guidance_scale == golden("cfg_scale")
    denoiser = Denoiser(model.network, model.diffusion, Condition(golden("y")), float(golden("cfg_scale")))
    raw = denoiser.raw(frames_first(golden("x")), (golden("t") + 1) / 1000)
    check(frames_first(raw), golden("cfg")[:2])


def test_there_and_back(checkpoint, tmp_path):
    path, model, classes = checkpoint
    network = model.config.network
    assert (network.kind, network.input_size) == ("latte", (5, 8, 8))
    assert (network.num_classes, model.config.provenance.assumed) == (7 if classes else 0, None)
    target = tmp_path / "written.pt"
    load.convert(model, target, "official")
    written, expected = torch.load(target), state(classes)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    load.convert(path, tmp_path / "bundle", "bundle", num_heads=CONFIG["num_heads"])
    assert relative_difference(load.load(tmp_path / "bundle", "cpu").network, model.network) == 0


@pytest.mark.parametrize("frames", [5, 3])
def test_training_starts_from_it(checkpoint, frames):
    """Clips of fewer frames have the first positions."""
    _, model, classes = checkpoint
    settings = {**model.config.network.model_dump(), "input_size": (frames, 8, 8)}
    network = LatteConfig.model_validate(settings).build()
    report = init_from(network, ("a",) * 7 if classes else (), model, "latte")
    assert report["initialized"] == []
    torch.testing.assert_close(network.temp_embed, model.network.temp_embed[:, :frames])
    x, t = torch.randn(2, 4, frames, 8, 8), torch.tensor([3.0, 500.0])
    condition = Condition(torch.tensor([1, 6]) if classes else None)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(x, t, condition), model.network(x, t, condition))


def test_sampling(checkpoint):
    _, model, classes = checkpoint
    model = type(model)(
        model.config.model_copy(update={"codec": PixelsConfig.model_construct(channels=4)}), model.network
    )
    labels = [3] if classes else None
    clip = generation.generate(model, labels, [1], num_steps=2, size=(4, 8, 8))
    assert clip.shape == (1, 4, 8, 8, 4)
    for size in ((6, 8, 8), (1, 8, 8), (8, 8)):
        with pytest.raises(TesseraError, match="positions for clips of 2 to 5 frames"):
            generation.generate(model, labels, size=size)
    long = generation.generate(model, labels, [1], num_steps=2, size=(5, 8, 8), caching="first-block")
    assert long.shape == (1, 5, 8, 8, 4)


@pytest.mark.parametrize(
    ("preset", "trainable"), [("XL/2", 673.68), ("L/2", 456.82), ("B/2", 129.55), ("S/2", 32.48)]
)  # fmt: skip
def test_parameter_counts_of_the_published_networks(preset, trainable):
    """In millions, unconditional; the two frozen tables of XL/2 have 0.31M."""
    settings = {"preset": f"DiT-{preset}", "input_size": (16, 32, 32), "num_classes": 0}
    with torch.device("meta"):
        network = LatteConfig.model_validate(settings).build()
    count = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    assert round(count / 1e6, 2) == trainable
    if preset == "XL/2":
        assert round((parameter_count(network) - count) / 1e6, 2) == 0.31
        # The linear layers alone are the published 5572.69 / 3 GFLOPs, with modulation computed for each frame in
        # spatial blocks, and for each place in temporal blocks: here it is computed once for a clip.
        attention = sum(
            2 * 4096 * mode.keys((16, 16, 16)) * 1152
            for mode in (network.config.attention.for_block(number) for number in range(28))
        )
        repeated = (14 * (16 + 256 - 2) * 6 + 15 * 2) * 1152**2
        assert (network.macs() - attention + repeated) / 1e9 == pytest.approx(5572.69 / 3, rel=5e-4)
        assert attention / 1e9 == pytest.approx(36, rel=0.01)


def test_it_is_the_dit_with_alternating_attention_but_for_the_positions_of_frames():
    settings = {"input_size": (4, 4, 4), "hidden_size": 32, "depth": 4, "num_heads": 2, "num_classes": 3}
    latte, dit = LatteConfig(**settings).build(), DiTConfig(**settings, attention=Alternating()).build()
    assert set(latte.state_dict()) - set(dit.state_dict()) == {"temp_embed"}
    assert latte.config.grid == dit.config.grid


@pytest.mark.parametrize(
    ("options", "message"),
    [({"checkpoint_type": "sit"}, "is a Latte, not a sit"), ({}, "pass num_heads")],
)
def test_errors(tmp_path, options, message):
    torch.save(state(True), tmp_path / "latte.pt")
    options = {"num_heads": 4, **options} if options else {}
    with pytest.raises(TesseraError, match=message):
        load.load(tmp_path / "latte.pt", "cpu", **options)


def test_the_network_of_text_in_the_code_for_classes(tmp_path):
    tensors = {**state(False), "text_embedding_projection.1.weight": torch.zeros(2, 2)}
    torch.save(tensors, tmp_path / "latte.pt")
    with pytest.raises(TesseraError, match="whose last layer ignores the text"):
        load.load(tmp_path / "latte.pt", "cpu", num_heads=4)


def test_a_latte_of_images():
    with pytest.raises(ValueError, match="attention alternating needs a network for clips"):
        LatteConfig(input_size=(8, 8))
