"""A trial: sampling settings and their measured quality and speed."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tessera.errors import TesseraError
from tessera.evaluation.protocol import Score
from tessera.files import read_array
from tessera.reporting.estimates import Estimate
from tessera.sampling import SamplingConfig
from tessera.settings import validate

MAX_FINALISTS = 4


@dataclass(frozen=True, eq=False)
class Trial:
    """Sampling settings and their scores."""

    sampling: SamplingConfig
    stage: str
    num_samples: int
    fd: Estimate
    calls: float  # network evaluations per image
    seconds: float  # per image, with decoding
    influences: np.ndarray = field(repr=False)  # of each sample on fd [num_samples]; see `frechet_influences`
    scores: list[Score] = field(repr=False)  # fd; other usual metrics in the final comparison

    @property
    def name(self) -> str:
        return self.sampling.summary()

    def difference_to(self, baseline: "Trial") -> Estimate:
        """The difference of fd to a baseline with the same seeds, and its interval (paired, delta method)."""
        error = float(np.std(self.influences - baseline.influences, ddof=1)) / self.num_samples**0.5
        return Estimate.normal(self.fd.value - baseline.fd.value, error)

    def is_acceptable(self, baseline: "Trial", tolerance: float) -> bool:
        """Whether fd is not significantly higher than the baseline's, and at most by the fraction `tolerance`.

        Without the tolerance, every trial would be acceptable if there are few samples.
        """
        difference = self.difference_to(baseline)
        return difference.low <= 0 and difference.value <= tolerance * baseline.fd.value


def frontier(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other beats in both time and fd, the fastest first."""
    result: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial.seconds, trial.fd.value)):
        if not result or trial.fd.value < result[-1].fd.value:
            result.append(trial)
    return result


def select_finalists(trials: Sequence[Trial], baseline: Trial, tolerance: float) -> list[Trial]:
    """The fastest acceptable trials, each better than the previous one, and the best of all."""
    others = [trial for trial in trials if trial.sampling != baseline.sampling]
    acceptable = [trial for trial in others if trial.is_acceptable(baseline, tolerance)]
    result = frontier(acceptable)[: MAX_FINALISTS - 1] + sorted(others, key=lambda trial: trial.fd.value)[:1]
    return list({trial.name: trial for trial in result}.values())


def to_dict(trial: Trial) -> dict[str, Any]:
    return {
        "name": trial.name,
        "stage": trial.stage,
        "num_samples": trial.num_samples,
        "fd": asdict(trial.fd),
        "calls": trial.calls,
        "seconds": trial.seconds,
        "metrics": {score.metric: score.value for score in trial.scores},
        "sampling": trial.sampling.model_dump(mode="json"),
    }


def read_trial(path: Path) -> Trial:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Trial(
            sampling=validate(SamplingConfig, data["sampling"], str(path)),
            stage=data["stage"],
            num_samples=data["num_samples"],
            fd=Estimate(**data["fd"]),
            calls=data["calls"],
            seconds=data["seconds"],
            influences=np.array(read_array(path.with_suffix(".npy"))),
            scores=[validate(Score, score, str(path)) for score in data["scores"]],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TesseraError(f"{path} is damaged: {error!r}; remove it to run this trial again") from None


def summary(trial: Trial) -> str:
    fd = trial.fd
    return f"{trial.name}: fd {fd.value:.4g} ({fd.low:.4g} to {fd.high:.4g}), {trial.seconds:.3g} s per image"
