"""MkDocs hooks: pages that are generated from the code, so that they cannot differ from it.

`<!-- recipe keys -->` becomes a table of every key of a recipe; `<!-- build keys -->`, `<!-- codec keys -->` and
`<!-- study keys -->` those of the recipes of `tessera data build`, `tessera codec train` and `tessera study`;
`<!-- commands -->` the help of every command.
"""

import textwrap
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the generated parts of a page (called by MkDocs for each page)."""
    if "<!-- recipe keys -->" in markdown:
        markdown = markdown.replace("<!-- recipe keys -->", recipe_reference())
    if "<!-- build keys -->" in markdown:
        markdown = markdown.replace("<!-- build keys -->", build_reference())
    if "<!-- codec keys -->" in markdown:
        markdown = markdown.replace("<!-- codec keys -->", codec_reference())
    if "<!-- study keys -->" in markdown:
        markdown = markdown.replace("<!-- study keys -->", study_reference())
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", command_reference())
    return markdown


def recipe_reference() -> str:
    """Markdown tables of all keys: one section for each settings model, alternatives side by side by `kind`."""
    from tessera.training.recipe import Recipe

    return "\n".join(_sections("", Recipe, set()))


def build_reference() -> str:
    """Markdown tables of the keys of a recipe of `tessera data build`."""
    from tessera.data.build import BuildRecipe

    return _reference(BuildRecipe, "Recipe of `tessera data build`")


def codec_reference() -> str:
    """Markdown tables of the keys of a recipe of `tessera codec train`. Its data are those of any recipe."""
    from tessera.training.codec import CodecRecipe

    return _reference(CodecRecipe, "Recipe of `tessera codec train`", {"data", "training.optimizer"})


def study_reference() -> str:
    """Markdown tables of the keys of a study."""
    from tessera.studies.study import Study

    return _reference(Study, "File of `tessera study`")


def _reference(model: type[BaseModel], title: str, without: Iterable[str] = ()) -> str:
    """The sections of a file other than a recipe of `tessera train`, all below one heading."""
    sections = "\n".join(_sections("", model, set(without)))
    return sections.replace("## Top level", f"## {title}").replace("\n## `", "\n### `")


def _sections(prefix: str, model: type[BaseModel], written: set[str]) -> Iterator[str]:
    """The section of a settings model and those of its parts. written: titles, and keys, that are left out."""
    title = prefix or "Top level"
    kind = model.model_fields.get("kind")
    if prefix and kind is not None and kind.default is not PydanticUndefined:
        title = f"{prefix} (kind: {kind.default})"
    if title in written or prefix in written:  # such as the attention modes, which all networks have
        return
    written.add(title)
    yield f"{'##' if prefix.count('.') == 0 else '###'} `{title}`\n" if prefix else f"## {title}\n"
    yield f"{' '.join((model.__doc__ or '').split())}\n"
    fields = {name: field for name, field in model.model_fields.items() if name != "kind"}
    if fields:
        yield "| key | type | default | meaning |\n|---|---|---|---|"
        for name, field in fields.items():
            cells = (f"`{name}`", _type(field.annotation), _default(field), field.description or "")
            yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    yield ""
    for name, field in fields.items():
        for part in _models(field.annotation):
            yield from _sections(f"{prefix}.{name}" if prefix else name, part, written)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The settings models that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is Annotated:
        return _models(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [model for part in get_args(annotation) for model in _models(part)]
    return []


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        kinds = [
            str(model.model_fields["kind"].default) for model in _models(annotation) if "kind" in model.model_fields
        ]
        rest = [_type(part) for part in arguments if not _models(part)]
        named = [", ".join(f"`{kind}`" for kind in kinds)] * bool(kinds)
        plain = ["section"] * (not kinds and bool(_models(annotation)))
        return " or ".join(dict.fromkeys(named + plain + rest))
    if origin is tuple:
        return "list of " + " or ".join(dict.fromkeys(_type(part) for part in arguments if part is not Ellipsis))
    if _models(annotation):
        return "section"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        getattr(annotation, "__name__", ""), getattr(annotation, "__name__", str(annotation))
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return f"`{getattr(value, 'kind', '...')}`" if hasattr(value, "kind") else ""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def command_reference() -> str:
    """The help of every command: arguments, options and what they do."""
    import typer.main

    from tessera.cli import app

    return "\n".join(_commands(typer.main.get_command(app), "tessera"))


def _commands(command: Any, name: str) -> Iterator[str]:
    parts = getattr(command, "commands", {})
    if not parts:
        text, _, examples = (command.help or "").partition("\b\n")
        examples = examples.partition("\n")[2]  # without its heading
        yield f"## `{name}`\n\n{text.strip()}\n\n```\n{textwrap.dedent(examples).strip()}\n```\n"
        shown = [part for part in command.params if not getattr(part, "hidden", False) and part.name != "help"]
        if shown:
            yield "| argument or option | meaning |\n|---|---|"
        for parameter in shown:
            words = [word for word in (*parameter.opts, *parameter.secondary_opts) if word.startswith("-")]
            label = ", ".join(words) if words else (parameter.metavar or parameter.name.upper())
            text = (getattr(parameter, "help", None) or "").replace("|", "\\|")
            default = parameter.default
            suffix = "" if default in (None, False, ()) or callable(default) else f" (default `{default}`)"
            yield f"| `{label}` | {text}{suffix} |"
        yield ""
    for part, child in sorted(parts.items()):
        yield from _commands(child, f"{name} {part}")
