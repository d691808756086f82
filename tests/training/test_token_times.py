"""Two times for the tokens of an image: what is sampled, that the loss is that of each patch, and who may have them."""

import pytest
import torch

from tessera import randomness
from tessera.codecs import PixelsConfig
from tessera.conditioning import Condition
from tessera.diffusion import FlowMatchingConfig, GaussianDiffusionConfig
from tessera.diffusion.gaussian import MinSNRWeighting
from tessera.errors import TesseraError
from tessera.models import DiTConfig, UNetConfig
from tessera.models.blocks import AdaLN, AdaLNSingle, CrossAttend, InContext, RoPESwiGLU
from tessera.models.pixart import PixArtConfig
from tessera.training.objective import TIMESTEP_STREAM, TrainingObjective, compute_loss, sample_noise
from tessera.training.recipe import infer_pixel_channels, resolve_recipe
from tessera.training.token_times import DualTokenTimes, SharedTokenTimes, times_of_pixels

PROCESSES = {
    "gaussian": GaussianDiffusionConfig(),  # with a learned variance
    "gaussian-v": GaussianDiffusionConfig(prediction="v", variance="posterior", weighting=MinSNRWeighting()),
    "flow": FlowMatchingConfig(),
    "flow-x0": FlowMatchingConfig(path="gvp", prediction="x0", loss="velocity"),
}
PATCH, SIDE = 2, 8
GRID = (SIDE // PATCH, SIDE // PATCH)


def objective(process: str, **settings) -> TrainingObjective:
    return TrainingObjective(
        PROCESSES[process].build(), PixelsConfig().build(), False, 0.0, (), 5, None,
        **{"token_times": DualTokenTimes(), "patch_size": PATCH, **settings},
    )  # fmt: skip


def first_times(work: TrainingObjective, position: torch.Tensor) -> torch.Tensor:
    return work.diffusion.sample_timesteps(randomness.uniform(work.seed, position, TIMESTEP_STREAM)[:, 0])


@pytest.mark.parametrize(("fraction", "count"), [(0.25, 4), (0.5, 8), (0.01, 1)])
def test_a_fraction_of_the_tokens_of_each_image_has_a_second_time(fraction, count):
    rows, diffusion = 3000, PROCESSES["flow"].build()
    first = torch.rand(rows)
    times = DualTokenTimes(fraction=fraction).sample(first, 16, torch.arange(rows), 3, diffusion)
    has_second = times != first[:, None]
    assert (has_second.sum(dim=1) == count).all()
    second = times[has_second].view(rows, count)
    assert torch.equal(second, second[:, :1].expand(-1, count))
    assert torch.corrcoef(torch.stack((first, second[:, 0])))[0, 1].abs() < 0.06
    assert second[:, 0].sort().values.diff().max() < 0.01
    frequency = has_second.float().mean(dim=0)
    torch.testing.assert_close(frequency, torch.full((16,), count / 16), rtol=0, atol=0.04)


def test_the_numbers_belong_to_seed_and_position():
    first, diffusion = torch.rand(8), PROCESSES["flow"].build()
    whole = DualTokenTimes().sample(first, 16, torch.arange(8), 3, diffusion)
    assert torch.equal(DualTokenTimes().sample(first[3:], 16, torch.arange(3, 8), 3, diffusion), whole[3:])
    assert not torch.equal(DualTokenTimes().sample(first, 16, torch.arange(8), 4, diffusion), whole)


def test_times_of_pixels_are_those_of_their_patches():
    pixels = times_of_pixels(torch.arange(6.0)[None], (2, 3), 2)
    row = [0.0, 0, 1, 1, 2, 2]
    assert pixels.tolist() == [[[row, row, [3 + each for each in row], [3 + each for each in row]]]]


@pytest.mark.parametrize("process", PROCESSES)
def test_the_loss_is_the_mean_of_the_losses_of_the_patches_at_their_times(process):
    work, position = objective(process), torch.arange(5)
    x0 = torch.rand(5, 3, SIDE, SIDE) * 2 - 1
    noise, calls = sample_noise(x0, position, work), []

    def network(x, t, condition):
        calls.append((x, t))
        torch.manual_seed(1)
        return torch.randn(5, work.diffusion.out_channels(3), SIDE, SIDE) * x.mean()

    losses, mean = compute_loss(network, x0, Condition(), position, work)
    x, model_t = calls[0]
    raw = network(x, model_t, None)
    t = DualTokenTimes().sample(first_times(work, position), 16, position, work.seed, work.diffusion)
    assert torch.equal(model_t, work.diffusion.model_time(t))
    torch.testing.assert_close(mean, t.mean(dim=1))
    totals = []
    for token in range(16):
        row, column = PATCH * (token // GRID[1]), PATCH * (token % GRID[1])
        patch = (..., slice(row, row + PATCH), slice(column, column + PATCH))
        noisy = work.diffusion.add_noise(x0[patch], noise[patch], t[:, token])
        torch.testing.assert_close(x[patch], noisy)
        totals.append(work.diffusion.loss(raw[patch], x0[patch], noise[patch], t[:, token]))
    for name in ("total", "mse", "vb"):
        value = getattr(losses, name)
        if value is not None:
            expected = torch.stack([getattr(each, name) for each in totals]).mean(dim=0)
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


NETWORKS = {
    "adaln": DiTConfig(input_size=(SIDE, SIDE), patch_size=PATCH, hidden_size=32, depth=2, num_heads=2, block=AdaLN()),
    "adaln-zero": DiTConfig(input_size=(SIDE, SIDE), patch_size=PATCH, hidden_size=32, depth=2, num_heads=2),
    "adaln-single": DiTConfig(
        input_size=(SIDE, SIDE), patch_size=PATCH, hidden_size=32, depth=2, num_heads=2, block=AdaLNSingle()
    ),
    "rope-swiglu": DiTConfig(
        input_size=(SIDE, SIDE), patch_size=PATCH, hidden_size=32, depth=2, num_heads=2, block=RoPESwiGLU()
    ),
    "pixart": PixArtConfig(
        input_size=(SIDE, SIDE), patch_size=PATCH, hidden_size=32, depth=2, num_heads=2, text_channels=8, text_tokens=3
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_equal_times_of_all_tokens_are_one_time_and_others_count_where_they_are(name, randomise):
    config = NETWORKS[name]
    network, x, t = randomise(config.build()), torch.randn(2, config.in_channels, SIDE, SIDE), torch.tensor([30.0, 700])
    condition = Condition(label=torch.tensor([1, 2]))
    if name == "pixart":
        condition = Condition(text=torch.randn(2, 3, 8), text_mask=torch.ones(2, 3, dtype=torch.bool))
    with torch.no_grad():
        one = network(x, t, condition)
        torch.testing.assert_close(network(x, t[:, None].expand(-1, 16), condition), one, rtol=1e-4, atol=1e-5)
        changed = t[:, None].repeat(1, 16)
        changed[:, 6] = 300  # the token in row 1 and column 2
        difference = (network(x, changed, condition) - one).abs().amax(dim=(0, 1))
    assert difference[2:4, 4:6].min() > 3 * difference[:2].max()


def test_first_times_and_noise_are_those_of_training_with_one_time(monkeypatch):
    monkeypatch.setattr(DualTokenTimes, "sample", lambda self, first, tokens, *rest: first[:, None].expand(-1, tokens))
    dual, single = objective("flow"), objective("flow", token_times=SharedTokenTimes())
    x0, position = torch.rand(4, 3, SIDE, SIDE), torch.arange(4)
    network = NETWORKS["rope-swiglu"].model_copy(update={"in_channels": 3, "out_channels": 3}).build()
    condition = Condition(label=torch.arange(4))
    results = [compute_loss(network, x0, condition, position, work) for work in (dual, single)]
    torch.testing.assert_close(results[0][0].total, results[1][0].total)
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (UNetConfig(), "needs a DiT: the network has one time for all pixels"),
        (DiTConfig(block=InContext()), "needs a block with modulation, and in-context has a condition token"),
        (DiTConfig(block=CrossAttend()), "needs a block with modulation, and cross-attention has"),
        (DiTConfig(input_size=(4, 8, 8), patch_size=2), "needs a network for images, and this one is for clips"),
        (NETWORKS["rope-swiglu"], None),
        (NETWORKS["pixart"], None),
    ],
)
def test_who_may_have_times_of_tokens(network, message):
    problem = network.token_times_problem()
    assert problem is None if message is None else message in problem


def test_a_recipe_for_another_network_is_refused(tiny):
    recipe = infer_pixel_channels(tiny("run", "training.token_times=dual", "network.block=in-context"))
    with pytest.raises(TesseraError, match="training.token_times=dual needs a block with modulation"):
        resolve_recipe(recipe, ("0",) * 10, recipe.codec.build())
