"""The frozen weights below an adapter in fewer bits, as QLoRA stores them (Dettmers et al. 2023).

Only the linear layers of the blocks: they hold nearly all weights. Their names, and those of their biases, stay. Each
matrix is dequantized for the forward pass and again for the backward pass, so that no copy of it is held in between.

Shapes: O output features, I input features, G = ceil(O I / 64) blocks.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, pad

from tessera.layers.fused_linear import FusedLinear
from tessera.models.network import Network

BaseFormat = Literal["float32", "bfloat16", "int8", "nf4"]
BLOCK = 64  # weights that share a scale in NF4
# Quantiles of the normal distribution, scaled to -1..1, one of them 0 (Dettmers et al. 2023, appendix E).
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def quantize(weight: Tensor, base_format: BaseFormat) -> tuple[Tensor, Tensor]:
    """The codes and scales of a matrix [O, I].

    bfloat16: [O, I] and none. int8: [O, I] and one scale for each row [O, 1]. nf4: uint8 [G, 32], two weights in each
    byte, and the largest magnitude of each block [G, 1]. The type of the codes identifies the format.
    """
    if base_format == "bfloat16":
        return weight.bfloat16(), weight.new_zeros(0)
    smallest = torch.finfo(torch.float32).tiny
    if base_format == "int8":
        scales = weight.abs().amax(dim=1, keepdim=True) / 127
        return (weight / scales.clamp(min=smallest)).round().to(torch.int8), scales
    blocks = pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    nearest = torch.bucketize(blocks / scales.clamp(min=smallest), (levels[1:] + levels[:-1]) / 2, out_int32=True)
    return (16 * nearest[:, ::2] + nearest[:, 1::2]).to(torch.uint8), scales


def dequantize(codes: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
    """The float32 matrix of `quantize`; shape: [O, I]."""
    if codes.dtype == torch.bfloat16:
        return codes.float()
    if codes.dtype == torch.int8:
        return codes.float().mul_(scales)
    levels = torch.tensor(NF4_LEVELS, device=codes.device)
    pairs = torch.cartesian_prod(levels, levels)  # [256, 2], by byte
    values = embedding(codes.int(), pairs).view(-1, BLOCK).mul_(scales)
    return values.flatten()[: shape[0] * shape[1]].view(shape)


class _FrozenProduct(torch.autograd.Function):
    """linear(x, W, bias) for a constant W and bias. Autograd alone would hold the dequantized W until the backward
    pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, shape: Any) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.shape = shape
        return linear(x, dequantize(codes, scales, shape), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (codes, scales) = gradients, ctx.saved_tensors
        return gradient @ dequantize(codes, scales, ctx.shape).to(gradient.dtype), None, None, None, None


class QuantizedLinear(nn.Linear):
    """A Linear with `codes` and `scales` in place of its weight. `quantize_base` makes it of another."""

    codes: nn.Parameter
    scales: nn.Parameter

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A new float32 tensor: what is written into it has no effect."""
        return dequantize(self.codes, self.scales, (self.out_features, self.in_features))

    def forward(self, input: Tensor) -> Tensor:
        shape = self.out_features, self.in_features
        return _FrozenProduct.apply(input, self.codes, self.scales, self.bias, shape)  # pyright: ignore[reportReturnType]


class QuantizedFusedLinear(QuantizedLinear, FusedLinear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """The same of several projections."""


QUANTIZED: dict[type[nn.Module], type[QuantizedLinear]] = {
    nn.Linear: QuantizedLinear,
    FusedLinear: QuantizedFusedLinear,
}


@torch.no_grad()
def quantize_base(network: Network, base_format: BaseFormat) -> None:
    """Store the weights of all linear layers of the blocks in another format, in place, and freeze these layers."""
    if base_format == "float32":
        return
    for module in network.blocks.modules():
        if type(module) in QUANTIZED:
            assert isinstance(module, nn.Linear)
            codes, scales = quantize(module.weight.float(), base_format)
            del module.weight
            module.__class__ = QUANTIZED[type(module)]
            module.codes, module.scales = (nn.Parameter(each, requires_grad=False) for each in (codes, scales))
            module.requires_grad_(False)
    # A file stays mapped, as a whole, while one tensor in it is used.
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.clone()


def base_format_of(network: Network) -> BaseFormat:
    """The format in which `quantize_base` stored the weights of a network."""
    formats: dict[torch.dtype, BaseFormat] = {torch.bfloat16: "bfloat16", torch.int8: "int8", torch.uint8: "nf4"}
    codes = (module.codes.dtype for module in network.blocks.modules() if isinstance(module, QuantizedLinear))
    for dtype in codes:
        return formats[dtype]
    return "float32"
