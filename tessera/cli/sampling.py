"""What `tessera sample` does: pictures as PNGs with a grid, or as one .npz."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tessera import __version__, drawing, pictures, runtime
from tessera.bundle import Model, weights_hash
from tessera.cli.options import classes_of, progress, seeds_of
from tessera.errors import TesseraError
from tessera.evaluation import drawn as many
from tessera.evaluation.drawn import Asked, Drawn, asked_by_policy
from tessera.interop import sources

COLUMNS, ROWS = 16, 32  # of the grid, at most


def loaded(path: str, device: str, heads: int | None, codec: str | None) -> Model:
    return sources.load(path, device=device, heads=heads, codec=codec)


def asked(
    model: Model,
    classes: str | None,
    count: int | None,
    seeds: str | None,
    total: int | None,
    policy: Any,
    settings: dict[str, Any],
    guidance: float | None,
    precision: Any,
    size: tuple[int, int] | None,
) -> Asked:
    """What the flags ask for: `total` pictures by a policy, or every class with every seed."""
    more: dict[str, Any] = {"settings": settings, "guidance": guidance, "precision": precision, "size": size}
    if total is not None:
        return asked_by_policy(model, total, policy, **more)
    each, of = seeds_of(seeds, count), classes_of(classes, model)
    if of is None:
        return Asked(each, None, "without classes", **more)
    return Asked([seed for _ in of for seed in each], [told for told in of for _ in each], **more)


def packed(model: Model, asked: Asked, target: Path, batch: int, where: str) -> str:
    """Draw into shards beside the target, by all processes, and pack them; returns what to say."""
    if target.suffix != ".npz":
        raise TesseraError(f"--npz {target} must end in .npz")
    if target.exists():
        raise TesseraError(f"{target} exists already: remove it or give another name")
    folder = target.with_name(target.name + ".shards")
    with runtime.ranks() as ranks, progress() as begin:
        drawn = Drawn(model, asked, folder, batch, where)
        many.draw(drawn, ranks, begin(f"drawing {drawn.count}") if ranks.first else None)
        if ranks.first:
            many.pack(drawn, target)
            shutil.rmtree(folder, ignore_errors=True)
    return f"{drawn.count} pictures in {target}" if ranks.first else ""


def pictured(model: Model, asked: Asked, out: Path, batch: int, said: dict[str, Any]) -> str:
    """Draw one PNG each, and a grid; or the grid alone into a .png. Returns what to say.

    A PNG that stands there and was drawn in the same way is kept: an interrupted command goes on.
    """
    used = drawing.settings(model, guidance=asked.guidance, **asked.settings)
    said = {**said, "tessera": __version__, "sampling": used.model_dump(mode="json"), "size": asked.size}
    said |= {"precision": asked.precision, "weights": weights_hash(model.network)}
    alone, count = out.suffix.lower() == ".png", len(asked.seeds)
    if alone and count > COLUMNS * ROWS:
        raise TesseraError(f"a grid holds {COLUMNS * ROWS} pictures at most, {count} are asked for: give a folder")
    sheet: list[np.ndarray] = []
    with progress() as begin:
        told = begin(f"drawing {count}")
        for start in range(0, count, batch):
            part = range(start, min(start + batch, count))
            for picture in _drawn(model, asked, part, None if alone else out, said):
                if len(sheet) < COLUMNS * ROWS:
                    sheet.append(picture)
            told(part.stop, count)
    seeds = list(dict.fromkeys(asked.seeds))
    classes = None if asked.classes is None else list(dict.fromkeys(asked.classes))
    in_rows = classes is not None and len(seeds) * len(classes) == count and len(seeds) <= COLUMNS
    grid = pictures.grid(np.stack(sheet), len(seeds) if in_rows else min(count, 8), zoom=max(1, 64 // len(sheet[0])))
    pictures.save_png(out if alone else out / "grid.png", grid, {**said, "classes": classes, "seeds": seeds})
    return str(out) if alone else f"{count} pictures and grid.png in {out}"


def _drawn(model: Model, asked: Asked, part: range, out: Path | None, said: dict[str, Any]) -> list[np.ndarray]:
    """The pictures of some rows, those that stand in the folder as they are."""
    found: dict[int, np.ndarray] = {}
    texts = {}
    for row in part:
        told, seed = None if asked.classes is None else asked.classes[row], asked.seeds[row]
        name = f"seed-{seed}.png" if told is None else f"class-{told}-seed-{seed}.png"
        texts[row] = name, {**said, "classes": told if told is None else [told], "seeds": [seed]}
        if out is not None and (kept := pictures.load_png(out / name, texts[row][1])) is not None:
            found[row] = kept
    missing = [row for row in part if row not in found]
    if missing:
        drawn = drawing.generate(
            model,
            None if asked.classes is None else [asked.classes[row] for row in missing],
            [asked.seeds[row] for row in missing],
            size=asked.size,
            guidance=asked.guidance,
            precision=asked.precision,
            batch=len(missing),
            **asked.settings,
        )
        for row, picture in zip(missing, drawn):
            found[row] = picture
            if out is not None:
                pictures.save_png(out / texts[row][0], picture, texts[row][1])
    return [found[row] for row in part]
