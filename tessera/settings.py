"""Configuration: frozen models that validate, suggest the nearest known key, and convert to and from YAML."""

import copy
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from tessera.errors import TesseraError

# Height and width; one number stands for a square.
Size = Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(lambda v: (v, v) if isinstance(v, int) else v)]

# Height and width, or frames, height and width; one number stands for a square image.
InputSize = Annotated[
    tuple[PositiveInt, ...],
    BeforeValidator(lambda v: (v, v) if isinstance(v, int) else v),
    Field(min_length=2, max_length=3),
]


class Settings(BaseModel):
    """Base class of all configuration: immutable, without unknown keys, with validated defaults.

    A class with a `kind` field is one of several choices. Its kind alone (`block: adaln`) selects it with its own
    defaults, in YAML and on the command line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @classmethod
    def expand_shorthand(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Hook: replace a shorthand of the class, such as the name of a preset. Called before validation."""
        return data

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = cls.expand_shorthand(data)
        for key in data:
            if key not in cls.model_fields:
                kind = cls.model_fields["kind"].default if "kind" in cls.model_fields else None
                text = unknown_name("key", str(key), cls.model_fields) + (f" (kind: {kind})" if kind else "")
                raise PydanticCustomError("unknown_key", "{text}", {"text": text})
        return data


def expand_kind(value: Any) -> Any:
    """Expand `name` to `{kind: name}`: the validator of every field that is a choice among kinds."""
    return {"kind": value} if isinstance(value, str) else value


def as_tuple(value: Any) -> Any:
    """Expand one number to a tuple of one: the validator of a field that holds one number or several."""
    return (value,) if isinstance(value, int | float) else value


def unknown_name(what: str, name: str, known: Any) -> str:
    """Message for a name that does not exist, with the nearest known name or with all of them."""
    known = sorted(str(each) for each in known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown {what} '{name}'" + (f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}")


S = TypeVar("S", bound=Settings)


def validate(kind: type[S], data: Any, source: str) -> S:
    """Validate data as a settings class. source names the origin of the data in the error.

    Raises TesseraError that lists every invalid field: its dotted path, the value and what was expected.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            path, value = ".".join(_field_path(fault, data)), fault["input"]
            suffix = "" if isinstance(value, dict) or fault["type"] == "missing" else f" (got {value!r})"
            lines.append(f"  {path or 'top level'}: {_message(fault)}{suffix}")
        raise TesseraError(f"{source} is not valid:\n" + "\n".join(lines)) from None


def _field_path(fault: Mapping[str, Any], data: Any) -> list[str]:
    """The path of a fault in the data. pydantic's own path also holds the kinds of choices, which are left out."""
    path, missing = [], fault["type"] == "missing"
    for number, part in enumerate(fault["loc"], start=1):
        if (isinstance(data, Mapping) and part in data) or (isinstance(data, list | tuple) and isinstance(part, int)):
            data = data[part]  # pyright: ignore[reportArgumentType, reportCallIssue]
        elif not (missing and number == len(fault["loc"])):
            continue
        path.append(str(part))
    return path


def _message(fault: Mapping[str, Any]) -> str:
    """pydantic's message, except for a choice among kinds, where pydantic's own would mention union tags."""
    if fault["type"] == "union_tag_invalid":
        what = next((part for part in reversed(fault["loc"]) if isinstance(part, str)), "kind")
        return unknown_name(what, fault["ctx"]["tag"], re.findall("'([^']*)'", fault["ctx"]["expected_tags"]))
    if fault["type"] in ("union_tag_not_found", "model_attributes_type"):
        return "expected the name of a kind, or a mapping that has one as `kind`"
    return fault["msg"].removeprefix("Value error, ")


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but with the floats of YAML 1.2: 1e-4 is a number, not text."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that _Loader would read as a number."""


for _class in (_Loader, _Dumper):
    _exponent = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$")
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _exponent, list("-+.0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping. Raises TesseraError."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise TesseraError(f"no recipe at {path}: give the path of a .yaml file") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise TesseraError(f"{path} is not readable as YAML: {error}") from None
    if not isinstance(data, dict):
        raise TesseraError(
            f"{path} holds {type(data).__name__}; expected a mapping of sections such as data: and network:"
        )
    return data


def to_yaml(settings: Settings) -> str:
    """The settings as YAML text. Reading it gives equal settings."""
    return yaml.dump(settings.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def apply_overrides(data: dict[str, Any], overrides: list[str], example: str = "training.steps=1000") -> dict[str, Any]:
    """A copy of nested mappings with dotted overrides (`training.steps=1000`) applied. Values are read as YAML.

    Selecting another kind (`diffusion.schedule=cosine`, `data.kind=parquet`) drops the fields of the previous kind.
    example: an override for the error message about a malformed one.
    """
    result = copy.deepcopy(data)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise TesseraError(f"'{override}' is not an override; write key=value, for example {example}")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError:
            raise TesseraError(f"cannot read the value of '{override}' as YAML; quote it if it is text") from None
        *parents, last = path.split(".")
        section: dict[str, Any] = result
        for depth, parent in enumerate(parents):
            child = section.get(parent)
            child = {} if child is None else expand_kind(child)
            if not isinstance(child, dict):
                raise TesseraError(f"'{override}': {'.'.join(parents[: depth + 1])} is a value, not a section")
            section[parent] = child
            section = child
        if last == "kind" and section.get("kind") not in (None, value):
            section.clear()
        section[last] = value
    return result


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    result: dict[str, Any] = {}
    for name, value in nested.items():
        result |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return result


def diff(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Dotted key and both values of every difference between nested mappings; "absent" stands for a missing value."""
    old, new = flatten(before), flatten(after)
    rows = [(name, old.get(name, "absent"), new.get(name, "absent")) for name in dict.fromkeys([*old, *new])]
    return [row for row in rows if row[1] != row[2]]
