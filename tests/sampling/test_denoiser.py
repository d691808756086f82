"""Classifier-free guidance, folded into the denoiser."""

import pytest
import torch
from torch import Tensor

from tessera.conditions import Condition
from tessera.models.dit import DiTConfig
from tessera.process.gaussian import GaussianConfig
from tessera.sampling.denoiser import Denoiser


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


PROCESS = GaussianConfig().build()
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
    config = DiTConfig(size=(4, 4), patch=2, depth=1, width=16, heads=2, classes=classes)
    network = randomise(config.build())
    label, null, scale = torch.tensor([0, classes - 1, 0]), torch.full((3,), classes), 2.5
    x, steps = normal(3, 4, 4, 4), torch.tensor([0.0, 499.0, 999.0])
    with torch.no_grad():
        raw = Denoiser(network, PROCESS, Condition(label), scale).raw(x, T)
        told, untold = network(x, steps, Condition(label)), network(x, steps, Condition(null))
    torch.testing.assert_close(raw[:, :4], (untold + scale * (told - untold))[:, :4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(raw[:, 4:], told[:, 4:], rtol=1e-4, atol=1e-5)


def test_a_network_without_a_null_row_cannot_be_guided(randomise):
    config = DiTConfig(size=(4, 4), patch=2, depth=1, width=16, heads=2, classes=3, null_class=False)
    network = randomise(config.build())
    with torch.no_grad(), pytest.raises(ValueError, match="null class"):
        Denoiser(network, PROCESS, Condition([0, 1, 2]), 2.0).raw(normal(3, 4, 4, 4), T)
