"""Configuration: frozen models that validate, suggest the nearest known key, and convert to and from YAML."""

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

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


_PACKAGE = Path(__file__).parent
# The recipes that come with Tessera: inside the installed package, beside it in a checkout.
RECIPES = _PACKAGE / "recipes" if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent / "recipes"


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
    """Expand one number or name to a tuple of one: the validator of a field that holds one or several."""
    return (value,) if isinstance(value, int | float | str) else value


def unknown_name(what: str, name: str, known: Any) -> str:
    """Message for a name that does not exist, with the nearest known name or with all of them."""
    known = sorted(str(each) for each in known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown {what} '{name}'" + (f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}")


def shorten(text: str) -> str:
    """The beginning of a text, for a message."""
    return text if len(text) <= 200 else f"{text[:200]} …"


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
            suffix = "" if isinstance(value, dict) or fault["type"] == "missing" else f" (got {shorten(repr(value))})"
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
    """pydantic's message, except for text, and for a choice among kinds, where pydantic's would mention union tags."""
    if fault["type"] == "string_type":
        return "expected text: put it in quotes, so that YAML does not read it as something else"
    if fault["type"] == "union_tag_invalid":
        what = next((part for part in reversed(fault["loc"]) if isinstance(part, str)), "kind")
        return unknown_name(what, fault["ctx"]["tag"], re.findall("'([^']*)'", fault["ctx"]["expected_tags"]))
    if fault["type"] in ("union_tag_not_found", "model_attributes_type"):
        return "expected the name of a kind, or a mapping that has one as `kind`"
    return fault["msg"].removeprefix("Value error, ")


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but with the floats of YAML 1.2: 1e-4 is a number, not text. A key that is repeated is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in keys:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' is repeated", problem_mark=key.start_mark)
            keys.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else key)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that _Loader would read as a number."""


for _class in (_Loader, _Dumper):
    _exponent = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$")
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _exponent, list("-+.0123456789"))
# PyYAML raises other errors than its own for dates that do not exist (2024-13-01), for tags that do not fit (!!int x)
# and for a thousand brackets.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


@dataclass(frozen=True)
class KeysOf:
    """Annotation of a mapping whose dotted keys are those of a settings class."""

    kind: type[Settings]


def _types(annotation: Any, metadata: Sequence[Any] = ()) -> Iterator[Any]:
    """The types that a value of an annotation may have."""
    keys = [each.kind for each in metadata if isinstance(each, KeysOf)]
    if keys:
        yield from keys
    elif get_origin(annotation) is Annotated:
        yield from _types(annotation.__origin__, annotation.__metadata__)
    elif get_origin(annotation) in (Union, UnionType):
        for each in get_args(annotation):
            yield from _types(each)
    else:
        yield annotation


def _types_at(types: Sequence[Any], path: Sequence[str], section: Any = None) -> list[Any]:
    """The types that a value may have at a path below values of some types. section: the data there so far"""
    for name in path:
        models = [each for each in types if isinstance(each, type) and issubclass(each, Settings)]
        section = expand_kind(section) if isinstance(section, str | dict) else {}
        # The kind of the section selects the class; without one, all classes with such a field are possible.
        of_kind = [each for each in models if "kind" in section and _kind_of(each) == section["kind"]]
        fields = [each.model_fields[name] for each in of_kind or models if name in each.model_fields]
        below = [each for field in fields for each in _types(field.annotation, field.metadata)]
        below += [each for kind in types if get_origin(kind) is dict for each in _types(get_args(kind)[1])]
        types, section = below, section.get(name)
    return list(types)


def _kind_of(model: type[Settings]) -> Any:
    return model.model_fields["kind"].default if "kind" in model.model_fields else None


def _is_text(kind: Any) -> bool:
    return kind in (str, Path)


def _takes_text(text: str, types: Sequence[Any]) -> bool:
    """Whether a text is taken as it is: for a field of text, for a choice of words, and for one of the words."""
    choices = [get_args(kind) for kind in types if get_origin(kind) is Literal]
    words = [word for choice in choices for word in choice if isinstance(word, str)]
    only_words = all(kind is NoneType or get_origin(kind) is Literal for kind in types)
    return any(map(_is_text, types)) or text in words or (only_words and bool(words))


def _items(types: Sequence[Any]) -> list[Any]:
    """The types of the items of lists."""
    lists = [get_args(kind) for kind in types if get_origin(kind) in (list, tuple)]
    return [each for arguments in lists for item in arguments if item is not ... for each in _types(item)]


def _read_text(text: str, types: Sequence[Any]) -> Any:
    """A value on the command line, for a field that may have some types.

    Text is taken as it is, except that null unsets what can be unset, and that [a, b] is a list for a text or a list of
    texts. Everything else is read as YAML. Raises an error of YAML.
    """
    if text == "null" and NoneType in types:
        return None
    is_list = any(map(_is_text, _items(types))) and re.fullmatch(r"\[.*,.*\]", text, re.DOTALL)
    return text if _takes_text(text, types) and not is_list else _load(text, types, comments=False)


def _load(text: str, types: Sequence[Any], comments: bool = True) -> Any:
    """The value of a YAML text, in which text stays as it is written where a type asks for text: 007 is not 7."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if not comments and text[0 if node is None else node.end_mark.index :].strip():
            raise yaml.YAMLError("a comment at the end would be dropped")
        return None if node is None else _construct(loader, node, types)
    finally:
        loader.dispose()


def _construct(loader: _Loader, node: yaml.Node, types: Sequence[Any]) -> Any:
    if isinstance(node, yaml.ScalarNode):
        is_null = node.tag == "tag:yaml.org,2002:null" and (NoneType in types or not node.value)
        return node.value if _takes_text(node.value, types) and not is_null else loader.construct_document(node)
    if isinstance(node, yaml.SequenceNode) and (items := _items(types)):
        return [_construct(loader, each, items) for each in node.value]
    value = loader.construct_document(node)
    if not isinstance(node, yaml.MappingNode) or not isinstance(value, dict):
        return value
    text_keys = any(get_origin(kind) is dict and get_args(kind)[0] is str for kind in types)
    children = {
        loader.construct_document(key): (key.value, child)
        for key, child in node.value
        if isinstance(key, yaml.ScalarNode)
    }
    result = {}
    for key, made in value.items():
        name, child = children.get(key, (str(key), None))
        below = _types_at(types, name.split("."), value)
        result[name if text_keys else key] = made if child is None or not below else _construct(loader, child, below)
    return result


def find_recipe(path: Path) -> Path:
    """The path itself, or where nothing is there and it begins with recipes/: that recipe as it comes with Tessera."""
    shipped = RECIPES.parent / path
    return shipped if path.parts[:1] == ("recipes",) and not path.exists() and shipped.is_file() else path


def read_yaml(path: Path, kind: type[Settings] | None = None) -> dict[str, Any]:
    """Read a YAML file that holds a mapping. Raises TesseraError.

    kind: the class of the settings. Where its fields are text, the text of the file is taken as it is written.
    """
    try:
        data = _load(find_recipe(path).read_text(encoding="utf-8"), [kind])
    except FileNotFoundError:
        raise TesseraError(
            f"no recipe at {path}: give the path of a .yaml file; recipes/modern.yaml and others come with Tessera"
        ) from None
    except (*_YAML_ERRORS, OSError) as error:
        raise TesseraError(f"{path} is not readable as YAML: {_yaml_problem(error)}") from None
    if not isinstance(data, dict):
        raise TesseraError(
            f"{path} holds {type(data).__name__}; expected a mapping of sections such as data: and network:"
        )
    return data


def _yaml_problem(error: Exception) -> str:
    """What is wrong and where, in one line."""
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    if isinstance(error, yaml.MarkedYAMLError) and mark is not None:
        return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"
    return "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())


def to_yaml(settings: Settings) -> str:
    """The settings as YAML text. Reading it gives equal settings."""
    return yaml.dump(settings.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _kinds_before_fields(overrides: Sequence[str | tuple[str, Any]]) -> list[str | tuple[str, Any]]:
    """Words with each `section.kind=...` before the words that set fields of that section, else in their order."""
    result: list[str | tuple[str, Any]] = []
    for override in overrides:
        index = len(result)
        path = override.partition("=")[0] if isinstance(override, str) else ""
        if path.endswith(".kind"):
            section = path.removesuffix("kind")
            for position in range(len(result) - 1, -1, -1):
                earlier = result[position]
                name = earlier.partition("=")[0] if isinstance(earlier, str) else f"{earlier[0]}"
                if section.startswith(f"{name}."):  # replaces the section or one around it
                    break
                if isinstance(earlier, str) and name.startswith(section) and name != path:
                    index = position
        result.insert(index, override)
    return result


def apply_overrides(
    data: dict[str, Any],
    overrides: Sequence[str | tuple[str, Any]],
    kind: type[Settings] | None = None,
    example: str = "training.steps=1000",
) -> dict[str, Any]:
    """A copy of nested mappings with dotted overrides applied: words such as `training.steps=1000`, or (path, value).

    kind: the class of the settings. The type of a field decides how the text of a word is read: literally for text,
    else as YAML. Without kind, everything is read as YAML. Selecting another kind (`diffusion.schedule=cosine`,
    `data.kind=parquet`) drops the fields of the previous kind, but not those that the words set, in whatever order.
    example: an override for the error message about a malformed one.
    """
    result = copy.deepcopy(data)
    for override in _kinds_before_fields(overrides):
        path, equals, text = override.partition("=") if isinstance(override, str) else (override[0], "=", "")
        quoted = shorten(repr(override))
        if not equals or not path:
            raise TesseraError(f"{quoted} is not an override; write key=value, for example {example}")
        names = path.split(".")
        if isinstance(override, str):
            try:
                override.encode()
                value = _read_text(text, _types_at([kind], names, result))
            except UnicodeEncodeError:
                raise TesseraError(f"{quoted} is not valid UTF-8: rename the file or folder") from None
            except _YAML_ERRORS:
                raise TesseraError(f"cannot read the value of {quoted} as YAML") from None
            if value == "" and not text:
                raise TesseraError(f"{quoted} has no value: give one, or null if the setting can be unset")
        else:
            value = copy.deepcopy(override[1])
        *parents, last = names
        section: dict[str, Any] = result
        for depth, parent in enumerate(parents):
            child = section.get(parent)
            child = {} if child is None else expand_kind(child)
            if not isinstance(child, dict):
                raise TesseraError(f"{path!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
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
