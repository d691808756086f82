"""Weights in 8 bits, for smaller files: 128 values share a scale (block-wise quantization as in Dettmers et al. 2022,
8-bit Optimizers via Block-wise Quantization, but with equal steps).

A float tensor NAME of 1,024 values or more is two tensors of a file: NAME, int8 of the same shape, and NAME.scale,
bfloat16 [ceil(values / 128)]. A value changes by at most half a step: 1/253 of the largest magnitude in its block.
Smaller tensors stay as they are. In memory the weights are float32 again.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tessera.errors import TesseraError

BLOCK, SMALLEST, LARGEST, SCALE = 128, 1024, 127, ".scale"


def quantize(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict -> the tensors of the file. Raises TesseraError if a weight is not a finite number."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.numel() < SMALLEST:
            tensors[name] = tensor
            continue
        blocks = _blocks(tensor.detach().float())
        scale = (blocks.abs().amax(dim=1) / LARGEST).bfloat16()
        if not bool(torch.isfinite(scale).all()):
            raise TesseraError(f"{name} has weights that are not finite, which have no 8-bit form: write it as float32")
        steps = (blocks / scale.float().where(scale > 0, 1.0)[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8)
        tensors[name] = steps.flatten()[: tensor.numel()].view(tensor.shape)
        tensors[name + SCALE] = scale
    return tensors


def dequantize(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors of a file -> a state dict; those that are not in 8 bits stay as they are.

    source: the file, for the message. Raises TesseraError if scales are missing or of a wrong shape.
    """
    scales = {name + SCALE for name, tensor in tensors.items() if tensor.dtype == torch.int8}
    state = {}
    for name, tensor in tensors.items():
        if name in scales:
            continue
        if tensor.dtype != torch.int8:
            state[name] = tensor
            continue
        scale, blocks = tensors.get(name + SCALE), -(-tensor.numel() // BLOCK)
        if scale is None or tuple(scale.shape) != (blocks,):
            shape = "none" if scale is None else f"{tuple(scale.shape)}"
            raise TesseraError(f"{source}: {name} is in 8 bits and needs {blocks} scales; it has {shape}")
        values = _blocks(tensor.float()) * scale.float()[:, None]
        state[name] = values.flatten()[: tensor.numel()].view(tensor.shape)
    return state


def _blocks(tensor: Tensor) -> Tensor:
    """Any shape -> [ceil(values / 128), 128], with zeros at the end"""
    values = tensor.flatten()
    return torch.nn.functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
