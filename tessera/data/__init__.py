"""Data sets: files of any layout, embedded data, cached latents; batches in an order that depends on position only."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tessera.data.digits import DigitsConfig
from tessera.data.files import FilesConfig
from tessera.data.lanes import LanesConfig
from tessera.data.loader import Batch, Loader
from tessera.data.shapes import ShapesConfig
from tessera.settings import expand_kind


def _kind(value: Any) -> Any:
    """Expand the name of an embedded data set; the default kind is files."""
    value = expand_kind(value)
    return {"kind": "files", **value} if isinstance(value, dict) else value


AnyData = Annotated[
    FilesConfig | DigitsConfig | ShapesConfig | LanesConfig, BeforeValidator(_kind), Field(discriminator="kind")
]

__all__ = ["AnyData", "Batch", "DigitsConfig", "FilesConfig", "LanesConfig", "Loader", "ShapesConfig"]
