"""Scores during training: the EMA model is sampled and compared with the data, and the best checkpoint is kept.

RUN/evaluation/plan.json            the settings of the evaluation
RUN/evaluation/reference/           features of the data, extracted once
RUN/evaluation/step-000001000.json  the scores of a step, each with its protocol
RUN/evaluation/curve.png            all scores over the steps
"""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

from pydantic import Field, PositiveInt, field_validator

from tessera import bundle
from tessera.data import AnyData
from tessera.evaluation import captions, protocol, suite
from tessera.evaluation.captions import caption_data
from tessera.evaluation.features import FeatureSet, Progress, check_images, load_extractor
from tessera.evaluation.protocol import Score
from tessera.evaluation.reference import resolve_reference
from tessera.files import atomic_write
from tessera.generation.bulk import BulkSamples, Policy, bulk_request
from tessera.generation.resumable import claim_folder
from tessera.reporting.metrics import HIGHER_IS_BETTER
from tessera.runtime import SINGLE, Distributed
from tessera.settings import Settings

FOLDER = "evaluation"
REMEDY = "Give the run another run_dir=, or remove that folder to score all steps in the new way from now on"


class EvaluationConfig(Settings):
    """How a run scores its model during training. Images are sampled with the recipe's `sampling`."""

    every: PositiveInt | None = Field(default=None, description="steps between evaluations; the last step is included")
    at: tuple[PositiveInt, ...] = Field(
        default=(), description="further steps at which the model is scored; without `every` and `at`: never"
    )
    num_samples: PositiveInt = Field(default=1000, ge=2, description="images sampled for each evaluation")
    class_policy: Policy = Field(
        default="balanced",
        description="classes of the sampled images: in turn; data: as often as in the training data, for a Fréchet "
        "distance where classes differ in size; uniform: at random",
    )
    metrics: tuple[str, ...] = Field(
        default=("fd", "kid"), description="as in `tessera evaluate`; the first one selects the best checkpoint"
    )
    features: str | None = Field(default=None, description="as in `tessera evaluate`; null: chosen by the data")
    reference: str | None = Field(default=None, description="data or statistics; null: the training data")
    reference_folder: str | None = Field(
        default=None, description="where the features of the reference are saved, to share them between runs"
    )
    captions: str | None = Field(
        default=None, description="data whose captions a text model is sampled for; null: the reference"
    )
    clip: str | None = Field(default=None, description="folder of a CLIP network, for the metric clip_score")
    batch_size: PositiveInt = Field(default=50, description="images sampled, or passed to the feature network, at once")

    @property
    def enabled(self) -> bool:
        """Whether the model is scored at all. If so, it is also scored after the last step."""
        return self.every is not None or bool(self.at)

    def due(self, step: int, num_steps: int) -> bool:
        """Whether the model is scored after a step, in a run of `num_steps`."""
        regular = self.every is not None and step % self.every == 0
        return self.enabled and step > 0 and (regular or step in self.at or step == num_steps)

    def count(self, num_steps: int) -> int:
        """The number of evaluations in a run of `num_steps`."""
        regular = () if self.every is None else range(self.every, num_steps + 1, self.every)
        return sum(step <= num_steps for step in {*regular, *self.at, num_steps}) if self.enabled else 0

    @field_validator("metrics")
    @classmethod
    def _check_metrics(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("name at least one metric, for example fd")
        return tuple(suite.parse_metrics(",".join(value)) or ())


class Scorer:
    """Scores the model of a run. Raises TesseraError at once if features or reference are not available."""

    def __init__(self, config: EvaluationConfig, model: bundle.Model, data: AnyData, run_dir: Path) -> None:
        self.config, self.model, self.folder = config, model, run_dir / FOLDER
        self.reference: str | AnyData = config.reference or data
        self.extractor = load_extractor(
            config.features or suite.default_features(self.reference, config.metrics), model.device
        )
        self.caption_data = caption_data(config.captions, self.reference, model)
        samples = self._samples(0, self.folder, self.model)
        check_images(samples, self.extractor)
        captions.check(config.metrics, samples, config.clip, model.device)
        reference = resolve_reference(config.reference, samples, self.extractor) if config.reference else None
        statistics = reference if isinstance(reference, FeatureSet) else None
        suite.check_metrics(config.metrics, config.num_samples, self.extractor, statistics)

    def begin(self, step: int) -> None:
        """Claim the run's folder of scores, and delete the scores after a step: they will be computed again.

        Raises TesseraError if the existing scores were computed with other settings: all scores of a run must compare.
        """
        reference = self.reference if isinstance(self.reference, str) else self.reference.model_dump(mode="json")
        plan = {
            "reference": reference,
            "features": self.extractor.identity,
            "num_samples": self.config.num_samples,
            "sampling": self._samples(0, self.folder, self.model).sampling_protocol,
        }
        claim_folder(self.folder, plan, REMEDY)
        for path, scored_step in _files(self.folder):
            if scored_step > step:
                path.unlink()

    def score(
        self,
        step: int,
        model: bundle.Model,
        world: Distributed = SINGLE,
        progress: Callable[[str], Progress] | None = None,
    ) -> dict[str, float]:
        """Each metric of the current model, and the ends of its interval. Images and features are deleted afterwards.

        Every rank must call it and samples its share; only the main rank has the scores.
        """
        work = self.folder / f"step-{step:09d}.work"
        if world.is_main:
            shutil.rmtree(work, ignore_errors=True)  # left by a run that was killed here
        world.barrier()
        evaluation = suite.evaluate(
            self._samples(step, work / "samples", model),
            self.reference,
            self.extractor,
            work,
            self.config.metrics,
            world,
            self.config.batch_size,
            progress if world.is_main else None,
            reference_folder=Path(self.config.reference_folder or self.folder),
            clip=self.config.clip,
        )
        if world.is_main:
            protocol.save(evaluation.scores, self.folder / f"step-{step:09d}.json")
            shutil.rmtree(work)
        metrics: dict[str, float] = {}
        for score in evaluation.scores:
            name = score.metric.replace(" ", "_")
            metrics |= {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}
        return metrics

    def _samples(self, step: int, folder: Path, model: bundle.Model) -> BulkSamples:
        request = bulk_request(model, self.config.num_samples, self.config.class_policy, data=self.caption_data)
        return BulkSamples(model, request, folder, self.config.batch_size, f"step {step}")


def history(run_dir: Path) -> dict[int, dict[str, Score]]:
    """The scores of each step of a run, by metric; the metric that selects the best checkpoint is first."""
    return {step: {score.metric: score for score in protocol.load(path)} for path, step in _files(run_dir / FOLDER)}


def _files(folder: Path) -> list[tuple[Path, int]]:
    return [(path, int(path.stem.removeprefix("step-"))) for path in sorted(folder.glob("step-*.json"))]


def best(scores: dict[int, dict[str, Score]]) -> tuple[int, Score] | None:
    """The step with the best score of the first metric, and that score. Of equal scores the earliest is best."""
    metric = next((name for by_metric in scores.values() for name in by_metric), None)
    if metric is None:
        return None
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    step = min((step for step in scores if metric in scores[step]), key=lambda step: sign * scores[step][metric].value)
    return step, scores[step][metric]


def plot(scores: dict[int, dict[str, Score]], path: Path) -> None:
    """Plot all metrics over the steps."""
    from matplotlib.figure import Figure

    metrics = list(dict.fromkeys(name for by_metric in scores.values() for name in by_metric))
    figure = Figure(figsize=(4.5 * len(metrics), 3.2), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics):
        curve = {step: by_metric[metric] for step, by_metric in scores.items() if metric in by_metric}
        steps = list(curve)
        axes.plot(steps, [score.value for score in curve.values()], marker="o", markersize=3)
        lows, highs = ([getattr(score, end) for score in curve.values()] for end in ("low", "high"))
        axes.fill_between(steps, lows, highs, alpha=0.2)
        axes.set(xlabel="step", ylabel=metric)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    atomic_write(path, buffer.getvalue())
