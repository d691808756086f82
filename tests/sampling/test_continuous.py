"""Continuous batching: rows that share network calls are the images that each row gives alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tessera import generation
from tessera.conditioning import Condition
from tessera.generation import ContinuousSampler, SampleRequest
from tessera.sampling import SAMPLERS

SOLVERS = ["ddim", "heun", {"kind": "dpm++", "order": 3}]
STEPS = [3, 4, 5, 7, 9]
SCALES = [1.0, 1.5, 3.0, 6.0]
INTERVALS = [None, (0.2, 0.7)]


def requests(count: int) -> list[SampleRequest]:
    """One row each, of five step counts, three solvers, four scales and two intervals; some rescaled or scheduled."""
    result = []
    for row in range(count):
        settings = {
            "sampler": SOLVERS[row % 3],
            "num_steps": STEPS[row % 5],
            "guidance_interval": INTERVALS[row // 4 % 2],
        }
        settings |= {"guidance_rescale": 0.5} if row % 4 == 1 else {}
        settings |= {"guidance_schedule": "linear"} if row % 7 == 2 else {}
        settings |= {"timestep_spacing": {"kind": "karras"}} if row % 6 == 5 else {}
        result.append(SampleRequest([100 + row], {"label": [row % 3]}, SCALES[row % 4], settings=settings))
    return result


def run(model, schedule: dict[int, list[tuple[str, SampleRequest]]], **options) -> dict[str, Tensor]:
    """Latents by name; schedule: the requests that join before a network call."""
    sampler, done, call = ContinuousSampler(model, **options), {}, 0
    while call <= max(schedule) or sampler.batch.num_rows:
        for name, request in schedule.get(call, []):
            sampler.add(request, [name] if len(request) == 1 else [f"{name}.{i}" for i in range(len(request))])
        if sampler.batch.num_rows:
            done |= sampler.step()
        call += 1
    return done


def alone(model, request: SampleRequest) -> Tensor:
    *_, last = generation.sample_steps(model, request.resolve(model))
    return last.x[0]


def gray_levels(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() * 127.5)


@pytest.fixture(params=["dit", "rope-swiglu", "flow", "flow-epsilon", "unet"])
def model(request, make_model):
    if request.param == "unet":
        return make_model({"kind": "unet", "model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1})
    if request.param.startswith("flow"):
        prediction = {"flow": "velocity", "flow-epsilon": "epsilon"}[request.param]
        return make_model({"out_channels": 1}, diffusion={"kind": "flow", "prediction": prediction})
    return make_model({"block": "rope-swiglu"} if request.param == "rope-swiglu" else {})


@torch.no_grad()
def test_sixteen_mixed_rows_joining_at_different_moments_equal_each_alone(model):
    rows = requests(16)
    schedule: dict[int, list] = {}
    for number, request in enumerate(rows):
        schedule.setdefault((number * 5) % 11, []).append((str(number), request))
    assert len(schedule) > 8
    done = run(model, schedule)
    assert len(done) == 16
    for number, request in enumerate(rows):
        assert gray_levels(done[str(number)], alone(model, request)) < 1


@torch.no_grad()
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_request_is_bit_for_bit_the_usual_loop(make_model, sampler):
    """At equal batch size every network call is the same, so is every bit."""
    model = make_model({"in_channels": 1, "out_channels": 2, "step_size_embedding": sampler == "jump"})
    request = SampleRequest([5, 6, 7], {"label": [0, 1, 2]}, 2.5, settings={"sampler": sampler, "num_steps": 6})
    model.network.forward = type(model.network).forward.__get__(model.network)
    with without_table():
        *_, last = generation.sample_steps(model, request.resolve(model))
        done = run(model, {0: [("x", request)]})
    for row in range(3):
        assert torch.equal(done[f"x.{row}"], last.x[row])


@torch.no_grad()
def test_rows_of_one_solver_that_join_later_share_its_step(make_model):
    """Two rows, one two steps behind, in a solver with a memory: grouped once their memories have the same length."""
    model = make_model({})
    one, two = (
        SampleRequest([seed], {"label": [1]}, 2.0, settings={"sampler": "unipc", "num_steps": 8}) for seed in (1, 2)
    )
    sampler = ContinuousSampler(model)
    sampler.add(one, ["one"])
    sampler.step()
    sampler.step()
    sampler.add(two, ["two"])
    groups, done = [], {}
    while sampler.batch.num_rows:
        done |= sampler.step()
        groups.append(len(sampler.batch._groups))
    assert groups[0] == 2
    assert 1 in groups
    for name, request in (("one", one), ("two", two)):
        assert gray_levels(done[name], alone(model, request)) < 1


@torch.no_grad()
def test_every_call_holds_only_the_rows_that_need_it(make_model):
    """Rows with guidance off at their time are not evaluated without their condition."""
    model, sizes = make_model({}), []
    original = model.network.forward
    model.network.forward = lambda x, t, condition: sizes.append(len(x)) or original(x, t, condition)
    settings = {"sampler": "ddim", "num_steps": 4}
    rows = [
        SampleRequest([1], {"label": [0]}, 1.0, settings=settings),
        SampleRequest([2], {"label": [1]}, 3.0, settings=settings),
        SampleRequest([3], {"label": [2]}, 3.0, settings={**settings, "guidance_interval": (0.0, 0.6)}),
    ]
    done = run(model, {0: [(str(number), row) for number, row in enumerate(rows)]})
    assert sizes == [4, 4, 5, 5]  # 3 rows, one guided at all times and one at the last two
    model.network.forward = original
    for number, row in enumerate(rows):
        assert gray_levels(done[str(number)], alone(model, row)) < 1


@torch.no_grad()
def test_caching_keeps_its_state_with_each_row(make_model):
    model = make_model({"depth": 3})
    caching = {"kind": "first-block", "threshold": 0.4}
    rows = [
        replace(request, settings={**request.settings, "caching": caching, "num_steps": 8 + 2 * (number % 3)})
        for number, request in enumerate(requests(6))
    ]
    done = run(model, {2 * number: [(str(number), row)] for number, row in enumerate(rows)}, caching=caching)
    reused = False
    for number, request in enumerate(rows):
        assert gray_levels(done[str(number)], alone(model, request)) < 1
        plain = replace(request, settings={**request.settings, "caching": "none"})
        reused |= gray_levels(done[str(number)], alone(model, plain)) > 0.1
    assert reused


@torch.no_grad()
def test_inpainting_image_to_image_and_new_images_together(make_model):
    model, random = make_model({}), np.random.default_rng(0)
    image = random.integers(0, 256, (8, 8, 1), np.uint8)
    mask = np.zeros((8, 8), bool)
    mask[:, 4:] = True
    settings = {"sampler": "dpm++", "num_steps": 6}
    rows = [
        SampleRequest([1], {"label": [0]}, 2.0, settings=settings, init_image=image, mask=mask),
        SampleRequest([2], {"label": [1]}, 2.0, settings=settings, init_image=image, strength=0.5),
        SampleRequest([3], {"label": [2]}, 2.0, settings=settings),
        SampleRequest([4], {"label": [2]}, 2.0, settings=settings, init_image=image, mask=~mask),
        SampleRequest([5], {"label": [2]}, 2.0, settings=settings, init_image=image, mask=mask, strength=0.9),
        SampleRequest([6], {"label": [2]}, 2.0, settings=settings, init_image=image, mask=mask, strength=0.6),
    ]
    done = run(model, {number: [(str(number), row)] for number, row in enumerate(rows)})
    for number, row in enumerate(rows):
        assert gray_levels(done[str(number)], alone(model, row)) < 1


@torch.no_grad()
def test_sizes_are_sampled_in_calls_of_their_own(make_model):
    model = make_model({})
    rows = [SampleRequest([n], {"label": [0]}, 2.0, size=size) for n, size in enumerate([(8, 8), (4, 8), (8, 8)])]
    done = run(model, {0: [(str(number), row) for number, row in enumerate(rows)]})
    for number, row in enumerate(rows):
        assert done[str(number)].shape[1:] == (row.size or (8, 8))
        assert gray_levels(done[str(number)], alone(model, row)) < 1


@torch.no_grad()
def test_a_guidance_model(make_model):
    model, weak = make_model({}), make_model({"depth": 1}, seed=3)
    rows = [replace(request, guidance_model=weak) for request in requests(8) if request.guidance_scale != 1]
    done = run(model, {0: [(str(n), row) for n, row in enumerate(rows)]}, guidance_model=weak)
    for number, row in enumerate(rows):
        assert gray_levels(done[str(number)], alone(model, row)) < 1


@torch.no_grad()
def test_rows_leave_between_steps(make_model):
    model, settings = make_model({}), {"sampler": "heun", "num_steps": 5}
    request = SampleRequest([1, 2, 3], {"label": [0, 1, 2]}, 2.0, settings=settings)
    sampler = ContinuousSampler(model)
    sampler.add(request, ["a", "b", "c"])
    sampler.step()
    sampler.batch.remove({"b"})
    done = {}
    while sampler.batch.num_rows:
        done |= sampler.step()
    assert sorted(done) == ["a", "c"]
    *_, last = generation.sample_steps(model, request.resolve(model))
    assert gray_levels(done["c"], last.x[2]) < 1


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["ddim", "heun"], ids=["between steps", "within a step"])
def test_a_row_leaves_at_the_end_of_its_step(make_model, sampler):
    request = SampleRequest([1, 2], {"label": [0]}, settings={"sampler": sampler, "num_steps": 4})
    continuous = ContinuousSampler(make_model({}))
    continuous.add(request, ["a", "b"])
    continuous.step()
    continuous.batch.remove({"a"})
    assert continuous.batch.num_rows == (2 if sampler == "heun" else 1)
    continuous.step()
    assert continuous.batch.num_rows == 1


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["ddim", "heun"], ids=["between steps", "within a step"])
def test_a_name_is_free_once_its_row_is_removed(make_model, sampler):
    model, settings = make_model({}), {"sampler": sampler, "num_steps": 4}
    one, two = (SampleRequest([seed], {"label": [0]}, settings=settings) for seed in (1, 2))
    continuous, done = ContinuousSampler(model), {}
    continuous.add(one, ["a"])
    continuous.step()
    with pytest.raises(ValueError, match="different names"):
        continuous.add(two, ["a"])
    continuous.add(replace(one, seeds=[3]), ["b"])  # joins at the next step
    continuous.batch.remove({"a"})
    assert continuous.batch.num_rows == 1
    continuous.add(two, ["a"])
    while continuous.batch.num_rows:
        done |= continuous.step()
    assert gray_levels(done["a"], alone(model, two)) < 1


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpm++", "unipc"])
def test_only_some_rows_advance(make_model, sampler):
    """Any rows may advance in a call; those within a step advance together. Each image is that of the row alone."""
    model, settings = make_model({}), {"sampler": sampler, "num_steps": 4}
    request = SampleRequest([1, 2, 3, 4], {"label": [0, 1, 2, 0]}, 2.0, settings=settings)
    continuous, done, random = ContinuousSampler(model), {}, np.random.default_rng(3)
    continuous.add(request, list("abcd"))
    while batch_rows := [name for state in continuous.batch.states for name in state.name]:
        before = {
            name: step for state in continuous.batch.states for name, step in zip(state.name, state.step.tolist())
        }
        within = continuous.batch.within_step
        chosen = set(random.choice(batch_rows, size=1 + random.integers(len(batch_rows)), replace=False).tolist())
        done |= continuous.step(chosen)
        for state in continuous.batch.states:
            for name, step in zip(state.name, state.step.tolist()):
                assert step == before[name] or name in chosen | within
    *_, last = generation.sample_steps(model, request.resolve(model))
    for row, name in enumerate("abcd"):
        assert gray_levels(done[name], last.x[row]) < 1


@torch.no_grad()
def test_the_predicted_x0_of_each_row_is_known_after_its_first_call(make_model):
    model, settings = make_model({}), {"sampler": "ddim", "num_steps": 1}
    request = SampleRequest([1, 2], {"label": [0, 1]}, settings=settings)
    more_steps = replace(request, settings={"sampler": "ddim", "num_steps": 3, "timestep_spacing": "uniform"})
    continuous = ContinuousSampler(model)
    continuous.add(more_steps, ["a", "b"])
    continuous.step()
    (state,) = continuous.batch.states
    *_, one_step = generation.sample_steps(model, request.resolve(model))  # one step ends at the x0 predicted in noise
    assert gray_levels(state.x0, one_step.x) < 1


@torch.no_grad()
@pytest.mark.parametrize("network", [{}, {"block": "rope-swiglu"}], ids=["adaln", "rope-swiglu"])
def test_with_a_fixed_number_of_rows_in_each_call_images_have_equal_bits_in_any_company(make_model, network):
    model, sizes = make_model({**network, "hidden_size": 64, "num_heads": 4}), set()
    original = model.network.forward
    model.network.forward = lambda x, t, condition: sizes.add(len(x)) or original(x, t, condition)
    rows = requests(12)
    schedule = {
        call: [(str(number), row) for number, row in enumerate(rows) if number % 5 == call] for call in range(5)
    }
    together = run(model, schedule, rows_per_call=8)
    for number, row in enumerate(rows):
        assert torch.equal(run(model, {0: [(str(number), row)]}, rows_per_call=8)[str(number)], together[str(number)])
    assert sizes == {8}


def test_caching_needs_a_varying_number_of_rows(make_model):
    with pytest.raises(generation.pipeline.TesseraError, match="varying number of rows"):
        ContinuousSampler(make_model({}), rows_per_call=4, caching="first-block")


def test_requests_that_cannot_be_sampled_together(make_model):
    sampler = ContinuousSampler(make_model({}))
    request = SampleRequest([1], {"label": [0]}, settings={"caching": "first-block"})
    with pytest.raises(generation.pipeline.TesseraError, match="the same caching"):
        sampler.add(request, ["x"])
    with pytest.raises(generation.pipeline.TesseraError, match="the same precision"):
        sampler.add(SampleRequest([1], {"label": [0]}, precision="bfloat16"), ["x"])
    guided = SampleRequest([1], {"label": [0]}, 2.0, guidance_model=make_model({"depth": 1}))
    with pytest.raises(generation.pipeline.TesseraError, match="the same guidance model"):
        sampler.add(guided, ["x"])
    with pytest.raises(generation.pipeline.TesseraError, match="the same guidance model"):
        ContinuousSampler(make_model({}), make_model({"depth": 1})).add(replace(guided, guidance_model=None), ["x"])
    with pytest.raises(ValueError, match="1 rows need as many names, not 2"):
        sampler.add(SampleRequest([1], {"label": [0]}), ["x", "y"])
    assert sampler.batch.num_rows == 0


@torch.no_grad()
def test_a_row_that_is_not_finite_does_not_affect_others(make_model):
    model, settings = make_model({}), {"sampler": "dpm++", "num_steps": 4}
    original = model.network.forward

    def broken(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        raw = original(x, t, condition)
        return torch.where((condition.label == 1).view(-1, 1, 1, 1), torch.nan, raw)

    model.network.forward = broken
    request = SampleRequest([1, 2, 3], {"label": [0, 1, 2]}, settings=settings)
    with without_table():
        done = run(model, {0: [("x", request)]})
    assert isinstance(done["x.1"], generation.pipeline.TesseraError)
    assert "x.1 contains numbers that are not finite" in str(done["x.1"])
    assert torch.isfinite(done["x.0"]).all()
    assert torch.isfinite(done["x.2"]).all()


class without_table:  # noqa: N801
    """No modulation is computed ahead: its products have another shape."""

    def __enter__(self) -> None:
        from tessera.generation import denoiser

        self.module, self.limit = denoiser, denoiser.MODULATION_TABLE_BYTES
        denoiser.MODULATION_TABLE_BYTES = -1

    def __exit__(self, *_) -> None:
        self.module.MODULATION_TABLE_BYTES = self.limit
