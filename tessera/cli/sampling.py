"""What `tessera sample` does: pictures as PNGs with a grid, or as one .npz."""

import hashlib
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from tessera import __version__, images, runtime
from tessera.acceleration.compilation import compiled as compiled_network
from tessera.acceleration.first_block_cache import CacheStats
from tessera.bundle import Model, weights_hash
from tessera.cli.options import classes_of, progress, seeds_of
from tessera.data.images import centre_crop
from tessera.errors import TesseraError
from tessera.generation import bulk as many
from tessera.generation import pipeline
from tessera.generation.bulk import BulkRequest, BulkSamples, asked_by_policy
from tessera.interop import load

COLUMNS, ROWS = 16, 32  # of the grid, at most


def loaded(
    path: str, device: str, ema: float | None, read_as: str | None, heads: int | None, codec: str | None
) -> Model:
    return load.load(path, device=device, ema=ema, read_as=read_as, heads=heads, codec=codec)


def asked(
    model: Model,
    classes: str | None,
    count: int | None,
    seeds: str | None,
    total: int | None,
    policy: Any,
    settings: dict[str, Any],
    precision: Any,
    size: tuple[int, int] | None,
) -> BulkRequest:
    """What the flags ask for: `total` pictures by a policy, or every class with every seed."""
    more: dict[str, Any] = {"settings": settings, "precision": precision, "size": size}
    if total is not None:
        return asked_by_policy(model, total, policy, **more)
    each, of = seeds_of(seeds, count), classes_of(classes, model)
    if of is None:
        return BulkRequest(each, None, "without classes", **more)
    return BulkRequest([seed for _ in of for seed in each], [told for told in of for _ in each], **more)


@dataclass(frozen=True)
class Extras:
    """What pictures begin from and lead away from: words for `drawing.generate`, and what their PNGs say of it."""

    words: dict[str, Any] = field(default_factory=dict)
    said: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.words)


def extras(
    model: Model,
    guide: str | None,
    image: str | None,
    strength: float | None,
    mask: str | None,
    size: tuple[int, int] | None,
) -> Extras:
    """What --guide, --from, --strength and --mask say. Raises TesseraError for what does not fit the model.

    Picture and mask are cropped as the pictures of a training are, to --size or to the size the model was trained at.
    """
    words: dict[str, Any] = {}
    said: dict[str, Any] = {}
    if guide is not None:
        try:
            words["guide"] = load.load(guide, device=str(model.device))
        except TesseraError as error:
            hint = " (a .pt that cannot say what it is: convert it to a bundle first)" if Path(guide).is_file() else ""
            raise TesseraError(f"--guide: {error}{hint}") from None
        pipeline.check_guide(model, words["guide"])
        said |= {"guide": guide, "guide_weights": weights_hash(words["guide"].network)}
    if image is None and (strength is not None or mask is not None):
        raise TesseraError(
            f"{'--mask' if strength is None else '--strength'} belongs to --from: give --from PICTURE, too"
        )
    if image is not None:
        picture = read_picture("--from", image, model.codec.pixel_channels)
        height, width = model.config.network.input_size
        size = size or (height * model.codec.factor, width * model.codec.factor)
        words["image"] = _cropped(picture, size)
        said |= {"from": image, "from_hash": _hash(words["image"])}
        if mask is not None:
            drawn = read_picture("--mask", mask, 1)
            if drawn.shape[:2] != picture.shape[:2]:
                raise TesseraError(
                    f"--mask {mask} is {drawn.shape[0]} x {drawn.shape[1]} pixels (height x width), but --from {image} "
                    f"is {picture.shape[0]} x {picture.shape[1]}: give a mask of that size"
                )
            words["mask"] = _cropped(drawn, size)[..., 0] >= 128
            said |= {"mask": mask, "mask_hash": _hash(words["mask"])}
    if strength is not None:
        words["strength"] = said["strength"] = strength
    return Extras(words, said)


def read_picture(flag: str, path: str, channels: int) -> np.ndarray:
    """uint8 [H, W, C] of a file. Raises TesseraError if it is none, or would lose colour or transparency."""
    try:
        with Image.open(path) as opened:
            opened.load()
            allowed = {"L", "1", "P", "RGB"} if channels == 3 or flag == "--mask" else {"L", "1"}
            transparent = "transparency" in opened.info
            if opened.mode not in allowed or transparent:
                raise TesseraError(
                    f"{flag} {path} has the mode {opened.mode}{' with transparency' if transparent else ''}; "
                    f"expected {'RGB or grey' if 'RGB' in allowed else 'grey, as this model draws'}: convert it first"
                )
            pixels = np.asarray(opened.convert("RGB" if channels == 3 else "L"))
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise TesseraError(f"cannot read {flag} {path}: {error}") from None
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _cropped(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, C] of another size; the same where it has that size already."""
    if pixels.shape[:2] == size:
        return pixels
    image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])
    cropped = np.asarray(centre_crop(image, size))
    return cropped if cropped.ndim == 3 else cropped[..., None]


def _hash(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]


def compiled(model: Model) -> None:
    """Compile a model's network, or say in one line why not and go on without."""
    _, reason = compiled_network(model.network, "blocks", sizes="changing")
    if reason is not None:
        print(f"not compiled, drawing without: {reason}", file=sys.stderr)


def packed(model: Model, asked: BulkRequest, target: Path, batch: int, where: str) -> str:
    """Draw into shards beside the target, by all processes, and pack them; returns what to say."""
    if target.suffix != ".npz":
        raise TesseraError(f"--npz {target} must end in .npz")
    if target.exists():
        raise TesseraError(f"{target} exists already: remove it or give another name")
    folder = target.with_name(target.name + ".shards")
    with runtime.distributed_session() as ranks, progress() as begin:
        drawn = BulkSamples(model, asked, folder, batch, where)
        many.generate_shards(drawn, ranks, begin(f"drawing {drawn.count}") if ranks.is_main else None)
        if ranks.is_main:
            many.write_npz(drawn, target)
            shutil.rmtree(folder, ignore_errors=True)
    return f"{drawn.count} pictures in {target}" if ranks.is_main else ""


def pictured(
    model: Model, asked: BulkRequest, out: Path, batch: int, said: dict[str, Any], extras: Extras | None = None
) -> str:
    """Draw one PNG each, and a grid; or the grid alone into a .png. Returns what to say.

    A PNG that stands there and was drawn in the same way is kept: an interrupted command goes on.
    """
    used = pipeline.sampling_config(model, guidance=asked.guidance, **asked.settings)
    said = {**said, "tessera": __version__, "sampling": used.model_dump(mode="json"), "size": asked.size}
    said |= {"precision": asked.precision, "weights": weights_hash(model.network)}
    tally, extras = CacheStats(), extras or Extras()
    said |= extras.said
    alone, count = out.suffix.lower() == ".png", len(asked.seeds)
    if alone and count > COLUMNS * ROWS:
        raise TesseraError(f"a grid holds {COLUMNS * ROWS} pictures at most, {count} are asked for: give a folder")
    sheet: list[np.ndarray] = []
    with progress() as begin:
        told = begin(f"drawing {count}")
        for start in range(0, count, batch):
            part = range(start, min(start + batch, count))
            for picture in _drawn(model, asked, part, None if alone else out, said, {**extras.words, "tally": tally}):
                if len(sheet) < COLUMNS * ROWS:
                    sheet.append(picture)
            told(part.stop, count)
    seeds = list(dict.fromkeys(asked.seeds))
    classes = None if asked.classes is None else list(dict.fromkeys(asked.classes))
    in_rows = classes is not None and len(seeds) * len(classes) == count and len(seeds) <= COLUMNS
    grid = images.grid(np.stack(sheet), len(seeds) if in_rows else min(count, 8), zoom=max(1, 64 // len(sheet[0])))
    images.save_png(out if alone else out / "grid.png", grid, {**said, "classes": classes, "seeds": seeds})
    saved = f"; caching computed {tally.computed / tally.asked:.0%} of the blocks" if tally.asked else ""
    return (str(out) if alone else f"{count} pictures and grid.png in {out}") + saved


def _drawn(
    model: Model, asked: BulkRequest, part: range, out: Path | None, said: dict[str, Any], extras: dict[str, Any]
) -> list[np.ndarray]:
    """The pictures of some rows, those that stand in the folder as they are."""
    found: dict[int, np.ndarray] = {}
    texts = {}
    for row in part:
        told, seed = None if asked.classes is None else asked.classes[row], asked.seeds[row]
        name = f"seed-{seed}.png" if told is None else f"class-{told}-seed-{seed}.png"
        texts[row] = name, {**said, "classes": told if told is None else [told], "seeds": [seed]}
        if out is not None and (kept := images.load_png(out / name, texts[row][1])) is not None:
            found[row] = kept
    missing = [row for row in part if row not in found]
    if missing:
        drawn = pipeline.generate(
            model,
            None if asked.classes is None else [asked.classes[row] for row in missing],
            [asked.seeds[row] for row in missing],
            size=asked.size,
            guidance=asked.guidance,
            precision=asked.precision,
            batch=len(missing),
            **extras,
            **asked.settings,
        )
        for row, picture in zip(missing, drawn):
            found[row] = picture
            if out is not None:
                images.save_png(out / texts[row][0], picture, texts[row][1])
    return [found[row] for row in part]
