"""The flow matching schedulers of diffusers <-> our sampling settings."""

from pathlib import Path
from typing import Any

from pydantic import PositiveFloat, PositiveInt

from tessera.bundle import BundleConfig
from tessera.errors import TesseraError
from tessera.files import read_json
from tessera.sampling import Euler, ResolutionShifted, SamplingConfig, Shifted, Uniform
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


def read_flow_scheduler(path: Path | None) -> tuple[FlowScheduler, str]:
    """The scheduler of a pipeline of flow matching, and its class; the defaults if there is none.

    Raises TesseraError for a scheduler of another process.
    """
    if path is None or not path.exists():
        return FlowScheduler(), FLOW_EULER
    data = read_json(path)
    kind = str(data.get("_class_name"))
    if kind != FLOW_EULER and not data.get("use_flow_sigmas"):
        raise TesseraError(f"{path} is a {kind}; expected {FLOW_EULER}, or another one with use_flow_sigmas")
    if kind != FLOW_EULER:
        data["shift"] = data.get("flow_shift", 1.0)
    known = {name: data[name] for name in FlowScheduler.model_fields if data.get(name) is not None}
    return validate(FlowScheduler, known, str(path)), kind


def flow_sampling(
    scheduler: FlowScheduler, kind: str, grid: str, tokens: int | None
) -> tuple[SamplingConfig, list[str]]:
    """The sampling settings of a scheduler without guidance, and in what diffusers' samples differ, as phrases.

    grid: the sigmas that the pipeline passes: linspace, or scheduler for none. tokens: what a dynamic shift depends on,
    where it is not the number of tokens of the image.
    """
    differences = [
        f"{name} {getattr(scheduler, name)}"
        for name, usual in UNSUPPORTED.items()
        if getattr(scheduler, name) not in (usual, None)
    ]
    if kind != FLOW_EULER:
        differences.append(f"the solver of {kind}; Tessera samples with euler")
    shift = 1.0 if scheduler.use_dynamic_shifting else scheduler.shift
    first = 1 / scheduler.num_train_timesteps
    # The scheduler's own last sigma is shifted already, and the grid from it is shifted once more.
    last = None if grid == "linspace" else shift * first / (1 + (shift - 1) * first)
    common: dict[str, Any] = {"last": last, "terminal": scheduler.shift_terminal}
    if scheduler.use_dynamic_shifting:
        spacing: Any = ResolutionShifted(
            base_shift=scheduler.base_shift,
            max_shift=scheduler.max_shift,
            base_tokens=scheduler.base_image_seq_len,
            max_tokens=scheduler.max_image_seq_len,
            tokens=tokens,
            **common,
        )
    else:
        spacing = Shifted(shift=shift, **common)
    return SamplingConfig(sampler=Euler(), timestep_spacing=spacing), differences


def flow_scheduler(config: BundleConfig) -> tuple[str, dict[str, Any], list[str]]:
    """The class and the settings of the scheduler of a model of flow matching, and how it samples otherwise."""
    spacing, notes, scheduler = config.sampling.timestep_spacing, [], FlowScheduler()
    if not isinstance(config.sampling.sampler, Euler):
        notes.append(f"its scheduler is Euler's method, and this model samples with {config.sampling.sampler.kind}")
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
    return FLOW_EULER, scheduler.model_dump(), notes
