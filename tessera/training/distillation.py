"""Distillation into a few steps: a network that learns the average velocity of a trained model over a step.

The average velocity from x_t down to the time s is u(x_t, t, s) = 1 / (t - s) times the integral of the velocity v
along the path of the probability flow from s to t (Geng et al. 2025, "Mean Flows for One-step Generative Modeling",
equation 3), so that x_s = x_t - (t - s) u. At s = t it is v itself. The teacher is frozen and guided: the student needs
no guidance, and its targets have no noise of single samples. Shapes: B batch, C channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tessera import randomness, runtime
from tessera.conditioning import Condition, NetworkFunction
from tessera.diffusion import DiffusionProcess
from tessera.diffusion.process import Losses
from tessera.errors import TesseraError
from tessera.model import Model
from tessera.models.dit import DiTConfig
from tessera.sampling import Denoiser, SamplingConfig
from tessera.settings import Settings, expand_kind
from tessera.times import expand, row_mean
from tessera.training import parallel

if TYPE_CHECKING:
    from tessera.training.ema import EMA

DISTILLATION_STREAM = 8  # random stream, see `tessera.training.objective`

# average(x, t, s): the network's average velocity from x [R, C, ...] at t [R] to s [R], for some rows of a batch
Average = Callable[[Tensor, Tensor, Tensor], Tensor]


def arcsine(uniform: Tensor) -> Tensor:
    """Times from 0 to 1 of uniform numbers, more of them near both ends (the arcsine distribution): every sampling
    begins at 1 and ends at 0.
    """
    return torch.sin(uniform.double() * torch.pi / 2) ** 2


class Target(Settings, ABC):
    """The target of the average velocity over a step, from the teacher's velocity v at its start."""

    calls: ClassVar[float]  # evaluations of the network beside the one that is trained
    needs_velocity: ClassVar[bool] = True  # of the teacher, also where s < t

    @abstractmethod
    def steps(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """The start t and the end s < t of training steps, from uniform numbers [B, 2]"""

    def check(self, sampling: SamplingConfig) -> None:
        """Raise TesseraError for steps of sampling that are not trained."""

    @abstractmethod
    def target(self, average: Average, x: Tensor, t: Tensor, s: Tensor, v: Tensor, progress: Tensor) -> Tensor:
        """[B, C, ...] from x and v [B, C, ...], t and s [B]; progress [B]: of the training, from 0 to 1"""


class AnyStep(Target, ABC):
    """A target for steps between any two times."""

    length_power: PositiveFloat = Field(
        default=2,
        description="p of the lengths 1 - (1 - u)^p of training steps, u uniform: more steps are long; 1: all lengths "
        "equally often",
    )

    def steps(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        first, second = uniform.double().unbind(1)
        length = 1 - (1 - first) ** self.length_power
        s = (1 - length) * arcsine(second)
        return s + length, s


class AlphaFlow(AnyStep):
    """alpha v + (1 - alpha) u(x_m, m, s), at m = t - alpha (t - s) after a short step along v (Zhang et al. 2025,
    "AlphaFlow").

    Between flow matching (alpha 1) and MeanFlow (alpha near 0), without derivatives of the network.
    """

    kind: Literal["alpha-flow"] = "alpha-flow"
    calls: ClassVar[float] = 1
    start: float = Field(default=0.5, gt=0, le=1, description="alpha at the start of training")
    end: float = Field(
        default=0.1, gt=0, le=1, description="alpha once it has fallen; less is more exact, and needs longer training"
    )
    falling: float = Field(default=0.5, ge=0, le=1, description="fraction of training in which alpha falls")

    def alpha(self, progress: Tensor) -> Tensor:
        """On a straight line in logarithms: [B] -> float64 [B]"""
        part = (progress.double() / max(self.falling, 1e-9)).clamp(max=1)
        return self.start ** (1 - part) * self.end**part

    def target(self, average: Average, x: Tensor, t: Tensor, s: Tensor, v: Tensor, progress: Tensor) -> Tensor:
        alpha = self.alpha(progress)
        middle = t - alpha * (t - s)
        rest = average(x - expand(t - middle, x) * v, middle, s)
        return torch.lerp(rest, v, expand(alpha, x))


class MeanFlow(AnyStep):
    """v - (t - s) du/dt, with the derivative along the path by forward-mode differentiation (Geng et al. 2025, equation
    10)."""

    kind: Literal["mean-flow"] = "mean-flow"
    calls: ClassVar[float] = 2  # a derivative costs about as much as an evaluation

    def target(self, average: Average, x: Tensor, t: Tensor, s: Tensor, v: Tensor, progress: Tensor) -> Tensor:
        try:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no forward-mode derivative
                derivative = torch.func.jvp(lambda x, t: average(x, t, s), (x, t), (v, torch.ones_like(t)))[1]
        except (NotImplementedError, RuntimeError) as error:
            if "forward" not in str(error) and "jvp" not in str(error):
                raise
            raise TesseraError(
                f"mean-flow needs forward-mode derivatives of the network, and a layer has none ({error}): use "
                "training.distillation.target=alpha-flow"
            ) from None
        return v - expand(t - s, x) * derivative


class Shortcut(Target):
    """The mean of two steps of half the length, which are powers of two (Frans et al. 2024, "One Step Diffusion via
    Shortcut Models")."""

    kind: Literal["shortcut"] = "shortcut"
    calls: ClassVar[float] = 2
    needs_velocity: ClassVar[bool] = False
    smallest: PositiveInt = Field(default=64, description="steps of the finest grid, a power of two")

    def steps(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        first, second = uniform.double().unbind(1)
        levels = self.smallest.bit_length() - 1  # steps of the lengths 1, 1/2, .. 2 / smallest
        length = 2.0 ** -(first * levels).floor()
        s = (second / length).floor() * length
        return s + length, s

    def check(self, sampling: SamplingConfig) -> None:
        steps = sampling.num_steps
        if steps & (steps - 1) or steps > self.smallest:
            raise TesseraError(
                f"sampling.num_steps is {steps}, and shortcut trains steps of 1, 1/2, .. 1/{self.smallest}: use a "
                "power of two, or training.distillation.target=alpha-flow"
            )

    def target(self, average: Average, x: Tensor, t: Tensor, s: Tensor, v: Tensor, progress: Tensor) -> Tensor:
        middle = (t + s) / 2
        # Steps of the finest grid are not trained, and begin with the velocity itself.
        is_finest = t - middle < 1.5 / self.smallest
        first = average(x, t, torch.where(is_finest, t, middle))
        second = average(x - expand(t - middle, x) * first, middle, torch.where(is_finest, middle, s))
        return (first + second) / 2


def _default_to_alpha_flow(value: Any) -> Any:
    value = expand_kind(value)
    return {"kind": "alpha-flow", **value} if isinstance(value, dict) else value


AnyTarget = Annotated[
    AlphaFlow | MeanFlow | Shortcut, BeforeValidator(_default_to_alpha_flow), Field(discriminator="kind")
]


class DistillationConfig(Settings):
    """Train the average velocity of a model, for sampling in one or a few steps."""

    teacher: str = Field(description="the model, whose weights training starts from, unless init_from is set")
    teacher_hash: str | None = Field(default=None, description="of the teacher's weights; set at the start")
    guidance_scale: float | None = Field(
        default=None, description="of the teacher, and so of the student; null: that of its sampling settings"
    )
    guidance_interval: tuple[float, float] | None = Field(
        default=None, description="guide the teacher only between these times; null: as its sampling settings"
    )
    target: AnyTarget = Field(default=AlphaFlow(), description="what the average velocity is trained to be")
    target_weights: Literal["average", "current"] = Field(
        default="average",
        description="the weights of the student in its own targets: the moving average, which is stable at higher "
        "learning rates, or the current ones",
    )
    instantaneous: float = Field(
        default=0.25, ge=0, lt=1, description="fraction of samples that learn the velocity itself, at s = t"
    )
    adaptive_power: NonNegativeFloat = Field(
        default=1.0, description="p of the weight (error + eps)^-p of a sample; 0: all samples weigh the same"
    )
    adaptive_eps: PositiveFloat = 1e-3

    def sampling(self, teacher: SamplingConfig) -> SamplingConfig:
        """The teacher's sampling settings, with the guidance of this configuration."""
        changes = {"guidance_scale": self.guidance_scale, "guidance_interval": self.guidance_interval}
        return teacher.model_copy(update={name: value for name, value in changes.items() if value is not None})


@dataclass(frozen=True)
class Teacher:
    """The guided velocity of a frozen model, in the time of flow matching: x_t = (1 - t) x0 + t eps."""

    model: Model
    sampling: SamplingConfig

    @property
    def calls(self) -> int:
        """Evaluations of its network for a velocity."""
        return 1 if self.sampling.guidance_scale == 1 else 2

    @torch.no_grad()
    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """eps - x0 at x [B, C, ...] and t [B]

        A model of another diffusion process has the same path of the probability flow in other coordinates: its input
        is (alpha + sigma) x, at the time of the same ratio of noise and signal.
        """
        process, config = self.model.diffusion, self.sampling
        ratio = t.double() / (1 - t.double()).clamp(min=1e-9)
        own_t = process.time_from_nsr(ratio).clamp(max=1)
        own_x = x * expand(process.alpha(own_t) + process.sigma(own_t), x)
        denoiser = Denoiser(
            self.model.network,
            process,
            condition,
            config.guidance_scale,
            config.guidance_channels,
            guidance_interval=config.guidance_interval,
            guidance_schedule=config.guidance_schedule,
            guidance_rescale=config.guidance_rescale,
        )
        prediction = denoiser(own_x, own_t)
        return prediction.eps - prediction.x0

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition, num_steps: int) -> Tensor:
        """The average velocity from t to s by this many steps of Heun's method."""
        state, length = x, (t.double() - s.double()) / num_steps
        for step in range(num_steps):
            now = t.double() - step * length
            first = self.velocity(state, now, condition)
            second = self.velocity(state - expand(length, x) * first, now - length, condition)
            state = state - expand(length, x) * (first + second) / 2
        return (x - state) / expand(t.double() - s.double(), x)


@dataclass(frozen=True)
class Distillation:
    """The loss of a student."""

    config: DistillationConfig
    teacher: Teacher
    diffusion: DiffusionProcess  # of the student: flow matching on a linear path, and velocities
    seed: int
    num_positions: int  # of the whole training
    dtype: torch.dtype | None  # of autocast
    ema: "EMA | None" = None  # the weight average that the targets come from; None: the current weights

    def extra_macs(self, macs: float) -> float:
        """Multiply-adds for the target of a sample. macs: of a forward pass of the student"""
        share, rule = 1 - self.config.instantaneous, self.config.target
        with_velocity = 1 if rule.needs_velocity else 1 - share
        return with_velocity * self.teacher.calls * self.teacher.model.network.macs() + share * rule.calls * macs

    def average(self, network: NetworkFunction, x: Tensor, t: Tensor, s: Tensor, condition: Condition) -> Tensor:
        """The network's average velocity from t to s: [B, C, ...]"""
        step_size = (t - s).to(torch.float32).to(x.device, non_blocking=x.is_cuda)
        time = self.diffusion.model_time(t).to(x.device, non_blocking=x.is_cuda)
        with runtime.autocast(self.dtype, x.device):
            return network(x, time, replace(condition, step_size=step_size)).to(torch.float32)

    def times(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """t and s of the samples at these positions, equal where the velocity itself is trained: float64 [B] each"""
        share = self.config.instantaneous
        # Of every so many neighbors one, so that every batch has the same number of them.
        number = position.double()  # float32 has no neighbors above 2^24
        is_instantaneous = ((number + 1) * share).floor() > (number * share).floor()
        uniform = randomness.uniform(self.seed, position, DISTILLATION_STREAM, 3)
        t, s = self.config.target.steps(uniform[:, :2])
        instant = arcsine(uniform[:, 2])
        return torch.where(is_instantaneous, instant, t), torch.where(is_instantaneous, instant, s)

    def loss(
        self, network: NetworkFunction, x0: Tensor, noise: Tensor, condition: Condition, position: Tensor
    ) -> tuple[Losses, Tensor]:
        """The losses of samples [B, C, ...] at these positions [B], and their times [B]."""
        t, s = self.times(position)
        x = self.diffusion.add_noise(x0, noise, t)
        target = self._target(network, x, t, s, condition, position)
        mse = row_mean((self.average(network, x, t, s, condition) - target).square())
        weight = (mse.detach() + self.config.adaptive_eps) ** -self.config.adaptive_power
        return Losses(total=weight * mse, mse=mse), t.to(torch.float32)

    @torch.no_grad()
    def errors(
        self, network: NetworkFunction, x0: Tensor, noise: Tensor, condition: Condition, num_steps: int = 32
    ) -> dict[str, float]:
        """The squared error of the average velocity relative to the square of the teacher's, by step, such as "1 to
        0.5". The teacher's path has this many steps of Heun's method, twice as many evaluations.
        """
        half = num_steps // 2

        def at(time: float) -> Tensor:
            return torch.full((len(x0),), time, dtype=torch.float64)

        def path(x: Tensor, t: float, s: float, num_steps: int) -> Tensor:
            return self.teacher.average_velocity(x, at(t), at(s), condition, num_steps)

        halfway, quarter = (self.diffusion.add_noise(x0, noise, at(time)) for time in (0.5, 0.75))
        first = path(noise, 1, 0.5, half)
        second = path(noise - first / 2, 0.5, 0, half)
        exact = {
            (1, 0): (noise, (first + second) / 2),
            (1, 0.5): (noise, first),
            (0.5, 0): (halfway, path(halfway, 0.5, 0, half)),
            (0.75, 0.5): (quarter, path(quarter, 0.75, 0.5, half)),
        }
        result = {}
        for (t, s), (x, expected) in exact.items():
            error = self.average(network, x, at(t), at(s), condition) - expected
            result[f"{t:g} to {s:g}"] = float(error.square().mean() / expected.square().mean())
        return result

    @torch.no_grad()
    def _target(
        self, network: NetworkFunction, x: Tensor, t: Tensor, s: Tensor, condition: Condition, position: Tensor
    ) -> Tensor:
        rule, whole = self.config.target, t > s
        progress = position.double() / self.num_positions
        with_velocity = torch.ones_like(whole) if rule.needs_velocity else ~whole
        target = torch.zeros_like(x)
        if with_velocity.any():
            rows = with_velocity.nonzero()[:, 0].to(x.device)
            target[rows] = self.teacher.velocity(x[rows], t[with_velocity], condition[rows])
        # Sharded ranks must call the network equally often: without a whole step, a target is computed and not used.
        chosen = whole if whole.any() else torch.arange(len(whole)) == 0
        rows = chosen.nonzero()[:, 0].to(x.device)
        steps = condition[rows]
        if self.ema is not None:
            self.ema.synchronize()
            network = self.ema.network
        targets = rule.target(
            lambda x, t, s: self.average(network, x, t, s, steps),
            x[rows],
            t[chosen],
            s[chosen],
            target[rows],
            progress[chosen],
        )
        if whole.any():
            target[rows] = targets
        if self.ema is not None:
            parallel.reshard(self.ema.network)  # its weights change before the next call
        return target


def check_teacher(model: Model, sampling: SamplingConfig, name: str) -> None:
    """Raise TesseraError if a model cannot be distilled."""
    if model.config.network.takes_step_size:
        raise TesseraError(
            f"{name} was distilled already: it predicts the average velocity over a step. Distill the model that it "
            "was made of"
        )
    if sampling.guidance_scale != 1 and not model.null_fields:
        raise TesseraError(
            f"the guidance scale {sampling.guidance_scale:g} needs a teacher with an unconditional output, and {name} "
            "has none: set training.distillation.guidance_scale=1"
        )
    if type(model.config.network) is not DiTConfig:
        raise TesseraError(f"distillation trains a DiT, and {name} is a {model.config.network.display_name}")
    if model.config.network.is_temporal:
        raise TesseraError(f"{name} is a model of clips; distill needs one of images")
    if sampling.guidance_scales:
        raise TesseraError(
            "the teacher's sampling settings have guidance_scales for single conditions, and distillation knows one "
            "guidance_scale: set training.distillation.guidance_scale, and guidance_scales={} in the teacher"
        )
