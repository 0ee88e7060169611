"""A trained model as the start of a larger or other one: one process, no GPU, bounded memory (docs/upgrade.md)."""
