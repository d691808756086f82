"""Folders, parquet files and embedded data sets to batches of pixels, in an order that is a function of position."""

from typing import Annotated

from pydantic import Field

from tessera.data.digits import DigitsConfig
from tessera.data.folder import FolderConfig
from tessera.data.loader import Batch, Loader
from tessera.data.parquet import ParquetConfig
from tessera.data.shapes import ShapesConfig

AnyData = Annotated[FolderConfig | ParquetConfig | DigitsConfig | ShapesConfig, Field(discriminator="kind")]

__all__ = ["AnyData", "Batch", "DigitsConfig", "FolderConfig", "Loader", "ParquetConfig", "ShapesConfig"]
