"""One training step: randomness, gradients, update."""

import copy
import dataclasses
import math

import pytest
import torch

from tessera import randomness
from tessera.codecs import AutoencoderConfig, PixelsConfig
from tessera.codecs.autoencoder import Autoencoder
from tessera.conditioning import Condition
from tessera.data import Batch
from tessera.data.digits import DigitsConfig
from tessera.data.loader import FLIP_STREAM
from tessera.diffusion import FlowMatchingConfig
from tessera.diffusion.gaussian import GaussianDiffusionConfig
from tessera.models import DiTConfig, UNetConfig
from tessera.monitoring import health
from tessera.training import objective as streams
from tessera.training import parallel, step
from tessera.training.objective import TrainingObjective, compute_loss, prepare_batch
from tessera.training.optimizers import AdamWConfig, MuonConfig
from tessera.training.parallel import ParallelContext
from tessera.training.step import MetricAccumulator, StepMetrics, TrainState, optimizer_step, train_step

CPU = torch.device("cpu")


def make_batch(count: int, start: int = 0, channels: int = 1, size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(start)
    pixels = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)
    position = torch.arange(start, start + count)
    return Batch(pixels, Condition(position % 3), position)


def make_objective(**changes) -> TrainingObjective:
    defaults = {"hflip": False, "condition_dropout": 0.0, "null_fields": ("label",), "seed": 7, "dtype": None}
    diffusion = GaussianDiffusionConfig(num_timesteps=50).build()
    codec = PixelsConfig(channels=1).build()
    return TrainingObjective(**{"diffusion": diffusion, "codec": codec, **defaults, **changes})


def make_state(network, config) -> TrainState:
    return TrainState(network, network, config.build(network), config, ParallelContext())


def test_frozen_weights_do_not_change(tiny_model):
    tiny_model.network.train().requires_grad_(True)
    tiny_model.network.pos_embed.requires_grad_(False)
    before = tiny_model.network.pos_embed.clone()
    train_step(make_state(tiny_model.network, AdamWConfig(weight_decay=0.5)), make_batch(4), make_objective(), 4)
    assert torch.equal(tiny_model.network.pos_embed, before)


# Gradients


def gradient_of(
    network, batch: Batch, accumulation_steps: int, objective: TrainingObjective, max_norm: float | None = None
) -> tuple[dict, StepMetrics]:
    """The gradient, as the change of the weights by gradient descent with rate 1, and the metrics of the step."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(list(parallel.trained_parameters(network).items()), lr=1.0)
    state = TrainState(network, network, optimizer, AdamWConfig(grad_clip_norm=max_norm), ParallelContext())
    metrics = train_step(state, batch, objective, len(batch.position), accumulation_steps)
    gradient = {name: before[name] - value for name, value in network.state_dict().items()}
    network.load_state_dict(before)
    assert all(weight.grad is None for weight in network.parameters())
    return gradient, metrics


@pytest.mark.parametrize("accumulation_steps", [2, 5, 12])
def test_accumulation_gives_the_gradient_of_the_whole_batch(tiny_model, accumulation_steps):
    objective = make_objective(diffusion=tiny_model.diffusion, hflip=True, condition_dropout=0.3)
    whole, metrics = gradient_of(tiny_model.network, make_batch(12), 1, objective)
    parts, part_metrics = gradient_of(tiny_model.network, make_batch(12), accumulation_steps, objective)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-6 * max(1, float(whole[name].abs().max())))
    assert set(metrics.values) == {"loss", "mse", "vb", "grad_norm"}
    for name, value in metrics.values.items():
        assert part_metrics.values[name].item() == pytest.approx(value.item(), rel=1e-5)
    torch.testing.assert_close(part_metrics.loss_by_timestep, metrics.loss_by_timestep)
    torch.testing.assert_close(part_metrics.group_squared_norms, metrics.group_squared_norms)


def test_the_gradient_is_that_of_the_mean_loss(tiny_model):
    objective = make_objective(diffusion=tiny_model.diffusion)
    network = tiny_model.network
    gradient, metrics = gradient_of(network, make_batch(6), 1, objective)
    x0, condition, position = prepare_batch(make_batch(6), objective, CPU)
    losses, t = compute_loss(network, x0, condition, position, objective)
    loss = losses.total.mean()
    loss.backward()
    norm = torch.cat([weight.grad.flatten() for weight in network.parameters() if weight.grad is not None]).norm()
    assert metrics.values["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    assert metrics.values["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-5)
    for number in range(health.BINS):
        inside = (t * health.BINS).long().clamp(max=health.BINS - 1) == number
        assert metrics.loss_by_timestep[1, number] == inside.sum()
        assert metrics.loss_by_timestep[0, number].item() == pytest.approx(losses.mse[inside].sum().item(), rel=1e-5)
    for name, weight in network.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(gradient[name], weight.grad, rtol=0, atol=1e-5)


def test_clipping_scales_the_gradient_but_not_the_reported_norm(tiny_model):
    objective = make_objective(diffusion=tiny_model.diffusion)
    _, unclipped = gradient_of(tiny_model.network, make_batch(6), 1, objective)
    norm = unclipped.values["grad_norm"].item()
    gradient, clipped = gradient_of(tiny_model.network, make_batch(6), 1, objective, norm / 10)
    assert torch.cat([value.flatten() for value in gradient.values()]).norm().item() == pytest.approx(
        norm / 10, rel=1e-3
    )
    assert clipped.values["grad_norm"].item() == pytest.approx(norm, rel=1e-6)
    assert (unclipped.clipped, clipped.clipped) == (0, 1)


# Skipped steps

BAD_STEP = 1


class AddingCodec(Autoencoder):
    """A codec that adds a number to the pixels, so that latents can be made nan or infinite."""

    latent_channels, factor = 1, 1

    def __init__(self, value: float) -> None:
        self.value = value

    def encode(self, pixels, noise):
        return pixels + self.value


@pytest.mark.parametrize(
    "config", [AdamWConfig(weight_decay=0.1, grad_clip_norm=1.0), MuonConfig(weight_decay=0.1, grad_clip_norm=1.0)]
)
@pytest.mark.parametrize("bad", ["nan", "inf", "loss", "gradient"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_bad_step_changes_neither_weights_nor_optimizer_state(tiny_model, monkeypatch, config, bad, asynchronous):
    """The steps after it are the same as without it, also where the host does not wait for the device."""
    monkeypatch.setattr(
        step, "optimizer_step", lambda optimizer, applied, **_: optimizer_step(optimizer, applied, asynchronous)
    )
    objective = make_objective(diffusion=tiny_model.diffusion)

    def after(*steps: int) -> tuple[list[torch.Tensor], list[float]]:
        network = copy.deepcopy(tiny_model.network).train().requires_grad_(True)
        state, applied = make_state(network, config), []
        for number in steps:
            batch, limits, step_objective = make_batch(4, 4 * number), None, objective
            if number == BAD_STEP and bad in ("nan", "inf"):
                step_objective = dataclasses.replace(objective, codec=AddingCodec(float(bad)))
            elif number == BAD_STEP:
                limits = torch.tensor([1e-3, 1e9] if bad == "loss" else [1e9, 1e-3])
            applied.append(train_step(state, batch, step_objective, 4, 1, limits).applied.item())
        tensors = [value for values in state.optimizer.state.values() for value in values.values()]
        return [*network.state_dict().values(), *tensors], applied

    with_bad_step, applied = after(0, BAD_STEP, 2)
    without, _ = after(0, 2)
    assert applied == [1, 0, 1]
    assert all(torch.equal(one, other) for one, other in zip(with_bad_step, without, strict=True))


def test_means_leave_out_bad_steps():
    def metrics(loss: float, applied: float) -> StepMetrics:
        values = {"loss": torch.tensor(loss), "grad_norm": torch.tensor(2 * loss)}
        by_timestep = torch.full((2, health.BINS), loss)
        return StepMetrics(values, torch.tensor(applied), torch.tensor(1.0), by_timestep, torch.zeros(3))

    accumulator = MetricAccumulator()
    for loss, applied in ((1.0, 1.0), (math.nan, 0.0), (3.0, 1.0), (1e9, 0.0)):
        accumulator.add(metrics(loss, applied))
    assert accumulator.steps == 4
    assert accumulator.means() == {"loss": 2.0, "grad_norm": 4.0, "clipped": 1.0}
    assert accumulator.loss_by_timestep() == [1.0] * health.BINS
    assert (accumulator.steps, accumulator.means()) == (0, {})
    assert accumulator.loss_by_timestep() == [None] * health.BINS
    accumulator.add(metrics(math.inf, 0.0))
    assert accumulator.means() == {}


# Randomness is a function of (seed, position)


def network_inputs(batch: Batch, objective: TrainingObjective):
    """The arguments of the network in a training step."""
    calls = []

    def network(x, t, condition):
        calls.append((x, t, condition.label))
        return torch.zeros(len(x), 2, *x.shape[2:])

    x0, condition, position = prepare_batch(batch, objective, CPU)
    compute_loss(network, x0, condition, position, objective)
    return calls[0]


def test_the_network_inputs_depend_on_the_position_only():
    objective = make_objective(hflip=True, condition_dropout=0.4)
    batch = make_batch(40, start=1000)
    whole = network_inputs(batch, objective)
    for rows in (slice(3, 4), slice(10, 30), torch.tensor([39, 0, 17])):
        for part, values in zip(network_inputs(batch[rows], objective), whole):
            assert torch.equal(part, values[rows])


def test_the_loss_of_a_sample_does_not_depend_on_the_rest_of_the_batch(tiny_model):
    objective = make_objective(diffusion=tiny_model.diffusion, hflip=True, condition_dropout=0.4)

    def total(batch: Batch) -> torch.Tensor:
        x0, condition, position = prepare_batch(batch, objective, CPU)
        return compute_loss(tiny_model.network, x0, condition, position, objective)[0].total

    batch = make_batch(20, start=1000)
    together = total(batch)
    for row in (0, 7, 19):
        alone = total(batch[row : row + 1])
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-5, atol=1e-6)


def test_another_seed_or_position_has_other_noise():
    batch = make_batch(8)
    first = network_inputs(batch, make_objective())
    assert not torch.equal(first[0], network_inputs(batch, make_objective(seed=8))[0])
    later = network_inputs(dataclasses.replace(batch, position=batch.position + 8), make_objective())
    assert not torch.equal(first[0], later[0])
    assert not torch.equal(first[1], later[1])


def test_the_numbers_of_the_random_streams_never_change():
    numbers = (
        streams.TIMESTEP_STREAM,
        streams.NOISE_STREAM,
        streams.CONDITION_DROPOUT_STREAM,
        FLIP_STREAM,
        streams.POSTERIOR_STREAM,
    )
    assert numbers == (1, 2, 3, 4, 5)


def test_all_timesteps_of_the_process_are_sampled():
    _, t, _ = network_inputs(make_batch(2000), make_objective())
    assert set(t.tolist()) == set(range(50))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_labels_are_dropped_at_the_rate(rate):
    count = 20_000
    batch = Batch(torch.zeros(count, 1, 1, 1, dtype=torch.uint8), Condition(torch.ones(count)), torch.arange(count))
    _, condition, _ = prepare_batch(batch, make_objective(condition_dropout=rate), CPU)
    fraction = (condition.label < 0).float().mean().item()
    assert abs(fraction - rate) < 4 * math.sqrt(rate * (1 - rate) / count)
    assert set(condition.label.tolist()) == {-1, 1}


def test_no_label_is_dropped_by_default():
    _, condition, _ = prepare_batch(make_batch(500), make_objective(), CPU)
    assert condition.label.tolist() == [position % 3 for position in range(500)]


def test_without_classes_there_is_no_label():
    batch = make_batch(5)
    batch = Batch(batch.pixels, Condition(), batch.position)
    objective = make_objective(null_fields=(), condition_dropout=0.1)
    assert prepare_batch(batch, objective, CPU)[1].label is None


def test_pixels_are_scaled_to_minus_one_and_one():
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 3)
    x0, _, _ = prepare_batch(Batch(pixels, Condition(torch.zeros(1)), torch.zeros(1)), make_objective(), CPU)
    torch.testing.assert_close(x0.flatten(), torch.tensor([-1.0, 1.0, -0.6]))


def test_images_are_flipped_only_with_hflip():
    batch = make_batch(400)
    plain, _, _ = prepare_batch(batch, make_objective(), CPU)
    torch.testing.assert_close(plain, batch.pixels.float() / 127.5 - 1)
    mixed, _, _ = prepare_batch(batch, make_objective(hflip=True), CPU)
    unchanged = (mixed == plain).flatten(1).all(1)
    flipped = (mixed == plain.flip(-1)).flatten(1).all(1)
    assert bool((unchanged ^ flipped).all())
    assert 150 < int(flipped.sum()) < 250


def test_latents_are_sampled_from_the_posterior_with_the_noise_of_the_position(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=2, norm_num_groups=2,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=8, scaling_factor=0.5, force_upcast=False,
    ).save_pretrained(tmp_path)  # fmt: skip
    codec = AutoencoderConfig(source=str(tmp_path)).build()
    objective = make_objective(codec=codec)
    batch = make_batch(3, start=50, channels=3)
    latents, _, _ = prepare_batch(batch, objective, CPU)
    posterior = codec.vae.encode(batch.pixels.float() / 127.5 - 1).latent_dist
    noise = randomness.normal(objective.seed, batch.position, streams.POSTERIOR_STREAM, (2, 4, 4))
    torch.testing.assert_close(latents, (posterior.mean + posterior.std * noise) * codec.scale)
    assert not torch.allclose(latents, posterior.mean * codec.scale)


# Clips


def moving_digits(count: int, start: int, frames: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips uint8 [B, 1, T, 16, 16] of scanned digits that move by one pixel per frame and bounce, and their labels."""
    digits = DigitsConfig().open()
    random = torch.Generator().manual_seed(start)
    clips, labels = torch.zeros(count, 1, frames, 16, 16, dtype=torch.uint8), []
    for row in range(count):
        sample = int(torch.randint(len(digits), (), generator=random))
        y, x, up, left = torch.randint(0, 8, (4,), generator=random).tolist()
        for frame in range(frames):
            moves = ((y, up % 3 - 1), (x, left % 3 - 1))
            top, side = (8 - abs(8 - (first + speed * frame) % 16) for first, speed in moves)
            clips[row, 0, frame, top : top + 8, side : side + 8] = torch.from_numpy(digits.pixels(sample)[0])
        labels.append(digits.label(sample))
    return clips, torch.tensor(labels)


@pytest.mark.parametrize(
    "kind",
    ["rope-swiglu", pytest.param("adaln-zero", marks=pytest.mark.slow), pytest.param("unet", marks=pytest.mark.slow)],
)
def test_fifty_steps_on_clips_of_moving_digits(kind):
    """The loss falls, and a batch of clips in parts has the gradient of the whole, as for images."""
    sizes = {"input_size": (4, 16, 16), "in_channels": 1, "out_channels": 1, "num_classes": 10}
    if kind == "unet":
        network = UNetConfig(**sizes, model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(2,))
    else:
        dit = {"patch_size": 4, "depth": 2, "hidden_size": 64, "num_heads": 4, "block": kind}
        network = DiTConfig.model_validate({**sizes, **dit})
    torch.manual_seed(0)
    network = network.build()
    objective = make_objective(diffusion=FlowMatchingConfig(shift="dimension").resolve(1, (4, 16, 16)).build())
    state, losses = make_state(network, AdamWConfig(learning_rate=3e-3)), []
    for start in range(0, 400, 8):
        pixels, labels = moving_digits(8, start)
        batch = Batch(pixels, Condition(labels), torch.arange(start, start + 8))
        losses.append(float(train_step(state, batch, objective, 8, accumulation_steps=2).values["loss"]))
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
    assert all(math.isfinite(loss) for loss in losses)


def test_clips_of_one_frame_train_like_images(tiny_model):
    """Losses, gradients and flips of images [B, C, H, W] and of clips [B, C, 1, H, W], bit for bit."""
    images = make_batch(6)
    clips = Batch(images.pixels[:, :, None], images.condition, images.position)
    results = []
    for batch in (images, clips):
        network = copy.deepcopy(tiny_model.network).train()
        objective = make_objective(diffusion=tiny_model.diffusion, hflip=True, condition_dropout=0.3)
        gradient, metrics = gradient_of(network, batch, 2, objective)
        results.append((gradient, metrics))
    (one, one_metrics), (other, other_metrics) = results
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(one_metrics.values[name], other_metrics.values[name]) for name in one_metrics.values)
