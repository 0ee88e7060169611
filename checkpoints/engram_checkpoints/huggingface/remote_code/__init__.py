"""The model in plain PyTorch, as an exported folder carries it: these files are copied into the folder and import only torch,
transformers and each other."""
