"""engram_tiny cut down so that a run costs seconds, its corpus, and whole runs inside forked ranks."""

from __future__ import annotations

import contextlib
import json
import lzma
import os
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engram_data.build import build_corpus
from engram_data.tokenizer import CorpusTokenizer
from engram_data.tokenizer_training import train_tokenizer
from engram_megatron.config import RunConfig
from engram_megatron.overrides import apply_overrides
from engram_megatron.presets import engram_tiny

SAMPLE = Path(__file__).parents[1] / "data_pipeline/samples/sotu.jsonl.xz"
VOCAB_SIZE = 1024
# Two ranks of one expert-parallel group; every mechanism of engram_tiny, six steps, a checkpoint every second.
TINY = (
    *("model.num_layers=2", "model.hidden_size=64", f"model.vocab_size={VOCAB_SIZE}", "model.dense_ffn_size=96"),
    *("model.attention.num_heads=2", "model.attention.kv_lora_rank=16", "model.attention.nope_head_dim=16"),
    *("model.attention.rope_head_dim=8", "model.attention.value_head_dim=16", "model.mhc.num_streams=2"),
    *("model.moe.num_experts=4", "model.moe.top_k=2", "model.moe.expert_ffn_size=32"),
    *("engram.layer_numbers=2", "engram.hash_seed_ids=2", "engram.num_heads_per_order=2"),
    *("engram.rows_per_head=509", "engram.memory_dim=32", "tables.block_rows=512", "data.sequence_length=64"),
    *("training.global_batch_size=4", "training.micro_batch_size=2", "training.num_steps=6"),
    *("training.validation_batches=1", "training.validate_every_steps=0", "checkpoint.every_steps=2"),
    *("optimizer.warmup_steps=2", "parallel.expert=2", "parallel.collective_timeout_s=60"),
)


def build_tiny_corpus(out: Path, vocab_size: int = VOCAB_SIZE, num_documents: int = 24) -> Path:
    """The first addresses of the shipped sample; the tokenizer is trained on half of them."""
    with lzma.open(SAMPLE, "rt", encoding="utf-8") as stream:
        lines = [next(stream) for _ in range(num_documents)]
    source = out.with_suffix(".jsonl")
    source.write_text("".join(lines), encoding="utf-8")
    texts = [json.loads(line)["text"] for line in lines[:12]]
    tokenizer = CorpusTokenizer("tiny", train_tokenizer(texts, vocab_size).encode())
    build_corpus([str(source)], out, tokenizer, 0.2, lambda _progress: None)
    return out


def tiny_config(corpus: Path, run_dir: Path, *overrides: str) -> RunConfig:
    return apply_overrides(engram_tiny(), [*TINY, f"data.corpus={corpus}", f"run_dir={run_dir}", *overrides])


class Start(NamedTuple):
    """One start of a run. `stop_after`: ask for a stop in this many steps. `max_file_bytes`: a disk that fills up.
    `output`: a file for what the first rank prints. `before`: called on every rank first, which it may change."""

    config: RunConfig
    resume: bool = False
    stop_after: int | None = None
    max_file_bytes: int | None = None
    output: Path | None = None
    before: Callable[[], None] | None = None


def run_starts(starts: Sequence[Start], world_size: int = 2) -> list[list[Any]]:
    """Train each of `starts`, one after the other, on fresh process groups of the same forked ranks.

    Returns per rank and start a `RunSummary`, or the class name and text of what it raised.
    """
    from ranks import free_port, run_ranks

    return run_ranks(_train_each, world_size, list(starts), [free_port() for _ in range(len(starts) + 1)])


def _train_each(rank: int, _world_size: int, starts: list[Start], ports: list[int]) -> list[Any]:
    import torch.distributed as dist

    from engram_megatron import platform
    from engram_megatron.training import parallel
    from engram_megatron.training.checkpoint_writer import CheckpointWriter
    from engram_megatron.training.run import train

    results: list[Any] = []
    dist.destroy_process_group()
    write = CheckpointWriter._write
    for start, port in zip(starts, ports, strict=False):
        os.environ["MASTER_PORT"] = str(port)
        platform.limit_threads(1)
        CheckpointWriter._write = _within(start.max_file_bytes, write)  # type: ignore[method-assign]
        if start.before is not None:
            start.before()
        try:
            with contextlib.ExitStack() as stack:
                if start.output is not None and rank == 0:
                    stack.enter_context(contextlib.redirect_stdout(stack.enter_context(start.output.open("w"))))
                results.append(train(start.config, resume=start.resume, stop=_stop_after(start)))
        except Exception as error:
            results.append((type(error).__name__, str(error)))
            parallel.close()
    os.environ["MASTER_PORT"] = str(ports[-1])
    dist.init_process_group("gloo")  # `run_ranks` ends with it
    return results


def _within(num_bytes: int | None, write: Callable[..., Any]) -> Callable[..., Any]:
    """`write`, in which writes beyond `num_bytes` of a file fail with an OSError, as on a full disk. None: no limit."""

    def limited(*arguments: Any) -> Any:
        everything = resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (everything if num_bytes is None else num_bytes, everything))
        try:
            return write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (everything, everything))

    return limited


def _stop_after(start: Start) -> Any:
    """Asks for a stop in step `stop_after` of this start. The loop looks once before its first step, as step 0."""
    from engram_megatron.training.stop_signal import StopSignal

    class Counted(StopSignal):
        asked = -1

        def reason(self) -> str | None:
            self.asked += 1
            due = start.stop_after is not None and self.asked >= start.stop_after
            return "the test" if due else super().reason()

    return Counted(Path(start.config.run_dir))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def train_losses(run_dir: Path) -> dict[int, float]:
    """Step to loss. A step that was logged twice is an error."""
    lines = [line for line in metrics(run_dir) if "train/loss" in line]
    losses = {line["step"]: line["train/loss"] for line in lines}
    assert len(losses) == len(lines), "a step stands twice in metrics.jsonl"
    return losses


def tables(checkpoint: Path) -> dict[str, Any]:
    """Rows and moments of a checkpoint, and its attributes."""
    import zarr

    group = zarr.open_group(checkpoint / "tables.zarr", mode="r")
    arrays = {name: np.asarray(group[name][:]) for name in ("weight", "exp_avg", "exp_avg_sq", "last_step")}
    return arrays | {"step_count": group.attrs["step_count"]}


def finished_weights(checkpoint: Path) -> Any:
    """The weights of all rows as of the checkpoint's step: what is stored is each row as its last gradient left it."""
    from engram_checkpoints.tables import load_shard
    from engram_kernels.catch_up import CatchUp
    from engram_megatron.optimizer.row_adam import RowAdam
    from engram_megatron.tables.row_layout import RowLayout
    from engram_megatron.tables.table_shard import TableShard

    rows, row_dim = tables(checkpoint)["weight"].shape
    adam = RowAdam(TableShard(RowLayout(rows, 4096, 1), 0, row_dim), CatchUp(0.9, 0.95, 1e-20))
    load_shard(checkpoint / "tables.zarr", adam)
    return adam.shard.finished(adam.read_as_of)


def backbone(checkpoint: Path) -> dict[str, Any]:
    """All tensors of a checkpoint's backbone, weights and optimizer state, by global name."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    _load_state_dict(
        state, FileSystemReader(checkpoint / "backbone"), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}{key}.", inner)
        elif isinstance(value, torch.Tensor):
            flat[prefix[:-1]] = value

    walk("", state)
    return flat


def files_under(folder: Path) -> dict[str, int]:
    """Relative path and time of last change of everything below `folder`, but for the signs of life of processes."""
    paths = [path for path in sorted(folder.rglob("*")) if "heartbeats" not in path.parts]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in paths}
