"""A data set by one word or path, as commands take it."""

from pathlib import Path
from typing import Any

from tessera.data import AnyData
from tessera.data.files import FilesConfig
from tessera.data.images import Dataset
from tessera.data.layouts import HUB_PREFIX
from tessera.errors import TesseraError
from tessera.settings import Settings, expand_kind, read_yaml, validate

EMBEDDED = ("digits", "shapes")


class _Section(Settings):
    data: AnyData


def resolve_data(text: str, size: tuple[int, int] | None, channels: int = 3) -> AnyData:
    """`digits`, `shapes:test`, files of any layout that data.path takes, or a recipe for its `data` section.

    size, channels: what files are read as; a recipe and the embedded sets say their own.
    Raises TesseraError for what is none of these.
    """
    word, _, split = text.partition(":")
    path = Path(text).expanduser()
    if word in EMBEDDED:
        data: dict[str, Any] = {"kind": word} | ({"split": split} if split else {})
    elif path.suffix in (".yaml", ".yml"):
        data = expand_kind(read_yaml(path).get("data") or {})
        if not isinstance(data, dict):
            raise TesseraError(
                f"{path}: its data section is {data!r}; expected a mapping, or the name of embedded data"
            )
    elif not path.exists() and not text.startswith(HUB_PREFIX):
        raise TesseraError(
            f"no data at {text}: expected a folder of images or of .parquet or .tar files, one such file, "
            f"{HUB_PREFIX}owner/name, a recipe (.yaml), {' or '.join(EMBEDDED)}"
        )
    else:
        data = {"kind": "files", "path": text}
    if data.get("kind") in ("files", "folder", "parquet") and "size" not in data:
        if size is None:
            raise TesseraError(f"say at which size the images of {text} are to be read: --size 256")
        data = {"size": size, "channels": channels, **data}
    return parse_data(data, f"the data {text}")


def parse_data(told: dict[str, Any], where: str = "the data") -> AnyData:
    """The `data` section of a recipe, validated. Raises TesseraError."""
    return validate(_Section, {"data": told}, where).data


def open_data(config: AnyData) -> Dataset:
    """The data set, with classes where its folders are classes in good order, without them where not."""
    if isinstance(config, FilesConfig) and config.classes == "auto":
        try:
            return config.open()
        except TesseraError:  # loose images beside folders, or one folder only: raised again below if it is not that
            return config.model_copy(update={"classes": "none"}).open()
    return config.open()
