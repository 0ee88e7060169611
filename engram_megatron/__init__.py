"""Pretraining of Engram language models on many nodes. Start reading at `config.py` and `training/trainer.py`."""
