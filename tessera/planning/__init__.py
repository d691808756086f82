"""The cost of a run before it starts, and scaling laws of finished runs."""

FLOPS_PER_MAC = 6  # of training: a multiply-add is two operations, forward and backward are three passes
