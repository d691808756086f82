"""`generate`: the one place where network, process, condition and codec meet to make pictures.

Shapes: B pictures, C latent channels, H W height and width.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera import randomness, runtime, sampling
from tessera.bundle import Model
from tessera.conditions import Condition
from tessera.errors import TesseraError
from tessera.sampling import SamplingConfig, State
from tessera.sampling.denoiser import Denoiser
from tessera.sampling.times import times
from tessera.settings import parse, unknown

STREAM = 0x64726177  # of randomness: apart from every stream of training


def settings(model: Model, **changes: Any) -> SamplingConfig:
    """The model's own sampler settings with some changed (None: unchanged). Raises TesseraError if one is not valid."""
    told = {name: value for name, value in changes.items() if value is not None}
    if not told:
        return model.config.sampling
    if isinstance(told.get("sampler"), str) and told["sampler"] not in sampling.SAMPLERS:
        raise TesseraError(unknown("sampler", told["sampler"], sampling.SAMPLERS))
    return parse(SamplingConfig, {**model.config.sampling.model_dump(), **told}, "the sampler settings")


def labels(model: Model, classes: Sequence[int | str]) -> list[int]:
    """Class numbers or names -> numbers. Raises TesseraError for a class the model does not know."""
    count, names = model.config.network.classes, model.class_names
    found = []
    for told in classes:
        if isinstance(told, str) and told in names:
            told = names.index(told)
        elif isinstance(told, str) and told.lstrip("-").isdigit():
            told = int(told)
        if isinstance(told, str):
            raise TesseraError(unknown("class", told, names))
        if not 0 <= told < count:
            raise TesseraError(f"class {told} is out of range: this model knows {count} classes, 0 to {count - 1}")
        found.append(int(told))
    return found


@torch.no_grad()
def walk(
    model: Model,
    classes: Sequence[int | str] | None = None,
    seeds: Sequence[int] = (0,),
    *,
    size: tuple[int, int] | None = None,
    guidance: float | Sequence[float] | None = None,
    precision: runtime.Precision = "float32",
    **changes: Any,
) -> Iterator[State]:
    """Draw one batch step by step, yielding every State; `decode(model, state.x)` shows one.

    classes and seeds pair up row by row; the shorter of the two may hold one entry for all rows. Each seed is a picture
    of its own: the same alone and in any batch. size: of the picture in pixels (the trained size by default).
    guidance: one number, or one per row. changes: sampler, steps, spacing, guidance_channels.
    Raises TesseraError for settings the model cannot draw with.
    """
    scales = torch.as_tensor(model.config.sampling.guidance if guidance is None else guidance, dtype=torch.float32)
    config = settings(model, **changes)
    seen, device = model.config.network, model.device
    if classes is not None and not seen.classes:
        raise TesseraError("this model is unconditional: leave classes out")
    if classes is None and seen.classes:
        raise TesseraError(f"this model knows {seen.classes} classes: say which, for example classes=[0]")
    if bool((scales != 1).any()) and not (seen.classes and seen.null_class):
        raise TesseraError("this model cannot be guided: it has no 'told nothing' class; leave guidance at 1")
    seeds = list(seeds)
    if not all(0 <= seed < 2**63 for seed in seeds):
        raise TesseraError(f"seeds are whole numbers from 0 to 2^63 - 1; got {seeds}")
    label = None if classes is None else labels(model, classes)
    told = 1 if label is None else len(label)
    rows = max(len(seeds), told, scales.numel())
    for what, length in (("classes", told), ("seeds", len(seeds)), ("guidance", scales.numel())):
        if length not in (1, rows):
            raise TesseraError(f"{rows} pictures are asked for, but {length} {what}: give {rows}, or 1 for all")
    if label is not None:
        label = torch.tensor(label).expand(rows)
    shape = (seen.channels, *_latent_size(model, size))
    seed = torch.tensor(seeds, dtype=torch.int64).expand(rows)
    drawn = 0

    def noise() -> Tensor:
        """Each row's next draw from its own seed: first the noise it starts from, then one for each step that asks."""
        nonlocal drawn
        drawn += 1
        position = torch.full((rows,), drawn - 1, dtype=torch.int64)
        return randomness.normal(seed, position, STREAM, shape).to(device)

    dtype = runtime.autocast_dtype(precision, device)

    def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with runtime.autocast(dtype, device):  # around the network alone: it must not leak into the caller's loop
            return model.network(x, t, condition)

    denoise = Denoiser(
        network, model.process, Condition(label=label).to(device), scales.expand(rows), config.guidance_channels
    )
    config.sampler.check(model.process)
    visited = times(config.spacing, config.steps, model.process)
    yield from sampling.walk(config.sampler, denoise, noise(), visited, noise)


@torch.no_grad()
def decode(model: Model, latents: Tensor) -> np.ndarray:
    """latents [B, C, h, w] -> pictures uint8 [B, H, W, 3 or 1]"""
    pixels = model.codec.decode(latents.float())
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def generate(
    model: Model,
    classes: Sequence[int | str] | None = None,
    seeds: Sequence[int] = (0,),
    *,
    size: tuple[int, int] | None = None,
    guidance: float | None = None,
    precision: runtime.Precision = "float32",
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
    **changes: Any,
) -> np.ndarray:
    """Draw pictures: uint8 [B, H, W, 3 or 1], one for each pair of class and seed, `batch` at a time.

    Arguments as for `walk`; progress is called with (steps done, steps in all).
    """
    seeds = list(seeds)
    told = None if classes is None else list(classes)
    rows = max(len(seeds), len(told or [0]))
    if not rows or told == []:
        raise TesseraError("nothing to draw: give at least one class and one seed")
    seeds = seeds * rows if len(seeds) == 1 else seeds
    told = told * rows if told is not None and len(told) == 1 else told
    if len(seeds) != rows or (told is not None and len(told) != rows):
        raise TesseraError(f"{len(told or [])} classes and {len(seeds)} seeds do not pair up: give as many, or one")
    steps = settings(model, **changes).steps
    pictures, total = [], steps * -(-rows // batch)
    for start in range(0, rows, batch):
        part = slice(start, start + batch)
        latents = None
        for state in walk(
            model,
            None if told is None else told[part],
            seeds[part],
            size=size,
            guidance=guidance,
            precision=precision,
            **changes,
        ):
            latents = state.x
            if progress is not None:
                progress(start // batch * steps + state.done, total)
        assert latents is not None  # walk always yields
        pictures.append(decode(model, latents))
    return np.concatenate(pictures)


def _latent_size(model: Model, size: tuple[int, int] | None) -> tuple[int, int]:
    if size is None:
        return model.config.network.size
    unit = model.codec.factor * model.config.network.patch
    if size[0] % unit or size[1] % unit or min(size) < unit:
        raise TesseraError(
            f"size {size[0]} x {size[1]} does not fit: height and width must be multiples of {unit} pixels"
        )
    return size[0] // model.codec.factor, size[1] // model.codec.factor
