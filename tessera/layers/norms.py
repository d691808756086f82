"""Root mean square normalization without learned weights (Zhang & Sennrich 2019, "RMSNorm").

Shapes: D the channels normalized over.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean of x^2 + eps) over the last axis: x [..., D] -> [..., 1]"""
    return torch.rsqrt(torch.linalg.vecdot(x, x)[..., None] / x.shape[-1] + eps)


class RMSNorm(nn.Module):
    """x / rms(x). It has no weight: the modulation or linear layer behind it can represent one."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.width = width
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]"""
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return x * inverse_rms(x, self.eps)  # on a CPU, PyTorch's own is not fused and its backward pass is slow
        return functional.rms_norm(x, (self.width,), eps=self.eps)
