"""Rows of the sharded tables for a rank's batch, and their gradients back to the owners."""
