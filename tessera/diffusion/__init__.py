"""Diffusion processes: how noise is added, what a raw output means, and the training loss.

A process samples times, adds noise, and converts a raw output to x0 and eps. Solvers use its alpha and sigma.
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tessera.diffusion.flow import FlowMatching, FlowMatchingConfig
from tessera.diffusion.gaussian import GaussianDiffusion, GaussianDiffusionConfig
from tessera.diffusion.process import DiffusionProcess, Losses, Prediction
from tessera.settings import expand_kind

__all__ = [
    "AnyDiffusionConfig", "DiffusionProcess", "FlowMatching", "FlowMatchingConfig", "GaussianDiffusion",
    "GaussianDiffusionConfig", "Losses", "Prediction",
]  # fmt: skip


def _gaussian_by_default(value: Any) -> Any:
    value = expand_kind(value)
    return {"kind": "gaussian", **value} if isinstance(value, dict) else value


AnyDiffusionConfig = Annotated[
    GaussianDiffusionConfig | FlowMatchingConfig, BeforeValidator(_gaussian_by_default), Field(discriminator="kind")
]
