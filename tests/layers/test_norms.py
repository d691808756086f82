"""RMSNorm against PyTorch's, forward and backward."""

import pytest
import torch

from tessera.layers.norms import RMSNorm


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("size", [1, 8, 192])
def test_rms_norm_matches_pytorch(size, eps):
    ours, theirs = RMSNorm(size, eps), torch.nn.RMSNorm(size, eps, elementwise_affine=False)
    x = 0.1 * torch.randn(3, 5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(3, 5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for norm in (ours, theirs):
        leaf = x.clone().requires_grad_()
        (norm(leaf) * weights).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(*gradients)


def test_the_compiled_norm_is_the_same():
    norm, x = RMSNorm(24), torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.compile(norm, backend="eager", fullgraph=True)(x), norm(x))
