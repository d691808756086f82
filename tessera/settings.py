"""Configuration: frozen models that validate, name the nearest right key, and write themselves back as YAML."""

import difflib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveInt, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from tessera.errors import TesseraError

# Height and width; one number stands for a square.
Size = Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(lambda v: (v, v) if isinstance(v, int) else v)]


class Settings(BaseModel):
    """The base of everything configurable: immutable, no unknown keys, every default stands in the class.

    A class with a `kind` field is one choice of several; writing just its kind (`block: adaln`) chooses it with its
    own defaults, in YAML and on the command line alike.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @classmethod
    def expand(cls, data: dict[str, Any]) -> dict[str, Any]:
        """A class's own shorthand, written out (a preset's name, say); called on every mapping before validation."""
        return data

    @model_validator(mode="before")
    @classmethod
    def _name_the_nearest_key(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = cls.expand(data)
        for key in data:
            if key not in cls.model_fields:
                kind = cls.model_fields["kind"].default if "kind" in cls.model_fields else None
                text = unknown("key", str(key), cls.model_fields) + (f" (kind: {kind})" if kind else "")
                raise PydanticCustomError("unknown_key", "{text}", {"text": text})
        return data


def by_kind(value: Any) -> Any:
    """Let `name` stand for `{kind: name}`: the validator of every field that is a choice among kinds."""
    return {"kind": value} if isinstance(value, str) else value


def unknown(what: str, got: str, known: Any) -> str:
    """One sentence for a name that does not exist: the nearest known one, or all of them."""
    known = sorted(str(name) for name in known)
    near = difflib.get_close_matches(got, known, n=1, cutoff=0.5)
    return f"unknown {what} '{got}'" + (f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}")


S = TypeVar("S", bound=Settings)


def validate(kind: type[S], data: Any, source: str) -> S:
    """Validate data into a settings class.

    Raises TesseraError that lists every fault with its dotted place, what was got and what was expected.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            place = ".".join(_place(fault, data))
            got = fault["input"]
            shown = "" if isinstance(got, dict) or fault["type"] == "missing" else f" (got {got!r})"
            faults.append(f"  {place or 'top level'}: {_message(fault)}{shown}")
        raise TesseraError(f"{source} is not valid:\n" + "\n".join(faults)) from None


def _place(fault: Mapping[str, Any], data: Any) -> list[str]:
    """Where a fault is, in the words of the data: pydantic also names the kinds that it passed through."""
    found, missing = [], fault["type"] == "missing"
    for number, part in enumerate(fault["loc"], start=1):
        if (isinstance(data, Mapping) and part in data) or (isinstance(data, list | tuple) and isinstance(part, int)):
            data = data[part]  # pyright: ignore[reportArgumentType, reportCallIssue]
        elif not (missing and number == len(fault["loc"])):
            continue
        found.append(str(part))
    return found


def _message(fault: Mapping[str, Any]) -> str:
    """What is wrong, in words; of a choice among kinds in ours, as pydantic's speak of tags."""
    if fault["type"] == "union_tag_invalid":
        what = next((part for part in reversed(fault["loc"]) if isinstance(part, str)), "kind")
        return unknown(what, fault["ctx"]["tag"], re.findall("'([^']*)'", fault["ctx"]["expected_tags"]))
    if fault["type"] in ("union_tag_not_found", "model_attributes_type"):
        return "expected the name of a kind, or a mapping that has one as `kind`"
    return fault["msg"].removeprefix("Value error, ")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping, or TesseraError."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TesseraError(f"no recipe at {path}: give the path of a .yaml file") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise TesseraError(f"{path} is not readable as YAML: {error}") from None
    if not isinstance(data, dict):
        raise TesseraError(
            f"{path} holds {type(data).__name__}; expected a mapping of sections such as data: and network:"
        )
    return data


def write_yaml(settings: Settings) -> str:
    """The settings as YAML text that reads back into the same settings."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def override(data: dict[str, Any], assignments: list[str], example: str = "training.steps=1000") -> dict[str, Any]:
    """Apply dotted assignments (`training.steps=1000`) to nested mappings; values are read as YAML.

    Choosing another kind (`diffusion.schedule=cosine`, `data.kind=parquet`) drops the fields of the kind it replaces.
    example: of an assignment, for the error about what is none.
    """
    result: dict[str, Any] = _copied(data)
    for assignment in assignments:
        path, found, text = assignment.partition("=")
        if not found or not path:
            raise TesseraError(f"'{assignment}' is not an override; write key=value, for example {example}")
        try:
            value: Any = yaml.safe_load(text)
        except yaml.YAMLError:
            raise TesseraError(f"cannot read the value of '{assignment}' as YAML; quote it if it is text") from None
        if isinstance(value, str) and value == text.strip():  # quoted text stays text
            value = _number(value)
        *parents, last = path.split(".")
        place: dict[str, Any] = result
        for depth, parent in enumerate(parents):
            child: Any = place.get(parent)
            if child is None:
                child = {}
            elif isinstance(child, str):  # a choice written by its bare kind
                child = {"kind": child}
            elif not isinstance(child, dict):
                raise TesseraError(f"'{assignment}': {'.'.join(parents[: depth + 1])} is a value, not a section")
            place[parent] = child
            place = child
        if last == "kind" and place.get("kind") not in (None, value):
            place.clear()
        place[last] = value
    return result


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings under dotted names."""
    found: dict[str, Any] = {}
    for name, value in nested.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The dotted names in which two nested mappings differ, with both values; "absent" where one has none."""
    old, new = flat(before), flat(after)
    pairs = [(name, old.get(name, "absent"), new.get(name, "absent")) for name in dict.fromkeys([*old, *new])]
    return [(name, one, other) for name, one, other in pairs if one != other]


def _copied(data: Any) -> Any:
    return {key: _copied(value) for key, value in data.items()} if isinstance(data, dict) else data


def _number(text: str) -> str | float:
    """YAML 1.1 reads 1e-4 as text; people who write it mean the number."""
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) else text
