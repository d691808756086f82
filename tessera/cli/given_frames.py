"""`tessera sample --from --last --given --extend --precede`: frames of the clips that are given.

Shapes: T H W frames, height and width of the clips, F given frames, C channels.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tessera import generation
from tessera.cli.image_files import pixels_hash
from tessera.data.clips import read_clip
from tessera.data.images import InvalidSample
from tessera.errors import TesseraError
from tessera.generation.image_inputs import crop, images_config, read_image
from tessera.generation.image_settings import data_fps
from tessera.model import Model


def read_given_frames(
    model: Model,
    size: tuple[int, ...] | None,
    fps: float | None,
    first: str | None = None,
    last: str | None = None,
    numbered: Sequence[str] = (),
    extend: str | None = None,
    precede: str | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """The fields of the request, empty without such options, and a hash of the frames.

    size: of the clips; None: as trained. fps: at which clips are read; None: as in training. Images and frames are
    cropped to the size. Raises TesseraError for what does not fit.
    """
    texts = [f"0={first}"] * (first is not None) + [f"-1={last}"] * (last is not None) + list(numbered)
    if not texts and extend is None and precede is None:
        return {}, {}
    if not model.config.network.is_temporal:
        raise TesseraError("--from, --last, --given, --extend and --precede need a model of clips, not of images")
    frames, height, width = (1, *(size or generation.image_size(model)))[-3:]
    config, images, indices = images_config(model), [], []
    for text in texts:
        number, path = _parse(text)
        images.append(crop(read_image(f"the frame {path}", Path(path), config), (height, width)))
        indices.append(number)
    for option, path in (("--extend", extend), ("--precede", precede)):
        if path is None:
            continue
        try:
            clip = read_clip(Path(path), data_fps(model) if fps is None else fps, config.channels)
        except (InvalidSample, OSError) as error:
            raise TesseraError(f"cannot read {option} {path}: {error}") from None
        if len(clip) >= frames:
            raise TesseraError(
                f"{option} {path} has {len(clip)} frames, and the whole clip {frames}: set --frames to more"
                + (f", and frame_schedule=sliding for more than the {frames} of the training" if size is None else "")
            )
        images += [crop(frame, (height, width)) for frame in clip]
        start = 0 if option == "--extend" else frames - len(clip)
        indices += range(start, start + len(clip))
    pixels = np.stack(images)
    return {"given_frames": pixels, "given_indices": indices}, {"given_frames_hash": pixels_hash(pixels)}


def _parse(text: str) -> tuple[int, str]:
    """NUMBER=IMAGE. Raises TesseraError."""
    match = re.fullmatch(r"(-?\d+)=(.+)", text)
    if match is None:
        raise TesseraError(f"--given {text} is not valid: write NUMBER=IMAGE, as in 7=frame.png; -1 is the last frame")
    return int(match[1]), match[2]
