"""Small trained checkpoints, one for each variant of the model, with the logits that Megatron's model gives on them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from small_run import LENGTH, VOCAB, build_small_run, global_batch, microbatches, numbers, small_run_config
from tokenizers import Tokenizer, models

from engram_checkpoints.train_state import TrainState
from engram_data.batch import Batch
from engram_data.tokenizer import CorpusTokenizer
from engram_megatron.config import ParallelConfig, RunConfig
from engram_megatron.overrides import from_dict

END = 1  # the token that ends documents
SEQUENCES = 3
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp())  # where transformers copies a folder's code


def write_tokenizer(path: Path, first_word: str = "A0") -> Path:
    """`VOCAB` words; a word and its capitals are one to the n-gram hash."""
    words = [first_word, "<|endoftext|>", "<pad>", *(f"{'aA'[i % 2]}{i // 2}" for i in range(3, VOCAB))]
    Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=first_word)).save(str(path))
    return path


def documents() -> Batch:
    """Sequences of 1, 2 and 3 documents, each closed by `END`."""
    rng = np.random.default_rng(7)
    tokens = np.minimum(rng.zipf(1.3, (SEQUENCES, LENGTH)) + 1, VOCAB - 1)
    for sequence in range(SEQUENCES):
        tokens[sequence, rng.choice(np.arange(2, LENGTH - 1), sequence, replace=False)] = END
    starts = np.pad(tokens[:, :-1] == END, ((0, 0), (1, 0)))
    return Batch(
        tokens=tokens.astype(np.int64),
        labels=np.zeros_like(tokens, np.int64),
        loss_mask=np.ones(tokens.shape, bool),
        document_ids=np.cumsum(starts, axis=1, dtype=np.int32),
    )


def save_variants(
    rank: int, world_size: int, folder: Path, tokenizer: Path, variants: Mapping[str, tuple[str, ...]], steps: int = 2
) -> dict[str, Any]:
    """On each rank: train each variant a little, save it to `folder`/name/step; its logits on `documents()`."""
    return {name: _save(rank, world_size, folder / name, tokenizer, variants[name], steps) for name in variants}


def _save(rank: int, world_size: int, folder: Path, tokenizer: Path, overrides: tuple[str, ...], steps: int) -> Any:
    import small_run

    from engram_checkpoints.huggingface.folder_hash import folder_hasher
    from engram_megatron.training.checkpoint_writer import CheckpointWriter
    from engram_megatron.training.checkpointing import Checkpointer, Progress
    from engram_megatron.training.run_folder import RunFolder

    config = small_run_config("float32", overrides)
    small_run.small_hasher = lambda config: folder_hasher(config, tokenizer)
    run = build_small_run(config, rank, world_size)
    for step in range(steps):
        run.trainer.train_step(step, microbatches(global_batch(step), rank, world_size), stop_requested=False)
    corpus: Any = SimpleNamespace(fingerprint="", tokenizer=CorpusTokenizer("toy", tokenizer.read_bytes()).identity)
    folders, writer = RunFolder(folder), CheckpointWriter(run.ranks, 60)
    saver = Checkpointer(folders, run.config, run.ranks, run.chunks, run.optimizer, run.memory, corpus, writer)
    saver.save(Progress(step=steps, tokens_seen=0, skipped=(), recent_losses=[]))
    writer.finish()
    writer.close()
    return logits(run, documents())


def logits_of(rank: int, world_size: int, tokenizer: Path, saved: list[Path], batch: Batch) -> list[Any]:
    """On one rank: what Megatron's model gives with the weights of each checkpoint."""
    import small_run

    from engram_checkpoints.backbone import load_backbone_weights
    from engram_checkpoints.huggingface.folder_hash import folder_hasher
    from engram_checkpoints.tables import load_shard

    small_run.small_hasher = lambda config: folder_hasher(config, tokenizer)
    results = []
    for path in saved:
        config: RunConfig = from_dict(RunConfig, TrainState.read(path).config)
        config = replace(config, parallel=ParallelConfig())
        run = build_small_run(config, rank, world_size, rough=False)
        load_backbone_weights(path / "backbone", run.chunks, run.optimizer)
        if run.memory is not None:
            load_shard(path / "tables.zarr", run.memory.optimizer, weights_only=True)
            run.memory.share_initial()
        results.append(logits(run, batch))
    return results


def logits(run: Any, batch: Batch) -> Any:
    """Of Megatron's model, on one rank."""
    import torch

    from engram_megatron.training.forward_step import make_microbatch

    memory_LTBE = None
    for chunk in run.chunks:
        chunk.eval()
    with torch.no_grad():
        if run.memory is not None:
            rows = run.memory.plan([batch])
            run.memory.fetch(rows)
            memory_LTBE = run.memory.of_microbatch(rows, 0)
        engram = run.config.engram
        m = make_microbatch(
            batch,
            memory_LTBE,
            separate_documents=run.config.data.separate_documents,
            cut_memory_at_documents=engram is not None and engram.cut_at_documents,
        )
        return numbers(run.chunks[0](m.tokens_BT, m.document_ids_BT, m.memory_LTBE, m.memory_document_ids_BT))


def checkpoint(folder: Path, name: str, steps: int = 2) -> Path:
    """Where `save_variants` saved a variant."""
    return folder / name / f"checkpoints/step_{steps:08d}"


def export(source: Path, out: Path, tokenizer: Path | None = None, **options: Any) -> Path:
    """`export_checkpoint` with defaults."""
    from engram_checkpoints.huggingface.export_folder import export_checkpoint

    defaults = {"dtype": None, "shard_bytes": 2**30, "on_file": lambda _name: None}
    export_checkpoint(source, out, tokenizer=tokenizer, **{**defaults, **options})
    return out


def load_model(folder: Path, **options: Any) -> Any:
    """As a user of transformers does."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()
