"""`tessera classes`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tessera.cli.options import EMA, CheckpointType, Codec, EMALength, ModelPath, NumClasses, NumHeads, TextEncoder
from tessera.errors import TesseraError
from tessera.reporting.text import join_names

if TYPE_CHECKING:
    from tessera.model import Model

PAIR = re.compile(r'("(?:[^"]|"")*"|[^=]*)(=.*)?', re.DOTALL)  # NEW or NEW=OLD,OLD; a NEW with = is in double quotes


def classes(
    model: ModelPath,
    out: Annotated[Path | None, typer.Argument(help="a new folder for the model with other classes")] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(metavar="NEW[=OLD,OLD]", help="a class that starts as the mean of others, or as the null label"),
    ] = None,
    remove: Annotated[list[str] | None, typer.Option(metavar="OLD,OLD", help="classes to remove")] = None,
    rename: Annotated[list[str] | None, typer.Option(metavar="NEW=OLD", help="a new name for a class")] = None,
    merge: Annotated[
        list[str] | None, typer.Option(metavar="NEW=OLD,OLD", help="one class, the mean of those it replaces")
    ] = None,
    add_word: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NEW[=OLD,OLD]", help="for a text model: a word that starts as the mean of others, or of all"
        ),
    ] = None,
    ema: EMA = None,
    ema_length: EMALength = None,
    checkpoint_type: CheckpointType = None,
    num_heads: NumHeads = None,
    num_classes: NumClasses = None,
    codec: Codec = None,
    text_encoder: TextEncoder = None,
) -> None:
    """List the classes of a model, or change them.

    With OUT, a new model is written with classes added, removed, renamed or merged, or with new words.

    Options may be repeated. Unchanged classes give the same images as before, and so do prompts without the new words.

    \b
    Examples:
      tessera classes runs/mine
      tessera classes runs/mine start --add wolf=dog,fox --remove cat
    """
    from tessera import bundle
    from tessera.interop.load import load
    from tessera.training.classes import change_classes, check_has_classes
    from tessera.training.words import add_words

    changes_classes = any((add, remove, rename, merge))
    is_change = changes_classes or bool(add_word)
    if is_change and out is None:
        raise TesseraError("give a folder for the model with other classes: tessera classes MODEL OUT --add ...")
    if out is not None and not is_change:
        raise TesseraError("nothing to change: give --add, --remove, --rename, --merge or --add-word")
    if out is not None and out.expanduser().exists():
        raise TesseraError(f"{out} exists already: remove it or give another name")
    loaded = load(
        model,
        device="cpu",
        ema=ema,
        ema_length=ema_length,
        checkpoint_type=checkpoint_type,
        num_heads=num_heads,
        num_classes=num_classes,
        codec=codec,
        text_encoder=text_encoder,
    )
    if out is None or changes_classes:
        check_has_classes(loaded)
    if out is None:
        for number, name in enumerate(loaded.class_names):
            print(f"{number:<5} {join_names([name])}")
        return
    changed, facts = loaded, []
    if changes_classes:
        renamed = _pairs("--rename", rename, loaded)
        for name, labels in renamed.items():
            if len(labels) != 1:
                raise TesseraError(f"--rename {name} needs one class: write --rename NEW=OLD; --merge takes several")
        changed = change_classes(
            changed,
            add=_pairs("--add", add, loaded),
            remove=[label for text in remove or () for label in _labels("--remove", text, loaded)],
            rename={name: labels[0] for name, labels in renamed.items()},
            merge=_pairs("--merge", merge, loaded),
        )
        facts.append(f"{len(changed.class_names)} classes; {changed.config.provenance.classes_changed}")
    if add_word:
        words: dict[str, list[str]] = {}
        for text in add_word:
            word, _, sources = text.strip().partition("=")
            if word in words:
                raise TesseraError(f"--add-word has the new word '{word}' twice: give it once")
            words[word] = [source.strip() for source in sources.split(",") if source.strip()]
        changed = add_words(changed, words)
        facts.append(f"new words: {changed.config.provenance.words_added}")
    bundle.save(changed, out.expanduser())
    print(f"wrote {out}: {'; '.join(facts)}")


def _pairs(option: str, texts: list[str] | None, model: "Model") -> dict[str, list[int]]:
    """NEW=OLD,OLD of each use of an option -> the numbers of the old classes by new name."""
    from tessera.cli.options import split_names

    pairs: dict[str, list[int]] = {}
    for text in texts or ():
        match = PAIR.fullmatch(text)
        if match is None:
            raise TesseraError(f"{option} {text} is not valid: write NEW=OLD, with a NEW that has = in double quotes")
        new = split_names(option, match[1])
        if len(new) != 1:
            raise TesseraError(f"{option} {text} has several new names: repeat the option for each")
        if new[0].strip() in pairs:
            raise TesseraError(f"{option} has the new class '{new[0].strip()}' twice: give it once")
        pairs[new[0].strip()] = _labels(option, match[2][1:], model) if match[2] else []
    return pairs


def _labels(option: str, text: str, model: "Model") -> list[int]:
    """Names or numbers of classes -> their numbers."""
    from tessera.cli.image_files import parse_classes

    try:
        return parse_classes(text, model, option) or []
    except TesseraError as error:
        order = "" if option == "--remove" else f"; {option} is written NEW=OLD, with classes of the model after ="
        raise TesseraError(f"{error}{order}") from None
