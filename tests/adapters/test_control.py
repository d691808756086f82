"""Control by images: exact where there is no image, and the same numbers as extra input channels, merged weights and
joint passes where there is one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tessera
from tessera import adapters
from tessera.adapters import ControlConfig
from tessera.conditioning import Condition
from tessera.conditioning.control import Blocks, Edges, Grey, LowResolution, Mask, Paired
from tessera.data.control import control_images
from tessera.data.files import FilesConfig
from tessera.data.loader import Loader
from tessera.data.shapes import ShapesConfig
from tessera.diffusion import FlowMatchingConfig
from tessera.errors import TesseraError
from tessera.generation import ContinuousSampler, ControlInput, SampleRequest
from tessera.model import AdapterInfo, BundleConfig, Model
from tessera.models import DiTConfig, UNetConfig
from tessera.models.blocks import Context
from tessera.models.dit import DiT
from tessera.models.pixart import PixArtConfig
from tessera.settings import validate

HOW = ("channels", "copy", "tokens", "prompt")
SIZES = {"input_size": (8, 8), "in_channels": 3, "out_channels": 3, "patch_size": 2, "depth": 4, "hidden_size": 32}
SIZES |= {"num_heads": 4}
TIMES = torch.tensor([1.0, 500.0, 900.0])


def text_network(kind: str) -> DiTConfig:
    block = {"kind": "rope-swiglu", "text": kind}
    return validate(DiTConfig, {**SIZES, "num_classes": 0, "vocabulary_size": 9, "text_tokens": 5, "block": block}, "")


def network_config(name: str) -> DiTConfig:
    if name == "pixart":
        return PixArtConfig(**{**SIZES, "text_channels": 8, "text_tokens": 5})
    if name.startswith("text-"):
        return text_network(name.removeprefix("text-"))
    return validate(DiTConfig, {**SIZES, "num_classes": 4, "block": name}, "")


DESIGNS = ("in-context", "cross-attention", "adaln", "adaln-zero", "adaln-single", "rope-swiglu")
DESIGNS += ("text-keys", "text-cross", "text-sequence", "pixart")


def config_of(how: str) -> ControlConfig:
    return ControlConfig(how=how) if how in ("copy", "prompt") else ControlConfig(how=how, rank=4)


def randomize(network: torch.nn.Module, part: str = "", std: float = 0.1) -> None:
    """Random values for all weights whose names have a part."""
    for name, parameter in network.named_parameters():
        if part in name and (parameter.requires_grad or part):
            torch.nn.init.normal_(parameter, std=std)


def build(name: str) -> tuple[DiT, Condition]:
    """A network with random weights, and a condition of three rows."""
    torch.manual_seed(0)
    config = network_config(name)
    network = config.build()
    randomize(network)
    condition = Condition.example(config.condition_fields, 3, config)
    if condition.text is not None and condition.text.is_floating_point():
        condition = replace(condition, text=torch.randn_like(condition.text))
    return network.eval().requires_grad_(False), condition


def image() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def control(count: int = 1) -> Tensor:
    return torch.randn(3, count, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("how", HOW)
def test_without_an_image_the_network_is_its_base_bit_for_bit(name: str, how: str) -> None:
    network, condition = build(name)
    base = network(image(), TIMES, condition)
    controlled = replace(condition, control=control())
    adapters.attach(network, "edges", config_of(how).layers(network, ()))
    assert torch.equal(network(image(), TIMES, controlled), base)  # a new control

    randomize(network, "adapters")
    output = network(image(), TIMES, controlled)
    assert not torch.isclose(output, base).all()
    assert torch.equal(network(image(), TIMES, condition), base)
    partly = control()
    partly[1] = torch.nan
    mixed = network(image(), TIMES, replace(condition, control=partly))
    assert torch.equal(mixed[1], base[1])
    assert torch.equal(mixed[::2], output[::2])
    off = replace(controlled, control_strength=torch.zeros(3, 1))
    assert torch.equal(network(image(), TIMES, off), base)
    adapters.set_strengths(network, {"edges": 0.0})
    assert torch.equal(network(image(), TIMES, controlled), base)
    adapters.detach(network)
    assert torch.equal(network(image(), TIMES, condition), base)


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("how", HOW)
def test_prepared_and_stored_controls_give_the_same_output(name: str, how: str) -> None:
    network, condition = build(name)
    adapters.attach(network, "edges", config_of(how).layers(network, ()))
    randomize(network, "adapters")
    controlled = replace(condition, control=control())
    output = network(image(), TIMES, controlled)
    torch.testing.assert_close(network(image(), TIMES, network.prepare(controlled)), output, rtol=1e-5, atol=1e-5)
    assert list(adapters.build_like(network).state_dict()) == list(network.state_dict())

    state = adapters.adapter_state(network, "edges")
    assert not any("adapters" in key for key in state)
    assert adapters.base_state(network).keys() == network_config(name).build().state_dict().keys()
    adapters.detach(network)
    adapters.attach(network, "other", adapters.layers_from_state(network, state, "a file"))
    assert torch.equal(network(image(), TIMES, controlled), output)


def test_channels_are_extra_input_channels() -> None:
    network, condition = build("adaln-zero")
    adapters.attach(network, "edges", ControlConfig(how="channels", rank=0).layers(network, ()))
    randomize(network, "adapters")
    config = network.config.model_copy(update={"in_channels": 6})
    wide = config.build()
    state = adapters.base_state(network)
    weight = adapters.adapter_state(network, "edges")["channels.weight"]  # [D, p p C] -> [D, C, p, p]
    extra = weight.unflatten(1, (2, 2, 3)).permute(0, 3, 1, 2)
    state["x_embedder.proj.weight"] = torch.cat((state["x_embedder.proj.weight"], extra), dim=1)
    wide.load_state_dict(state)
    expected = wide.eval()(torch.cat((image(), control()[:, 0]), dim=1), TIMES, condition)
    torch.testing.assert_close(network(image(), TIMES, replace(condition, control=control())), expected)


def test_copies_are_wired_as_in_pixart_delta() -> None:
    """Copy i reads copy i - 1, the first one block 0 and the image; its map is added before block i + 1."""
    network, condition = build("pixart")
    layers = ControlConfig(how="copy", copies=2).layers(network, ())
    adapters.attach(network, "edges", layers)
    randomize(network, "adapters")
    copies = network.controls["edges"]
    tokens, context = network.embed(image(), TIMES, condition)
    tokens = network.blocks[0](tokens, context)
    side = tokens + copies.before_proj(network.embed_image(control()[:, 0]))
    for number in range(1, 4):
        if number <= 2:
            side = copies.blocks[number - 1](side, context)
            tokens = tokens + copies.after_proj[number - 1](side)
        tokens = network.blocks[number](tokens, context)
    expected = network.head(tokens, context)
    torch.testing.assert_close(network(image(), TIMES, replace(condition, control=control())), expected)


def test_the_copies_of_pixart_xl_have_294_917_760_weights() -> None:
    with torch.device("meta"):
        network = PixArtConfig().build()
        copies = ControlConfig(how="copy").layers(network, ())[""]["copy"]
    assert sum(parameter.numel() for parameter in copies.parameters()) == 294_917_760


def test_the_tokens_of_an_image_are_those_of_the_network_with_merged_weights() -> None:
    """With merged low-rank changes, a forward pass of the image at t = 0 gives the keys and values."""
    network, condition = build("rope-swiglu")
    adapters.attach(network, "edges", ControlConfig(how="tokens", rank=4).layers(network, ()))
    randomize(network, "adapters")
    (inputs,) = network.prepare(replace(condition, control=control())).prepared_control
    gate = network.controls["edges"].gate
    merged, _ = build("rope-swiglu")
    for name, _, _, layer in adapters.adapter_layers(network, "edges"):
        if name:
            merged.get_submodule(name).weight.add_(layer.delta().detach())
    record: list[tuple[Tensor, Tensor]] = []
    tokens, context = merged.embed(control()[:, 0], torch.zeros(3), condition)
    merged.run_blocks(tokens, replace(context, record=record))
    assert len(record) == 4
    for number, (keys, values) in enumerate(record):
        factor = gate[number].unflatten(0, (4, 1, -1))
        torch.testing.assert_close(inputs.keys_values[number][0], keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inputs.keys_values[number][1], factor * values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", HOW)
def test_two_controls_and_their_strengths_by_row(how: str) -> None:
    network, condition = build("rope-swiglu")
    for name in ("edges", "mask"):
        adapters.attach(network, name, config_of(how).layers(network, ()))
    randomize(network, "adapters")
    both = network(image(), TIMES, replace(condition, control=control(2)))
    strengths = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    partly = network(image(), TIMES, replace(condition, control=control(2), control_strength=strengths))
    assert torch.equal(partly[0], both[0])
    assert torch.equal(partly[2], network(image(), TIMES, condition)[2])
    adapters.detach(network, "mask")
    alone = network(image(), TIMES, replace(condition, control=control(2)[:, :1]))
    torch.testing.assert_close(partly[1], alone[1])
    with pytest.raises(ValueError, match="has 1 controls, and the condition 2"):
        network(image(), TIMES, replace(condition, control=control(2)))


def test_only_the_control_has_gradients() -> None:
    network, condition = build("text-keys")
    for how in HOW:
        adapters.attach(network, how, config_of(how).layers(network, ()))
    randomize(network, "adapters")
    network(image(), TIMES, replace(condition, control=control(len(HOW)))).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("adapters" in name), name


def test_a_control_is_counted_and_cannot_be_merged() -> None:
    network, _ = build("adaln-zero")
    before = network.macs()
    layers = ControlConfig(how="copy", copies=3).layers(network, ())
    adapters.attach(network, "edges", layers)
    width, tokens = 32, 16
    shares = sum(block.macs(tokens, 2) for block in network.blocks[:3])
    assert network.macs() - before == shares + tokens * 4 * width**2 + network.x_embedder.macs(tokens)
    with pytest.raises(TesseraError, match="cannot be merged"):
        adapters.merge(network)
    assert list(network.controls) == ["edges"]


def test_an_image_prompt_is_decoupled_attention() -> None:
    """Ye et al. 2023, equation 5: to the attention between tokens is added that to the tokens of the image."""
    network, condition = build("adaln-zero")
    config = ControlConfig(how="prompt", tokens=3)
    assert (config.image.kind, config.summary()) == ("image", "control by image, prompt, 3 tokens")
    adapters.attach(network, "ip", config.layers(network, ()))
    [layer] = network.controls.values()
    assert sum(parameter.numel() for parameter in layer.parameters()) == 2 * 4 * 32**2 + 3 * 32 + 4 * 33 * 32 + 2 * 32
    randomize(network, "adapters")
    with_prompt = replace(condition, control=control())
    [inputs] = network.prepare(with_prompt).prepared_control
    attention, seen = network.blocks[1].attn, {}
    handles = [attention.qkv.register_forward_hook(lambda module, given, output: seen.update(qkv=output))]
    handles += [attention.proj.register_forward_pre_hook(lambda module, given: seen.update(mixed=given[0]))]
    network(image(), TIMES, with_prompt)
    q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in seen["qkv"].chunk(3, dim=-1))
    keys, values = inputs.keys_values[1]
    assert keys.shape == values.shape == (3, 4, 3, 8)
    expected = sum((q @ each.mT / 8**0.5).softmax(-1) @ value for each, value in ((k, v), (keys, values)))
    torch.testing.assert_close(seen["mixed"], expected.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-4)
    for handle in handles:
        handle.remove()


def test_networks_without_a_place_for_a_control() -> None:
    config = ControlConfig()
    unet = UNetConfig(input_size=(8, 8), in_channels=3, out_channels=3, num_classes=0)
    with torch.device("meta"), pytest.raises(TesseraError, match="transformer for images"):
        config.layers(unet.build(), ())
    network, _ = build("adaln")
    with pytest.raises(TesseraError, match="adapter.copies: 4 of 4 blocks"):
        ControlConfig(how="copy", copies=4).layers(network, ())
    with pytest.raises(TesseraError, match="adapter.rank is 99"):
        ControlConfig(how="tokens", rank=99).layers(network, ())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"how": "copy", "rank": 4}, "rank has no effect"),
        ({"copies": 2}, "it needs how=copy"),
        ({"tokens": 2}, "it needs how=prompt"),
        ({"how": "prompt", "rank": 4}, "rank has no effect"),
    ],
)
def test_settings_without_effect_are_errors(settings: dict, message: str) -> None:
    with pytest.raises(TesseraError, match=message):
        validate(ControlConfig, settings, "adapter")


def test_control_images() -> None:
    pixels = np.full((2, 3, 16, 16), 200, np.uint8)
    pixels[:, 0, :, 8:] = 20  # a vertical step in one channel
    edges = Edges()(pixels)
    assert edges.shape == pixels.shape
    assert edges[0, :, 4, 7:9].min() == 255
    assert edges[0, :, :, :3].max() == 0
    grey = Grey()(pixels)
    assert (grey[:, 0] == grey[:, 2]).all()
    assert (Blocks(factor=4)(pixels) == pixels).all()  # the step is where blocks meet
    assert (LowResolution(factor=4)(pixels) != pixels).any()
    assert (LowResolution(factor=1)(pixels) == pixels).all()
    assert set(np.unique(Mask(threshold=180)(pixels))) == {0, 255}
    assert (Mask(threshold=180)(pixels)[0, 0] == np.where(pixels[0, 0] == 20, 255, 0)).all()
    assert Edges()(pixels[0, :1]).shape == (1, 16, 16)


def test_in_training_the_control_image_is_flipped_with_the_image() -> None:
    from tessera.training.objective import TrainingObjective, prepare_batch

    dataset = ShapesConfig(count=16).open()
    loader = Loader(dataset, 16, 0, condition_fields=(), control=control_images(Grey(), dataset))
    batch = loader.load_batch(0)
    codec = tessera.codecs.PixelsConfig().build()
    objective = TrainingObjective(FlowMatchingConfig().build(), codec, True, 0.0, (), 0, None)
    x0, condition, _ = prepare_batch(batch, objective, torch.device("cpu"))
    assert condition.control is not None
    levels = ((x0 + 1) * 127.5).round().to(torch.uint8).numpy()
    torch.testing.assert_close(condition.control[:, 0], torch.from_numpy(Grey()(levels)) / 127.5 - 1)
    assert not torch.equal(levels_of(batch.pixels), levels_of(torch.from_numpy(levels)))  # some are flipped


def test_control_images_of_another_folder(tmp_path: Path) -> None:
    for folder, suffix in (("images", "png"), ("edges", "bmp")):
        (tmp_path / folder / "cat").mkdir(parents=True)
        for number in range(3):
            level = 50 * number + (5 if folder == "edges" else 0)
            Image.new("RGB", (16, 8), (level, level, level)).save(tmp_path / folder / "cat" / f"{number}.{suffix}")
    dataset = FilesConfig(kind="folder", path=str(tmp_path / "images"), size=(8, 8), classes="none").open()
    paired = Paired(path=str(tmp_path / "edges"))
    batch = Loader(dataset, 3, 0, condition_fields=(), control=control_images(paired, dataset)).load_batch(0)
    assert batch.control is not None
    assert torch.equal(batch.control, batch.pixels + 5)
    assert (paired(photo()[0].transpose(2, 0, 1)) == photo()[0].transpose(2, 0, 1)).all()
    Image.new("RGB", (16, 16)).save(tmp_path / "edges" / "cat" / "1.bmp")
    with pytest.raises(TesseraError, match=r"1.bmp has 16 x 16 pixels .* 8 x 16: both need the same ratio"):
        control_images(paired, dataset)(batch.pixels.numpy(), [0, 1, 2])
    (tmp_path / "edges" / "cat" / "2.bmp").unlink()
    with pytest.raises(TesseraError, match=r"no control image for .*2.png: expected .*cat/2, with any suffix"):
        control_images(paired, dataset)
    with pytest.raises(TesseraError, match="data.kind=folder"):
        control_images(paired, ShapesConfig(count=1).open())


def levels_of(pixels: Tensor) -> Tensor:
    return pixels[..., :16].float().mean(dim=(1, 2, 3))


def model(*hows: str) -> Model:
    """A model of shapes with random weights and controls, by the names of their kinds."""
    torch.manual_seed(0)
    config = DiTConfig(**{**SIZES, "num_classes": 4})
    network = config.build()
    randomize(network)
    for how in hows:
        adapters.attach(network, how, config_of(how).layers(network, ()))
    randomize(network, "adapters")
    bundle_config = BundleConfig(
        network=config, diffusion={"kind": "flow"}, codec={"kind": "pixels"}, sampling={"num_steps": 3}
    )
    info = AdapterInfo(settings=ControlConfig(image=Grey()).model_dump(mode="json"))
    return Model(bundle_config, network.eval().requires_grad_(False), adapters=dict.fromkeys(hows, info))


def photo(count: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)


@pytest.mark.parametrize("how", HOW)
def test_sampling_with_a_control(how: str) -> None:
    base, controlled = model(), model(how)
    plain = tessera.generate(base, [1, 2], seeds=[3, 4])
    assert (tessera.generate(controlled, [1, 2], seeds=[3, 4]) == plain).all()
    images = tessera.generate(controlled, [1, 2], seeds=[3, 4], controls={how: photo()[0]})
    assert (images != plain).any()
    off = ControlInput(photo(), strength=[1.0, 0.0])
    partly = tessera.generate(controlled, [1, 2], seeds=[3, 4], controls={how: off})
    assert (partly[0] == images[0]).all()
    assert np.abs(partly[1].astype(int) - plain[1]).max() <= 1
    grey = Grey()(np.moveaxis(photo(), -1, 1))
    given = ControlInput(np.moveaxis(grey, 1, -1), is_map=True)
    assert (tessera.generate(controlled, [1, 2], seeds=[3, 4], controls={how: given}) == images).all()


def test_guidance_leads_away_from_the_output_without_a_control() -> None:
    controlled = model("copy", "tokens")
    inputs = {"copy": photo()[0], "tokens": photo(2)[1]}
    plain = tessera.generate(controlled, [1], seeds=[3], controls=inputs)
    guided = tessera.generate(controlled, [1], seeds=[3], controls=inputs, guidance_scales={"control": 3.0})
    off = {"copy": photo()[0] * 0, "tokens": photo(2)[1]}
    assert (guided != plain).any()
    assert (tessera.generate(controlled, [1], seeds=[3], controls=off) != plain).any()
    assert (tessera.generate(controlled, [1], seeds=[3], controls=inputs, guidance_scale=3.0) != guided).any()


def test_requests_with_and_without_a_control_share_network_calls() -> None:
    controlled = model("tokens", "copy")
    requests = [
        SampleRequest([3], {"label": [1]}, controls={"tokens": photo()}),
        SampleRequest([4], {"label": [2]}, guidance_scale=2.0),
        SampleRequest([5], {"label": [0]}, controls={"copy": ControlInput(photo(), 0.5)}),
    ]
    sampler = ContinuousSampler(controlled)
    results: dict = {}
    for number, request in enumerate(requests):
        sampler.add(request, [number])
        results |= sampler.step()
    while len(results) < 3:
        results |= sampler.step()
    for number, request in enumerate(requests):
        alone = tessera.generation.generate_request(controlled, request)
        together = tessera.generation.decode(controlled, results[number][None])
        assert np.abs(alone.astype(int) - together).max() <= 1


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        ({"edge": photo()}, "unknown control 'edge'"),
        ({"copy": photo()[:, :4]}, r"uint8 \[4, 8, 3\] for each image; expected uint8 \[8, 8, 3\]"),
        ({"copy": photo().astype(float)}, "float64"),
        ({"copy": photo(3)}, "3 images are requested"),
        ({"copy": ControlInput(photo(), float("nan"))}, "finite number"),
    ],
)
def test_control_images_that_do_not_fit(controls: dict, message: str) -> None:
    with pytest.raises(TesseraError, match=message):
        tessera.generate(model("copy"), [1, 2], seeds=[3, 4], controls=controls)


def test_a_model_without_controls_names_the_remedy() -> None:
    with pytest.raises(TesseraError, match="no control 'edges': attach one, as in --adapter edges=PATH"):
        tessera.generate(model(), [1], controls={"edges": photo()})


RECIPE = {
    "data": {"kind": "shapes", "count": 64},
    "codec": "pixels",
    "diffusion": "flow",
    "sampling": {"num_steps": 2},
}
TRAINING = {"global_batch_size": 4, "compile": "off", "device": "cpu", "checkpoint_every": 2, "sample_seeds": 1}
TRAINING |= {"tensorboard": False, "optimizer": {"warmup_steps": 0}}


@pytest.fixture(scope="module")
def base_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("control") / "base"
    network = {"depth": 3, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    tessera.train({**RECIPE, "network": network, "training": {**TRAINING, "steps": 2}, "run_dir": str(folder)})
    return folder


def control_recipe(base: Path, folder: Path, steps: int, **settings: object) -> dict:
    training = {**TRAINING, "steps": steps, "init_from": str(base)}
    return {
        **RECIPE,
        "adapter": {"kind": "control", **settings},
        "training": training,
        "run_dir": str(folder),
    }


@pytest.mark.run
@pytest.mark.parametrize("how", HOW)
def test_a_run_trains_the_control_alone_and_resumes_bit_for_bit(base_run: Path, tmp_path: Path, how: str) -> None:
    tessera.train(control_recipe(base_run, tmp_path / "whole", 4, how=how))
    tessera.train(control_recipe(base_run, tmp_path / "parts", 2, how=how))
    tessera.train(control_recipe(base_run, tmp_path / "parts", 4, how=how))
    base = tessera.load(base_run)
    models = [tessera.load(base_run, adapters=[f"edges={tmp_path / name}"]) for name in ("whole", "parts")]
    states = [adapters.adapter_state(each.network, "edges") for each in models]
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    assert any(bool(tensor.any()) for name, tensor in states[0].items() if "gate" in name or "weight" in name)
    for name, tensor in base.network.state_dict().items():
        assert torch.equal(adapters.base_state(models[0].network)[name], tensor)
    pixels = np.moveaxis(ShapesConfig(count=1).open().pixels(0), 0, -1)
    assert (tessera.generate(models[0], [1]) == tessera.generate(base, [1])).all()
    assert tessera.generate(models[0], [1], controls={"edges": pixels}).shape == (1, 32, 32, 3)


def test_recipes_that_a_control_cannot_have(base_run: Path, tmp_path: Path) -> None:
    recipe = control_recipe(base_run, tmp_path, 1, how="tokens")
    with pytest.raises(TesseraError, match="activation_checkpointing=none"):
        tessera.train({**recipe, "training": {**recipe["training"], "activation_checkpointing": "blocks"}})
    with pytest.raises(TesseraError, match="leave out data.cache"):
        tessera.train({**recipe, "data": {"kind": "folder", "path": "x", "size": 32, "cache": "y"}})


@pytest.mark.run
def test_the_command_takes_control_images(base_run: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from tessera.cli import app
    from tessera.images import read_settings

    tessera.train(control_recipe(base_run, tmp_path / "run", 1, how="copy"))
    Image.fromarray(np.moveaxis(ShapesConfig(count=1).open().pixels(0), 0, -1)).save(tmp_path / "photo.png")
    command = ["sample", str(base_run), "--classes", "0", "--out", str(tmp_path / "out")]
    command += ["--adapter", f"edges={tmp_path / 'run'}"]
    spec = f"edges={tmp_path / 'photo.png'}:0.8"
    result = CliRunner().invoke(app, [*command, "--control", spec])
    assert result.exit_code == 0, result.output
    settings = read_settings(tmp_path / "out" / "grid.png")
    assert settings is not None
    assert settings["options"]["control"] == [spec]
    assert len(settings["control_edges_hash"]) == 16
    twice = CliRunner().invoke(app, [*command, "--control", spec, "--control-map", spec])
    assert twice.exit_code != 0


def test_a_folder_of_diffusers_holds_the_blocks_of_its_transformer(tmp_path: Path) -> None:
    """Each block loads strictly into diffusers' own, and has its output; the folder comes back with the same state."""
    attention = pytest.importorskip("diffusers.models.attention")
    from safetensors.torch import load_file
    from typer.testing import CliRunner

    from tessera import adapter_files, bundle
    from tessera.cli import app
    from tessera.interop.adapters import attach_adapters

    network, _ = build("pixart")
    config = BundleConfig(network=network.config, diffusion={"kind": "gaussian"}, codec={"kind": "pixels"})
    bundle.save(Model(config, network), tmp_path / "model")
    adapters.attach(network, "edges", ControlConfig(how="copy", copies=2).layers(network, ()))
    randomize(network, "adapters")
    state = adapters.adapter_state(network, "edges")
    adapter_files.write(AdapterInfo(), state, tmp_path / "edges.safetensors")
    command = ["convert", tmp_path / "edges.safetensors", tmp_path / "folder", "--to", "diffusers", "--base"]
    result = CliRunner().invoke(app, [str(word) for word in [*command, tmp_path / "model"]])
    assert result.exit_code == 0, result.output
    tensors = load_file(tmp_path / "folder/diffusion_pytorch_model.safetensors")
    copied = network.controls["edges"].blocks
    x, text = torch.randn(2, 16, 32), torch.randn(2, 5, 32)
    times = torch.randn(2, 6 * 32)
    for number in range(2):
        theirs = attention.BasicTransformerBlock(
            32, 4, 8, cross_attention_dim=32, activation_fn="gelu-approximate", attention_bias=True,
            norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        ).eval()  # fmt: skip
        prefix = f"controlnet_blocks.{number}.transformer_block."
        theirs.load_state_dict({key.removeprefix(prefix): each for key, each in tensors.items() if prefix in key})
        shared = times[:, None]
        context = Context(c=shared, cond_tokens=x, grid=(4, 4), text=text, shared_modulation=shared)
        expected = theirs(x, encoder_hidden_states=text, timestep=times)
        torch.testing.assert_close(copied[number](x, context), expected, rtol=1e-5, atol=1e-5)
    adapters.detach(network)
    attach_adapters(Model(config, network), [f"hed={tmp_path}/folder"])
    again = adapters.adapter_state(network, "hed")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
    (tmp_path / "folder/config.json").write_text('{"_class_name": "PixArtControlNetAdapterModel", "num_layers": 3}')
    adapters.detach(network)
    with pytest.raises(TesseraError, match="missing controlnet_blocks.2"):
        attach_adapters(Model(config, network), [f"hed={tmp_path}/folder"])


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_of_pixart_delta(tmp_path: Path, suffix: str) -> None:
    from tessera.interop import pixart_delta
    from tessera.interop.adapters import attach_adapters

    network, condition = build("pixart")
    adapters.attach(network, "edges", ControlConfig(how="copy", copies=2).layers(network, ()))
    randomize(network, "adapters")
    config = BundleConfig(network=network.config, diffusion={"kind": "gaussian"}, codec={"kind": "pixels"})
    pixart_delta.write(tmp_path / f"control.{suffix}", Model(config, network), "edges")
    output = network(image(), TIMES, replace(condition, control=control()))
    adapters.detach(network)
    other = Model(config, network)
    attach_adapters(other, [f"hed={tmp_path}/control.{suffix}:0.5"])
    assert adapters.attached(network) == {"hed": 0.5}
    doubled = replace(condition, control=control(), control_strength=torch.full((3, 1), 2.0))
    assert torch.equal(network(image(), TIMES, doubled), output)
    # names as the official code saves them
    if suffix == "pth":
        names = torch.load(tmp_path / "control.pth")["state_dict"].keys()
        official = {"controlnet.1.copied_block.scale_shift_table", "controlnet.0.before_proj.weight"}
        official |= {"controlnet.1.after_proj.bias", "base_model.t_block.1.weight", "base_model.blocks.3.mlp.fc1.bias"}
        assert official <= names
        assert "controlnet.1.before_proj.weight" not in names
        stored = torch.load(tmp_path / "control.pth")
        stored["state_dict"]["controlnet.1.gate"] = torch.zeros(1)
        torch.save(stored, tmp_path / "other.pth")
        with pytest.raises(TesseraError, match="unknown name: controlnet.1.gate"):
            attach_adapters(other, [f"x={tmp_path}/other.pth"])
    with pytest.raises(TesseraError, match="how the images of control hed are made is not recorded"):
        tessera.generation.control._conversion(other, "hed")
    tokens = model("tokens")
    with pytest.raises(TesseraError, match="'tokens' is not"):
        pixart_delta.write(tmp_path / "x.pth", tokens, "tokens")
