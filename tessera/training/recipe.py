"""The recipe of a run: one YAML file that validates into these types."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from tessera.acceleration.activation_checkpointing import CheckpointingMode
from tessera.acceleration.first_block_cache import check_caching
from tessera.adapters import AnyAdapter, ControlConfig
from tessera.codecs import AnyCodec, Codec, PixelsConfig
from tessera.data import AnyData
from tessera.data.captions import Captions, TextSizes
from tessera.data.files import FilesConfig
from tessera.data.images import sample_size
from tessera.data.resolve import check_classes
from tessera.diffusion import AnyDiffusionConfig, GaussianDiffusionConfig
from tessera.encoders.text import AnyTextEncoder, WordsConfig
from tessera.errors import TesseraError
from tessera.models import AnyNetwork, PixArtConfig, with_kind
from tessera.models.dit import DiT, DiTConfig
from tessera.models.network import Network, NetworkConfig
from tessera.models.routing import TokenRoutingConfig, saved_macs
from tessera.monitoring.spikes import StabilityConfig
from tessera.power_ema import MAX_LENGTH, new_weight
from tessera.runtime import DeviceName, Precision
from tessera.sampling import SamplingConfig, Together, check_schedule, check_step_size
from tessera.sampling.timesteps import timestep_grid
from tessera.settings import Settings, apply_overrides, as_tuple, expand_kind, read_yaml, validate
from tessera.training.alignment import AnyAlignment, added_macs, alignment_problem, feature_channels
from tessera.training.distillation import DistillationConfig
from tessera.training.frame_times import AnyFrameTimes, SharedTimes
from tessera.training.optimizers import AdamWConfig, AnyOptimizer, Fraction
from tessera.training.scores import EvaluationConfig
from tessera.training.token_times import AnyTokenTimes, SharedTokenTimes

NUM_SNAPSHOTS = 32  # of averages in a run
TEXT_SETTINGS = ("text_channels", "vocabulary_size", "text_tokens")


class EMAConfig(Settings):
    """Exponential moving averages of the weights. Sampling uses the first; others may be saved beside it.

    The best decay is known only at the end of a run (Karras et al. 2024, section 3): `--ema` selects one.
    """

    kind: Literal["exponential"] = "exponential"
    decay: Fraction = 0.9999
    extra_decays: Annotated[tuple[Fraction, ...], BeforeValidator(as_tuple)] = Field(
        default=(), description="decays of further averages, saved beside the first"
    )
    warmup: bool = Field(default=False, description="use the decay (1 + step) / (10 + step) where it is smaller")

    @property
    def decays(self) -> tuple[float, ...]:
        """The decays of all averages; sampling uses the first."""
        return self.decay, *self.extra_decays

    @property
    def averages(self) -> tuple[float, ...]:
        """The keys of the averages: their decays."""
        return self.decays

    def new_weight(self, decay: float, step: int) -> float:
        """The weight of the current weights in the average after step number `step`, counted from 1."""
        return 1 - (min(decay, (1 + step) / (10 + step)) if self.warmup else decay)

    def num_snapshots(self, step: int, steps: int) -> int:
        """How often a run of some steps saves its averages beside its checkpoints until a step."""
        return 0

    def provenance(self) -> dict[str, Any]:
        """What a bundle records of the first average."""
        return {"ema_decay": self.decay}

    @model_validator(mode="after")
    def _check_distinct(self) -> "EMAConfig":
        if len(set(self.decays)) < len(self.decays):
            raise ValueError(f"the decays must differ, got {', '.join(map(str, self.decays))}")
        return self


class PowerEMAConfig(Settings):
    """Power-function averages of the weights (Karras et al. 2024): their length is relative to the run.

    Sampling uses the first. All are saved several times in a run, and `--ema-length` computes other lengths from
    them after training.
    """

    kind: Literal["power"] = "power"
    lengths: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=MAX_LENGTH)], ...], BeforeValidator(as_tuple), Field(min_length=1)
    ] = Field(
        default=(0.05, 0.1),
        description="standard deviations of the steps that an average covers, relative to the steps done (sigma_rel)",
    )
    snapshot_every: PositiveInt | None = Field(
        default=None,
        description="steps between savings of all averages; null: 32 in a run, which give the lengths 0.02 to 0.25",
    )

    @property
    def averages(self) -> tuple[float, ...]:
        """The keys of the averages: their lengths."""
        return self.lengths

    def new_weight(self, length: float, step: int) -> float:
        """The weight of the current weights in the average after step number `step`, counted from 1."""
        return new_weight(length, step)

    def num_snapshots(self, step: int, steps: int) -> int:
        """How often a run of some steps saves its averages beside its checkpoints until a step."""
        return step // (self.snapshot_every or max(1, steps // NUM_SNAPSHOTS))

    def provenance(self) -> dict[str, Any]:
        """What a bundle records of the first average."""
        return {"ema_length": self.lengths[0]}

    @model_validator(mode="after")
    def _check_distinct(self) -> "PowerEMAConfig":
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"the lengths must differ, got {', '.join(map(str, self.lengths))}")
        return self


def _default_to_exponential(value: Any) -> Any:
    value = expand_kind(value)
    return {"kind": "exponential", **value} if isinstance(value, dict) else value


AnyEMA = Annotated[EMAConfig | PowerEMAConfig, BeforeValidator(_default_to_exponential), Field(discriminator="kind")]


def _off_as_text(value: Any) -> Any:
    """YAML reads `off` as false."""
    return "off" if value is False else value


class TrainingConfig(Settings):
    """How a run trains, and what it logs and saves. The defaults are those of the DiT paper."""

    steps: PositiveInt = Field(default=400_000, description="optimizer updates of the whole run")
    global_batch_size: PositiveInt = Field(
        default=256, description="samples in a step, over all ranks and accumulation steps"
    )
    micro_batch_size: PositiveInt | None = Field(
        default=None, description="samples on a device at once; null: all of its part"
    )
    optimizer: AnyOptimizer = Field(default=AdamWConfig(), description="the optimizer with its learning rate")
    ema: AnyEMA = Field(default=EMAConfig(), description="averages of the weights; sampling uses the first")
    condition_dropout: float = Field(
        default=0.1, ge=0, lt=1, description="fraction of samples without their condition (label), for guidance"
    )
    frame_times: AnyFrameTimes = Field(
        default=SharedTimes(),
        description="times of the frames of clips; mixed: shared, independent, or 0 and without loss where a frame is "
        "given, for sampling from given frames",
    )
    token_times: AnyTokenTimes = Field(
        default=SharedTokenTimes(),
        description="times of the tokens of images; dual: a second time for some of them, as augmentation",
    )
    alignment: AnyAlignment | None = Field(
        default=None,
        description="a block also learns to predict features: self (of the weight average, with less noise: SRA) or "
        "encoder (of a pretrained image encoder: REPA)",
    )
    token_routing: TokenRoutingConfig | None = Field(
        default=None, description="some tokens skip the blocks in the middle, in training (TREAD); {}: the defaults"
    )
    distillation: DistillationConfig | None = Field(
        default=None, description="train the average velocity of a teacher, for sampling in a few steps; null: the data"
    )
    field_dropout: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(
        default_factory=dict,
        description="fraction of samples without one field of their condition, each by itself; for guidance_scales",
    )
    precision: Precision = Field(default="auto", description="of matrix products; auto: bfloat16 on GPUs that have it")
    compile: Annotated[Literal["off", "whole", "blocks", "auto"], BeforeValidator(_off_as_text)] = Field(
        default="off", description="torch.compile of the network or of each block; auto: the fastest, as measured"
    )
    activation_checkpointing: CheckpointingMode = Field(
        default="none",
        description="activations recomputed in the backward pass to save memory; blocks: all; selective: all except "
        "matrix products, convolutions and attention",
    )
    fsdp: PositiveInt | Literal["full"] = Field(
        default=1, description="ranks that hold one copy of the weights together; 1: each rank has a copy"
    )
    stability: StabilityConfig = Field(default=StabilityConfig(), description="skipped steps and roll-backs")
    seed: NonNegativeInt = Field(default=0, description="of all random numbers of the training")
    device: DeviceName = Field(default="auto", description="auto: a GPU if there is one")
    num_workers: PositiveInt = Field(default=2, description="threads that read data ahead")
    decode_processes: NonNegativeInt = Field(
        default=0, description="processes that decode images, for many small ones; 0: the threads decode"
    )
    init_from: str | None = Field(
        default=None, description="start from this bundle, run, official .pt or diffusers folder"
    )
    init_num_heads: PositiveInt | None = Field(
        default=None, description="attention heads of init_from, where a .pt does not determine them"
    )
    init_num_classes: PositiveInt | None = Field(
        default=None, description="classes of init_from without the null label, where a .pt does not determine them"
    )
    init_type: Literal["dit", "sit", "sit-gvp", "repa", "repa-cosine"] | None = Field(
        default=None, description="the family of init_from, where a .pt does not determine it"
    )
    trainable: Literal["all", "temporal"] = Field(
        default="all", description="temporal: the layers of temporal attention alone; others stay those of init_from"
    )
    log_every: PositiveInt = Field(default=100, description="steps between records of log.jsonl")
    sample_every: PositiveInt | None = Field(
        default=5_000, description="steps between grids of samples, beside the first and the last; null: no grids"
    )
    sample_seeds: PositiveInt = Field(default=4, description="seeds of each class or prompt in a grid of samples")
    sample_prompts: tuple[str, ...] = Field(
        default=(), description="prompts of a grid of samples, in a model of text (8 captions of the data)"
    )
    checkpoint_every: PositiveInt = Field(default=5_000, description="steps between checkpoints")
    keep_last: PositiveInt = Field(
        default=2, description="newest checkpoints to keep, beside the one with the best score"
    )
    keep_every_n_steps: PositiveInt | None = Field(
        default=None, description="also keep the checkpoints of every multiple of this many steps"
    )
    health_every: PositiveInt | None = Field(
        default=100, description="steps between health records for `tessera doctor`; null: never"
    )
    tensorboard: bool = Field(default=True, description="write TensorBoard logs, where tensorboard is installed")

    @model_validator(mode="before")
    @classmethod
    def _start_from_teacher(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("distillation"), dict) and data.get("init_from") is None:
            return {**data, "init_from": data["distillation"].get("teacher")}
        return data

    @model_validator(mode="after")
    def _check_divides(self) -> "TrainingConfig":
        if self.micro_batch_size and self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size}"
            )
        return self


class Recipe(Settings):
    """A complete run. `network` may leave out the sizes that follow from data, codec and diffusion process."""

    run_dir: str = Field(description="folder of the run; default for a recipe file: runs/NAME")
    data: AnyData = Field(description="the training data")
    codec: AnyCodec = Field(default=PixelsConfig(), description="what maps images or clips to latents")
    text: AnyTextEncoder | None = Field(
        default=None, description="the text encoder; null: words, if the network is conditioned on text"
    )
    network: AnyNetwork = Field(default=DiTConfig(), description="the network that is trained")
    adapter: AnyAdapter | None = Field(
        default=None,
        description="an adapter, which is trained on the frozen model of training.init_from; null: train all weights",
    )
    diffusion: AnyDiffusionConfig = Field(
        default=GaussianDiffusionConfig(), description="how noise is added, what the network predicts, and the loss"
    )
    sampling: SamplingConfig = Field(default=SamplingConfig(), description="how the trained model is sampled")
    training: TrainingConfig = Field(
        default=TrainingConfig(), description="steps, optimizer, EMA, devices, checkpoints"
    )
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), description="scores during training")

    @model_validator(mode="after")
    def _check_adapter(self) -> "Recipe":
        if self.training.trainable == "temporal" and (self.training.init_from is None or self.adapter is not None):
            raise ValueError(
                "training.trainable=temporal trains new layers of a trained model: set training.init_from=MODEL, and "
                "leave adapter: out"
            )
        if self.adapter is not None and self.training.init_from is None:
            raise ValueError("an adapter changes a trained model: set training.init_from=MODEL, or leave adapter: out")
        if isinstance(self.adapter, ControlConfig):
            if self.data.frames is not None:
                raise ValueError("a control image is made of an image, and the data are clips: leave out data.frames")
            if getattr(self.data, "cache", None) is not None:
                raise ValueError(
                    "a control image is made of the image, which a latent cache does not hold: leave out data.cache"
                )
            if self.training.activation_checkpointing != "none" and self.adapter.low_rank:
                raise ValueError(
                    "the low-rank layers of a control cannot be recomputed: set "
                    "training.activation_checkpointing=none, adapter.how=copy or adapter.rank=0"
                )
        return self


def read_recipe(recipe: Path | Mapping[str, Any], overrides: Sequence[str | tuple[str, Any]] = ()) -> Recipe:
    """Read a recipe file, or a mapping with its content, and apply dotted overrides. Raises TesseraError.

    `run_dir` defaults to runs/<name of the file>.
    """
    if isinstance(recipe, Path):
        data, source = {"run_dir": f"runs/{recipe.stem}", **read_yaml(recipe, Recipe)}, f"recipe {recipe}"
        if {"recipe", "axes"} <= data.keys():
            raise TesseraError(
                f"{recipe} is a study, which trains several models; expected the recipe of one run. "
                f"`tessera study {recipe} --dry-run` prints what it costs, and without --dry-run it runs"
            )
    else:
        data, source = copy.deepcopy(dict(recipe)), "the recipe"
    # Default kinds are written out so that overrides such as training.optimizer.kind=muon replace them.
    if isinstance(data.get("network"), dict):
        data["network"] = with_kind(data["network"])
    defaults = (data, "diffusion", "gaussian"), (training := data.get("training"), "optimizer", "adamw")
    for section, key, default in (*defaults, (training, "ema", "exponential")):
        if isinstance(section, dict) and isinstance(section.get(key), dict):
            section[key] = {"kind": default, **section[key]}
    return validate(Recipe, apply_overrides(data, overrides, Recipe), source)


def infer_pixel_channels(recipe: Recipe) -> Recipe:
    """The recipe with the channels of the pixel codec taken from the data, unless the recipe sets them."""
    codec = recipe.codec
    if isinstance(codec, PixelsConfig) and "channels" not in codec.model_fields_set:
        return recipe.model_copy(update={"codec": PixelsConfig(channels=recipe.data.channels)})
    return recipe


def inherit_text(recipe: Recipe, source: AnyTextEncoder | None) -> Recipe:
    """The recipe with the text encoder, or its vocabulary, that a model was trained with, where it has none."""
    text = recipe.text
    if source is None or not recipe.network.uses_text:
        return recipe
    if text is None:
        text = source
    elif isinstance(text, WordsConfig) and isinstance(source, WordsConfig):
        if text.vocabulary not in ((), source.vocabulary):
            raise TesseraError(
                f"text.vocabulary has {len(text.vocabulary)} words, and is not that of the model that training starts "
                f"from, which has {len(source.vocabulary)}: ids would mean other words; leave text.vocabulary out to "
                "take that of the model"
            )
        text = text.model_copy(update={"vocabulary": source.vocabulary})
    return recipe.model_copy(update={"text": text})


def resolve_text(recipe: Recipe, captions: Captions | None) -> Recipe:
    """The recipe with its text encoder: by default `words`, with the vocabulary of the training captions.

    captions: None if the network reads no text. Raises TesseraError if the recipe has an encoder that it cannot use.
    """
    text, network = recipe.text, recipe.network
    if not network.uses_text:
        if text is not None:
            raise TesseraError(
                f"the recipe has a text encoder (text: {text.kind}), but its network reads no text: set "
                "network.block.text=keys, or leave text: out"
            )
        return recipe
    assert captions is not None
    text = text or WordsConfig()
    if isinstance(text, WordsConfig) and not text.vocabulary:
        text = text.with_vocabulary(captions.text_counts())
    return recipe.model_copy(update={"text": text})


def text_settings(network: NetworkConfig, text: TextSizes) -> dict[str, int]:
    """The settings of a network that follow from its text encoder and the captions.

    A network with a table by position needs as many tokens as the encoder gives. Others need those of the longest
    caption, which their cost depends on. Raises TesseraError if the network has fewer.
    """
    has_table = isinstance(network, PixArtConfig) and not text.vocabulary_size
    tokens, least = network.text_tokens, text.max_tokens if has_table else text.longest
    if "text_tokens" in network.model_fields_set or has_table:
        if tokens < least:
            limit = f"the text encoder gives up to {least}" if has_table else f"a caption has {least}"
            raise TesseraError(
                f"network.text_tokens is {tokens}, but {limit}: set network.text_tokens={least}, or "
                f"text.max_tokens={tokens}"
            )
        least = tokens
    return {"text_channels": text.channels, "vocabulary_size": text.vocabulary_size, "text_tokens": least}


def null_fields(network: NetworkConfig, sampling: SamplingConfig) -> tuple[str, ...]:
    """The fields of the network's condition that training may drop: an empty prompt may be the null value of a text."""
    names = network.null_fields
    uses_empty = network.uses_text and sampling.null_text == "empty" and "text" not in names
    return (*names, "text") if uses_empty else names


def resolve_recipe(
    recipe: Recipe, class_names: Sequence[str], codec: Codec, num_unlabeled: int = 0, text: TextSizes | None = None
) -> Recipe:
    """The recipe with all sizes of `network` set from data, codec, text encoder and diffusion process.

    A network that reads text has no classes, unless the recipe sets network.num_classes to those of the data.
    num_unlabeled: samples without a class. text: None if the network reads none. Raises TesseraError if settings
    contradict each other.
    """
    own_classes = recipe.network.num_classes if "num_classes" in recipe.network.model_fields_set else 0
    if recipe.network.uses_text and not own_classes:
        class_names = ()
    if recipe.adapter is None:  # whose classes are those of its base
        check_classes(class_names, recipe.data)
    pixel_size = sample_size(recipe.data)
    if codec.pixel_channels != recipe.data.channels:
        raise TesseraError(
            f"the codec takes {codec.pixel_channels} channels, but data.channels is {recipe.data.channels}"
        )
    try:
        size = codec.latent_size(pixel_size)
    except TesseraError as error:
        raise TesseraError(f"data.{error}") from None
    process = recipe.diffusion.resolve(codec.latent_channels, size).build()
    sizes = {
        "input_size": size,
        "in_channels": codec.latent_channels,
        "out_channels": process.out_channels(codec.latent_channels),
        "num_classes": len(class_names),
    }
    if text is not None:
        sizes |= text_settings(recipe.network, text)
    for name, value in sizes.items():
        if name in recipe.network.model_fields_set and getattr(recipe.network, name) != value:
            needed_by = "the text encoder needs" if name in TEXT_SETTINGS else "data, codec and diffusion need"
            raise TesseraError(
                f"network.{name} is {getattr(recipe.network, name)} in the recipe, but {needed_by} {value}"
            )
    network = validate(type(recipe.network), {**recipe.network.model_dump(), **sizes}, "network")
    if class_names and recipe.training.condition_dropout and not network.learn_null_class:
        raise TesseraError(
            "training.condition_dropout needs network.learn_null_class=true: dropped labels become that class"
        )
    if not isinstance(recipe.training.frame_times, SharedTimes) and (problem := network.frame_times_problem()):
        raise TesseraError(f"training.frame_times={recipe.training.frame_times.kind} {problem}: leave it out")
    if not isinstance(token_times := recipe.training.token_times, SharedTokenTimes):
        problem = network.token_times_problem()
        if recipe.training.distillation is not None:
            problem = "does not go with training.distillation, whose steps have one time"
        if problem:
            raise TesseraError(f"training.token_times={token_times.kind} {problem}: leave it out")
    network = _with_feature_head(recipe, network)
    _check_routing(recipe, network)
    schedule = recipe.sampling.frame_schedule
    if not isinstance(schedule, Together) and (problem := network.frame_times_problem()):
        raise TesseraError(f"sampling.frame_schedule={schedule.kind} {problem}: leave it out")
    check_schedule(schedule, recipe.sampling.sampler)
    check_step_size(recipe.sampling.sampler, network.takes_step_size)
    droppable = null_fields(network, recipe.sampling)
    if network.uses_text and recipe.training.condition_dropout and "text" not in droppable:
        raise TesseraError(
            "training.condition_dropout needs an unconditional text, and the network has no null embedding: set "
            "sampling.null_text=empty, which takes an encoded empty prompt, or training.condition_dropout=0"
        )
    if recipe.sampling.guidance_scale != 1 and not droppable:
        raise TesseraError(
            f"sampling.guidance_scale is {recipe.sampling.guidance_scale:g}, but guidance needs classes and "
            "network.learn_null_class; set sampling.guidance_scale=1"
        )
    known = (*network.null_fields, *(["control"] if isinstance(recipe.adapter, ControlConfig) else []))
    for key in ("training.field_dropout", "sampling.guidance_scales"):
        section, name = key.split(".")
        frames = {"frames"} if key == "sampling.guidance_scales" and network.is_temporal else set()
        if unknown := sorted(getattr(getattr(recipe, section), name).keys() - set(known) - frames):
            raise TesseraError(
                f"{key} has {', '.join(unknown)}, but the network has the conditions with a null value: "
                f"{', '.join(known) or 'none'}"
            )
    if class_names and num_unlabeled and not network.learn_null_class:
        raise TesseraError(
            f"{num_unlabeled} samples have no class, which needs network.learn_null_class=true: set it, or give them a "
            "class"
        )
    multiple, data = codec.factor * network.size_multiple, recipe.data
    if isinstance(data, FilesConfig) and data.buckets is not None and data.buckets.multiple % multiple:
        raise TesseraError(
            f"data.buckets.multiple is {data.buckets.multiple}, but codec and network need multiples of {multiple}: "
            f"set data.buckets.multiple={multiple * max(1, round(data.buckets.multiple / multiple))}"
        )
    check_caching(network, recipe.sampling.caching)
    # An invalid grid is an error now, not at the first grid of samples.
    timestep_grid(recipe.sampling.timestep_spacing, recipe.sampling.num_steps, process)
    return recipe.model_copy(update={"network": network})


def _with_feature_head(recipe: Recipe, network: NetworkConfig) -> NetworkConfig:
    """The network with the head that training.alignment needs, or without one. Raises TesseraError."""
    config = recipe.training.alignment
    if config is None:
        channels = getattr(network, "feature_channels", None)
        return network if channels is None else network.model_copy(update={"feature_channels": None})
    problem = alignment_problem(config, network)
    if recipe.training.distillation is not None or recipe.adapter is not None:
        problem = "trains all weights from data: it does not go with training.distillation or an adapter"
    if problem:
        raise TesseraError(f"training.alignment={config.kind} {problem}; leave it out, or change that")
    assert isinstance(network, DiTConfig)
    return network.model_copy(update={"feature_channels": feature_channels(config, network)})


def _check_routing(recipe: Recipe, network: NetworkConfig) -> None:
    """Raise TesseraError if tokens cannot be routed."""
    config, alignment = recipe.training.token_routing, recipe.training.alignment
    if config is None:
        return
    problem = config.problem(network)
    if recipe.training.distillation is not None or recipe.adapter is not None:
        problem = "trains all weights from data: it does not go with training.distillation or an adapter"
    if problem is None and alignment is not None and isinstance(network, DiTConfig):
        start, end = config.blocks(network.depth)
        if start < (block := alignment.block_of(network.depth)) <= end:
            problem = (
                f"has a route over the blocks {start + 1} to {end}, and training.alignment needs all tokens of block "
                f"{block}: set training.alignment.block={start}"
            )
    if problem:
        raise TesseraError(f"training.token_routing {problem}; leave it out, or change that")


def training_macs(training: TrainingConfig, network: Network) -> float:
    """A third of the multiply-adds of a training step for one image: those of a forward pass, and what alignment and
    routing change."""
    macs = float(network.macs())
    if training.alignment is not None:
        macs += added_macs(training.alignment, network)
    if training.token_routing is not None and isinstance(network, DiT):
        macs -= saved_macs(network, training.token_routing, network.config.grid)
    return macs
