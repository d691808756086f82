"""The settings that are stored with an image, so that it can be generated again."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tessera import clips
from tessera.conditioning import LabelField
from tessera.generation.request import SampleRequest
from tessera.model import Model
from tessera.reporting.text import join_names


def class_text(model: Model, label: int) -> str:
    """The name of a class, or its number if another class has the same name."""
    names = model.class_names
    return names[label] if names.count(names[label]) == 1 else str(label)


def data_fps(model: Model) -> float | None:
    """The frame rate to which the clips that a model was trained on were resampled; None: every frame was taken."""
    return (model.config.recipe or {}).get("data", {}).get("fps")


def trained_fps(model: Model) -> float:
    """The frames per second of the clips of a model."""
    return data_fps(model) or clips.DEFAULT_FPS


def row_settings(model: Model, request: SampleRequest, rows: Sequence[int]) -> dict[str, Any]:
    """Seeds, classes and prompts of some rows, each once, as they are stored in a PNG."""
    part = request.select(rows)

    def distinct(values: Sequence[Any] | None) -> list[Any] | None:
        return None if values is None else list(dict.fromkeys(values))

    labels = None if part.classes is None else LabelField().encode(part.classes, model).tolist()
    classes = distinct(labels)
    scales = None if part.guidance_scale is None else torch.as_tensor(part.guidance_scale).reshape(-1).tolist()
    return {
        "classes": classes,
        "class_names": None if classes is None else [class_text(model, label) for label in classes],
        "prompts": distinct(part.prompts),
        "negative_prompts": distinct(part.negative.get("text")),
        "guidance_scales": distinct(scales),
        "seeds": distinct(part.seeds),
    }


def sample_command(settings: Mapping[str, Any]) -> str:
    """The `tessera sample` command that reproduces an image. It states every sampling setting, because the settings of
    the model may change. settings: as they are stored with the image"""
    model = settings["model"]
    words = ["tessera", "sample", f"./{model}" if model.startswith("-") else model]
    sampling = dict(settings["sampling"])
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
