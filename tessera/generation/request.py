"""Validation of a request: sampling settings, classes, seeds, guidance and size."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tessera.errors import TesseraError
from tessera.model import Model
from tessera.sampling import SamplingConfig
from tessera.settings import apply_overrides, unknown_name, validate

# The settings of a diffusion process that decide what a raw output means; the others are of training alone.
OUTPUT_SETTINGS = {
    "kind", "num_timesteps", "schedule", "prediction", "variance", "zero_terminal_snr", "path", "network_times",
}  # fmt: skip


def sampling_config(model: Model, *, overrides: Sequence[str] = (), **settings: Any) -> SamplingConfig:
    """The model's own sampling settings with changes; None leaves a setting unchanged. Raises TesseraError.

    overrides: dotted assignments, as on the command line, applied last: ["sampler=dpm++", "sampler.order=3"].
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    if not settings and not overrides:
        return model.config.sampling
    data = {**model.config.sampling.model_dump(), **settings}
    return validate(SamplingConfig, apply_overrides(data, list(overrides), example="num_steps=20"), "sampling")


def class_labels(model: Model, classes: Sequence[int | str]) -> list[int]:
    """Class numbers or names -> numbers. Raises TesseraError for a class that the model does not have."""
    count, names = model.config.network.num_classes, model.class_names
    labels = []
    for label in classes:
        if isinstance(label, str):
            if label in names:
                label = names.index(label)
            elif label.lstrip("-").isdigit():
                label = int(label)
            else:
                raise TesseraError(unknown_name("class", label, names))
        if not 0 <= label < count:
            raise TesseraError(f"class {label} is out of range: this model has {count} classes, 0 to {count - 1}")
        labels.append(int(label))
    return labels


def num_rows(counts: Mapping[str, int]) -> int:
    """The number of images in a request. counts: how many of each input; each must be that number, or 1 for all images.

    Raises TesseraError otherwise.
    """
    if not all(counts.values()):
        raise TesseraError("nothing to generate: pass at least one class and one seed")
    rows = max(counts.values())
    for name, count in counts.items():
        if count not in (1, rows):
            raise TesseraError(f"{rows} images are requested, but there are {count} {name}: pass {rows}, or 1 for all")
    return rows


def check_request(
    model: Model,
    classes: Sequence[int | str] | None,
    seeds: Sequence[int],
    scales: Tensor,
    guidance_model: Model | None,
) -> None:
    """Raise TesseraError for classes, seeds or guidance that the model does not support. scales: of guidance."""
    network, guided = model.config.network, bool((scales != 1).any())
    if classes is not None and not network.num_classes:
        raise TesseraError("this model is unconditional: leave out classes")
    if classes is None and network.num_classes:
        raise TesseraError(f"this model has {network.num_classes} classes: pass some, for example classes=[0]")
    if not all(0 <= seed < 2**63 for seed in seeds):
        raise TesseraError(f"seeds are integers from 0 to 2^63 - 1; got {list(seeds)}")
    if guidance_model is not None:
        check_guidance_model(model, guidance_model)
        if not guided:
            raise TesseraError("a guidance model needs a guidance_scale other than 1, for example guidance_scale=2")
    elif guided and not (network.num_classes and network.learn_null_class):
        raise TesseraError("this model cannot be guided: it has no null label; leave guidance_scale at 1")


def check_guidance_model(model: Model, guidance_model: Model) -> None:
    """Raise TesseraError unless the outputs of two models can be combined."""
    problems = []
    for name in ("in_channels", "input_size", "num_classes"):
        expected, value = getattr(model.config.network, name), getattr(guidance_model.config.network, name)
        if value != expected:
            problems.append(f"{name} {value}, not {expected}")
    expected, value = (each.config.diffusion.model_dump(include=OUTPUT_SETTINGS) for each in (model, guidance_model))
    if value != expected:
        problems.append(f"{guidance_model.config.diffusion.summary()}, not {model.config.diffusion.summary()}")
    if model.config.codec.kind != guidance_model.config.codec.kind:
        problems.append(f"codec {guidance_model.config.codec.kind}, not {model.config.codec.kind}")
    if model.device != guidance_model.device:
        problems.append(f"device {guidance_model.device}, not {model.device}")
    if problems:
        raise TesseraError(
            f"the guidance model does not match the model: {'; '.join(problems)}; use a smaller or earlier version"
        )


def latent_size(model: Model, size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the latents of an image size (None: the trained size). Raises TesseraError."""
    if size is None:
        return model.config.network.input_size
    factor = model.codec.factor
    multiple = factor * model.config.network.size_multiple
    if size[0] % multiple or size[1] % multiple or min(size) < multiple:
        raise TesseraError(f"size {size[0]} x {size[1]}: height and width must be multiples of {multiple} pixels")
    return size[0] // factor, size[1] // factor
