"""The run itself: set up, resume, step, log, draw, save, and end resumable whatever happens."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tessera
from tessera import bundle, drawing, pictures, runtime
from tessera.codecs import AutoencoderConfig
from tessera.data import Loader
from tessera.errors import TesseraError
from tessera.files import alone, remove_partials, whole_folder, write_whole
from tessera.interop import sources
from tessera.models.dit import DiT
from tessera.process import AnyProcess
from tessera.sampling.denoiser import Network
from tessera.settings import changes, write_yaml
from tessera.training import checkpoint, initial, scores
from tessera.training.checkpoint import Place
from tessera.training.ema import Average
from tessera.training.journal import Journal
from tessera.training.optimizers import learning_rate, set_learning_rate
from tessera.training.recipe import Recipe, pixels_like_data, resolve
from tessera.training.scores import Scorer
from tessera.training.step import Task, train_step

RECIPE, SKIPPED, INIT, SAMPLES = "recipe.yaml", "skipped.txt", "init.txt", "samples"
COLUMNS = 16  # of a grid of samples, at most


@dataclass
class Run:
    """Everything a run holds in memory."""

    recipe: Recipe
    model: bundle.Model  # the EMA and all that is needed to draw
    network: DiT  # the weights being trained
    forward: Network  # the same network, compiled if the recipe says so
    average: Average
    optimizer: torch.optim.Optimizer
    loader: Loader
    task: Task
    inherited: str  # what was kept of training.init, for people
    scorer: Scorer | None  # where the recipe asks for scores

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output)


def set_up(recipe: Recipe, found: Path | None = None) -> Run:
    """Open the data, build the network and all around it. Writes nothing. Raises TesseraError.

    found: the checkpoint that goes on; it stands in for training.init, which may be gone by now.
    """
    config = recipe.training
    device = runtime.choose_device(config.device)
    start = None
    if config.init is not None:
        if found is not None:
            start = initial.as_trained(bundle.load(found))
        else:
            start = sources.load(config.init, "cpu", heads=config.init_heads, read_as=config.init_as)
        recipe = initial.inherit(recipe, start)
    recipe = pixels_like_data(recipe)
    codec = recipe.codec.build().to(device)
    source = recipe.data.open()
    recipe = resolve(recipe, source, codec)
    torch.manual_seed(config.seed)
    network = recipe.network.build()
    inherited = ""
    if start is not None and found is None:
        told = initial.start_from(network, source.class_names, start, str(config.init))
        inherited = "\n".join(f"{what}: {', '.join(keys)}" for what, keys in told.items() if keys)
    network.to(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32 products
    average = Average(network, config.ema)
    described = bundle.BundleConfig(
        network=recipe.network,
        process=recipe.process,
        codec=recipe.codec,
        sampling=recipe.sampling,
        class_names=source.class_names,
        recipe=recipe.model_dump(mode="json"),
    )
    model = bundle.Model(described, average.network, codec)
    scorer = Scorer(recipe.evaluation, model, recipe.data, Path(recipe.output)) if recipe.evaluation.every else None
    return Run(
        scorer=scorer,
        recipe=recipe,
        model=model,
        network=network,
        forward=torch.compile(network) if config.compile else network,
        average=average,
        optimizer=config.optimizer.build(network),
        loader=Loader(source, config.batch, config.seed, config.workers),
        task=Task(
            process=model.process,
            codec=codec,
            flip=recipe.data.flip,
            label_dropout=config.label_dropout,
            classes=recipe.network.classes,
            seed=config.seed,
            dtype=runtime.autocast_dtype(config.precision, device),
        ),
        inherited=inherited,
    )


def train(recipe: Recipe, resume: str = "auto") -> Path:
    """Train as the recipe says and return the run's folder.

    resume: auto goes on from the newest checkpoint in the run's folder, if there is one; never refuses a folder that
    holds a run; a path goes on from that checkpoint. Ctrl-C and SIGTERM save and end; the exception is Interrupted.
    """
    folder = Path(recipe.output)
    run = set_up(recipe, found := checkpoint_to_resume(folder, resume))
    place = Place(step=0, position=0)
    if found is not None:
        check_agreement(run, found)
        place = checkpoint.restore(found, run.network, run.average, run.optimizer)
    with alone(folder):
        _prepare_folder(run)
        if run.scorer is not None:
            run.scorer.begin(place.step)
        journal = Journal(folder, place.step, run.recipe.training.steps, run.recipe.training.tensorboard)
        try:
            _begin(run, found, place, journal)
            _loop(run, place, journal)
        finally:
            journal.close()
    return folder


def _begin(run: Run, found: Path | None, place: Place, journal: Journal) -> None:
    """Say where the run starts from."""
    if found is not None:
        journal.say(f"going on from step {place.step} ({found})")
        for change in _changed(run, found):
            journal.say(f"changed since: {change}")
        for what in checkpoint.begun_anew(found, run.network, run.average, run.optimizer):
            journal.say(f"begins anew: {what}")
    if run.inherited:
        write_whole(run.folder / INIT, run.inherited + "\n")
        journal.say(f"started from {run.recipe.training.init}: see {run.folder / INIT} for what was kept")


class Interrupted(TesseraError):
    """The run was asked to stop, and is saved."""

    exit_code = 130  # as a shell reports Ctrl-C


def _loop(run: Run, place: Place, journal: Journal) -> None:
    config = run.recipe.training
    step, position = place.step, place.position
    if run.scorer is not None and run.scorer.due(step, config.steps) and step not in scores.history(run.folder):
        _score(run, step, journal)  # killed between the checkpoint and its scores
    if step >= config.steps:
        journal.say(f"nothing left to do: {step} of {config.steps} steps are done")
        return
    network = run.forward
    seen_skips = 0
    sums: dict[str, torch.Tensor] = {}
    counted, clock_start = 0, time.monotonic()
    with _stop_signals() as stopping:
        batches = run.loader.batches(position)
        try:
            if step == 0:
                journal.say("drawing the first grid of samples")
                _draw(run, 0, journal)
                journal.start(step)
                clock_start = time.monotonic()
            while step < config.steps:
                batch = next(batches)
                set_learning_rate(run.optimizer, learning_rate(config.optimizer, step, config.steps))
                told = train_step(
                    network, run.optimizer, batch, run.task, config.optimizer, config.micro_batch or config.batch
                )
                step, position = step + 1, position + config.batch
                run.average.update(step)
                for name, value in told.items():
                    sums[name] = sums[name] + value if name in sums else value
                counted += 1
                stop, last = bool(stopping), step == config.steps
                logs = step % config.log_every == 0 or last
                judged = run.scorer is not None and run.scorer.due(step, config.steps) and not stop
                saves = step % config.checkpoint_every == 0 or judged or last or stop
                means = {name: value.item() / counted for name, value in sums.items()} if logs or saves else {}
                if not all(math.isfinite(value) for value in means.values()):
                    raise TesseraError(_diverged(run, step))  # and no checkpoint of it
                if logs:
                    seconds = time.monotonic() - clock_start
                    journal.record(
                        step,
                        **means,
                        learning_rate=run.optimizer.param_groups[0]["lr"],
                        images_per_second=counted * config.batch / seconds,
                        skipped=len(run.loader.skipped),
                        epoch=position / len(run.loader.source),
                    )
                    sums, counted, clock_start = {}, 0, time.monotonic()
                journal.advance(step)
                if len(run.loader.skipped) > seen_skips:
                    seen_skips = _report_skips(run, journal, seen_skips)
                paused = time.monotonic()
                if saves:
                    save(run, Place(step, position))
                if judged:
                    _score(run, step, journal)
                if (step % config.sample_every == 0 and not stop) or last:
                    _draw(run, step, journal)
                clock_start += time.monotonic() - paused
                if stop and not last:
                    raise Interrupted(
                        f"stopped at step {step} of {config.steps}, everything saved in {run.folder}\n"
                        "run the same command again to go on"
                    )
        finally:
            batches.close()
    if run.loader.skipped:
        journal.say(f"{len(run.loader.skipped)} images could not be used: {run.folder / SKIPPED} names them")
    journal.say(f"trained {config.steps} steps; the model is in {run.folder}")


def save(run: Run, place: Place) -> None:
    device = run.model.device
    runtime.synchronise(device)
    config = run.recipe
    origin = {
        "trained by": f"tessera {tessera.__version__}, torch {torch.__version__}, on {device.type}",
        "trained on": f"{len(run.loader.source):,} images ({config.data.where})",
        "steps": place.step,
        "images seen": place.position,
        "batch": config.training.batch,
        "learning rate": config.training.optimizer.learning_rate,
        bundle.DECAY: config.training.ema.decay,
        "started from": config.training.init or "fresh weights",
    }
    model = bundle.Model(run.model.config.model_copy(update={"origin": origin}), run.model.network)
    checkpoint.save(run.folder, place, model, run.network, run.average, run.optimizer)
    _prune(run)


def _prune(run: Run) -> None:
    best = scores.best(scores.history(run.folder)) if run.scorer else None
    checkpoint.prune(run.folder, run.recipe.training.keep_checkpoints, best[0] if best else None)


def _score(run: Run, step: int, journal: Journal) -> None:
    """Score the EMA, write it down, and keep the best checkpoint."""
    assert run.scorer is not None
    journal.say(f"drawing {run.recipe.evaluation.count} pictures to score step {step}")
    try:
        journal.record(step, **run.scorer.score(step, journal.part))
        scored = scores.history(run.folder)
        if best := scores.best(scored):
            at, score = best
            now = scored[step][score.metric].value
            journal.say(f"{score.metric} {now:.5g}; the best so far is {score.value:.5g} at step {at}, and is kept")
        scores.plot(scored, run.folder / scores.FOLDER / "curve.png")
        _prune(run)
    except (TesseraError, OSError, RuntimeError) as error:  # a full disk or card is no reason to end a run of days
        journal.say(f"step {step} could not be scored: {error}")


def _draw(run: Run, step: int, journal: Journal) -> None:
    """A grid of samples from fixed seeds, one column a class."""
    classes = run.recipe.network.classes
    columns = min(classes, COLUMNS) or 8
    rows = run.recipe.training.sample_seeds
    told = [index * classes // columns for index in range(columns)] * rows if classes else None
    seeds = [row for row in range(rows) for _ in range(columns)] if classes else list(range(rows * columns))
    drawn = drawing.generate(run.model, told, seeds)
    sheet = pictures.grid(drawn, columns, zoom=max(1, 32 // drawn.shape[1]))
    pictures.save_png(run.folder / SAMPLES / f"step-{step:09d}.png", sheet)
    journal.picture(step, sheet)


def checkpoint_to_resume(folder: Path, resume: str) -> Path | None:
    present = bundle.checkpoints(folder)
    if resume == "auto":
        return present[0] if present else None
    if resume == "never":
        if present or (folder / RECIPE).exists():
            raise TesseraError(f"{folder} holds a run already: choose another output=, or go on with --resume auto")
        return None
    path = Path(resume)
    inside = [path] if (path / checkpoint.PLACE).exists() else bundle.checkpoints(path)
    if not inside:
        raise TesseraError(f"nothing to resume at {resume}: expected a run's folder or one of its checkpoints")
    if present and checkpoint.place_of(present[0]).step > checkpoint.place_of(inside[0]).step:
        raise TesseraError(f"{folder} holds later checkpoints than {inside[0]}: branch off with another output=")
    return inside[0]


def check_agreement(run: Run, found: Path) -> None:
    """A resumed run keeps network, process, kind of codec and classes: raise TesseraError that says what differs."""
    saved, fresh = bundle.load_config(found), run.model.config
    differing: dict[str, list[str]] = {}
    for name, old, new in (
        ("network", saved.network, fresh.network),
        ("process", _resolved_process(saved), _resolved_process(fresh)),
    ):
        before, now = old.model_dump(), new.model_dump()
        differing[name] = [f"{name}.{key} was {before[key]}, is {now[key]}" for key in now if before[key] != now[key]]
    for name, before, now in (
        ("codec", saved.codec.kind, fresh.codec.kind),
        ("classes", ", ".join(saved.class_names), ", ".join(fresh.class_names)),
    ):
        differing[name] = [f"was {before}, is {now}"] if before != now else []
    for name, faults in differing.items():
        if faults:
            raise TesseraError(
                f"cannot go on from {found} with another {name}: {'; '.join(faults)}\n"
                f"undo the change, start afresh with another output=, or fine-tune with training.init={found}"
            )


def _resolved_process(config: bundle.BundleConfig) -> AnyProcess:
    return config.process.resolved(config.network.channels, config.network.size)


def _changed(run: Run, found: Path) -> list[str]:
    """What the recipe says otherwise than that of the checkpoint: allowed, but not to be overlooked."""
    before, now = bundle.load_config(found).recipe or {}, run.recipe.model_dump(mode="json")
    return [
        f"{name} was {old}, is {new}"
        for name, old, new in changes(before, now)
        if "absent" not in (old, new) and name != "output"
    ]


def _prepare_folder(run: Run) -> None:
    """Make the run's folder, with its recipe and its codec. Raises TesseraError if it cannot be written."""
    folder = run.folder
    for place in (folder, folder / "checkpoints", folder / SAMPLES):  # what a kill left half-written
        remove_partials(place)
    write_whole(folder / RECIPE, write_yaml(run.recipe))
    codec = run.recipe.codec
    if isinstance(codec, AutoencoderConfig) and Path(codec.source).is_dir() and not (folder / bundle.CODEC).exists():
        with whole_folder(folder / bundle.CODEC) as partial:
            bundle.copy_codec(codec, partial)


def _report_skips(run: Run, journal: Journal, before: int) -> int:
    skipped = dict(run.loader.skipped)
    lines = [f"{name}\t{reason}" for name, reason in skipped.items()]
    path = run.folder / SKIPPED
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    write_whole(path, "\n".join(dict.fromkeys(old + lines)) + "\n")
    if before == 0:
        name, reason = next(iter(skipped.items()))
        journal.say(f"skipping images that cannot be used, for example {name} ({reason}); all are named in {path}")
    return len(skipped)


def _diverged(run: Run, step: int) -> str:
    saved = bundle.checkpoints(run.folder)
    back = f"; the last checkpoint is {saved[0]}" if saved else ""
    return (
        f"the loss is not a number at step {step}: training diverged{back}\n"
        "lower training.optimizer.learning_rate, set training.optimizer.clip=1, or lengthen training.optimizer.warmup"
    )


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C or SIGTERM arrives; a second Ctrl-C is not held back."""
    received: list[int] = []

    def remember(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are its business
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
