"""Several linear maps of one input in one matrix: queries, keys and values, or the two halves of a gated MLP."""

from torch import nn


class FusedLinear(nn.Linear):
    """A Linear whose output is that of `maps` maps of equal size, one after the other.

    To the forward pass it is one matrix. An optimizer that treats matrices as wholes asks how many there are.
    """

    def __init__(self, width: int, out: int, num_projections: int, bias: bool = True) -> None:
        super().__init__(width, num_projections * out, bias=bias)
        self.maps = num_projections
