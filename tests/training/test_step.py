"""One step: what is random, the gradients, the update."""

import copy
import dataclasses
import math

import pytest
import torch

from tessera import randomness
from tessera.codecs import AutoencoderConfig, PixelsConfig
from tessera.codecs.autoencoder import Autoencoder
from tessera.data import Batch
from tessera.data.loader import FLIP
from tessera.diffusion.gaussian import GaussianDiffusionConfig
from tessera.monitoring import health
from tessera.training import objective as streams
from tessera.training import parallel, step
from tessera.training.objective import TrainingObjective, compute_loss, prepare_batch
from tessera.training.optimizers import AdamWConfig, MuonConfig
from tessera.training.parallel import ParallelContext
from tessera.training.step import MetricAccumulator, StepMetrics, TrainState, train_step, update

CPU = torch.device("cpu")


def batch(count: int, start: int = 0, channels: int = 1, size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(start)
    pixels = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)
    position = torch.arange(start, start + count)
    return Batch(pixels, position % 3, position)


def rows(whole: Batch, chosen) -> Batch:
    return Batch(whole.pixels[chosen], whole.label[chosen], whole.position[chosen])


def task(**changes) -> TrainingObjective:
    told = {"flip": False, "label_dropout": 0.0, "classes": 3, "seed": 7, "dtype": None}
    process = GaussianDiffusionConfig(num_timesteps=50).build()
    return TrainingObjective(**{"process": process, "codec": PixelsConfig(channels=1).build(), **told, **changes})


def test_frozen_weights_are_left_alone(tiny_model):
    tiny_model.network.train().requires_grad_(True)
    tiny_model.network.pos_embed.requires_grad_(False)
    before = tiny_model.network.pos_embed.clone()
    train_step(learner(tiny_model.network, AdamWConfig(weight_decay=0.5)), batch(4), task(), 4)
    assert torch.equal(tiny_model.network.pos_embed, before)


# Gradients


def learner(network, config) -> TrainState:
    return TrainState(network, network, config.build(network), config, ParallelContext())


def moved(
    network, given: Batch, rounds: int, asked: TrainingObjective, clip: float | None = None
) -> tuple[dict, StepMetrics]:
    """The gradient, as the way the weights go under plain descent with rate 1; and what the step tells."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(list(parallel.trained(network).items()), lr=1.0)
    told = train_step(
        TrainState(network, network, optimizer, AdamWConfig(grad_clip_norm=clip), ParallelContext()),
        given,
        asked,
        len(given.position),
        rounds,
    )
    gradient = {name: before[name] - value for name, value in network.state_dict().items()}
    network.load_state_dict(before)
    assert all(weight.grad is None for weight in network.parameters())
    return gradient, told


@pytest.mark.parametrize("rounds", [2, 5, 12])
def test_rounds_give_the_gradient_of_the_whole(tiny_model, rounds):
    asked = task(process=tiny_model.process, flip=True, label_dropout=0.3)
    whole, told = moved(tiny_model.network, batch(12), 1, asked)
    parts, told_too = moved(tiny_model.network, batch(12), rounds, asked)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-6 * max(1, float(whole[name].abs().max())))
    assert set(told.values) == {"loss", "mse", "vb", "gradient_norm"}
    for name, value in told.values.items():
        assert told_too.values[name].item() == pytest.approx(value.item(), rel=1e-5)
    torch.testing.assert_close(told_too.by_time, told.by_time)
    torch.testing.assert_close(told_too.squares, told.squares)


def test_the_gradient_is_that_of_the_mean_loss(tiny_model):
    asked = task(process=tiny_model.process)
    network = tiny_model.network
    found, told = moved(network, batch(6), 1, asked)
    x0, condition, position = prepare_batch(batch(6), asked, CPU)
    found_losses, t = compute_loss(network, x0, condition, position, asked)
    loss = found_losses.total.mean()
    loss.backward()
    norm = torch.cat([weight.grad.flatten() for weight in network.parameters() if weight.grad is not None]).norm()
    assert told.values["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    assert told.values["gradient_norm"].item() == pytest.approx(norm.item(), rel=1e-5)
    for place in range(health.BINS):
        inside = (t * health.BINS).long().clamp(max=health.BINS - 1) == place
        assert told.by_time[1, place] == inside.sum()
        assert told.by_time[0, place].item() == pytest.approx(found_losses.mse[inside].sum().item(), rel=1e-5)
    for name, weight in network.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(found[name], weight.grad, rtol=0, atol=1e-5)


def test_clipping_shortens_the_gradient_but_not_what_is_told(tiny_model):
    asked = task(process=tiny_model.process)
    _, free = moved(tiny_model.network, batch(6), 1, asked)
    clip = free.values["gradient_norm"].item() / 10
    gradient, told = moved(tiny_model.network, batch(6), 1, asked, clip)
    assert torch.cat([value.flatten() for value in gradient.values()]).norm().item() == pytest.approx(clip, rel=1e-3)
    assert told.values["gradient_norm"].item() == pytest.approx(free.values["gradient_norm"].item(), rel=1e-6)
    assert (free.clipped, told.clipped) == (0, 1)


# Steps that are kept out of the weights


@pytest.mark.parametrize(
    "config", [AdamWConfig(weight_decay=0.1, grad_clip_norm=1.0), MuonConfig(weight_decay=0.1, grad_clip_norm=1.0)]
)
@pytest.mark.parametrize("bad", ["nan", "inf", "loss", "gradient"])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_bad_step_changes_neither_weights_nor_the_optimizers_memory(tiny_model, monkeypatch, config, bad, ahead):
    """And the steps after it go as if it had never been; also where the host does not wait for the device."""
    monkeypatch.setattr(step, "update", lambda optimizer, kept, **_: update(optimizer, kept, ahead))
    asked = task(process=tiny_model.process)

    def after(*numbers: int) -> tuple[list[torch.Tensor], list[float]]:
        network = copy.deepcopy(tiny_model.network).train().requires_grad_(True)
        ours, kept = learner(network, config), []
        for number in numbers:
            given, limits = batch(4, 4 * number), None
            if number == BAD and bad in ("nan", "inf"):
                asked_now = dataclasses.replace(asked, codec=Spoilt(float(bad)))
            else:
                asked_now = asked
            if number == BAD and bad in ("loss", "gradient"):
                limits = torch.tensor([1e-3, 1e9] if bad == "loss" else [1e9, 1e-3])
            kept.append(train_step(ours, given, asked_now, 4, 1, limits).applied.item())
        memory = [value for state in ours.optimizer.state.values() for value in state.values()]
        return [*network.state_dict().values(), *memory], kept

    with_it, kept = after(0, BAD, 2)
    without, _ = after(0, 2)
    assert kept == [1, 0, 1]
    assert all(torch.equal(one, other) for one, other in zip(with_it, without, strict=True))


BAD = 1


class Spoilt(Autoencoder):
    """A codec whose latents are no numbers."""

    latent_channels, factor = 1, 1

    def __init__(self, value: float) -> None:
        self.value = value

    def encode(self, pixels, noise):
        return pixels + self.value


def test_a_bad_step_counts_in_no_mean():
    def told(loss: float, kept: float) -> StepMetrics:
        numbers = {"loss": torch.tensor(loss), "gradient_norm": torch.tensor(2 * loss)}
        by_time = torch.full((2, health.BINS), loss)
        return StepMetrics(numbers, torch.tensor(kept), torch.tensor(1.0), by_time, torch.zeros(3))

    tally = MetricAccumulator()
    for loss, kept in ((1.0, 1.0), (math.nan, 0.0), (3.0, 1.0), (1e9, 0.0)):
        tally.add(told(loss, kept))
    assert tally.steps == 4
    assert tally.means() == {"loss": 2.0, "gradient_norm": 4.0, "clipped": 1.0}
    assert tally.loss_by_time() == [1.0] * health.BINS
    assert (tally.steps, tally.means(), tally.loss_by_time()) == (0, {}, [None] * health.BINS)
    tally.add(told(math.inf, 0.0))
    assert tally.means() == {}


# Randomness: of (seed, position) alone


class Recorder(torch.nn.Module):
    """Notes what a network would see, and answers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def forward(self, x, t, condition):
        self.seen.append((x, t, condition.label))
        return torch.zeros(len(x), 2, *x.shape[2:])


def inputs(given: Batch, asked: TrainingObjective):
    recorder = Recorder()
    x0, condition, position = prepare_batch(given, asked, CPU)
    compute_loss(recorder, x0, condition, position, asked)
    return recorder.seen[0]


def test_what_the_network_sees_depends_on_the_position_alone():
    asked = task(flip=True, label_dropout=0.4)
    whole = batch(40, start=1000)
    seen = inputs(whole, asked)
    for chosen in (slice(3, 4), slice(10, 30), torch.tensor([39, 0, 17])):
        for part, all_of_it in zip(inputs(rows(whole, chosen), asked), seen):
            assert torch.equal(part, all_of_it[chosen])


def test_losses_do_not_depend_on_who_shares_the_batch(tiny_model):
    asked = task(process=tiny_model.process, flip=True, label_dropout=0.4)
    whole = batch(20, start=1000)
    x0, condition, position = prepare_batch(whole, asked, CPU)
    together = compute_loss(tiny_model.network, x0, condition, position, asked)[0].total
    for row in (0, 7, 19):
        x0, condition, position = prepare_batch(rows(whole, slice(row, row + 1)), asked, CPU)
        alone = compute_loss(tiny_model.network, x0, condition, position, asked)[0].total
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-5, atol=1e-6)


def test_another_seed_and_another_position_see_other_noise():
    first = inputs(batch(8), task())
    assert not torch.equal(first[0], inputs(batch(8), task(seed=8))[0])
    same = batch(8)
    later = Batch(same.pixels, same.label, same.position + 8)
    assert not torch.equal(first[0], inputs(later, task())[0])
    assert not torch.equal(first[1], inputs(later, task())[1])


def test_every_use_has_a_stream_of_its_own():
    used = (streams.TIME, streams.NOISE, streams.DROP, FLIP, streams.POSTERIOR)
    assert used == (1, 2, 3, 4, 5)  # never renumbered


def test_times_are_those_of_the_process_and_all_are_met():
    _, t, _ = inputs(batch(2000), task())
    assert set(t.tolist()) == set(range(50))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_share_of_labels_withheld_is_the_rate(rate):
    count = 20_000
    given = Batch(torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.ones(count), torch.arange(count))
    _, condition, _ = prepare_batch(given, task(label_dropout=rate), CPU)
    share = (condition.label < 0).float().mean().item()
    assert abs(share - rate) < 4 * math.sqrt(rate * (1 - rate) / count)
    assert set(condition.label.tolist()) == {-1, 1}


def test_no_label_is_withheld_unless_asked():
    _, condition, _ = prepare_batch(batch(500), task(), CPU)
    assert condition.label.tolist() == [position % 3 for position in range(500)]


def test_without_classes_nothing_is_told():
    assert prepare_batch(batch(5), task(classes=0, label_dropout=0.1), CPU)[1].label is None


def test_pixels_are_scaled_to_minus_one_and_one():
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 3)
    x0, _, _ = prepare_batch(Batch(pixels, torch.zeros(1), torch.zeros(1)), task(), CPU)
    torch.testing.assert_close(x0.flatten(), torch.tensor([-1.0, 1.0, -0.6]))


def test_pictures_are_mirrored_only_when_asked():
    given = batch(400)
    plain, _, _ = prepare_batch(given, task(), CPU)
    torch.testing.assert_close(plain, given.pixels.float() / 127.5 - 1)
    mixed, _, _ = prepare_batch(given, task(flip=True), CPU)
    kept = (mixed == plain).flatten(1).all(1)
    mirrored = (mixed == plain.flip(-1)).flatten(1).all(1)
    assert bool((kept ^ mirrored).all())
    assert 150 < int(mirrored.sum()) < 250


def test_latents_are_drawn_from_the_posterior_with_noise_of_the_position(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=2, norm_num_groups=2,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=8, scaling_factor=0.5, force_upcast=False,
    ).save_pretrained(tmp_path)  # fmt: skip
    codec = AutoencoderConfig(source=str(tmp_path)).build()
    asked = task(codec=codec)
    given = batch(3, start=50, channels=3)
    latents, _, _ = prepare_batch(given, asked, CPU)
    posterior = codec.vae.encode(given.pixels.float() / 127.5 - 1).latent_dist
    noise = randomness.normal(asked.seed, given.position, streams.POSTERIOR, (2, 4, 4))
    torch.testing.assert_close(latents, (posterior.mean + posterior.std * noise) * codec.scale)
    assert not torch.allclose(latents, posterior.mean * codec.scale)
