"""Guidance, folded into the denoiser."""

import math

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from tessera.conditioning import Condition
from tessera.diffusion.gaussian import GaussianDiffusionConfig
from tessera.models.dit import DiTConfig
from tessera.sampling.denoiser import Denoiser, GuidanceModel
from tessera.sampling.guidance import (
    ConstantGuidance,
    CosineGuidance,
    Guidance,
    LinearGuidance,
    PoweredCosineGuidance,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Recorder:
    """A network that records its inputs and returns label + 10 channel + time in every pixel."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], list[float]]] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.calls.append((condition.label.tolist(), t.tolist()))
        channel = torch.arange(2 * x.shape[1]).view(1, -1, 1, 1)
        raw = (condition.label + t).view(-1, 1, 1, 1) + 10.0 * channel
        return raw.expand(-1, -1, *x.shape[2:]).clone()


PROCESS = GaussianDiffusionConfig().build()
X, T = normal(3, 4, 2, 2), torch.tensor([0.001, 0.5, 1.0])


def test_scale_1_calls_the_network_once_with_the_condition():
    network = Recorder()
    for guidance in (1.0, torch.ones(3)):
        raw = Denoiser(network, PROCESS, Condition([5, 6, 7]), guidance).raw(X, T)
        assert torch.equal(raw, Recorder()(X, torch.tensor([0.0, 499.0, 999.0]), Condition([5, 6, 7])))
    assert network.calls == [([5, 6, 7], [0, 499, 999])] * 2


def test_the_other_half_is_unconditional():
    network = Recorder()
    Denoiser(network, PROCESS, Condition([5, 6, 7]), 2.0).raw(X, T)
    assert network.calls == [([5, 6, 7, -1, -1, -1], [0, 499, 999, 0, 499, 999])]


def test_scale_0_is_the_unconditional_mean():
    raw = Denoiser(Recorder(), PROCESS, Condition([5, 6, 7]), 0.0).raw(X, T)
    uncond = Recorder()(X, torch.tensor([0.0, 499.0, 999.0]), Condition([-1, -1, -1]))
    torch.testing.assert_close(raw[:, :4], uncond[:, :4])


@pytest.mark.parametrize("guidance", [1.5, [4.0, 1.0, 0.0], [1.0, 1.0, 7.5]])
@pytest.mark.parametrize(("channels", "guided"), [("all", 4), (3, 3), (1, 1), (9, 4)])
def test_the_formula_row_by_row_and_channel_by_channel(guidance, channels, guided):
    """uncond + scale (cond - uncond) on the guided channels; the rest, and all of the variance, conditional."""
    network = Halves()
    cond, uncond = network.cond, network.uncond
    scales = torch.as_tensor(guidance)
    raw = Denoiser(network, PROCESS, Condition([5, 6, 7]), scales, channels).raw(X, T)
    for row, scale in enumerate(scales.expand(3).tolist()):
        for channel in range(8):
            expected = cond[row, channel]
            if channel < guided:
                expected = uncond[row, channel] + scale * (cond[row, channel] - uncond[row, channel])
            torch.testing.assert_close(raw[row, channel], expected, rtol=1e-5, atol=1e-5)
        if scale == 1:
            assert torch.equal(raw[row], cond[row])


def test_the_prediction_is_that_of_the_guided_output():
    denoise = Denoiser(Recorder(), PROCESS, Condition([5, 6, 7]), 3.0)
    got, expected = denoise(X, T), PROCESS.predict(denoise.raw(X, T), X, T)
    for name in ("x0", "eps", "var_fraction"):
        assert torch.equal(getattr(got, name), getattr(expected, name))


@pytest.mark.parametrize("classes", [1, 3, 10, 1000])
def test_a_dit_is_guided_away_from_its_null_label(classes, randomise):
    """For any number of classes, the null class is the row after the last: not 1000."""
    config = DiTConfig(input_size=(4, 4), patch_size=2, depth=1, hidden_size=16, num_heads=2, num_classes=classes)
    network = randomise(config.build())
    label, null, scale = torch.tensor([0, classes - 1, 0]), torch.full((3,), classes), 2.5
    x, steps = normal(3, 4, 4, 4), torch.tensor([0.0, 499.0, 999.0])
    with torch.no_grad():
        raw = Denoiser(network, PROCESS, Condition(label), scale).raw(x, T)
        cond, uncond = network(x, steps, Condition(label)), network(x, steps, Condition(null))
    torch.testing.assert_close(raw[:, :4], (uncond + scale * (cond - uncond))[:, :4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(raw[:, 4:], cond[:, 4:], rtol=1e-4, atol=1e-5)


def test_a_network_without_a_null_row_cannot_be_guided(randomise):
    config = DiTConfig(
        input_size=(4, 4), patch_size=2, depth=1, hidden_size=16, num_heads=2, num_classes=3, learn_null_class=False
    )
    network = randomise(config.build())
    with torch.no_grad(), pytest.raises(ValueError, match="null label"):
        Denoiser(network, PROCESS, Condition([0, 1, 2]), 2.0).raw(normal(3, 4, 4, 4), T)


# At which times, and how much


class Halves:
    """A network of two fixed outputs for each row of X, with and without its condition; records its batch sizes."""

    def __init__(self) -> None:
        self.cond, self.uncond = normal(3, 8, 2, 2, seed=1), normal(3, 8, 2, 2, seed=2)
        self.rows: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.rows.append(len(x))
        row = (x[:, None] == X).flatten(2).all(dim=2).int().argmax(dim=1)
        unconditional = (condition.label < 0).view(-1, 1, 1, 1)
        return torch.where(unconditional, self.uncond[row], self.cond[row])


CONDITION = Condition([5, 6, 7])


@pytest.mark.parametrize(("t", "inside"), [(0.1, False), (0.2, True), (0.5, True), (0.8, True), (0.81, False)])
def test_outside_of_the_interval_there_is_one_call(t, inside):
    network, times = Halves(), torch.full((3,), t, dtype=torch.float64)
    raw = Denoiser(network, PROCESS, CONDITION, 3.0, guidance_interval=(0.2, 0.8)).raw(X, times)
    assert network.rows == [6 if inside else 3]
    expected = Denoiser(Halves(), PROCESS, CONDITION, 3.0 if inside else 1.0).raw(X, times)
    assert torch.equal(raw, expected)


def test_the_interval_applies_to_each_row():
    network, times = Halves(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    raw = Denoiser(network, PROCESS, CONDITION, 3.0, guidance_interval=(0.2, 0.8)).raw(X, times)
    assert torch.equal(raw[0], network.cond[0])
    assert torch.equal(raw[2], network.cond[2])
    torch.testing.assert_close(raw[1, :4], (3 * network.cond - 2 * network.uncond)[1, :4])


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        (LinearGuidance(), lambda t: 2 * (1 - t)),
        (LinearGuidance(min_weight=0.5), lambda t: max(0.5, 2 * (1 - t))),
        (CosineGuidance(), lambda t: math.cos(math.pi * t) + 1),
        (CosineGuidance(min_weight=1.0), lambda t: max(1.0, math.cos(math.pi * t) + 1)),
        (PoweredCosineGuidance(power=1), lambda t: (1 - math.cos(math.pi * (1 - t))) / 2),
        (PoweredCosineGuidance(power=4), lambda t: (1 - math.cos(math.pi * (1 - t) ** 4)) / 2),
    ],
)
def test_schedules_of_the_paper(schedule, formula):
    """The paper writes cond + w (cond - uncond), where w is our scale - 1 (Wang et al. 2024, table 1)."""
    network, t = Halves(), torch.tensor([0.05, 0.4, 0.9], dtype=torch.float64)
    raw = Denoiser(network, PROCESS, CONDITION, 4.0, guidance_schedule=schedule).raw(X, t)
    for row, time in enumerate(t.tolist()):
        weight = 3.0 * formula(time)
        expected = network.cond[row] + weight * (network.cond[row] - network.uncond[row])
        torch.testing.assert_close(raw[row, :4], expected[:4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", [LinearGuidance(), CosineGuidance(), ConstantGuidance()])
def test_the_mean_over_all_times_is_the_guidance_scale(schedule):
    t = (torch.arange(1000) + 0.5) / 1000
    [scales] = Guidance.build(1000, 4.0, schedule=schedule).scales_at(t)
    assert float(scales.mean()) == pytest.approx(4.0)


def test_a_constant_schedule_changes_no_bit():
    scales = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 20 - 5
    assert torch.equal(Guidance.build(1000, scales).scales_at(torch.rand(1000))[0], scales)


def test_where_the_schedule_is_0_there_is_one_call():
    network = Halves()
    Denoiser(network, PROCESS, CONDITION, 4.0, guidance_schedule=LinearGuidance()).raw(X, torch.ones(3))
    assert network.rows == [3]


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescaled_guidance_is_that_of_diffusers(rescale):
    network = Halves()
    raw = Denoiser(network, PROCESS, CONDITION, 7.5, guidance_rescale=rescale).raw(X, T)
    cond, uncond = network.cond[:, :4], network.uncond[:, :4]
    expected = rescale_noise_cfg(uncond + 7.5 * (cond - uncond), cond, guidance_rescale=rescale)
    torch.testing.assert_close(raw[:, :4], expected)
    assert torch.equal(raw[:, 4:], network.cond[:, 4:])


def test_rescaled_zeros_of_a_new_network_stay_zeros():
    network = DiTConfig(input_size=(4, 4), in_channels=4, num_classes=8, depth=1, hidden_size=16, num_heads=2).build()
    condition, guide = (
        Condition(torch.tensor([1, 2, 3])),
        GuidanceModel(lambda x, t, c: torch.zeros(3, 8, 4, 4), CONDITION),
    )
    for away in (None, guide):
        raw = Denoiser(network, PROCESS, condition, 4.0, guidance_model=away, guidance_rescale=0.7).raw(
            normal(3, 4, 4, 4), T
        )
        assert torch.equal(raw, torch.zeros(3, 8, 4, 4))


def test_a_row_of_scale_1_is_the_conditional_output_bit_for_bit():
    network = Halves()
    scales, schedule = torch.tensor([4.0, 1.0, 0.5]), CosineGuidance()
    raw = Denoiser(network, PROCESS, CONDITION, scales, 3, guidance_rescale=0.37, guidance_schedule=schedule).raw(X, T)
    assert torch.equal(raw[1], network.cond[1])
    assert not torch.equal(raw[0], network.cond[0])


def test_autoguidance_passes_the_same_condition_to_both_models():
    network, guide = Recorder(), Recorder()
    denoise = Denoiser(
        network, PROCESS, CONDITION, 2.0, guidance_model=GuidanceModel(lambda *inputs: 0.5 * guide(*inputs), CONDITION)
    )
    raw = denoise.raw(X, T)
    assert network.calls == guide.calls == [([5, 6, 7], [0, 499, 999])]
    alone = Recorder()(X, torch.tensor([0.0, 499.0, 999.0]), CONDITION)
    torch.testing.assert_close(raw[:, :4], 1.5 * alone[:, :4])
    assert torch.equal(raw[:, 4:], alone[:, 4:])


def test_two_calls_equal_one_call_of_both_halves():
    together, apart = Halves(), Halves()
    guide = GuidanceModel(lambda *inputs: apart(*inputs), CONDITION.null())
    one = Denoiser(together, PROCESS, CONDITION, 3.0).raw(X, T)
    assert torch.equal(one, Denoiser(apart, PROCESS, CONDITION, 3.0, guidance_model=guide).raw(X, T))
    assert (together.rows, apart.rows) == ([6], [3, 3])
