"""Tuning: which solver, grid, steps, guidance and caching draw as well as a model does now, in less time.

    FOLDER/plan.json            what is tuned and how it is scored: other work is refused
    FOLDER/reference-*/         features of the reference, looked at once; reference.npz: their moments
    FOLDER/trials/KEY.json      one way to draw, its score, calls and seconds; KEY.npy: how each picture pulls at it
    FOLDER/trials/KEY.same      caching that reused nothing, so that it was no trial
    FOLDER/results.json         all of them, the check on fresh seeds, and the choice

Every trial draws the same seeds and classes as the baseline, so differences are paired picture by picture. The best of
many trials is partly the luckiest: so finalists and baseline are drawn again, from fresh seeds, before one is chosen.
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
from tessera.bundle import Model
from tessera.data import AnyData
from tessera.errors import TesseraError
from tessera.evaluation import distances, reference, suite
from tessera.evaluation.features import FeatureExtractor, Progress
from tessera.evaluation.protocol import environment
from tessera.evaluation.sources import ImageShard
from tessera.files import atomic_write, exclusive_lock, write_array
from tessera.generation.bulk import BulkRequest, BulkSamples, bulk_request
from tessera.generation.resumable import PLAN, claim_folder
from tessera.models.dit import DiT
from tessera.models.network import Network
from tessera.reporting.estimates import Estimate
from tessera.reporting.text import format_duration
from tessera.runtime import Precision
from tessera.sampling import SamplingConfig
from tessera.settings import Settings, unknown_name, validate
from tessera.studies.tuning.search_space import caching_candidates, guidance_candidates, solver_candidates, with_calls
from tessera.studies.tuning.trials import Trial, to_dict, finalists, summary, read_trial

RESULTS, STATISTICS = "results.json", "reference.npz"
CALLS = (3, 4, 5, 6, 8, 10, 12, 16, 20, 25, 35, 50)  # of the denoiser, in one drawing
CONTENDERS = 4  # pairs of solver and grid whose steps are searched
FRESH = 1 << 32  # the first seed of the check; trials begin at 0
MORE = 2  # times as many pictures in the check
ROUNDS = 5  # of timing
CHECK = "check"
SAME = ".same"
STAGES = ("solver", "steps", "guidance", "caching")
SHARES = {"solver": 0.4, "steps": 0.8, "guidance": 0.95, "caching": 1.0}  # of the time for trials, spent by its end

Say = Callable[[str], None]


class TuningConfig(Settings):
    """What is asked for."""

    num_samples: PositiveInt = Field(
        default=500, ge=50, description="pictures of a trial; the check takes twice as many"
    )
    budget: PositiveFloat = Field(default=15.0, description="minutes, about")
    select: Literal["fastest-equal", "best", "none"] = "fastest-equal"
    tolerance: float = Field(default=0.05, ge=0, description="share by which no worse may be above the baseline's fd")
    search: tuple[str, ...] = STAGES
    batch_size: PositiveInt = Field(default=50, description="pictures drawn at once")
    precision: Precision = "float32"

    @field_validator("search")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError(f"nothing to search: name some of {', '.join(STAGES)}")
        for name in value:
            if name not in STAGES:
                raise ValueError(unknown_name("search", name, STAGES))
        return value


@dataclass(frozen=True)
class TuningResult:
    """What was tried from the baseline's seeds; baseline and finalists from fresh seeds, timed in turns; the choice.

    checked: the baseline first. chosen: one of the others, or None.
    """

    baseline: Trial
    trials: list[Trial]
    finalists: list[Trial]
    chosen: Trial | None
    notes: list[str]
    config: TuningConfig


class _Timed(BulkSamples):
    """Drawn, and how many rows the network saw and how long it took; of what stood there already nothing is known."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.rows, self.pictures = 0.0, 0
        self.seconds: list[float] = []  # a picture, of each shard

    def shard(self, index: int) -> ImageShard:
        if self.path(index).exists():
            return super().shard(index)
        with _rows(self.model.network) as seen:
            began = time.monotonic()
            found = super().shard(index)
            self.seconds.append((time.monotonic() - began) / len(found.images))
        self.rows += seen.rows
        self.pictures += len(found.images)
        return found


class Tuner:
    """Draws and scores ways to draw from one model, each once: what stands in the folder is kept.

    baseline: dotted assignments over the model's own settings, such as ["sampler=ancestral", "steps=250"].
    """

    def __init__(
        self,
        model: Model,
        against: str | AnyData,
        network: FeatureExtractor,
        folder: Path,
        config: TuningConfig,
        baseline: Sequence[str] | None = None,
        log: Say = print,
        progress: Callable[[str], Progress] | None = None,
    ) -> None:
        self.model, self.against, self.network, self.folder, self.tuning = model, against, network, folder, config
        self.say, self.progress = log, progress or (lambda what: None)
        self.baseline_sampling = _begun_with(folder) or model.config.sampling
        if baseline:  # said over what the folder began with, the same words change nothing
            self.baseline_sampling = generation.sampling_config(
                self._drawing(self.baseline_sampling), overrides=baseline
            )
        self.weights = bundle.weights_hash(model.network)
        self.kept: dict[str, Trial] = {}  # by key
        self.trials: list[Trial] = []
        self.skipped: Counter[str] = Counter()  # trials of a stage that there was no time for
        self.began = self.searching = time.monotonic()

    def run(self) -> TuningResult:
        """Search, check and choose. Raises TesseraError if the folder holds other work, or time is too short."""
        self.check_budget()
        with exclusive_lock(self.folder):
            self.claim()
            self.say(f"baseline: {summary(self.baseline)}")
            self.searching = time.monotonic()
            self.search()
            return self.choose(self.compare_finalists())

    # One trial

    def claim(self) -> None:
        drawn = BulkSamples(self.model, self._asked(1, 0), self.folder)
        drawn.weights = self.weights
        against = self.against if isinstance(self.against, str) else self.against.model_dump(mode="json")
        how = {"reference": against, "features": self.network.identity, "precision": self.tuning.precision}
        claim_folder(
            self.folder, {**drawn.model_identity, **how, "baseline": self.baseline_sampling.model_dump(mode="json")}
        )

    def trial(self, sampling: SamplingConfig, stage: str) -> Trial:
        """Draw and score one; kept, it costs nothing. The check takes more seeds, fresh ones, and the usual scores."""
        path = self._path(sampling, stage)
        if path.stem not in self.kept:
            self.kept[path.stem] = read_trial(path) if path.exists() else self._made(sampling, stage, path)
        return self.kept[path.stem]

    def _pictures(self, stage: str) -> tuple[int, int]:
        """How many, and the first seed."""
        return (self.tuning.num_samples * MORE, FRESH) if stage == CHECK else (self.tuning.num_samples, 0)

    def _path(self, sampling: SamplingConfig, stage: str) -> Path:
        identity = json.dumps([sampling.model_dump(mode="json"), *self._pictures(stage)], sort_keys=True)
        return self.folder / "trials" / f"{hashlib.sha256(identity.encode()).hexdigest()[:12]}.json"

    def _asked(self, count: int, first_seed: int) -> BulkRequest:
        return bulk_request(self.model, count, "balanced", first_seed, precision=self.tuning.precision)

    def _drawing(self, sampling: SamplingConfig) -> Model:
        config = self.model.config.model_copy(update={"sampling": sampling})
        return Model(config, self.model.network, self.model.codec)

    def _made(self, sampling: SamplingConfig, stage: str, path: Path) -> Trial:
        work, moments_at = path.with_suffix(".work"), self.folder / STATISTICS
        count, first_seed = self._pictures(stage)
        asked, batch = self._asked(count, first_seed), self.tuning.batch_size
        drawn = _Timed(self._drawing(sampling), asked, work / "samples", batch, sampling.summary())
        drawn.weights = self.weights
        bar = self.progress(f"{stage}: {sampling.summary()}")
        done = suite.evaluate(
            drawn,
            str(moments_at) if moments_at.exists() and stage != CHECK else self.against,
            self.network,
            work,
            None if stage == CHECK else ["fd"],
            batch_size=batch,
            progress=lambda what: bar if what.startswith("sampling") else None,
            reference_folder=self.folder,
        )
        if not moments_at.exists():  # a folder of a million pictures is listed once, not for every trial
            reference.save_statistics(done.reference, moments_at, num_rows=0)
        if not drawn.pictures:  # all were drawn before an interruption
            with _rows(drawn.model.network) as seen:
                drawn.seconds.append(self._seconds(sampling))
            drawn.rows, drawn.pictures = seen.rows, batch
        fd = next(score for score in done.scores if score.metric == "fd")
        pool, moments = done.samples.rows["pool"], done.samples.moments["pool"]
        trial = Trial(
            sampling=sampling,
            stage=stage,
            num_samples=count,
            fd=Estimate(fd.value, fd.low, fd.high),
            calls=drawn.rows / drawn.pictures,
            seconds=float(np.median(drawn.seconds)),
            influences=distances.frechet_influences(pool, moments, done.reference.moments["pool"]),
            scores=done.scores,
        )
        write_array(path.with_suffix(".npy"), trial.influences)
        scores = [score.model_dump(mode="json") for score in trial.scores]
        atomic_write(path, json.dumps({**to_dict(trial), "scores": scores}, indent=1) + "\n")
        shutil.rmtree(work)
        return trial

    def _seconds(self, sampling: SamplingConfig) -> float:
        """Of a picture, in one batch."""
        asked, batch = self._asked(self.tuning.batch_size, FRESH), self.tuning.batch_size
        began = time.monotonic()
        generation.generate(
            self._drawing(sampling), asked.classes, asked.seeds, precision=asked.precision, batch_size=batch
        )
        return (time.monotonic() - began) / batch

    # The time there is

    def check_budget(self) -> None:
        """Raise TesseraError if drawing the baseline alone, for trials and check, takes longer than the budget."""
        if self._path(self.baseline_sampling, CHECK).exists():
            return
        asked, steps = self._asked(self.tuning.batch_size, FRESH), self.baseline_sampling.num_steps
        began = time.monotonic()
        for state in generation.generate_steps(
            self._drawing(self.baseline_sampling), asked.classes, asked.seeds, precision=asked.precision
        ):
            if state.step == 1 and steps > 1:
                began = time.monotonic()  # the first step warms up
            if state.step == 3:
                break
        each = (time.monotonic() - began) / len(asked.seeds) * steps / max(1, min(3, steps) - 1)
        need = (self.tuning.num_samples + self._check_pictures()) * each
        if need > 60 * self.tuning.budget:
            raise TesseraError(
                f"the baseline alone ({self.baseline_sampling.summary()}) takes about {format_duration(need)} for trials and check, and the "
                f"budget is {format_duration(60 * self.tuning.budget)}: give --budget {math.ceil(need / 30)} (minutes), or a "
                f"fewer --num-samples than {self.tuning.num_samples}"
            )

    def _check_pictures(self) -> float:
        """How many pictures of the baseline take as long as the whole check: the others are much quicker."""
        return 1.25 * (self.tuning.num_samples * MORE + ROUNDS * self.tuning.batch_size)

    def seconds_left(self, stage: str) -> float:
        """Seconds until the trials of a stage must end, so that later ones and the check have time too."""
        end = self.began + 60 * self.tuning.budget - self._check_pictures() * self.baseline.seconds
        return self.searching + SHARES[stage] * (end - self.searching) - time.monotonic()

    # The search

    @cached_property
    def baseline(self) -> Trial:
        return self.trial(self.baseline_sampling, "baseline")

    def no_worse(self, trial: Trial) -> bool:
        return trial.is_acceptable(self.baseline, self.tuning.tolerance)

    def try_candidate(self, stage: str, config: SamplingConfig) -> Trial | None:
        """A trial, or None: no time is left for it, the model cannot draw so, or its caching has no effect."""
        if config == self.baseline_sampling:
            return self.baseline
        path = self._path(config, stage)
        if path.with_suffix(SAME).exists():
            return None
        if not path.exists():
            rows = (
                config.num_steps
                * config.sampler.calls_per_step
                * (1 if config.guidance_scale == 1 else 2)
                * self.tuning.num_samples
            )
            if rows * self.baseline.seconds / self.baseline.calls > self.seconds_left(stage):
                self.skipped[stage] += 1
                return None
            try:
                self._begins(config)
                if stage == "caching" and not self.caching_has_effect(config):
                    atomic_write(path.with_suffix(SAME), config.summary() + "\n")
                    return None
                trial = self.trial(config, stage)
            except TesseraError as error:
                self.say(f"{stage}: {config.summary()} is left out: {error}")
                return None
            self.say(
                f"{stage}: {summary(trial)}; {format_duration(max(self.seconds_left(stage), 0))} left for this stage"
            )
        trial = self.trial(config, stage)
        if trial not in self.trials:
            self.trials.append(trial)
            self.write([], None)
        return trial

    def _begins(self, config: SamplingConfig) -> None:
        """Raise TesseraError if the model cannot draw so: before time is spent on it."""
        asked = self._asked(1, 0)
        walk = generation.generate_steps(self._drawing(config), asked.classes, asked.seeds, precision=asked.precision)
        next(walk)
        next(walk)

    def caching_has_effect(self, config: SamplingConfig) -> bool:
        """Whether caching has any effect: between few steps, which are long, it may have none."""
        asked = self._asked(8, 0)
        with _rows(self.model.network) as seen:
            generation.generate(self._drawing(config), asked.classes, asked.seeds, precision=asked.precision)
        return not seen.even

    def search(self) -> None:
        """Stage by stage; each goes on from the best of those before."""
        search = self.tuning.search
        contenders = [self.baseline_sampling]
        if "solver" in search:
            for config in solver_candidates(self.model, self.baseline_sampling):
                self.try_candidate("solver", config)
            contenders = self.contenders() or contenders
        if "steps" in search:
            self.search_steps(contenders)
        if (
            "guidance" in search
            and self.model.config.network.num_classes
            and self.model.config.network.learn_null_class
        ):
            self.search_guidance()
        if "caching" in search and isinstance(self.model.network, DiT):
            for start in self.starts():
                for config in caching_candidates(start):
                    self.try_candidate("caching", config)

    def contenders(self) -> list[SamplingConfig]:
        """The best of the trials so far, at most two of a solver."""
        kinds: Counter[str] = Counter()
        found: list[SamplingConfig] = []
        for trial in sorted(self.trials, key=lambda trial: trial.fd.value):
            kinds[trial.sampling.sampler.kind] += 1
            if kinds[trial.sampling.sampler.kind] <= 2 and len(found) < CONTENDERS:
                found.append(trial.sampling)
        return found

    def search_steps(self, contenders: Sequence[SamplingConfig]) -> None:
        """From few calls to many, each contender until it was no worse than the baseline twice."""
        reached: Counter[int] = Counter()
        for calls in CALLS:
            for number, config in enumerate(contenders):
                if reached[number] < 2:
                    trial = self.try_candidate("steps", with_calls(config, calls))
                    reached[number] += trial is not None and self.no_worse(trial)

    def search_guidance(self) -> None:
        """Around the fastest that is no worse and around the best; then fewer steps with the guidance that was best."""
        for start in self.starts():
            for config in guidance_candidates(self.model, start):
                self.try_candidate("guidance", config)
        guided = [trial for trial in self.trials if trial.stage == "guidance" and self.no_worse(trial)]
        if not guided:
            return
        best = min(guided, key=lambda trial: trial.fd.value).sampling
        for calls in reversed([calls for calls in CALLS if calls < best.num_steps * best.sampler.calls_per_step]):
            trial = self.try_candidate("guidance", with_calls(best, calls))
            if trial is None or not self.no_worse(trial):
                break

    def starts(self) -> list[SamplingConfig]:
        """The fastest that is no worse than the baseline, and the best: the baseline itself is one of them all."""
        known = [self.baseline, *self.trials]
        found = min(filter(self.no_worse, known), key=lambda trial: trial.seconds)
        best = min(known, key=lambda trial: trial.fd.value)
        return [trial.sampling for trial in dict.fromkeys((found, best))]

    # The check

    def compare_finalists(self) -> list[Trial]:
        """The baseline and the finalists from fresh seeds; their times taken in turns, so that all share the load."""
        found = finalists(self.trials, self.baseline, self.tuning.tolerance)
        drawn = [self.trial(trial.sampling, CHECK) for trial in (self.baseline, *found)]
        bar = self.progress("timing in turns")
        seconds: list[list[float]] = [[] for _ in drawn]
        for turn in range(ROUNDS):
            for number, trial in enumerate(drawn):
                if not turn:
                    self._begins(trial.sampling)  # warms up
                seconds[number].append(self._seconds(trial.sampling))
                if bar is not None:
                    bar(turn * len(drawn) + number + 1, ROUNDS * len(drawn))
        return [replace(trial, seconds=statistics.median(each)) for trial, each in zip(drawn, seconds)]

    def choose(self, checked: list[Trial]) -> TuningResult:
        baseline, *others = checked
        notes = [
            f"the budget left out {count} trials of the stage {stage}: the same command goes on with them"
            for stage, count in self.skipped.items()
        ]
        fine = [trial for trial in others if trial.is_acceptable(baseline, self.tuning.tolerance)]
        match self.tuning.select:
            case "fastest-equal":
                choice = min(fine, key=lambda trial: trial.seconds, default=None)
                if choice is None or choice.seconds >= baseline.seconds:
                    choice = None
                    notes.append("nothing faster was no worse than the baseline on fresh seeds: nothing is written")
            case "best":
                choice = min(checked, key=lambda trial: trial.fd.value)
                if choice is baseline:
                    choice = None
                    notes.append("nothing was better than the baseline on fresh seeds: nothing is written")
            case _:
                choice = None
        self.write(checked, choice, notes)
        return TuningResult(self.baseline, self.trials, checked, choice, notes, self.tuning)

    def write(self, checked: Sequence[Trial], choice: Trial | None, notes: Sequence[str] = ()) -> None:
        """results.json, as far as the search has come."""
        results = {
            "format": 1,
            "features": self.network.identity,
            "margin": self.tuning.tolerance,
            "environment": environment(str(self.model.device)),
            "baseline": to_dict(self.baseline),
            "trials": [self._compared(trial, self.baseline) for trial in self.trials],
            "checked": [self._compared(trial, checked[0]) for trial in checked],
            "chosen": None if choice is None else choice.name,
            "notes": list(notes),
        }
        atomic_write(self.folder / RESULTS, json.dumps(results, indent=1) + "\n")

    def _compared(self, trial: Trial, baseline: Trial) -> dict[str, Any]:
        margin = self.tuning.tolerance
        return {
            **to_dict(trial),
            "against_baseline": asdict(trial.difference_to(baseline)),
            "no_worse": trial.is_acceptable(baseline, margin),
        }


def _begun_with(folder: Path) -> SamplingConfig | None:
    """The baseline that a folder began with: the model's own settings may be the chosen ones by now."""
    try:
        began = json.loads((folder / PLAN).read_text(encoding="utf-8"))["baseline"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # nothing began, or `begin` says what is wrong
    return validate(SamplingConfig, began, str(folder / PLAN))


class _Rows:
    """How many rows each block of a network has seen."""

    def __init__(self, blocks: int) -> None:
        self.of_block = [0] * blocks

    @property
    def rows(self) -> float:
        """Calls of the whole network that cost as much."""
        return sum(self.of_block) / len(self.of_block)

    @property
    def even(self) -> bool:
        return min(self.of_block) == max(self.of_block)

    def count(self, block: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def seen(_: nn.Module, told: tuple[Any, ...]) -> None:
            self.of_block[block] += len(told[0])

        return seen


@contextmanager
def _rows(network: Network) -> Iterator[_Rows]:
    seen = _Rows(len(network.blocks))
    hooks = [block.register_forward_pre_hook(seen.count(number)) for number, block in enumerate(network.blocks)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
