"""One step: what is random, the gradients, the update."""

import math

import pytest
import torch

from tessera import randomness
from tessera.codecs import AutoencoderConfig, PixelsConfig
from tessera.data import Batch
from tessera.process.gaussian import GaussianConfig
from tessera.training import step
from tessera.training.recipe import Adam
from tessera.training.step import Task, losses, prepare, train_step

CPU = torch.device("cpu")


def batch(count: int, start: int = 0, channels: int = 1, size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(start)
    pixels = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)
    position = torch.arange(start, start + count)
    return Batch(pixels, position % 3, position)


def rows(whole: Batch, chosen) -> Batch:
    return Batch(whole.pixels[chosen], whole.label[chosen], whole.position[chosen])


def task(**changes) -> Task:
    told = {"flip": False, "label_dropout": 0.0, "classes": 3, "seed": 7, "dtype": None}
    process = GaussianConfig(steps=50).build()
    return Task(**{"process": process, "codec": PixelsConfig(channels=1).build(), **told, **changes})


def test_frozen_weights_are_left_alone(tiny_model):
    tiny_model.network.train().requires_grad_(True)
    tiny_model.network.pos_embed.requires_grad_(False)
    before = tiny_model.network.pos_embed.clone()
    optimizer = Adam(weight_decay=0.5).build(tiny_model.network)
    train_step(tiny_model.network, optimizer, batch(4), task(), Adam(), 4)
    assert torch.equal(tiny_model.network.pos_embed, before)


# Gradients


def moved(network, given: Batch, micro: int, asked: Task, clip: float | None = None):
    """The gradient, as the way the weights go under plain descent with rate 1; and what the step tells."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD([weight for weight in network.parameters() if weight.requires_grad], lr=1.0)
    told = train_step(network, optimizer, given, asked, Adam(clip=clip), micro)
    gradient = {name: before[name] - value for name, value in network.state_dict().items()}
    network.load_state_dict(before)
    assert all(weight.grad is None for weight in network.parameters())
    return gradient, told


@pytest.mark.parametrize("micro", [1, 4, 5, 100])
def test_micro_batches_give_the_gradient_of_the_whole(tiny_model, micro):
    asked = task(process=tiny_model.process, flip=True, label_dropout=0.3)
    whole, told = moved(tiny_model.network, batch(12), 12, asked)
    parts, told_too = moved(tiny_model.network, batch(12), micro, asked)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-6 * max(1, float(whole[name].abs().max())))
    assert set(told) == {"loss", "mse", "vb", "gradient_norm"}
    for name, value in told.items():
        assert told_too[name].item() == pytest.approx(value.item(), rel=1e-5)


def test_the_gradient_is_that_of_the_mean_loss(tiny_model):
    asked = task(process=tiny_model.process)
    network = tiny_model.network
    found, told = moved(network, batch(6), 6, asked)
    x0, condition, position = prepare(batch(6), asked, CPU)
    loss = losses(network, x0, condition, position, asked).total.mean()
    loss.backward()
    norm = torch.cat([weight.grad.flatten() for weight in network.parameters() if weight.grad is not None]).norm()
    assert told["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    assert told["gradient_norm"].item() == pytest.approx(norm.item(), rel=1e-5)
    for name, weight in network.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(found[name], weight.grad, rtol=0, atol=1e-5)


def test_clipping_shortens_the_gradient_but_not_what_is_told(tiny_model):
    asked = task(process=tiny_model.process)
    _, free = moved(tiny_model.network, batch(6), 6, asked)
    clip = free["gradient_norm"].item() / 10
    gradient, told = moved(tiny_model.network, batch(6), 6, asked, clip)
    assert torch.cat([value.flatten() for value in gradient.values()]).norm().item() == pytest.approx(clip, rel=1e-3)
    assert told["gradient_norm"].item() == pytest.approx(free["gradient_norm"].item(), rel=1e-6)


# Randomness: of (seed, position) alone


class Recorder(torch.nn.Module):
    """Notes what a network would see, and answers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def forward(self, x, t, condition):
        self.seen.append((x, t, condition.label))
        return torch.zeros(len(x), 2, *x.shape[2:])


def inputs(given: Batch, asked: Task):
    recorder = Recorder()
    x0, condition, position = prepare(given, asked, CPU)
    losses(recorder, x0, condition, position, asked)
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
    x0, condition, position = prepare(whole, asked, CPU)
    together = losses(tiny_model.network, x0, condition, position, asked).total
    for row in (0, 7, 19):
        x0, condition, position = prepare(rows(whole, slice(row, row + 1)), asked, CPU)
        alone = losses(tiny_model.network, x0, condition, position, asked).total
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-5, atol=1e-6)


def test_another_seed_and_another_position_see_other_noise():
    first = inputs(batch(8), task())
    assert not torch.equal(first[0], inputs(batch(8), task(seed=8))[0])
    same = batch(8)
    later = Batch(same.pixels, same.label, same.position + 8)
    assert not torch.equal(first[0], inputs(later, task())[0])
    assert not torch.equal(first[1], inputs(later, task())[1])


def test_every_use_has_a_stream_of_its_own():
    streams = (step.TIME, step.NOISE, step.DROP, step.FLIP, step.POSTERIOR)
    assert streams == (1, 2, 3, 4, 5)  # never renumbered


def test_times_are_those_of_the_process_and_all_are_met():
    _, t, _ = inputs(batch(2000), task())
    assert set(t.tolist()) == set(range(50))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_share_of_labels_withheld_is_the_rate(rate):
    count = 20_000
    given = Batch(torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.ones(count), torch.arange(count))
    _, condition, _ = prepare(given, task(label_dropout=rate), CPU)
    share = (condition.label < 0).float().mean().item()
    assert abs(share - rate) < 4 * math.sqrt(rate * (1 - rate) / count)
    assert set(condition.label.tolist()) == {-1, 1}


def test_no_label_is_withheld_unless_asked():
    _, condition, _ = prepare(batch(500), task(), CPU)
    assert condition.label.tolist() == [position % 3 for position in range(500)]


def test_without_classes_nothing_is_told():
    assert prepare(batch(5), task(classes=0, label_dropout=0.1), CPU)[1].label is None


def test_pixels_are_scaled_to_minus_one_and_one():
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 3)
    x0, _, _ = prepare(Batch(pixels, torch.zeros(1), torch.zeros(1)), task(), CPU)
    torch.testing.assert_close(x0.flatten(), torch.tensor([-1.0, 1.0, -0.6]))


def test_pictures_are_mirrored_only_when_asked():
    given = batch(400)
    plain, _, _ = prepare(given, task(), CPU)
    torch.testing.assert_close(plain, given.pixels.float() / 127.5 - 1)
    mixed, _, _ = prepare(given, task(flip=True), CPU)
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
    latents, _, _ = prepare(given, asked, CPU)
    posterior = codec.vae.encode(given.pixels.float() / 127.5 - 1).latent_dist
    noise = randomness.normal(asked.seed, given.position, step.POSTERIOR, (2, 4, 4))
    torch.testing.assert_close(latents, (posterior.mean + posterior.std * noise) * codec.scale)
    assert not torch.allclose(latents, posterior.mean * codec.scale)
