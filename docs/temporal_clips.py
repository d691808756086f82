"""The clip of docs/studies/temporal.md, and its table of what goes wrong, from the networks of the study.

    python docs/temporal_clips.py runs/temporal      # writes docs/figures/temporal.webp, and prints the table

The clip has one column for each network, one row for each class (color), and the same seeds everywhere.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import tessera
from tessera.clips import save_clip
from tessera.evaluation.toy.lane_reader import read_clips

TARGET = Path(__file__).parent / "figures/temporal.webp"
TITLES = {
    "full-seed0": "full attention",
    "alternating-seed0": "space, then time",
    "unet-seed1": "3-D U-Net",  # the middle of three trainings that differ much
    "previous-seed0": "previous frame",
    "per-frame-seed0": "each frame alone",
}
NUM_READ = 96  # clips of each network for the table
CLASSES, FPS, ZOOM, GAP, TITLE = range(8), 8, 5, 4, 22


def column(run: Path, title: str) -> np.ndarray:
    """A title, then the clips of all classes below each other, [T, H, W, 3]."""
    clips = tessera.generate(tessera.load(str(run)), classes=list(CLASSES), seeds=list(CLASSES))  # [B, T, H, W, 3]
    clips = clips.repeat(ZOOM, axis=2).repeat(ZOOM, axis=3)
    clips = np.pad(clips, [(0, 0), (0, 0), (GAP, 0), (GAP, GAP), (0, 0)], constant_values=255)
    width, font = clips.shape[3], ImageFont.load_default(14)
    head = Image.new("RGB", (width, TITLE), "white")
    ImageDraw.Draw(head).text(((width - font.getlength(title)) / 2, 3), title, fill="black", font=font)
    heads = np.broadcast_to(np.asarray(head), (clips.shape[1], TITLE, width, 3))
    return np.concatenate([heads, *clips], axis=1)


def what_goes_wrong(run: Path) -> str:
    """Shares of clips with one color, seen where they must be, of constant speed; the median distance from a path."""
    classes = [number % len(CLASSES) for number in range(NUM_READ)]
    readings = read_clips(tessera.generate(tessera.load(str(run)), classes=classes, seeds=list(range(NUM_READ))))
    shares = [f"{part.mean():.0%}" for part in (readings.one_color, readings.visible, readings.moving)]
    return " | ".join([*shares, f"{np.nanmedian(readings.distances):.2f} px"])


def main(folder: Path) -> None:
    columns = [column(folder / "members" / member, title) for member, title in TITLES.items()]
    frames = np.concatenate(columns, axis=2)
    save_clip(TARGET, frames, FPS)
    for run in sorted({path.parents[1] for path in folder.glob("members/*/evaluation/step-*.json")}):
        print(f"| {run.name} | {what_goes_wrong(run)} |", flush=True)
    print(f"{TARGET}: {frames.shape}, {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
