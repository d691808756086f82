"""`tessera info`: facts of a model or an adapter, or the command that reproduces an image."""

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli.options import EMA, CheckpointType, Codec, NumClasses, NumHeads, TextEncoder, join_names
from tessera.errors import TesseraError

SETTINGS = {"model", "sampling", "options", "class_names", "prompts", "seeds", "weights"}  # of an image


def info(
    model: Annotated[str, typer.Argument(help="a model, an adapter, or an image or clip written by `tessera sample`")],
    ema: EMA = None,
    checkpoint_type: CheckpointType = None,
    num_heads: NumHeads = None,
    num_classes: NumClasses = None,
    codec: Codec = None,
    text_encoder: TextEncoder = None,
) -> None:
    """Print the facts of a model and its training, of an adapter, or the command that reproduces an image or clip."""
    from tessera.clips import ANIMATIONS, SIDE_FILE, VIDEOS

    path = Path(model)
    if path.suffix.lower() in {*ANIMATIONS, *VIDEOS} or (path / SIDE_FILE).exists():
        print(_command(path))
        return
    from tessera.bundle import weights_hash
    from tessera.interop import adapter_conversion
    from tessera.interop.load import ema_decays, load
    from tessera.model_card import describe

    if adapter_conversion.is_adapter(model):
        _print(adapter_conversion.describe(model))
        return
    loaded = load(
        model,
        device="cpu",
        ema=ema,
        checkpoint_type=checkpoint_type,
        num_heads=num_heads,
        num_classes=num_classes,
        codec=codec,
        text_encoder=text_encoder,
    )
    class_names = loaded.config.class_names
    names = ", ".join(class_names[:12]) + (", …" if len(class_names) > 12 else "")
    facts = {**describe(loaded), "classes": names or "without names", "weights": weights_hash(loaded.network)}
    facts |= loaded.config.provenance.facts()
    if decays := ema_decays(model):
        facts["EMA decays"] = f"{', '.join(map(str, decays))} (select one with --ema)"
    _print(facts)


def _print(facts: dict[str, Any]) -> None:
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        print(f"{name:<{width}}{value}")


def _command(path: Path) -> str:
    """The `tessera sample` command that reproduces an image. It states every sampling setting, because the settings of
    the model may change."""
    from tessera import clips, images

    try:
        is_image = path.suffix.lower() == ".png"
        settings = images.read_settings(path) if is_image else clips.read_settings(path)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        raise TesseraError(f"cannot read {path}: {error}") from None
    if not isinstance(settings, dict) or not settings.keys() >= SETTINGS:
        raise TesseraError(f"{path} holds no settings: it was not written by `tessera sample` of this version")
    model = settings["model"]
    words = ["tessera", "sample", f"./{model}" if model.startswith("-") else model]
    sampling = settings["sampling"]
    if settings["guidance_scales"] is not None:
        sampling |= {"guidance_scale": settings["guidance_scales"][0]}
    words += [word for name, value in sampling.items() for word in _overrides(name, value)]
    for option, value in settings["options"].items():
        for each in value if isinstance(value, list) else [value]:
            words += [f"--{option}"] if each is True else [f"--{option}", str(each)]
    if settings["class_names"] is not None:
        words += ["--classes", join_names(settings["class_names"])]
    for prompt in settings["prompts"] or ():
        words += ["--prompt", prompt]
    negative = settings["negative_prompts"]
    if negative is not None and negative[0] is not None:
        words += ["--negative-prompt", negative[0]]
    words += ["--seeds", ",".join(map(str, settings["seeds"]))]
    return f"{shlex.join(words)}\n# weights {settings['weights']}; compare with `tessera info` of the model"


def _overrides(name: str, value: Any) -> list[str]:
    """A setting as override words. The kind of a choice comes first, because it drops the previous fields."""
    if not isinstance(value, dict):
        return [f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    words = [f"{name}={value['kind']}"] if "kind" in value else []
    return words + [word for key in value if key != "kind" for word in _overrides(f"{name}.{key}", value[key])]
