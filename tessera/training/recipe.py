"""What a run is: one YAML file that validates into these types."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from tessera.acceleration.activation_checkpointing import CheckpointingMode
from tessera.acceleration.first_block_cache import check_caching
from tessera.codecs import AnyCodec, Codec, PixelsConfig
from tessera.data import AnyData
from tessera.data.files import FilesConfig
from tessera.diffusion import AnyDiffusionConfig, GaussianDiffusionConfig
from tessera.errors import TesseraError
from tessera.models import AnyNetwork, with_kind
from tessera.models.dit import DiTConfig
from tessera.monitoring.spikes import StabilityConfig
from tessera.runtime import DeviceName, Precision
from tessera.sampling import SamplingConfig
from tessera.sampling.timesteps import timestep_grid
from tessera.settings import Settings, override, read_yaml, validate
from tessera.training.optimizers import AdamWConfig, AnyOptimizer, Fraction
from tessera.training.scores import EvaluationConfig


def _several(value: Any) -> Any:
    """One number stands for a list of one."""
    return (value,) if isinstance(value, int | float) else value


class EMAConfig(Settings):
    """Moving averages of the weights: the first is what a model draws with, others may be kept beside it.

    Which length is best is known at the end of a run, not before (Karras et al. 2024, section 3): `--ema` chooses one.
    """

    decay: Fraction = 0.9999
    extra_decays: Annotated[tuple[Fraction, ...], BeforeValidator(_several)] = Field(
        default=(), description="decays of the averages kept beside the first"
    )
    warmup: bool = Field(
        default=False, description="shorter averages at first: (1 + step) / (10 + step) where that is less"
    )

    @property
    def decays(self) -> tuple[float, ...]:
        """Of all averages, the first being the one that draws."""
        return self.decay, *self.extra_decays

    @model_validator(mode="after")
    def _differ(self) -> "EMAConfig":
        if len(set(self.decays)) < len(self.decays):
            raise ValueError(f"each average needs a decay of its own, got {', '.join(map(str, self.decays))}")
        return self


def _compiling(value: Any) -> Any:
    """YAML reads off as false, and an older recipe says true."""
    return {False: "off", True: "auto"}.get(value, value) if isinstance(value, bool) else value


class TrainingConfig(Settings):
    """How a run learns, and what it writes down. The defaults are those of the DiT paper."""

    steps: PositiveInt = 400_000
    global_batch_size: PositiveInt = Field(default=256, description="samples a step, over all devices and accumulation")
    micro_batch_size: PositiveInt | None = Field(
        default=None, description="samples on a device at once; null: all that fall to it"
    )
    optimizer: AnyOptimizer = AdamWConfig()
    ema: EMAConfig = EMAConfig()
    label_dropout: float = Field(default=0.1, ge=0, lt=1, description="share of labels withheld, for guidance")
    precision: Precision = Field(default="auto", description="of matrix products; auto: bfloat16 on GPUs that have it")
    compile: Annotated[Literal["off", "whole", "blocks", "auto"], BeforeValidator(_compiling)] = Field(
        default="off", description="torch.compile: the network, or block by block; auto: what is measured to be faster"
    )
    activation_checkpointing: CheckpointingMode = Field(
        default="none",
        description="activations made again for the backward pass to save memory: blocks: all; selective: all but "
        "matrix products, convolutions and attention",
    )
    fsdp: PositiveInt | Literal["all"] = Field(
        default=1, description="processes (torchrun) that hold one copy of the weights between them; 1: a copy each"
    )
    stability: StabilityConfig = StabilityConfig()
    seed: NonNegativeInt = 0
    device: DeviceName = "auto"
    num_workers: PositiveInt = Field(default=2, description="threads that read data ahead")
    init_from: str | None = Field(
        default=None, description="start from this bundle, run, official .pt or diffusers folder"
    )
    init_num_heads: PositiveInt | None = Field(
        default=None, description="attention heads of init, where a .pt cannot say"
    )
    init_type: Literal["dit", "sit", "sit-gvp"] | None = Field(
        default=None, description="what init was trained as, where a .pt cannot say"
    )
    log_every: PositiveInt = 100
    sample_every: PositiveInt = Field(default=5_000, description="steps between grids of samples")
    sample_seeds: PositiveInt = Field(default=4, description="rows of the grid")
    checkpoint_every: PositiveInt = 5_000
    keep_last: PositiveInt = Field(default=2, description="the newest so many stay, and the best, if scored")
    keep_every_n_steps: PositiveInt | None = Field(
        default=None, description="and for good those of every so many steps"
    )
    health_every: PositiveInt | None = Field(
        default=100, description="steps between looks inside, for `tessera doctor`; null: never"
    )
    tensorboard: bool = Field(default=True, description="write TensorBoard logs, where tensorboard is installed")

    @model_validator(mode="after")
    def _divides(self) -> "TrainingConfig":
        if self.micro_batch_size and self.global_batch_size % self.micro_batch_size:
            raise ValueError(f"batch {self.global_batch_size} is not a multiple of micro_batch {self.micro_batch_size}")
        return self


class Recipe(Settings):
    """A whole run. Sizes that follow from the data and the codec may be left out of `network`."""

    run_dir: str = Field(description="the run's folder")
    data: AnyData
    codec: AnyCodec = PixelsConfig()
    network: AnyNetwork = DiTConfig()
    diffusion: AnyDiffusionConfig = GaussianDiffusionConfig()
    sampling: SamplingConfig = SamplingConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


def read_recipe(path: Path, overrides: list[str]) -> Recipe:
    """A recipe file with dotted overrides; `output` is runs/<the file's name> where none is given. TesseraError."""
    data: dict[str, Any] = {"run_dir": f"runs/{path.stem}", **read_yaml(path)}
    # The kinds that go without saying, so that diffusion.kind=flow or training.optimizer.kind=muon replaces them.
    if isinstance(data.get("network"), dict):
        data["network"] = with_kind(data["network"])
    for place, name, usual in ((data, "diffusion", "gaussian"), (data.get("training"), "optimizer", "adamw")):
        if isinstance(place, dict) and isinstance(place.get(name), dict):
            place[name] = {"kind": usual, **place[name]}
    return validate(Recipe, override(data, overrides), f"recipe {path}")


def resolve_recipe(recipe: Recipe, class_names: Sequence[str], codec: Codec) -> Recipe:
    """The recipe with every size of `network` filled in from data, codec and process.

    Raises TesseraError if the recipe itself says otherwise: training would fail later, or learn something else.
    """
    height, width = recipe.data.size
    if codec.pixel_channels != recipe.data.channels:
        raise TesseraError(
            f"the codec takes {codec.pixel_channels} channels, but data.channels is {recipe.data.channels}"
        )
    if height % codec.factor or width % codec.factor:
        raise TesseraError(f"data.size {height} x {width} is not a multiple of {codec.factor}, as the codec needs")
    size = (height // codec.factor, width // codec.factor)
    process = recipe.diffusion.resolved(codec.latent_channels, size).build()
    facts = {
        "input_size": size,
        "in_channels": codec.latent_channels,
        "out_channels": process.out_channels(codec.latent_channels),
        "num_classes": len(class_names),
    }
    network = recipe.network
    for name, fact in facts.items():
        told = getattr(network, name)
        if name in network.model_fields_set and told != fact:
            raise TesseraError(f"network.{name} is {told} in the recipe, but data, codec and process make it {fact}")
    network = validate(type(network), {**network.model_dump(), **facts}, "network")
    if facts["num_classes"] and recipe.training.label_dropout and not network.learn_null_class:
        raise TesseraError(
            "training.label_dropout needs network.learn_null_class=true: labels are withheld by that class"
        )
    if recipe.sampling.guidance_scale != 1 and not (facts["num_classes"] and network.learn_null_class):
        raise TesseraError(
            f"sampling.guidance_scale is {recipe.sampling.guidance_scale:g}, but guidance needs classes and network.learn_null_class; "
            "set sampling.guidance_scale=1"
        )
    unit, data = codec.factor * network.size_multiple, recipe.data
    if isinstance(data, FilesConfig) and data.buckets is not None and data.buckets.multiple % unit:
        raise TesseraError(
            f"data.buckets.multiple is {data.buckets.multiple}, but codec and network need multiples of {unit}: "
            f"set data.buckets.multiple={unit * max(1, round(data.buckets.multiple / unit))}"
        )
    check_caching(network, recipe.sampling.caching)
    timestep_grid(
        recipe.sampling.timestep_spacing, recipe.sampling.num_steps, process
    )  # an error now, not at the first grid
    return recipe.model_copy(update={"network": network})


def pixels_like_data(recipe: Recipe) -> Recipe:
    """The pixel codec takes its channels from the data, unless the recipe says them."""
    codec = recipe.codec
    if isinstance(codec, PixelsConfig) and "channels" not in codec.model_fields_set:
        return recipe.model_copy(update={"codec": PixelsConfig(channels=recipe.data.channels)})
    return recipe
