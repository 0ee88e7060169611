"""The model in plain PyTorch, as an exported folder carries it.

These files are copied into the folder; they import only torch, transformers and each other.
"""
