"""`generate`: the same picture alone and in a batch, classes by name, sizes, and errors a user can act on."""

import numpy as np
import pytest
import torch

from tessera.acceleration.first_block_cache import CacheStats
from tessera.conditioning import Condition
from tessera.diffusion import GaussianDiffusionConfig
from tessera.errors import TesseraError
from tessera.generation import pipeline
from tessera.sampling import DDIM, SAMPLERS, SamplingConfig, sample_loop
from tessera.sampling.denoiser import Denoiser
from tessera.sampling.timesteps import Uniform, timestep_grid

NOISY = pytest.mark.parametrize("sampler", ["ancestral", {"kind": "ddim", "eta": 0.8}, "ddim"], ids=str)


def fault(model, *args, **named) -> str:
    with pytest.raises(TesseraError) as caught:
        pipeline.generate(model, *args, **named)
    return str(caught.value)


def close(one: np.ndarray, other: np.ndarray) -> None:
    assert one.shape == other.shape
    assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


# One picture, however it is asked for


@NOISY
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_a_picture_is_the_same_alone_and_in_a_batch(make_model, sampler, prediction):
    model = make_model({"in_channels": 3, "out_channels": 6}, {"prediction": prediction})
    seeds, classes = list(range(100, 116)), [i % 3 for i in range(16)]
    asked = {"guidance": 3.0, "sampler": sampler}
    together = pipeline.generate(model, classes, seeds, **asked)
    assert together.shape == (16, 8, 8, 3)
    middle = (together > 0) & (together < 255)
    assert middle.mean() > 0.2  # not all black and white: equality would be easy
    assert len({picture.tobytes() for picture in together}) == 16
    for row in (0, 7, 15):
        close(pipeline.generate(model, [classes[row]], [seeds[row]], **asked), together[row : row + 1])
    close(pipeline.generate(model, classes, seeds, batch=5, **asked), together)
    close(pipeline.generate(model, classes[::-1], seeds[::-1], **asked), together[::-1])


@NOISY
def test_an_untrained_epsilon_network_too(make_model, sampler):
    """What it draws is far outside the range of pixels, so the latents are compared."""
    model = make_model({"in_channels": 3, "out_channels": 6}, {"prediction": "epsilon"})
    asked = {"guidance": 3.0, "sampler": sampler}
    *_, together = pipeline.generate_steps(model, [0, 1, 2, 0], [5, 6, 7, 8], **asked)
    for row, (label, seed) in enumerate([(0, 5), (1, 6), (2, 7), (0, 8)]):
        *_, alone = pipeline.generate_steps(model, [label], [seed], **asked)
        assert float((alone.x[0] - together.x[row]).norm() / together.x[row].norm()) < 1e-4


@NOISY
def test_a_seed_is_a_picture_and_another_seed_another(tiny_model, sampler):
    first, again, other = (pipeline.generate(tiny_model, [0], [seed], sampler=sampler) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_noise_samplers_draw_fresh_noise_at_every_step(tiny_model, monkeypatch):
    """First the start, then one draw a step, each at its own position of the row's own seed."""
    asked = []
    true = pipeline.randomness.normal

    def recorded(seed, position, stream, shape):
        asked.append((seed.tolist(), position.tolist(), stream, shape))
        return true(seed, position, stream, shape)

    monkeypatch.setattr(pipeline.randomness, "normal", recorded)
    pipeline.generate(tiny_model, [0], [4, 9], sampler="ancestral", steps=3)
    assert asked == [([4, 9], [draw, draw], pipeline.STREAM, (1, 8, 8)) for draw in range(4)]


def test_the_start_is_standard_noise_and_the_end_is_data(tiny_model):
    states = list(pipeline.generate_steps(tiny_model, [0], list(range(64)), steps=5))
    assert [state.t for state in states] == timestep_grid(Uniform(), 5, GaussianDiffusionConfig().build()).tolist()
    assert float(states[0].x.mean()) == pytest.approx(0, abs=5 / 64)
    assert float(states[0].x.std()) == pytest.approx(1, abs=5 / 90)
    assert (pipeline.decode(tiny_model, states[-1].x) == pipeline.generate(tiny_model, [0], range(64), steps=5)).all()


def test_one_step_of_ddim_is_the_networks_own_x0(tiny_model):
    """From the seam's pieces by hand: the network at step 999, told class 1, read as x0."""
    *_, last = pipeline.generate_steps(tiny_model, ["dog"], [3], steps=1)
    start = pipeline.randomness.normal(torch.tensor([3]), torch.tensor([0]), pipeline.STREAM, (1, 8, 8))
    with torch.no_grad():
        raw = tiny_model.network(start, torch.tensor([999.0]), Condition([1]))
    torch.testing.assert_close(last.x, raw[:, :1], rtol=1e-5, atol=1e-5)


def test_decode_rounds_to_the_nearest_of_256(tiny_model):
    values = torch.tensor([-7.0, -1.0, 1.0, 7.0, 0.0, 100.4 / 127.5 - 1, 100.6 / 127.5 - 1, 1 - 0.1 / 127.5])
    pictures = pipeline.decode(tiny_model, values.view(1, 1, 2, 4))
    assert pictures.dtype == np.uint8
    assert pictures.shape == (1, 2, 4, 1)
    assert pictures.flatten().tolist() == [0, 0, 255, 255, 128, 100, 101, 255]


def test_pixels_survive_the_way_in_and_out(tiny_model):
    """Every grey value, as data reads it (x / 127.5 - 1), is drawn as itself."""
    pixels = torch.arange(256.0).view(1, 1, 16, 16) / 127.5 - 1
    assert pipeline.decode(tiny_model, pixels).flatten().tolist() == list(range(256))


@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(make_model, channels):
    model = make_model({"in_channels": channels, "out_channels": 2 * channels})
    pictures = pipeline.generate(model, [0, 1], [0, 1], steps=2)
    assert pictures.dtype == np.uint8
    assert pictures.shape == (2, 8, 8, channels)


@pytest.mark.parametrize("size", [(8, 12), (4, 2), (16, 16)])
def test_other_sizes(tiny_model, size):
    assert pipeline.generate(tiny_model, [0], [0], size=size).shape == (1, *size, 1)


def test_a_model_trained_on_oblong_pictures(make_model):
    assert pipeline.generate(make_model({"input_size": (4, 10)}), [0]).shape == (1, 4, 10, 1)


def test_an_unconditional_model(make_model):
    model = make_model({"num_classes": 0})
    pictures = pipeline.generate(model, None, [0, 1, 2], steps=3)
    assert pictures.shape == (3, 8, 8, 1)
    close(pipeline.generate(model, None, [1], steps=3), pictures[1:2])


def test_fixed_variance(make_model):
    model = make_model({"out_channels": 1}, {"variance": "posterior"})
    assert pipeline.generate(model, [0], sampler="ancestral").shape == (1, 8, 8, 1)


# Classes, seeds, guidance


def test_classes_by_name_by_number_and_by_digits(tiny_model):
    assert pipeline.class_labels(tiny_model, ["dog", 2, "0", np.int64(1)]) == [1, 2, 0, 1]


def test_a_name_of_digits_is_a_name(make_model):
    assert pipeline.class_labels(make_model(class_names=("2", "0", "1")), ["2", 2]) == [0, 2]


def test_one_class_for_many_seeds_and_one_seed_for_many_classes(tiny_model):
    wide = pipeline.generate(tiny_model, [2], [0, 1, 2])
    close(wide[1:2], pipeline.generate(tiny_model, [2], [1]))
    wide = pipeline.generate(tiny_model, [0, 1, 2], [5])
    close(wide[2:3], pipeline.generate(tiny_model, ["emu"], [5]))
    assert (wide[0] != wide[2]).any()


def test_guidance_changes_the_picture_and_may_differ_by_row(tiny_model):
    *_, last = pipeline.generate_steps(tiny_model, [1], [0, 0, 0], guidance=[1.0, 2.0, 5.0])
    drawn = pipeline.decode(tiny_model, last.x)
    for row, guidance in enumerate((1.0, 2.0, 5.0)):
        close(pipeline.generate(tiny_model, [1], [0], guidance=guidance), drawn[row : row + 1])
    assert (drawn[0] != drawn[1]).any()
    assert (drawn[1] != drawn[2]).any()


def test_the_models_own_settings_are_the_defaults(make_model):
    plain = make_model()
    own = make_model(sampling={"sampler": "ancestral", "steps": 4, "spacing": "trailing", "guidance": 2.0})
    changed = {"sampler": "ancestral", "steps": 4, "spacing": "trailing", "guidance": 2.0}
    assert (pipeline.generate(own, [1], [3]) == pipeline.generate(plain, [1], [3], **changed)).all()
    assert (pipeline.generate(own, [1], [3]) != pipeline.generate(plain, [1], [3])).any()


def test_three_guided_channels_draw_another_picture(make_model):
    model = make_model({"in_channels": 3, "out_channels": 6})
    one, three, every = (pipeline.generate(model, [1], guidance=4.0, guidance_channels=n) for n in (1, 3, "all"))
    assert (three == every).all()
    assert (one != every).any()


def test_progress_counts_every_step_of_every_batch(tiny_model):
    told = []
    pipeline.generate(tiny_model, [0], [0, 1, 2], steps=2, batch=2, progress=lambda *at: told.append(at))
    assert told == [(0, 4), (1, 4), (2, 4), (2, 4), (3, 4), (4, 4)]


def test_bfloat16_draws_nearly_the_same(tiny_model):
    exact = pipeline.generate(tiny_model, [0], [0, 1], steps=2).astype(int)
    rough = pipeline.generate(tiny_model, [0], [0, 1], steps=2, precision="bfloat16").astype(int)
    assert 0 < np.abs(exact - rough).mean() < 10


# Errors


@pytest.mark.parametrize("told", [3, -1, "7", "-1"])
def test_a_class_out_of_range(tiny_model, told):
    assert fault(tiny_model, [told]) == f"class {told} is out of range: this model knows 3 classes, 0 to 2"


def test_an_unknown_class_name(tiny_model):
    assert fault(tiny_model, ["dgo"]) == "unknown class 'dgo'; did you mean 'dog'?"


def test_missing_classes(tiny_model):
    assert fault(tiny_model).startswith("this model knows 3 classes: say which")


def test_classes_for_an_unconditional_model(make_model):
    assert fault(make_model({"num_classes": 0}), [0]) == "this model is unconditional: leave classes out"


@pytest.mark.parametrize("network", [{"classes": 0}, {"learn_null_class": False}])
def test_guidance_for_a_model_that_cannot(make_model, network):
    model = make_model(network)
    classes = [0] if model.config.network.num_classes else None
    assert "cannot be guided" in fault(model, classes, guidance=2.0)
    assert pipeline.generate(model, classes, guidance=1.0, steps=1).shape == (1, 8, 8, 1)


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_steps_out_of_range(tiny_model, steps):
    text = fault(tiny_model, [0], steps=steps)
    assert "steps" in text
    assert str(steps) in text
    if steps > 0:
        assert "1 to 1000" in text


@pytest.mark.parametrize("size", [(7, 8), (8, 9), (0, 8), (-2, 8)])
def test_a_size_that_does_not_fit(tiny_model, size):
    text = fault(tiny_model, [0], size=size)
    assert f"size {size[0]} x {size[1]} does not fit" in text
    assert "multiples of 2 pixels" in text


def test_an_unknown_sampler(tiny_model):
    said = "sampling is not valid:\n  sampler: unknown sampler 'dimm'; did you mean 'ddim'?"
    assert fault(tiny_model, [0], sampler="dimm") == said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spacing": "uneven"}, "spacing"),
        ({"stepz": 3}, "did you mean 'steps'?"),
        ({"sampler": {"kind": "ddim", "etta": 1}}, "did you mean 'eta'?"),
        ({"sampler": {"kind": "ddim", "eta": 2}}, "eta"),
        ({"guidance_channels": 0}, "guidance_channels"),
    ],
)
def test_settings_that_cannot_be(tiny_model, changes, words):
    assert words in fault(tiny_model, [0], **changes)


@pytest.mark.parametrize(("classes", "seeds"), [([0, 1], [0, 1, 2]), ([0, 1, 2], [0, 1])])
def test_classes_and_seeds_that_do_not_pair_up(tiny_model, classes, seeds):
    assert "do not pair up" in fault(tiny_model, classes, seeds)
    with pytest.raises(TesseraError, match="3 pictures are asked for, but 2"):
        next(pipeline.generate_steps(tiny_model, classes, seeds))


@pytest.mark.parametrize(("classes", "seeds"), [([], [0]), ([0], [])])
def test_nothing_to_draw(tiny_model, classes, seeds):
    assert fault(tiny_model, classes, seeds)
    with pytest.raises(TesseraError, match="1 pictures are asked for, but 0"):
        next(pipeline.generate_steps(tiny_model, classes, seeds))


def test_autocast_stays_inside_the_network(tiny_model):
    for _ in pipeline.generate_steps(tiny_model, [0], [0], precision="bfloat16"):
        assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        for _ in pipeline.generate_steps(tiny_model, [0], [0], precision="float32"):
            assert torch.is_autocast_enabled("cpu")


# Guidance over time, autoguidance, caching


EVERYTHING = {
    "guidance": 3.0,
    "guidance_interval": (0.1, 0.8),
    "guidance_schedule": "cosine",
    "guidance_rescale": 0.5,
    "caching": {"kind": "first-block", "threshold": 1.0},
    "steps": 12,
}


@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "heun", "dpm++", "unipc"])
def test_a_picture_is_the_same_alone_and_in_a_batch_with_all_of_it_switched_on(make_model, sampler):
    model, guide = (
        make_model({"in_channels": 3, "out_channels": 6}),
        make_model({"in_channels": 3, "out_channels": 6, "depth": 1}),
    )
    image = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    mask = np.zeros((8, 8), bool)
    mask[:, 2:7] = True
    asked = {**EVERYTHING, "sampler": sampler, "guide": guide, "mask": mask, "strength": 0.9}
    tally, classes, seeds = CacheStats(), [0, 1, 2, 0, 1], [3, 4, 5, 6, 7]
    together = pipeline.generate(model, classes, seeds, image=image, tally=tally, **asked)
    assert 0 < tally.computed < tally.asked
    for row in range(5):
        part = slice(row, row + 1)
        close(pipeline.generate(model, classes[part], seeds[part], image=image[row], **asked), together[part])
    close(pipeline.generate(model, classes, seeds, image=image, batch=2, **asked), together)


def test_without_a_table_of_steering_vectors_the_walk_is_the_bare_one_to_the_bit(tiny_model, monkeypatch):
    """As before all that is optional, from the seam's pieces by hand."""
    monkeypatch.setattr(pipeline, "TABLE", -1)
    label = torch.tensor([0, 1])
    start = pipeline.randomness.normal(torch.tensor([4, 9]), torch.zeros(2), pipeline.STREAM, (1, 8, 8))
    for guidance in (1.0, 2.5):
        *_, last = pipeline.generate_steps(tiny_model, [0, 1], [4, 9], guidance=guidance)
        denoise = Denoiser(tiny_model.network, tiny_model.process, Condition(label), guidance)
        with torch.no_grad():
            *_, expected = sample_loop(
                DDIM(), denoise, start, timestep_grid(Uniform(), 6, tiny_model.process), lambda: start
            )
        assert torch.equal(last.x, expected.x)


@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "heun"])
def test_a_table_of_steering_vectors_changes_no_more_than_rounding(make_model, monkeypatch, sampler):
    model, asked = make_model({"in_channels": 3, "out_channels": 6}), {"guidance": 3.0, "sampler": sampler}
    tables, true = [], pipeline.PrecomputedModulation

    def made(*told):
        tables.append(told)
        return true(*told)

    made.size = true.size
    monkeypatch.setattr(pipeline, "Tabulated", made)
    *_, looked_up = pipeline.generate_steps(model, [0, 1, 1], [4, 9, 2], **asked)
    assert len(tables) == 1
    monkeypatch.setattr(pipeline, "TABLE", -1)
    *_, computed = pipeline.generate_steps(model, [0, 1, 1], [4, 9, 2], **asked)
    assert len(tables) == 1
    torch.testing.assert_close(looked_up.x, computed.x, rtol=1e-4, atol=1e-4)


def test_halves_of_guidance_apart_change_no_more_than_rounding(tiny_model, monkeypatch):
    monkeypatch.setattr(pipeline, "APART", 1)
    *_, apart = pipeline.generate_steps(tiny_model, [0, 1], [4, 9], guidance=3.0)
    monkeypatch.setattr(pipeline, "APART", 10**9)
    *_, together = pipeline.generate_steps(tiny_model, [0, 1], [4, 9], guidance=3.0)
    torch.testing.assert_close(apart.x, together.x, rtol=1e-4, atol=1e-4)


def test_the_settings_of_guidance_are_a_models_own(make_model):
    own = {key: value for key, value in EVERYTHING.items() if key != "steps"}
    model = make_model(sampling={**own, "steps": 12})
    assert (pipeline.generate(model, [1], [3]) == pipeline.generate(make_model(), [1], [3], **EVERYTHING)).all()
    for key in own:
        changed = {**EVERYTHING, key: SamplingConfig.model_fields[key].default}
        assert (pipeline.generate(make_model(), [1], [3], **changed) != pipeline.generate(model, [1], [3])).any(), key


def test_a_guide_stands_in_for_the_untold_half(make_model):
    model, guide = make_model(), make_model({"depth": 1}, seed=1)
    *_, same = pipeline.generate_steps(model, [1], [3], guide=model, guidance=4.0)
    *_, alone = pipeline.generate_steps(model, [1], [3])
    torch.testing.assert_close(same.x, alone.x, rtol=1e-4, atol=1e-4)  # away from itself is nowhere
    *_, led = pipeline.generate_steps(model, [1], [3], guide=guide, guidance=2.0, steps=1)
    with torch.no_grad():
        start = pipeline.randomness.normal(torch.tensor([3]), torch.tensor([0]), pipeline.STREAM, (1, 8, 8))
        one, other = (each.network(start, torch.tensor([999.0]), Condition([1]))[:, :1] for each in (model, guide))
    torch.testing.assert_close(led.x, 2 * one - other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", [{"classes": 0}, {"learn_null_class": False}])
def test_a_guide_guides_a_model_that_cannot_be_told_nothing(make_model, network):
    model, guide = make_model(network), make_model(network, seed=1)
    classes = [0] if model.config.network.num_classes else None
    led = pipeline.generate(model, classes, guidance=2.0, guide=guide)
    assert (led != pipeline.generate(model, classes)).any()


@pytest.mark.parametrize(
    ("network", "process", "words"),
    [
        ({"channels": 3, "outputs": 6}, {}, "channels 3, not 1"),
        ({"size": 4}, {}, "size (4, 4), not (8, 8)"),
        ({"classes": 2}, {}, "classes 2, not 3"),
        ({}, {"prediction": "v"}, "v prediction"),
        ({}, {"schedule": "cosine"}, "cosine schedule"),
    ],
)
def test_a_guide_that_does_not_fit(make_model, network, process, words):
    text = fault(make_model(), [0], guidance=2.0, guide=make_model(network, process))
    assert text.startswith("this guide does not fit the model: ")
    assert words in text


def test_a_guide_without_guidance_would_do_nothing(make_model):
    assert "a guide needs guidance other than 1" in fault(make_model(), [0], guide=make_model(seed=1))


def test_a_guide_trained_under_another_weighting_fits(make_model):
    guide = make_model({}, {"weighting": "min-snr"}, seed=1)
    assert pipeline.generate(make_model(), [0], guidance=2.0, guide=guide).shape == (1, 8, 8, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guidance_interval": (0.8, 0.2)}, "two times, the lower one first"),
        ({"guidance_interval": (0.2, 1.2)}, "two times, the lower one first"),
        ({"guidance_schedule": "cosin"}, "unknown guidance_schedule 'cosin'; did you mean 'cosine'?"),
        ({"guidance_schedule": {"kind": "linear", "least": float("inf")}}, "finite"),
        ({"guidance_rescale": 1.5}, "less than or equal to 1"),
        ({"caching": {"kind": "first-block", "threshold": -1}}, "caching"),
    ],
)
def test_settings_of_guidance_that_cannot_be(tiny_model, changes, words):
    assert words in fault(tiny_model, [0], **changes)


# From a picture


def picture(rows: int = 0, channels: int = 1, seed: int = 0, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    shape = (rows, *size, channels) if rows else (*size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def half() -> np.ndarray:
    """Draw the right half, keep the left."""
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 1
    return mask


@pytest.mark.parametrize(("strength", "begins"), [(0.5, 3), (0.49, 4), (0.9, 1), (1.0, 0), (1 / 6, 5)])
def test_it_begins_in_the_picture_mixed_with_the_rows_own_noise(make_model, strength, begins):
    model = make_model(diffusion={"steps": 6})
    grid = timestep_grid(Uniform(), 6, model.process)
    states = list(pipeline.generate_steps(model, [0], [5], image=picture(), strength=strength, steps=6))
    assert [state.t for state in states] == grid[begins:].tolist()
    assert {state.num_steps for state in states} == {6 - begins}
    noise = pipeline.randomness.normal(torch.tensor([5]), torch.tensor([0]), pipeline.STREAM, (1, 8, 8))
    data = torch.from_numpy(picture()).permute(2, 0, 1)[None] / 127.5 - 1
    expected = noise if strength == 1 else model.process.mix(data, noise, grid[begins : begins + 1])
    torch.testing.assert_close(states[0].x, expected)


def test_strength_1_is_a_new_picture(tiny_model):
    new = pipeline.generate(tiny_model, [0], [5])
    assert (pipeline.generate(tiny_model, [0], [5], image=picture(), strength=1.0) == new).all()
    assert (pipeline.generate(tiny_model, [0], [5], image=picture(), strength=0.8) != new).any()


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_what_a_mask_keeps_is_kept_to_the_bit_with_every_solver(tiny_model, sampler):
    asked = {"image": picture(), "mask": half(), "sampler": sampler, "steps": 8}
    states = list(pipeline.generate_steps(tiny_model, [0, 1], [5, 6], **asked))
    data = (torch.from_numpy(picture()).permute(2, 0, 1) / 127.5 - 1).expand(2, 1, 8, 8)
    for state in states:  # the picture with each row's own noise, at every time
        mixed = tiny_model.process.mix(data, states_noise(2), torch.full((2,), state.t, dtype=torch.float64))
        torch.testing.assert_close(state.x[..., :4], mixed[..., :4])
    drawn = pipeline.generate(tiny_model, [0, 1], [5, 6], **asked)
    assert (drawn[:, :, :4] == picture()[:, :4]).all()
    assert (drawn[:, :, 4:] != picture()[:, 4:]).any()
    assert (drawn[0] != drawn[1]).any()


def states_noise(rows: int) -> torch.Tensor:
    seeds = torch.tensor([5, 6])[:rows]
    return pipeline.randomness.normal(seeds, torch.zeros(rows, dtype=torch.int64), pipeline.STREAM, (1, 8, 8))


def test_a_mask_of_everything_and_one_of_nothing(tiny_model):
    everything, nothing = np.ones((8, 8), bool), np.zeros((8, 8), bool)
    new = pipeline.generate(tiny_model, [0], [5])
    assert (pipeline.generate(tiny_model, [0], [5], image=picture(), mask=everything) == new).all()
    assert (pipeline.generate(tiny_model, [0], [5], image=picture(), mask=nothing)[0] == picture()).all()


def test_latents_are_drawn_where_a_pixel_is_and_kept_pixels_are_put_back(make_model, autoencoder_folder):
    codec = {"kind": "autoencoder-kl", "source": str(autoencoder_folder)}
    model = make_model({"in_channels": 4, "out_channels": 8}, codec=codec)
    mask = np.zeros((16, 16), bool)
    mask[5, 5] = True  # one pixel of the latent at (2, 2)
    image = picture(channels=3, size=(16, 16))
    *_, last = pipeline.generate_steps(model, [0], [5], image=image, mask=mask)
    kept = model.codec.encode(torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1)
    assert (last.x != kept).any(dim=1).nonzero().tolist() == [[0, 2, 2]]
    drawn = pipeline.generate(model, [0], [5], image=image, mask=mask)[0]
    assert (drawn[~mask] == image[~mask]).all()
    assert (drawn[5, 5] != image[5, 5]).any()


def test_pictures_and_masks_pair_up_with_seeds(tiny_model):
    image, mask = picture(3), np.stack([half(), 1 - half(), half().T])
    together = pipeline.generate(tiny_model, [0], [1, 2, 3], image=image, mask=mask, batch=2)
    for row in range(3):
        close(pipeline.generate(tiny_model, [0], [row + 1], image=image[row], mask=mask[row]), together[row : row + 1])
    assert pipeline.generate(tiny_model, [0], [1], image=image, strength=0.5).shape == (3, 8, 8, 1)


def test_the_size_is_the_pictures(tiny_model):
    assert pipeline.generate(tiny_model, [0], image=picture(size=(4, 12)), strength=0.5).shape == (1, 4, 12, 1)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"strength": 0.5}, "strength belongs to an image"),
        ({"mask": half()}, "a mask belongs to an image"),
        ({"image": picture(), "strength": 0.0}, "strength is 0.0; expected more than 0"),
        ({"image": picture(), "strength": 1.1}, "strength is 1.1"),
        ({"image": picture(), "strength": 0.0005}, "strength 0.0005 leaves no step"),
        ({"image": picture(channels=3)}, "[H, W, 1]; got uint8 [8, 8, 3]"),
        ({"image": picture()[..., 0]}, "[H, W, 1]; got uint8 [8, 8]"),
        ({"image": picture(), "mask": half()[None, None]}, "a mask is [B, H, W] or [H, W]; got uint8 [1, 1, 8, 8]"),
        ({"image": picture() / 255}, "got float64"),
        ({"image": picture(size=(7, 8))}, "size 7 x 8 does not fit"),
        ({"image": picture(), "size": (16, 16)}, "size 16 x 16 is not"),
        ({"image": picture(), "mask": half()[:4]}, "a mask is [B, 8, 8] or [8, 8]"),
        ({"image": picture(), "mask": half() * 255}, "with other values"),
        ({"image": picture(3), "seeds": [0, 1]}, "do not pair up"),
    ],
)
def test_pictures_that_do_not_fit(tiny_model, asked, words):
    assert words in fault(tiny_model, [0], **asked)
