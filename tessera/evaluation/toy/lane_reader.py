"""The oracle of the lanes data: reads color and position of the disc in every frame, and whether they follow the law.

A frame is compared with exact images of a disc of each color at each position, and with the empty lane; nothing is
learned. The law: one color throughout, and the path of a disc of constant speed that is reflected by the walls and
seen wherever the bar does not hide it.

Shapes: N clips of one lane each, T frames, M frames of all clips, P positions of templates, G paths of a grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from tessera.data.lanes import COLORS, HIGH, LANE, LEVELS, LOW, PERIOD, SPEEDS, WIDTH, coverage, empty_lane, positions
from tessera.errors import TesseraError

STEP = 1 / 16  # pixels between the positions of templates
MARGIN = 0.5  # pixels beyond the walls where discs are still found
VISIBLE = 1.0  # pixels of a disc that must be visible: with less, it may be seen or not
UNEXPLAINED = 6.0  # a disc that is visible in full and half transparent leaves 7 pixels unexplained
TOLERANCE = 0.5  # pixels: root mean square distance from the path, and distance of hidden discs from the bar
SPEED_TOLERANCE = 0.1  # pixels a frame, beyond the speeds of the data
MIN_VISIBLE = 3  # frames: two positions determine a path, more test it
MAX_SPEED = 2.6  # pixels a frame, of the paths that are compared
HIDDEN, INVALID = -1, -2  # instead of a color
CONTRAST = (LEVELS[1] - LEVELS[0]) / 2  # of each channel of a disc and the background
BATCH = 2048  # frames compared with the templates at a time


@dataclass(frozen=True)
class Readings:
    """What N clips of T frames show.

    colors, int [N, T]: of the disc, HIDDEN or INVALID. centers [N, T]: its position; nan where no disc is visible.
    starts, speeds [N]: of the nearest path, see `data.lanes.positions`. distances [N]: the root mean square distance of
    the visible discs from it. The next four, bool [N], are conditions of the law. readable: no frame is invalid, and
    enough of them show a disc. one_color: of all visible discs. visible: the disc is seen wherever its path is not
    hidden. moving: at a speed of the data. occluded: a disc is seen, hidden and seen again.
    """

    colors: np.ndarray
    centers: np.ndarray
    starts: np.ndarray
    speeds: np.ndarray
    distances: np.ndarray
    readable: np.ndarray
    one_color: np.ndarray
    visible: np.ndarray
    moving: np.ndarray
    occluded: np.ndarray

    @property
    def lawful(self) -> np.ndarray:
        """Whether the law holds, bool [N]: LawPass."""
        return self.readable & self.one_color & self.visible & self.moving & (self.distances < TOLERANCE)

    @property
    def steps(self) -> np.ndarray:
        """The distances in pixels between the discs of frames that follow each other, of all clips, where both are
        visible: the distribution of speeds. [number of pairs of frames]
        """
        steps = np.abs(np.diff(self.centers, axis=1))
        return steps[np.isfinite(steps)]

    @property
    def step_errors(self) -> np.ndarray:
        """The mean distance [N] between the movement from frame to frame and that of the nearest path, in pixels a
        frame; nan where no two frames that follow each other show a disc.
        """
        paths = positions(self.starts[:, None] + self.speeds[:, None] * np.arange(self.centers.shape[1]))
        errors = np.abs(np.diff(self.centers, axis=1) - np.diff(paths, axis=1))
        count = np.isfinite(errors).sum(1)
        return np.where(count > 0, np.nansum(errors, axis=1) / np.maximum(count, 1), np.nan)


def read_clips(clips: np.ndarray) -> Readings:
    """Read clips of lanes, uint8 [B, T, 8 L, 32, 3]: the lanes of all clips, those of one clip after each other, N =
    B L. Raises TesseraError for clips of another size.
    """
    if clips.ndim != 5 or clips.shape[3:] != (WIDTH, 3) or clips.shape[2] % LANE or clips.shape[1] < MIN_VISIBLE:
        raise TesseraError(
            f"these are clips {list(clips.shape)}; the reader of lanes expects [B, T, {LANE} per lane, {WIDTH}, 3] "
            f"with at least {MIN_VISIBLE} frames"
        )
    count, frames, height = clips.shape[:3]
    lanes = clips.reshape(count, frames, height // LANE, LANE, WIDTH, 3).swapaxes(1, 2).reshape(-1, LANE, WIDTH, 3)
    results = [read_frames(lanes[start : start + BATCH]) for start in range(0, len(lanes), BATCH)]
    colors, centers = (np.concatenate(part).reshape(-1, frames) for part in zip(*results))
    return judge(colors, centers)


def judge(colors: np.ndarray, centers: np.ndarray) -> Readings:
    """The law for colors (classes, HIDDEN or INVALID) and centers (nan where no disc is visible), [N, T] each."""
    is_seen = np.isfinite(centers)
    starts, speeds = fit_paths(centers)
    paths = positions(starts[:, None] + speeds[:, None] * np.arange(centers.shape[1]))
    squares = np.where(is_seen, (np.nan_to_num(centers) - paths) ** 2, 0).sum(1)
    most = np.where(is_seen, colors, -1).max(1, keepdims=True)
    after_first = np.maximum.accumulate(is_seen, axis=1)
    before_last = np.maximum.accumulate(is_seen[:, ::-1], axis=1)[:, ::-1]
    return Readings(
        colors,
        centers,
        starts,
        speeds,
        distances=np.sqrt(squares / np.maximum(is_seen.sum(1), 1)),
        readable=(colors != INVALID).all(1) & (is_seen.sum(1) >= MIN_VISIBLE),
        one_color=((colors == most) | ~is_seen).all(1),
        visible=np.where(is_seen, 0, _distance_to_hidden(paths)).max(1) < TOLERANCE,
        moving=(speeds > SPEEDS[0] - SPEED_TOLERANCE) & (speeds < SPEEDS[1] + SPEED_TOLERANCE),
        occluded=np.any(after_first & before_last & ~is_seen, axis=1),
    )


def read_frames(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colors int [M] and centers [M] in images of one lane, uint8 [M, 8, 32, 3]."""
    centers, templates = _templates()
    delta = ((images.astype(np.float32) - empty_lane()) / CONTRAST).astype(np.float32).reshape(len(images), -1, 3)
    energy = (delta**2).sum((1, 2)) / 3  # of the difference to the empty lane, in pixels of a disc
    products = np.einsum("mic,pi->mpc", delta, templates, optimize=True) / 3  # [M, P, 3]
    # The best color at each position: its signs in each channel are those of the products.
    gain = 2 * np.abs(products).sum(-1) - (templates**2).sum(1)
    best = gain.argmax(1)
    rows = np.arange(len(images))
    colors = (products[rows, best] > 0) @ np.array([4, 2, 1])  # the order of COLORS
    is_seen = gain[rows, best] > 0
    unexplained = energy - np.where(is_seen, gain[rows, best], 0)
    colors = np.where(is_seen, colors, HIDDEN)
    invalid = unexplained > UNEXPLAINED
    return np.where(invalid, INVALID, colors), np.where(is_seen & ~invalid, centers[best], np.nan)


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Centers [P] at which enough of a disc is visible, and its coverage, float32 [P, 8 * 32]."""
    centers = np.arange(LOW - MARGIN, HIGH + MARGIN + STEP / 2, STEP)
    cover = coverage(centers).reshape(len(centers), -1).astype(np.float32)
    enough = cover.sum(1) >= VISIBLE
    return centers[enough], cover[enough]


def hidden_interval() -> tuple[float, float]:
    """Between these centers too little of a disc is visible."""
    centers, _ = _templates()
    gap = int(np.argmax(np.diff(centers)))
    return float(centers[gap]), float(centers[gap + 1])


def _distance_to_hidden(centers: np.ndarray) -> np.ndarray:
    """How far discs would have to move to be hidden, in pixels."""
    left, right = hidden_interval()
    return np.maximum(np.maximum(left - centers, centers - right), 0)


def fit_paths(centers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest path of constant speed: start (phase) and speed, [N] each, of centers [N, T].

    It minimizes the sum of squared distances: of visible discs from the path, and of the path from where it is hidden
    in frames without one (nan). A grid of paths, then Gauss-Newton from the best of them.
    """
    frames = np.arange(centers.shape[1])
    is_seen = np.isfinite(centers)
    values, weights = np.nan_to_num(centers), is_seen.astype(float)
    grid = np.stack(np.meshgrid(np.arange(0, PERIOD, 0.5), np.arange(0, MAX_SPEED, 0.04)), -1).reshape(-1, 2)
    paths = positions(grid[:, :1] + grid[:, 1:] * frames)  # [G, T]
    outside = _distance_to_hidden(paths) ** 2 - paths**2  # the seen frames' own squares are in the next line
    costs = (paths**2).sum(1) + (1 - weights) @ outside.T - 2 * (values * weights) @ paths.T  # [N, G]
    candidates = grid[np.argpartition(costs, 4, axis=1)[:, :4]]  # [N, 4, 2]
    start, speed = candidates[..., 0], candidates[..., 1]
    left, right = hidden_interval()

    def differences(start: np.ndarray, speed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        phase = np.mod(start[..., None] + speed[..., None] * frames, PERIOD)  # [N, 4, T]
        path = positions(phase)
        target = np.where(is_seen[:, None], values[:, None], np.clip(path, left, right))
        return target - path, np.where(phase < PERIOD / 2, 1.0, -1.0)

    for _ in range(6):
        difference, sign = differences(start, speed)
        slope = sign * (
            is_seen[:, None] | (difference != 0)
        )  # of the path against start; against speed: times the frame
        a, b, c = ((slope**2 * frames**power).sum(-1) for power in range(3))
        g, h = ((slope * difference * frames**power).sum(-1) for power in range(2))
        determinant = np.maximum(a * c - b * b, 1e-6)
        start, speed = start + (c * g - b * h) / determinant, speed + (a * h - b * g) / determinant
    cost = (differences(start, speed)[0] ** 2).sum(-1)
    best = np.nanargmin(cost, axis=1)
    rows = np.arange(len(centers))
    start, speed = start[rows, best], speed[rows, best]
    backwards = speed < 0  # the same path is that of the opposite phase
    return np.mod(np.where(backwards, -start, start), PERIOD), np.abs(speed)


def path_colors(readings: Readings) -> Sequence[str | None]:
    """The name of the color of each clip, None where no disc is visible or their colors differ."""
    names = tuple(COLORS)
    first = np.where(readings.colors >= 0, readings.colors, -1).max(1)
    valid = readings.one_color & (first >= 0)
    return [names[color] if is_valid else None for color, is_valid in zip(first.tolist(), valid.tolist())]
