"""Tessera: the diffusion transformer, from a folder of images to a picture."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.6.0"

if TYPE_CHECKING:
    from tessera.bundle import Model as Model
    from tessera.bundle import save as save
    from tessera.conditioning import Condition as Condition
    from tessera.errors import TesseraError as TesseraError
    from tessera.generation.pipeline import decode as decode
    from tessera.generation.pipeline import generate as generate
    from tessera.generation.pipeline import generate_steps as generate_steps
    from tessera.interop.load import load as load

_PUBLIC = {  # imported when first used: `tessera --help` must not wait for torch
    "Condition": "tessera.conditioning",
    "Model": "tessera.bundle",
    "TesseraError": "tessera.errors",
    "decode": "tessera.generation.pipeline",
    "generate": "tessera.generation.pipeline",
    "load": "tessera.interop.load",
    "save": "tessera.bundle",
    "walk": "tessera.generation.pipeline",
}

__all__ = ["Condition", "Model", "TesseraError", "decode", "generate", "generate_steps", "load", "save"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tessera' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)
