"""One member of a study in its own process: train it, and score the finished model with other sampling steps.

OUTPUT/members/NAME                           an ordinary run
OUTPUT/members/NAME/sampling/steps-016.json   scores of the finished model with 16 sampling steps
OUTPUT/members/NAME/failed.txt                the error of a failed member
"""

import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from tessera import bundle
from tessera.errors import Interrupted, TesseraError
from tessera.evaluation import features, protocol, suite
from tessera.evaluation.captions import caption_data
from tessera.evaluation.features import FeatureExtractor, FeatureSet, extract, load_extractor
from tessera.evaluation.reference import resolve_reference
from tessera.evaluation.sources import DatasetSource, SampleSource
from tessera.files import exclusive_lock
from tessera.generation.bulk import BulkSamples, bulk_request
from tessera.monitoring.logger import TASK_INTERVAL
from tessera.reporting.text import format_duration
from tessera.runtime import SINGLE, choose_device, keep_freed_memory
from tessera.training import loop, scores
from tessera.training.recipe import Recipe

SAMPLING, FAILED = "sampling", "failed.txt"
STOPPED = Interrupted.exit_code


def sampling_scores_path(run_dir: Path, num_steps: int) -> Path:
    """The scores of a finished member with this number of sampling steps."""
    return run_dir / SAMPLING / f"steps-{num_steps:03d}.json"


def is_done(run_dir: Path, steps: int, sampling_steps: Sequence[int]) -> bool:
    """Whether a member is trained, scored at its end, and scored with every other number of sampling steps."""
    end = run_dir / scores.FOLDER / f"step-{steps:09d}.json"
    return end.exists() and all(sampling_scores_path(run_dir, number).exists() for number in sampling_steps)


def main(recipe: Recipe, sampling_steps: tuple[int, ...], parent: Connection) -> None:
    """The main function of the process. Exit codes: 0 done, 130 stopped, 1 failed, with the error sent to `parent`.

    The process exits when the other end of the connection closes, which means that the study's process has ended.
    """
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    try:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked until here by the parent
        run_member(recipe, sampling_steps)
    except (Interrupted, KeyboardInterrupt):
        sys.exit(STOPPED)
    except TesseraError as error:
        parent.send(str(error))
        sys.exit(1)
    except BaseException as error:
        traceback.print_exc()
        parent.send(f"{type(error).__name__}: {error}")
        sys.exit(1)


def _exit_with_parent(parent: Connection) -> None:
    """The parent sends nothing, so receiving ends only when it exits."""
    try:
        parent.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


def run_member(recipe: Recipe, sampling_steps: Sequence[int]) -> None:
    """Train or resume, then score with each number of sampling steps that has no scores yet."""
    run_dir, device = Path(recipe.run_dir), choose_device(recipe.training.device)
    if device.type == "cpu":
        keep_freed_memory()
    extractor = prepare_reference(recipe)
    loop.train(recipe)
    if not is_done(run_dir, recipe.training.steps, ()):
        raise TesseraError(f"step {recipe.training.steps}, the last, could not be scored: see the messages before this")
    if missing := [number for number in sampling_steps if not sampling_scores_path(run_dir, number).exists()]:
        model = bundle.load(bundle.checkpoints(run_dir)[0], device)
        for num_steps in missing:
            score_sampling_steps(recipe, model, extractor, num_steps)


def load_reference(recipe: Recipe) -> tuple[FeatureExtractor, FeatureSet | SampleSource]:
    """The feature extractor of a recipe's evaluation, and the reference."""
    config, data = recipe.evaluation, recipe.evaluation.reference or recipe.data
    extractor = load_extractor(
        config.features or suite.default_features(data, config.metrics), choose_device(recipe.training.device)
    )
    return extractor, resolve_reference(data, DatasetSource(recipe.data), extractor)


def prepare_reference(recipe: Recipe) -> FeatureExtractor:
    """Extract the features of the reference once for all members. Returns the feature extractor."""
    config = recipe.evaluation
    extractor, reference = load_reference(recipe)
    if isinstance(reference, FeatureSet) or not suite.needs_reference(config.metrics):
        return extractor
    assert config.reference_folder is not None
    folder = features.features_path(Path(config.reference_folder), "reference", reference, extractor)
    if not (folder / features.SUMMARY).exists():
        with exclusive_lock(folder, lambda: _log("another command extracts features of the reference: waiting")):
            progress = _ProgressLog("extracting features of the reference")
            extract(reference, extractor, folder, SINGLE, config.batch_size, progress)
    return extractor


def score_sampling_steps(recipe: Recipe, model: bundle.Model, extractor: FeatureExtractor, num_steps: int) -> None:
    """Score a finished model with this number of sampling steps, otherwise as at the marks."""
    run_dir, config = Path(recipe.run_dir), recipe.evaluation
    path = sampling_scores_path(run_dir, num_steps)
    if num_steps == recipe.sampling.num_steps:  # scored at the end of training
        protocol.save(protocol.load(run_dir / scores.FOLDER / f"step-{recipe.training.steps:09d}.json"), path)
        return
    _log(f"scoring {config.num_samples} images with {num_steps} sampling steps")
    work = path.with_suffix(".work")
    reference = config.reference or recipe.data
    data, settings = caption_data(config.captions, reference, model), {"num_steps": num_steps}
    request = bulk_request(model, config.num_samples, config.class_policy, data=data, settings=settings)
    evaluation = suite.evaluate(
        BulkSamples(model, request, work / "samples", config.batch_size, f"{num_steps} steps"),
        reference,
        extractor,
        work,
        config.metrics,
        batch_size=config.batch_size,
        progress=_ProgressLog,
        reference_folder=Path(config.reference_folder or run_dir / scores.FOLDER),
        clip=config.clip,
    )
    protocol.save(evaluation.scores, path)
    shutil.rmtree(work)


class _ProgressLog:
    """Logs the progress of a long task once in a while."""

    def __init__(self, task: str) -> None:
        self.task = task
        self.start = self.last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last > TASK_INTERVAL:
            self.last = now
            left = (now - self.start) / max(done, 1) * (total - done)
            _log(f"  {self.task}: {done} of {total}, {format_duration(left)} left")


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
