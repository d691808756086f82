"""The schedulers of diffusers: the diffusion process of each, and the sampling settings that repeat it.

Every class has its own settings and defaults (those of diffusers 0.42). What Tessera does not repeat exactly is
returned as a list of phrases, so that nothing is replaced silently.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from tessera.diffusion.gaussian import GaussianDiffusionConfig
from tessera.errors import TesseraError
from tessera.files import read_json
from tessera.sampling import (
    DDIM,
    Ancestral,
    DPMSolver,
    DPMSolverSDE,
    DynamicThresholding,
    Euler,
    Heun,
    Karras,
    Leading,
    LogSNR,
    NoClipping,
    RangeClipping,
    SamplingConfig,
    Solver,
    Trailing,
    Uniform,
    UniPC,
)
from tessera.settings import Settings, validate

PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
MAX_SIGMA = 4096.0  # of a schedule that ends in pure noise, as in diffusers: (2^24)^0.5


class SchedulerConfig(Settings):
    """scheduler_config.json of any class. The defaults are those of settings that a class does not have."""

    num_train_timesteps: PositiveInt = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    snr_shift_scale: PositiveFloat = 1.0
    trained_betas: Annotated[list[float], Field(min_length=1)] | None = None
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    rescale_betas_zero_snr: bool = False
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    steps_offset: NonNegativeInt = 0
    set_alpha_to_one: bool = True
    clip_sample: bool = False
    clip_sample_range: PositiveFloat = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = Field(default=0.995, gt=0, le=1)
    sample_max_value: PositiveFloat = 1.0
    variance_type: str | None = None
    solver_order: PositiveInt = 2
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    lambda_min_clipped: float | None = None
    predict_x0: bool = True
    disable_corrector: list[int] = []
    solver_p: Any = None
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_lu_lambdas: bool | None = False
    use_beta_sigmas: bool | None = False
    use_flow_sigmas: bool | None = False
    interpolation_type: str = "linear"
    timestep_type: str = "discrete"
    sigma_min: float | None = None
    sigma_max: float | None = None


PROCESS = {
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr", "timestep_spacing", "steps_offset",
}  # fmt: skip
CLIPPING = {"clip_sample", "clip_sample_range"}
THRESHOLDING = {"thresholding", "dynamic_thresholding_ratio", "sample_max_value"}
SIGMAS = {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"}
MULTISTEP = {*PROCESS, *THRESHOLDING, *SIGMAS, "use_flow_sigmas", "solver_order", "solver_type", "lower_order_final"}


class SchedulerClass(NamedTuple):
    """What a class of schedulers reads of a configuration, and its defaults where they are not those of the fields."""

    settings: set[str]
    defaults: dict[str, Any]
    nearest: Solver | None = None  # of classes that Tessera has no solver for


LINSPACE = {"timestep_spacing": "linspace"}
_DDIM = SchedulerClass({*PROCESS, *CLIPPING, *THRESHOLDING, "set_alpha_to_one"}, {"clip_sample": True})
_DDPM = SchedulerClass(
    {*PROCESS, *CLIPPING, *THRESHOLDING, "variance_type"}, {"clip_sample": True, "variance_type": "fixed_small"}
)
_COGVIDEOX = SchedulerClass(  # clip_sample is a setting that these two do not use
    {*PROCESS, "set_alpha_to_one", "snr_shift_scale"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "snr_shift_scale": 3.0},
)
CLASSES = {
    "CogVideoXDDIMScheduler": _COGVIDEOX,
    "CogVideoXDPMScheduler": SchedulerClass(_COGVIDEOX.settings, _COGVIDEOX.defaults, DPMSolverSDE()),
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "DPMSolverMultistepScheduler": SchedulerClass(
        {*MULTISTEP, "algorithm_type", "euler_at_final", "final_sigmas_type", "lambda_min_clipped", "use_lu_lambdas"},
        LINSPACE,
    ),
    "UniPCMultistepScheduler": SchedulerClass(
        {*MULTISTEP, "predict_x0", "disable_corrector", "solver_p", "final_sigmas_type", "sigma_min", "sigma_max"},
        {**LINSPACE, "solver_type": "bh2"},
    ),
    "EulerDiscreteScheduler": SchedulerClass(
        {*PROCESS, *SIGMAS, "interpolation_type", "timestep_type", "final_sigmas_type", "sigma_min", "sigma_max"},
        LINSPACE,
    ),
    "EulerAncestralDiscreteScheduler": SchedulerClass(PROCESS, LINSPACE),
    "HeunDiscreteScheduler": SchedulerClass({*PROCESS, *SIGMAS, *CLIPPING}, LINSPACE, Heun()),
    "LMSDiscreteScheduler": SchedulerClass({*PROCESS, *SIGMAS}, LINSPACE, DPMSolver()),
    "KDPM2DiscreteScheduler": SchedulerClass({*PROCESS, *SIGMAS}, LINSPACE, Heun()),
    "KDPM2AncestralDiscreteScheduler": SchedulerClass({*PROCESS, *SIGMAS}, LINSPACE, DDIM(eta=1)),
    "DEISMultistepScheduler": SchedulerClass(MULTISTEP, LINSPACE, DPMSolver()),
    "DPMSolverSinglestepScheduler": SchedulerClass(
        {*MULTISTEP - {"timestep_spacing", "steps_offset", "rescale_betas_zero_snr"}, "final_sigmas_type"},
        LINSPACE,
        DPMSolver(),
    ),
    "DPMSolverSDEScheduler": SchedulerClass({*PROCESS, *SIGMAS}, LINSPACE, DPMSolverSDE()),
    "SASolverScheduler": SchedulerClass({*PROCESS, *THRESHOLDING, *SIGMAS}, LINSPACE, DPMSolverSDE()),
    "PNDMScheduler": SchedulerClass({*PROCESS, "set_alpha_to_one"}, {"set_alpha_to_one": False}, DPMSolver()),
}
OTHER = SchedulerClass({*PROCESS, *CLIPPING, *THRESHOLDING, "set_alpha_to_one"}, {}, DDIM())
# Their state is x / alpha, from noise of the largest sigma. DiTPipeline scales neither.
SCALED = {
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler",
}  # fmt: skip


def read_scheduler(path: Path) -> tuple[SchedulerConfig, str]:
    """The settings that the class of a scheduler_config.json has, and the name of the class. Raises TesseraError."""
    data = read_json(path)
    kind = str(data.get("_class_name"))
    if kind not in CLASSES and not data.keys() & {"beta_schedule", "trained_betas"}:
        raise TesseraError(f"{path} is a {kind}; expected a scheduler with betas, such as DDIMScheduler")
    if data.get("trained_betas") is not None:
        data.pop("beta_schedule", None)  # trained_betas take precedence
    scheduler = CLASSES.get(kind, OTHER)
    data = {name: value for name, value in data.items() if name in scheduler.settings and value != -math.inf}
    return validate(SchedulerConfig, {**scheduler.defaults, **data}, str(path)), kind


def sampling_config(
    scheduler: SchedulerConfig,
    kind: str,
    diffusion: GaussianDiffusionConfig,
    num_steps: int,
    scales_state: bool = False,
) -> tuple[SamplingConfig, list[str]]:
    """The sampling settings of a scheduler without guidance, and in what diffusers' images differ, as phrases.

    scales_state: whether the pipeline scales noise and state as the scheduler expects; DiTPipeline does not
    """
    differences: list[str] = []
    for setting, default in SchedulerConfig().model_dump().items():
        if setting in UNSUPPORTED and getattr(scheduler, setting) not in (default, None):
            differences.append(f"{setting} {getattr(scheduler, setting)}")
    sampler = solver_of(scheduler, kind, diffusion, differences)
    spacing = _spacing(scheduler, kind, diffusion, num_steps, differences)
    clipping = _clipping(scheduler, differences)
    if kind in SCALED and not scales_state:
        differences.append(f"DiTPipeline does not scale the noise and the state as {kind} expects: its images differ")
    config = SamplingConfig(sampler=sampler, num_steps=num_steps, timestep_spacing=spacing, clipping=clipping)
    begins_at_0 = scheduler.timestep_spacing == "linspace" or (
        scheduler.timestep_spacing == "leading" and not scheduler.steps_offset
    )
    if not scheduler.set_alpha_to_one and begins_at_0 and not isinstance(clipping, NoClipping):
        differences.append("a last step that only limits x0")
    return config, differences


UNSUPPORTED = {
    "lambda_min_clipped", "solver_p", "disable_corrector", "use_beta_sigmas", "use_flow_sigmas", "interpolation_type",
    "timestep_type", "sigma_min", "sigma_max", "predict_x0", "euler_at_final",
}  # fmt: skip


def solver_of(
    scheduler: SchedulerConfig, kind: str, diffusion: GaussianDiffusionConfig | None, differences: list[str]
) -> Any:
    """The solver of a class; notes what it does not repeat. diffusion: None if it is not Gaussian"""
    order, nearest = scheduler.solver_order, CLASSES.get(kind, OTHER).nearest
    if nearest is not None:
        differences.append(f"the solver of {kind}; Tessera samples with {getattr(nearest, 'kind', '')}")
        return nearest
    if kind in ("DDPMScheduler", "DDPMParallelScheduler") and diffusion is not None:
        return _ancestral(scheduler, diffusion, differences)
    if kind == "EulerDiscreteScheduler":
        return Euler()
    if kind == "EulerAncestralDiscreteScheduler":
        return DDIM(eta=1)
    if kind == "UniPCMultistepScheduler":
        if order not in (2, 3) or (order == 3 and scheduler.lower_order_final):
            differences.append(
                f"solver_order {order}"
                + (": diffusers lowers it to 2 in the second to last step" if order == 3 else "")
            )
        if scheduler.final_sigmas_type == "sigma_min" and scheduler.lower_order_final:
            differences.append("lower_order_final: diffusers takes the last step in first order")
        variant = scheduler.solver_type if scheduler.solver_type in ("bh1", "bh2") else "bh2"
        if variant != scheduler.solver_type:
            differences.append(f"solver_type {scheduler.solver_type}; Tessera uses {variant}")
        return UniPC(order=3 if order == 3 else 2, variant="bh1" if variant == "bh1" else "bh2")
    if kind == "DPMSolverMultistepScheduler":
        return _dpm_solver(scheduler, differences)
    return DDIM()


def _dpm_solver(scheduler: SchedulerConfig, differences: list[str]) -> Any:
    order, stochastic = min(scheduler.solver_order, 3), scheduler.algorithm_type.startswith("sde-")
    if order == 1:
        if scheduler.thresholding:
            differences.append("thresholding at solver_order 1: diffusers limits the noise with x0")
        if scheduler.algorithm_type == "sde-dpmsolver":
            differences.append("algorithm_type sde-dpmsolver; Tessera samples with ddim, eta 1")
        return DDIM(eta=1.0 if stochastic else 0.0)
    solver = DPMSolverSDE() if stochastic else DPMSolver(order=3 if order == 3 else 2)
    if not scheduler.algorithm_type.endswith("dpmsolver++"):
        differences.append(f"algorithm_type {scheduler.algorithm_type}; Tessera samples with {solver.kind}")
    elif order == 3:
        differences.append(
            "solver_order 3; Tessera has order 2"
            if stochastic
            else "solver_order 3: diffusers takes half of the second difference's integral"
        )
    elif scheduler.solver_type != "midpoint":
        differences.append(f"solver_type {scheduler.solver_type}; Tessera uses midpoint")
    if scheduler.final_sigmas_type == "sigma_min" and scheduler.lower_order_final:
        differences.append("lower_order_final: below 15 steps diffusers takes the last one in first order")
    return solver


def _ancestral(scheduler: SchedulerConfig, diffusion: GaussianDiffusionConfig, differences: list[str]) -> Ancestral:
    """DiTPipeline drops a learned variance: the scheduler's is used. learned_range is that of the official code."""
    variance, learned = scheduler.variance_type or "fixed_small", diffusion.variance == "learned"
    if variance in ("learned", "fixed_large_log"):
        differences.append(f"variance_type {variance}; Tessera uses {diffusion.variance}")
        return Ancestral()
    if variance == "fixed_large" and (scheduler.steps_offset or scheduler.timestep_spacing == "trailing"):
        differences.append("variance_type fixed_large: diffusers adds noise after the last step, too")
    if variance == "learned_range" or not learned:
        return Ancestral()
    return Ancestral(variance="beta" if variance == "fixed_large" else "posterior")


def _spacing(
    scheduler: SchedulerConfig, kind: str, diffusion: GaussianDiffusionConfig, num_steps: int, differences: list[str]
) -> Any:
    """The grid of a class; notes what it does not repeat."""
    trained, name = scheduler.num_train_timesteps, scheduler.timestep_spacing
    is_multistep = "solver_order" in CLASSES.get(kind, OTHER).settings
    at_first = not scheduler.set_alpha_to_one or scheduler.final_sigmas_type == "sigma_min"
    if scheduler.use_karras_sigmas or scheduler.use_exponential_sigmas or scheduler.use_lu_lambdas:
        process = diffusion.build()
        ends = torch.tensor([1 / trained, 1.0], dtype=torch.float64)
        low, high = (process.sigma(ends) / process.alpha(ends)).clamp(max=MAX_SIGMA).tolist()
        differences.append("the network's times between trained steps: diffusers rounds or interpolates them otherwise")
        if at_first:
            differences.append("final_sigmas_type sigma_min; Tessera ends at the data")
        if scheduler.use_karras_sigmas:
            return Karras(sigma_min=low, sigma_max=high)
        return LogSNR(sigma_min=low, sigma_max=high)
    if kind in ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler") and (
        name == "linspace" or (name == "trailing" and trained % num_steps)
    ):
        differences.append(
            f"timestep_spacing {name}: {kind} steps back by {trained} // steps, not to the next timestep"
        )
    if kind in SCALED and name == "linspace" and num_steps > 1 and (trained - 1) % (num_steps - 1):
        differences.append("timestep_spacing linspace: Tessera rounds to trained steps")
    end = "first-step" if at_first else "data"
    if name == "trailing":
        return Trailing(end=end)
    if name == "leading":
        return Leading(offset=scheduler.steps_offset, without_first=is_multistep, end=end)
    return Uniform(without_first=is_multistep, end=end)


def _clipping(scheduler: SchedulerConfig, differences: list[str]) -> Any:
    if scheduler.thresholding:
        if scheduler.sample_max_value < 1:
            differences.append(f"sample_max_value {scheduler.sample_max_value:g}; Tessera uses 1")
        limit = max(scheduler.sample_max_value, 1.0)
        return DynamicThresholding(quantile=scheduler.dynamic_thresholding_ratio, max_value=limit)
    return RangeClipping(range=scheduler.clip_sample_range) if scheduler.clip_sample else NoClipping()
