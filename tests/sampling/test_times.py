"""Which steps a drawing visits."""

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from tessera.errors import TesseraError
from tessera.process import GaussianConfig
from tessera.sampling.times import SPACINGS, Even, times

spacings = pytest.mark.parametrize("spacing", ["even", "leading", "trailing"])


def steps(spacing, count, trained=1000):
    return [
        round(float(t) * trained) - 1
        for t in times(SPACINGS[spacing](), count, GaussianConfig(steps=trained).build())[:-1]
    ]


@spacings
@given(data=st.data())
def test_times_fall_from_the_first_step_to_the_data(spacing, data):
    trained = data.draw(st.integers(1, 2000))
    count = data.draw(st.integers(1, trained))
    got = times(SPACINGS[spacing](), count, GaussianConfig(steps=trained).build())
    assert got.shape == (count + 1,)
    assert got[-1] == 0
    assert (got.diff() < 0).all()
    assert got[0] <= 1
    if spacing != "leading":
        assert got[0] == 1


@spacings
def test_all_the_steps_are_all_the_steps(spacing):
    assert steps(spacing, 1000) == list(range(999, -1, -1))


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("count", [1, 3, 7, 10, 30, 50, 250, 1000])
def test_steps_are_those_of_diffusers(spacing, count):
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(count)
    assert steps(spacing, count) == scheduler.timesteps.tolist()


@pytest.mark.parametrize(("count", "rest"), [(2, [0]), (5, [749, 500, 250, 0]), (4, [666, 333, 0])])
def test_even_steps_run_from_last_to_first(count, rest):
    assert steps("even", count) == [999, *rest]


@pytest.mark.parametrize(("count", "middle"), [(21, 499), (31, 500), (23, 499)])
def test_even_steps_round_as_the_official_sum_does(count, middle):
    """The middle lies at exactly 499.5; the official code adds strides up, and its rounding errors decide."""
    assert steps("even", count)[count // 2] == middle


def test_one_even_step_starts_in_full_noise():
    assert steps("even", 1) == [999]


@spacings
@pytest.mark.parametrize("count", [0, -1, 1001])
def test_steps_out_of_range(spacing, count):
    with pytest.raises(TesseraError, match=f"steps is {count}; .* give 1 to 1000"):
        times(SPACINGS[spacing](), count, GaussianConfig().build())


def test_times_are_float32():
    assert times(Even(), 10, GaussianConfig().build()).dtype == torch.float64
