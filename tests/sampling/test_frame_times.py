"""Frames with their own times, in the diffusion processes and in every solver."""

import pytest
import torch
from torch import Tensor

from tessera.conditioning import Condition
from tessera.diffusion import FlowMatchingConfig, GaussianDiffusionConfig
from tessera.sampling import SAMPLERS, Denoiser, SampleState, Uniform, sample_loop, timestep_grid
from tessera.times import expand, shared_time

PROCESSES = {
    "gaussian": GaussianDiffusionConfig(),
    "gaussian-v": GaussianDiffusionConfig(prediction="v", variance="posterior", schedule="cosine"),
    "min-snr": GaussianDiffusionConfig(weighting="min-snr"),
    "flow": FlowMatchingConfig(),
    "flow-epsilon": FlowMatchingConfig(prediction="epsilon"),
    "flow-x0": FlowMatchingConfig(prediction="x0", loss="velocity", path="gvp"),
}
SHAPE = (2, 3, 4, 2, 2)  # two clips of three channels and four frames


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """A function of x and the time of each frame, for any number of output channels."""
    t = t if t.ndim == 2 else t[:, None].expand(-1, x.shape[2])
    time = (t / 1000)[:, None, :, None, None]
    return torch.cat((torch.tanh(x) * (1 - time), torch.tanh(2 * x) * time), dim=1)


def mean_channels(*inputs) -> Tensor:
    return network(*inputs)[:, :3]


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_equal_times_of_all_frames_are_one_time_bit_for_bit(process, sampler):
    diffusion = PROCESSES[process].build()
    if sampler == "ancestral" and diffusion.num_timesteps is None:
        pytest.skip("ancestral sampling is for Gaussian diffusion")
    function = network if diffusion.out_channels(3) == 6 else mean_channels
    times = timestep_grid(Uniform(), 6, diffusion)

    def run(grid: Tensor) -> list[SampleState]:
        seeds, denoise = iter(range(100)), Denoiser(function, diffusion, Condition())
        noise = lambda: normal(*SHAPE, seed=next(seeds))  # noqa: E731
        return list(sample_loop(SAMPLERS[sampler](), denoise, normal(*SHAPE), grid, noise))

    for one, other in zip(run(times), run(times[:, None].expand(-1, 4)), strict=True):
        assert torch.equal(one.x, other.x)
        assert (one.t, one.step, one.num_steps) == (other.t, other.step, other.num_steps)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_frames_with_their_own_times_are_images_with_these_times(process, sampler):
    """A network that treats frames apart: each frame of a clip is the image sampled along the times of that frame."""
    diffusion = PROCESSES[process].build()
    if sampler == "ancestral" and diffusion.num_timesteps is None:
        pytest.skip("ancestral sampling is for Gaussian diffusion")
    function = network if diffusion.out_channels(3) == 6 else mean_channels
    times = timestep_grid(Uniform(), 6, diffusion)
    grid = torch.stack([times, times**1.5, times**2, times], dim=1)  # decreasing from 1 to 0 in every frame
    if diffusion.num_timesteps is not None:
        grid = torch.where(grid > 0, grid.clamp(min=1e-3), 0)

    def run(x: Tensor, t: Tensor, frame: slice) -> Tensor:
        seeds = iter(range(100))
        denoise = Denoiser(function, diffusion, Condition())
        noise = lambda: normal(*SHAPE, seed=next(seeds))[:, :, frame]  # noqa: E731
        *_, last = sample_loop(SAMPLERS[sampler](), denoise, x, t, noise)
        return last.x

    clip = run(normal(*SHAPE), grid, slice(None))
    for frame in range(4):
        part = slice(frame, frame + 1)
        torch.testing.assert_close(clip[:, :, part], run(normal(*SHAPE)[:, :, part], grid[:, frame], part))


@pytest.mark.parametrize("process", PROCESSES)
def test_losses_of_frames(process):
    """Equal times give the same loss bit for bit; the loss of other times is the mean of the losses of the frames."""
    diffusion = PROCESSES[process].build()
    x0, noise = normal(*SHAPE).clamp(-1, 1), normal(*SHAPE, seed=1)
    raw = normal(2, diffusion.out_channels(3), *SHAPE[2:], seed=2)
    uniform = torch.tensor([[0.1, 0.4, 0.6, 0.9], [0.2, 0.2, 0.7, 0.3]])
    t = diffusion.sample_timesteps(uniform)
    one, same = (diffusion.loss(raw, x0, noise, each) for each in (t[:, 0], t[:, :1].expand(-1, 4)))
    assert torch.equal(one.total, same.total)
    assert torch.equal(one.mse, same.mse)
    whole = diffusion.loss(raw, x0, noise, t)
    frames = [diffusion.loss(raw[:, :, f], x0[:, :, f], noise[:, :, f], t[:, f]) for f in range(4)]
    torch.testing.assert_close(whole.total, torch.stack([frame.total for frame in frames]).mean(dim=0))
    torch.testing.assert_close(whole.mse, torch.stack([frame.mse for frame in frames]).mean(dim=0))
    x_t = diffusion.add_noise(x0, noise, t)
    for f in range(4):
        assert torch.equal(x_t[:, :, f], diffusion.add_noise(x0[:, :, f], noise[:, :, f], t[:, f]))


@pytest.mark.parametrize("shape", [(1, 4), (4, 2), (4,), (2, 1), (), (2, 4, 1), (1,)])
def test_values_of_an_ambiguous_shape_are_an_error(shape):
    """[1, T] would broadcast as if it were a batch of T."""
    with pytest.raises(ValueError, match=r"expected one per row, \[2\], or one per frame, \[2, 4\]"):
        expand(torch.zeros(shape), torch.zeros(SHAPE))


def test_values_per_row_and_per_frame():
    values = torch.arange(8.0, dtype=torch.float64).view(2, 4)
    expanded = expand(values, torch.zeros(SHAPE))
    assert (expanded.shape, expanded.dtype) == ((2, 1, 4, 1, 1), torch.float32)
    assert torch.equal(expanded[:, 0, :, 0, 0], values.float())
    assert expand(values[:, 0], torch.zeros(SHAPE)).shape == (2, 1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"expected one per row, \[2\]$"):
        expand(values, torch.zeros(2, 3, 4, 4))


def test_shared_time():
    t = torch.tensor([[0.5, 0.5], [0.25, 0.25]])
    assert torch.equal(shared_time(t), torch.tensor([0.5, 0.25]))
    t[1, 1] = 0.3
    assert shared_time(t) is t
