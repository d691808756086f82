"""Scores while a run goes on: the EMA draws, features are compared with the data's, the best checkpoint is kept.

RUN/evaluation/plan.json            how they are made
RUN/evaluation/reference/           features of the data, looked at once
RUN/evaluation/step-000001000.json  the scores of a step, each with its protocol
RUN/evaluation/curve.png            all of them over the steps
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from pydantic import Field, PositiveInt, field_validator

from tessera import bundle
from tessera.data import AnyData
from tessera.evaluation import protocol, suite
from tessera.evaluation.features import FeatureSet, Progress, check_images, extractor
from tessera.evaluation.protocol import Score
from tessera.evaluation.reference import find_reference
from tessera.files import atomic_write
from tessera.generation.bulk import BulkSamples, asked_by_policy
from tessera.generation.resumable import begin_work
from tessera.runtime import Distributed
from tessera.settings import Settings

FOLDER = "evaluation"
INSTEAD = "Give the run another output=, or remove that folder, to score it in the new way from here on"
HIGHER = {"is", "precision", "recall", "density", "coverage", "authenticity", "as asked"}  # the better


class EvaluationConfig(Settings):
    """How a run scores itself while it learns. The pictures are drawn with the recipe's `sampling`, classes in turn."""

    every: PositiveInt | None = Field(default=None, description="steps between evaluations, the last step among them")
    at: tuple[PositiveInt, ...] = Field(
        default=(), description="steps at which the model is scored, beside every; with neither: never"
    )
    num_samples: PositiveInt = Field(default=1000, ge=2, description="pictures drawn each time")
    metrics: tuple[str, ...] = Field(default=("fd", "kid"), description="of `tessera evaluate`; the first decides")
    features: str | None = Field(default=None, description="as in `tessera evaluate`; null: by the data")
    reference: str | None = Field(default=None, description="data or statistics; null: the data learned from")
    reference_folder: str | None = Field(
        default=None, description="where the reference's features are kept, if runs are to share them"
    )
    batch_size: PositiveInt = Field(default=50, description="pictures drawn or looked at at once")

    @property
    def scores(self) -> bool:
        """Whether the model is scored at all; if so, at the end too."""
        return self.every is not None or bool(self.at)

    def due(self, step: int, steps: int) -> bool:
        """Whether the model is to be scored after one of `steps` steps."""
        often = self.every is not None and step % self.every == 0
        return self.scores and step > 0 and (often or step in self.at or step == steps)

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
        drawn = self._drawn(0, self.folder, self.model)
        check_images(drawn, self.network)
        opened = find_reference(config.reference, drawn, self.network) if config.reference else None
        statistics = opened if isinstance(opened, FeatureSet) else None
        suite.check_metrics(config.metrics, config.num_samples, self.network, statistics)

    def begin(self, step: int) -> None:
        """Claim the run's folder of scores, and drop those past a step: they will be made again.

        Raises TesseraError if those in it were made otherwise: one curve, one way.
        """
        reference = self.reference if isinstance(self.reference, str) else self.reference.model_dump(mode="json")
        how = {"count": self.config.num_samples, "drawing": self._drawn(0, self.folder, self.model).protocol}
        begin_work(self.folder, {"reference": reference, "features": self.network.identity, **how}, INSTEAD)
        for path, at in _files(self.folder):
            if at > step:
                path.unlink()

    def score(
        self,
        step: int,
        model: bundle.Model,
        ranks: Distributed = Distributed(),  # noqa: B008 (frozen)
        progress: Callable[[str], Progress] | None = None,
    ) -> dict[str, float]:
        """The model as it is now: each metric, and the ends of its interval. Pictures and features are not kept.

        Every process of `ranks` must call it, and draws its share; the scores are the first one's.
        """
        work = self.folder / f"step-{step:09d}.work"
        if ranks.is_main:
            shutil.rmtree(work, ignore_errors=True)  # of a run that was killed here
        ranks.barrier()
        done = suite.evaluate(
            self._drawn(step, work / "samples", model),
            self.reference,
            self.network,
            work,
            self.config.metrics,
            ranks,
            self.config.batch_size,
            progress if ranks.is_main else None,
            reference_folder=Path(self.config.reference_folder or self.folder),
        )
        if ranks.is_main:
            protocol.save(done.scores, self.folder / f"step-{step:09d}.json")
            shutil.rmtree(work)
        return _numbers(done.scores)

    def _drawn(self, step: int, folder: Path, model: bundle.Model) -> BulkSamples:
        asked = asked_by_policy(model, self.config.num_samples, "balanced")
        return BulkSamples(model, asked, folder, self.config.batch_size, f"step {step}")


def _numbers(scores: list[Score]) -> dict[str, float]:
    found: dict[str, float] = {}
    for score in scores:
        name = score.metric.replace(" ", "_")
        found |= {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}
    return found


def history(run: Path) -> dict[int, dict[str, Score]]:
    """The scores of each step of a run, by metric, the deciding one first."""
    return {at: {score.metric: score for score in protocol.load(path)} for path, at in _files(run / FOLDER)}


def _files(folder: Path) -> list[tuple[Path, int]]:
    return [(path, int(path.stem.removeprefix("step-"))) for path in sorted(folder.glob("step-*.json"))]


def best(scored: dict[int, dict[str, Score]]) -> tuple[int, Score] | None:
    """The step of the best scores so far and its deciding score; the earlier one of equals."""
    metric = next((name for scores in scored.values() for name in scores), None)
    if metric is None:
        return None
    sign = -1 if metric in HIGHER else 1
    step = min((step for step in scored if metric in scored[step]), key=lambda step: sign * scored[step][metric].value)
    return step, scored[step][metric]


def plot(scored: dict[int, dict[str, Score]], path: Path) -> None:
    """Curves of all metrics over the steps, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    import io

    metrics = list(dict.fromkeys(name for scores in scored.values() for name in scores))
    figure = Figure(figsize=(4.5 * len(metrics), 3.2), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics):
        told = {step: scores[metric] for step, scores in scored.items() if metric in scores}
        axes.plot(list(told), [score.value for score in told.values()], marker="o", markersize=3)
        axes.fill_between(
            list(told), [score.low for score in told.values()], [score.high for score in told.values()], alpha=0.2
        )
        axes.set(xlabel="step", ylabel=metric)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    atomic_write(path, buffer.getvalue())
