"""Many independent tasks, each a `tessera` command: processes on this machine, Ray or SLURM."""
