"""Timestep grids."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from tessera.diffusion import FlowMatchingConfig, GaussianDiffusionConfig
from tessera.diffusion.gaussian import CosineBetas
from tessera.errors import TesseraError
from tessera.sampling.exponential import NoiseLevel
from tessera.sampling.timesteps import (
    TIMESTEP_SPACINGS,
    Karras,
    Leading,
    LogSNR,
    Quadratic,
    Shifted,
    Trailing,
    Uniform,
    timestep_grid,
)
from tessera.settings import validate

spacings = pytest.mark.parametrize("spacing", ["uniform", "leading", "trailing"])


def steps(spacing, count, trained=1000):
    return [
        round(float(t) * trained) - 1
        for t in timestep_grid(
            TIMESTEP_SPACINGS[spacing](), count, GaussianDiffusionConfig(num_timesteps=trained).build()
        )[:-1]
    ]


@spacings
@given(data=st.data())
def test_times_fall_from_the_first_step_to_the_data(spacing, data):
    trained = data.draw(st.integers(1, 2000))
    count = data.draw(st.integers(1, trained))
    times = timestep_grid(TIMESTEP_SPACINGS[spacing](), count, GaussianDiffusionConfig(num_timesteps=trained).build())
    assert times.shape == (count + 1,)
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    assert times[0] <= 1
    if spacing != "leading":
        assert times[0] == 1


@spacings
def test_all_the_steps_are_all_the_steps(spacing):
    assert steps(spacing, 1000) == list(range(999, -1, -1))


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("count", [1, 3, 7, 10, 30, 50, 250, 1000])
def test_steps_are_those_of_diffusers(spacing, count):
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(count)
    assert steps(spacing, count) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("count", [1, 2, 7, 10, 20, 30, 50, 250, 999])
@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_grids_without_their_first_step_are_those_of_multistep_schedulers(spacing, count):
    scheduler = DPMSolverMultistepScheduler(timestep_spacing=spacing, steps_offset=0 if count == 999 else 1)
    scheduler.set_timesteps(count)
    ours = Uniform(without_first=True)
    if spacing == "leading":
        ours = Leading(without_first=True, offset=scheduler.config.steps_offset)
    times = timestep_grid(ours, count, GaussianDiffusionConfig().build())[:-1]
    assert (times * 1000).round().int().sub(1).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("spacing", [Uniform, Leading, Trailing])
def test_a_grid_may_end_at_the_first_trained_step(spacing):
    process = GaussianDiffusionConfig().build()
    times, whole = (timestep_grid(spacing(end=end), 10, process) for end in ("first-step", "data"))
    assert times[-1] == 1 / 1000
    expected = (
        whole[:-1] if spacing is not Trailing else torch.cat((whole[:-1], torch.tensor([0.001], dtype=torch.float64)))
    )
    assert torch.equal(times, expected)  # no step from the first trained step to itself
    with pytest.raises(TesseraError, match="end=first-step needs a process of discrete steps"):
        timestep_grid(spacing(end="first-step"), 10, FlowMatchingConfig().build())


def test_offsets_are_added_and_must_fit():
    process = GaussianDiffusionConfig().build()
    assert timestep_grid(Leading(offset=1), 10, process)[0] == 0.902
    with pytest.raises(TesseraError, match="offset 1 leads to step 1000 at 1000 steps"):
        timestep_grid(Leading(offset=1), 1000, process)
    with pytest.raises(TesseraError, match="coincide at 1 steps"):
        timestep_grid(Leading(end="first-step"), 1, process)


@pytest.mark.parametrize(("count", "rest"), [(2, [0]), (5, [749, 500, 250, 0]), (4, [666, 333, 0])])
def test_uniform_steps_run_from_last_to_first(count, rest):
    assert steps("uniform", count) == [999, *rest]


@pytest.mark.parametrize(("count", "middle"), [(21, 499), (31, 500), (23, 499)])
def test_uniform_steps_round_as_the_official_sum_does(count, middle):
    """The middle lies at exactly 499.5; the official code adds strides up, and its rounding errors decide."""
    assert steps("uniform", count)[count // 2] == middle


def test_one_uniform_step_starts_at_full_noise():
    assert steps("uniform", 1) == [999]


@spacings
@pytest.mark.parametrize("count", [0, -1, 1001])
def test_steps_out_of_range(spacing, count):
    with pytest.raises(TesseraError, match=f"num_steps is {count}; .* use 1 to 1000"):
        timestep_grid(TIMESTEP_SPACINGS[spacing](), count, GaussianDiffusionConfig().build())


PROCESSES = {
    "gaussian": GaussianDiffusionConfig(),
    "cosine": GaussianDiffusionConfig(schedule=CosineBetas()),
    "zero terminal": GaussianDiffusionConfig(prediction="v", zero_terminal_snr=True),
    "flow": FlowMatchingConfig(),
    "gvp": FlowMatchingConfig(path="gvp"),
}
processes = pytest.mark.parametrize("name", PROCESSES)


@processes
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("count", [1, 2, 7, 50, 1000])
def test_every_grid_falls_from_noise_to_data(name, spacing, count):
    """In time, and in the values that solvers divide by: no two times have the same noise."""
    process = PROCESSES[name].build()
    if spacing == "leading" and process.num_timesteps is None:
        with pytest.raises(TesseraError, match="leading needs a process of discrete steps.*: use uniform"):
            timestep_grid(TIMESTEP_SPACINGS[spacing](), count, process)
        return
    times = timestep_grid(TIMESTEP_SPACINGS[spacing](), count, process)
    assert (times.dtype, times.shape) == (torch.float64, (count + 1,))
    assert (times.diff() < 0).all()
    assert times[-1] == 0
    assert times[0] == 1 or spacing == "leading"
    assert (process.sigma(times).diff() < 0).all()
    assert (NoiseLevel.at(process, times).half_log_snr.diff() > 0).all()
    if process.num_timesteps is not None:  # never beyond the first trained step
        assert float(times[-2]) * process.num_timesteps > 1 - 1e-6
        assert (process.model_time(times[:-1]) > -1e-3).all()


@processes
@given(
    spacing=st.sampled_from([Quadratic(), Shifted(shift=0.02), Shifted(shift=60), Karras(rho=2), LogSNR()]),
    count=st.integers(1, 1000),
)
def test_curves_fall_at_any_count(name, spacing, count):
    assert (timestep_grid(spacing, count, PROCESSES[name].build()).diff() < 0).all()


@pytest.mark.parametrize(("schedule", "count"), [("linear", 5), ("linear", 20), ("squaredcos_cap_v2", 5)])
@pytest.mark.parametrize(("spacing", "theirs"), [(Karras, "use_karras_sigmas"), (LogSNR, "use_exponential_sigmas")])
def test_ratios_are_the_sigmas_of_diffusers(count, schedule, spacing, theirs):
    """diffusers begins at the last trained sigma however large it is; Tessera by default at 80."""
    scheduler = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule=schedule, **{theirs: True})
    scheduler.set_timesteps(count)
    process = PROCESSES["gaussian" if schedule == "linear" else "cosine"].build()
    times = timestep_grid(spacing(sigma_max=1e9), count, process)
    torch.testing.assert_close(
        process.sigma(times) / process.alpha(times), scheduler.sigmas.double(), rtol=1e-3, atol=1e-9
    )


def test_karras_of_a_flow_is_the_formula():
    """Karras et al. 2022, equation 5, in t = ratio / (1 + ratio); the first time is the noise itself."""
    n, rho = 9, 5.0
    roots = [80 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho)) for i in range(n)]
    times = timestep_grid(Karras(rho=rho), n, FlowMatchingConfig().build())
    assert times[1:-1].tolist() == pytest.approx([root**rho / (1 + root**rho) for root in roots[1:]])
    assert (times[0], times[-1]) == (1, 0)


@processes
def test_logsnr_is_uniform_in_log_snr(name):
    process = PROCESSES[name].build()
    steps = NoiseLevel.at(process, timestep_grid(LogSNR(sigma_max=50), 12, process)[1:-1]).half_log_snr.diff()
    assert steps.tolist() == pytest.approx([float(steps[0])] * 10, rel=1e-6)


def test_shifted_times_of_a_flow_are_those_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.1, 10).tolist())
    times = timestep_grid(Shifted(), 10, FlowMatchingConfig().build())
    torch.testing.assert_close(times, scheduler.sigmas.double(), rtol=1e-6, atol=1e-7)


def test_a_flow_has_any_positive_number_of_times():
    assert len(timestep_grid(Uniform(), 5000, FlowMatchingConfig().build())) == 5001
    with pytest.raises(TesseraError, match="num_steps is 0; use 1 or more"):
        timestep_grid(Uniform(), 0, FlowMatchingConfig().build())


def test_times_that_coincide_are_an_error():
    with pytest.raises(TesseraError, match="karras times coincide at 200 steps; use fewer steps"):
        timestep_grid(Karras(sigma_min=1, sigma_max=1 + 1e-14), 200, GaussianDiffusionConfig().build())
    with pytest.raises(TesseraError, match="shifted times coincide"):
        timestep_grid(Shifted(shift=1e18), 50, FlowMatchingConfig().build())


@pytest.mark.parametrize("bounds", [{"sigma_min": 200, "sigma_max": 300}, {"sigma_min": 1e-4, "sigma_max": 1e-3}])
@pytest.mark.parametrize("spacing", [Karras, LogSNR])
def test_ratios_outside_of_what_a_process_was_trained_at(spacing, bounds):
    """Of 1000 steps with linear betas: the square root of 1 / alpha_bar - 1, from 0.01 to 157."""
    message = rf"{bounds['sigma_min']:g} to sigma_max {bounds['sigma_max']:g} is outside .* 0\.01 to 157"
    with pytest.raises(TesseraError, match=message):
        timestep_grid(spacing(**bounds), 10, GaussianDiffusionConfig().build())
    assert len(timestep_grid(spacing(**bounds), 10, FlowMatchingConfig().build())) == 11


def test_sigma_min_is_below_sigma_max():
    with pytest.raises(TesseraError, match="sigma_min 9 must be below sigma_max 3"):
        validate(Karras, {"sigma_min": 9, "sigma_max": 3}, "the grid")
