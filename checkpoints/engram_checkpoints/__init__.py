"""Checkpoints of a run, from one parallel layout to another."""
