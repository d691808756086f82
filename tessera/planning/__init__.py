"""Parameters, compute, memory, time and money before a run, and laws of compute from many runs."""
