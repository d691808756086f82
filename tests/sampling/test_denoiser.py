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
from tessera.sampling.guidance import ConstantGuidance, CosineGuidance, LinearGuidance, PoweredCosineGuidance


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Recorder:
    """A network whose output tells what it was asked: label + 10 channel + time, in every pixel."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], list[float]]] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.asked.append((condition.label.tolist(), t.tolist()))
        channel = torch.arange(2 * x.shape[1]).view(1, -1, 1, 1)
        told = (condition.label + t).view(-1, 1, 1, 1) + 10.0 * channel
        return told.expand(-1, -1, *x.shape[2:]).clone()


PROCESS = GaussianDiffusionConfig().build()
X, T = normal(3, 4, 2, 2), torch.tensor([0.001, 0.5, 1.0])


def test_scale_1_asks_once_and_is_the_conditional():
    network = Recorder()
    for guidance in (1.0, torch.ones(3)):
        raw = Denoiser(network, PROCESS, Condition([5, 6, 7]), guidance).raw(X, T)
        assert torch.equal(raw, Recorder()(X, torch.tensor([0.0, 499.0, 999.0]), Condition([5, 6, 7])))
    assert network.asked == [([5, 6, 7], [0, 499, 999])] * 2


def test_the_other_half_is_told_nothing():
    network = Recorder()
    Denoiser(network, PROCESS, Condition([5, 6, 7]), 2.0).raw(X, T)
    assert network.asked == [([5, 6, 7, -1, -1, -1], [0, 499, 999, 0, 499, 999])]


def test_scale_0_is_the_unconditional_mean():
    raw = Denoiser(Recorder(), PROCESS, Condition([5, 6, 7]), 0.0).raw(X, T)
    untold = Recorder()(X, torch.tensor([0.0, 499.0, 999.0]), Condition([-1, -1, -1]))
    torch.testing.assert_close(raw[:, :4], untold[:, :4])


@pytest.mark.parametrize("guidance", [1.5, [4.0, 1.0, 0.0], [1.0, 1.0, 7.5]])
@pytest.mark.parametrize(("channels", "guided"), [("all", 4), (3, 3), (1, 1), (9, 4)])
def test_the_formula_row_by_row_and_channel_by_channel(guidance, channels, guided):
    """uncond + scale (cond - uncond) on the guided channels; the rest, and all of the variance, conditional."""
    told, untold = normal(3, 8, 2, 2, seed=1), normal(3, 8, 2, 2, seed=2)

    def network(x, t, condition):
        return torch.cat((told, untold)) if len(x) == 6 else told

    scales = torch.as_tensor(guidance)
    raw = Denoiser(network, PROCESS, Condition([5, 6, 7]), scales, channels).raw(X, T)
    for row, scale in enumerate(scales.expand(3).tolist()):
        for channel in range(8):
            expected = told[row, channel]
            if channel < guided:
                expected = untold[row, channel] + scale * (told[row, channel] - untold[row, channel])
            torch.testing.assert_close(raw[row, channel], expected, rtol=1e-5, atol=1e-5)
        if scale == 1:
            assert torch.equal(raw[row], told[row])


def test_the_answer_is_the_process_reading_of_the_guided_output():
    denoise = Denoiser(Recorder(), PROCESS, Condition([5, 6, 7]), 3.0)
    got, expected = denoise(X, T), PROCESS.predict(denoise.raw(X, T), X, T)
    for name in ("x0", "eps", "fraction"):
        assert torch.equal(getattr(got, name), getattr(expected, name))


@pytest.mark.parametrize("classes", [1, 3, 10, 1000])
def test_a_real_network_is_guided_away_from_its_null_row(classes, randomise):
    """For any number of classes, the null class is the row after the last: not 1000."""
    config = DiTConfig(input_size=(4, 4), patch_size=2, depth=1, hidden_size=16, num_heads=2, num_classes=classes)
    network = randomise(config.build())
    label, null, scale = torch.tensor([0, classes - 1, 0]), torch.full((3,), classes), 2.5
    x, steps = normal(3, 4, 4, 4), torch.tensor([0.0, 499.0, 999.0])
    with torch.no_grad():
        raw = Denoiser(network, PROCESS, Condition(label), scale).raw(x, T)
        told, untold = network(x, steps, Condition(label)), network(x, steps, Condition(null))
    torch.testing.assert_close(raw[:, :4], (untold + scale * (told - untold))[:, :4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(raw[:, 4:], told[:, 4:], rtol=1e-4, atol=1e-5)


def test_a_network_without_a_null_row_cannot_be_guided(randomise):
    config = DiTConfig(
        input_size=(4, 4), patch_size=2, depth=1, hidden_size=16, num_heads=2, num_classes=3, learn_null_class=False
    )
    network = randomise(config.build())
    with torch.no_grad(), pytest.raises(ValueError, match="null class"):
        Denoiser(network, PROCESS, Condition([0, 1, 2]), 2.0).raw(normal(3, 4, 4, 4), T)


# At which times, and how much


class Halves:
    """A network of two fixed outputs, one for rows that are told and one for those that are not; counts its rows."""

    def __init__(self) -> None:
        self.told, self.untold = normal(3, 8, 2, 2, seed=1), normal(3, 8, 2, 2, seed=2)
        self.rows: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.rows.append(len(x))
        halves = condition.label.view(-1, 3)  # three rows each
        return torch.cat([self.told if int(half[0]) >= 0 else self.untold for half in halves])


CONDITION = Condition([5, 6, 7])


@pytest.mark.parametrize(("t", "inside"), [(0.1, False), (0.2, True), (0.5, True), (0.8, True), (0.81, False)])
def test_outside_of_the_interval_the_network_is_asked_once(t, inside):
    network, times = Halves(), torch.full((3,), t, dtype=torch.float64)
    raw = Denoiser(network, PROCESS, CONDITION, 3.0, interval=(0.2, 0.8)).raw(X, times)
    assert network.rows == [6 if inside else 3]
    expected = Denoiser(Halves(), PROCESS, CONDITION, 3.0 if inside else 1.0).raw(X, times)
    assert torch.equal(raw, expected)


def test_rows_at_different_times_are_inside_or_outside_by_themselves():
    network, times = Halves(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    raw = Denoiser(network, PROCESS, CONDITION, 3.0, interval=(0.2, 0.8)).raw(X, times)
    assert torch.equal(raw[0], network.told[0])
    assert torch.equal(raw[2], network.told[2])
    torch.testing.assert_close(raw[1, :4], (3 * network.told - 2 * network.untold)[1, :4])


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        (LinearGuidance(), lambda t: 2 * (1 - t)),
        (LinearGuidance(least=0.5), lambda t: max(0.5, 2 * (1 - t))),
        (CosineGuidance(), lambda t: math.cos(math.pi * t) + 1),
        (CosineGuidance(least=1.0), lambda t: max(1.0, math.cos(math.pi * t) + 1)),
        (PoweredCosineGuidance(power=1), lambda t: (1 - math.cos(math.pi * (1 - t))) / 2),
        (PoweredCosineGuidance(power=4), lambda t: (1 - math.cos(math.pi * (1 - t) ** 4)) / 2),
    ],
)
def test_schedules_of_the_paper(schedule, formula):
    """Its weight w is of told + w (told - untold): our scale - 1 (Wang et al. 2024, table 1)."""
    network, t = Halves(), torch.tensor([0.05, 0.4, 0.9], dtype=torch.float64)
    raw = Denoiser(network, PROCESS, CONDITION, 4.0, schedule=schedule).raw(X, t)
    for row, time in enumerate(t.tolist()):
        weight = 3.0 * formula(time)
        expected = network.told[row] + weight * (network.told[row] - network.untold[row])
        torch.testing.assert_close(raw[row, :4], expected[:4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", [LinearGuidance(), CosineGuidance(), ConstantGuidance()])
def test_the_mean_over_all_times_is_the_guidance_asked_for(schedule):
    t = (torch.arange(1000) + 0.5) / 1000
    assert float(Denoiser(Halves(), PROCESS, CONDITION, 4.0, schedule=schedule).scale(t).mean()) == pytest.approx(4.0)


def test_a_constant_schedule_changes_no_bit():
    scales = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 20 - 5
    assert torch.equal(Denoiser(Halves(), PROCESS, CONDITION, scales).scale(torch.rand(1000)), scales)


def test_where_a_schedule_leaves_nothing_the_network_is_asked_once():
    network = Halves()
    Denoiser(network, PROCESS, CONDITION, 4.0, schedule=LinearGuidance()).raw(X, torch.ones(3))
    assert network.rows == [3]


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescaled_guidance_is_that_of_diffusers(rescale):
    network = Halves()
    raw = Denoiser(network, PROCESS, CONDITION, 7.5, rescale=rescale).raw(X, T)
    told, untold = network.told[:, :4], network.untold[:, :4]
    expected = rescale_noise_cfg(untold + 7.5 * (told - untold), told, guidance_rescale=rescale)
    torch.testing.assert_close(raw[:, :4], expected)
    assert torch.equal(raw[:, 4:], network.told[:, 4:])


def test_rescaled_zeros_of_a_fresh_network_stay_zeros():
    network = DiTConfig(input_size=(4, 4), in_channels=4, num_classes=8, depth=1, hidden_size=16, num_heads=2).build()
    condition, guide = (
        Condition(torch.tensor([1, 2, 3])),
        GuidanceModel(lambda x, t, c: torch.zeros(3, 8, 4, 4), CONDITION),
    )
    for away in (None, guide):
        raw = Denoiser(network, PROCESS, condition, 4.0, guide=away, rescale=0.7).raw(normal(3, 4, 4, 4), T)
        assert torch.equal(raw, torch.zeros(3, 8, 4, 4))


def test_a_row_of_scale_1_is_the_told_half_to_the_bit_whatever_else_is_on():
    network = Halves()
    scales, schedule = torch.tensor([4.0, 1.0, 0.5]), CosineGuidance()
    raw = Denoiser(network, PROCESS, CONDITION, scales, 3, rescale=0.37, schedule=schedule).raw(X, T)
    assert torch.equal(raw[1], network.told[1])
    assert not torch.equal(raw[0], network.told[0])


def test_autoguidance_tells_the_guide_the_same():
    network, guide = Recorder(), Recorder()
    denoise = Denoiser(
        network, PROCESS, CONDITION, 2.0, guide=GuidanceModel(lambda *told: 0.5 * guide(*told), CONDITION)
    )
    raw = denoise.raw(X, T)
    assert network.asked == guide.asked == [([5, 6, 7], [0, 499, 999])]
    alone = Recorder()(X, torch.tensor([0.0, 499.0, 999.0]), CONDITION)
    torch.testing.assert_close(raw[:, :4], 1.5 * alone[:, :4])
    assert torch.equal(raw[:, 4:], alone[:, 4:])


def test_halves_apart_are_the_halves_together():
    together, apart = Halves(), Halves()
    guide = GuidanceModel(apart, CONDITION.null())
    one = Denoiser(together, PROCESS, CONDITION, 3.0).raw(X, T)
    assert torch.equal(one, Denoiser(apart, PROCESS, CONDITION, 3.0, guide=guide).raw(X, T))
    assert (together.rows, apart.rows) == ([6], [3, 3])
