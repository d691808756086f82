"""PixArt against numbers of the official networks (PixArt-alpha cac2fd3, PixArt-sigma 1ce521a) and of the papers.

The weights are a function of their official names; the .npz files hold inputs, outputs and the configuration.
"""

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tessera import generation
from tessera.bundle import BundleConfig, Model
from tessera.conditioning import Condition
from tessera.diffusion import GaussianDiffusionConfig
from tessera.errors import TesseraError
from tessera.models import PixArt, PixArtConfig, parameter_count
from tessera.sampling import Denoiser

FILES = ["alpha", "alpha_ms", "sigma"]


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight of an official name."""
    numbers = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode()))).standard_normal(shape)
    if name.endswith(("attn.norm.weight", "attn.q_norm.weight", "attn.k_norm.weight")):
        return torch.from_numpy((1 + 0.06 * numbers).astype(np.float32))
    scale = 0.2 if name.endswith("y_embedding") else 0.06
    return torch.from_numpy((scale * numbers).astype(np.float32))


def official_name(name: str) -> str:
    name = name.replace("shared.adaLN_modulation", "t_block")
    return name.replace("adaLN_modulation.table", "scale_shift_table")


def build(config: dict[str, Any], with_sizes: bool) -> PixArt:
    """A network of an official configuration with the weights of its names."""
    compression = config.get("kv_compress_config") or {"sampling": None, "kv_compress_layer": []}
    kind = {"conv": "conv", "uniform": "uniform", "uniform_every": "every", None: "conv"}[compression["sampling"]]
    block = {"kind": "pixart", "qk_norm": config.get("qk_norm", False), "compression": kind}
    network = PixArtConfig(
        **{
            name: config[name]
            for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads")
        },
        out_channels=8,
        block={**block, "compressed_layers": tuple(compression["kv_compress_layer"])},
        text_channels=config["caption_channels"],
        text_tokens=config["model_max_length"],
        position_base=config["input_size"] // config["patch_size"],
        position_scale=config.get("lewei_scale", config.get("pe_interpolation", 1.0)),
        size_conditions=with_sizes,
    ).build()
    state = {name: weight(official_name(name), tuple(each.shape)) for name, each in network.state_dict().items()}
    network.load_state_dict(state)
    return network.eval()


class Golden:
    def __init__(self, name: str) -> None:
        self.arrays = np.load(Path(__file__).parent / f"pixart_{name}_tiny.npz")
        self.config = json.loads(str(self.arrays["config"]))
        self.variants = json.loads(str(self.arrays["variants"])) if "variants" in self.arrays else {"forward": {}}
        self.multiscale = json.loads(str(self.arrays["cls"])) == "PixArtMS"

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def network(self, variant: str = "forward") -> PixArt:
        config = self.config | self.variants[variant]
        return build(config, self.multiscale and config.get("micro_condition", "lewei_scale" in config))

    def condition(self, network: PixArt) -> Condition:
        sizes = None
        if network.config.size_conditions:
            sizes = torch.cat((self["img_hw"], self["aspect_ratio"]), dim=1)
        return Condition(text=self["y"][:, 0], text_mask=self["mask"].bool(), size=sizes)


@pytest.fixture(params=FILES)
def golden(request) -> Golden:
    return Golden(request.param)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


VARIANTS = [(name, variant) for name in FILES for variant in Golden(name).variants]


@torch.no_grad()
@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_the_forward_pass_is_the_official_one(name, variant):
    golden = Golden(name)
    network = golden.network(variant)
    got = network(golden["x"], golden["t"].float(), golden.condition(network))
    assert error(got, golden[variant]) < 1e-5


@torch.no_grad()
def test_masks_null_captions_and_positions(golden):
    network = golden.network()
    x, t, condition = golden["x"], golden["t"].float(), golden.condition(network)
    assert error(network(x, t, replace(condition, text_mask=None)), golden["forward_nomask"]) < 1e-5
    assert error(network(x, t, condition.null()), golden["forward_null"]) < 1e-5
    dropped = condition.drop(golden["drop"].bool(), network.config.null_fields)
    assert error(network(x, t, dropped), golden["forward_drop"]) < 1e-5
    assert error(network.y_embedder(condition.text), golden["caption"][:, 0]) < 1e-5
    side = network.config.position_base
    assert torch.equal(network.positions((side, side)), golden["pos_embed"][0])
    if golden.multiscale:
        assert torch.equal(network.positions(network.grid(x)), golden["positions"][0])


@torch.no_grad()
def test_guidance_is_the_official_one(golden):
    """Three channels of four, with the prompt's mask for the null caption; of alpha's multi-scale network by hand."""
    network, diffusion = golden.network(), GaussianDiffusionConfig().build()
    x, t = golden["x"], (golden["t"] + 1) / 1000  # step i of n is time (i + 1) / n
    denoise = Denoiser(network, diffusion, golden.condition(network), float(golden["cfg_scale"]), 3)
    expected = golden["cfg_masked" if "cfg_masked" in golden.arrays else "cfg"][: len(x)]
    assert error(denoise.raw(x, t)[:, :3], expected[:, :3]) < 1e-5
    all_channels = Denoiser(network, diffusion, golden.condition(network), float(golden["cfg_scale"]))
    assert error(all_channels.raw(x, t)[:, :4], golden["dpm"]) < 1e-5


@torch.no_grad()
def test_masked_text_changes_no_bit(golden):
    """Neither other numbers in masked tokens nor more padding."""
    network = golden.network()
    x, t, condition = golden["x"], golden["t"].float(), golden.condition(network)
    expected = network(x, t, condition)
    noise = torch.where(condition.text_mask[..., None], condition.text, torch.randn(condition.text.shape))
    assert torch.equal(network(x, t, replace(condition, text=noise)), expected)


@pytest.mark.parametrize(
    ("changes", "parameters", "gmacs"),
    [
        ({"input_size": 32, "position_base": 16}, 610_856_096, 149.1),
        ({"input_size": 64}, 610_856_096, 618.0),
        ({"input_size": 128, "size_conditions": True}, 611_349_152, 3254.8),
        ({"input_size": 32, "position_base": 16, "text_tokens": 300}, 610_856_096, 166.5),
        ({"block": {"kind": "pixart", "compressed_layers": tuple(range(14, 28))}}, 610_968_992, None),
    ],
)
def test_parameters_and_macs_of_the_published_networks(changes, parameters, gmacs):
    with torch.device("meta"):
        network = PixArtConfig(**changes).build()
    assert sum(each.numel() for each in network.parameters()) == parameters == parameter_count(network)
    if gmacs is not None:
        assert network.macs() / 1e9 == pytest.approx(gmacs, abs=0.05)


@pytest.mark.parametrize(
    "block", [{}, {"compressed_layers": (1,)}, {"compressed_layers": (0,), "compression": "every"}]
)
@pytest.mark.parametrize("sizes", [False, True])
def test_macs_match_pytorchs_counter(block, sizes):
    config = PixArtConfig(
        input_size=8, depth=2, hidden_size=96, num_heads=4, text_channels=32, text_tokens=6, size_conditions=sizes,
        block={"kind": "pixart", **block},
    )  # fmt: skip
    with torch.device("meta"):
        network = config.build()
        condition = config.condition_type.example(config.condition_fields, 1, config).to("meta")
        x, t = torch.empty(1, 4, 8, 8), torch.empty(1)
    with FlopCounterMode(display=False) as counter:
        network(x, t, condition)
    assert network.macs() == counter.get_total_flops() // 2


def small_model(**changes: Any) -> Model:
    settings = {
        "input_size": 8, "in_channels": 1, "out_channels": 1, "depth": 2, "hidden_size": 48, "num_heads": 4,
        "text_channels": 8, "text_tokens": 6, "position_base": 4, **changes,
    }  # fmt: skip
    network = PixArtConfig(**settings)
    config = BundleConfig(
        network=network, diffusion={"kind": "flow"}, codec={"kind": "pixels", "channels": 1},
        sampling={"num_steps": 4, "sampler": "ddim", "guidance_scale": 2.0},
    )  # fmt: skip
    torch.manual_seed(0)
    built = network.build().eval()
    with torch.no_grad():
        built.final_layer.linear.weight.normal_(std=0.1)
        for block in built.blocks:
            block.cross_attn.proj.weight.normal_(std=0.3)
    return Model(config, built)


def test_images_of_texts_of_different_lengths_do_not_depend_on_their_batch():
    model, random = small_model(), np.random.default_rng(0)
    texts = [random.standard_normal((length, 8)) for length in (2, 5, 3)]
    masks = [np.ones(length, bool) for length in (2, 5, 3)]
    condition = {"text": texts, "text_mask": masks}
    images = generation.generate(model, seeds=[1, 2, 3], condition=condition)
    assert (images[0] != images[1]).any()
    for row in range(3):
        one = {"text": texts[row : row + 1], "text_mask": masks[row : row + 1]}
        alone = generation.generate(model, seeds=[row + 1], condition=one)
        assert np.abs(alone[0].astype(int) - images[row].astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ({}, "this model needs prompts: one for each image"),
        ({"text": []}, "nothing to generate"),
        ({"text": ["a cat", np.ones((2, 8))]}, "some texts are prompts"),
        ({"text": [np.ones((2, 9))], "text_mask": [[1, 1]]}, r"\[M, 8\] with M at least 1; got \[2, 9\]"),
        ({"text": [np.ones((0, 8))], "text_mask": [[1]]}, r"got \[0, 8\]"),
        ({"text": [np.ones((2, 8))], "text_mask": [[0, 0]]}, "with a valid token"),
        (
            {"text": [np.ones((2, 8))], "text_mask": [[1, 1]], "label": [3]},
            "conditioned on prompts, text_mask: leave out classes",
        ),
    ],
)
def test_wrong_texts(condition, words):
    with pytest.raises(TesseraError, match=words):
        generation.generate(small_model(), condition=condition)


def test_the_size_condition_is_that_of_the_image():
    model = small_model(size_conditions=True)
    text = {"text": np.random.default_rng(0).standard_normal((1, 3, 8))}

    def image(condition=None, **options):
        given = {} if condition is None else {"size": [condition]}
        return generation.generate(model, seeds=[1], condition={**text, **given}, **options)

    assert np.array_equal(image(), image((8, 8)))
    assert np.array_equal(image(size=(8, 16)), image((8, 16, 0.5), size=(8, 16)))
    assert (image() != image((800, 8))).any()
    start = np.zeros((8, 16, 1), np.uint8)
    assert np.array_equal(image(init_image=start), image((8, 16), init_image=start))
