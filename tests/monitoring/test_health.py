"""Health metrics against the same computed by hand."""

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
from tessera.conditioning import Condition
from tessera.data import Batch
from tessera.diffusion import FlowMatchingConfig, GaussianDiffusionConfig
from tessera.layers.positions import apply_rope, rope_grid
from tessera.models.dit import DiTConfig
from tessera.monitoring import health
from tessera.monitoring.health import (
    bin_by_timestep,
    changed_rows,
    largest_logit,
    other_rows,
    parameter_group,
    parameter_groups,
    squared_distance,
    wrong_conditions,
    wrong_labels,
    wrong_metrics,
)
from tessera.training.objective import NOISE_STREAM, TrainingObjective, prepare_batch, probe_inputs

CPU = torch.device("cpu")


def batch(count: int, start: int = 0, size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(start)
    pixels = torch.randint(0, 256, (count, 1, size, size), dtype=torch.uint8, generator=generator)
    position = torch.arange(start, start + count)
    return Batch(pixels, Condition(position % 3), position)


def without_labels(inputs: Batch) -> Batch:
    return Batch(inputs.pixels, Condition(), inputs.position)


def make_objective(**changes) -> TrainingObjective:
    defaults = {"hflip": False, "condition_dropout": 0.0, "null_fields": ("label",), "seed": 7, "dtype": None}
    defaults |= {"diffusion": FlowMatchingConfig().build(), "codec": PixelsConfig(channels=1).build()}
    return TrainingObjective(**{**defaults, **changes})


def probe(network, ema_network, inputs: Batch, objective: TrainingObjective, num_classes: int = 3) -> dict:
    device = next(network.parameters()).device
    tensors = probe_inputs(inputs, objective, device)
    return health.probe(network, ema_network, *tensors, objective.diffusion, num_classes, objective.dtype)


@pytest.fixture
def make(randomise):
    """A network of two blocks for grayscale images."""

    def build(block: str = "adaln-zero", **changes):
        defaults = {
            "input_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "num_classes": 3,
            "patch_size": 2,
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
        }
        return randomise(DiTConfig.model_validate({**defaults, "block": block, **changes}).build())

    return build


# Losses by timestep


def test_bins_are_those_of_numpys_histogram():
    t = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    mse = torch.randn(1000, generator=torch.Generator().manual_seed(1)).square()
    sums, counts = bin_by_timestep(mse, t)
    edges = np.linspace(0, 1, 11)
    assert counts.tolist() == np.histogram(t, edges)[0].tolist()
    np.testing.assert_allclose(sums, np.histogram(t, edges, weights=mse)[0], rtol=1e-5)


def test_the_ends_are_in_the_first_and_the_last_bin():
    _, counts = bin_by_timestep(torch.ones(4), torch.tensor([0.0, 0.0999, 0.9, 1.0]))
    assert counts.tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 0, 2]


def test_ten_discrete_timesteps_have_one_bin_each():
    t = GaussianDiffusionConfig(num_timesteps=10).build().sample_timesteps((torch.arange(10) + 0.5) / 10)
    assert bin_by_timestep(torch.ones(10), t - 0.05)[1].tolist() == [1] * 10


# Parameter groups


@pytest.mark.parametrize(
    ("block", "own"),
    [("adaln-zero", set()), ("rope-swiglu", {"shared"}), ("cross-attention", set()), ("in-context", set())],
)
def test_every_trained_parameter_is_in_a_group(make, block, own):
    network = make(block)
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    groups, indices = parameter_groups(names)
    assert set(groups) == {"patches", "time", "labels", "blocks.0", "blocks.1", "head"} | own
    assert [groups[index] for index in indices.tolist()] == [parameter_group(name) for name in names]


def test_squared_norms_add_up_by_group(make):
    network = make("rope-swiglu")
    parameters = dict(network.named_parameters())
    groups, indices = parameter_groups(parameters)
    sums = torch.zeros(len(groups)).index_add(
        0, indices, torch.stack([value.detach().square().sum() for value in parameters.values()])
    )
    modules = {"patches": network.x_embedder, "time": network.t_embedder, "labels": network.y_embedder}
    modules |= {"shared": network.shared, "head": network.final_layer}
    modules |= {"blocks.0": network.blocks[0], "blocks.1": network.blocks[1]}
    for name, total in zip(groups, sums.tolist(), strict=True):
        whole = nn.utils.parameters_to_vector(modules[name].parameters())
        assert total == pytest.approx(whole.square().sum().item(), rel=1e-5), name


def test_block_numbers_of_two_digits_are_distinguished():
    assert parameter_group("blocks.1.attn.qkv.weight") == "blocks.1"
    assert parameter_group("blocks.12.attn.qkv.weight") == "blocks.12"


def test_the_distance_of_many_tensors_is_that_of_one_vector():
    weights = [torch.randn(n % 7 + 1, 5) for n in range(70)]
    averages = [weight + 0.1 * torch.randn_like(weight) for weight in weights]
    a, b = (torch.cat([value.flatten() for value in values]) for values in (weights, averages))
    distance, norm = squared_distance(weights, averages).tolist()
    assert math.sqrt(distance / norm) == pytest.approx(((b - a).norm() / a.norm()).item(), rel=1e-5)
    assert squared_distance([], []).tolist() == [0, 0]


# Labels


@given(st.lists(st.integers(0, 4), min_size=1, max_size=16))
def test_no_wrong_label_is_correct(labels):
    correct = torch.tensor(labels)
    wrong = wrong_labels(correct, 5)
    assert (wrong != correct).all()
    assert ((wrong >= 0) & (wrong < 5)).all()
    if max(map(labels.count, labels)) <= len(labels) // 2:
        assert sorted(wrong.tolist()) == sorted(labels)


# The probe


def expected_inputs(inputs: Batch, objective: TrainingObjective):
    """x_t, timesteps, condition, x0 and noise of a probe."""
    x0, condition, position = prepare_batch(inputs, objective, CPU)
    count = len(x0)
    t = (torch.arange(count) + 0.5) / count
    noise = randomness.normal(objective.seed, position, NOISE_STREAM, tuple(x0.shape[1:]))
    return (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * noise, t, condition, x0, noise


@pytest.mark.parametrize(
    "block", ["adaln-zero", "adaln", "adaln-single", "rope-swiglu", "cross-attention", "in-context"]
)
@torch.no_grad()
def test_activations_are_those_of_each_block(make, block):
    network, inputs, objective = make(block), batch(4), make_objective()
    metrics = probe(network, network, inputs, objective)
    x, t, condition, _, _ = expected_inputs(inputs, objective)
    tokens, context = network.embed(x, 1000 * t, condition)
    for number, part in enumerate(network.blocks):
        tokens = part(tokens, context)
        assert metrics["activations"][number] == pytest.approx(tokens.square().mean().sqrt().item(), rel=1e-5)
    assert len(metrics["attention_logits"]) == len(metrics["activations"]) == 2


def logits(qkv, x, heads: int):
    q, k, _ = qkv(x).unflatten(-1, (3, heads, -1)).unbind(2)
    return torch.einsum("blkh,bmkh->bklm", q, k) / q.shape[-1] ** 0.5


@torch.no_grad()
def test_attention_logits_by_hand(make):
    network, inputs, objective = make(), batch(4), make_objective()
    x, t, condition, _, _ = expected_inputs(inputs, objective)
    tokens, context = network.embed(x, 1000 * t, condition)
    metrics = probe(network, network, inputs, objective)
    for number, block in enumerate(network.blocks):
        shift, scale = block.adaLN_modulation(context.c)[..., :64].chunk(2, dim=-1)
        entering = layer_norm(tokens, (32,), eps=1e-6) * (1 + scale) + shift
        expected = logits(block.attn.qkv, entering, 2).abs().max().item()
        assert metrics["attention_logits"][number] == pytest.approx(expected, rel=1e-4)
        tokens = block(tokens, context)


@torch.no_grad()
def test_attention_logits_by_hand_with_qk_norm_and_rope(make):
    """Queries of rms qk_scale, keys of rms 1, both rotated by their positions."""
    network, inputs, objective = make("rope-swiglu"), batch(4), make_objective()
    x, t, condition, _, _ = expected_inputs(inputs, objective)
    tokens, context = network.embed(x, 1000 * t, condition)
    block = network.blocks[0]
    shift, scale = block.adaLN_modulation(context.shared_modulation)[..., :64].chunk(2, dim=-1)
    entering = nn.functional.rms_norm(tokens, (32,), eps=1e-6) * (1 + scale) + shift
    q, k, _ = block.attn.qkv(entering).unflatten(-1, (3, 2, -1)).unbind(2)
    q, k = (nn.functional.rms_norm(each, (16,), eps=1e-6) for each in (q, k))
    q = q * block.attn.qk_scale[:, None]
    q, k = (apply_rope(each, rope_grid((4, 4), 16)) for each in (q, k))
    expected = (torch.einsum("blkh,bmkh->bklm", q, k) / 4).abs().max().item()
    assert probe(network, network, inputs, objective)["attention_logits"][0] == pytest.approx(expected, rel=1e-4)


def test_attention_logits_in_parts_are_those_of_all(monkeypatch):
    q, k = torch.randn(7, 2, 5, 4), torch.randn(7, 2, 3, 4)
    expected = (q.double() @ k.double().mT).abs().max().item() / 2
    for maximum in (2**23, 2 * 5 * 3 * 2, 1):
        monkeypatch.setattr(health, "MAX_LOGITS", maximum)
        assert largest_logit(q, k).item() == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def test_gates_and_scales_are_those_of_the_modulation(make):
    network, inputs, objective = make(), batch(4), make_objective()
    _, t, condition, _, _ = expected_inputs(inputs, objective)
    context = network.embed_condition(1000 * t, condition, (4, 4))
    metrics = probe(network, network, inputs, objective)
    for number, block in enumerate(network.blocks):
        _, scale1, gate1, _, scale2, gate2 = block.adaLN_modulation(context.c).chunk(6, dim=-1)
        for name, both in (("scales", (scale1, scale2)), ("gates", (gate1, gate2))):
            assert metrics[name][number] == pytest.approx(torch.cat(both).square().mean().sqrt().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("block", "absent"),
    [
        ("adaln", {"gates"}),
        ("in-context", {"gates", "scales"}),
        ("cross-attention", {"gates", "scales"}),
        ("rope-swiglu", set()),
    ],
)
def test_statistics_that_a_design_does_not_have_are_absent(make, block, absent):
    network = make(block)
    metrics = probe(network, network, batch(4), make_objective())
    assert {"gates", "scales"} - set(metrics) == absent


@torch.no_grad()
def test_losses_of_weights_ema_and_wrong_labels(make, randomise):
    network, ema_network, inputs, objective = make(), randomise(make(), seed=1), batch(4), make_objective()
    x, t, condition, x0, noise = expected_inputs(inputs, objective)
    metrics = probe(network, ema_network, inputs, objective)

    def mse(network, condition):
        return (network(x, 1000 * t, condition) - (noise - x0)).square().mean().item()

    assert metrics["loss_probe"] == pytest.approx(mse(network, condition), rel=1e-5)
    assert metrics["loss_ema"] == pytest.approx(mse(ema_network, condition), rel=1e-5)
    wrong = replace(condition, label=wrong_labels(condition.label, 3))
    assert metrics["loss_wrong_labels"] == pytest.approx(mse(network, wrong), rel=1e-5)


@torch.no_grad()
def test_the_cost_of_wrong_labels_has_its_standard_error(make):
    network, inputs, objective = make(), batch(4), make_objective()
    x, t, condition, x0, noise = expected_inputs(inputs, objective)
    metrics = probe(network, network, inputs, objective)
    wrong = replace(condition, label=wrong_labels(condition.label, 3))
    outputs = [network(x, 1000 * t, each).double().numpy() for each in (condition, wrong)]
    right, other = (np.square(output - (noise - x0).numpy()).mean(axis=(1, 2, 3)) for output in outputs)
    assert metrics["cost_wrong_labels"] == pytest.approx((other - right).mean() / right.mean(), rel=1e-4)
    error = (other - right).std(ddof=1) / math.sqrt(4) / right.mean()
    assert metrics["error_wrong_labels"] == pytest.approx(error, rel=1e-4)
    change = np.sqrt(np.square(outputs[1] - outputs[0]).sum() / np.square(outputs[0]).sum())
    assert metrics["change_wrong_labels"] == pytest.approx(change, rel=1e-4)


@pytest.mark.parametrize("block", ["adaln-zero", "rope-swiglu", "cross-attention", "in-context"])
@torch.no_grad()
def test_labels_without_effect_cost_exactly_nothing(make, block):
    network = make(block)
    network.y_embedder.embedding_table.weight.zero_()
    metrics = probe(network, network, batch(4), make_objective())
    assert [metrics[f"{name}_wrong_labels"] for name in ("cost", "error", "change")] == [0, 0, 0]
    assert metrics["norm_labels"] == 0
    assert metrics["norm_time"] > 0


@torch.no_grad()
def test_norms_of_the_vectors_of_time_and_labels(make):
    network, objective = make(), make_objective()
    _, t, condition, _, _ = expected_inputs(batch(4), objective)
    metrics = probe(network, network, batch(4), objective)
    for name, vectors in (("time", network.t_embedder(1000 * t)), ("labels", network.y_embedder(condition.label))):
        assert metrics[f"norm_{name}"] == pytest.approx(vectors.norm(dim=-1).mean().item(), rel=1e-5)


class KnowsTheImage(nn.Module):
    """Predicts the velocity of the image that the condition describes: wrong conditions are all that it errs in."""

    def __init__(self, config, noisy, t, images, find) -> None:
        super().__init__()
        self.config, self.blocks, self.find = config, nn.ModuleList(), find
        self.noisy, self.t, self.images = noisy, t.view(-1, 1, 1, 1), images
        self.error = nn.Parameter(torch.tensor(0.01))

    def forward(self, x, t, condition):
        image = self.images[self.find(condition)]
        return (self.noisy - image) / self.t + self.error


@pytest.mark.parametrize("kind", ["labels", "captions", "controls"])
@torch.no_grad()
def test_every_kind_of_condition_is_measured(make, kind):
    """A network that knows the images from their conditions, and one that ignores these."""
    inputs, objective, rows = batch(4), make_objective(), torch.arange(4)
    inputs = replace(inputs, pixels=(inputs.pixels % 2) * 255)
    noisy, t, _, images, _ = expected_inputs(inputs, objective)
    condition, find = {
        "labels": (Condition(rows), lambda condition: condition.label),
        "captions": (
            Condition(text=rows[:, None], text_mask=torch.ones(4, 1, dtype=torch.bool)),
            lambda condition: condition.text[:, 0],
        ),
        "controls": (Condition(control=images[:, None]), lambda condition: nearest(condition.control[:, 0], images)),
    }[kind]
    inputs = replace(inputs, condition=condition)
    config = make().config
    oracle = KnowsTheImage(config, noisy, t, images, find)
    metrics = probe(oracle, oracle, inputs, objective, num_classes=4)
    assert metrics[f"cost_wrong_{kind}"] > 100
    assert metrics[f"cost_wrong_{kind}"] > metrics[f"error_wrong_{kind}"] > 0
    assert metrics[f"change_wrong_{kind}"] > 0.1
    ignorant = KnowsTheImage(config, noisy, t, images, lambda condition: rows)
    metrics = probe(ignorant, ignorant, inputs, objective, num_classes=4)
    assert [metrics[f"{name}_wrong_{kind}"] for name in ("cost", "error", "change")] == [0, 0, 0]


def nearest(images, others):
    return torch.cdist(images.flatten(1), others.flatten(1)).argmin(dim=1)


@torch.no_grad()
def test_rows_whose_condition_is_the_same_do_not_count(make):
    """Five samples have one caption: at least three of them keep it, and if all have it there is nothing to measure."""
    _, _, _, images, noise = expected_inputs(batch(6), make_objective())
    text = torch.tensor([[0], [0], [0], [0], [0], [1]])
    condition = Condition(text=text, text_mask=torch.ones(6, 1, dtype=torch.bool))
    wrong = wrong_conditions(condition, 0)["captions"]
    changed = changed_rows(condition, wrong)
    assert changed.tolist() == [bool(a != b) for a, b in zip(text[:, 0], wrong.text[:, 0])]
    assert changed.sum() == 2
    right, other = torch.rand(6), torch.rand(6)
    metrics = wrong_metrics(images, right, noise, other, changed)
    rises = (other - right)[changed].numpy()
    assert metrics["cost"].item() == pytest.approx(rises.mean() / right[changed].mean().item(), rel=1e-4)
    error = rises.std(ddof=1) / math.sqrt(2) / right[changed].mean().item()
    assert metrics["error"].item() == pytest.approx(error, rel=1e-4)
    same = replace(condition, text=torch.zeros_like(text))
    metrics = probe(ReadsIds(make()), ReadsIds(make()), replace(batch(6), condition=same), make_objective())
    assert metrics["loss_wrong_captions"] == metrics["loss_probe"]
    assert [metrics[f"{name}_wrong_captions"] for name in ("cost", "error", "change")] == [None] * 3


class ReadsIds(nn.Module):
    """The output is the first token of the text."""

    def __init__(self, network) -> None:
        super().__init__()
        self.config, self.blocks = network.config, nn.ModuleList()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, t, condition):
        return torch.zeros_like(x) + self.scale * condition.text[:, :1, None, None]


def test_labels_are_not_dropped_and_only_the_first_samples_are_used(make):
    network, inputs, objective = make(), batch(40), make_objective()
    first = inputs[:32]
    expected = probe(network, network, first, objective)
    assert probe(network, network, inputs, replace(objective, condition_dropout=0.9)) == expected


def test_timesteps_of_a_discrete_process_are_those_of_training(make):
    network, diffusion = make(out_channels=2), GaussianDiffusionConfig(num_timesteps=20).build()
    timesteps = []
    network.t_embedder.register_forward_pre_hook(lambda module, args: timesteps.append(args[0]))
    metrics = probe(network, network, batch(4), make_objective(diffusion=diffusion))
    assert timesteps[0][:, 0].tolist() == [2, 7, 12, 17]
    assert math.isfinite(metrics["loss_probe"])


class ReadsText(nn.Module):
    """The output is the first channel of the valid text tokens' mean."""

    def __init__(self, network) -> None:
        super().__init__()
        self.config, self.blocks = network.config, nn.ModuleList()
        self.scale = nn.Parameter(torch.ones(()))
        self.conditions: list[Condition] = []

    def forward(self, x, t, condition):
        self.conditions.append(condition)
        weights = condition.text_mask.float()[..., None]
        mean = (condition.text * weights).sum(1) / weights.sum(1)
        return torch.zeros_like(x) + self.scale * mean[:, :1, None, None]


@torch.no_grad()
def test_wrong_captions_are_those_of_other_samples_with_their_masks(make):
    generator = torch.Generator().manual_seed(0)
    text, lengths = torch.randn(4, 3, 5, generator=generator), torch.tensor([1, 2, 3, 1])
    text[3] = text[0]  # two samples have one caption
    mask = torch.arange(3) < lengths[:, None]
    inputs = replace(batch(4), condition=Condition(text=text, text_mask=mask))
    network, objective = ReadsText(make()), make_objective()
    metrics = probe(network, network, inputs, objective, num_classes=0)
    _, _, _, x0, noise = expected_inputs(inputs, objective)
    wrong = network.conditions[-1]
    rows = [int((text == each).flatten(1).all(1).nonzero()[0]) for each in wrong.text]
    assert all(not torch.equal(wrong.text[row], text[row]) for row in range(4))
    assert torch.equal(wrong.text_mask.sum(1), lengths[rows])
    output = ReadsText(make())(x0, None, wrong)
    assert metrics["loss_wrong_captions"] == pytest.approx((output - (noise - x0)).square().mean().item(), rel=1e-5)
    assert "loss_wrong_labels" not in metrics


@pytest.mark.parametrize("text", [torch.tensor([[3, 4], [-1, -1], [3, 4], [5, 6], [7, 8]]), torch.ones(5, 2, 3)])
def test_rows_are_replaced_by_different_ones(text):
    """Ids, and embeddings of which some are null."""
    if text.is_floating_point():
        text = torch.stack([text[0], text[0] * float("nan"), text[0], text[0] * 2, text[0] * 3])
    rows = other_rows(text)
    assert sorted(rows.tolist()) == list(range(5))
    assert not any(torch.equal(text[row], text[other]) for row, other in enumerate(rows))


@torch.no_grad()
def test_a_network_with_labels_and_captions_has_both(make):
    condition = Condition(torch.arange(4), torch.randn(4, 3, 5), torch.ones(4, 3, dtype=torch.bool))
    wrong = wrong_conditions(condition, 4)
    assert list(wrong) == ["labels", "captions"]
    assert torch.equal(wrong["labels"].text, condition.text)
    assert torch.equal(wrong["captions"].label, condition.label)
    assert list(wrong_conditions(condition[:1], 1)) == []


def test_without_classes_there_are_no_wrong_labels(make):
    network = make(num_classes=0)
    assert "loss_wrong_labels" not in probe(network, network, without_labels(batch(4)), make_objective())


def test_data_statistics_by_numpy(make):
    network, inputs = make(), batch(4)
    pixels = inputs.pixels.clone()
    pixels[..., :4, :] = 9  # the upper half of every image
    metrics = probe(network, network, replace(inputs, pixels=pixels), make_objective())
    x0 = pixels.numpy() / 127.5 - 1
    assert metrics["data_mean"] == pytest.approx(x0.mean(), abs=1e-5)
    assert metrics["data_std"] == pytest.approx(x0.std(), rel=1e-5)
    assert metrics["data_spread"] == pytest.approx(np.sqrt(x0.var(axis=0, ddof=1).mean()), rel=1e-5)
    assert metrics["still_patches"] == 0.5


def test_patches_with_constant_output_are_dead(make):
    network, inputs = make(), batch(4)
    assert probe(network, network, inputs, make_objective())["dead_patches"] == 0
    nn.init.zeros_(network.final_layer.linear.weight)
    assert probe(network, network, inputs, make_objective())["dead_patches"] == 1


def test_one_sample_has_no_spread(make):
    metrics = probe(make(), make(), batch(1), make_objective())
    assert not {"data_spread", "still_patches", "dead_patches"} & set(metrics)
    assert math.isfinite(metrics["loss_probe"])


def test_values_that_are_not_finite_are_none(make):
    network = make()
    nn.init.constant_(network.blocks[1].mlp.fc2.weight, math.nan)
    metrics = probe(network, make(), batch(4), make_objective())
    assert metrics["activations"][1] is None
    assert metrics["activations"][0] is not None
    assert metrics["loss_probe"] is None
    assert metrics["loss_ema"] is not None


def test_a_probe_has_no_side_effects(make):
    """No hook, no gradient, no change of the weights; also where the network fails."""
    network, inputs = make("rope-swiglu"), batch(4)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    probe(network, network, inputs, make_objective())
    with pytest.raises(ValueError, match="pass Condition"):
        probe(network, network, without_labels(inputs), make_objective())
    for module in network.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_compiled_blocks_stay_compiled_and_can_be_probed(make):
    """A probe does not compile and does not trigger recompilation, despite its batch size and its hooks."""
    network, inputs, objective = make(), batch(4), make_objective()
    expected = probe(network, network, inputs, objective)
    compiled = []

    def backend(module, inputs):
        compiled.append(module)
        return module.forward

    for block in network.blocks:
        block.compile(backend=backend)
    others = expected_inputs(batch(20), objective)
    network(*others[:3])
    count = len(compiled)
    assert count > 0
    assert probe(network, network, inputs, objective) == expected
    network(*others[:3])
    assert len(compiled) == count


@pytest.mark.parametrize("block", ["adaln-zero", "rope-swiglu", "cross-attention"])
def test_the_device_is_not_waited_for_before_the_end(make, monkeypatch, block):
    """Tensors on the meta device have no values, so a transfer to the host would fail."""
    assert bin_by_timestep(torch.ones(4, device="meta"), torch.rand(4)).shape == (2, 10)
    weights = [torch.ones(3, device="meta")]
    assert squared_distance(weights, weights).shape == (2,)
    monkeypatch.setattr(health, "_to_numbers", set)
    monkeypatch.setattr(health.runtime, "autocast", lambda dtype, device: nullcontext())  # does not support the device
    expected = probe(make(block), make(block), batch(4), make_objective(hflip=True))
    assert probe(make(block).to("meta"), make(block).to("meta"), batch(4), make_objective(hflip=True)) == expected
