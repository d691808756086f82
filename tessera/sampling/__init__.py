"""Drawing as pure steps: each solver is `step(denoise, x, t, s, memory, noise) -> (x, memory)`, looped by `walk`."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveInt, field_validator

from tessera.sampling.ancestral import Ancestral
from tessera.sampling.caching import AnyCaching, FirstBlock, NoCaching
from tessera.sampling.ddim import DDIM
from tessera.sampling.dpm import DPMSolver, StochasticDPMSolver
from tessera.sampling.euler import Euler
from tessera.sampling.guidance import AnyGuidanceSchedule, ConstantGuidance
from tessera.sampling.heun import Heun
from tessera.sampling.loop import SampleState, sample_loop
from tessera.sampling.sde import SDE
from tessera.sampling.timesteps import SPACINGS, AnyTimestepSpacing, Uniform
from tessera.sampling.unipc import UniPC
from tessera.settings import Settings, by_kind

SAMPLERS = {
    "ancestral": Ancestral, "ddim": DDIM, "euler": Euler, "heun": Heun, "dpm++": DPMSolver,
    "dpm++-sde": StochasticDPMSolver, "unipc": UniPC, "sde": SDE,
}  # fmt: skip
AnySampler = Annotated[
    Ancestral | DDIM | Euler | Heun | DPMSolver | StochasticDPMSolver | UniPC | SDE,
    BeforeValidator(by_kind),
    Field(discriminator="kind"),
]


class SamplingConfig(Settings):
    """How to draw from a model: kept in its bundle, so that drawing needs no flags."""

    sampler: AnySampler = DDIM()
    num_steps: PositiveInt = 50
    timestep_spacing: AnyTimestepSpacing = Field(default=Uniform(), description="the grid of times")
    guidance_scale: float = Field(default=1.0, description="classifier-free guidance; 1 is off")
    guidance_channels: PositiveInt | Literal["all"] = Field(
        default="all", description="3 repeats the official code's rule"
    )
    guidance_interval: tuple[float, float] | None = Field(
        default=None, description="the lowest and the highest time (0 data, 1 noise) that is guided; null: all are"
    )
    guidance_schedule: AnyGuidanceSchedule = Field(
        default=ConstantGuidance(), description="how the guidance changes over time"
    )
    guidance_rescale: float = Field(
        default=0.0, ge=0, le=1, description="how far a guided output gets the unguided one's standard deviation"
    )
    caching: AnyCaching = Field(default=NoCaching(), description="what is reused from one step to the next")

    @field_validator("guidance_interval")
    @classmethod
    def _ordered(cls, interval: tuple[float, float] | None) -> tuple[float, float] | None:
        if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError("expected two times, the lower one first, from 0 (data) to 1 (noise), such as [0.2, 0.8]")
        return interval

    def summary(self) -> str:
        """In one line, for people: solver, steps, grid, guidance, and whatever else is not as usual."""
        words = [f"{self.sampler.kind}, {self.num_steps} steps, {self.timestep_spacing.kind}"]
        words += [f"guidance {self.guidance_scale:g}"] if self.guidance_scale != 1 else []
        usual = SamplingConfig()
        for name in (name for name in SamplingConfig.model_fields if name not in ("num_steps", "guidance_scale")):
            value = getattr(self, name)
            if isinstance(value, Settings):  # a choice by kind: the kind, and what is not as usual in it
                of_kind = value.model_dump(mode="json")
                if name not in ("sampler", "timestep_spacing") and of_kind["kind"] != getattr(usual, name).kind:
                    words.append(f"{name} {of_kind['kind']}")
                plain = type(value)().model_dump(mode="json")
                words += [f"{key} {value}" for key, value in of_kind.items() if plain[key] != value]
            elif value != getattr(usual, name):
                words.append(f"{name} {value}")
        return ", ".join(word.replace("_", " ") for word in words)


__all__ = [
    "DDIM",
    "SAMPLERS",
    "SDE",
    "SPACINGS",
    "Ancestral",
    "AnySampler",
    "AnyTimestepSpacing",
    "DPMSolver",
    "Euler",
    "FirstBlock",
    "Heun",
    "NoCaching",
    "SampleState",
    "SamplingConfig",
    "StochasticDPMSolver",
    "UniPC",
    "sample_loop",
]
