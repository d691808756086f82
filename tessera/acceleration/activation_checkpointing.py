"""Activation checkpointing: activations are recomputed in the backward pass instead of stored.

It takes less memory and more time (Chen et al. 2016, "Training deep nets with sublinear memory cost").
"""

from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tessera.models.network import Network

CheckpointingMode = Literal["none", "selective", "blocks"]

aten = torch.ops.aten
# Operations that are expensive to recompute: matrix products, convolutions, and all attention kernels of PyTorch.
SAVED_OPERATIONS = frozenset(
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


def checkpoint_activations(network: Network, mode: CheckpointingMode) -> None:
    """Set in place what the blocks of a network recompute in the backward pass. The names of the weights do not change.

    blocks: everything. Each block stores only its input, and the forward pass is computed twice. selective: everything
    except matrix products, convolutions and attention. none: nothing. Gradients are the same, bit for bit if operations
    are deterministic. Without gradients, as in sampling, it has no effect. Apply sharding and compilation afterwards.
    """
    for block in network.blocks:
        block.__dict__.pop("forward", None)
        if mode != "none":
            # The same function for all blocks, so that they share compiled code.
            block.forward = MethodType(_recompute_all if mode == "blocks" else _recompute_selectively, block)


def _recompute_all(block: nn.Module, *inputs: Any, **named: Any) -> Any:
    return _checkpointed(block, inputs, named)


def _recompute_selectively(block: nn.Module, *inputs: Any, **named: Any) -> Any:
    return _checkpointed(block, inputs, named, context_fn=partial(create_selective_checkpoint_contexts, _policy))


def _checkpointed(block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], **options: Any) -> Any:
    forward = type(block).forward
    if not torch.is_grad_enabled():
        return forward(block, *inputs, **named)
    # Blocks use no random numbers, so the state of the generator need not be saved.
    return checkpoint(forward, block, *inputs, use_reentrant=False, preserve_rng_state=False, **options, **named)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in SAVED_OPERATIONS else CheckpointPolicy.PREFER_RECOMPUTE
