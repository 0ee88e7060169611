"""The small part of a checkpoint: what it is a checkpoint of. Readable without torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engram_checkpoints.checkpoint_files import FileSums, read_manifest, sum_of
from engram_megatron.errors import UsageError

TRAIN_STATE = "train_state.json"
FORMAT = 1  # of checkpoint folders; raised when an older reader would misread them


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The part of a checkpoint that fits in a page."""

    step: int  # updates done
    tokens_seen: int  # tokens whose loss counted
    world_size: int  # ranks that wrote it; any number may read it
    corpus_fingerprint: str
    tokenizer_sha256: str
    hash_identity: dict[str, Any] | None
    config: dict[str, Any]
    skipped_samples: list[list[int]] = field(
        default_factory=list
    )  # windows of the order: `engram_data.skipped_samples`
    recent_losses: list[float] = field(default_factory=list)  # that a spike of the loss is told by, oldest first
    format: int = FORMAT

    @classmethod
    def read(cls, checkpoint: Path) -> TrainState:
        """Raises `UsageError` where `checkpoint` is no complete checkpoint, its state is damaged, or a version of this
        code wrote it whose format is another."""
        wanted = read_manifest(checkpoint).get(TRAIN_STATE)
        path = checkpoint / TRAIN_STATE
        try:
            if sum_of(path) != wanted:
                raise ValueError(f"its CRC-32C is not that of the manifest (CRC-32C {sum_of(path).crc32c:08x})")
            values = json.loads(path.read_text())
            if values["format"] != FORMAT:
                raise UsageError(
                    f"{checkpoint} has checkpoint format {values['format']}, this version reads format {FORMAT}; use "
                    "the version of engram-megatron that wrote it"
                )
            return cls(**values)
        except (OSError, TypeError, ValueError, KeyError) as error:
            raise UsageError(f"{path} is damaged ({error}); use another checkpoint") from error

    def write(self, checkpoint: Path, sums: FileSums) -> None:
        sums.write_json(checkpoint / TRAIN_STATE, asdict(self))
