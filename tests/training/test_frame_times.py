"""Times of frames in training: what is sampled, that given frames are clean and have no loss, and who may have them."""

import pytest
import torch

from tessera import randomness
from tessera.codecs import PixelsConfig
from tessera.conditioning import Condition
from tessera.diffusion import FlowMatchingConfig, GaussianDiffusionConfig
from tessera.errors import TesseraError
from tessera.models import DiTConfig
from tessera.settings import validate
from tessera.training.frame_times import MixedTimes, SharedTimes, sample_given_frames
from tessera.training.objective import TIMESTEP_STREAM, TrainingObjective, compute_loss, sample_noise
from tessera.training.recipe import infer_pixel_channels, resolve_recipe

PROCESSES = {
    "gaussian": GaussianDiffusionConfig(),
    "gaussian-v": GaussianDiffusionConfig(prediction="v", variance="posterior"),
    "gaussian-x0": GaussianDiffusionConfig(prediction="x0"),
    "flow": FlowMatchingConfig(),
    "flow-gvp": FlowMatchingConfig(path="gvp", prediction="x0", loss="velocity"),
}
FRAMES = 6


def objective(process: str, frame_times=None) -> TrainingObjective:
    return TrainingObjective(
        PROCESSES[process].build(),
        PixelsConfig().build(),
        False,
        0.0,
        (),
        5,
        None,
        frame_times=frame_times or MixedTimes(),
    )


def shared(count: int, process: str) -> torch.Tensor:
    return PROCESSES[process].build().sample_timesteps(torch.rand(count))


@pytest.mark.parametrize("process", PROCESSES)
def test_half_of_the_clips_have_one_time_a_quarter_independent_ones_a_quarter_given_frames(process):
    count = 4000
    times = shared(count, process)
    result = MixedTimes().sample(times, FRAMES, torch.arange(count), 3, PROCESSES[process].build())
    has_given, is_shared = result.is_given.any(dim=1), (result.t == times[:, None]).all(dim=1)
    assert has_given.float().mean() == pytest.approx(0.25, abs=0.03)
    assert is_shared.float().mean() == pytest.approx(0.5, abs=0.03)
    independent = result.t[~has_given & ~is_shared]
    assert independent.flatten().sort().values.diff().max() < 0.05
    assert torch.corrcoef(independent.T).fill_diagonal_(0).abs().max() < 0.12
    assert (result.t[result.is_given] == 0).all()
    assert (result.t[~result.is_given] > 0).all()
    free = has_given[:, None] & ~result.is_given
    assert torch.equal(result.t[free], times[:, None].expand(-1, FRAMES)[free])
    assert not result.is_given.all(dim=1).any()
    torch.testing.assert_close(result.mean[~has_given], result.t[~has_given].mean(dim=1))
    torch.testing.assert_close(result.mean[has_given], times[has_given])


def test_the_numbers_belong_to_seed_and_position():
    times, diffusion = torch.rand(8), PROCESSES["flow"].build()
    whole = MixedTimes().sample(times, FRAMES, torch.arange(8), 3, diffusion)
    part = MixedTimes().sample(times[3:], FRAMES, torch.arange(3, 8), 3, diffusion)
    assert torch.equal(whole.t[3:], part.t)
    assert not torch.equal(MixedTimes().sample(times, FRAMES, torch.arange(8), 4, diffusion).t, whole.t)


@pytest.mark.parametrize("frames", [2, 3, 6])
def test_given_frames_are_first_few_last_both_or_any(frames):
    """Every kind and every number of frames occurs, and always a frame is left."""
    random = torch.Generator().manual_seed(0)
    rows = 6000
    kind, count, order = (torch.rand(*shape, generator=random) for shape in ((rows,), (rows,), (rows, frames)))
    masks = sample_given_frames(kind, count, order)
    number = masks.sum(dim=1)
    assert number.min() == 1
    assert number.max() == frames - 1
    by_kind = (kind * 5).long()
    frame = torch.arange(frames)
    assert (masks[by_kind == 0] == (frame == 0)).all()
    prefix = masks[by_kind == 1]
    assert (prefix == (frame < prefix.sum(dim=1, keepdim=True))).all()
    assert set(prefix.sum(dim=1).tolist()) == set(range(1, frames))
    assert (masks[by_kind == 2] == (frame == frames - 1)).all()
    assert (masks[by_kind == 3] == (((frame == 0) | (frame == frames - 1)) if frames > 2 else frame == 0)).all()
    subsets = {tuple(row) for row in masks[by_kind == 4].tolist()}
    assert len(subsets) == 2**frames - 2
    torch.testing.assert_close(masks[by_kind == 4].float().mean(dim=0), torch.full((frames,), 0.5), rtol=0, atol=0.06)


@pytest.mark.parametrize("process", PROCESSES)
def test_given_frames_are_clean_and_have_no_loss(process):
    """The network gets them as they are, at time 0; the loss is the mean over the other frames; no gradient there."""
    work, count = objective(process), 24
    diffusion = work.diffusion
    x0 = torch.randn(count, 2, FRAMES, 3, 3, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    position, seen = torch.arange(count), {}

    def network(x, t, condition):
        seen["x"], seen["t"] = x, t
        outputs = torch.tanh(x.repeat(1, diffusion.out_channels(2) // 2, 1, 1, 1)) * 0.5
        seen["raw"] = outputs.requires_grad_()
        return seen["raw"]

    losses, mean = compute_loss(network, x0, Condition(), position, work)
    times = MixedTimes().sample(_shared_times(work, position), FRAMES, position, work.seed, diffusion)
    assert 0 < times.is_given.any(dim=1).sum() < count
    given = times.is_given[:, None, :, None, None].expand_as(x0)
    assert torch.equal(seen["x"][given], x0[given])
    assert torch.equal(seen["t"], diffusion.model_time(times.t))
    assert torch.equal(mean, times.mean)
    losses.total.sum().backward()
    gradient = seen["raw"].grad
    assert gradient.isfinite().all()
    own = times.is_given[:, None, :, None, None].expand_as(gradient)
    assert (gradient[own] == 0).all()
    assert (gradient[~own] != 0).float().mean() > 0.9
    noise = sample_noise(x0, position, work)
    for row in range(count):  # an independent sum over the frames with a loss
        parts = [
            diffusion.loss(
                seen["raw"][row : row + 1, :, f].detach(), x0[row : row + 1, :, f], noise[row : row + 1, :, f],
                times.t[row : row + 1, f],
            )
            for f in range(FRAMES)
            if not times.is_given[row, f]
        ]  # fmt: skip
        for name in ("total", "mse", "vb"):
            value = getattr(losses, name)
            if value is not None:
                expected = torch.stack([getattr(part, name) for part in parts]).mean()
                torch.testing.assert_close(value[row].detach(), expected, rtol=1e-4, atol=1e-5)


def _shared_times(work, position):
    return work.diffusion.sample_timesteps(randomness.uniform(work.seed, position, TIMESTEP_STREAM)[:, 0])


@pytest.mark.parametrize("process", PROCESSES)
def test_one_time_for_all_frames_is_the_loss_without_the_setting_bit_for_bit(process):
    x0 = torch.randn(4, 2, FRAMES, 3, 3)
    network = lambda x, t, condition: torch.tanh(x).repeat(1, work.diffusion.out_channels(2) // 2, 1, 1, 1)  # noqa: E731
    results = []
    for frame_times in (SharedTimes(), MixedTimes(independent=0, given_frames=0)):
        work = objective(process, frame_times)
        results.append(compute_loss(network, x0, Condition(), torch.arange(4), work))
    (one, t), (other, mean) = results
    assert torch.equal(one.total, other.total)
    torch.testing.assert_close(t, mean)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({}, "training.frame_times=mixed needs a network for clips, and this one is for images"),
        ({"input_size": (4, 8, 8), "temporal_patch_size": 2}, "needs temporal_patch_size 1, not 2"),
    ],
)
def test_networks_without_times_of_frames(tiny, network, message):
    recipe = infer_pixel_channels(tiny("run", "training.frame_times=mixed"))
    config = DiTConfig.model_validate(
        {"input_size": (8, 8), "patch_size": 4, "hidden_size": 16, "num_heads": 2, **network}
    )
    assert message.removeprefix("training.frame_times=mixed ") in (config.frame_times_problem() or "")
    if not network:
        with pytest.raises(TesseraError, match=message):
            resolve_recipe(recipe, ("0",) * 10, recipe.codec.build())


def test_an_image_network_has_no_schedule_of_frames(tiny):
    recipe = infer_pixel_channels(tiny("run", "sampling.frame_schedule=sliding"))
    with pytest.raises(TesseraError, match="sampling.frame_schedule=sliding needs a network for clips"):
        resolve_recipe(recipe, ("0",) * 10, recipe.codec.build())


def test_fractions_of_more_than_all_clips():
    with pytest.raises(TesseraError, match="fractions of all clips"):
        validate(MixedTimes, {"independent": 0.3, "given_frames": 0.8}, "times")
