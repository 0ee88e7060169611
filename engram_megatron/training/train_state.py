"""Whether a run may continue from a checkpoint, or start from its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engram_checkpoints.train_state import TrainState
from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.hashing.ngram_hasher import identity_difference
from engram_megatron.training.run_folder import check_resumable


@contextmanager
def advice_on_damage() -> Iterator[None]:
    """Around the reading of the checkpoint that a run continues from: an error says how to take the one before."""
    try:
        yield
    except UsageError as error:
        raise UsageError(
            f"{error}; if it is damaged, --resume --set-aside-damaged takes the one before (under torchrun first run "
            "launch/verify_checkpoint.py RUN_DIR --set-aside)"
        ) from error


def check_resume(state: TrainState, config: RunConfig, corpus_fingerprint: str) -> None:
    """Raise `UsageError` where a resume of `state` would not continue the same run, on however many ranks."""
    check_resumable(state.config, config)
    if state.corpus_fingerprint != corpus_fingerprint:
        raise UsageError(
            f"cannot resume: {config.data.corpus} has fingerprint {corpus_fingerprint[:12]}, the checkpoint was "
            f"trained on {state.corpus_fingerprint[:12]}; give the same corpus"
        )


def check_tokenizer(state: TrainState, tokenizer_sha256: str, checkpoint: Path) -> None:
    """Raise `UsageError` where the embeddings of `checkpoint` belong to another tokenizer's ids."""
    if state.tokenizer_sha256 != tokenizer_sha256:
        raise UsageError(
            f"{checkpoint} was trained with another tokenizer (sha256 {state.tokenizer_sha256[:12]}) than the corpus "
            f"was made with ({tokenizer_sha256[:12]}); build the corpus with the checkpoint's tokenizer"
        )


def check_hash_identity(state: TrainState, identity: dict[str, Any] | None, checkpoint: Path) -> None:
    """Raise `UsageError` where rows of `checkpoint` mean other n-grams than this run's."""
    if (state.hash_identity is None) != (identity is None):
        having = "has no Engram tables" if state.hash_identity is None else "has Engram tables"
        wanting = "has none" if identity is None else "needs them"
        raise UsageError(f"{checkpoint} {having}, this run {wanting}")
    if state.hash_identity is not None and identity is not None:
        difference = identity_difference(state.hash_identity, identity)
        if difference:
            raise UsageError(f"{checkpoint} addresses its tables by another hash: {difference}")
