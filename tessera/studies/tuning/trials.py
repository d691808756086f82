"""One way to draw and what came of it: compared with another, and as a file."""

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

FINALISTS = 4


@dataclass(frozen=True, eq=False)
class Trial:
    """One way to draw and what came of it. calls: of the network, a picture; seconds: a picture, with decoding.

    pulls [count]: how much each picture pulls at fd (`distances.frechet_pulls`).
    """

    sampling: SamplingConfig
    stage: str
    num_samples: int
    fd: Estimate
    calls: float
    seconds: float
    influences: np.ndarray = field(repr=False)
    scores: list[Score] = field(repr=False)  # fd, and in the check the other usual ones

    @property
    def name(self) -> str:
        return self.sampling.summary()

    def difference_to(self, baseline: "Trial") -> Estimate:
        """fd minus the baseline's, of the same seeds, with the interval of that difference: paired, delta method."""
        error = float(np.std(self.influences - baseline.influences, ddof=1)) / self.num_samples**0.5
        return Estimate.normal(self.fd.value - baseline.fd.value, error)

    def is_acceptable(self, baseline: "Trial", margin: float) -> bool:
        """Whether chance alone may have put it above the baseline, and by no more than a share `margin` of it.

        Without the margin, few pictures would make everything equal.
        """
        apart = self.difference_to(baseline)
        return apart.low <= 0 and apart.value <= margin * baseline.fd.value


def frontier(trials: Sequence[Trial]) -> list[Trial]:
    """Those that no other beats in both time and fd, the fastest first."""
    found: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial.seconds, trial.fd.value)):
        if not found or trial.fd.value < found[-1].fd.value:
            found.append(trial)
    return found


def finalists(trials: Sequence[Trial], baseline: Trial, margin: float) -> list[Trial]:
    """What is worth checking: the fastest that are no worse, each better than the one before, and the best of all."""
    others = [trial for trial in trials if trial.sampling != baseline.sampling]
    found = frontier([trial for trial in others if trial.is_acceptable(baseline, margin)])[: FINALISTS - 1]
    found += sorted(others, key=lambda trial: trial.fd.value)[:1]
    return list({trial.name: trial for trial in found}.values())


def to_dict(trial: Trial) -> dict[str, Any]:
    return {
        "name": trial.name,
        "stage": trial.stage,
        "count": trial.num_samples,
        "fd": asdict(trial.fd),
        "calls": trial.calls,
        "seconds": trial.seconds,
        "metrics": {score.metric: score.value for score in trial.scores},
        "sampling": trial.sampling.model_dump(mode="json"),
    }


def read_trial(path: Path) -> Trial:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return Trial(
            sampling=validate(SamplingConfig, facts["sampling"], str(path)),
            stage=facts["stage"],
            num_samples=facts["count"],
            fd=Estimate(**facts["fd"]),
            calls=facts["calls"],
            seconds=facts["seconds"],
            influences=np.array(read_array(path.with_suffix(".npy"))),
            scores=[validate(Score, score, str(path)) for score in facts["scores"]],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TesseraError(f"{path} is damaged: {error!r}; remove it to have it made again") from None


def summary(trial: Trial) -> str:
    fd = trial.fd
    return f"{trial.name}: fd {fd.value:.4g} ({fd.low:.4g} to {fd.high:.4g}), {trial.seconds:.3g} s a picture"
