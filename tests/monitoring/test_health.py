"""What is measured while a run goes on, against the same worked out by hand."""

import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import layer_norm

from tessera import randomness
from tessera.codecs import PixelsConfig
from tessera.data import Batch
from tessera.diffusion import FlowMatchingConfig, GaussianDiffusionConfig
from tessera.layers.positions import rotary_grid, rotate
from tessera.models.dit import DiTConfig
from tessera.monitoring import health
from tessera.monitoring.health import bin_by_timestep, distance, group_of, groups, largest_logit, probe, wrong_labels
from tessera.training.objective import NOISE, TrainingObjective, prepare_batch

CPU = torch.device("cpu")


def batch(count: int, start: int = 0, size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(start)
    pixels = torch.randint(0, 256, (count, 1, size, size), dtype=torch.uint8, generator=generator)
    position = torch.arange(start, start + count)
    return Batch(pixels, position % 3, position)


def task(**changes) -> TrainingObjective:
    told = {"flip": False, "label_dropout": 0.0, "classes": 3, "seed": 7, "dtype": None}
    return TrainingObjective(
        **{"process": FlowMatchingConfig().build(), "codec": PixelsConfig(channels=1).build(), **told, **changes}
    )


@pytest.fixture
def make(randomise):
    """A network of two blocks, one number a pixel."""

    def build(block: str = "adaln-zero", **changes):
        told = {
            "input_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "num_classes": 3,
            "patch_size": 2,
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
        }
        return randomise(DiTConfig.model_validate({**told, "block": block, **changes}).build())

    return build


# Losses by time


def test_bins_hold_what_numpys_histogram_holds():
    t = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    mse = torch.randn(1000, generator=torch.Generator().manual_seed(1)).square()
    sums, counts = bin_by_timestep(mse, t)
    edges = np.linspace(0, 1, 11)
    assert counts.tolist() == np.histogram(t, edges)[0].tolist()
    np.testing.assert_allclose(sums, np.histogram(t, edges, weights=mse)[0], rtol=1e-5)


def test_the_ends_of_time_fall_into_the_first_and_the_last_bin():
    _, counts = bin_by_timestep(torch.ones(4), torch.tensor([0.0, 0.0999, 0.9, 1.0]))
    assert counts.tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 0, 2]


def test_every_step_of_a_process_of_ten_has_a_bin_of_its_own():
    t = GaussianDiffusionConfig(num_timesteps=10).build().sample_timesteps((torch.arange(10) + 0.5) / 10)
    assert bin_by_timestep(torch.ones(10), t - 0.05)[1].tolist() == [1] * 10


# Parts of the network


@pytest.mark.parametrize(
    ("block", "own"),
    [("adaln-zero", set()), ("rope-swiglu", {"shared"}), ("cross-attention", set()), ("in-context", set())],
)
def test_every_trained_parameter_belongs_to_a_part(make, block, own):
    network = make(block)
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    found, places = groups(names)
    assert set(found) == {"patches", "time", "labels", "blocks.0", "blocks.1", "readout"} | own
    assert [found[place] for place in places.tolist()] == [group_of(name) for name in names]


def test_squared_norms_add_up_by_part(make):
    network = make("rope-swiglu")
    parameters = dict(network.named_parameters())
    found, places = groups(parameters)
    sums = torch.zeros(len(found)).index_add(
        0, places, torch.stack([value.detach().square().sum() for value in parameters.values()])
    )
    modules = {"patches": network.x_embedder, "time": network.t_embedder, "labels": network.y_embedder}
    modules |= {"shared": network.shared, "readout": network.final_layer}
    modules |= {"blocks.0": network.blocks[0], "blocks.1": network.blocks[1]}
    for name, total in zip(found, sums.tolist(), strict=True):
        whole = nn.utils.parameters_to_vector(modules[name].parameters())
        assert total == pytest.approx(whole.square().sum().item(), rel=1e-5), name


def test_blocks_of_two_digits_are_told_apart():
    assert group_of("blocks.1.attn.qkv.weight") == "blocks.1"
    assert group_of("blocks.12.attn.qkv.weight") == "blocks.12"


def test_the_distance_of_many_tensors_is_that_of_one_vector():
    lives = [torch.randn(n % 7 + 1, 5) for n in range(70)]
    means = [live + 0.1 * torch.randn_like(live) for live in lives]
    a, b = (torch.cat([value.flatten() for value in values]) for values in (lives, means))
    apart, length = distance(lives, means).tolist()
    assert math.sqrt(apart / length) == pytest.approx(((b - a).norm() / a.norm()).item(), rel=1e-5)
    assert distance([], []).tolist() == [0, 0]


# Labels


@given(st.lists(st.integers(0, 4), min_size=1, max_size=16))
def test_no_wrong_label_is_right(labels):
    told = torch.tensor(labels)
    wrong = wrong_labels(told, 5)
    assert (wrong != told).all()
    assert ((wrong >= 0) & (wrong < 5)).all()
    if max(map(labels.count, labels)) <= len(labels) // 2:
        assert sorted(wrong.tolist()) == sorted(labels)


# The probe


def seen(network, given: Batch, asked: TrainingObjective):
    """x_t, times, labels, x0 and noise as a probe must see them."""
    x0, condition, position = prepare_batch(given, asked, CPU)
    count = len(x0)
    t = (torch.arange(count) + 0.5) / count
    noise = randomness.normal(asked.seed, position, NOISE, tuple(x0.shape[1:]))
    return (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * noise, t, condition, x0, noise


@pytest.mark.parametrize(
    "block", ["adaln-zero", "adaln", "adaln-single", "rope-swiglu", "cross-attention", "in-context"]
)
@torch.no_grad()
def test_activations_are_those_of_the_blocks_one_by_one(make, block):
    network, given, asked = make(block), batch(4), task()
    found = probe(network, network, given, asked)
    x, t, condition, _, _ = seen(network, given, asked)
    tokens, context = network.embed(x, 1000 * t, condition)
    for number, part in enumerate(network.blocks):
        tokens = part(tokens, context)
        assert found["activations"][number] == pytest.approx(tokens.square().mean().sqrt().item(), rel=1e-5)
    assert len(found["attention_logits"]) == len(found["activations"]) == 2


def logits(qkv, x, heads: int):
    q, k, _ = qkv(x).unflatten(-1, (3, heads, -1)).unbind(2)
    return torch.einsum("blkh,bmkh->bklm", q, k) / q.shape[-1] ** 0.5


@torch.no_grad()
def test_attention_logits_by_hand(make):
    network, given, asked = make(), batch(4), task()
    x, t, condition, _, _ = seen(network, given, asked)
    tokens, context = network.embed(x, 1000 * t, condition)
    found = probe(network, network, given, asked)
    for number, block in enumerate(network.blocks):
        shift, scale = block.adaLN_modulation(context.c)[..., :64].chunk(2, dim=-1)
        entering = layer_norm(tokens, (32,), eps=1e-6) * (1 + scale) + shift
        expected = logits(block.attn.qkv, entering, 2).abs().max().item()
        assert found["attention_logits"][number] == pytest.approx(expected, rel=1e-4)
        tokens = block(tokens, context)


@torch.no_grad()
def test_attention_logits_by_hand_with_equal_lengths_and_angles(make):
    """Queries of length sharpness, keys of length 1 (in rms), both turned by their places."""
    network, given, asked = make("rope-swiglu"), batch(4), task()
    x, t, condition, _, _ = seen(network, given, asked)
    tokens, context = network.embed(x, 1000 * t, condition)
    block = network.blocks[0]
    shift, scale = block.adaLN_modulation(context.shared)[..., :64].chunk(2, dim=-1)
    entering = nn.functional.rms_norm(tokens, (32,), eps=1e-6) * (1 + scale) + shift
    q, k, _ = block.attn.qkv(entering).unflatten(-1, (3, 2, -1)).unbind(2)
    q, k = (nn.functional.rms_norm(each, (16,), eps=1e-6) for each in (q, k))
    q = q * block.attn.qk_scale[:, None]
    q, k = (rotate(each, rotary_grid((4, 4), 16)) for each in (q, k))
    expected = (torch.einsum("blkh,bmkh->bklm", q, k) / 4).abs().max().item()
    assert probe(network, network, given, asked)["attention_logits"][0] == pytest.approx(expected, rel=1e-4)


def test_attention_logits_in_parts_are_those_of_the_whole(monkeypatch):
    q, k = torch.randn(7, 2, 5, 4), torch.randn(7, 2, 3, 4)
    expected = (q.double() @ k.double().mT).abs().max().item() / 2
    for held in (2**23, 2 * 5 * 3 * 2, 1):
        monkeypatch.setattr(health, "LOGITS", held)
        assert largest_logit(q, k).item() == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def test_gates_and_scales_are_those_of_the_steering_vectors(make):
    network, given, asked = make(), batch(4), task()
    _, t, condition, _, _ = seen(network, given, asked)
    context = network.embed_condition(1000 * t, condition, (4, 4))
    found = probe(network, network, given, asked)
    for number, block in enumerate(network.blocks):
        _, scale1, gate1, _, scale2, gate2 = block.adaLN_modulation(context.c).chunk(6, dim=-1)
        for name, both in (("scales", (scale1, scale2)), ("gates", (gate1, gate2))):
            assert found[name][number] == pytest.approx(torch.cat(both).square().mean().sqrt().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("block", "absent"),
    [
        ("adaln", {"gates"}),
        ("in-context", {"gates", "scales"}),
        ("cross-attention", {"gates", "scales"}),
        ("rope-swiglu", set()),
    ],
)
def test_designs_tell_what_they_have(make, block, absent):
    network = make(block)
    found = probe(network, network, batch(4), task())
    assert {"gates", "scales"} - set(found) == absent


@torch.no_grad()
def test_losses_of_weights_average_and_wrong_labels(make, randomise):
    network, averaged, given, asked = make(), randomise(make(), seed=1), batch(4), task()
    x, t, condition, x0, noise = seen(network, given, asked)
    found = probe(network, averaged, given, asked)

    def mse(which, told):
        return (which(x, 1000 * t, told) - (noise - x0)).square().mean().item()

    assert found["loss_probe"] == pytest.approx(mse(network, condition), rel=1e-5)
    assert found["loss_ema"] == pytest.approx(mse(averaged, condition), rel=1e-5)
    wrong = replace(condition, label=wrong_labels(condition.label, 3))
    assert found["loss_wrong_labels"] == pytest.approx(mse(network, wrong), rel=1e-5)


def test_labels_are_not_withheld_and_only_the_first_samples_count(make):
    network, given, asked = make(), batch(40), task()
    first = Batch(given.pixels[:32], given.label[:32], given.position[:32])
    expected = probe(network, network, first, asked)
    assert probe(network, network, given, replace(asked, label_dropout=0.9)) == expected


def test_steps_of_a_process_are_those_it_was_trained_at(make):
    """Between them the network would be told fractions of a step, and the bound has no term."""
    network, process = make(outputs=2), GaussianDiffusionConfig(num_timesteps=20).build()
    heard = []
    network.t_embedder.register_forward_pre_hook(lambda module, given: heard.append(given[0]))
    found = probe(network, network, batch(4), task(process=process))
    assert heard[0].tolist() == [2, 7, 12, 17]
    assert math.isfinite(found["loss_probe"])


def test_without_classes_no_label_is_wrong(make):
    network = make(classes=0)
    assert "loss_wrong_labels" not in probe(network, network, batch(4), task(classes=0))


def test_the_data_by_numpy(make):
    network, given = make(), batch(4)
    pixels = given.pixels.clone()
    pixels[..., :4, :] = 9  # the upper half of every picture
    found = probe(network, network, replace(given, pixels=pixels), task())
    x0 = pixels.numpy() / 127.5 - 1
    assert found["data_mean"] == pytest.approx(x0.mean(), abs=1e-5)
    assert found["data_std"] == pytest.approx(x0.std(), rel=1e-5)
    assert found["data_spread"] == pytest.approx(np.sqrt(x0.var(axis=0, ddof=1).mean()), rel=1e-5)
    assert found["still_patches"] == 0.5


def test_patches_that_say_the_same_are_dead(make):
    network, given = make(), batch(4)
    assert probe(network, network, given, task())["dead_patches"] == 0
    nn.init.zeros_(network.final_layer.linear.weight)
    assert probe(network, network, given, task())["dead_patches"] == 1


def test_one_sample_says_nothing_of_differences(make):
    found = probe(make(), make(), batch(1), task())
    assert not {"data_spread", "still_patches", "dead_patches"} & set(found)
    assert math.isfinite(found["loss_probe"])


def test_what_is_not_a_number_is_none(make):
    network = make()
    nn.init.constant_(network.blocks[1].mlp.fc2.weight, math.nan)
    found = probe(network, make(), batch(4), task())
    assert found["activations"][1] is None
    assert found["activations"][0] is not None
    assert found["loss_probe"] is None
    assert found["loss_ema"] is not None


def test_a_probe_leaves_nothing_behind(make):
    """No hook, no gradient, no change of the weights; also where the network fails."""
    network, given = make("rope-swiglu"), batch(4)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    probe(network, network, given, task())
    with pytest.raises(ValueError, match="give Condition"):
        probe(network, network, given, task(classes=0))
    for module in network.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_what_is_compiled_stays_so_and_is_looked_into(make):
    """A probe neither compiles nor makes the next step compile anew, though its batch is another and it has hooks."""
    network, given, asked = make(), batch(4), task()
    expected = probe(network, network, given, asked)
    compiled = []

    def backend(module, inputs):
        compiled.append(module)
        return module.forward

    for block in network.blocks:
        block.compile(backend=backend)
    inputs = seen(network, batch(20), asked)
    network(inputs[0], inputs[1], inputs[2])
    count = len(compiled)
    assert count > 0
    assert probe(network, network, given, asked) == expected
    network(inputs[0], inputs[1], inputs[2])
    assert len(compiled) == count


@pytest.mark.parametrize("block", ["adaln-zero", "rope-swiglu", "cross-attention"])
def test_no_device_is_waited_for_before_the_end(make, monkeypatch, block):
    """A device whose tensors hold no numbers cannot answer: whoever asked it for one would fail."""
    assert bin_by_timestep(torch.ones(4, device="meta"), torch.rand(4)).shape == (2, 10)
    lives = [torch.ones(3, device="meta")]
    assert distance(lives, lives).shape == (2,)
    monkeypatch.setattr(health, "_numbers", set)
    monkeypatch.setattr(health.runtime, "autocast", lambda dtype, device: nullcontext())  # knows no such device
    expected = probe(make(block), make(block), batch(4), task(flip=True))
    assert probe(make(block).to("meta"), make(block).to("meta"), batch(4), task(flip=True)) == expected
