"""A run in memory: opened, built, placed on its devices and processes; and what it may go on from."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from tessera import bundle, runtime
from tessera.acceleration import compilation
from tessera.acceleration.activation_checkpointing import recompute
from tessera.codecs import Codec, StoredConfig
from tessera.conditioning import Condition
from tessera.data import Loader
from tessera.data.buckets import Buckets
from tessera.data.files import FilesConfig, FilesSource
from tessera.data.images import Source
from tessera.data.latents import LatentsSource, open_cache
from tessera.diffusion import AnyProcess
from tessera.errors import TesseraError
from tessera.files import remove_partials, whole_folder, write_whole
from tessera.interop import load
from tessera.models.network import Network
from tessera.runtime import Ranks
from tessera.sampling.denoiser import Forward
from tessera.settings import changes, write_yaml
from tessera.training import initialization, parallel
from tessera.training.checkpoint import checkpoint
from tessera.training.ema import Average
from tessera.training.objective import Task
from tessera.training.parallel import Team
from tessera.training.recipe import Recipe, pixels_like_data, resolve
from tessera.training.scores import Scorer
from tessera.training.step import Learner

RECIPE, SKIPPED, INIT, SAMPLES = "recipe.yaml", "skipped.txt", "init.txt", "samples"


@dataclass
class Run:
    """Everything a run holds in memory."""

    recipe: Recipe
    model: bundle.Model  # the EMA and all that is needed to draw; of several processes, each may hold a part
    learner: Learner
    average: Average
    loader: Loader
    rounds: int  # of accumulation in a step
    task: Task
    compiled: compilation.How
    inherited: str  # what was kept of training.init, for people
    scorer: Scorer | None  # where the recipe asks for scores

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output)

    @property
    def team(self) -> Team:
        return self.learner.team

    @property
    def network(self) -> Network:
        """The weights being trained."""
        return self.learner.network

    @property
    def macs(self) -> float:
        """Multiply-adds of a forward pass of one sample; of samples of many sizes, in the mean."""
        if self.loader.buckets is None:
            return self.network.macs()
        factor, of = self.model.codec.factor, self.loader.buckets.of
        each = [self.network.macs((height // factor, width // factor)) for height, width in self.loader.buckets.sizes]
        return float(np.asarray(each, dtype=np.float64)[of].mean())

    def whole_model(self) -> bundle.Model:
        """What draws, in one piece; every process must ask."""
        self.average.settle()
        return replace(self.model, network=parallel.whole(self.average.network))


def set_up(
    recipe: Recipe,
    found: Path | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
    say: Callable[[str], None] = lambda text: None,
) -> Run:
    """Open the data, build the network and all around it. Writes nothing. Raises TesseraError.

    found: the checkpoint that goes on; it stands in for training.init, which may be gone by now.
    """
    config = recipe.training
    device = runtime.choose_device(config.device)
    start = None
    if config.init is not None:
        if found is not None:
            start = initialization.as_trained(bundle.load(found))
        else:
            start = load.load(config.init, "cpu", heads=config.init_heads, read_as=config.init_as)
        recipe = initialization.inherit(recipe, start)
    recipe = pixels_like_data(recipe)
    dtype = runtime.autocast_dtype(config.precision, device)
    if device.type == "cuda":
        runtime.peak_flops(device, dtype or torch.float32)  # now, while there is memory to spare
    codec = recipe.codec.build().to(device)
    source = open_data(recipe, codec)
    recipe = resolve(recipe, source.class_names, codec)
    if (
        source.class_names
        and isinstance(source, FilesSource)
        and source.labels.min() < 0
        and not recipe.network.null_class
    ):
        raise TesseraError(
            f"{(source.labels < 0).sum()} samples have no class, which only network.null_class=true can express: "
            "set that, or give them one"
        )
    buckets = sort_into_buckets(recipe, source)
    share = -(-config.batch // ranks.count)  # of the process that has most
    rounds = -(-share // min(config.micro_batch or share, share))
    part = parallel.part(config.batch, rounds, ranks)
    torch.manual_seed(config.seed)
    network = recipe.network.build()
    inherited = ""
    if start is not None and found is None:
        told = initialization.start_from(network, source.class_names, start, str(config.init))
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
    task = Task(
        process=model.process,
        codec=codec,
        flip=recipe.data.flip,
        label_dropout=config.label_dropout,
        classes=recipe.network.classes,
        seed=config.seed,
        dtype=dtype,
    )
    scorer = Scorer(recipe.evaluation, model, recipe.data, Path(recipe.output)) if recipe.evaluation.scores else None
    team = Team(ranks, config.shard, device.type)  # processes meet: what a recipe has wrong each has told before
    recompute(network, config.recompute)
    forward, compiled = _compiled(recipe, network, task, share // rounds, found, ranks, say)
    team.distribute(network)
    average.distribute(network, team)
    optimizer = config.optimizer.build(network)
    optimizer.register_step_pre_hook(lambda *_: average.settle())
    return Run(
        scorer=scorer,
        recipe=recipe,
        model=model,
        learner=Learner(network, forward, optimizer, config.optimizer, team),
        average=average,
        loader=Loader(
            source, config.batch, config.seed, config.workers, part, device.type == "cuda", buckets, recipe.data.flip
        ),
        rounds=rounds,
        task=task,
        compiled=compiled,
        inherited=inherited,
    )


def open_data(recipe: Recipe, codec: Codec) -> Source | LatentsSource:
    """The data of a recipe, or the latents that were cached of them. Raises TesseraError."""
    data = recipe.data
    cache = data.cache if isinstance(data, FilesConfig) else None
    return data.open() if cache is None else open_cache(Path(cache), data, codec, data.open())


def sort_into_buckets(recipe: Recipe, source: Source | LatentsSource) -> Buckets | None:
    """The sizes that batches have, where the recipe asks for several; those with less than a batch are not used."""
    data = recipe.data
    if not isinstance(data, FilesConfig) or data.buckets is None:
        return None
    if isinstance(source, LatentsSource):
        return source.buckets
    assert isinstance(source, FilesSource)
    return Buckets.sort(source.shapes(), data.buckets.sizes(data.size), fewest=recipe.training.batch)


def _compiled(
    recipe: Recipe,
    network: Network,
    task: Task,
    rows: int,
    found: Path | None,
    ranks: Ranks,
    say: Callable[[str], None],
) -> tuple[Forward, compilation.How]:
    """What is called in place of the network, and which way that is.

    auto stays with what the checkpoint found: ways differ in the last bit.
    """
    how = recipe.training.compile
    if how == "auto" and found is not None:
        before = (bundle.load_config(found).recipe or {}).get("training", {}).get("compile")
        how = checkpoint.place_of(found).compiled if before == "auto" else how
    if ranks.count > 1 and how == "whole":
        how = "blocks"  # gathering and reducing go on between the blocks
    if how == "auto":
        say("measuring what compiling gains; this takes a minute or two")
        trial = compilation.fastest(network, _passes(recipe, task, rows), lambda: runtime.synchronise(_device(network)))
        say(str(trial))
        how = ranks.agreed(trial.best)
        if ranks.count > 1 and how == "whole":
            how = "blocks"
    many = isinstance(recipe.data, FilesConfig) and recipe.data.buckets is not None
    forward, reason = compilation.compiled(network, how, "changing" if many else "fixed")
    if reason is not None:
        say(f"training.compile={recipe.training.compile}, but this machine cannot compile: {reason}")
        how = "off"
    return forward, how


def _device(network: Network) -> torch.device:
    return next(network.parameters()).device


def _passes(recipe: Recipe, task: Task, rows: int) -> Callable[[Forward], None]:
    """A forward and a backward pass of as many samples as a step has at once, which leaves no gradient behind."""

    def run(forward: Forward) -> None:
        config = recipe.network
        device = torch.device(runtime.choose_device(recipe.training.device))
        x = torch.randn(rows, config.channels, *config.size, device=device)
        t = torch.rand(rows, device=device)
        condition = Condition(torch.zeros(rows, dtype=torch.int64, device=device) if config.classes else None)
        with runtime.autocast(task.dtype, device):
            raw = forward(x, t, condition)
        raw.float().square().mean().backward()

    return run


# What a run may go on from


def checkpoint_to_resume(
    folder: Path,
    resume: str,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
    set_aside: Callable[[Path, list[str]], None] = lambda checkpoint, faults: None,
) -> Path | None:
    """The checkpoint that --resume means, whole; None if the run begins. Raises TesseraError.

    set_aside: told of each damaged checkpoint that is passed by.
    """
    present = bundle.checkpoints(folder)
    if resume == "auto":
        found, damaged = checkpoint.newest_whole(folder, ranks)
        for path, faults in damaged.items():
            set_aside(path, faults)
        # At step 0 nothing is lost, and what the recipe says may be changed.
        return None if found is None or checkpoint.place_of(found).step == 0 else found
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
    if found := checkpoint.faults(inside[0], ranks):
        raise TesseraError(f"{inside[0]} is damaged ({'; '.join(found[:3])}): choose another checkpoint")
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


def changed(run: Run, found: Path) -> list[str]:
    """What the recipe says otherwise than that of the checkpoint: allowed, but not to be overlooked."""
    before, now = bundle.load_config(found).recipe or {}, run.recipe.model_dump(mode="json")
    return [
        f"{name} was {old}, is {new}"
        for name, old, new in changes(before, now)
        if "absent" not in (old, new) and name != "output"
    ]


def prepare_folder(run: Run) -> None:
    """Make the run's folder, with its recipe and its codec. Raises TesseraError if it cannot be written."""
    folder = run.folder
    for place in (folder, folder / "checkpoints", folder / SAMPLES):  # what a kill left half-written
        remove_partials(place)
    write_whole(folder / RECIPE, write_yaml(run.recipe))
    codec = run.recipe.codec
    if isinstance(codec, StoredConfig) and codec.folder is not None and not (folder / bundle.CODEC).exists():
        with whole_folder(folder / bundle.CODEC) as partial:
            bundle.copy_codec(codec, partial)
