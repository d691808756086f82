"""The flow matching schedulers of diffusers <-> our sampling settings."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import PositiveFloat, PositiveInt

from tessera.bundle import BundleConfig
from tessera.errors import TesseraError
from tessera.files import read_json
from tessera.interop.schedulers import CLASSES, SchedulerConfig, solver_of
from tessera.sampling import DPMSolver, Euler, ResolutionShifted, SamplingConfig, Shifted, Uniform, UniPC
from tessera.settings import Settings, validate

FLOW_EULER = "FlowMatchEulerDiscreteScheduler"


class FlowScheduler(Settings):
    """scheduler_config.json of a FlowMatchEulerDiscreteScheduler."""

    num_train_timesteps: PositiveInt = 1000
    shift: PositiveFloat = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: PositiveInt = 256
    max_image_seq_len: PositiveInt = 4096
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    time_shift_type: str = "exponential"
    stochastic_sampling: bool = False


# Settings that Tessera does not repeat, with the values that need nothing.
UNSUPPORTED = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
UNSUPPORTED |= {"invert_sigmas": False, "time_shift_type": "exponential", "stochastic_sampling": False}


MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
FIRST = 1 - 1e-6  # of UniPC, where sigma 1 would be infinite noise


class FlowSampling(NamedTuple):
    """The process and the sampling settings of a scheduler, and in what diffusers' samples differ, as phrases."""

    shift: float  # of training times; 1 where it depends on the size
    rounded_times: bool
    sampling: SamplingConfig  # without guidance
    differences: list[str]


def read_flow_scheduler(path: Path | None, grid: str, tokens: int | None) -> FlowSampling:
    """What the scheduler of a pipeline of flow matching does; the defaults of Euler's method if there is none.

    grid: the sigmas that the pipeline passes: linspace, or scheduler for none. tokens: what a dynamic shift depends on,
    where it is not the number of tokens of the image. Raises TesseraError for a scheduler of another process.
    """
    data: dict[str, Any] = {} if path is None or not path.exists() else read_json(path)
    kind = str(data.get("_class_name", FLOW_EULER))
    if kind != FLOW_EULER and not data.get("use_flow_sigmas"):
        raise TesseraError(f"{path} is a {kind}; expected {FLOW_EULER}, or another one with use_flow_sigmas")
    differences: list[str] = []
    solver: Any = Euler()
    if kind != FLOW_EULER:
        data["shift"] = data.get("flow_shift", 1.0)
        names = SchedulerConfig.model_fields.keys() - {"prediction_type", "use_flow_sigmas"}
        known = CLASSES[kind].defaults if kind in MULTISTEP else {}
        known = {**known, **{name: data[name] for name in names if data.get(name) not in (None, -math.inf)}}
        if kind in MULTISTEP:
            solver = solver_of(validate(SchedulerConfig, known, str(path)), kind, None, differences)
        else:
            differences.append(f"the solver of {kind}; Tessera samples with euler")
    known = {name: data[name] for name in FlowScheduler.model_fields if data.get(name) is not None}
    scheduler = validate(FlowScheduler, known, str(path))
    differences += [
        f"{name} {getattr(scheduler, name)}"
        for name, usual in UNSUPPORTED.items()
        if getattr(scheduler, name) not in (usual, None)
    ]
    shift = 1.0 if scheduler.use_dynamic_shifting else scheduler.shift
    smallest = 1 / scheduler.num_train_timesteps
    times: dict[str, Any] = {"terminal": scheduler.shift_terminal}
    if kind == "DPMSolverMultistepScheduler":
        times["first"] = 1 - smallest
    elif kind == "UniPCMultistepScheduler":
        times |= {"first": FIRST, "end": smallest}
    elif grid == "scheduler":  # its own last sigma is shifted already, and the grid from it is shifted once more
        times["last"] = shift * smallest / (1 + (shift - 1) * smallest)
    if scheduler.use_dynamic_shifting:
        spacing: Any = ResolutionShifted(
            base_shift=scheduler.base_shift,
            max_shift=scheduler.max_shift,
            base_tokens=scheduler.base_image_seq_len,
            max_tokens=scheduler.max_image_seq_len,
            tokens=tokens,
            **times,
        )
    else:
        spacing = Shifted(shift=shift, **times)
    sampling = SamplingConfig(sampler=solver, timestep_spacing=spacing)
    return FlowSampling(shift, kind in MULTISTEP, sampling, differences)


def flow_scheduler(config: BundleConfig) -> tuple[str, dict[str, Any], list[str]]:
    """The class and the settings of the scheduler of a model of flow matching, and how it samples otherwise."""
    spacing, solver, scheduler = config.sampling.timestep_spacing, config.sampling.sampler, FlowScheduler()
    notes: list[str] = []
    if isinstance(spacing, ResolutionShifted):
        scheduler = FlowScheduler(
            use_dynamic_shifting=True,
            base_shift=spacing.base_shift,
            max_shift=spacing.max_shift,
            base_image_seq_len=spacing.base_tokens,
            max_image_seq_len=spacing.max_tokens,
            shift_terminal=spacing.terminal,
        )
    elif isinstance(spacing, Shifted):
        scheduler = FlowScheduler(shift=spacing.shift, shift_terminal=spacing.terminal)
    elif not isinstance(spacing, Uniform):
        notes.append(f"its timesteps are uniform, and this model has {spacing.kind} ones")
    flow = {"use_flow_sigmas": True, "flow_shift": scheduler.shift, "prediction_type": "flow_prediction"}
    if isinstance(solver, DPMSolver) and not scheduler.use_dynamic_shifting:
        return MULTISTEP[0], {**flow, "solver_order": solver.order}, notes
    if isinstance(solver, UniPC):
        dynamic = {"use_dynamic_shifting": scheduler.use_dynamic_shifting, "shift_terminal": scheduler.shift_terminal}
        return MULTISTEP[1], {**flow, **dynamic, "solver_order": solver.order, "solver_type": solver.variant}, notes
    if not isinstance(solver, Euler):
        notes.append(f"its scheduler is Euler's method, and this model samples with {solver.kind}")
    return FLOW_EULER, scheduler.model_dump(), notes
