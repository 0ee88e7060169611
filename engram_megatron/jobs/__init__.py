"""Runs under Slurm: what is submitted, what happened to it, and what one sees of it."""
