"""Search for the solver, timestep spacing, steps, guidance and caching that are as good as a baseline in less time.

    FOLDER/plan.json            the model, the baseline and the protocol; a different search is refused
    FOLDER/reference-*/         features of the reference, extracted once; reference.npz: their moments
    FOLDER/trials/KEY.json      settings, their scores, calls and seconds; KEY.npy: the influence of each sample on fd
    FOLDER/trials/KEY.no-effect caching that reused nothing, which is therefore not a trial
    FOLDER/results.json         all trials, the final comparison, and the choice

Every trial uses the seeds and classes of the baseline, so differences are paired sample by sample. The best of many
trials is partly lucky, so the finalists and the baseline are sampled again with new seeds before one is chosen.
"""

import hashlib
import json
import math
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt, field_validator
from torch import nn

from tessera import bundle, generation
from tessera.data import AnyData
from tessera.errors import TesseraError
from tessera.evaluation import distances, suite
from tessera.evaluation.captions import caption_data
from tessera.evaluation.features import FeatureExtractor, Progress
from tessera.evaluation.protocol import environment
from tessera.evaluation.reference import save_statistics
from tessera.evaluation.sources import ImageShard
from tessera.files import atomic_write, exclusive_lock, write_array
from tessera.generation.bulk import BulkSamples, SampleRequest, bulk_request
from tessera.generation.resumable import PLAN, claim_folder
from tessera.model import Model
from tessera.models.dit import DiT
from tessera.models.network import Network
from tessera.reporting.estimates import Estimate
from tessera.reporting.text import format_duration
from tessera.runtime import Precision
from tessera.sampling import SamplingConfig
from tessera.settings import Settings, unknown_name, validate
from tessera.studies.tuning.search_space import caching_candidates, guidance_candidates, solver_candidates, with_calls
from tessera.studies.tuning.trials import Trial, read_trial, select_finalists, summary, to_dict

RESULTS, STATISTICS, NO_EFFECT = "results.json", "reference.npz", ".no-effect"
CALLS = (3, 4, 5, 6, 8, 10, 12, 16, 20, 25, 35, 50)  # of the denoiser for one image
MIN_SAMPLES = 50  # of a trial
NUM_STARTS = 4  # pairs of solver and spacing whose steps are searched
FINAL = "final"  # the stage of the final comparison
FINAL_SEED = 1 << 32  # the first seed of the final comparison; other trials start at 0
FINAL_FACTOR = 2  # times as many samples in the final comparison
TIMING_ROUNDS = 5
STAGES = ("solver", "steps", "guidance", "caching")
TIME_FRACTIONS = {"solver": 0.4, "steps": 0.8, "guidance": 0.95, "caching": 1.0}  # of the search, at the stage's end

Log = Callable[[str], None]


class TuningConfig(Settings):
    """The settings of a search."""

    num_samples: PositiveInt = Field(
        default=500, ge=MIN_SAMPLES, description="samples per trial; twice as many at the end"
    )
    budget: PositiveFloat = Field(default=15.0, description="minutes, approximately")
    select: Literal["fastest-equal", "best", "none"] = "fastest-equal"
    tolerance: float = Field(default=0.05, ge=0, description="largest increase of fd, as a fraction of the baseline's")
    search: tuple[str, ...] = STAGES
    batch_size: PositiveInt = 50
    precision: Precision = "float32"

    @field_validator("search")
    @classmethod
    def _check_stages(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError(f"nothing to search: expected some of {', '.join(STAGES)}")
        for name in value:
            if name not in STAGES:
                raise ValueError(unknown_name("search", name, STAGES))
        return value


@dataclass(frozen=True)
class TuningResult:
    """The trials with the baseline's seeds, and the final comparison with new seeds, timed in turns."""

    baseline: Trial
    trials: list[Trial]
    finalists: list[Trial]  # the baseline first
    chosen: Trial | None  # one of the others
    notes: list[str]
    config: TuningConfig


class _TimedSamples(BulkSamples):
    """Counts network rows and seconds of the images that are generated, not of those that existed before."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.rows, self.num_images = 0.0, 0
        self.seconds: list[float] = []  # per image, of each shard

    def shard(self, index: int) -> ImageShard:
        if self.path(index).exists():
            return super().shard(index)
        with _count_rows(self.model.network) as rows:
            start = time.monotonic()
            shard = super().shard(index)
            self.seconds.append((time.monotonic() - start) / len(shard.images))
        self.rows += statistics.fmean(rows)
        self.num_images += len(shard.images)
        return shard


class Tuner:
    """Runs and scores trials of one model. Trials in the folder are not repeated.

    baseline: dotted overrides of the model's sampling settings, such as ["sampler=ancestral", "num_steps=250"].
    """

    def __init__(
        self,
        model: Model,
        reference: str | AnyData,
        extractor: FeatureExtractor,
        folder: Path,
        config: TuningConfig,
        baseline: Sequence[str] | None = None,
        log: Log = print,
        progress: Callable[[str], Progress] | None = None,
    ) -> None:
        self.model, self.reference, self.extractor, self.folder = model, reference, extractor, folder
        self.config, self.log, self.progress = config, log, progress or (lambda task: None)
        self.baseline_sampling = _saved_baseline(folder) or model.config.sampling
        if baseline:  # over the saved baseline, so that repeating the command changes nothing
            saved = self._model_with(self.baseline_sampling)
            self.baseline_sampling = generation.sampling_config(saved, overrides=baseline)
        self.weights = bundle.weights_hash(model.network)
        self.trials: list[Trial] = []
        self.skipped: Counter[str] = Counter()  # candidates by stage for which there was no time
        self.start = self.search_start = time.monotonic()
        self._cache: dict[str, Trial] = {}  # by key

    def run(self) -> TuningResult:
        """Search, compare the finalists and choose. Raises TesseraError if the folder holds another search, or if the
        budget is too small."""
        self.check_budget()
        with exclusive_lock(self.folder):
            self.claim()
            self.log(f"baseline: {summary(self.baseline)}")
            self.search_start = time.monotonic()
            self.search()
            return self.choose(self.compare_finalists())

    # A trial

    def claim(self) -> None:
        samples = BulkSamples(self.model, self._request(1, 0), self.folder)
        samples.weights = self.weights
        reference = self.reference if isinstance(self.reference, str) else self.reference.model_dump(mode="json")
        protocol = {"reference": reference, "features": self.extractor.identity, "precision": self.config.precision}
        baseline = self.baseline_sampling.model_dump(mode="json")
        claim_folder(self.folder, {**samples.model_identity, **protocol, "baseline": baseline})

    def trial(self, sampling: SamplingConfig, stage: str) -> Trial:
        """Run a trial, or read it from the folder. The final stage has more, new seeds and all usual metrics."""
        path = self._path(sampling, stage)
        if path.stem not in self._cache:
            trial = read_trial(path) if path.exists() else self._run_trial(sampling, stage, path)
            self._cache[path.stem] = trial
        return self._cache[path.stem]

    def _seeds(self, stage: str) -> tuple[int, int]:
        """The number of samples, and the first seed."""
        return (self.config.num_samples * FINAL_FACTOR, FINAL_SEED) if stage == FINAL else (self.config.num_samples, 0)

    def _path(self, sampling: SamplingConfig, stage: str) -> Path:
        identity = json.dumps([sampling.model_dump(mode="json"), *self._seeds(stage)], sort_keys=True)
        return self.folder / "trials" / f"{hashlib.sha256(identity.encode()).hexdigest()[:12]}.json"

    def _request(self, count: int, first_seed: int) -> SampleRequest:
        data = caption_data(None, self.reference, self.model)
        return bulk_request(self.model, count, "balanced", first_seed, data, precision=self.config.precision)

    def _model_with(self, sampling: SamplingConfig) -> Model:
        config = self.model.config.model_copy(update={"sampling": sampling})
        return Model(config, self.model.network, self.model.codec)

    def _run_trial(self, sampling: SamplingConfig, stage: str, path: Path) -> Trial:
        work, statistics_path = path.with_suffix(".work"), self.folder / STATISTICS
        request, batch_size = self._request(*self._seeds(stage)), self.config.batch_size
        name = sampling.summary()
        samples = _TimedSamples(self._model_with(sampling), request, work / "samples", batch_size, name)
        samples.weights = self.weights
        bar = self.progress(f"{stage}: {name}")
        evaluation = suite.evaluate(
            samples,
            str(statistics_path) if statistics_path.exists() and stage != FINAL else self.reference,
            self.extractor,
            work,
            None if stage == FINAL else ["fd"],
            batch_size=batch_size,
            progress=lambda task: bar if task.startswith("sampling") else None,
            reference_folder=self.folder,
        )
        if not statistics_path.exists():  # a large folder of images is listed once, not for every trial
            save_statistics(evaluation.reference, statistics_path, num_rows=0)
        if not samples.num_images:  # all were generated before an interruption
            with _count_rows(self.model.network) as rows:
                samples.seconds.append(self._time_batch(sampling))
            samples.rows, samples.num_images = statistics.fmean(rows), batch_size
        fd = next(score for score in evaluation.scores if score.metric == "fd")
        features, moments = evaluation.samples.rows["pool"], evaluation.samples.moments["pool"]
        trial = Trial(
            sampling=sampling,
            stage=stage,
            num_samples=len(request.seeds),
            fd=Estimate(fd.value, fd.low, fd.high),
            calls=samples.rows / samples.num_images,
            seconds=float(np.median(samples.seconds)),
            influences=distances.frechet_influences(features, moments, evaluation.reference.moments["pool"]),
            scores=evaluation.scores,
        )
        write_array(path.with_suffix(".npy"), trial.influences)
        scores = [score.model_dump(mode="json") for score in trial.scores]
        atomic_write(path, json.dumps({**to_dict(trial), "scores": scores}, indent=1) + "\n")
        shutil.rmtree(work)
        return trial

    def _time_batch(self, sampling: SamplingConfig) -> float:
        """Seconds per image, in one batch."""
        start = time.monotonic()
        self._generate(sampling, self._request(self.config.batch_size, FINAL_SEED))
        return (time.monotonic() - start) / self.config.batch_size

    def _generate(self, sampling: SamplingConfig, request: SampleRequest) -> None:
        generation.generate_request(self._model_with(sampling), request, batch_size=len(request))

    def _sample_states(self, sampling: SamplingConfig, request: SampleRequest) -> Iterator[Any]:
        model = self._model_with(sampling)
        return generation.sample_steps(model, request.resolve(model))

    # The time budget

    def check_budget(self) -> None:
        """Raise TesseraError if the baseline alone would exceed the budget in the search and the final comparison."""
        if self._path(self.baseline_sampling, FINAL).exists():
            return
        request, steps = self._request(self.config.batch_size, FINAL_SEED), self.baseline_sampling.num_steps
        start = time.monotonic()
        for state in self._sample_states(self.baseline_sampling, request):
            if state.step == 1 and steps > 1:
                start = time.monotonic()  # the first step is a warm-up
            if state.step == 3:
                break
        image_seconds = (time.monotonic() - start) / len(request.seeds) * steps / max(1, min(3, steps) - 1)
        needed = (self.config.num_samples + self._final_images()) * image_seconds
        if needed > 60 * self.config.budget:
            number = self.config.num_samples
            fewer = f", or --num-samples from {MIN_SAMPLES} to {number - 1}" if number > MIN_SAMPLES else ""
            raise TesseraError(
                f"the baseline alone ({self.baseline_sampling.summary()}) takes about {format_duration(needed)} for "
                f"search and final comparison, and the budget is {format_duration(60 * self.config.budget)}: give "
                f"--budget {math.ceil(needed / 30)} (minutes){fewer}"
            )

    def _final_images(self) -> float:
        """The number of baseline images that take as long as the final comparison: finalists are much faster."""
        return 1.25 * (self.config.num_samples * FINAL_FACTOR + TIMING_ROUNDS * self.config.batch_size)

    def seconds_left(self, stage: str) -> float:
        """Seconds until the trials of a stage must end, so that later stages and the final comparison have time."""
        end = self.start + 60 * self.config.budget - self._final_images() * self.baseline.seconds
        return self.search_start + TIME_FRACTIONS[stage] * (end - self.search_start) - time.monotonic()

    # The search

    @cached_property
    def baseline(self) -> Trial:
        return self.trial(self.baseline_sampling, "baseline")

    def is_acceptable(self, trial: Trial) -> bool:
        return trial.is_acceptable(self.baseline, self.config.tolerance)

    def try_candidate(self, stage: str, sampling: SamplingConfig) -> Trial | None:
        """Run a candidate. None if there is no time, if the model does not support it, or if caching has no effect."""
        if sampling == self.baseline_sampling:
            return self.baseline
        path = self._path(sampling, stage)
        if path.with_suffix(NO_EFFECT).exists():
            return None
        if path.exists():
            trial = self.trial(sampling, stage)
        else:
            calls = sampling.num_steps * sampling.sampler.calls_per_step * (1 if sampling.guidance_scale == 1 else 2)
            seconds = calls * self.config.num_samples * self.baseline.seconds / self.baseline.calls
            if seconds > self.seconds_left(stage):
                self.skipped[stage] += 1
                return None
            try:
                self._check_supported(sampling)
                if stage == "caching" and not self.caching_has_effect(sampling):
                    atomic_write(path.with_suffix(NO_EFFECT), sampling.summary() + "\n")
                    return None
                trial = self.trial(sampling, stage)
            except TesseraError as error:
                self.log(f"{stage}: {sampling.summary()} is left out: {error}")
                return None
            left = format_duration(max(self.seconds_left(stage), 0))
            self.log(f"{stage}: {summary(trial)}; {left} left for this stage")
        if trial not in self.trials:
            self.trials.append(trial)
            self.write([], None)
        return trial

    def _check_supported(self, sampling: SamplingConfig) -> None:
        """Raise TesseraError if the model does not support the settings: takes one step."""
        states = self._sample_states(sampling, self._request(1, 0))
        next(states)
        next(states)

    def caching_has_effect(self, sampling: SamplingConfig) -> bool:
        """Whether any block is reused: between few steps, which are long, none may be."""
        with _count_rows(self.model.network) as rows:
            self._generate(sampling, self._request(8, 0))
        return min(rows) < max(rows)

    def search(self) -> None:
        """Stage by stage, each from the best of the previous ones."""
        stages, network = self.config.search, self.model.config.network
        starts = [self.baseline_sampling]
        if "solver" in stages:
            for sampling in solver_candidates(self.model, self.baseline_sampling):
                self.try_candidate("solver", sampling)
            starts = self.best_solvers() or starts
        if "steps" in stages:
            self.search_steps(starts)
        # The guidance of a student is in its weights.
        if "guidance" in stages and network.num_classes and network.learn_null_class and not network.takes_step_size:
            self.search_guidance()
        if "caching" in stages and isinstance(self.model.network, DiT):
            for start in self.best_and_fastest():
                for sampling in caching_candidates(start):
                    self.try_candidate("caching", sampling)

    def best_solvers(self) -> list[SamplingConfig]:
        """The best trials so far, at most two of a solver."""
        counts: Counter[str] = Counter()
        result: list[SamplingConfig] = []
        for trial in sorted(self.trials, key=lambda trial: trial.fd.value):
            counts[trial.sampling.sampler.kind] += 1
            if counts[trial.sampling.sampler.kind] <= 2 and len(result) < NUM_STARTS:
                result.append(trial.sampling)
        return result

    def search_steps(self, starts: Sequence[SamplingConfig]) -> None:
        """From few calls to many, until a start has been acceptable twice."""
        accepted: Counter[int] = Counter()
        few = (1, 2) if self.model.config.network.takes_step_size else ()
        for calls in (*few, *CALLS):
            for number, start in enumerate(starts):
                if accepted[number] < 2:
                    trial = self.try_candidate("steps", with_calls(start, calls))
                    accepted[number] += trial is not None and self.is_acceptable(trial)

    def search_guidance(self) -> None:
        """Around the fastest acceptable trial and the best trial; then fewer steps with the best guidance."""
        for start in self.best_and_fastest():
            for sampling in guidance_candidates(self.model, start):
                self.try_candidate("guidance", sampling)
        accepted = [trial for trial in self.trials if trial.stage == "guidance" and self.is_acceptable(trial)]
        if not accepted:
            return
        best = min(accepted, key=lambda trial: trial.fd.value).sampling
        for calls in reversed([calls for calls in CALLS if calls < best.num_steps * best.sampler.calls_per_step]):
            trial = self.try_candidate("guidance", with_calls(best, calls))
            if trial is None or not self.is_acceptable(trial):
                break

    def best_and_fastest(self) -> list[SamplingConfig]:
        """The fastest acceptable trial and the best one. The baseline takes part."""
        trials = [self.baseline, *self.trials]
        fastest = min(filter(self.is_acceptable, trials), key=lambda trial: trial.seconds)
        best = min(trials, key=lambda trial: trial.fd.value)
        return [trial.sampling for trial in dict.fromkeys((fastest, best))]

    # The final comparison

    def compare_finalists(self) -> list[Trial]:
        """The baseline and the finalists with new seeds, timed in turns, so that other load affects all of them."""
        selected = select_finalists(self.trials, self.baseline, self.config.tolerance)
        finalists = [self.trial(trial.sampling, FINAL) for trial in (self.baseline, *selected)]
        bar = self.progress("timing in turns")
        seconds: list[list[float]] = [[] for _ in finalists]
        for turn in range(TIMING_ROUNDS):
            for number, trial in enumerate(finalists):
                if not turn:
                    self._check_supported(trial.sampling)  # as a warm-up
                seconds[number].append(self._time_batch(trial.sampling))
                if bar is not None:
                    bar(turn * len(finalists) + number + 1, TIMING_ROUNDS * len(finalists))
        return [replace(trial, seconds=statistics.median(times)) for trial, times in zip(finalists, seconds)]

    def choose(self, finalists: list[Trial]) -> TuningResult:
        baseline, *others = finalists
        notes = [
            f"the budget left out {count} trials of the stage {stage}: repeat the command to run them"
            for stage, count in self.skipped.items()
        ]
        chosen = None
        if self.config.select == "fastest-equal":
            accepted = [trial for trial in others if trial.is_acceptable(baseline, self.config.tolerance)]
            faster = [trial for trial in accepted if trial.seconds < baseline.seconds]
            chosen = min(faster, key=lambda trial: trial.seconds, default=None)
        elif self.config.select == "best":
            best = min(finalists, key=lambda trial: trial.fd.value)
            chosen = None if best is baseline else best
        if chosen is None and self.config.select != "none":
            what = "nothing better" if self.config.select == "best" else "nothing faster and not worse"
            notes.append(f"{what} than the baseline on new seeds: nothing is written")
        self.write(finalists, chosen, notes)
        return TuningResult(self.baseline, self.trials, finalists, chosen, notes, self.config)

    def write(self, finalists: Sequence[Trial], chosen: Trial | None, notes: Sequence[str] = ()) -> None:
        """Write results.json with the results so far."""
        results = {
            "format": 1,
            "features": self.extractor.identity,
            "tolerance": self.config.tolerance,
            "environment": environment(str(self.model.device)),
            "baseline": to_dict(self.baseline),
            "trials": [self._comparison(trial, self.baseline) for trial in self.trials],
            "finalists": [self._comparison(trial, finalists[0]) for trial in finalists],
            "chosen": None if chosen is None else chosen.name,
            "notes": list(notes),
        }
        atomic_write(self.folder / RESULTS, json.dumps(results, indent=1) + "\n")

    def _comparison(self, trial: Trial, baseline: Trial) -> dict[str, Any]:
        difference, accepted = trial.difference_to(baseline), trial.is_acceptable(baseline, self.config.tolerance)
        return {**to_dict(trial), "difference": asdict(difference), "accepted": accepted}


def _saved_baseline(folder: Path) -> SamplingConfig | None:
    """The baseline of a search in the folder. The model's own settings may be the chosen ones by now."""
    try:
        sampling = json.loads((folder / PLAN).read_text(encoding="utf-8"))["baseline"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no search, or `claim` raises the error
    return validate(SamplingConfig, sampling, str(folder / PLAN))


@contextmanager
def _count_rows(network: Network) -> Iterator[list[int]]:
    """The rows that each block computes inside. Their mean is the number of network evaluations with equal cost."""
    rows = [0] * len(network.blocks)

    def counter(index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def count(block: nn.Module, args: tuple[Any, ...]) -> None:
            rows[index] += len(args[0])

        return count

    hooks = [block.register_forward_pre_hook(counter(index)) for index, block in enumerate(network.blocks)]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()
