"""Tokens for pretraining: text to a zarr corpus, and a corpus to batches. Knows nothing of Engram or Megatron."""
