"""The law of lanes as a metric: do discs keep color and speed, also behind the bar? Read from the pixels, see
`toy.lane_reader`.

A clip that stands still breaks the law, and the distribution of speeds is compared with that of real clips.

Shapes: B clips, N lanes of all clips, T frames, H W height and width.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np

from tessera.data.lanes import COLORS, HELD_OUT_PAIRS, HELD_OUT_SPEEDS, LANE, LanesConfig
from tessera.evaluation import distances
from tessera.evaluation.toy import lane_reader
from tessera.evaluation.toy.lane_reader import Readings, path_colors, read_clips
from tessera.reporting.estimates import Estimate

NUM_REAL = 1000  # clips of one lane, of the test split
GROUPS = 20  # of clips, of which one at a time is left out for the interval of a distance
DEFINITION = {
    "reader": "lanes, by comparison with exact images",
    "distance": f"rms < {lane_reader.TOLERANCE} px",
    "speeds": f"within {lane_reader.SPEED_TOLERANCE} px/frame",
}
COLUMNS = ("lanes", "correct", "count", "fraction and 95 % interval", "real clips")
OCCLUDED = "with an occluded event"
KNOWN, UNSEEN_SPEEDS, UNSEEN_PAIRS = (
    "known speeds and pairs",
    "held-out speeds",
    "held-out pairs of color and speed",
)
# The fractions that are reported: group of lanes, what must be correct, and the name of the score, if it is one.
LINES = (
    (OCCLUDED, "law", "law_occluded"),  # first: studies compare by it
    ("all", "law", "law"),
    *(
        (group, word, "")
        for group in ("all", OCCLUDED)
        for word in ("readable", "identity", "visibility", "path", "speed")
    ),
    ("all", "class", "class_accuracy"),
    *((f"{group}, {OCCLUDED}", "law", "") for group in (KNOWN, UNSEEN_SPEEDS, UNSEEN_PAIRS)),
)
MEANING = {
    "law": "all of these",
    "readable": "every frame shows at most one disc of a color of the data",
    "identity": "one color throughout",
    "visibility": "seen wherever the bar does not hide it",
    "path": f"less than {lane_reader.TOLERANCE} px (root mean square) from a path of constant speed",
    "speed": "a speed of the data",
    "class": "the color of the class",
}

Fractions = dict[tuple[str, str], tuple[int, Estimate]]


def measure(
    clips: np.ndarray, labels: Sequence[int] | None = None
) -> tuple[dict[str, Estimate], list[tuple[str, ...]]]:
    """The scores of clips of lanes, uint8 [B, T, 8 L, 32, 3], and rows of a table with the columns COLUMNS.

    labels: the classes, to compare the color of the top disc with. Raises TesseraError for clips of another size.
    """
    readings, lanes = read_clips(clips), clips.shape[2] // LANE
    fractions = _fractions(readings, labels, lanes)
    real_readings = _real(clips.shape[1])
    real = _fractions(real_readings, None, 1)
    scores = {score: fractions[group, word][1] for group, word, score in LINES if score and (group, word) in fractions}
    errors = readings.step_errors[np.isfinite(readings.step_errors)]
    if len(errors) > 1:
        scores["step_error"] = Estimate.mean(errors.tolist())
        scores["speed_distance"] = _speed_distance(readings, real_readings.steps)
    rows = []
    for group, word, _ in LINES:
        if (group, word) not in fractions:
            continue
        count, value = fractions[group, word]
        interval = f"{value.value:.1%} ({value.low:.1%} to {value.high:.1%})"
        control = f"{real[group, word][1].value:.1%}" if (group, word) in real else ""
        rows.append((group, MEANING[word], str(count), interval, control))
    return scores, rows


def _speed_distance(readings: Readings, real_steps: np.ndarray) -> Estimate:
    steps = np.abs(np.diff(readings.centers, axis=1))
    groups = [steps[index::GROUPS] for index in range(GROUPS)]
    finite = [part for group in groups if len(part := group[np.isfinite(group)])]
    return distances.wasserstein(finite, real_steps)


def _fractions(readings: Readings, labels: Sequence[int] | None, lanes: int) -> Fractions:
    """The number of lanes and the fraction that is correct, by group and by what must be correct."""
    correct = {
        "law": readings.lawful,
        "readable": readings.readable,
        "identity": readings.one_color,
        "visibility": readings.visible,
        "path": readings.distances < lane_reader.TOLERANCE,
        "speed": readings.moving,
    }
    colors = np.array([color or "" for color in path_colors(readings)])
    groups = {"all": np.ones(len(colors), bool), OCCLUDED: readings.occluded}
    of_speed = (readings.speeds >= HELD_OUT_SPEEDS[0]) & (readings.speeds < HELD_OUT_SPEEDS[1])
    of_pair = np.zeros(len(colors), bool)
    for color, (low, high) in HELD_OUT_PAIRS.items():
        of_pair |= (colors == color) & (readings.speeds >= low) & (readings.speeds < high)
    for name, members in ((KNOWN, ~of_speed & ~of_pair), (UNSEEN_SPEEDS, of_speed), (UNSEEN_PAIRS, of_pair)):
        groups[f"{name}, {OCCLUDED}"] = members & readings.occluded
    if labels is not None:
        correct["class"] = np.repeat(colors[::lanes] == np.array(list(COLORS))[list(labels)], lanes)
    return {
        (group, word): (int(members.sum()), Estimate.proportion(int(correct[word][members].sum()), int(members.sum())))
        for group, word, _ in LINES
        if word in correct
        for members in [groups[group]]
        if members.any()
    }


@cache
def _real(frames: int) -> Readings:
    """What is read from real clips."""
    dataset = LanesConfig(split="test", count=NUM_REAL, frames=frames).open()
    return read_clips(np.stack([np.moveaxis(dataset.pixels(index), 0, -1) for index in range(NUM_REAL)]))
