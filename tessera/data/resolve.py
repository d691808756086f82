"""A data set from a word or path on the command line."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tessera.data import AnyData
from tessera.data.files import FilesConfig
from tessera.data.images import Dataset
from tessera.data.layouts import expand_path, split_path
from tessera.data.packed import HUB_PREFIX
from tessera.errors import TesseraError
from tessera.settings import Settings, expand_kind, read_yaml, validate

EMBEDDED = ("digits", "shapes", "lanes")


class _Section(Settings):
    data: AnyData


def resolve_data(text: str, size: tuple[int, int] | None, channels: int = 3) -> AnyData:
    """The configuration of `digits`, `shapes:test`, a path that data.path accepts, or the `data` section of a recipe.

    size, channels: of files; a recipe and the embedded data sets specify their own. Raises TesseraError.
    """
    word, _, split = text.partition(":")
    path = Path(text).expanduser()
    if word in EMBEDDED:
        data: dict[str, Any] = {"kind": word} | ({"split": split} if split else {})
    elif path.suffix in (".yaml", ".yml"):
        data = expand_kind(read_yaml(path, _Section).get("data") or {})
        if not isinstance(data, dict):
            raise TesseraError(
                f"{path}: its data section is {data!r}; expected a mapping, or the name of embedded data"
            )
    elif not text.startswith(HUB_PREFIX) and not expand_path(split_path(text)[0]):
        raise TesseraError(
            f"no data at {text}: expected a folder of images or of .parquet or .tar files, one such file or a pattern "
            f"of them, {HUB_PREFIX}owner/name, a recipe (.yaml), {' or '.join(EMBEDDED)}; PATH:SPLIT selects a split"
        )
    else:
        data = {"kind": "files", "path": text}
    if data.get("kind") in ("files", "folder", "parquet") and "size" not in data:
        if size is None:
            raise TesseraError(f"the images of {text} need a size: add for example --size 256")
        data = {"size": size, "channels": channels, **data}
    return parse_data(data, f"the data {text}")


def parse_data(section: dict[str, Any], where: str = "the data") -> AnyData:
    """The `data` section of a recipe, validated. Raises TesseraError."""
    return validate(_Section, {"data": section}, where).data


def open_data(config: AnyData) -> Dataset:
    """Open the data set, without classes where its labels are not valid or all equal, which is printed."""
    if isinstance(config, FilesConfig) and config.classes == "auto":
        try:
            dataset = config.open()
            check_classes(dataset.class_names, config)
            return dataset
        except TesseraError as error:
            dataset = config.model_copy(update={"classes": "none"}).open()  # raises any other error again
            print(f"data: read without classes: {error}", file=sys.stderr, flush=True)
            return dataset
    return config.open()


def check_classes(class_names: Sequence[str], config: AnyData) -> None:
    """Raise TesseraError if a data set has only one class."""
    if len(class_names) == 1:
        raise TesseraError(
            f"data.path {config.description.partition(' ')[2]} contains only one class ('{class_names[0]}'), so there "
            "is nothing to condition on: set data.classes=none to train without classes"
        )
