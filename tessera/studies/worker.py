"""One member of a study in a process of its own: it trains, and draws with other numbers of steps when it is done.

OUTPUT/members/NAME                           a run like any other
OUTPUT/members/NAME/sampling/steps-016.json   the scores of the finished model that draws with 16 steps
OUTPUT/members/NAME/failed.txt                why it failed, if it did
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
from tessera.evaluation.features import FeatureExtractor, FeatureSet, extract, load_extractor
from tessera.evaluation.reference import resolve_reference
from tessera.evaluation.sources import DatasetSource
from tessera.files import exclusive_lock
from tessera.generation.bulk import BulkSamples, bulk_request
from tessera.monitoring.logger import TASK_INTERVAL
from tessera.reporting.text import format_duration
from tessera.runtime import Distributed, choose_device, keep_freed_memory
from tessera.training import loop, scores
from tessera.training.recipe import Recipe

SAMPLING, FAILED = "sampling", "failed.txt"
STOPPED = Interrupted.exit_code


def sampling_scores_path(run: Path, steps: int) -> Path:
    """The scores of a finished member that draws with so many steps."""
    return run / SAMPLING / f"steps-{steps:03d}.json"


def is_done(run: Path, steps: int, sampling_steps: Sequence[int]) -> bool:
    """Whether a member is trained, scored at its end, and has drawn with every other number of steps."""
    end = run / scores.FOLDER / f"step-{steps:09d}.json"
    return end.exists() and all(sampling_scores_path(run, number).exists() for number in sampling_steps)


def main(recipe: Recipe, sampling_steps: tuple[int, ...], parent: Connection) -> None:
    """What the process of a member does. It ends with 0 when all is done, with 130 when it was asked to stop, else with
    1 and why in `parent`. If the other end of that closes, the study is gone, and so is this process.
    """
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # held back until here
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


def _end_with(parent: Connection) -> None:
    """Nothing is ever sent this way: reading ends when the other process does."""
    try:
        parent.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


def run_member(recipe: Recipe, sampling_steps: Sequence[int]) -> None:
    """Train, or go on; then draw with each number of steps. What stands there is not made again."""
    run = Path(recipe.run_dir)
    if choose_device(recipe.training.device).type == "cpu":
        keep_freed_memory()
    network = prepare_reference(recipe)
    loop.train(recipe)
    if not is_done(run, recipe.training.steps, ()):
        raise TesseraError(f"the end, step {recipe.training.steps}, could not be scored: see what was said before this")
    missing = [number for number in sampling_steps if not sampling_scores_path(run, number).exists()]
    model = bundle.load(bundle.checkpoints(run)[0], choose_device(recipe.training.device)) if missing else None
    for number in missing:
        assert model is not None
        score_sampling_steps(recipe, model, network, number)


def prepare_reference(recipe: Recipe) -> FeatureExtractor:
    """Have the features of the reference in the study's folder, for all members, and return the network that looks."""
    config, told = recipe.evaluation, recipe.evaluation.reference or recipe.data
    assert config.reference_folder is not None
    network = load_extractor(config.features or suite.default_features(told), choose_device(recipe.training.device))
    reference = resolve_reference(told, DatasetSource(recipe.data), network)
    if isinstance(reference, FeatureSet):
        return network
    folder = features.features_path(Path(config.reference_folder), "reference", reference, network)
    if not (folder / features.SUMMARY).exists():
        with exclusive_lock(folder, lambda: _say("another command looks at the reference: waiting for it")):
            extract(reference, network, folder, Distributed(), config.batch_size, _Told("looking at the reference"))
    return network


def score_sampling_steps(recipe: Recipe, model: bundle.Model, network: FeatureExtractor, steps: int) -> None:
    """Score a finished model that draws with so many steps; all else is as at the marks."""
    run, config = Path(recipe.run_dir), recipe.evaluation
    path = sampling_scores_path(run, steps)
    if steps == recipe.sampling.num_steps:  # as at the end
        protocol.save(protocol.load(run / scores.FOLDER / f"step-{recipe.training.steps:09d}.json"), path)
        return
    _say(f"drawing {config.num_samples} pictures with {steps} steps each")
    work = path.with_suffix(".work")
    asked = bulk_request(model, config.num_samples, "balanced", settings={"num_steps": steps})
    found = suite.evaluate(
        BulkSamples(model, asked, work / "samples", config.batch_size, f"{steps} steps"),
        config.reference or recipe.data,
        network,
        work,
        config.metrics,
        batch_size=config.batch_size,
        progress=_Told,
        reference_folder=Path(config.reference_folder or run / scores.FOLDER),
    )
    protocol.save(found.scores, path)
    shutil.rmtree(work)


class _Told:
    """A line now and then on work that takes long."""

    def __init__(self, what: str) -> None:
        self.what, self.began = what, time.monotonic()
        self.last = self.began

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last > TASK_INTERVAL:
            self.last = now
            _say(
                f"  {self.what}: {done} of {total}, {format_duration((now - self.began) / max(done, 1) * (total - done))} left"
            )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
