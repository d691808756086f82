"""Files of any layout and embedded data sets to batches of pixels, in an order that is a function of position."""

from typing import Annotated

from pydantic import Field

from tessera.data.digits import DigitsConfig
from tessera.data.files import FilesConfig
from tessera.data.loader import Batch, Loader
from tessera.data.shapes import ShapesConfig

AnyData = Annotated[FilesConfig | DigitsConfig | ShapesConfig, Field(discriminator="kind")]

__all__ = ["AnyData", "Batch", "DigitsConfig", "FilesConfig", "Loader", "ShapesConfig"]
