"""Flow matching: a path from data to noise, and a network that learns the velocity along it.

Rectified flow (Liu et al. 2023), flow matching (Lipman et al. 2023), stochastic interpolants (Albergo et al. 2023; Ma
et al. 2024, "SiT"). Time runs from 0 (data) to 1 (noise); SiT's is 1 - t. Times are [B] or [B, T] tensors on the CPU;
alpha and sigma are float64. Shapes: B batch, C channels.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, PositiveFloat
from torch import Tensor

from tessera.diffusion.process import DiffusionProcess, Losses, Prediction
from tessera.settings import Settings, expand_kind
from tessera.times import expand, mean_like, mean_of_frames, shared_time

Parameterization = Literal["velocity", "x0", "epsilon"]
BASE_DIMENSION = 4096  # values of an input for which `shift: dimension` is 1: DiT's latents of 32 x 32 x 4
T_EPS = 1e-5  # distance of training times from 0 and 1


class UniformTimesteps(Settings):
    """Uniform times."""

    kind: Literal["uniform"] = "uniform"

    def sample(self, uniform: Tensor) -> Tensor:
        return uniform


class LogitNormalTimesteps(Settings):
    """Times whose logit is normal, most of them in the middle of the path (Esser et al. 2024, section 3.1).

    A mean above 0 shifts them to the noise.
    """

    kind: Literal["logit-normal"] = "logit-normal"
    mean: float = 0.0
    std: PositiveFloat = 1.0

    def sample(self, uniform: Tensor) -> Tensor:
        """Times from uniform numbers in [0, 1), by the inverse of the distribution function."""
        inside = uniform.double().clamp(1e-7, 1 - 1e-7)
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(inside))


class FlowMatchingConfig(Settings):
    """Settings of a flow matching process. The defaults are rectified flow with uniform times."""

    kind: Literal["flow"] = "flow"
    path: Literal["linear", "gvp"] = Field(
        default="linear", description="(1 - t) x0 + t eps, or cos and sin of t pi / 2 (SiT's GVP)"
    )
    prediction: Parameterization = Field(default="velocity", description="what the network predicts")
    loss: Parameterization = Field(
        default="velocity", description="the quantity of the squared error, independent of the prediction"
    )
    timestep_sampling: Annotated[
        UniformTimesteps | LogitNormalTimesteps,
        BeforeValidator(expand_kind),
        Field(discriminator="kind", description="the distribution of the training times"),
    ] = UniformTimesteps()
    shift: PositiveFloat | Literal["dimension"] = Field(
        default=1.0,
        description="shifts training times to the noise (above 1) or to the data (below 1); dimension: the square root "
        "of the number of values of an input over 4096, so that noise destroys as much detail at every size",
    )
    min_weight: float = Field(
        default=0.05,
        gt=0,
        lt=1,
        description="lower limit of alpha and sigma in the weight of a converted loss: near pure noise and near the "
        "data, errors would be divided by almost 0",
    )
    network_times: tuple[float, float] = Field(
        default=(0.0, 1000.0), description="the network's time input for data and for noise; SiT: 1, 0"
    )

    rounded_times: bool = Field(
        default=False, description="round the network's time down to thousandths, as some schedulers of diffusers do"
    )

    def build(self) -> "FlowMatching":
        return FlowMatching(self)

    def resolve(self, channels: int, size: tuple[int, ...]) -> "FlowMatchingConfig":
        """The settings with shift as a number, for an input of these channels and this size.

        Esser et al. 2024, equation 23: sqrt(m / n).
        """
        if self.shift != "dimension":
            return self
        return self.model_copy(update={"shift": math.sqrt(channels * math.prod(size) / BASE_DIMENSION)})

    def summary(self) -> str:
        """The settings in one line."""
        factor = self.shift if self.shift == "dimension" else f"{self.shift:.3g}"
        shift = f", times shifted by {factor}" if self.shift != 1 else ""
        loss = f", {self.loss} loss" if self.loss != self.prediction else ""
        return f"flow, {self.path} path, {self.prediction} prediction{loss}, {self.timestep_sampling.kind} times{shift}"


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """Shift t to the noise (shift > 1) or to the data (shift < 1) (Esser et al. 2024, equation 23)."""
    return shift * t / (1 + (shift - 1) * t)


class FlowMatching(DiffusionProcess):
    """x_t = alpha(t) x0 + sigma(t) eps from the data at t = 0 to the noise at t = 1."""

    def __init__(self, config: FlowMatchingConfig) -> None:
        if config.shift == "dimension":
            raise ValueError("shift: dimension needs the input size: call FlowMatchingConfig.resolve first")
        self.config = config
        self.shift = float(config.shift)

    @property
    def num_timesteps(self) -> None:
        return None

    def out_channels(self, channels: int) -> int:
        return channels

    # Times

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Training times from uniform numbers in [0, 1): [B] -> [B]"""
        t = shift_timesteps(self.config.timestep_sampling.sample(uniform), self.shift)
        return t.clamp(T_EPS, 1 - T_EPS).to(uniform.dtype)

    def model_time(self, t: Tensor) -> Tensor:
        start, end = self.config.network_times
        t = t.double()
        t = (t * 1000).floor() / 1000 if self.config.rounded_times else t
        return (start + (end - start) * t).to(torch.float32)

    def time_from_nsr(self, ratio: Tensor) -> Tensor:
        """The time at which sigma / alpha is ratio, float64 [B]."""
        ratio = ratio.double()
        return 1 / (1 + 1 / ratio) if self.config.path == "linear" else torch.atan(ratio) * 2 / math.pi

    # Noise

    def alpha(self, t: Tensor) -> Tensor:
        t = t.double()
        return 1 - t if self.config.path == "linear" else torch.sin((1 - t) * math.pi / 2)  # exactly 0 at t = 1

    def sigma(self, t: Tensor) -> Tensor:
        t = t.double()
        return t if self.config.path == "linear" else torch.sin(t * math.pi / 2)

    def schedule_derivative(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The derivatives of alpha and sigma by t, float64 [B] each."""
        if self.config.path == "linear":
            return -torch.ones_like(t, dtype=torch.float64), torch.ones_like(t, dtype=torch.float64)
        return -math.pi / 2 * self.sigma(t), math.pi / 2 * self.alpha(t)

    # Predictions and targets

    def predict(self, raw: Tensor, x: Tensor, t: Tensor) -> Prediction:
        """A raw output [B, C, ...] at x [B, C, ...] and t [B], converted to x0 and eps."""
        raw = raw.to(x.dtype)
        alpha, sigma = self.alpha(t), self.sigma(t)
        if self.config.prediction == "x0":  # without noise, eps is undetermined: any value works
            return Prediction(raw, (x - expand(alpha, x) * raw) / expand(sigma.clamp(min=T_EPS), x))
        if self.config.prediction == "epsilon":  # in pure noise, x0 is undetermined: 0, and see `solver.start_step`
            return Prediction((x - expand(sigma, x) * raw) / expand(alpha.masked_fill(alpha == 0, math.inf), x), raw)
        # v = alpha' x0 + sigma' eps and x = alpha x0 + sigma eps, solved for x0 and eps
        alpha_rate, sigma_rate = self.schedule_derivative(t)
        determinant = alpha * sigma_rate - alpha_rate * sigma
        x0 = expand(sigma_rate / determinant, x) * x - expand(sigma / determinant, x) * raw
        return Prediction(x0, expand(alpha / determinant, x) * raw - expand(alpha_rate / determinant, x) * x)

    def training_target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.config.prediction == "x0":
            return x0
        if self.config.prediction == "epsilon":
            return noise
        alpha_rate, sigma_rate = self.schedule_derivative(t)
        return expand(alpha_rate, x0) * x0 + expand(sigma_rate, x0) * noise

    # Training

    def loss(self, raw: Tensor, x0: Tensor, noise: Tensor, t: Tensor, frames: Tensor | None = None) -> Losses:
        """Mean squared error of the quantity `config.loss`, per sample [B].

        At a given x, the errors of x0, eps and v are one error times 1, alpha / sigma and (alpha sigma' - alpha' sigma)
        / sigma (Li & He 2025, "Back to Basics", table 1). So every prediction can be trained with every loss.
        """
        t = shared_time(t) if frames is None else t
        mse = mean_like(torch.square(raw.to(x0.dtype) - self.training_target(x0, noise, t)), t)
        if self.config.loss == self.config.prediction:
            return Losses(total=mean_of_frames(mse, frames), mse=mean_of_frames(mse, frames))
        weight = self._error_factor(self.config.loss, t) / self._error_factor(self.config.prediction, t)
        total = mean_of_frames(mse * expand(weight**2, mse), frames)
        return Losses(total, mse=mean_of_frames(mse, frames))

    def _error_factor(self, quantity: Parameterization, t: Tensor) -> Tensor:
        """The error of a quantity for an error of 1 in x0, float64 [B]."""
        alpha, sigma = self.alpha(t).clamp(min=self.config.min_weight), self.sigma(t).clamp(min=self.config.min_weight)
        if quantity == "x0":
            return torch.ones_like(sigma)
        if quantity == "epsilon":
            return alpha / sigma
        alpha_rate, sigma_rate = self.schedule_derivative(t)
        return (self.alpha(t) * sigma_rate - alpha_rate * self.sigma(t)) / sigma
