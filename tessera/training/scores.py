"""Scores while a run goes on: the EMA draws, features are compared with the data's, the best checkpoint is kept.

RUN/evaluation/plan.json            how they are made
RUN/evaluation/reference/           features of the data, looked at once
RUN/evaluation/step-000001000.json  the scores of a step, each with its protocol
RUN/evaluation/curve.png            all of them over the steps
"""

import shutil
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, field_validator

from tessera import bundle
from tessera.data import AnyData
from tessera.evaluation import protocol, suite
from tessera.evaluation.drawn import Drawn, asked_by_policy
from tessera.evaluation.features import check_pictures, extractor
from tessera.evaluation.plan import begin
from tessera.evaluation.protocol import Score
from tessera.evaluation.reference import find_reference
from tessera.files import write_whole
from tessera.settings import Settings

FOLDER = "evaluation"
HIGHER = {"is", "precision", "recall", "density", "coverage", "authenticity", "as_asked"}  # the better


class EvaluationConfig(Settings):
    """How a run scores itself while it learns. The pictures are drawn with the recipe's `sampling`, classes in turn."""

    every: PositiveInt | None = Field(default=None, description="steps between evaluations; null: never")
    count: PositiveInt = Field(default=1000, ge=2, description="pictures drawn each time")
    metrics: tuple[str, ...] = Field(default=("fd", "kid"), description="of `tessera evaluate`; the first decides")
    features: str | None = Field(default=None, description="as in `tessera evaluate`; null: by the data")
    reference: str | None = Field(default=None, description="data or statistics; null: the data learned from")
    batch: PositiveInt = Field(default=50, description="pictures drawn or looked at at once")

    @field_validator("metrics")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("name at least one metric, for example fd")
        return tuple(suite.wanted(",".join(value)) or ())


class Scorer:
    """Scores the model of a run. Raises TesseraError at once if features or reference cannot be had."""

    def __init__(self, config: EvaluationConfig, model: bundle.Model, data: AnyData, run: Path) -> None:
        self.config, self.model, self.folder = config, model, run / FOLDER
        self.reference: str | AnyData = config.reference or data
        self.network = extractor(config.features or suite.usual_features(self.reference), model.device)
        drawn = self._drawn(0, self.folder)
        check_pictures(drawn, self.network)
        if config.reference:
            find_reference(config.reference, drawn, self.network)

    def begin(self) -> None:
        """Claim the run's folder of scores. TesseraError if those in it were made otherwise: one curve, one way."""
        reference = self.reference if isinstance(self.reference, str) else self.reference.model_dump(mode="json")
        how = {"count": self.config.count, "drawing": self._drawn(0, self.folder).protocol}
        begin(self.folder, {"reference": reference, "features": self.network.identity, **how})

    def due(self, step: int) -> bool:
        return self.config.every is not None and step > 0 and step % self.config.every == 0

    def score(self, step: int) -> dict[str, float]:
        """The model as it is now: each metric, and the ends of its interval. Pictures and features are not kept."""
        work = self.folder / f"step-{step:09d}.work"
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed here
        done = suite.evaluate(
            self._drawn(step, work / "samples"),
            self.reference,
            self.network,
            work,
            self.config.metrics,
            batch=self.config.batch,
            reference_folder=self.folder / "reference",
        )
        protocol.save(done.scores, self.folder / f"step-{step:09d}.json")
        shutil.rmtree(work)
        return _numbers(done.scores)

    def _drawn(self, step: int, folder: Path) -> Drawn:
        asked = asked_by_policy(self.model, self.config.count, "balanced")
        return Drawn(self.model, asked, folder, self.config.batch, f"step {step}")


def _numbers(scores: list[Score]) -> dict[str, float]:
    found: dict[str, float] = {}
    for score in scores:
        name = score.metric.replace(" ", "_")
        found |= {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}
    return found


def metrics_of(record: dict[str, Any]) -> list[str]:
    """The metrics that a record of the log holds, the deciding one first; none where it is of losses."""
    return [name for name in record if f"{name}_low" in record]


def best(records: list[dict[str, Any]]) -> tuple[int, str, float] | None:
    """Step, metric and value of the best scores so far, by the deciding metric; the earlier one of equals."""
    scored = [record for record in records if metrics_of(record)]
    if not scored:
        return None
    metric = metrics_of(scored[-1])[0]
    sign = -1 if metric in HIGHER else 1
    found = min((record for record in scored if metric in record), key=lambda record: sign * record[metric])
    return found["step"], metric, found[metric]


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Curves of all metrics over the steps, where matplotlib is installed."""
    metrics = list(dict.fromkeys(name for record in records for name in metrics_of(record)))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    import io

    figure = Figure(figsize=(4.5 * len(metrics), 3.2), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics):
        scored = [record for record in records if metric in record]
        steps = [record["step"] for record in scored]
        axes.plot(steps, [record[metric] for record in scored], marker="o", markersize=3)
        low, high = ([record[f"{metric}_{end}"] for record in scored] for end in ("low", "high"))
        axes.fill_between(steps, low, high, alpha=0.2)
        axes.set(xlabel="step", ylabel=metric)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())
