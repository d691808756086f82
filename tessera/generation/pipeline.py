"""`generate`: the one place where network, process, condition and codec meet to make pictures.

Shapes: B pictures, C latent channels, H W height and width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera import randomness, runtime, sampling
from tessera.acceleration.first_block_cache import CacheStats, FirstBlockCache, check_caching
from tessera.acceleration.modulation_cache import PrecomputedModulation
from tessera.bundle import Model
from tessera.conditioning import Condition, NetworkFunction
from tessera.errors import TesseraError
from tessera.models.dit import DiT
from tessera.sampling import FirstBlock, SampleState, SamplingConfig
from tessera.sampling.denoiser import Denoiser, GuidanceModel
from tessera.sampling.editing import EditSource
from tessera.sampling.timesteps import timestep_grid
from tessera.settings import override, unknown_name, validate

STREAM = 0x64726177  # of randomness: apart from every stream of training
APART = 512  # tokens of a half from which on a CPU is faster with the two halves of guidance one after the other
TABLE = 64 * 2**20  # bytes of steering vectors computed ahead, at most
# The fields of a process that say what a raw output means; the others are of training alone.
MEANING = {"num_timesteps", "schedule", "prediction", "variance", "zero_terminal_snr", "path", "network_times", "kind"}


def sampling_config(model: Model, *, overrides: Sequence[str] = (), **changes: Any) -> SamplingConfig:
    """The model's own sampler settings with some changed (None: unchanged). Raises TesseraError if one is not valid.

    overrides: dotted assignments over them all, as on the command line: ["sampler=dpm++", "sampler.order=3"].
    """
    told = {name: value for name, value in changes.items() if value is not None}
    if not told and not overrides:
        return model.config.sampling
    data = override({**model.config.sampling.model_dump(), **told}, list(overrides), example="steps=20")
    return validate(SamplingConfig, data, "sampling")


def class_labels(model: Model, classes: Sequence[int | str]) -> list[int]:
    """Class numbers or names -> numbers. Raises TesseraError for a class the model does not know."""
    count, names = model.config.network.num_classes, model.class_names
    found = []
    for told in classes:
        if isinstance(told, str) and told in names:
            told = names.index(told)
        elif isinstance(told, str) and told.lstrip("-").isdigit():
            told = int(told)
        if isinstance(told, str):
            raise TesseraError(unknown_name("class", told, names))
        if not 0 <= told < count:
            raise TesseraError(f"class {told} is out of range: this model knows {count} classes, 0 to {count - 1}")
        found.append(int(told))
    return found


@torch.no_grad()
def generate_steps(
    model: Model,
    classes: Sequence[int | str] | None = None,
    seeds: Sequence[int] = (0,),
    *,
    size: tuple[int, int] | None = None,
    guidance: float | Sequence[float] | None = None,
    guide: Model | None = None,
    image: np.ndarray | None = None,
    strength: float | None = None,
    mask: np.ndarray | None = None,
    precision: runtime.Precision = "float32",
    tally: CacheStats | None = None,
    **changes: Any,
) -> Iterator[SampleState]:
    """Draw one batch step by step, yielding every State; `decode(model, state.x)` shows one.

    classes and seeds pair up row by row; the shorter of the two may hold one entry for all rows. Each seed is a picture
    of its own: the same alone and in any batch. size: of the picture in pixels (the trained size by default).
    guidance: one number, or one per row. guide: a worse model to lead away from, told the same, instead of this one
    told nothing (autoguidance). tally: counts what caching saves. changes: any other key of the SamplingConfig, and
    overrides.

    image: uint8 [B, H, W, C], or [H, W, C] for all rows, to begin from: noise is mixed in up to the time of the grid
    nearest below strength (0.6; with a mask 1, which begins in noise alone). The size is the image's.
    mask: [B, H, W] or [H, W], 1 where to draw and 0 where the image stays: there every state is the image mixed with
    the row's own noise. Of latents, one is drawn if any of its pixels is; `generate` puts back all the others.

    Raises TesseraError for settings the model cannot draw with.
    """
    config = sampling_config(model, **changes)
    scales = torch.as_tensor(config.guidance_scale if guidance is None else guidance, dtype=torch.float32)
    seen, device = model.config.network, model.device
    if classes is not None and not seen.num_classes:
        raise TesseraError("this model is unconditional: leave classes out")
    if classes is None and seen.num_classes:
        raise TesseraError(f"this model knows {seen.num_classes} classes: say which, for example classes=[0]")
    if guide is not None:
        check_guide(model, guide)
        if bool((scales == 1).all()):
            raise TesseraError("a guide needs guidance other than 1: give --guidance 2")
    elif bool((scales != 1).any()) and not (seen.num_classes and seen.learn_null_class):
        raise TesseraError("this model cannot be guided: it has no 'told nothing' class; leave guidance at 1")
    seeds = list(seeds)
    if not all(0 <= seed < 2**63 for seed in seeds):
        raise TesseraError(f"seeds are whole numbers from 0 to 2^63 - 1; got {seeds}")
    original = _original(model, image, strength, mask, size)
    label = None if classes is None else class_labels(model, classes)
    told, images = 1 if label is None else len(label), 1 if original is None else original.rows
    rows = max(len(seeds), told, scales.numel(), images)
    lengths = (("classes", told), ("seeds", len(seeds)), ("guidance", scales.numel()), ("images or masks", images))
    for what, length in lengths:
        if length not in (1, rows):
            raise TesseraError(f"{rows} pictures are asked for, but {length} {what}: give {rows}, or 1 for all")
    if label is not None:
        label = torch.tensor(label).expand(rows)
    shape = (seen.in_channels, *(_latent_size(model, size) if original is None else original.x0.shape[2:]))
    seed = torch.tensor(seeds, dtype=torch.int64).expand(rows)
    drawn = 0

    def noise() -> Tensor:
        """Each row's next draw from its own seed: first the noise it starts from, then one for each step that asks."""
        nonlocal drawn
        drawn += 1
        position = torch.full((rows,), drawn - 1, dtype=torch.int64)
        return randomness.normal(seed, position, STREAM, shape).to(device)

    config.sampler.check(model.diffusion)
    check_caching(seen, config.caching)
    visited = timestep_grid(config.timestep_spacing, config.num_steps, model.diffusion)
    x, step = noise(), config.sampler
    if original is not None:
        visited = original.reached(visited)
        x, step = original.start(model.diffusion, x, visited[0]), original.keeping(step, x)
    grid = (shape[1] // seen.size_multiple, shape[2] // seen.size_multiple)
    dtype = runtime.autocast_dtype(precision, device)
    how = _How(config, model.diffusion.model_time(visited[:-1]).to(device), grid, dtype, tally)
    denoise = _denoiser(model, Condition(label=label).to(device), scales.expand(rows), guide, how)
    yield from sampling.sample_loop(step, denoise, x, visited, noise)


@dataclass(frozen=True)
class _How:
    """How the networks of one drawing are run."""

    config: SamplingConfig
    times: Tensor  # [N] of the grid, in the units of the network
    grid: tuple[int, int]  # of tokens
    dtype: torch.dtype | None  # of matrix products
    tally: CacheStats | None


def _denoiser(model: Model, condition: Condition, scales: Tensor, guide: Model | None, how: _How) -> Denoiser:
    """What a solver asks: the model, and what it is guided away from."""
    config, untold = how.config, condition.null()
    guided = bool((scales != 1).any())
    make = _networks(model, Condition.cat((condition, untold)) if guided and guide is None else condition, how)
    cached = config.caching.kind != "none"  # which remembers one half alone
    # benchmarks/guidance_halves.md
    large = model.device.type == "cpu" and len(scales) * how.grid[0] * how.grid[1] >= APART
    network, away = make(), None
    if guided and guide is not None:
        away = GuidanceModel(_networks(guide, condition, how)(), condition)
    elif guided and (cached or large):
        away = GuidanceModel(make(), untold)
    return Denoiser(
        network,
        model.diffusion,
        condition,
        scales,
        config.guidance_channels,
        guide=away,
        interval=config.guidance_interval,
        schedule=config.guidance_schedule,
        rescale=config.guidance_rescale,
    )


def _networks(model: Model, told: Condition, how: _How) -> Callable[[], NetworkFunction]:
    """Makes networks for one drawing, each with a cache of its own; told: all that they will be told."""
    network, config, device = model.network, how.config, model.device
    caching, plain, tell = config.caching, network, None
    labels = 1 if told.label is None else len(told.label.unique())
    # Measured on CPUs alone (benchmarks/precomputed_modulation.md); a look-up waits for the device.
    if (
        isinstance(network, DiT)
        and device.type == "cpu"
        and PrecomputedModulation.size(network, len(how.times), labels) <= TABLE
    ):
        with runtime.autocast(how.dtype, device):
            plain = PrecomputedModulation(network, how.times, told.label, how.grid)
        tell = plain.embed_condition

    def make() -> NetworkFunction:
        inner = plain
        if isinstance(caching, FirstBlock) and isinstance(network, DiT):  # no other network is let through
            inner = FirstBlockCache(network, caching, tell=tell, tally=how.tally)

        def run(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            with runtime.autocast(how.dtype, device):  # around the network alone: it must not leak to the caller's loop
                return inner(x, t, condition)

        return run

    return make


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
    guide: Model | None = None,
    image: np.ndarray | None = None,
    strength: float | None = None,
    mask: np.ndarray | None = None,
    precision: runtime.Precision = "float32",
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
    tally: CacheStats | None = None,
    **changes: Any,
) -> np.ndarray:
    """Draw pictures: uint8 [B, H, W, 3 or 1], one for each pair of class and seed, `batch` at a time.

    Arguments as for `walk`; progress is called with (steps done, steps in all). Where a mask is 0 the picture is the
    image, to the bit.
    """
    seeds = list(seeds)
    told = None if classes is None else list(classes)
    image, mask = None if image is None else _images(model, image), None if mask is None else _masks(mask)
    given = max(1 if each is None else len(each) for each in (image, mask))
    rows = max(len(seeds), len(told or [0]), given)
    if not rows or told == [] or not seeds:
        raise TesseraError("nothing to draw: give at least one class and one seed")
    seeds = seeds * rows if len(seeds) == 1 else seeds
    told = told * rows if told is not None and len(told) == 1 else told
    if len(seeds) != rows or (told is not None and len(told) != rows):
        raise TesseraError(f"{len(told or [])} classes and {len(seeds)} seeds do not pair up: give as many, or one")
    for what, each in (("images", image), ("masks", mask)):
        if each is not None and len(each) not in (1, rows):
            raise TesseraError(f"{rows} pictures are asked for, but {len(each)} {what}: give {rows}, or 1 for all")
    pictures, batches = [], -(-rows // batch)
    for start in range(0, rows, batch):
        part = slice(start, start + batch)
        images, masks = (each if each is None or len(each) == 1 else each[part] for each in (image, mask))
        latents = None
        for state in generate_steps(
            model,
            None if told is None else told[part],
            seeds[part],
            size=size,
            guidance=guidance,
            guide=guide,
            image=images,
            strength=strength,
            mask=masks,
            precision=precision,
            tally=tally,
            **changes,
        ):
            latents = state.x
            if progress is not None:
                progress(start // batch * state.num_steps + state.step, state.num_steps * batches)
        assert latents is not None  # walk always yields
        drawn = decode(model, latents)
        if images is not None and masks is not None:
            drawn = np.where(masks[..., None] != 0, drawn, images)
        pictures.append(drawn)
    return np.concatenate(pictures)


def check_guide(model: Model, guide: Model) -> None:
    """Raise TesseraError unless what two models say of one picture can be mixed."""
    faults = []
    for what in ("in_channels", "input_size", "num_classes"):
        one, other = getattr(model.config.network, what), getattr(guide.config.network, what)
        if one != other:
            faults.append(f"{what} {other}, not {one}")
    one, other = (each.config.diffusion.model_dump(include=MEANING) for each in (model, guide))
    if one != other:
        faults.append(f"process {guide.config.diffusion.summary()}, not {model.config.diffusion.summary()}")
    if model.config.codec.kind != guide.config.codec.kind:
        faults.append(f"codec {guide.config.codec.kind}, not {model.config.codec.kind}")
    if model.device != guide.device:
        faults.append(f"device {guide.device}, not {model.device}")
    if faults:
        raise TesseraError(
            f"this guide does not fit the model: {'; '.join(faults)}; take a smaller or earlier one of its kind"
        )


def _original(
    model: Model,
    image: np.ndarray | None,
    strength: float | None,
    mask: np.ndarray | None,
    size: tuple[int, int] | None,
) -> EditSource | None:
    """What to begin from, in latents. Raises TesseraError for what does not fit."""
    if image is None:
        if strength is not None or mask is not None:
            raise TesseraError(f"{'a mask' if strength is None else 'strength'} belongs to an image: give image, too")
        return None
    pixels = _images(model, image)
    found = (pixels.shape[1], pixels.shape[2])
    if size is not None and tuple(size) != found:
        raise TesseraError(
            f"size {size[0]} x {size[1]} is not that of the image, {found[0]} x {found[1]}: leave it out"
        )
    latent_size = _latent_size(model, found)
    strength = (0.6 if mask is None else 1.0) if strength is None else strength
    if not 0 < strength <= 1:
        raise TesseraError(f"strength is {strength}; expected more than 0 and at most 1, which begins in noise alone")
    data = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).to(model.device, torch.float32)
    return EditSource(model.codec.encode(data / 127.5 - 1), strength, _drawn_latents(model, mask, found, latent_size))


def _images(model: Model, image: np.ndarray) -> np.ndarray:
    """[B, H, W, C] of what may be one image for all rows, [H, W, C]. Raises TesseraError for what is neither."""
    pixels, channels = np.asarray(image), model.codec.pixel_channels
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-1] != channels or not pixels.size:
        raise TesseraError(
            f"an image is uint8 [B, H, W, {channels}] or [H, W, {channels}]; got {pixels.dtype} {list(pixels.shape)}"
        )
    return pixels[None] if pixels.ndim == 3 else pixels


def _masks(mask: np.ndarray) -> np.ndarray:
    """[B, H, W] of what may be one mask for all rows, [H, W]. Raises TesseraError for what is neither."""
    told = np.asarray(mask)
    if told.ndim not in (2, 3):
        raise TesseraError(f"a mask is [B, H, W] or [H, W]; got {told.dtype} {list(told.shape)}")
    return told[None] if told.ndim == 2 else told


def _drawn_latents(
    model: Model, mask: np.ndarray | None, size: tuple[int, int], latent_size: tuple[int, int]
) -> Tensor | None:
    """A mask of pixels as one of latents, bool [B or 1, 1, h, w]: any drawn pixel makes its latent a drawn one."""
    if mask is None:
        return None
    told = _masks(mask)
    if told.shape[-2:] != size or not np.isin(told, (0, 1)).all():
        raise TesseraError(
            f"a mask is [B, {size[0]}, {size[1]}] or [{size[0]}, {size[1]}], 1 where to draw and 0 where the image "
            f"stays; got {told.dtype} {list(told.shape)}" + (" with other values" if told.shape[-2:] == size else "")
        )
    (height, width), side = latent_size, model.codec.factor
    return torch.from_numpy(told != 0).view(-1, 1, height, side, width, side).amax(dim=(3, 5)).to(model.device)


def _latent_size(model: Model, size: tuple[int, int] | None) -> tuple[int, int]:
    if size is None:
        return model.config.network.input_size
    unit = model.codec.factor * model.config.network.size_multiple
    if size[0] % unit or size[1] % unit or min(size) < unit:
        raise TesseraError(
            f"size {size[0]} x {size[1]} does not fit: height and width must be multiples of {unit} pixels"
        )
    return size[0] // model.codec.factor, size[1] // model.codec.factor
