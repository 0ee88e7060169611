"""The small part of a checkpoint: what it is a checkpoint of. Readable without torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.hashing.ngram_hasher import identity_difference
from engram_megatron.training.run_folder import COMPLETE, check_resumable, write_json

TRAIN_STATE = "train_state.json"


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The part of a checkpoint that fits in a page."""

    step: int  # updates done
    tokens_seen: int  # tokens whose loss counted
    world_size: int
    corpus_fingerprint: str
    tokenizer_sha256: str
    hash_identity: dict[str, Any] | None
    config: dict[str, Any]

    @classmethod
    def read(cls, checkpoint: Path) -> TrainState:
        """Raises `UsageError` where `checkpoint` is no complete checkpoint or its state cannot be read."""
        if not (checkpoint / COMPLETE).is_file():
            raise UsageError(f"{checkpoint} is not a complete checkpoint (no {COMPLETE} in it)")
        try:
            return cls(**json.loads((checkpoint / TRAIN_STATE).read_text()))
        except (OSError, TypeError, ValueError) as error:
            raise UsageError(
                f"{checkpoint / TRAIN_STATE} is damaged or of another version ({error}); use another checkpoint "
                f"(without {checkpoint / COMPLETE}, --resume takes the one before)"
            ) from error

    def write(self, checkpoint: Path) -> None:
        write_json(checkpoint / TRAIN_STATE, asdict(self))


def check_resume(state: TrainState, config: RunConfig, world_size: int, corpus_fingerprint: str) -> None:
    """Raise `UsageError` where a resume of `state` would not continue the same run."""
    check_resumable(state.config, config)
    if state.world_size != world_size:
        raise UsageError(
            f"cannot resume on {world_size} ranks: the checkpoint was made on {state.world_size}; start as many, or "
            "start a new run with checkpoint.init_from (weights only)"
        )
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
