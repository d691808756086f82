"""What the reader of lanes makes of ideal samplers that see little of the past: no network, only exact conditionals.

    python benchmarks/lanes_oracle.py
    python benchmarks/lanes_oracle.py --distances       # Fréchet distances of clips and of frames, too

A sampler that sees K previous frames continues a real clip frame by frame from the data's exact conditional
distribution given what these K frames show: position and color of a visible disc, or that it is hidden. Chaining and
extension do the same with chunks of frames. Beside the law there is the flicker score of VBench (one minus the mean
absolute difference of frames that follow each other), which ranks a still image best.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from tessera.data.lanes import COLORS, HIGH, LOW, PERIOD, SPEEDS, positions, render
from tessera.evaluation import distances
from tessera.evaluation.features import load_extractor
from tessera.evaluation.moments import Moments
from tessera.evaluation.toy import lane_reader
from tessera.evaluation.toy.lane_reader import Readings, hidden_interval, read_clips
from tessera.reporting.estimates import Estimate

FRAMES = 24
TRIES = 20_000  # of rejection sampling; a history that is a real clip's needs far fewer


@dataclass(frozen=True)
class State:
    """A disc in one frame: see `tessera.data.lanes.positions`."""

    phase: float
    speed: float
    color: int

    def later(self, frames: int) -> "State":
        return State(self.phase + frames * self.speed, self.speed, self.color)

    @property
    def center(self) -> float:
        return float(positions(np.array(self.phase)))

    @property
    def is_hidden(self) -> bool:
        low, high = hidden_interval()
        return low < self.center < high


class IdealSampler:
    """Clips that continue real ones from exact conditional distributions."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def prior(self) -> State:
        u = self.random
        return State(u.uniform(0, PERIOD), u.uniform(*SPEEDS), int(u.integers(len(COLORS))))

    def real(self) -> list[State]:
        first = self.prior()
        return [first.later(frame) for frame in range(FRAMES)]

    def posterior(self, history: list[State]) -> State:
        """A state of the last frame of a history, from its distribution given what the history shows. Raises
        RuntimeError if none is found.
        """
        seen = [index for index, state in enumerate(history) if not state.is_hidden]
        for _ in range(TRIES):
            state = self.prior()
            if len(seen) == 1:
                state = State(self._phase(history[seen[0]]), state.speed, history[seen[0]].color)
                state = state.later(len(history) - 1 - seen[0])
            elif seen:
                first, last = seen[-2:]
                phase = self._phase(history[last])
                way = np.mod(phase - self._phase(history[first]), PERIOD)
                state = State(phase, way / (last - first), history[last].color).later(len(history) - 1 - last)
            if SPEEDS[0] - 1e-6 <= state.speed <= SPEEDS[1] + 1e-6 and self._agrees(state, history):
                return state
        raise RuntimeError("no state agrees with the history")

    def _phase(self, state: State) -> float:
        """One of the two phases at the center of a disc: it moves to the right or to the left."""
        way = state.center - LOW
        return way if self.random.random() < 0.5 else -way

    @staticmethod
    def _agrees(state: State, history: list[State]) -> bool:
        for index, shown in enumerate(history):
            earlier = state.later(index + 1 - len(history))
            if earlier.is_hidden != shown.is_hidden:
                return False
            if not shown.is_hidden and abs(earlier.center - shown.center) > 1e-6:
                return False
        return True

    def autoregressive(self, context: int, new: int = 1, first: int | None = None) -> list[State]:
        """A clip whose first frames (default: as many as the context) are real. `new` frames at a time are sampled
        from the distribution given the last `context` frames.
        """
        clip = self.real()[: first or context]
        while len(clip) < FRAMES:
            state = self.posterior(clip[-context:])
            clip += [state.later(frame) for frame in range(1, new + 1)]
        return clip[:FRAMES]

    def independent(self) -> list[State]:
        color = int(self.random.integers(len(COLORS)))  # the class
        return [State(self.random.uniform(0, PERIOD), 0, color) for _ in range(FRAMES)]

    def still(self) -> list[State]:
        return [self.prior()] * FRAMES

    def jitter(self, deviation: float) -> list[State]:
        noisy = [(state, state.center + deviation * self.random.standard_normal()) for state in self.real()]
        return [State(np.clip(center, LOW, HIGH) - LOW, state.speed, state.color) for state, center in noisy]


SAMPLERS: dict[str, Callable[[IdealSampler], list[State]]] = {
    "real": IdealSampler.real,
    "independent frames + class": IdealSampler.independent,
    "still copy": IdealSampler.still,
    "sees 1 previous frame": lambda sampler: sampler.autoregressive(1),
    "sees 2 previous frames": lambda sampler: sampler.autoregressive(2),
    "last-frame chaining of 8": lambda sampler: sampler.autoregressive(1, new=8, first=8),
    "prefix-4 extension": lambda sampler: sampler.autoregressive(4, new=8, first=8),
    "real + 0.5 px jitter": lambda sampler: sampler.jitter(0.5),
}


def sample_clips(name: str, count: int, seed: int = 0) -> np.ndarray:
    """Clips of one lane, uint8 [count, 24, 8, 32, 3]."""
    sampler, palette = IdealSampler(seed), np.array(list(COLORS.values()))
    states = [state for _ in range(count) for state in SAMPLERS[name](sampler)]
    frames = render(np.array([state.center for state in states]), palette[[state.color for state in states]])
    return frames.reshape(count, FRAMES, *frames.shape[1:])


def flicker(clips: np.ndarray) -> float:
    """VBench's temporal flickering: 1 means that all frames are equal."""
    return 1 - float(np.abs(np.diff(clips.astype(np.float32), axis=1)).mean()) / 255


def row(name: str, clips: np.ndarray, readings: Readings) -> str:
    law, occluded = readings.lawful, readings.occluded

    def fraction(hits: np.ndarray) -> str:
        if not len(hits):
            return "-"
        estimate = Estimate.proportion(int(hits.sum()), len(hits))
        return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"

    cells = (
        f"{flicker(clips):.4f}",
        f"{readings.one_color.mean():.2f}",
        fraction(law),
        str(int(occluded.sum())),
        fraction(law[occluded]),
        f"{np.nanmean(readings.step_errors):.3f}" if np.isfinite(readings.step_errors).any() else "-",
    )
    return f"| {name} | " + " | ".join(cells) + " |"


def distance_row(name: str, samples: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> str:
    """Fréchet distances of clips and of single frames, and the distance of how much frames change, from features."""
    width = samples["pool"].shape[1]
    pairs = [(samples["pool"], reference["pool"])]
    pairs.append((samples["frames"].reshape(-1, width), reference["frames"].reshape(-1, width)))
    values = [distances.frechet(x, Moments.from_rows(x), Moments.from_rows(y)).value for x, y in pairs]
    values.append(distances.wasserstein([samples["motion"]], reference["motion"].ravel()).value)
    return f"| {name} | " + " | ".join(f"{value:.4f}" for value in values) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=500, help="lanes of each sampler (default: 500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--distances", action="store_true", help="also distances of the built-in features")
    arguments = parser.parse_args()
    print(f"LawPass: root mean square distance below {lane_reader.TOLERANCE} px; 95 % intervals (Wilson)\n")
    columns = (
        "sampler",
        "flicker score",
        "identity kept",
        "LawPass",
        "occluded events",
        "LawPass of these",
        "off (px/frame)",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in SAMPLERS:
        clips = sample_clips(name, arguments.count, arguments.seed)
        print(row(name, clips, read_clips(clips)), flush=True)
    if arguments.distances:
        extractor = load_extractor("lanes", torch.device("cpu"))
        reference = extractor(sample_clips("real", 2 * arguments.count, arguments.seed + 1), 50)
        columns = ("sampler", "fd of clips", "frame_fd", "motion (levels)")
        print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for name in SAMPLERS:
            clips = sample_clips(name, arguments.count, arguments.seed)
            print(distance_row(name, extractor(clips, 50), reference), flush=True)


if __name__ == "__main__":
    main()
