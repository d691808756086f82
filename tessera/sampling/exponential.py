"""Exponential integrator shared by the multistep solvers: the part of the ODE that is linear in x is solved exactly.

With lambda = log(alpha / sigma) the path from t to s is (Lu et al. 2022, "DPM-Solver++", equation 8)

    x_s = sigma_s / sigma_t x_t + sigma_s * integral of exp(lambda) x0(lambda) from lambda_t to lambda_s

A solver replaces x0(lambda) by the polynomial through the denoiser's outputs at t and at earlier times. The argument of
the polynomial is tau = (lambda - lambda_t) / h with h = lambda_s - lambda_t: 0 at t, 1 at s, negative at earlier times.

lambda is minus infinity where alpha is 0 (pure noise) and infinity at the data. The polynomial does not extend there:
an output at alpha = 0 gets weight 0, and a step to the data takes the last x0. Shapes: B batch, T frames with their own
times.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from tessera.diffusion import DiffusionProcess
from tessera.rows import Rows
from tessera.times import expand


@dataclass(frozen=True)
class NoiseLevel(Rows):
    """alpha, sigma and lambda at a time: float64 [B] or [B, T] each, on the CPU."""

    alpha: Tensor
    sigma: Tensor
    half_log_snr: Tensor  # lambda

    @classmethod
    def at(cls, diffusion: DiffusionProcess, t: Tensor) -> Self:
        alpha, sigma = diffusion.alpha(t), diffusion.sigma(t)
        return cls(alpha, sigma, alpha.log() - sigma.log())


@dataclass(frozen=True)
class History(Rows):
    """The denoiser's outputs and their noise levels, newest first: the first is that of the step's start."""

    levels: tuple[NoiseLevel, ...]
    x0: tuple[Tensor, ...]  # [B, ...] each


def push_history(history: History | None, level: NoiseLevel, x0: Tensor, max_length: int) -> History:
    """The history with one more entry, cut to the newest `max_length`."""
    if history is None:
        return History((level,), (x0,))
    return History((level, *history.levels)[:max_length], (x0, *history.x0)[:max_length])


def exp_integrals(h: Tensor, count: int) -> list[Tensor]:
    """The integrals over tau from 0 to 1 of h exp(-h (1 - tau)) tau^i, for i below count; [B] each, 1 at infinite h."""
    integrals = [-torch.expm1(-h)]
    for i in range(1, count):  # integration by parts
        integrals.append(1 - i * integrals[-1] / h)
    return integrals


def lagrange_weights(h: Tensor, nodes: list[Tensor]) -> list[Tensor]:
    """Weights of f(tau) - f(0), for each node [B], in the integral of h exp(-h (1 - tau)) (P(tau) - f(0)).

    P is the polynomial through 0 and all nodes, in Newton's form (divided differences): a last node at infinity gets
    weight 0 and does not change the other weights.
    """
    count = len(nodes)
    if not count:
        return []
    integrals = exp_integrals(h, count + 1)
    taus = [torch.zeros_like(h), *nodes]
    # Divided differences, as weights of f(tau) - f(0): [count, B] each.
    table = [h.new_zeros(count, *h.shape)]
    table += [row.view(-1, *(1,) * h.ndim).expand(count, *h.shape) for row in torch.eye(count, dtype=h.dtype)]
    product = [torch.ones_like(h)]  # coefficients of (tau - taus[0]) (tau - taus[1]) ..., from tau^0 up
    weights = torch.zeros_like(table[0])
    for level in range(1, count + 1):
        table = [(right - left) / (taus[i + level] - taus[i]) for i, (left, right) in enumerate(pairwise(table))]
        shifted, scaled = [torch.zeros_like(h), *product], [taus[level - 1] * c for c in product]
        product = [up - down for up, down in zip(shifted, [*scaled, torch.zeros_like(h)])]
        weights = weights + table[0] * sum(c * integral for c, integral in zip(product, integrals))
    return list(weights)


def linear_combination(
    x_scale: Tensor, x: Tensor, scale: Tensor, first: Tensor, weights: list[Tensor], x0: list[Tensor]
) -> Tensor:
    """x_scale x + scale (first x0[0] + sum of weights[i] (x0[i + 1] - x0[0])). Coefficients [B]."""
    first_scale = scale * first
    for weight in weights:
        first_scale = first_scale - scale * weight
    x = torch.addcmul(expand(x_scale, x) * x, expand(first_scale, x), x0[0])
    for weight, other in zip(weights, x0[1:]):
        x = torch.addcmul(x, expand(scale * weight, x), other)
    return x


def exp_integrator_step(
    x: Tensor, level_s: NoiseLevel, history: History, *, x0_next: Tensor | None = None, bh1: bool = False
) -> Tensor:
    """x [B, ...] from the newest noise level of a history to another one, with the order of the history's length.

    x0_next: x0 at the other level, if known: one order more (Zhao et al. 2023, "UniC"). A single difference is weighted
    by half, as in "DPM-Solver++", algorithm 2, and in "UniPC" with B(h) = exp(h) - 1; bh1 selects B(h) = h. Two or more
    differences are integrated exactly.
    """
    level_t, others = history.levels[0], list(history.x0[1:])
    h = level_s.half_log_snr - level_t.half_log_snr
    finite, first = h.isfinite(), -torch.expm1(-h)
    nodes = [(level.half_log_snr - level_t.half_log_snr) / h for level in history.levels[1:]]
    half = 0.5 * (torch.where(finite, h, first) if bh1 else first)
    end_weights = [torch.zeros_like(h)] * len(nodes)  # in a step that begins at alpha = 0 or ends at the data
    if x0_next is not None:
        nodes, others, end_weights = [torch.ones_like(h), *nodes], [x0_next, *others], [half, *end_weights]
    weights = [half / nodes[0]] if len(nodes) == 1 else lagrange_weights(h, nodes)
    weights = [torch.where(finite, weight, end) for weight, end in zip(weights, end_weights)]
    return linear_combination(level_s.sigma / level_t.sigma, x, level_s.alpha, first, weights, [history.x0[0], *others])
