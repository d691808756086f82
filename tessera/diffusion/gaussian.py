"""Gaussian diffusion in discrete steps with learned variance (Ho et al. 2020; Nichol & Dhariwal 2021).

Time runs from 0 (data) to 1 (noise); step i of n is t = (i + 1) / n. Between these, alpha_bar is interpolated linearly.
Times are [B] tensors on the CPU, like the float64 tables. Shapes: B batch, C channels, O raw output channels.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from tessera.diffusion.process import DiffusionProcess, Losses, Prediction
from tessera.settings import Settings, expand_kind
from tessera.times import expand, mean_like, mean_of_frames, shared_time


class LinearBetas(Settings):
    """Linear betas, scaled so that any number of steps ends at the same noise level (Ho et al. 2020)."""

    kind: Literal["linear"] = "linear"
    start: float = Field(default=1e-4, gt=0, lt=1)
    end: float = Field(default=0.02, gt=0, lt=1)

    def betas(self, num_timesteps: int) -> Tensor:
        scale = 1000 / num_timesteps
        betas = torch.linspace(scale * self.start, scale * self.end, num_timesteps, dtype=torch.float64)
        return betas.clamp(max=0.999)


class CosineBetas(Settings):
    """alpha_bar follows a squared cosine (Nichol & Dhariwal 2021, equation 17)."""

    kind: Literal["cosine"] = "cosine"
    offset: float = Field(default=0.008, ge=0)
    largest_beta: float = Field(default=0.999, gt=0, lt=1)

    def betas(self, num_timesteps: int) -> Tensor:
        t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        alpha_bar = torch.cos((t + self.offset) / (1 + self.offset) * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=self.largest_beta)


class ScaledLinearBetas(Settings):
    """Betas whose square roots are linear (Rombach et al. 2022), and a signal-to-noise ratio that is divided by a
    number (Yang et al. 2024, "CogVideoX")."""

    kind: Literal["scaled-linear"] = "scaled-linear"
    start: float = Field(default=0.00085, gt=0, lt=1)
    end: float = Field(default=0.012, gt=0, lt=1)
    snr_divisor: PositiveFloat = 1.0

    def betas(self, num_timesteps: int) -> Tensor:
        scale = 1000 / num_timesteps
        roots = torch.linspace(
            math.sqrt(scale * self.start), math.sqrt(scale * self.end), num_timesteps, dtype=torch.float64
        )
        betas = (roots**2).clamp(max=0.999)
        if self.snr_divisor == 1:
            return betas
        alpha_bar = torch.cat((torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, dim=0)))
        alpha_bar = alpha_bar / (self.snr_divisor + (1 - self.snr_divisor) * alpha_bar)
        return 1 - alpha_bar[1:] / alpha_bar[:-1]


class UniformWeighting(Settings):
    """The same weight for every time."""

    kind: Literal["uniform"] = "uniform"

    def weight(self, snr: Tensor, prediction: str) -> Tensor:
        return torch.ones_like(snr)


class MinSNRWeighting(Settings):
    """The error of x0 times min(SNR, gamma), SNR the signal-to-noise ratio (Hang et al. 2023, section 3.4)."""

    kind: Literal["min-snr"] = "min-snr"
    gamma: PositiveFloat = 5.0

    def weight(self, snr: Tensor, prediction: str) -> Tensor:
        """The weight of a squared error of epsilon, x0 or v; snr and the result are float64 [B]."""
        if prediction == "x0":
            return snr.clamp(max=self.gamma)
        # min(snr, gamma) / snr, in a form that is valid at snr = 0, where a zero-terminal-SNR schedule ends.
        epsilon_weight = (self.gamma / snr).clamp(max=1)
        return epsilon_weight if prediction == "epsilon" else epsilon_weight * snr / (snr + 1)


class GaussianDiffusionConfig(Settings):
    """Settings of a Gaussian diffusion process. The defaults are those of the DiT paper."""

    kind: Literal["gaussian"] = "gaussian"
    num_timesteps: PositiveInt = Field(default=1000, description="trained timesteps")
    schedule: Annotated[
        LinearBetas | CosineBetas | ScaledLinearBetas,
        BeforeValidator(expand_kind),
        Field(discriminator="kind", description="the noise schedule"),
    ] = LinearBetas()
    prediction: Literal["epsilon", "x0", "v"] = Field(default="epsilon", description="what the network predicts")
    variance: Literal["learned", "posterior", "beta"] = Field(
        default="learned",
        description="learned between the two others, or fixed: posterior (small) or beta (large)",
    )
    weighting: Annotated[
        UniformWeighting | MinSNRWeighting,
        BeforeValidator(expand_kind),
        Field(discriminator="kind", description="the weight of the loss at each timestep"),
    ] = UniformWeighting()
    zero_terminal_snr: bool = Field(
        default=False, description="rescale the schedule so that the last step is pure noise (Lin et al. 2024)"
    )

    @model_validator(mode="after")
    def _check(self) -> "GaussianDiffusionConfig":
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError("zero_terminal_snr needs prediction v or x0: at zero SNR, epsilon does not determine x0")
        if self.zero_terminal_snr and self.num_timesteps == 1:
            raise ValueError("zero_terminal_snr needs 2 steps or more: the first is unchanged, the last is all noise")
        return self

    def build(self) -> "GaussianDiffusion":
        return GaussianDiffusion(self)

    def resolve(self, channels: int, size: tuple[int, ...]) -> "GaussianDiffusionConfig":
        """The same settings for every input size."""
        return self

    def summary(self) -> str:
        """The settings in one line."""
        text = f"Gaussian, {self.num_timesteps} steps, {self.schedule.kind} schedule, {self.prediction} prediction, "
        text += f"{self.variance} variance" + (", zero terminal SNR" if self.zero_terminal_snr else "")
        return text + (f", {self.weighting.kind} weighting" if self.weighting.kind != "uniform" else "")


class GaussianDiffusion(DiffusionProcess):
    """x_t = alpha(t) x0 + sigma(t) eps with alpha^2 + sigma^2 = 1."""

    def __init__(self, config: GaussianDiffusionConfig) -> None:
        self.config = config
        betas = config.schedule.betas(config.num_timesteps)
        # alpha_bar[i] belongs to t = i / num_timesteps; alpha_bar[0] = 1 is the data itself.
        self.alpha_bar = torch.cat((torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, dim=0)))
        if config.zero_terminal_snr:  # Lin et al. 2024, algorithm 1: the first step is unchanged, the last becomes 0
            root = self.alpha_bar[1:].sqrt()
            self.alpha_bar[1:] = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2

    @property
    def num_timesteps(self) -> int:
        return self.config.num_timesteps

    def out_channels(self, channels: int) -> int:
        return 2 * channels if self.config.variance == "learned" else channels

    # Times

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Training times from uniform numbers in [0, 1), all steps equally likely: [B] -> [B]"""
        return ((uniform * self.num_timesteps).floor() + 1) / self.num_timesteps

    def model_time(self, t: Tensor) -> Tensor:
        """t in the units the network was trained in: the step, 0 .. num_timesteps - 1, or a fraction; float32 [B]"""
        return (self._table_index(t) - 1).to(torch.float32)

    def time_from_nsr(self, ratio: Tensor) -> Tensor:
        """The time at which sigma / alpha is ratio, float64 [B]; the first or last step for ratios beyond these."""
        bar = 1 / (1 + ratio.double() ** 2)
        ascending = self.alpha_bar.flip(0)
        upper = torch.searchsorted(ascending, bar).clamp(1, self.num_timesteps)
        low, high = ascending[upper - 1], ascending[upper]  # low < bar <= high
        index = self.num_timesteps - (upper - 1 + ((bar - low) / (high - low)).clamp(0, 1))
        return index.clamp(1, self.num_timesteps) / self.num_timesteps

    def _table_index(self, t: Tensor) -> Tensor:
        """t as a fractional index of alpha_bar, float64 [B]. Rounding errors of float32 times are removed."""
        index = t.double() * self.num_timesteps
        nearest = index.round()
        return torch.where((index - nearest).abs() < 1e-6 * self.num_timesteps, nearest, index)

    def _alpha_bar_at(self, t: Tensor) -> Tensor:
        """alpha_bar at t, float64 [B]."""
        index = self._table_index(t)
        lower = index.floor().to(torch.int64)
        fraction = index - lower
        if not fraction.any():
            return self.alpha_bar[lower]
        return torch.lerp(self.alpha_bar[lower], self.alpha_bar[(lower + 1).clamp(max=self.num_timesteps)], fraction)

    # Noise

    def alpha(self, t: Tensor) -> Tensor:
        return self._alpha_bar_at(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self._alpha_bar_at(t)).sqrt()

    # Predictions and targets

    def predict(self, raw: Tensor, x: Tensor, t: Tensor) -> Prediction:
        """A raw output [B, O, ...] at x [B, C, ...] and t [B], converted to x0, eps and the variance fraction."""
        channels = x.shape[1]
        raw = raw.to(x.dtype)
        mean = raw[:, :channels]
        fraction = (raw[:, channels:] + 1) / 2 if self.config.variance == "learned" else None
        alpha, sigma = self.alpha(t), self.sigma(t)
        if self.config.prediction == "epsilon":
            return Prediction(expand(1 / alpha, x) * x - expand(sigma / alpha, x) * mean, mean, fraction)
        if self.config.prediction == "x0":
            return Prediction(mean, expand(1 / sigma, x) * x - expand(alpha / sigma, x) * mean, fraction)
        # v = alpha eps - sigma x0 (Salimans & Ho 2022, appendix D)
        x0 = expand(alpha, x) * x - expand(sigma, x) * mean
        return Prediction(x0, expand(sigma, x) * x + expand(alpha, x) * mean, fraction)

    def training_target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.config.prediction == "epsilon":
            return noise
        if self.config.prediction == "x0":
            return x0
        return expand(self.alpha(t), x0) * noise - expand(self.sigma(t), x0) * x0

    # The reverse process

    def posterior_mean(self, x0: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Mean of q(x_s | x_t, x0) for s < t (Ho et al. 2020, equation 7, for any two times)."""
        bar_t, bar_s = self._alpha_bar_at(t), self._alpha_bar_at(s)
        alpha = bar_t / bar_s  # of the step from s to t
        x0_factor = (1 - alpha) * bar_s.sqrt() / (1 - bar_t)
        x_factor = (1 - bar_s) * alpha.sqrt() / (1 - bar_t)
        return expand(x0_factor, x) * x0 + expand(x_factor, x) * x

    def log_variances(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(log variance of q(x_s | x_t, x0), log beta) of the step from t to s, float64 [B]: bounds of a learned one.

        The posterior variance is 0 at s = 0. As in the official code, that of the second step is used instead.
        """
        bar_t, bar_s = self._alpha_bar_at(t), self._alpha_bar_at(s)
        beta = 1 - bar_t / bar_s
        is_first = self._table_index(s) == 0
        bar_t = torch.where(is_first, self.alpha_bar[min(2, self.num_timesteps)], bar_t)
        bar_s = torch.where(is_first, self.alpha_bar[1], bar_s)
        posterior = beta if self.num_timesteps == 1 else (1 - bar_t / bar_s) * (1 - bar_s) / (1 - bar_t)
        return posterior.log(), beta.log()

    def p_mean_variance(
        self,
        x: Tensor,
        prediction: Prediction,
        t: Tensor,
        s: Tensor,
        variance: Literal["posterior", "beta"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the model's p(x_s | x_t). The log-variance is shaped to broadcast over x.

        variance: a fixed one instead of that of the settings.
        """
        smallest, largest = self.log_variances(t, s)
        if variance is None and prediction.var_fraction is not None:  # Nichol & Dhariwal 2021, equation 15
            smallest, largest = expand(smallest, x), expand(largest, x)
            log_variance = prediction.var_fraction * largest + (1 - prediction.var_fraction) * smallest
        elif (variance or self.config.variance) == "beta":
            log_variance = expand(torch.where(self._table_index(s) == 0, smallest, largest), x)
        else:
            log_variance = expand(smallest, x)
        return self.posterior_mean(prediction.x0, x, t, s), log_variance

    # Training

    def loss(self, raw: Tensor, x0: Tensor, noise: Tensor, t: Tensor, frames: Tensor | None = None) -> Losses:
        """Mean squared error, plus the variational bound where the variance is learned; per sample [B].

        The bound trains only the variance, because the mean in it is detached. It is not rescaled, as in DiT (Nichol &
        Dhariwal 2021, section 3.1, multiply it by 0.001, for a bound summed over the steps).
        """
        channels, t = x0.shape[1], shared_time(t) if frames is None else t
        raw = raw.to(x0.dtype)
        mean = raw[:, :channels]
        mse = mean_like(torch.square(self.training_target(x0, noise, t) - mean), t)
        weighted = mse
        if isinstance(self.config.weighting, MinSNRWeighting):
            bar = self._alpha_bar_at(t)
            weighted = mse * expand(self.config.weighting.weight(bar / (1 - bar), self.config.prediction), mse)
        if self.config.variance != "learned":
            return Losses(total=mean_of_frames(weighted, frames), mse=mean_of_frames(mse, frames))
        raw = torch.cat((mean.detach(), raw[:, channels:]), dim=1)
        vb = self.vlb_term(raw, x0, self.add_noise(x0, noise, t), t, frames)
        return Losses(total=mean_of_frames(weighted, frames) + vb, mse=mean_of_frames(mse, frames), vb=vb)

    def vlb_term(self, raw: Tensor, x0: Tensor, x: Tensor, t: Tensor, frames: Tensor | None = None) -> Tensor:
        """One term of the variational bound, in bits per dimension [B] (Ho et al. 2020, equation 5).

        KL(q(x_s | x_t, x0) || p(x_s | x_t)), and at the first step the negative log-likelihood of pixels in 256 bins.
        """
        s = t - 1 / self.num_timesteps
        mean, log_variance = self.p_mean_variance(x, self.predict(raw, x, t), t, s)
        true_mean = self.posterior_mean(x0, x, t, s)
        true_log_variance = expand(self.log_variances(t, s)[0], x)
        kl = 0.5 * (
            log_variance
            - true_log_variance
            - 1
            + torch.exp(true_log_variance - log_variance)
            + torch.square(true_mean - mean) * torch.exp(-log_variance)
        )
        likelihood = binned_log_likelihood(x0, mean, 0.5 * log_variance)
        is_first = (self._table_index(s) == 0).to(x.device, non_blocking=x.is_cuda)
        term = torch.where(is_first, mean_like(-likelihood, t), mean_like(kl, t))
        return mean_of_frames(term, frames) / math.log(2)


def binned_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of x's bin, of 256 between -1 and 1, under a Gaussian; the outer bins reach to infinity.

    Ho et al. 2020, equation 13. The normal distribution function is the tanh approximation of the official code, so
    that losses agree with it.
    """
    precision = torch.exp(-log_std)
    above = _normal_cdf((x - mean + 1 / 255) * precision)
    below = _normal_cdf((x - mean - 1 / 255) * precision)
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """Page (1977): 0.5 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
