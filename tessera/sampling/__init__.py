"""Drawing as pure steps: each solver is `step(denoise, x, t, s, memory, noise) -> (x, memory)`, looped by `walk`."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from tessera.sampling.ancestral import Ancestral
from tessera.sampling.ddim import DDIM
from tessera.sampling.times import SPACINGS, AnySpacing, Even
from tessera.sampling.walk import State, walk
from tessera.settings import Settings, by_kind

SAMPLERS = {"ancestral": Ancestral, "ddim": DDIM}
AnySampler = Annotated[Ancestral | DDIM, BeforeValidator(by_kind), Field(discriminator="kind")]


class SamplingConfig(Settings):
    """How to draw from a model: kept in its bundle, so that drawing needs no flags."""

    sampler: AnySampler = DDIM()
    steps: PositiveInt = 50
    spacing: AnySpacing = Field(default=Even(), description="the grid of times")
    guidance: float = Field(default=1.0, description="classifier-free guidance; 1 is off")
    guidance_channels: PositiveInt | Literal["all"] = Field(
        default="all", description="3 repeats the official code's rule"
    )


__all__ = ["DDIM", "SAMPLERS", "SPACINGS", "Ancestral", "AnySampler", "AnySpacing", "SamplingConfig", "State", "walk"]
