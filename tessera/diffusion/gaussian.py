"""Gaussian diffusion in discrete steps with learned variance (Ho et al. 2020; Nichol & Dhariwal 2021).

Time runs from 0 (data) to 1 (noise); step i of n is t = (i + 1) / n. A solver may also ask between the trained steps:
alpha_bar is a straight line there. Times are [B] tensors on the CPU, where the float64 tables are. Shapes: B batch,
C channels.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from tessera.diffusion.prediction import Losses, Prediction, expand, row_mean
from tessera.settings import Settings, expand_kind


class LinearBetas(Settings):
    """Betas on a straight line, scaled so that any number of steps ends in the same noise (Ho et al. 2020)."""

    kind: Literal["linear"] = "linear"
    start: float = Field(default=1e-4, gt=0, lt=1)
    end: float = Field(default=0.02, gt=0, lt=1)

    def betas(self, steps: int) -> Tensor:
        scale = 1000 / steps
        return torch.linspace(scale * self.start, scale * self.end, steps, dtype=torch.float64).clamp(max=0.999)


class CosineBetas(Settings):
    """alpha_bar follows a squared cosine (Nichol & Dhariwal 2021, equation 17)."""

    kind: Literal["cosine"] = "cosine"
    offset: float = Field(default=0.008, ge=0)
    largest_beta: float = Field(default=0.999, gt=0, lt=1)

    def betas(self, steps: int) -> Tensor:
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        alpha_bar = torch.cos((t + self.offset) / (1 + self.offset) * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=self.largest_beta)


class UniformWeighting(Settings):
    """Every time counts the same."""

    kind: Literal["uniform"] = "uniform"

    def of(self, snr: Tensor, prediction: str) -> Tensor:
        return torch.ones_like(snr)


class MinSNRWeighting(Settings):
    """The error of x0, weighed by the signal-to-noise ratio, gamma at most (Hang et al. 2023, section 3.4)."""

    kind: Literal["min-snr"] = "min-snr"
    gamma: PositiveFloat = 5.0

    def of(self, snr: Tensor, prediction: str) -> Tensor:
        """The weight of a squared error of epsilon, x0 or v at a signal-to-noise ratio; both float64 [B]."""
        if prediction == "x0":
            return snr.clamp(max=self.gamma)
        # min(snr, gamma) / snr, in a form that holds at snr = 0, where a zero-terminal-SNR schedule ends.
        of_epsilon = (self.gamma / snr).clamp(max=1)
        return of_epsilon if prediction == "epsilon" else of_epsilon * snr / (snr + 1)


class GaussianDiffusionConfig(Settings):
    """The defaults are the process of the DiT paper."""

    kind: Literal["gaussian"] = "gaussian"
    num_timesteps: PositiveInt = 1000
    schedule: Annotated[LinearBetas | CosineBetas, BeforeValidator(expand_kind), Field(discriminator="kind")] = (
        LinearBetas()
    )
    prediction: Literal["epsilon", "x0", "v"] = "epsilon"
    variance: Literal["learned", "posterior", "beta"] = Field(
        default="learned",
        description="learned between the two others, or fixed to one: posterior (small) or beta (large)",
    )
    weighting: Annotated[
        UniformWeighting | MinSNRWeighting, BeforeValidator(expand_kind), Field(discriminator="kind")
    ] = UniformWeighting()
    zero_terminal_snr: bool = Field(
        default=False, description="rescale the schedule so that the last step is pure noise (Lin et al. 2024)"
    )

    @model_validator(mode="after")
    def _fits(self) -> "GaussianDiffusionConfig":
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError("zero_terminal_snr needs prediction v or x0: at zero SNR, epsilon does not determine x0")
        if self.zero_terminal_snr and self.num_timesteps == 1:
            raise ValueError("zero_terminal_snr needs 2 steps or more: the first stays, the last is all noise")
        return self

    def build(self) -> "GaussianDiffusion":
        return GaussianDiffusion(self)

    def resolved(self, channels: int, size: tuple[int, int]) -> "GaussianDiffusionConfig":
        """The same, whatever the network sees."""
        return self

    def summary(self) -> str:
        """In one line, for people."""
        text = f"Gaussian, {self.num_timesteps} steps, {self.schedule.kind} schedule, {self.prediction} prediction, "
        text += f"{self.variance} variance" + (", zero terminal SNR" if self.zero_terminal_snr else "")
        return text + (f", {self.weighting.kind} weighting" if self.weighting.kind != "uniform" else "")


class GaussianDiffusion:
    """x_t = alpha(t) x0 + sigma(t) eps with alpha^2 + sigma^2 = 1."""

    def __init__(self, config: GaussianDiffusionConfig) -> None:
        self.config = config
        betas = config.schedule.betas(config.num_timesteps)
        # alpha_bar[i] belongs to t = i / steps; alpha_bar[0] = 1 is the data itself.
        self.alpha_bar = torch.cat((torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, dim=0)))
        if config.zero_terminal_snr:  # Lin et al. 2024, algorithm 1: the first step stays, the last becomes 0
            root = self.alpha_bar[1:].sqrt()
            self.alpha_bar[1:] = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2

    @property
    def steps(self) -> int:
        """How many times there were in training."""
        return self.config.num_timesteps

    def out_channels(self, channels: int) -> int:
        """Raw output channels a network needs to serve this process."""
        return 2 * channels if self.config.variance == "learned" else channels

    # Times

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) -> the times of training, each of the steps equally likely. [B] -> [B]"""
        return ((uniform * self.steps).floor() + 1) / self.steps

    def model_time(self, t: Tensor) -> Tensor:
        """t -> the units a network is trained in: the step, 0 .. steps - 1, as float32; fractions between steps."""
        return (self._place(t) - 1).to(torch.float32)

    def time_from_nsr(self, ratio: Tensor) -> Tensor:
        """The time at which sigma / alpha is ratio, float64 [B]; the ends of the trained steps for any beyond them."""
        bar = 1 / (1 + ratio.double() ** 2)
        falling = self.alpha_bar.flip(0)
        above = torch.searchsorted(falling, bar).clamp(1, self.steps)  # falling[above - 1] < bar <= falling[above]
        low, high = falling[above - 1], falling[above]
        place = self.steps - (above - 1 + ((bar - low) / (high - low)).clamp(0, 1))
        return place.clamp(1, self.steps) / self.steps

    def _place(self, t: Tensor) -> Tensor:
        """t in steps, float64 [B]: whole numbers are the trained steps, to within the rounding of float32 times."""
        place = t.double() * self.steps
        near = place.round()
        return torch.where((place - near).abs() < 1e-6 * self.steps, near, place)

    def _bar(self, t: Tensor) -> Tensor:
        """alpha_bar at t, float64 [B]."""
        place = self._place(t)
        below = place.floor()
        share, index = place - below, below.to(torch.int64)
        if not share.any():
            return self.alpha_bar[index]
        return torch.lerp(self.alpha_bar[index], self.alpha_bar[(index + 1).clamp(max=self.steps)], share)

    # Noise

    def alpha(self, t: Tensor) -> Tensor:
        """The share of the data in x_t, float64 [B]."""
        return self._bar(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """The share of the noise in x_t, float64 [B]."""
        return (1 - self._bar(t)).sqrt()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """A sample x_t of q(x_t | x0). x0 and noise [B, ...], t [B]"""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * noise

    # What a raw output means

    def predict(self, raw: Tensor, x: Tensor, t: Tensor) -> Prediction:
        """A raw output [B, outputs, ...] at x [B, C, ...] and t [B] as x0, eps and the fraction of log-variance."""
        channels = x.shape[1]
        raw = raw.to(x.dtype)
        mean, fraction = raw[:, :channels], None
        if self.config.variance == "learned":
            fraction = (raw[:, channels:] + 1) / 2
        alpha, sigma = self.alpha(t), self.sigma(t)
        if self.config.prediction == "epsilon":
            return Prediction(expand(1 / alpha, x) * x - expand(sigma / alpha, x) * mean, mean, fraction)
        if self.config.prediction == "x0":
            return Prediction(mean, expand(1 / sigma, x) * x - expand(alpha / sigma, x) * mean, fraction)
        # v = alpha eps - sigma x0 (Salimans & Ho 2022, appendix D)
        x0 = expand(alpha, x) * x - expand(sigma, x) * mean
        return Prediction(x0, expand(sigma, x) * x + expand(alpha, x) * mean, fraction)

    def training_target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the raw output's mean channels are trained towards."""
        if self.config.prediction == "epsilon":
            return noise
        if self.config.prediction == "x0":
            return x0
        return expand(self.alpha(t), x0) * noise - expand(self.sigma(t), x0) * x0

    # The reverse process

    def posterior_mean(self, x0: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Mean of q(x_s | x_t, x0) for s < t (Ho et al. 2020, equation 7, for any pair of times)."""
        bar_t, bar_s = self._bar(t), self._bar(s)
        alpha = bar_t / bar_s  # of the step from s to t
        of_x0 = (1 - alpha) * bar_s.sqrt() / (1 - bar_t)
        of_x = (1 - bar_s) * alpha.sqrt() / (1 - bar_t)
        return expand(of_x0, x) * x0 + expand(of_x, x) * x

    def log_variances(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(log variance of q(x_s | x_t, x0), log beta) of the step from t to s, float64 [B]: the learned one's bounds.

        The posterior variance is 0 at s = 0; as in the official code, that of the second of all steps stands in.
        """
        bar_t, bar_s = self._bar(t), self._bar(s)
        beta = 1 - bar_t / bar_s
        first = self._place(s) == 0
        bar_t = torch.where(first, self.alpha_bar[min(2, self.steps)], bar_t)
        bar_s = torch.where(first, self.alpha_bar[1], bar_s)
        step = 1 - bar_t / bar_s
        posterior = step * (1 - bar_s) / (1 - bar_t)
        if self.steps == 1:
            posterior = beta
        return posterior.log(), beta.log()

    def p_mean_variance(self, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the model's p(x_s | x_t); the log-variance is shaped to broadcast over x."""
        smallest, largest = self.log_variances(t, s)
        if prediction.var_fraction is not None:  # Nichol & Dhariwal 2021, equation 15
            smallest, largest = expand(smallest, x), expand(largest, x)
            log_variance = prediction.var_fraction * largest + (1 - prediction.var_fraction) * smallest
        elif self.config.variance == "beta":
            log_variance = expand(torch.where(self._place(s) == 0, smallest, largest), x)
        else:
            log_variance = expand(smallest, x)
        return self.posterior_mean(prediction.x0, x, t, s), log_variance

    # Training

    def loss(self, raw: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Losses:
        """Mean squared error, plus the variational bound where the variance is learned; per sample [B].

        The bound trains the variance alone: the mean in it is detached. It is not rescaled (DiT's training; Nichol &
        Dhariwal 2021, section 3.1, weigh it by 0.001, for a bound summed over the steps).
        """
        x = self.add_noise(x0, noise, t)
        raw = raw.to(x.dtype)
        mean = raw[:, : x.shape[1]]
        mse = row_mean(torch.square(self.training_target(x0, noise, t) - mean))
        weighted = mse
        if isinstance(self.config.weighting, MinSNRWeighting):
            bar = self._bar(t)
            weighted = mse * expand(self.config.weighting.of(bar / (1 - bar), self.config.prediction), mse)
        if self.config.variance != "learned":
            return Losses(total=weighted, mse=mse)
        vb = self.vlb_term(torch.cat((mean.detach(), raw[:, x.shape[1] :]), dim=1), x0, x, t)
        return Losses(total=weighted + vb, mse=mse, vb=vb)

    def vlb_term(self, raw: Tensor, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """One term of the variational bound, in bits per dimension [B] (Ho et al. 2020, equation 5).

        KL(q(x_s | x_t, x0) || p(x_s | x_t)), and at the first step the negative log-likelihood of pixels in 256 bins.
        """
        s = t - 1 / self.steps
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
        first = (self._place(s) == 0).to(x.device, non_blocking=x.is_cuda)
        return torch.where(first, row_mean(-likelihood), row_mean(kl)) / math.log(2)


def binned_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of x's bin, of 256 between -1 and 1, under a Gaussian; the outer bins reach to infinity.

    Ho et al. 2020, equation 13, with the tanh approximation of the normal distribution function that the official code
    uses, so that losses agree with it.
    """
    precision = torch.exp(-log_std)
    above = _normal_cdf((x - mean + 1 / 255) * precision)
    below = _normal_cdf((x - mean - 1 / 255) * precision)
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """Page (1977): 0.5 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
