"""A network's blocks compiled, from outside."""

import torch

from tessera.models.dit import DiT


def compiled(network: DiT) -> str | None:
    """Compile the blocks in place; where this machine cannot compile, change nothing and return why.

    Block by block, as all are of one make: the first is compiled and the others take what was made for it, and whoever
    calls blocks by themselves (`tessera.adapters.caching`) has them compiled, too.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=next(network.parameters()).device))
    except Exception as error:  # whatever a compiler that is absent, old or broken makes torch raise
        return str(error).strip().partition("\n")[0]
    for block in network.blocks:
        block.compile()
    return None
