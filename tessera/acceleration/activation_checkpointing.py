"""Activations recomputed in the backward pass in place of being kept (Chen et al. 2016, "Training deep nets with
sublinear memory cost"), from outside: less memory for more time.

Shapes: B batch, L tokens, D width.
"""

from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tessera.models.network import Network

CheckpointingMode = Literal["none", "selective", "blocks"]

aten = torch.ops.aten
# What costs much to compute again: matrix products, convolutions, and attention in all the forms PyTorch chooses from.
KEPT = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.convolution.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_fused_attention_overrideable.default,
        aten._scaled_dot_product_attention_math_for_mps.default,
    }
)


def checkpoint_activations(network: Network, what: CheckpointingMode) -> None:
    """Choose what the blocks of a network compute again in the backward pass; in place, and names of weights stay.

    blocks: everything; each block keeps its input alone, and the forward pass is paid for twice. selective: all but
    matrix products, convolutions and attention. none: nothing. Gradients are the same, to the bit where operations are
    deterministic. Without gradients, as in drawing, nothing changes. Sharding and compilation come after it.
    """
    for block in network.blocks:
        block.__dict__.pop("forward", None)
        if what != "none":
            # One function for all blocks, so that what is compiled for one serves the others.
            block.forward = MethodType(_wholly if what == "blocks" else _selectively, block)


def _wholly(block: nn.Module, x: Tensor, context: Any) -> Tensor:
    return _recomputed(block, x, context)


def _selectively(block: nn.Module, x: Tensor, context: Any) -> Tensor:
    return _recomputed(block, x, context, context_fn=partial(create_selective_checkpoint_contexts, _keep))


def _recomputed(block: nn.Module, x: Tensor, context: Any, **how: Any) -> Tensor:
    forward = type(block).forward
    if not torch.is_grad_enabled():
        return forward(block, x, context)
    # Nothing in a block is random: there is no state of a generator to keep.
    return checkpoint(forward, block, x, context, use_reentrant=False, preserve_rng_state=False, **how)


def _keep(context: Any, operation: Any, *inputs: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
