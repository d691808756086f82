"""Files of any layout and embedded data sets to batches of pixels, in an order that is a function of position."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tessera.data.digits import DigitsConfig
from tessera.data.files import FilesConfig
from tessera.data.loader import Batch, Loader
from tessera.data.shapes import ShapesConfig
from tessera.settings import expand_kind


def _kind(value: Any) -> Any:
    """The name of embedded data stands for it, and data of no kind is files."""
    value = expand_kind(value)
    return {"kind": "files", **value} if isinstance(value, dict) else value


AnyData = Annotated[FilesConfig | DigitsConfig | ShapesConfig, BeforeValidator(_kind), Field(discriminator="kind")]

__all__ = ["AnyData", "Batch", "DigitsConfig", "FilesConfig", "Loader", "ShapesConfig"]
