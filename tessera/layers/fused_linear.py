"""Several linear projections of one input in one matrix: queries, keys and values, or the two halves of a gated MLP."""

from torch import nn


class FusedLinear(nn.Linear):
    """A Linear whose output is the concatenated outputs of `num_projections` linear layers of equal size.

    An optimizer that works on whole matrices reads `num_projections` to split the weight.
    """

    def __init__(self, in_features: int, out_features: int, num_projections: int, bias: bool = True) -> None:
        """out_features: of each projection."""
        super().__init__(in_features, num_projections * out_features, bias=bias)
        self.num_projections = num_projections
