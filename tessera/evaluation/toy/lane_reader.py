"""The oracle of the lanes data: reads colour and position of the disc in every frame, and whether they follow the law.

A frame is compared with exact images of a disc of each colour at each position, and with the empty lane; nothing is
learned. The law: one colour throughout, and the path of a disc of constant speed that is reflected by the walls and
seen wherever the bar does not hide it.

Shapes: N clips of one lane each, T frames, M frames of all clips, P positions of templates, G paths of a grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from tessera.data.lanes import COLOURS, HIGH, LANE, LEVELS, LOW, PERIOD, SPEEDS, WIDTH, coverage, empty_lane, positions
from tessera.errors import TesseraError

STEP = 1 / 16  # pixels between the positions of templates
MARGIN = 0.5  # pixels beyond the walls where discs are still found
VISIBLE = 1.0  # pixels of a disc that must be visible: with less, it may be seen or not
UNEXPLAINED = 6.0  # a disc that is visible in full and half transparent leaves 7 pixels unexplained
TOLERANCE = 0.5  # pixels: root mean square distance from the path, and distance of hidden discs from the bar
SPEED_TOLERANCE = 0.1  # pixels a frame, beyond the speeds of the data
MIN_VISIBLE = 3  # frames: two positions determine a path, more test it
MAX_SPEED = 2.6  # pixels a frame, of the paths that are compared
HIDDEN, INVALID = -1, -2  # instead of a colour
CONTRAST = (LEVELS[1] - LEVELS[0]) / 2  # of each channel of a disc and the background
BATCH = 2048  # frames compared with the templates at a time


@dataclass(frozen=True)
class Readings:
    """What N clips of T frames show.

    colours, int [N, T]: of the disc, HIDDEN or INVALID. centres [N, T]: its position; nan where no disc is visible.
    starts, speeds [N]: of the nearest path, see `data.lanes.positions`. distances [N]: the root mean square distance of
    the visible discs from it. The next four, bool [N], are conditions of the law. readable: no frame is invalid, and
    enough of them show a disc. one_colour: of all visible discs. visible: the disc is seen wherever its path is not
    hidden. moving: at a speed of the data. occluded: a disc is seen, hidden and seen again.
    """

    colours: np.ndarray
    centres: np.ndarray
    starts: np.ndarray
    speeds: np.ndarray
    distances: np.ndarray
    readable: np.ndarray
    one_colour: np.ndarray
    visible: np.ndarray
    moving: np.ndarray
    occluded: np.ndarray

    @property
    def lawful(self) -> np.ndarray:
        """Whether the law holds, bool [N]: LawPass."""
        return self.readable & self.one_colour & self.visible & self.moving & (self.distances < TOLERANCE)

    @property
    def steps(self) -> np.ndarray:
        """The distances in pixels between the discs of frames that follow each other, of all clips, where both are
        visible: the distribution of speeds. [number of pairs of frames]
        """
        steps = np.abs(np.diff(self.centres, axis=1))
        return steps[np.isfinite(steps)]

    @property
    def step_errors(self) -> np.ndarray:
        """The mean distance [N] between the movement from frame to frame and that of the nearest path, in pixels a
        frame; nan where no two frames that follow each other show a disc.
        """
        paths = positions(self.starts[:, None] + self.speeds[:, None] * np.arange(self.centres.shape[1]))
        errors = np.abs(np.diff(self.centres, axis=1) - np.diff(paths, axis=1))
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
    colours, centres = (np.concatenate(part).reshape(-1, frames) for part in zip(*results))
    return judge(colours, centres)


def judge(colours: np.ndarray, centres: np.ndarray) -> Readings:
    """The law for colours (classes, HIDDEN or INVALID) and centres (nan where no disc is visible), [N, T] each."""
    is_seen = np.isfinite(centres)
    starts, speeds = fit_paths(centres)
    paths = positions(starts[:, None] + speeds[:, None] * np.arange(centres.shape[1]))
    squares = np.where(is_seen, (np.nan_to_num(centres) - paths) ** 2, 0).sum(1)
    most = np.where(is_seen, colours, -1).max(1, keepdims=True)
    after_first = np.maximum.accumulate(is_seen, axis=1)
    before_last = np.maximum.accumulate(is_seen[:, ::-1], axis=1)[:, ::-1]
    return Readings(
        colours,
        centres,
        starts,
        speeds,
        distances=np.sqrt(squares / np.maximum(is_seen.sum(1), 1)),
        readable=(colours != INVALID).all(1) & (is_seen.sum(1) >= MIN_VISIBLE),
        one_colour=((colours == most) | ~is_seen).all(1),
        visible=np.where(is_seen, 0, _distance_to_hidden(paths)).max(1) < TOLERANCE,
        moving=(speeds > SPEEDS[0] - SPEED_TOLERANCE) & (speeds < SPEEDS[1] + SPEED_TOLERANCE),
        occluded=np.any(after_first & before_last & ~is_seen, axis=1),
    )


def read_frames(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours int [M] and centres [M] in images of one lane, uint8 [M, 8, 32, 3]."""
    centres, templates = _templates()
    delta = ((images.astype(np.float32) - empty_lane()) / CONTRAST).astype(np.float32).reshape(len(images), -1, 3)
    energy = (delta**2).sum((1, 2)) / 3  # of the difference to the empty lane, in pixels of a disc
    products = np.einsum("mic,pi->mpc", delta, templates, optimize=True) / 3  # [M, P, 3]
    # The best colour at each position: its signs in each channel are those of the products.
    gain = 2 * np.abs(products).sum(-1) - (templates**2).sum(1)
    best = gain.argmax(1)
    rows = np.arange(len(images))
    colours = (products[rows, best] > 0) @ np.array([4, 2, 1])  # the order of COLOURS
    is_seen = gain[rows, best] > 0
    unexplained = energy - np.where(is_seen, gain[rows, best], 0)
    colours = np.where(is_seen, colours, HIDDEN)
    invalid = unexplained > UNEXPLAINED
    return np.where(invalid, INVALID, colours), np.where(is_seen & ~invalid, centres[best], np.nan)


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Centres [P] at which enough of a disc is visible, and its coverage, float32 [P, 8 * 32]."""
    centres = np.arange(LOW - MARGIN, HIGH + MARGIN + STEP / 2, STEP)
    cover = coverage(centres).reshape(len(centres), -1).astype(np.float32)
    enough = cover.sum(1) >= VISIBLE
    return centres[enough], cover[enough]


def hidden_interval() -> tuple[float, float]:
    """Between these centres too little of a disc is visible."""
    centres, _ = _templates()
    gap = int(np.argmax(np.diff(centres)))
    return float(centres[gap]), float(centres[gap + 1])


def _distance_to_hidden(centres: np.ndarray) -> np.ndarray:
    """How far discs would have to move to be hidden, in pixels."""
    left, right = hidden_interval()
    return np.maximum(np.maximum(left - centres, centres - right), 0)


def fit_paths(centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest path of constant speed: start (phase) and speed, [N] each, of centres [N, T].

    It minimizes the sum of squared distances: of visible discs from the path, and of the path from where it is hidden
    in frames without one (nan). A grid of paths, then Gauss-Newton from the best of them.
    """
    frames = np.arange(centres.shape[1])
    is_seen = np.isfinite(centres)
    values, weights = np.nan_to_num(centres), is_seen.astype(float)
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
    rows = np.arange(len(centres))
    start, speed = start[rows, best], speed[rows, best]
    backwards = speed < 0  # the same path is that of the opposite phase
    return np.mod(np.where(backwards, -start, start), PERIOD), np.abs(speed)


def path_colours(readings: Readings) -> Sequence[str | None]:
    """The name of the colour of each clip, None where no disc is visible or their colours differ."""
    names = tuple(COLOURS)
    first = np.where(readings.colours >= 0, readings.colours, -1).max(1)
    valid = readings.one_colour & (first >= 0)
    return [names[colour] if is_valid else None for colour, is_valid in zip(first.tolist(), valid.tolist())]
