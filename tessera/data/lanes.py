"""The rendered clips: in each lane a disc moves at constant speed between two walls, behind an opaque bar.

What is hidden must be remembered: only a model that relates distant frames keeps the color and the speed of a disc
behind the bar. Shapes: N clips, L lanes, T frames, P positions, H W height and width.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt

from tessera import randomness
from tessera.settings import Settings

if TYPE_CHECKING:
    from tessera.data.captions import EncodedCaptions

LEVELS = (28, 228)  # of a channel of a disc: the colors are the corners of a cube around the gray of the background
COLORS = {
    "black": (28, 28, 28),
    "blue": (28, 28, 228),
    "green": (28, 228, 28),
    "cyan": (28, 228, 228),
    "red": (228, 28, 28),
    "magenta": (228, 28, 228),
    "yellow": (228, 228, 28),
    "white": (228, 228, 228),
}
BACKGROUND, BAR = 128, 64  # levels of gray
LANE, WIDTH, RADIUS = 8, 32, 3.0  # pixels: height of a lane, width of a frame, radius of a disc
BAR_COLUMNS = slice(10, 22)
LOW, HIGH = RADIUS, WIDTH - RADIUS  # between which the center of a disc moves
PERIOD = 2 * (HIGH - LOW)  # pixels from a state to the same state

SPEEDS = (0.8, 2.0)  # pixels a frame
HELD_OUT_SPEEDS = (1.3, 1.5)  # no disc of `known` clips has one of these
HELD_OUT_PAIRS = {  # and no disc of these colors one of these
    "red": (0.8, 1.1),
    "cyan": (0.8, 1.1),
    "blue": (1.7, 2.0),
    "yellow": (1.7, 2.0),
}
STREAMS = {"train": 0x6C6E7472, "test": 0x6C6E7465}  # random streams
GRID = 64  # starts are multiples of 1 / GRID of a pixel: even ones in the train split, odd ones in the test split

Combinations = Literal["all", "known", "held-out-speeds", "held-out-pairs"]


class LanesConfig(Settings):
    """Clips in color, never flipped: a lane is 8 x 32 pixels, and the class is the color of the top disc."""

    kind: Literal["lanes"] = "lanes"
    split: Literal["train", "test"] = Field(default="train", description="no clip is in both")
    count: PositiveInt = Field(default=50_000, description="number of clips; the first ones do not depend on it")
    lanes: PositiveInt = Field(default=1, description="lanes of 8 x 32 pixels, one below the other")
    frames: PositiveInt = 24
    combinations: Combinations = Field(
        default="all",
        description=f"of color and speed, for every disc: known leaves out the speeds {HELD_OUT_SPEEDS[0]} to "
        f"{HELD_OUT_SPEEDS[1]} and the pairs {', '.join(HELD_OUT_PAIRS)} with their speeds, to train with; the others "
        "hold only what it leaves out",
    )

    @property
    def description(self) -> str:
        lanes = "one lane" if self.lanes == 1 else f"{self.lanes} lanes"
        return f"{lanes}, split {self.split}" + f", {self.combinations}" * (self.combinations != "all")

    @property
    def size(self) -> tuple[int, int]:
        return self.lanes * LANE, WIDTH

    @property
    def channels(self) -> Literal[3]:
        return 3

    @property
    def hflip(self) -> bool:
        return False

    def open(self) -> "LanesDataset":
        return LanesDataset(self)


@dataclass(frozen=True)
class Disc:
    """start: the phase at the first frame, see `positions`. speed: pixels a frame"""

    color: str
    start: float
    speed: float


class LanesDataset:
    """Clips as functions of split and index, rendered on demand."""

    class_names = tuple(COLORS)
    text: "EncodedCaptions | None" = None
    image_sizes: np.ndarray | None = None

    def __init__(self, config: LanesConfig) -> None:
        self.config = config
        self._colors, self._starts, self._speeds = _sample_discs(config)  # [N, L] each

    def __len__(self) -> int:
        return self.config.count

    def label(self, index: int) -> int:
        return int(self._colors[index, 0])

    def name(self, index: int) -> str:
        kind = f" {self.config.combinations}" * (self.config.combinations != "all")
        return f"lanes {self.config.split}{kind} {index}"

    def discs(self, index: int) -> tuple[Disc, ...]:
        """The discs from top to bottom."""
        columns = self._colors[index].tolist(), self._starts[index].tolist(), self._speeds[index].tolist()
        return tuple(Disc(self.class_names[color], start, speed) for color, start, speed in zip(*columns))

    def pixels(self, index: int) -> np.ndarray:
        """uint8 [3, T, H, W]"""
        return render_clip(self.discs(index), self.config.frames)


def positions(phase: np.ndarray) -> np.ndarray:
    """The centers of discs, in pixels from the left, of phases: the way from the left wall to the right one and back,
    repeated. A disc of constant speed has a phase that grows by the speed in each frame.
    """
    phase = np.mod(phase, PERIOD)
    return LOW + np.minimum(phase, PERIOD - phase)


def allowed_speeds(color: str, combinations: Combinations) -> list[tuple[float, float]]:
    """The intervals of speeds that discs of a color have; none if there are no such discs."""
    pair = HELD_OUT_PAIRS.get(color)
    match combinations:
        case "all":
            return [SPEEDS]
        case "held-out-speeds":
            return [HELD_OUT_SPEEDS]
        case "held-out-pairs":
            return [pair] if pair else []
    ends = sorted([*SPEEDS, *HELD_OUT_SPEEDS, *(pair or ())])
    return [(low, high) for low, high in zip(ends[::2], ends[1::2]) if low < high]


def _sample_discs(config: LanesConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Color (class), start and speed of every disc, [N, L] each."""
    index = torch.arange(config.count)
    shape = (config.count, config.lanes, 3)
    u = randomness.uniform(0, index, STREAMS[config.split], 3 * config.lanes).numpy().astype(np.float64).reshape(shape)
    intervals = [allowed_speeds(color, config.combinations) for color in COLORS]
    classes = np.flatnonzero([bool(of_color) for of_color in intervals])
    colors = classes[(u[..., 0] * len(classes)).astype(int)]
    colors[:, 0] = classes[np.arange(config.count) % len(classes)]  # the class: balanced
    steps = int(PERIOD * GRID / 2)
    starts = (2 * np.floor(u[..., 1] * steps) + (config.split == "test")) / GRID
    speeds = np.empty_like(starts)
    for color in classes:
        rows = colors == color
        lengths = np.array([high - low for low, high in intervals[color]])
        ends = np.cumsum(lengths)
        way = u[rows, 2] * ends[-1]  # along the intervals, one after the other
        which = np.searchsorted(ends, way, side="right")
        speeds[rows] = np.array(intervals[color])[which, 0] + way - (ends - lengths)[which]
    return colors, starts, speeds


def render_clip(discs: tuple[Disc, ...], frames: int) -> np.ndarray:
    """uint8 [3, T, 8 L, 32]"""
    lanes = [
        render(positions(disc.start + disc.speed * np.arange(frames)), np.array(COLORS[disc.color])[None])
        for disc in discs
    ]
    return np.concatenate(lanes, axis=1).transpose(3, 0, 1, 2)


def render(centers: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """One lane with a disc at each of the centers [P], in colors [P, 3] or [1, 3]: uint8 [P, 8, 32, 3]."""
    cover = coverage(centers)[..., None]
    disc = colors.astype(float)[:, None, None]
    return (empty_lane() * (1 - cover) + disc * cover + 0.5).astype(np.uint8)


def empty_lane() -> np.ndarray:
    """A lane without a disc, float [8, 32, 3]."""
    lane = np.full((LANE, WIDTH, 3), float(BACKGROUND))
    lane[:, BAR_COLUMNS] = BAR
    return lane


def coverage(centers: np.ndarray) -> np.ndarray:
    """The fraction of each pixel that a disc covers before the bar hides it, exact: [P] -> [P, 8, 32], the bar 0."""
    edges = np.arange(WIDTH + 1) - centers[:, None]  # [P, 33] columns, relative to the center
    # Of the half above the center: the area between the circle and each height, left of each edge.
    areas = np.stack([_area_above(edges, float(height)) for height in range(LANE // 2 + 1)], axis=1)
    half = np.diff(areas[:, :-1] - areas[:, 1:], axis=-1)  # [P, 4, 32] rows upwards from the center
    cover = np.concatenate((half[:, ::-1], half), axis=1)
    cover[..., BAR_COLUMNS] = 0
    return np.clip(cover, 0, 1)


def _area_above(x: np.ndarray, height: float) -> np.ndarray:
    """The area inside the disc, above a height over its center and left of x."""
    if height >= RADIUS:
        return np.zeros_like(x)
    reach = np.sqrt(RADIUS**2 - height**2)
    x = np.clip(x, -reach, reach)
    chord = np.sqrt(np.maximum(RADIUS**2 - x**2, 0))
    return (x * chord + RADIUS**2 * np.arcsin(np.clip(x / RADIUS, -1, 1))) / 2 - height * x
