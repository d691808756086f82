"""A run in memory: opened, built, placed on its devices and processes; and what it may go on from."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from tessera import bundle, runtime
from tessera.acceleration import compilation
from tessera.acceleration.activation_checkpointing import checkpoint_activations
from tessera.codecs import Codec, StoredConfig
from tessera.conditioning import Condition, NetworkFunction
from tessera.data import Loader
from tessera.data.buckets import Buckets
from tessera.data.files import FilesConfig, FilesDataset
from tessera.data.images import Dataset
from tessera.data.latents import LatentsDataset, open_cache
from tessera.diffusion import AnyDiffusionConfig
from tessera.errors import TesseraError
from tessera.files import atomic_folder, atomic_write, remove_partials
from tessera.interop import load
from tessera.models.network import Network
from tessera.runtime import Distributed
from tessera.settings import differences, write_yaml
from tessera.training import initialization, parallel
from tessera.training.checkpoint import checkpoint
from tessera.training.ema import EMA
from tessera.training.objective import TrainingObjective
from tessera.training.parallel import ParallelContext
from tessera.training.recipe import Recipe, pixels_like_data, resolve_recipe
from tessera.training.scores import Scorer
from tessera.training.step import TrainState

RECIPE, SKIPPED, INIT, SAMPLES = "recipe.yaml", "skipped.txt", "init.txt", "samples"


@dataclass
class TrainingRun:
    """Everything a run holds in memory."""

    recipe: Recipe
    ema_model: bundle.Model  # the EMA and all that is needed to draw; of several processes, each may hold a part
    state: TrainState
    ema: EMA
    loader: Loader
    accumulation_steps: int  # of accumulation in a step
    objective: TrainingObjective
    compile_mode: compilation.CompileMode
    init_report: str  # what was kept of training.init_from, for people
    scorer: Scorer | None  # where the recipe asks for scores

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.run_dir)

    @property
    def parallel(self) -> ParallelContext:
        return self.state.parallel

    @property
    def network(self) -> Network:
        """The weights being trained."""
        return self.state.network

    @property
    def macs(self) -> float:
        """Multiply-adds of a forward pass of one sample; of samples of many sizes, in the mean."""
        if self.loader.buckets is None:
            return self.network.macs()
        factor, of = self.ema_model.codec.factor, self.loader.buckets.bucket_ids
        each = [self.network.macs((height // factor, width // factor)) for height, width in self.loader.buckets.sizes]
        return float(np.asarray(each, dtype=np.float64)[of].mean())

    def full_ema_model(self) -> bundle.Model:
        """What draws, in one piece; every process must ask."""
        self.ema.synchronize()
        return replace(self.ema_model, network=parallel.full_network(self.ema.network))


def build_run(
    recipe: Recipe,
    found: Path | None = None,
    ranks: Distributed = Distributed(),  # noqa: B008 (frozen)
    say: Callable[[str], None] = lambda text: None,
) -> TrainingRun:
    """Open the data, build the network and all around it. Writes nothing. Raises TesseraError.

    found: the checkpoint that goes on; it stands in for training.init_from, which may be gone by now.
    """
    config = recipe.training
    device = runtime.choose_device(config.device)
    start = None
    if config.init_from is not None:
        if found is not None:
            start = initialization.as_trained(bundle.load(found))
        else:
            start = load.load(config.init_from, "cpu", heads=config.init_num_heads, read_as=config.init_type)
        recipe = initialization.inherit_settings(recipe, start)
    recipe = pixels_like_data(recipe)
    dtype = runtime.autocast_dtype(config.precision, device)
    if device.type == "cuda":
        runtime.peak_flops(device, dtype or torch.float32)  # now, while there is memory to spare
    codec = recipe.codec.build().to(device)
    source = open_data(recipe, codec)
    recipe = resolve_recipe(recipe, source.class_names, codec)
    if (
        source.class_names
        and isinstance(source, FilesDataset)
        and source.labels.min() < 0
        and not recipe.network.learn_null_class
    ):
        raise TesseraError(
            f"{(source.labels < 0).sum()} samples have no class, which only network.learn_null_class=true can express: "
            "set that, or give them one"
        )
    buckets = sort_into_buckets(recipe, source)
    share = -(-config.global_batch_size // ranks.world_size)  # of the process that has most
    rounds = -(-share // min(config.micro_batch_size or share, share))
    part = parallel.local_batch(config.global_batch_size, rounds, ranks)
    torch.manual_seed(config.seed)
    network = recipe.network.build()
    inherited = ""
    if start is not None and found is None:
        told = initialization.start_from(network, source.class_names, start, str(config.init_from))
        inherited = "\n".join(f"{what}: {', '.join(keys)}" for what, keys in told.items() if keys)
    network.to(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32 products
    average = EMA(network, config.ema)
    described = bundle.BundleConfig(
        network=recipe.network,
        diffusion=recipe.diffusion,
        codec=recipe.codec,
        sampling=recipe.sampling,
        class_names=source.class_names,
        recipe=recipe.model_dump(mode="json"),
    )
    model = bundle.Model(described, average.network, codec)
    task = TrainingObjective(
        diffusion=model.diffusion,
        codec=codec,
        hflip=recipe.data.hflip,
        label_dropout=config.label_dropout,
        num_classes=recipe.network.num_classes,
        seed=config.seed,
        dtype=dtype,
    )
    scorer = Scorer(recipe.evaluation, model, recipe.data, Path(recipe.run_dir)) if recipe.evaluation.scores else None
    team = ParallelContext(
        ranks, config.fsdp, device.type
    )  # processes meet: what a recipe has wrong each has told before
    checkpoint_activations(network, config.activation_checkpointing)
    forward, compiled = _compiled(recipe, network, task, share // rounds, found, ranks, say)
    team.distribute(network)
    average.distribute(network, team)
    optimizer = config.optimizer.build(network)
    optimizer.register_step_pre_hook(lambda *_: average.synchronize())
    return TrainingRun(
        scorer=scorer,
        recipe=recipe,
        ema_model=model,
        state=TrainState(network, forward, optimizer, config.optimizer, team),
        ema=average,
        loader=Loader(
            source,
            config.global_batch_size,
            config.seed,
            config.num_workers,
            part,
            device.type == "cuda",
            buckets,
            recipe.data.hflip,
        ),
        accumulation_steps=rounds,
        objective=task,
        compile_mode=compiled,
        init_report=inherited,
    )


def open_data(recipe: Recipe, codec: Codec) -> Dataset | LatentsDataset:
    """The data of a recipe, or the latents that were cached of them. Raises TesseraError."""
    data = recipe.data
    cache = data.cache if isinstance(data, FilesConfig) else None
    return data.open() if cache is None else open_cache(Path(cache), data, codec, data.open())


def sort_into_buckets(recipe: Recipe, source: Dataset | LatentsDataset) -> Buckets | None:
    """The sizes that batches have, where the recipe asks for several; those with less than a batch are not used."""
    data = recipe.data
    if not isinstance(data, FilesConfig) or data.buckets is None:
        return None
    if isinstance(source, LatentsDataset):
        return source.buckets
    assert isinstance(source, FilesDataset)
    return Buckets.assign(source.shapes(), data.buckets.sizes(data.size), min_samples=recipe.training.global_batch_size)


def _compiled(
    recipe: Recipe,
    network: Network,
    task: TrainingObjective,
    rows: int,
    found: Path | None,
    ranks: Distributed,
    say: Callable[[str], None],
) -> tuple[NetworkFunction, compilation.CompileMode]:
    """What is called in place of the network, and which way that is.

    auto stays with what the checkpoint found: ways differ in the last bit.
    """
    how = recipe.training.compile
    if how == "auto" and found is not None:
        before = (bundle.load_config(found).recipe or {}).get("training", {}).get("compile")
        how = checkpoint.read_state(found).compile_mode if before == "auto" else how
    if ranks.world_size > 1 and how == "whole":
        how = "blocks"  # gathering and reducing go on between the blocks
    if how == "auto":
        say("measuring what compiling gains; this takes a minute or two")
        trial = compilation.fastest(network, _passes(recipe, task, rows), lambda: runtime.synchronize(_device(network)))
        say(str(trial))
        how = ranks.broadcast(trial.best)
        if ranks.world_size > 1 and how == "whole":
            how = "blocks"
    many = isinstance(recipe.data, FilesConfig) and recipe.data.buckets is not None
    forward, reason = compilation.compiled(network, how, "changing" if many else "fixed")
    if reason is not None:
        say(f"training.compile={recipe.training.compile}, but this machine cannot compile: {reason}")
        how = "off"
    return forward, how


def _device(network: Network) -> torch.device:
    return next(network.parameters()).device


def _passes(recipe: Recipe, task: TrainingObjective, rows: int) -> Callable[[NetworkFunction], None]:
    """A forward and a backward pass of as many samples as a step has at once, which leaves no gradient behind."""

    def run(forward: NetworkFunction) -> None:
        config = recipe.network
        device = torch.device(runtime.choose_device(recipe.training.device))
        x = torch.randn(rows, config.in_channels, *config.input_size, device=device)
        t = torch.rand(rows, device=device)
        condition = Condition(torch.zeros(rows, dtype=torch.int64, device=device) if config.num_classes else None)
        with runtime.autocast(task.dtype, device):
            raw = forward(x, t, condition)
        raw.float().square().mean().backward()

    return run


# What a run may go on from


def checkpoint_to_resume(
    folder: Path,
    resume: str,
    ranks: Distributed = Distributed(),  # noqa: B008 (frozen)
    set_aside: Callable[[Path, list[str]], None] = lambda checkpoint, faults: None,
) -> Path | None:
    """The checkpoint that --resume means, whole; None if the run begins. Raises TesseraError.

    set_aside: told of each damaged checkpoint that is passed by.
    """
    present = bundle.checkpoints(folder)
    if resume == "auto":
        found, damaged = checkpoint.latest_valid(folder, ranks)
        for path, faults in damaged.items():
            set_aside(path, faults)
        # At step 0 nothing is lost, and what the recipe says may be changed.
        return None if found is None or checkpoint.read_state(found).step == 0 else found
    if resume == "never":
        if present or (folder / RECIPE).exists():
            raise TesseraError(f"{folder} holds a run already: choose another output=, or go on with --resume auto")
        return None
    path = Path(resume)
    inside = [path] if (path / checkpoint.PLACE).exists() else bundle.checkpoints(path)
    if not inside:
        raise TesseraError(f"nothing to resume at {resume}: expected a run's folder or one of its checkpoints")
    if present and checkpoint.read_state(present[0]).step > checkpoint.read_state(inside[0]).step:
        raise TesseraError(f"{folder} holds later checkpoints than {inside[0]}: branch off with another output=")
    if found := checkpoint.verify(inside[0], ranks):
        raise TesseraError(f"{inside[0]} is damaged ({'; '.join(found[:3])}): choose another checkpoint")
    return inside[0]


def check_agreement(run: TrainingRun, found: Path) -> None:
    """A resumed run keeps network, process, kind of codec and classes: raise TesseraError that says what differs."""
    saved, fresh = bundle.load_config(found), run.ema_model.config
    differing: dict[str, list[str]] = {}
    for name, old, new in (
        ("network", saved.network, fresh.network),
        ("diffusion", _resolved_process(saved), _resolved_process(fresh)),
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
                f"undo the change, start afresh with another output=, or fine-tune with training.init_from={found}"
            )


def _resolved_process(config: bundle.BundleConfig) -> AnyDiffusionConfig:
    return config.diffusion.resolved(config.network.in_channels, config.network.input_size)


def changed(run: TrainingRun, found: Path) -> list[str]:
    """What the recipe says otherwise than that of the checkpoint: allowed, but not to be overlooked."""
    before, now = bundle.load_config(found).recipe or {}, run.recipe.model_dump(mode="json")
    return [
        f"{name} was {old}, is {new}"
        for name, old, new in differences(before, now)
        if "absent" not in (old, new) and name != "run_dir"
    ]


def prepare_folder(run: TrainingRun) -> None:
    """Make the run's folder, with its recipe and its codec. Raises TesseraError if it cannot be written."""
    folder = run.run_dir
    for place in (folder, folder / "checkpoints", folder / SAMPLES):  # what a kill left half-written
        remove_partials(place)
    atomic_write(folder / RECIPE, write_yaml(run.recipe))
    codec = run.recipe.codec
    if isinstance(codec, StoredConfig) and codec.folder is not None and not (folder / bundle.CODEC).exists():
        with atomic_folder(folder / bundle.CODEC) as partial:
            bundle.copy_codec(codec, partial)
