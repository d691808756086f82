"""Sprites (Liberated Pixel Cup, after Li & Mandt 2018): clips whose action, direction and character are known exactly.

A data set of them, and a judge of sampled clips.

    python benchmarks/sprites.py write --data ../shared/data/sprites --out sprites        # train.parquet, test.parquet
    python benchmarks/sprites.py judge samples.npz --data ../shared/data/sprites          # or a model: see --help
    python benchmarks/sprites.py check --data ../shared/data/sprites                      # the judge on real clips

The judge learns nothing: it searches for the parts whose exact composition is nearest to a clip. Characters with (body
+ bottom + top + hair) % 7 == 3 are the test: no model is trained on them. Shapes: T = 8 frames, H = W = 64 pixels.
"""

import argparse
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from tessera.errors import TesseraError
from tessera.reporting.estimates import Estimate

FRAMES, SIDE, FPS, CELLS = 8, 64, 8, 13  # cells in a row of a sheet
ACTIONS = {  # the cells of the frames, after the first cell of a direction
    "walk": (7, 0, 1, 2, 3, 4, 5, 6),
    "spellcard": (0, 1, 2, 3, 4, 5, 4, 6),
    "slash": (0, 1, 2, 3, 4, 5, 4, 0),
}
FIRST_CELLS = {"spellcard": 13, "walk": 118, "slash": 169}  # to the left; front and right are 13 and 26 later
DIRECTIONS = ("left", "front", "right")
PARTS = (
    "body",
    "bottomwear",
    "topwear",
    "hair",
)  # in the order of painting; shoes, which are always the same, are last
VARIANTS, SHOES = 6, 1
MOTIONS = tuple(product(ACTIONS, DIRECTIONS))
CLASSES = tuple(f"{action} {direction}" for action, direction in MOTIONS)
# Root mean square distance in levels from the nearest composition: of real clips 0, noise of 20 levels 15, still
# copies and shuffled frames 15 to 47 (sprites.md).
MAX_DISTANCE = 18.0


def is_test(character: Sequence[int]) -> bool:
    return sum(character) % 7 == 3


@dataclass(frozen=True)
class Reading:
    """The nearest clip: its action and direction, the variants of its parts, and the distance in levels."""

    action: str
    direction: str
    character: tuple[int, ...]
    distance: float

    @property
    def is_valid(self) -> bool:
        return self.distance < MAX_DISTANCE


class Sprites:
    """The sheets of a folder: composes clips, and reads them."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "body").is_dir():
            raise TesseraError(
                f"{folder} holds no sheets: expected the folders body, bottomwear, topwear, hair and shoes"
            )
        self.folder = folder
        self._layers: dict[tuple[str, int, str, str], np.ndarray] = {}

    def layer(self, part: str, variant: int, action: str, direction: str) -> np.ndarray:
        """A part in every frame, float32 [T, H, W, 4] with its colors multiplied by its opacity, in 0..1."""
        key = (part, variant, action, direction)
        if key not in self._layers:
            sheet = Image.open(self.folder / part / f"{variant}.png").convert("RGBA")
            start = FIRST_CELLS[action] + CELLS * DIRECTIONS.index(direction)
            frames = []
            for cell in ACTIONS[action]:
                row, column = divmod(start + cell, CELLS)
                box = (column * SIDE, row * SIDE, (column + 1) * SIDE, (row + 1) * SIDE)
                frames.append(np.asarray(sheet.crop(box), np.float32) / 255)
            layer = np.stack(frames)
            layer[..., :3] *= layer[..., 3:]
            self._layers[key] = layer
        return self._layers[key]

    def compose(self, character: Sequence[int], action: str, direction: str) -> np.ndarray:
        """float32 [T, H, W, 3] in levels, on black."""
        clip = np.zeros((FRAMES, SIDE, SIDE, 3), np.float32)
        for part, variant in zip((*PARTS, "shoes"), (*character, SHOES)):
            layer = self.layer(part, variant, action, direction)
            clip = layer[..., :3] + (1 - layer[..., 3:]) * clip
        return 255 * clip

    @cached_property
    def typical(self) -> dict[tuple[str, str], np.ndarray]:
        """The mean of six characters in each motion: nearest to a clip of the same motion."""
        return {
            motion: np.mean([self.compose((variant,) * len(PARTS), *motion) for variant in range(VARIANTS)], axis=0)
            for motion in MOTIONS
        }

    def read(self, clip: np.ndarray) -> Reading:
        """The clip nearest to one uint8 [T, H, W, 3]: the three most similar motions, with the best part in turn."""
        if clip.shape != (FRAMES, SIDE, SIDE, 3):
            raise TesseraError(f"a clip of {list(clip.shape)}: expected [{FRAMES}, {SIDE}, {SIDE}, 3]")
        pixels = clip.astype(np.float32)
        order = sorted(MOTIONS, key=lambda motion: float(((self.typical[motion] - pixels) ** 2).mean()))
        return min((self._nearest(pixels, *motion) for motion in order[:3]), key=lambda reading: reading.distance)

    def _nearest(self, pixels: np.ndarray, action: str, direction: str) -> Reading:
        character, best = [0] * len(PARTS), float("inf")
        while True:
            before = best
            for index in reversed(range(len(PARTS))):
                errors = []
                for variant in range(VARIANTS):
                    trial = [*character[:index], variant, *character[index + 1 :]]
                    errors.append(float(((self.compose(trial, action, direction) - pixels) ** 2).mean()))
                character[index], best = int(np.argmin(errors)), min(errors)
            if best >= before:
                return Reading(action, direction, tuple(character), best**0.5)


def scores(readings: Sequence[Reading], labels: Sequence[int], characters: Sequence[Sequence[int]] | None) -> dict:
    """Fractions of clips with their intervals. labels: of CLASSES. characters: that the clips should show, if any."""
    results = {
        "valid": [reading.is_valid for reading in readings],
        "action": [r.is_valid and r.action == MOTIONS[label][0] for r, label in zip(readings, labels, strict=True)],
        "direction": [
            r.is_valid and r.direction == MOTIONS[label][1] for r, label in zip(readings, labels, strict=True)
        ],
    }
    results["action and direction"] = [a and b for a, b in zip(results["action"], results["direction"])]
    if characters is not None:
        pairs = list(zip(readings, characters, strict=True))
        results["identity"] = [reading.is_valid and reading.character == tuple(given) for reading, given in pairs]
    return {name: Estimate.proportion(sum(hits), len(hits)) for name, hits in results.items()}


def characters(test: bool) -> Iterator[tuple[int, ...]]:
    return (each for each in product(range(VARIANTS), repeat=len(PARTS)) if is_test(each) == test)


def as_uint8(clip: np.ndarray) -> np.ndarray:
    return (clip + 0.5).astype(np.uint8)


def write(sprites: Sprites, folder: Path, limit: int | None) -> None:
    """Parquet files of animated WebP without loss, with `label` (the motion), `text` and `character`."""
    import pyarrow as pa
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows: dict[str, list] = {"video": [], "label": [], "text": [], "character": []}
        for character in list(characters(split == "test"))[:limit]:
            for label, motion in enumerate(MOTIONS):
                frames = [Image.fromarray(frame) for frame in as_uint8(sprites.compose(character, *motion))]
                buffer = io.BytesIO()
                frames[0].save(
                    buffer, "WEBP", save_all=True, append_images=frames[1:], duration=1000 // FPS, loop=0, lossless=True
                )
                rows["video"].append({"bytes": buffer.getvalue(), "path": None})
                rows["label"].append(label)
                rows["text"].append(CLASSES[label])
                rows["character"].append(" ".join(map(str, character)))
        pyarrow.parquet.write_table(pa.table(rows), folder / f"{split}.parquet")
        print(f"{folder / split}.parquet: {len(rows['label'])} clips", flush=True)


def check(sprites: Sprites, count: int) -> None:
    """The judge on real clips of test characters, and on broken ones: a table."""
    random = np.random.default_rng(0)
    chosen = list(characters(test=True))
    picks = [(chosen[random.integers(len(chosen))], int(random.integers(len(MOTIONS)))) for _ in range(count)]
    clips = [as_uint8(sprites.compose(character, *MOTIONS[label])) for character, label in picks]
    noisy = [np.clip(clip + random.normal(0, 20, clip.shape), 0, 255).astype(np.uint8) for clip in clips]
    small = [[Image.fromarray(frame).resize((32, 32), Image.Resampling.BOX) for frame in clip] for clip in clips]
    blurred = [np.stack([np.asarray(frame.resize((SIDE, SIDE))) for frame in clip]) for clip in small]
    others = clips[1:] + clips[:1]
    half = FRAMES // 2
    changed = [np.concatenate((clip[:half], other[half:])) for clip, other in zip(clips, others)]
    shuffled = [clip[random.permutation(FRAMES)] for clip in clips]
    sets = {
        "real": clips,
        "noise of 20 levels": noisy,
        "half the resolution": blurred,
        "still copy of the third frame": [np.repeat(clip[2:3], FRAMES, axis=0) for clip in clips],
        "frames shuffled": shuffled,
        "another clip from the fifth frame on": changed,
    }
    print("| clips | valid | action and direction | identity | distance |\n|---|---|---|---|---|")
    for name, each in sets.items():
        readings = [sprites.read(clip) for clip in each]
        result = scores(readings, [label for _, label in picks], [character for character, _ in picks])
        cells = [f"{result[key].value:.2f}" for key in ("valid", "action and direction", "identity")]
        distances = [reading.distance for reading in readings]
        print(f"| {name} | {' | '.join(cells)} | {min(distances):.1f} to {max(distances):.1f} |", flush=True)


def judge(sprites: Sprites, target: str, count: int, sheet: Path | None) -> None:
    """The scores of an .npz of clips with labels of CLASSES, or of a model: from its classes alone, and from the first
    frame of test characters, too. sheet: an animation of some of both, a row for each.
    """
    if sheet is not None:
        if count < 2 * len(CLASSES):
            raise TesseraError(f"--sheet shows {2 * len(CLASSES)} clips: give --count {2 * len(CLASSES)} or more")
        sheet.parent.mkdir(parents=True, exist_ok=True)
    labels = [index % len(CLASSES) for index in range(count)]
    if target.endswith(".npz"):
        with np.load(target) as file:
            clips, labels = file["arr_0"][:count], file["arr_1"][:count].tolist()
        print_scores("clips", [sprites.read(clip) for clip in clips], labels, None)
        return
    import tessera
    from tessera.clips import encode_clip

    model = tessera.load(target)
    clips = tessera.generate(model, labels, list(range(count)), batch_size=36)
    readings = [sprites.read(clip) for clip in clips]
    print_scores("from the class", readings, labels, None)
    valid = [reading.character for reading in readings if reading.is_valid]
    if valid:
        expected = len(list(characters(test=True))) / VARIANTS ** len(PARTS)
        new = Estimate.proportion(sum(map(is_test, valid)), len(valid))
        print(f"  test characters among the valid ones: {text(new)}; of all combinations {expected:.3f}")
        print(f"  different characters among the valid ones: {len(set(valid))} of {len(valid)}")

    random = np.random.default_rng(1)
    held_out = list(characters(test=True))
    chosen = [held_out[index] for index in random.integers(len(held_out), size=count)]
    real = np.stack([as_uint8(sprites.compose(each, *MOTIONS[label])) for each, label in zip(chosen, labels)])
    seeds = list(range(count))
    animated = tessera.generate(model, labels, seeds, batch_size=36, given_frames=real[:, :1], given_indices=[0])
    print_scores("test characters, from the first frame", [sprites.read(clip) for clip in animated], labels, chosen)
    if sheet is not None:
        columns = len(CLASSES)
        rows = [clips[:columns], clips[columns : 2 * columns], real[:columns], animated[:columns]]
        frames = np.concatenate([np.concatenate(list(row), axis=2) for row in rows], axis=1)  # [T, H, W, C]
        sheet.write_bytes(encode_clip(frames.repeat(2, axis=1).repeat(2, axis=2), ".webp", FPS, quality=85))
        print(f"{sheet}: two rows from the class; test characters, and below them their clips from the first frame")


def print_scores(
    name: str, readings: Sequence[Reading], labels: Sequence[int], shown: Sequence[Sequence[int]] | None
) -> None:
    print(f"{name}, {len(readings)} clips; median distance {np.median([each.distance for each in readings]):.1f}")
    for score, estimate in scores(readings, labels, shown).items():
        print(f"  {score:24s} {text(estimate)}")


def text(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Sprites: data, and a judge of sampled clips.")
    parser.add_argument("command", choices=("write", "judge", "check"))
    parser.add_argument("target", nargs="?", help="of judge: an .npz (arr_0 clips, arr_1 labels), a run or a bundle")
    parser.add_argument("--data", type=Path, required=True, help="the folder of sheets")
    parser.add_argument("--out", type=Path, default=Path("sprites"), help="of write: the folder")
    parser.add_argument("--count", type=int, default=180, help="clips of judge and check")
    parser.add_argument("--sheet", type=Path, help="of judge of a model: an animated WebP of its clips")
    parser.add_argument("--limit", type=int, help="of write: characters of each split")
    arguments = parser.parse_args()
    try:
        sprites = Sprites(arguments.data)
        if arguments.command == "write":
            write(sprites, arguments.out, arguments.limit)
        elif arguments.command == "check":
            check(sprites, arguments.count)
        elif arguments.target is None:
            raise TesseraError("judge needs a target: an .npz of clips and labels, a run or a bundle")
        else:
            judge(sprites, arguments.target, arguments.count, arguments.sheet)
    except TesseraError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
