"""What the multistep solvers share: the exact solution of the part of the equation that is linear in x.

With lambda = log(alpha / sigma) the path from t to s is (Lu et al. 2022, "DPM-Solver++", equation 8)

    x_s = sigma_s / sigma_t x_t + sigma_s * integral of exp(lambda) x0(lambda) from lambda_t to lambda_s

and a solver replaces x0(lambda) by the polynomial through what the denoiser said at t and at times before. Its
argument is tau = (lambda - lambda_t) / h with h = lambda_s - lambda_t: 0 at t, 1 at s, below 0 before.

At the noise lambda is minus infinity where alpha is 0, and at the data infinity. A polynomial does not reach there: a
value said at alpha = 0 drops out of it, and a step to the data takes x0 as it was said last. Shapes: B batch.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from tessera.diffusion import DiffusionProcess
from tessera.diffusion.prediction import expand


@dataclass(frozen=True)
class NoiseLevel:
    """How much data and noise there is at a time, float64 [B] each, on the CPU."""

    alpha: Tensor
    sigma: Tensor
    half_log_snr: Tensor  # lambda

    @classmethod
    def at(cls, process: DiffusionProcess, t: Tensor) -> Self:
        alpha, sigma = process.alpha(t), process.sigma(t)
        return cls(alpha, sigma, alpha.log() - sigma.log())


@dataclass(frozen=True)
class History:
    """What the denoiser said at which levels, the newest first: that of the time which a step starts from."""

    levels: tuple[NoiseLevel, ...]
    x0: tuple[Tensor, ...]  # [B, ...] each


def push_history(history: History | None, level: NoiseLevel, x0: Tensor, most: int) -> History:
    """The history with one more entry, of which the `most` newest stay."""
    if history is None:
        return History((level,), (x0,))
    return History((level, *history.levels)[:most], (x0, *history.x0)[:most])


def moments(h: Tensor, count: int) -> list[Tensor]:
    """The integrals over tau from 0 to 1 of h exp(-h (1 - tau)) tau^i, for i below count; [B] each, 1 at infinite h."""
    found = [-torch.expm1(-h)]
    for i in range(1, count):  # by parts
        found.append(1 - i * found[-1] / h)
    return found


def lagrange_weights(h: Tensor, places: list[Tensor]) -> list[Tensor]:
    """The weights of f(tau) - f(0), for each of the places [B], in the integral of h exp(-h (1 - tau)) P(tau).

    P is the polynomial through 0 and all the places, in Newton's form: of divided differences, so that a last place at
    infinity gets weight 0 and leaves the others what they would be without it.
    """
    count = len(places)
    if not count:
        return []
    integrals = moments(h, count + 1)
    at = [torch.zeros_like(h), *places]
    # Divided differences as weights of the f(tau) - f(0): [count, B] each.
    table = [torch.zeros(count, len(h), dtype=h.dtype)]
    table += [one[:, None].expand(count, len(h)) for one in torch.eye(count, dtype=h.dtype)]
    product = [torch.ones_like(h)]  # (tau - at[0]) (tau - at[1]) ..., its coefficients from tau^0 up
    weights = torch.zeros_like(table[0])
    for level in range(1, count + 1):
        table = [(right - left) / (at[i + level] - at[i]) for i, (left, right) in enumerate(pairwise(table))]
        shifted, scaled = [torch.zeros_like(h), *product], [at[level - 1] * of for of in product]
        product = [up - down for up, down in zip(shifted, [*scaled, torch.zeros_like(h)])]
        weights = weights + table[0] * sum(of * integral for of, integral in zip(product, integrals))
    return list(weights)


def linear_combination(
    of_x: Tensor, x: Tensor, scale: Tensor, first: Tensor, weights: list[Tensor], x0: list[Tensor]
) -> Tensor:
    """of_x x + scale (first x0[0] + the weighted differences of the other x0 from x0[0]). Coefficients [B]."""
    left = scale * first
    for weight in weights:
        left = left - scale * weight
    x = torch.addcmul(expand(of_x, x) * x, expand(left, x), x0[0])
    for weight, other in zip(weights, x0[1:]):
        x = torch.addcmul(x, expand(scale * weight, x), other)
    return x


def exp_integrator_step(
    x: Tensor, there: NoiseLevel, history: History, *, ahead: Tensor | None = None, by_length: bool = False
) -> Tensor:
    """x at another level from x [B, ...] at the newest of a history; of the order of the history's length.

    ahead: x0 there, where it is known: one order more (Zhao et al. 2023, "UniC"). Two values are weighed by half of
    their difference, as in "DPM-Solver++", algorithm 2, and "UniPC" with B(h) = exp(h) - 1; by_length is its
    B(h) = h. Three and more are integrated exactly.
    """
    here, known = history.levels[0], list(history.x0[1:])
    h = there.half_log_snr - here.half_log_snr
    inside, first = h.isfinite(), -torch.expm1(-h)
    places = [(before.half_log_snr - here.half_log_snr) / h for before in history.levels[1:]]
    half = 0.5 * (torch.where(inside, h, first) if by_length else first)
    outside = [torch.zeros_like(h)] * len(places)  # the weights in a step that begins at alpha = 0 or ends in the data
    if ahead is not None:
        places, known, outside = [torch.ones_like(h), *places], [ahead, *known], [half, *outside]
    weights = [half / places[0]] if len(places) == 1 else lagrange_weights(h, places)
    weights = [torch.where(inside, weight, other) for weight, other in zip(weights, outside)]
    return linear_combination(there.sigma / here.sigma, x, there.alpha, first, weights, [history.x0[0], *known])
