"""Alignment of features: what is compared, what it costs, that runs resume exactly, and who may have it."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from tessera import bundle, randomness
from tessera.adapters import LoRAConfig
from tessera.codecs import PixelsConfig
from tessera.conditioning import Condition
from tessera.diffusion import FlowMatchingConfig, GaussianDiffusionConfig
from tessera.encoders import vision
from tessera.errors import TesseraError
from tessera.interop.load import convert, load
from tessera.models import DiTConfig
from tessera.models.blocks import InContext, RoPESwiGLU
from tessera.models.dit import DiT
from tessera.training.alignment import (
    ALIGNMENT_STREAM,
    Alignment,
    EncoderAlignment,
    EncoderFeatures,
    SelfAlignment,
    build_features,
)
from tessera.training.ema import EMA
from tessera.training.loop import train
from tessera.training.objective import TrainingObjective, compute_loss, sample_noise
from tessera.training.recipe import EMAConfig, TrainingConfig, read_recipe, resolve_recipe, training_macs
from tessera.training.token_times import DualTokenTimes

NETWORK = DiTConfig(
    input_size=(8, 8), in_channels=3, out_channels=3, num_classes=4, patch_size=2, depth=3, hidden_size=24,
    num_heads=2, feature_channels=24,
)  # fmt: skip
PROCESSES = {"flow": FlowMatchingConfig(), "gaussian": GaussianDiffusionConfig(variance="posterior")}


def trained_network(config: DiTConfig = NETWORK) -> DiT:
    torch.manual_seed(3)
    network = config.build()
    for parameter in network.parameters():  # zeros of a new network would hide what depends on them
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return network


def objective(network, process="flow", positions=100, **settings) -> TrainingObjective:
    config = SelfAlignment(block=1, target_block=2)
    diffusion, ema = PROCESSES[process].build(), EMA(network, EMAConfig())
    features = build_features(config, ema, diffusion, PixelsConfig().build(), torch.device("cpu"), 5)
    alignment = Alignment(config, features, positions, None)
    return TrainingObjective(
        diffusion, PixelsConfig().build(), False, 0.0, (), 5, None, patch_size=2, alignment=alignment, **settings
    )


def batch(rows: int = 5):
    torch.manual_seed(1)
    return torch.rand(rows, 3, 8, 8) * 2 - 1, Condition(label=torch.arange(rows) % 4), torch.arange(rows)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("dual", [False, True])
def test_the_features_are_those_of_the_average_with_less_noise(process, dual):
    """The same loss, computed from the outputs of single blocks."""
    network = trained_network()
    work = objective(network, process, **({"token_times": DualTokenTimes()} if dual else {}))
    average = work.alignment.features.ema.network
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0.9)
    x0, condition, position = batch()
    noise, calls = sample_noise(x0, position, work), []
    hook = network.blocks[0].register_forward_hook(lambda module, inputs, output: calls.append(output))
    losses, _ = compute_loss(network, x0, condition, position, work)
    hook.remove()
    predicted = network.feature_head(calls[0])

    plain, _ = compute_loss(network, x0, condition, position, replace(work, alignment=None))
    numbers = work.diffusion.sample_timesteps(randomness.uniform(5, position, 1)[:, 0])
    if dual:
        numbers = work.token_times.sample(numbers, 16, position, 5, work.diffusion).amin(dim=1)
    gap = 0.2 * randomness.uniform(5, position, ALIGNMENT_STREAM)[:, 0]
    earlier = torch.maximum(numbers - gap, work.diffusion.sample_timesteps(torch.zeros(1)))
    tokens, context = average.embed(
        work.diffusion.add_noise(x0, noise, earlier), work.diffusion.model_time(earlier), condition
    )
    for block in average.blocks[:2]:
        tokens = block(tokens, context)
    expected = 1 - cosine_similarity(predicted, tokens, dim=-1).mean(dim=1)
    assert (earlier <= numbers).all()
    assert (earlier < numbers).any()
    torch.testing.assert_close(losses.alignment, expected)
    torch.testing.assert_close(losses.total, plain.total + 0.5 * expected)
    torch.testing.assert_close(losses.mse, plain.mse)


def test_gradients_reach_the_head_and_the_blocks_before_it_and_not_the_average():
    network = trained_network()
    work = objective(network)
    losses, _ = compute_loss(network, *batch(), work)
    losses.alignment.sum().backward()
    for name in ("feature_head.out.weight", "blocks.0.mlp.fc1.weight", "x_embedder.proj.weight"):
        assert network.get_parameter(name).grad.abs().max() > 0, name
    assert network.get_parameter("blocks.1.mlp.fc1.weight").grad is None
    assert all(parameter.grad is None for parameter in work.alignment.features.ema.network.parameters())


def test_the_alignment_ends_and_costs_nothing_then():
    network = trained_network()
    work = objective(network, positions=3)
    x0, condition, _ = batch()
    during, _ = compute_loss(network, x0, condition, torch.arange(5), work)
    after, _ = compute_loss(network, x0, condition, torch.arange(3, 8), work)
    assert (during.alignment > 0).all()
    assert torch.equal(after.alignment, torch.zeros(5))
    assert torch.equal(after.total, after.mse)


def test_the_head_changes_neither_output_nor_cost_of_sampling():
    network, plain = trained_network(), NETWORK.model_copy(update={"feature_channels": None}).build()
    plain.load_state_dict({name: value for name, value in network.state_dict().items() if "feature_head" not in name})
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    condition = Condition(label=torch.tensor([0, 1]))
    output, features = network.training_forward(x, t, condition, 2)
    assert torch.equal(output, plain(x, t, condition))
    assert torch.equal(network(x, t, condition), output)
    assert features.shape == (2, 16, 24)
    assert network.macs() == plain.macs()


def test_the_multiply_adds_of_training_are_those_of_the_modules_that_run():
    network = trained_network()
    head = 16 * 2 * 24 * 24
    assert training_macs(TrainingConfig(), network) == network.macs()
    training = TrainingConfig(alignment=SelfAlignment(block=1, target_block=2, until=0.5))
    assert training_macs(training, network) == pytest.approx(network.macs() + 0.5 * (head + network.macs() * 2 / 3 / 3))


@pytest.mark.parametrize(
    ("alignment", "changes", "message"),
    [
        ({"kind": "self", "block": 2, "target_block": 2}, {}, "must come from a later block"),
        ({"kind": "self", "target_block": 9}, {}, "target_block 9, and the network has 3 blocks"),
        ({"kind": "encoder", "source": "x", "block": 7}, {}, "has block 7, and the network has 3"),
        ({"kind": "self"}, {"network.kind": "unet"}, "needs a DiT"),
        ({"kind": "encoder", "source": "tests"}, {}, "cannot load the vision network 'tests'"),
    ],
)
def test_what_cannot_be_aligned_is_an_error(alignment, changes, message, tmp_path):
    network = {"patch_size": 2, "depth": 3, "hidden_size": 24, "num_heads": 2}
    if changes:
        network = {
            "kind": "unet",
            "model_channels": 8,
            "channel_mult": [1, 2],
            "num_res_blocks": 1,
            "attention_levels": [2],
        }
    recipe = read_recipe(
        {"run_dir": str(tmp_path), "data": "digits", "network": network, "training": {"alignment": alignment}}
    )
    with pytest.raises(TesseraError, match=message):
        resolve_recipe(recipe, [str(digit) for digit in range(10)], PixelsConfig(channels=1).build())


def vit_folder(tmp_path):
    from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def convolutional_folder(tmp_path):
    from transformers import ResNetConfig, ResNetModel, ViTImageProcessor

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path / "resnet")
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "resnet")
    return tmp_path / "resnet"


@pytest.mark.parametrize("folder", [vit_folder, convolutional_folder])
@pytest.mark.parametrize("size", [None, 56])
def test_patches_of_an_encoder_are_those_of_transformers(folder, size, tmp_path):
    from transformers import AutoModel

    path = folder(tmp_path)
    encoder = vision.load(str(path), size=size)
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    patches = encoder.patches(images)
    model = AutoModel.from_pretrained(path).eval()
    with torch.no_grad():
        hidden = model(pixel_values=encoder.preprocessing(images)).last_hidden_state
    if hidden.ndim == 3:
        side = (size or 28) // 7
        hidden = hidden[:, 1:].mT.reshape(2, 16, side, side)
    torch.testing.assert_close(patches, hidden)


def test_an_encoder_gets_the_images_and_its_patches_are_resampled_to_the_tokens(tmp_path):
    folder = vit_folder(tmp_path)
    features = EncoderFeatures(EncoderAlignment(source=str(folder)), PixelsConfig().build(), 2, torch.device("cpu"))
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    x0 = pixels.float() / 127.5 - 1
    values = features(x0, torch.randn_like(x0), torch.rand(2), Condition(), torch.arange(2))
    assert values.shape == (2, 16, 16)
    patches = vision.load(str(folder)).patches(pixels)  # 4 x 4, as the token grid
    torch.testing.assert_close(values, patches.flatten(2).mT)


def recipe(run_dir, alignment, **training):
    return read_recipe(
        {
            "run_dir": str(run_dir),
            "data": "digits",
            "network": {"patch_size": 2, "depth": 3, "hidden_size": 24, "num_heads": 2, "block": RoPESwiGLU().kind},
            "diffusion": "flow",
            "training": {
                "alignment": alignment, "steps": 6, "global_batch_size": 8, "log_every": 1, "sample_every": 6,
                "sample_seeds": 1, "checkpoint_every": 3, "device": "cpu", "num_workers": 1, **training,
            },
        }
    )  # fmt: skip


def test_a_run_resumes_bit_for_bit_and_its_model_can_be_sampled(tmp_path):
    alignment = {"kind": "self", "until": 0.7}
    train(recipe(tmp_path / "whole", alignment))
    train(recipe(tmp_path / "parts", "self", steps=3, sample_every=3))  # `until` is relative to the steps
    train(recipe(tmp_path / "parts", alignment))
    whole, parts = (bundle.load(bundle.checkpoints(tmp_path / name)[0]) for name in ("whole", "parts"))
    states = whole.network.state_dict(), parts.network.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert whole.network.config.feature_channels == 24
    adapted = recipe(tmp_path / "lora", None, init_from=str(tmp_path / "whole"), steps=1, sample_every=1)
    train(adapted.model_copy(update={"adapter": LoRAConfig(rank=2)}))
    assert load(tmp_path / "whole", "cpu", adapters=[str(tmp_path / "lora")]).network.config.feature_channels is None
    convert(tmp_path / "whole", tmp_path / "bundle", "bundle")
    exported = bundle.load(tmp_path / "bundle")
    assert exported.network.config.feature_channels is None
    assert not [name for name in exported.network.state_dict() if "feature_head" in name]
    for name, value in exported.network.state_dict().items():
        assert torch.equal(value, states[0][name]), name


def test_a_block_with_condition_tokens_aligns_the_tokens_of_the_image():
    network = trained_network(NETWORK.model_copy(update={"block": InContext()}))
    losses, _ = compute_loss(network, *batch(), objective(network))
    assert losses.alignment is not None
    assert losses.alignment.shape == (5,)
    assert torch.isfinite(losses.alignment).all()
