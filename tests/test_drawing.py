"""`generate`: the same picture alone and in a batch, classes by name, sizes, and errors a user can act on."""

import numpy as np
import pytest
import torch

from tessera import drawing
from tessera.conditions import Condition
from tessera.errors import TesseraError
from tessera.process import GaussianConfig
from tessera.sampling.times import Even, times

NOISY = pytest.mark.parametrize("sampler", ["ancestral", {"kind": "ddim", "eta": 0.8}, "ddim"], ids=str)


def fault(model, *args, **named) -> str:
    with pytest.raises(TesseraError) as caught:
        drawing.generate(model, *args, **named)
    return str(caught.value)


def close(one: np.ndarray, other: np.ndarray) -> None:
    assert one.shape == other.shape
    assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


# One picture, however it is asked for


@NOISY
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_a_picture_is_the_same_alone_and_in_a_batch(make_model, sampler, prediction):
    model = make_model({"channels": 3, "outputs": 6}, {"prediction": prediction})
    seeds, classes = list(range(100, 116)), [i % 3 for i in range(16)]
    asked = {"guidance": 3.0, "sampler": sampler}
    together = drawing.generate(model, classes, seeds, **asked)
    assert together.shape == (16, 8, 8, 3)
    middle = (together > 0) & (together < 255)
    assert middle.mean() > 0.2  # not all black and white: equality would be easy
    assert len({picture.tobytes() for picture in together}) == 16
    for row in (0, 7, 15):
        close(drawing.generate(model, [classes[row]], [seeds[row]], **asked), together[row : row + 1])
    close(drawing.generate(model, classes, seeds, batch=5, **asked), together)
    close(drawing.generate(model, classes[::-1], seeds[::-1], **asked), together[::-1])


@NOISY
def test_an_untrained_epsilon_network_too(make_model, sampler):
    """What it draws is far outside the range of pixels, so the latents are compared."""
    model = make_model({"channels": 3, "outputs": 6}, {"prediction": "epsilon"})
    asked = {"guidance": 3.0, "sampler": sampler}
    *_, together = drawing.walk(model, [0, 1, 2, 0], [5, 6, 7, 8], **asked)
    for row, (label, seed) in enumerate([(0, 5), (1, 6), (2, 7), (0, 8)]):
        *_, alone = drawing.walk(model, [label], [seed], **asked)
        assert float((alone.x[0] - together.x[row]).norm() / together.x[row].norm()) < 1e-4


@NOISY
def test_a_seed_is_a_picture_and_another_seed_another(tiny_model, sampler):
    first, again, other = (drawing.generate(tiny_model, [0], [seed], sampler=sampler) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_noise_samplers_draw_fresh_noise_at_every_step(tiny_model, monkeypatch):
    """First the start, then one draw a step, each at its own position of the row's own seed."""
    asked = []
    true = drawing.randomness.normal

    def recorded(seed, position, stream, shape):
        asked.append((seed.tolist(), position.tolist(), stream, shape))
        return true(seed, position, stream, shape)

    monkeypatch.setattr(drawing.randomness, "normal", recorded)
    drawing.generate(tiny_model, [0], [4, 9], sampler="ancestral", steps=3)
    assert asked == [([4, 9], [draw, draw], drawing.STREAM, (1, 8, 8)) for draw in range(4)]


def test_the_start_is_standard_noise_and_the_end_is_data(tiny_model):
    states = list(drawing.walk(tiny_model, [0], list(range(64)), steps=5))
    assert [state.t for state in states] == times(Even(), 5, GaussianConfig().build()).tolist()
    assert float(states[0].x.mean()) == pytest.approx(0, abs=5 / 64)
    assert float(states[0].x.std()) == pytest.approx(1, abs=5 / 90)
    assert (drawing.decode(tiny_model, states[-1].x) == drawing.generate(tiny_model, [0], range(64), steps=5)).all()


def test_one_step_of_ddim_is_the_networks_own_x0(tiny_model):
    """From the seam's pieces by hand: the network at step 999, told class 1, read as x0."""
    *_, last = drawing.walk(tiny_model, ["dog"], [3], steps=1)
    start = drawing.randomness.normal(torch.tensor([3]), torch.tensor([0]), drawing.STREAM, (1, 8, 8))
    with torch.no_grad():
        raw = tiny_model.network(start, torch.tensor([999.0]), Condition([1]))
    torch.testing.assert_close(last.x, raw[:, :1], rtol=1e-5, atol=1e-5)


def test_decode_rounds_to_the_nearest_of_256(tiny_model):
    values = torch.tensor([-7.0, -1.0, 1.0, 7.0, 0.0, 100.4 / 127.5 - 1, 100.6 / 127.5 - 1, 1 - 0.1 / 127.5])
    pictures = drawing.decode(tiny_model, values.view(1, 1, 2, 4))
    assert pictures.dtype == np.uint8
    assert pictures.shape == (1, 2, 4, 1)
    assert pictures.flatten().tolist() == [0, 0, 255, 255, 128, 100, 101, 255]


def test_pixels_survive_the_way_in_and_out(tiny_model):
    """Every grey value, as data reads it (x / 127.5 - 1), is drawn as itself."""
    pixels = torch.arange(256.0).view(1, 1, 16, 16) / 127.5 - 1
    assert drawing.decode(tiny_model, pixels).flatten().tolist() == list(range(256))


@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(make_model, channels):
    model = make_model({"channels": channels, "outputs": 2 * channels})
    pictures = drawing.generate(model, [0, 1], [0, 1], steps=2)
    assert pictures.dtype == np.uint8
    assert pictures.shape == (2, 8, 8, channels)


@pytest.mark.parametrize("size", [(8, 12), (4, 2), (16, 16)])
def test_other_sizes(tiny_model, size):
    assert drawing.generate(tiny_model, [0], [0], size=size).shape == (1, *size, 1)


def test_a_model_trained_on_oblong_pictures(make_model):
    assert drawing.generate(make_model({"size": (4, 10)}), [0]).shape == (1, 4, 10, 1)


def test_an_unconditional_model(make_model):
    model = make_model({"classes": 0})
    pictures = drawing.generate(model, None, [0, 1, 2], steps=3)
    assert pictures.shape == (3, 8, 8, 1)
    close(drawing.generate(model, None, [1], steps=3), pictures[1:2])


def test_fixed_variance(make_model):
    model = make_model({"outputs": 1}, {"variance": "posterior"})
    assert drawing.generate(model, [0], sampler="ancestral").shape == (1, 8, 8, 1)


# Classes, seeds, guidance


def test_classes_by_name_by_number_and_by_digits(tiny_model):
    assert drawing.labels(tiny_model, ["dog", 2, "0", np.int64(1)]) == [1, 2, 0, 1]


def test_a_name_of_digits_is_a_name(make_model):
    assert drawing.labels(make_model(class_names=("2", "0", "1")), ["2", 2]) == [0, 2]


def test_one_class_for_many_seeds_and_one_seed_for_many_classes(tiny_model):
    wide = drawing.generate(tiny_model, [2], [0, 1, 2])
    close(wide[1:2], drawing.generate(tiny_model, [2], [1]))
    wide = drawing.generate(tiny_model, [0, 1, 2], [5])
    close(wide[2:3], drawing.generate(tiny_model, ["emu"], [5]))
    assert (wide[0] != wide[2]).any()


def test_guidance_changes_the_picture_and_may_differ_by_row(tiny_model):
    *_, last = drawing.walk(tiny_model, [1], [0, 0, 0], guidance=[1.0, 2.0, 5.0])
    drawn = drawing.decode(tiny_model, last.x)
    for row, guidance in enumerate((1.0, 2.0, 5.0)):
        close(drawing.generate(tiny_model, [1], [0], guidance=guidance), drawn[row : row + 1])
    assert (drawn[0] != drawn[1]).any()
    assert (drawn[1] != drawn[2]).any()


def test_the_models_own_settings_are_the_defaults(make_model):
    plain = make_model()
    own = make_model(sampling={"sampler": "ancestral", "steps": 4, "spacing": "trailing", "guidance": 2.0})
    changed = {"sampler": "ancestral", "steps": 4, "spacing": "trailing", "guidance": 2.0}
    assert (drawing.generate(own, [1], [3]) == drawing.generate(plain, [1], [3], **changed)).all()
    assert (drawing.generate(own, [1], [3]) != drawing.generate(plain, [1], [3])).any()


def test_three_guided_channels_draw_another_picture(make_model):
    model = make_model({"channels": 3, "outputs": 6})
    one, three, every = (drawing.generate(model, [1], guidance=4.0, guidance_channels=n) for n in (1, 3, "all"))
    assert (three == every).all()
    assert (one != every).any()


def test_progress_counts_every_step_of_every_batch(tiny_model):
    told = []
    drawing.generate(tiny_model, [0], [0, 1, 2], steps=2, batch=2, progress=lambda *at: told.append(at))
    assert told == [(0, 4), (1, 4), (2, 4), (2, 4), (3, 4), (4, 4)]


def test_bfloat16_draws_nearly_the_same(tiny_model):
    exact = drawing.generate(tiny_model, [0], [0, 1], steps=2).astype(int)
    rough = drawing.generate(tiny_model, [0], [0, 1], steps=2, precision="bfloat16").astype(int)
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
    assert fault(make_model({"classes": 0}), [0]) == "this model is unconditional: leave classes out"


@pytest.mark.parametrize("network", [{"classes": 0}, {"null_class": False}])
def test_guidance_for_a_model_that_cannot(make_model, network):
    model = make_model(network)
    classes = [0] if model.config.network.classes else None
    assert "cannot be guided" in fault(model, classes, guidance=2.0)
    assert drawing.generate(model, classes, guidance=1.0, steps=1).shape == (1, 8, 8, 1)


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
    assert fault(tiny_model, [0], sampler="dimm") == "unknown sampler 'dimm'; did you mean 'ddim'?"


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
        next(drawing.walk(tiny_model, classes, seeds))


@pytest.mark.parametrize(("classes", "seeds"), [([], [0]), ([0], [])])
def test_nothing_to_draw(tiny_model, classes, seeds):
    assert fault(tiny_model, classes, seeds)
    with pytest.raises(TesseraError, match="1 pictures are asked for, but 0"):
        next(drawing.walk(tiny_model, classes, seeds))


def test_autocast_stays_inside_the_network(tiny_model):
    for _ in drawing.walk(tiny_model, [0], [0], precision="bfloat16"):
        assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        for _ in drawing.walk(tiny_model, [0], [0], precision="float32"):
            assert torch.is_autocast_enabled("cpu")
