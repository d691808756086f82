"""Tessera: a toolkit for diffusion transformers. Train, sample, evaluate and convert DiT and U-Net models."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.15.0"

if TYPE_CHECKING:
    from tessera.bundle import save as save
    from tessera.clips import save_clip as save_clip
    from tessera.conditioning import Condition as Condition
    from tessera.errors import TesseraError as TesseraError
    from tessera.generation import ContinuousSampler as ContinuousSampler
    from tessera.generation import SampleRequest as SampleRequest
    from tessera.generation import decode as decode
    from tessera.generation import generate as generate
    from tessera.generation import generate_steps as generate_steps
    from tessera.interop.load import load as load
    from tessera.model import Model as Model
    from tessera.training.api import train as train

_PUBLIC = {  # imported on first use: `tessera --help` must not import torch
    "Condition": "tessera.conditioning",
    "ContinuousSampler": "tessera.generation",
    "Model": "tessera.model",
    "SampleRequest": "tessera.generation",
    "TesseraError": "tessera.errors",
    "decode": "tessera.generation",
    "generate": "tessera.generation",
    "generate_steps": "tessera.generation",
    "load": "tessera.interop.load",
    "save": "tessera.bundle",
    "save_clip": "tessera.clips",
    "train": "tessera.training.api",
}

__all__ = [
    "Condition", "ContinuousSampler", "Model", "SampleRequest", "TesseraError", "decode", "generate", "generate_steps",
    "load", "save", "save_clip", "train",
]  # fmt: skip


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tessera' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
