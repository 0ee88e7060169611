"""Checkpoints to and from folders as Hugging Face's libraries read them (docs/huggingface.md)."""
