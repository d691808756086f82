"""The settings that are stored with an image, so that it can be generated again."""

from collections.abc import Sequence
from typing import Any

import torch

from tessera.conditioning import LabelField
from tessera.generation.request import SampleRequest
from tessera.model import Model


def class_text(model: Model, label: int) -> str:
    """The name of a class, or its number if another class has the same name."""
    names = model.class_names
    return names[label] if names.count(names[label]) == 1 else str(label)


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
