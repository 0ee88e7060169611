"""Where everything meets: process groups, the training step, checkpoints, logs. Start at `trainer.py`."""
