"""Launcher `slurm`: one batch job, with one node agent on each node."""
