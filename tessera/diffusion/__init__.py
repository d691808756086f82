"""The mathematics of noise: what is mixed in, what a raw output means, and what training minimises.

A process draws times, mixes noise in, and turns a raw output into x0 and eps; every solver asks it for alpha and sigma.
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tessera.diffusion.flow import FlowMatching, FlowMatchingConfig
from tessera.diffusion.gaussian import GaussianDiffusion, GaussianDiffusionConfig
from tessera.settings import by_kind

DiffusionProcess = GaussianDiffusion | FlowMatching


def _gaussian_unless_told(value: Any) -> Any:
    value = by_kind(value)
    return {"kind": "gaussian", **value} if isinstance(value, dict) else value


AnyDiffusionConfig = Annotated[
    GaussianDiffusionConfig | FlowMatchingConfig, BeforeValidator(_gaussian_unless_told), Field(discriminator="kind")
]

__all__ = [
    "AnyDiffusionConfig",
    "DiffusionProcess",
    "FlowMatching",
    "FlowMatchingConfig",
    "GaussianDiffusion",
    "GaussianDiffusionConfig",
]
