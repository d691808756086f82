"""Sampling: solvers, timestep grids, guidance and the loop over steps.

A solver is `solver(denoise, x, t, s, memory, noise) -> (x, memory)`. `sample_loop` applies it along a grid of times;
`ContinuousBatch` applies several to rows that share network calls.
"""

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, PositiveInt, field_validator

from tessera.sampling.ancestral import Ancestral
from tessera.sampling.caching import AnyCaching, FirstBlockCaching, NoCaching
from tessera.sampling.clipping import AnyClipping, DynamicThresholding, NoClipping, RangeClipping
from tessera.sampling.continuous import ContinuousBatch, RowState, sampling_noise
from tessera.sampling.ddim import DDIM
from tessera.sampling.denoiser import (
    CachedNetwork,
    Denoiser,
    DenoiserRows,
    GuidanceModel,
    RowDenoiser,
    SamplingNetwork,
)
from tessera.sampling.dpm import DPMSolver, DPMSolverSDE
from tessera.sampling.editing import EditSource, MaskedMemory, MaskedSolver
from tessera.sampling.euler import Euler
from tessera.sampling.frames import (
    AnyFrameSchedule,
    Autoregressive,
    FrameSolver,
    Pyramid,
    Sliding,
    Stage,
    Together,
    check_schedule,
    given_mask,
)
from tessera.sampling.guidance import (
    AnyGuidanceSchedule,
    ConstantGuidance,
    CosineGuidance,
    Guidance,
    LinearGuidance,
    PoweredCosineGuidance,
)
from tessera.sampling.heun import Heun
from tessera.sampling.jump import Jump, check_step_size
from tessera.sampling.loop import SampleState, Stepper, sample_loop
from tessera.sampling.sde import SDE
from tessera.sampling.solver import Solver
from tessera.sampling.timesteps import (
    TIMESTEP_SPACINGS,
    AnyTimestepSpacing,
    Karras,
    Leading,
    LogSNR,
    Quadratic,
    ResolutionShifted,
    Shifted,
    Trailing,
    Uniform,
    timestep_grid,
)
from tessera.sampling.unipc import UniPC
from tessera.settings import Settings, expand_kind

_Sampler = Ancestral | DDIM | Euler | Heun | DPMSolver | DPMSolverSDE | UniPC | SDE | Jump
AnySampler = Annotated[_Sampler, BeforeValidator(expand_kind), Field(discriminator="kind")]
SAMPLERS = {solver.model_fields["kind"].default: solver for solver in get_args(_Sampler)}


class SamplingConfig(Settings):
    """How to sample from a model. Saved in its bundle, so that sampling needs no flags."""

    sampler: AnySampler = Field(default=DDIM(), description="the solver")
    num_steps: PositiveInt = Field(default=50, description="steps from noise to data")
    timestep_spacing: AnyTimestepSpacing = Field(default=Uniform(), description="the grid of times")
    guidance_scale: float = Field(default=1.0, description="classifier-free guidance; 1 is off")
    guidance_scales: dict[str, float] = Field(
        default_factory=dict,
        description="further guidance, away from the output without one condition: scales by field; frames: away from "
        "the output in which the clean frames of a clip are noise",
    )
    guidance_channels: PositiveInt | Literal["all"] = Field(
        default="all", description="3 repeats the official code's rule"
    )
    guidance_interval: tuple[float, float] | None = Field(
        default=None, description="guide only between these times (0 data, 1 noise); null: at all times"
    )
    guidance_schedule: AnyGuidanceSchedule = Field(
        default=ConstantGuidance(), description="how the guidance scale changes over time"
    )
    guidance_rescale: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="how far a guided output gets the standard deviation of the conditional output",
    )
    null_text: Literal["embedding", "empty"] = Field(
        default="embedding",
        description="the text of the weak output of guidance: the network's null value, or an encoded empty prompt",
    )
    clipping: AnyClipping = Field(default=NoClipping(), description="limits of the predicted x0, for pixels")
    frame_schedule: AnyFrameSchedule = Field(
        default=Together(), description="the order in which the frames of a clip are sampled"
    )
    caching: AnyCaching = Field(default=NoCaching(), description="what is reused from one step to the next")

    @field_validator("guidance_interval")
    @classmethod
    def _ordered(cls, interval: tuple[float, float] | None) -> tuple[float, float] | None:
        if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError("expected two times, the lower one first, from 0 (data) to 1 (noise), such as [0.2, 0.8]")
        return interval

    def summary(self) -> str:
        """One line: solver, steps, spacing, guidance, and every setting that differs from its default."""
        parts = [f"{self.sampler.kind}, {self.num_steps} steps, {self.timestep_spacing.kind}"]
        parts += [f"guidance {self.guidance_scale:g}"] if self.guidance_scale != 1 else []
        default = SamplingConfig()
        for name in (name for name in SamplingConfig.model_fields if name not in ("num_steps", "guidance_scale")):
            value = getattr(self, name)
            if isinstance(
                value, Settings
            ):  # a choice by kind: the kind, and its fields that differ from their defaults
                data = value.model_dump(mode="json")
                if name not in ("sampler", "timestep_spacing") and data["kind"] != getattr(default, name).kind:
                    parts.append(f"{name} {data['kind']}")
                defaults = type(value)().model_dump(mode="json")
                parts += [f"{key} {field}" for key, field in data.items() if defaults[key] != field]
            elif value != getattr(default, name):
                parts.append(f"{name} {value}")
        return ", ".join(part.replace("_", " ") for part in parts)


__all__ = [
    "DDIM",
    "SAMPLERS",
    "SDE",
    "TIMESTEP_SPACINGS",
    "Ancestral",
    "AnyCaching",
    "AnyClipping",
    "AnyFrameSchedule",
    "AnyGuidanceSchedule",
    "AnySampler",
    "AnyTimestepSpacing",
    "Autoregressive",
    "CachedNetwork",
    "ConstantGuidance",
    "ContinuousBatch",
    "CosineGuidance",
    "DPMSolver",
    "DPMSolverSDE",
    "Denoiser",
    "DenoiserRows",
    "DynamicThresholding",
    "EditSource",
    "Euler",
    "FirstBlockCaching",
    "FrameSolver",
    "Guidance",
    "GuidanceModel",
    "Heun",
    "Jump",
    "Karras",
    "Leading",
    "LinearGuidance",
    "LogSNR",
    "MaskedMemory",
    "MaskedSolver",
    "NoCaching",
    "NoClipping",
    "PoweredCosineGuidance",
    "Pyramid",
    "Quadratic",
    "RangeClipping",
    "ResolutionShifted",
    "RowDenoiser",
    "RowState",
    "SampleState",
    "SamplingConfig",
    "SamplingNetwork",
    "Shifted",
    "Sliding",
    "Solver",
    "Stage",
    "Stepper",
    "Together",
    "Trailing",
    "UniPC",
    "Uniform",
    "check_schedule",
    "check_step_size",
    "given_mask",
    "sample_loop",
    "sampling_noise",
    "timestep_grid",
]  # fmt: skip
