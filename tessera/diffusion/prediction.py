"""The meaning of a network's raw output.

Shapes: B batch.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """The denoiser's answer at (x, t). Every target, velocity and score is linear in x0 and eps."""

    x0: Tensor  # [B, ...] the clean image
    eps: Tensor  # [B, ...] the noise in x
    var_fraction: Tensor | None = (
        None  # [B, ...] learned log-variance: 0 the posterior's, 1 log beta; None: not learned
    )


@dataclass(frozen=True)
class Losses:
    """Per-sample training losses [B]; total is what is minimised."""

    total: Tensor
    mse: Tensor
    vb: Tensor | None = None


def expand(values: Tensor, x: Tensor) -> Tensor:
    """Per-row values [B] on x's device and in its type, shaped to multiply x [B, ...]."""
    # The type first, as not every device has float64; and a GPU is not waited for.
    values = values.to(x.dtype).to(x.device, non_blocking=x.is_cuda)
    return values.view(-1, *(1,) * (x.ndim - 1))


def row_mean(x: Tensor) -> Tensor:
    """The mean over everything but the batch: [B, ...] -> [B]"""
    return x.flatten(1).mean(dim=1)
