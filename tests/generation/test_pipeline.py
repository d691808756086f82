"""`generate`: images do not depend on their batch; classes by name, sizes, guidance, editing, and clear errors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tessera import generation, randomness
from tessera.acceleration.first_block_cache import CacheStats
from tessera.conditioning import Condition, LabelField
from tessera.diffusion import GaussianDiffusionConfig
from tessera.errors import TesseraError
from tessera.generation import denoiser as assembly
from tessera.model import Model
from tessera.sampling import DDIM, SAMPLERS, SamplingConfig, sample_loop
from tessera.sampling.continuous import STREAM
from tessera.sampling.denoiser import Denoiser
from tessera.sampling.timesteps import Uniform, timestep_grid

NOISY = pytest.mark.parametrize("sampler", ["ancestral", {"kind": "ddim", "eta": 0.8}, "ddim"], ids=str)


def generate_error(model, *args, **named) -> str:
    with pytest.raises(TesseraError) as caught:
        generation.generate(model, *args, **named)
    return str(caught.value)


def close(one: np.ndarray, other: np.ndarray) -> None:
    assert one.shape == other.shape
    assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


# One image, however it is requested


@NOISY
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_an_image_is_the_same_alone_and_in_a_batch(make_model, sampler, prediction):
    model = make_model({"in_channels": 3, "out_channels": 6}, {"prediction": prediction})
    seeds, classes = list(range(100, 116)), [i % 3 for i in range(16)]
    request = {"guidance_scale": 3.0, "sampler": sampler}
    together = generation.generate(model, classes, seeds, **request)
    assert together.shape == (16, 8, 8, 3)
    middle = (together > 0) & (together < 255)
    assert middle.mean() > 0.2  # not all black and white: equality would be easy
    assert len({image.tobytes() for image in together}) == 16
    for row in (0, 7, 15):
        close(generation.generate(model, [classes[row]], [seeds[row]], **request), together[row : row + 1])
    close(generation.generate(model, classes, seeds, batch_size=5, **request), together)
    close(generation.generate(model, classes[::-1], seeds[::-1], **request), together[::-1])


@NOISY
def test_latents_of_an_epsilon_network_are_the_same_in_a_batch(make_model, sampler):
    """An untrained epsilon network leaves the range of pixels, so the latents are compared."""
    model = make_model({"in_channels": 3, "out_channels": 6}, {"prediction": "epsilon"})
    request = {"guidance_scale": 3.0, "sampler": sampler}
    *_, together = generation.generate_steps(model, [0, 1, 2, 0], [5, 6, 7, 8], **request)
    for row, (label, seed) in enumerate([(0, 5), (1, 6), (2, 7), (0, 8)]):
        *_, alone = generation.generate_steps(model, [label], [seed], **request)
        assert float((alone.x[0] - together.x[row]).norm() / together.x[row].norm()) < 1e-4


@NOISY
def test_each_seed_determines_its_image(tiny_model, sampler):
    first, again, other = (generation.generate(tiny_model, [0], [seed], sampler=sampler) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_stochastic_samplers_use_new_noise_at_every_step(tiny_model, monkeypatch):
    """First the initial noise, then one noise per step, each at its own position of the row's seed."""
    calls = []
    original = randomness.normal

    def recorded(seed, position, stream, shape):
        calls.append((seed.tolist(), position.tolist(), stream, shape))
        return original(seed, position, stream, shape)

    monkeypatch.setattr(randomness, "normal", recorded)
    generation.generate(tiny_model, [0], [4, 9], sampler="ancestral", num_steps=3)
    assert calls == [([4, 9], [call, call], STREAM, (1, 8, 8)) for call in range(4)]


def test_the_start_is_standard_noise_and_the_end_is_data(tiny_model):
    states = list(generation.generate_steps(tiny_model, [0], list(range(64)), num_steps=5))
    assert [state.t for state in states] == timestep_grid(Uniform(), 5, GaussianDiffusionConfig().build()).tolist()
    assert float(states[0].x.mean()) == pytest.approx(0, abs=5 / 64)
    assert float(states[0].x.std()) == pytest.approx(1, abs=5 / 90)
    assert (
        generation.decode(tiny_model, states[-1].x) == generation.generate(tiny_model, [0], range(64), num_steps=5)
    ).all()


def test_one_step_of_ddim_is_the_networks_own_x0(tiny_model):
    """Computed by hand: the network at step 999 with class 1, read as x0."""
    *_, last = generation.generate_steps(tiny_model, ["dog"], [3], num_steps=1)
    start = randomness.normal(torch.tensor([3]), torch.tensor([0]), STREAM, (1, 8, 8))
    with torch.no_grad():
        raw = tiny_model.network(start, torch.tensor([999.0]), Condition([1]))
    torch.testing.assert_close(last.x, raw[:, :1], rtol=1e-5, atol=1e-5)


def test_decode_rounds_to_the_nearest_of_256(tiny_model):
    values = torch.tensor([-7.0, -1.0, 1.0, 7.0, 0.0, 100.4 / 127.5 - 1, 100.6 / 127.5 - 1, 1 - 0.1 / 127.5])
    images = generation.decode(tiny_model, values.view(1, 1, 2, 4))
    assert images.dtype == np.uint8
    assert images.shape == (1, 2, 4, 1)
    assert images.flatten().tolist() == [0, 0, 255, 255, 128, 100, 101, 255]


def test_pixels_survive_a_round_trip(tiny_model):
    """every gray value, as data is read (x / 127.5 - 1), decodes to itself."""
    pixels = torch.arange(256.0).view(1, 1, 16, 16) / 127.5 - 1
    assert generation.decode(tiny_model, pixels).flatten().tolist() == list(range(256))


@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(make_model, channels):
    model = make_model({"in_channels": channels, "out_channels": 2 * channels})
    images = generation.generate(model, [0, 1], [0, 1], num_steps=2)
    assert images.dtype == np.uint8
    assert images.shape == (2, 8, 8, channels)


@pytest.mark.parametrize("size", [(8, 12), (4, 2), (16, 16)])
def test_other_sizes(tiny_model, size):
    assert generation.generate(tiny_model, [0], [0], size=size).shape == (1, *size, 1)


def test_a_model_of_oblong_images(make_model):
    assert generation.generate(make_model({"input_size": (4, 10)}), [0]).shape == (1, 4, 10, 1)


def test_an_unconditional_model(make_model):
    model = make_model({"num_classes": 0})
    images = generation.generate(model, None, [0, 1, 2], num_steps=3)
    assert images.shape == (3, 8, 8, 1)
    close(generation.generate(model, None, [1], num_steps=3), images[1:2])


def test_fixed_variance(make_model):
    model = make_model({"out_channels": 1}, {"variance": "posterior"})
    assert generation.generate(model, [0], sampler="ancestral").shape == (1, 8, 8, 1)


# Classes, seeds, guidance


def test_classes_by_name_number_and_digits(tiny_model):
    assert LabelField().encode(["dog", 2, "0", np.int64(1)], tiny_model).tolist() == [1, 2, 0, 1]


def test_a_class_name_of_digits_takes_precedence(make_model):
    assert LabelField().encode(["2", 2], make_model(class_names=("2", "0", "1"))).tolist() == [0, 2]


def test_one_class_for_many_seeds_and_one_seed_for_many_classes(tiny_model):
    images = generation.generate(tiny_model, [2], [0, 1, 2])
    close(images[1:2], generation.generate(tiny_model, [2], [1]))
    images = generation.generate(tiny_model, [0, 1, 2], [5])
    close(images[2:3], generation.generate(tiny_model, ["emu"], [5]))
    assert (images[0] != images[2]).any()


def test_guidance_changes_the_image_and_may_differ_by_row(tiny_model):
    *_, last = generation.generate_steps(tiny_model, [1], [0, 0, 0], guidance_scale=[1.0, 2.0, 5.0])
    images = generation.decode(tiny_model, last.x)
    for row, guidance in enumerate((1.0, 2.0, 5.0)):
        close(generation.generate(tiny_model, [1], [0], guidance_scale=guidance), images[row : row + 1])
    assert (images[0] != images[1]).any()
    assert (images[1] != images[2]).any()


def test_the_models_own_settings_are_the_defaults(make_model):
    plain = make_model()
    changed = {"sampler": "ancestral", "num_steps": 4, "timestep_spacing": "trailing", "guidance_scale": 2.0}
    own = make_model(sampling=changed)
    assert (generation.generate(own, [1], [3]) == generation.generate(plain, [1], [3], **changed)).all()
    assert (generation.generate(own, [1], [3]) != generation.generate(plain, [1], [3])).any()


def test_the_number_of_guided_channels_changes_the_image(make_model):
    model = make_model({"in_channels": 3, "out_channels": 6})
    one, three, every = (
        generation.generate(model, [1], guidance_scale=4.0, guidance_channels=n) for n in (1, 3, "all")
    )
    assert (three == every).all()
    assert (one != every).any()


def test_progress_counts_every_step_of_every_batch(tiny_model):
    calls = []
    generation.generate(tiny_model, [0], [0, 1, 2], num_steps=2, batch_size=2, progress=lambda *at: calls.append(at))
    assert calls == [(0, 4), (1, 4), (2, 4), (2, 4), (3, 4), (4, 4)]


def test_bfloat16_generates_nearly_the_same(tiny_model):
    exact = generation.generate(tiny_model, [0], [0, 1], num_steps=2).astype(int)
    rough = generation.generate(tiny_model, [0], [0, 1], num_steps=2, precision="bfloat16").astype(int)
    assert 0 < np.abs(exact - rough).mean() < 10


# Errors


@pytest.mark.parametrize("label", [3, -1, "7", "-1"])
def test_a_class_out_of_range(tiny_model, label):
    assert generate_error(tiny_model, [label]) == f"class {label} is out of range: this model has 3 classes, 0 to 2"


def test_an_unknown_class_name(tiny_model):
    assert generate_error(tiny_model, ["dgo"]) == "unknown class 'dgo'; did you mean 'dog'?"


@pytest.mark.parametrize("label", ["--3", "²"])
def test_a_class_that_is_no_number(tiny_model, label):
    assert generate_error(tiny_model, [label]).startswith(f"unknown class '{label}'")


def test_numbers_that_are_not_whole(tiny_model):
    assert generate_error(tiny_model, [1.5]) == "a class is a name or a whole number; got 1.5"
    assert generate_error(tiny_model, [1], [0.5]) == "seeds are integers from 0 to 2^63 - 1; got 0.5"
    assert generate_error(tiny_model, [1], batch_size=0) == "batch_size is 0; use 1 or more"


def test_states_have_no_gradients(tiny_model):
    *_, last = generation.sample_steps(tiny_model, generation.SampleRequest([0], {"label": [1]}).resolve(tiny_model))
    assert not last.x.requires_grad


def test_missing_classes(tiny_model):
    assert generate_error(tiny_model).startswith("this model needs classes: it has 3 classes; pass some")


def test_classes_for_an_unconditional_model(make_model):
    assert generate_error(make_model({"num_classes": 0}), [0]) == "this model is unconditional: leave out classes"


@pytest.mark.parametrize("network", [{"num_classes": 0}, {"learn_null_class": False}])
def test_guidance_of_a_model_without_a_null_label(make_model, network):
    model = make_model(network)
    classes = [0] if model.config.network.num_classes else None
    assert "cannot be guided" in generate_error(model, classes, guidance_scale=2.0)
    assert generation.generate(model, classes, guidance_scale=1.0, num_steps=1).shape == (1, 8, 8, 1)


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_steps_out_of_range(tiny_model, steps):
    message = generate_error(tiny_model, [0], num_steps=steps)
    assert "num_steps" in message
    assert str(steps) in message
    if steps > 0:
        assert "1 to 1000" in message


def test_one_number_is_a_square(make_model):
    assert generation.generate(make_model({"input_size": (4, 8)}), [0], size=8, num_steps=1).shape == (1, 8, 8, 1)


@pytest.mark.parametrize("size", [(7, 8), (8, 9), (0, 8), (-2, 8)])
def test_a_size_that_is_not_a_multiple(tiny_model, size):
    message = generate_error(tiny_model, [0], size=size)
    assert f"size {size[0]} x {size[1]}: " in message
    assert "multiples of 2 pixels" in message


def test_an_unknown_sampler(tiny_model):
    message = generate_error(tiny_model, [0], sampler="dimm")
    assert "sampler: unknown sampler 'dimm'; did you mean 'ddim'?" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"timestep_spacing": "uneven"}, "timestep_spacing"),
        ({"num_stepz": 3}, "did you mean 'num_steps'?"),
        ({"sampler": {"kind": "ddim", "etta": 1}}, "did you mean 'eta'?"),
        ({"sampler": {"kind": "ddim", "eta": 2}}, "eta"),
        ({"guidance_channels": 0}, "guidance_channels"),
    ],
)
def test_invalid_settings(tiny_model, changes, words):
    assert words in generate_error(tiny_model, [0], **changes)


@pytest.mark.parametrize(("classes", "seeds"), [([0, 1], [0, 1, 2]), ([0, 1, 2], [0, 1])])
def test_classes_and_seeds_of_different_lengths(tiny_model, classes, seeds):
    assert "3 images are requested, but there are 2" in generate_error(tiny_model, classes, seeds)
    with pytest.raises(TesseraError, match="3 images are requested, but there are 2"):
        next(generation.generate_steps(tiny_model, classes, seeds))


@pytest.mark.parametrize(("classes", "seeds"), [([], [0]), ([0], [])])
def test_nothing_to_generate(tiny_model, classes, seeds):
    assert "nothing to generate" in generate_error(tiny_model, classes, seeds)
    with pytest.raises(TesseraError, match="nothing to generate"):
        next(generation.generate_steps(tiny_model, classes, seeds))


def test_autocast_stays_inside_the_network(tiny_model):
    for _ in generation.generate_steps(tiny_model, [0], [0], precision="bfloat16"):
        assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        for _ in generation.generate_steps(tiny_model, [0], [0], precision="float32"):
            assert torch.is_autocast_enabled("cpu")


# Guidance over time, autoguidance, caching


EVERYTHING = {
    "guidance_scale": 3.0,
    "guidance_interval": (0.1, 0.8),
    "guidance_schedule": "cosine",
    "guidance_rescale": 0.5,
    "caching": {"kind": "first-block", "threshold": 1.0},
    "num_steps": 12,
}


@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "heun", "dpm++", "unipc"])
def test_an_image_is_the_same_alone_and_in_a_batch_with_every_option(make_model, sampler):
    model, weak = (
        make_model({"in_channels": 3, "out_channels": 6}),
        make_model({"in_channels": 3, "out_channels": 6, "depth": 1}),
    )
    image = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    mask = np.zeros((8, 8), bool)
    mask[:, 2:7] = True
    request = {**EVERYTHING, "sampler": sampler, "guidance_model": weak, "mask": mask, "strength": 0.9}
    stats, classes, seeds = CacheStats(), [0, 1, 2, 0, 1], [3, 4, 5, 6, 7]
    together = generation.generate(model, classes, seeds, init_image=image, cache_stats=stats, **request)
    assert 0 < stats.computed < stats.requested
    for row in range(5):
        part = slice(row, row + 1)
        close(generation.generate(model, classes[part], seeds[part], init_image=image[row], **request), together[part])
    close(generation.generate(model, classes, seeds, init_image=image, batch_size=2, **request), together)


def test_without_precomputed_modulation_sampling_is_the_plain_loop_bit_for_bit(tiny_model, monkeypatch):
    monkeypatch.setattr(assembly, "MODULATION_TABLE_BYTES", -1)
    label = torch.tensor([0, 1])
    start = randomness.normal(torch.tensor([4, 9]), torch.zeros(2), STREAM, (1, 8, 8))
    for guidance in (1.0, 2.5):
        *_, last = generation.generate_steps(tiny_model, [0, 1], [4, 9], guidance_scale=guidance)
        denoise = Denoiser(tiny_model.network, tiny_model.diffusion, Condition(label), guidance)
        with torch.no_grad():
            *_, expected = sample_loop(
                DDIM(), denoise, start, timestep_grid(Uniform(), 6, tiny_model.diffusion), lambda: start
            )
        assert torch.equal(last.x, expected.x)


@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "heun"])
def test_precomputed_modulation_changes_only_rounding(make_model, monkeypatch, sampler):
    model, request = make_model({"in_channels": 3, "out_channels": 6}), {"guidance_scale": 3.0, "sampler": sampler}
    tables, original = [], assembly.PrecomputedModulation

    def recorded(*args):
        tables.append(args)
        return original(*args)

    recorded.table_bytes = original.table_bytes
    monkeypatch.setattr(assembly, "PrecomputedModulation", recorded)
    *_, looked_up = generation.generate_steps(model, [0, 1, 1], [4, 9, 2], **request)
    assert len(tables) == 1
    monkeypatch.setattr(assembly, "MODULATION_TABLE_BYTES", -1)
    *_, computed = generation.generate_steps(model, [0, 1, 1], [4, 9, 2], **request)
    assert len(tables) == 1
    torch.testing.assert_close(looked_up.x, computed.x, rtol=1e-4, atol=1e-4)


def test_separate_calls_for_guidance_change_only_rounding(tiny_model, monkeypatch):
    monkeypatch.setattr(assembly, "SEPARATE_CALLS_TOKENS", 1)
    *_, apart = generation.generate_steps(tiny_model, [0, 1], [4, 9], guidance_scale=3.0)
    monkeypatch.setattr(assembly, "SEPARATE_CALLS_TOKENS", 10**9)
    *_, together = generation.generate_steps(tiny_model, [0, 1], [4, 9], guidance_scale=3.0)
    torch.testing.assert_close(apart.x, together.x, rtol=1e-4, atol=1e-4)


def test_guidance_settings_default_to_the_models_own(make_model):
    own = {key: value for key, value in EVERYTHING.items() if key != "num_steps"}
    model = make_model(sampling={**own, "num_steps": 12})
    assert (generation.generate(model, [1], [3]) == generation.generate(make_model(), [1], [3], **EVERYTHING)).all()
    for key in own:
        changed = {**EVERYTHING, key: SamplingConfig.model_fields[key].default}
        assert (generation.generate(make_model(), [1], [3], **changed) != generation.generate(model, [1], [3])).any(), (
            key
        )


def test_a_guidance_model_replaces_the_unconditional_half(make_model):
    model, weak = make_model(), make_model({"depth": 1}, seed=1)
    *_, same = generation.generate_steps(model, [1], [3], guidance_model=model, guidance_scale=4.0)
    *_, alone = generation.generate_steps(model, [1], [3])
    torch.testing.assert_close(same.x, alone.x, rtol=1e-4, atol=1e-4)  # guidance away from itself has no effect
    *_, guided = generation.generate_steps(model, [1], [3], guidance_model=weak, guidance_scale=2.0, num_steps=1)
    with torch.no_grad():
        start = randomness.normal(torch.tensor([3]), torch.tensor([0]), STREAM, (1, 8, 8))
        one, other = (each.network(start, torch.tensor([999.0]), Condition([1]))[:, :1] for each in (model, weak))
    torch.testing.assert_close(guided.x, 2 * one - other, rtol=1e-4, atol=1e-4)


ROUTED_NETWORK = {"depth": 4, "block": "rope-swiglu"}


def routed_model(make_model, routing: dict | None = None) -> Model:
    """As a model that was trained with token routing."""
    model = make_model(ROUTED_NETWORK)
    recipe = {"training": {"token_routing": {"fraction": 0.75} if routing is None else routing}}
    return replace(model, config=model.config.model_copy(update={"recipe": recipe}))


def test_a_model_of_routed_tokens_skips_what_its_training_skipped(make_model):
    model = routed_model(make_model)
    routed, x, t, condition = model.routed, torch.randn(2, 1, 8, 8), torch.tensor([900.0, 20.0]), Condition([1, 2])
    network, passing = model.network, []
    for block in network.blocks:
        block.register_forward_hook(lambda module, inputs, output: passing.append(inputs[0].shape[1]))
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = routed.network(x[:1], t[:1], Condition([1]))
    assert passing == [16, 4, 4, 16]  # of 4 x 4: blocks 2 and 3 get a quarter
    assert counter.get_total_flops() == 2 * routed.network.macs()
    with torch.no_grad():
        both = routed.network(x, t, condition)
        torch.testing.assert_close(both[:1], output)  # in every call the same tokens skip
        assert not torch.allclose(both, network(x, t, condition), atol=1e-3)
    names = routed.network.state_dict().keys()
    assert len(names) == len(network.state_dict())  # the same weights once


def test_guidance_by_routed_tokens_leads_away_from_their_output(make_model):
    model = routed_model(make_model)
    *_, guided = generation.generate_steps(
        model, [1], [3], guidance_model=model.routed, guidance_scale=2.0, num_steps=1
    )
    with torch.no_grad():
        start = randomness.normal(torch.tensor([3]), torch.tensor([0]), STREAM, (1, 8, 8))
        networks = (model.network, model.routed.network)
        one, other = (network(start, torch.tensor([999.0]), Condition([1]))[:, :1] for network in networks)
    torch.testing.assert_close(guided.x, 2 * one - other, rtol=1e-4, atol=1e-4)


def test_a_model_without_routed_tokens(make_model):
    for model in (make_model(), make_model(ROUTED_NETWORK)):
        with pytest.raises(TesseraError, match=r"was not trained with training\.token_routing"):
            _ = model.routed


@pytest.mark.parametrize("network", [{"num_classes": 0}, {"learn_null_class": False}])
def test_a_guidance_model_guides_a_model_without_a_null_label(make_model, network):
    model, weak = make_model(network), make_model(network, seed=1)
    classes = [0] if model.config.network.num_classes else None
    guided = generation.generate(model, classes, guidance_scale=2.0, guidance_model=weak)
    assert (guided != generation.generate(model, classes)).any()


@pytest.mark.parametrize(
    ("network", "process", "words"),
    [
        ({"in_channels": 3, "out_channels": 6}, {}, "in_channels 3, not 1"),
        ({"input_size": 4}, {}, "input_size (4, 4), not (8, 8)"),
        ({"num_classes": 2}, {}, "num_classes 2, not 3"),
        ({}, {"prediction": "v"}, "v prediction"),
        ({}, {"schedule": "cosine"}, "cosine schedule"),
    ],
)
def test_a_guidance_model_that_does_not_match(make_model, network, process, words):
    message = generate_error(make_model(), [0], guidance_scale=2.0, guidance_model=make_model(network, process))
    assert message.startswith("the guidance model does not match the model: ")
    assert words in message


def test_a_guidance_model_needs_a_guidance_scale(make_model):
    assert "needs a guidance_scale other than 1" in generate_error(make_model(), [0], guidance_model=make_model(seed=1))


def test_a_guidance_model_of_another_loss_weighting_matches(make_model):
    weak = make_model({}, {"weighting": "min-snr"}, seed=1)
    assert generation.generate(make_model(), [0], guidance_scale=2.0, guidance_model=weak).shape == (1, 8, 8, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guidance_interval": (0.8, 0.2)}, "two times, the lower one first"),
        ({"guidance_interval": (0.2, 1.2)}, "two times, the lower one first"),
        ({"guidance_schedule": "cosin"}, "unknown guidance_schedule 'cosin'; did you mean 'cosine'?"),
        ({"guidance_schedule": {"kind": "linear", "min_weight": float("inf")}}, "finite"),
        ({"guidance_rescale": 1.5}, "less than or equal to 1"),
        ({"caching": {"kind": "first-block", "threshold": -1}}, "caching"),
    ],
)
def test_invalid_guidance_settings(tiny_model, changes, words):
    assert words in generate_error(tiny_model, [0], **changes)


# Image-to-image and inpainting


def make_image(rows: int = 0, channels: int = 1, seed: int = 0, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    shape = (rows, *size, channels) if rows else (*size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def right_half() -> np.ndarray:
    """Generate the right half and leave the left."""
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 1
    return mask


@pytest.mark.parametrize(("strength", "begins"), [(0.5, 3), (0.49, 4), (0.9, 1), (1.0, 0), (1 / 6, 5)])
def test_it_begins_in_the_image_with_each_rows_own_noise(make_model, strength, begins):
    model = make_model(diffusion={"num_timesteps": 6})
    grid = timestep_grid(Uniform(), 6, model.diffusion)
    states = list(generation.generate_steps(model, [0], [5], init_image=make_image(), strength=strength, num_steps=6))
    assert [state.t for state in states] == grid[begins:].tolist()
    assert {state.num_steps for state in states} == {6 - begins}
    noise = randomness.normal(torch.tensor([5]), torch.tensor([0]), STREAM, (1, 8, 8))
    data = torch.from_numpy(make_image()).permute(2, 0, 1)[None] / 127.5 - 1
    expected = noise if strength == 1 else model.diffusion.add_noise(data, noise, grid[begins : begins + 1])
    torch.testing.assert_close(states[0].x, expected)


def test_strength_1_is_a_new_image(tiny_model):
    new = generation.generate(tiny_model, [0], [5])
    assert (generation.generate(tiny_model, [0], [5], init_image=make_image(), strength=1.0) == new).all()
    assert (generation.generate(tiny_model, [0], [5], init_image=make_image(), strength=0.8) != new).any()


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_the_image_outside_the_mask_is_unchanged_with_every_solver(make_model, sampler):
    tiny_model = make_model({"step_size_embedding": True})
    request = {"init_image": make_image(), "mask": right_half(), "sampler": sampler, "num_steps": 8}
    states = list(generation.generate_steps(tiny_model, [0, 1], [5, 6], **request))
    data = (torch.from_numpy(make_image()).permute(2, 0, 1) / 127.5 - 1).expand(2, 1, 8, 8)
    for state in states:  # the image with each row's own noise, at every time
        mixed = tiny_model.diffusion.add_noise(data, states_noise(2), torch.full((2,), state.t, dtype=torch.float64))
        torch.testing.assert_close(state.x[..., :4], mixed[..., :4])
    images = generation.generate(tiny_model, [0, 1], [5, 6], **request)
    assert (images[:, :, :4] == make_image()[:, :4]).all()
    assert (images[:, :, 4:] != make_image()[:, 4:]).any()
    assert (images[0] != images[1]).any()


def states_noise(rows: int) -> torch.Tensor:
    seeds = torch.tensor([5, 6])[:rows]
    return randomness.normal(seeds, torch.zeros(rows, dtype=torch.int64), STREAM, (1, 8, 8))


def test_a_mask_of_everything_and_one_of_nothing(tiny_model):
    everything, nothing = np.ones((8, 8), bool), np.zeros((8, 8), bool)
    new = generation.generate(tiny_model, [0], [5])
    assert (generation.generate(tiny_model, [0], [5], init_image=make_image(), mask=everything) == new).all()
    assert (generation.generate(tiny_model, [0], [5], init_image=make_image(), mask=nothing)[0] == make_image()).all()


def test_a_latent_is_generated_if_any_pixel_is_and_other_pixels_are_restored(make_model, autoencoder_folder):
    codec = {"kind": "autoencoder-kl", "source": str(autoencoder_folder)}
    model = make_model({"in_channels": 4, "out_channels": 8}, codec=codec)
    mask = np.zeros((16, 16), bool)
    mask[5, 5] = True  # one pixel of the latent at (2, 2)
    image = make_image(channels=3, size=(16, 16))
    *_, last = generation.generate_steps(model, [0], [5], init_image=image, mask=mask)
    encoded = model.codec.encode(torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1)
    assert (last.x != encoded).any(dim=1).nonzero().tolist() == [[0, 2, 2]]
    generated = generation.generate(model, [0], [5], init_image=image, mask=mask)[0]
    assert (generated[~mask] == image[~mask]).all()
    assert (generated[5, 5] != image[5, 5]).any()


def test_images_and_masks_are_paired_with_seeds(tiny_model):
    image, mask = make_image(3), np.stack([right_half(), 1 - right_half(), right_half().T])
    together = generation.generate(tiny_model, [0], [1, 2, 3], init_image=image, mask=mask, batch_size=2)
    for row in range(3):
        close(
            generation.generate(tiny_model, [0], [row + 1], init_image=image[row], mask=mask[row]),
            together[row : row + 1],
        )
    assert generation.generate(tiny_model, [0], [1], init_image=image, strength=0.5).shape == (3, 8, 8, 1)


def test_the_size_is_that_of_the_image(tiny_model):
    assert generation.generate(tiny_model, [0], init_image=make_image(size=(4, 12)), strength=0.5).shape == (
        1,
        4,
        12,
        1,
    )


@pytest.mark.parametrize(
    ("request_fields", "words"),
    [
        ({"strength": 0.5}, "strength needs an image"),
        ({"mask": right_half()}, "a mask needs an image"),
        ({"init_image": make_image(), "strength": 0.0}, "strength is 0.0; expected more than 0"),
        ({"init_image": make_image(), "strength": 1.1}, "strength is 1.1"),
        ({"init_image": make_image(), "strength": 0.0005}, "strength 0.0005 leaves no step"),
        ({"init_image": make_image(channels=3)}, "[H, W, 1]; got uint8 [1, 8, 8, 3]"),
        ({"init_image": make_image()[..., 0]}, "[H, W, 1]; got uint8 [8, 8]"),
        (
            {"init_image": make_image(), "mask": right_half()[None, None]},
            "a mask is [B, 8, 8] or [8, 8], 1 where to generate and 0 where the image stays; got shape [1, 1, 8, 8]",
        ),
        ({"init_image": make_image() / 255}, "got float64"),
        ({"init_image": make_image(size=(7, 8))}, "size 7 x 8: height and width"),
        ({"init_image": make_image(), "size": (16, 16)}, "size 16 x 16 is not"),
        ({"init_image": make_image(), "mask": right_half()[:4]}, "a mask is [B, 8, 8] or [8, 8]"),
        ({"init_image": make_image(), "mask": right_half() * 255}, "with other values"),
        ({"init_image": make_image(3), "seeds": [0, 1]}, "3 images are requested, but there are 2 seeds"),
    ],
)
def test_invalid_images_and_masks(tiny_model, request_fields, words):
    assert words in generate_error(tiny_model, [0], **request_fields)
