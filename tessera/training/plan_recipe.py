"""A recipe as work that can be planned: its step of training and its drawing, traced on tensors without contents.

The step is the trainer's own, so that whatever a run does is counted.
"""

import copy
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera import sampling
from tessera.acceleration import activation_checkpointing
from tessera.acceleration.activation_checkpointing import CheckpointingMode
from tessera.codecs import Codec, PixelsConfig, StoredConfig
from tessera.conditioning import Condition
from tessera.data import Batch
from tessera.data.files import FilesConfig
from tessera.errors import TesseraError
from tessera.evaluation import suite
from tessera.models.network import NetworkConfig
from tessera.models.presets import PRESETS, UNETS
from tessera.planning import hardware as machines
from tessera.planning.plan import Plan, SamplingWork, Workload, plan
from tessera.planning.trace import Recorder, Sizes, Step, Trace, fake, outline
from tessera.runtime import autocast
from tessera.sampling.denoiser import Denoiser
from tessera.sampling.timesteps import timestep_grid
from tessera.settings import override, validate
from tessera.training import loop
from tessera.training.ema import EMA
from tessera.training.objective import TrainingObjective
from tessera.training.parallel import ParallelContext
from tessera.training.recipe import Recipe, pixels_like_data, read_recipe, resolve_recipe
from tessera.training.run import open_data
from tessera.training.step import TrainState, train_step

# Multiply-adds of a look at one picture, by features: Inception sees 299 x 299 pixels (5.7 billion); the embedded data
# have networks of their own. Others count as Inception.
JUDGES = {"inception": 5.7e9, "digits": 2e6, "shapes": 3e7}
PAPER = {  # what a preset is planned as
    "run_dir": "runs/plan",
    "data": {"kind": "folder", "path": "imagenet/train", "size": 256, "hflip": True},
    "codec": {"kind": "autoencoder-kl", "source": "stabilityai/sd-vae-ft-ema"},
    "sampling": {"sampler": "ancestral", "num_steps": 250},
    "training": {"sample_every": 10_000, "checkpoint_every": 10_000},
}


def plan_of(
    recipe: Recipe, hardware: machines.Hardware | str | None = None, *, alternatives: bool = False, **how: Any
) -> Plan:
    """What a recipe takes on hardware, as `tessera plan` names it (None: this machine). how: as `plan` takes it.

    Raises TesseraError for recipes that cannot be.
    """
    found = hardware if isinstance(hardware, machines.Hardware) else machines.find(hardware)
    return plan(workload(recipe), found, alternatives=alternatives, **how)


def preset(name: str, overrides: list[str]) -> Recipe:
    """A preset trained as in the paper, latents of 256 x 256 pixels; with overrides as a recipe takes them.

    Raises TesseraError.
    """
    data = override({**PAPER, "network": {"preset": name}}, overrides)
    return validate(Recipe, data, f"{name} with these settings")


def is_preset(target: str) -> bool:
    """Whether it is the name of a network, not a recipe's path."""
    return target in PRESETS or target in UNETS


def resolve_target(target: str, overrides: list[str]) -> Recipe:
    """The recipe at a path, or the name of a preset. Raises TesseraError."""
    if is_preset(target):
        return preset(target, overrides)
    if not target.endswith((".yaml", ".yml")) and not Path(target).exists():
        raise TesseraError(
            f"{target} is neither a recipe nor a preset: give the path of a .yaml file, or one of "
            f"{', '.join((*PRESETS, *UNETS))}"
        )
    return read_recipe(Path(target), overrides)


# The work


def workload(recipe: Recipe, name: str | None = None) -> Workload:
    """All that a plan needs to know of a recipe. Data, codec and what training starts from are opened where they can
    be, and assumed where they cannot, which `notes` say. Raises TesseraError for recipes that cannot be.
    """
    recipe, codec, images, notes = _resolved(recipe)
    config, network, evaluation = recipe.training, recipe.network, recipe.evaluation
    process = recipe.diffusion.resolved(network.in_channels, network.input_size).build()
    grids = {0, config.steps, *range(config.sample_every, config.steps + 1, config.sample_every)}
    each_grid = (min(network.num_classes, loop.COLUMNS) or 8) * config.sample_seeds
    often = () if evaluation.every is None else range(evaluation.every, config.steps + 1, evaluation.every)
    scored = [step for step in {*often, *evaluation.at, config.steps} if evaluation.due(step, config.steps)]
    drawn = evaluation.num_samples * len(scored)
    judge = evaluation.features or suite.usual_features(evaluation.reference or recipe.data)
    looked_at = drawn + (min(images or drawn, 50_000) if scored else 0)
    encodes = codec is not None and not isinstance(recipe.codec, PixelsConfig)
    cached = isinstance(recipe.data, FilesConfig) and recipe.data.cache is not None
    kept = config.keep_last + bool(scored) + 1  # the best, and the one being written
    if config.keep_every_n_steps is not None:
        kept += config.steps // config.keep_every_n_steps
    height, width = recipe.data.size
    moments = 2 * network.in_channels if codec is None or codec.stochastic else network.in_channels
    mirrored = 2 if recipe.data.hflip else 1
    return Workload(
        name=name or (f"{network.summary()}, {recipe.data.where}"),
        network=network,
        steps=config.steps,
        batch=config.global_batch_size,
        micro_batch=config.micro_batch_size,
        precision=config.precision,
        recompute=config.activation_checkpointing,
        shard=config.fsdp,
        compiled="blocks" if config.compile == "auto" else config.compile,
        step=partial(traced_step, recipe),
        call=traced_call,
        encode=partial(_encoded, codec, recipe.data.size) if codec is not None and encodes and not cached else None,
        decode=partial(_decoded, codec, network) if codec is not None and encodes else None,
        drawing=SamplingWork(
            grids=len(grids) * each_grid,
            scored=drawn,
            looked_at=looked_at,
            calls=calls(recipe, process),
            batch=evaluation.batch_size if scored else each_grid,
            judge=JUDGES.get(judge, JUDGES["inception"]),
            evaluations=len(scored),
        ),
        checkpoints=kept,
        images=images,
        image_bytes=recipe.data.channels * height * width,
        latent_bytes=0
        if isinstance(recipe.codec, PixelsConfig)
        else 2 * moments * network.input_size[0] * network.input_size[1] * mirrored,
        notes=tuple(notes),
    )


def _resolved(recipe: Recipe) -> tuple[Recipe, Codec | None, int | None, list[str]]:
    """The recipe with all sizes, its codec, the number of images, and what had to be assumed."""
    recipe = pixels_like_data(recipe)
    notes: list[str] = []
    codec = source = None
    stored = recipe.codec if isinstance(recipe.codec, StoredConfig) else None
    if stored is None or stored.folder is not None:  # a plan downloads nothing
        codec = recipe.codec.build()
    else:
        notes.append(
            f"{stored.source} is not on this machine: assumed is a codec of a factor of 8, and encoding and decoding "
            "are left out"
        )
    if codec is not None:
        try:
            source = open_data(recipe, codec)
        except TesseraError as error:
            notes.append(f"the data could not be opened ({str(error).splitlines()[0]}): classes as network says")
    if recipe.training.init_from is not None:
        notes.append("training.init_from is left out: the network is the recipe's own")
    names = source.class_names if source is not None else ("",) * recipe.network.num_classes
    if codec is not None:
        recipe = resolve_recipe(recipe, names, codec)
    else:  # the network as it is said, or of latents an eighth of the pictures' size
        network = recipe.network
        facts: dict[str, Any] = {
            "out_channels": recipe.diffusion.resolved(network.in_channels, network.input_size)
            .build()
            .out_channels(network.in_channels)
        }
        if "input_size" not in network.model_fields_set:
            facts["input_size"] = tuple(side // 8 for side in recipe.data.size)
        known = {key: value for key, value in facts.items() if key not in network.model_fields_set}
        recipe = recipe.model_copy(update={"network": validate(type(network), network.model_dump() | known, "network")})
    return recipe, codec, None if source is None else len(source), notes


def calls(recipe: Recipe, process: Any) -> int:
    """Of the network, one picture each, for one picture that is drawn; found by drawing with a network that says
    nothing."""
    config, network = recipe.sampling, recipe.network
    x = torch.zeros(1, network.in_channels, 1, 1)
    rows = 0

    def blank(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        nonlocal rows
        rows += len(x)
        return x.new_zeros(len(x), network.out_channels, *x.shape[2:])

    told = Condition(torch.zeros(1, dtype=torch.int64) if network.num_classes else None)
    denoise = Denoiser(
        blank,
        process,
        told,
        config.guidance_scale,
        interval=config.guidance_interval,
        schedule=config.guidance_schedule,
    )
    visited = timestep_grid(config.timestep_spacing, config.num_steps, process)
    for _ in sampling.sample_loop(config.sampler, denoise, x, visited, lambda: torch.zeros_like(x)):
        pass
    return rows


# Traces


class Latents:
    """A codec that hands on what it is given: an encoder is traced by itself."""

    stochastic = False

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        return pixels


def traced_step(
    recipe: Recipe,
    network: NetworkConfig,
    rows: int,
    rounds: int,
    dtype: torch.dtype | None,
    recompute: CheckpointingMode,
) -> Step:
    """One step of a resolved recipe, of another network perhaps: so many rounds of so many rows.

    Not the first of a run, in which the optimizer makes its memory. The codec's part is left out.
    """
    config, count = recipe.training, rows * rounds
    if network.num_classes:  # whether a label is withheld is asked of the labels' contents where there is no such class
        network = network.model_copy(update={"learn_null_class": True})
    process = recipe.diffusion.resolved(network.in_channels, network.input_size).build()
    built = copy.deepcopy(outline(network))
    average = EMA(built, config.ema)
    with fake():
        for one in (built, *average.networks.values()):
            one.to_empty(device="cpu")
        average.distribute(built, ParallelContext())
        activation_checkpointing.checkpoint_activations(built, recompute)
        optimizer = config.optimizer.build(built)
        laps: list[Trace] = []
        recorder = Recorder()

        def forward(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            raw = built(x, t, condition)
            if not laps:
                laps.append(recorder.lap())
            return raw

        def end_of_backward(*_: object) -> None:
            laps.append(recorder.lap())

        for parameter in built.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        optimizer.step()  # makes its memory
        optimizer.zero_grad(set_to_none=True)
        optimizer.register_step_pre_hook(end_of_backward)
        task = TrainingObjective(
            diffusion=process,
            codec=Latents(),  # pyright: ignore[reportArgumentType]
            hflip=recipe.data.hflip,
            label_dropout=config.label_dropout,
            num_classes=network.num_classes,
            seed=config.seed,
            dtype=dtype,
        )
        learner = TrainState(built, forward, optimizer, config.optimizer, ParallelContext())
        with recorder:
            batch = Batch(
                torch.empty(count, network.in_channels, *network.input_size, dtype=torch.uint8),
                torch.empty(count, dtype=torch.int64),
                torch.empty(count, dtype=torch.int64),
            )
            train_step(learner, batch, task, count, rounds, torch.empty(2))
            average.update(1)
            laps.append(recorder.lap())
        sizes = Sizes(
            weights=_bytes(built.parameters()),
            averages=sum(_bytes(one.parameters()) for one in average.networks.values()),
            moments=sum(_bytes(told.values()) for told in optimizer.state.values()),
            gradients=_bytes(one for one in built.parameters() if one.requires_grad),
            kept=laps[0].kept,
            peak=max(lap.peak for lap in laps),
        )
        forwards, backwards, update = laps
        return Step(forwards, backwards, update, sizes)


def traced_call(network: NetworkConfig, rows: int) -> Trace:
    """One call of a network as in drawing."""
    built = copy.deepcopy(outline(network))
    with fake(), torch.no_grad(), Recorder() as recorder:
        built.to_empty(device="cpu")
        recorder.lap()
        label = torch.empty(rows, dtype=torch.int64) if network.num_classes else None
        x = torch.empty(rows, network.in_channels, *network.input_size)
        with autocast(None, x.device):
            built(x, torch.empty(rows), Condition(label))
        return recorder.lap()


def _encoded(codec: Codec, size: tuple[int, int], rows: int) -> Trace:
    with fake(), torch.no_grad(), Recorder() as recorder:
        codec.moments(torch.empty(rows, codec.pixel_channels, *size))
        return recorder.lap()


def _decoded(codec: Codec, network: NetworkConfig, rows: int) -> Trace:
    with fake(), torch.no_grad(), Recorder() as recorder:
        codec.decode(torch.empty(rows, codec.latent_channels, *network.input_size))
        return recorder.lap()


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
