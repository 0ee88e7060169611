"""Whole checkpoints for tests of the offline tools: of a small trained model, and large ones of noise."""

from __future__ import annotations

from pathlib import Path

from engram_checkpoints.checkpoint_files import FileSums, complete
from engram_checkpoints.train_state import TrainState
from engram_megatron.config import RunConfig
from engram_megatron.layouts.small_model import small_model_config
from engram_megatron.overrides import to_dict

STEPS = 2
# Masters beside bfloat16 weights, compressed queries, an embedding on two stages, experts, four streams.
MODEL = ("model.attention.query_lora_rank=8", "model.mtp.num_layers=1")


def model_config(*overrides: str) -> RunConfig:
    return small_model_config("bfloat16", [*MODEL, *overrides])


def train_state(config: RunConfig, world_size: int = 1, step: int = STEPS) -> TrainState:
    return TrainState(
        step=step,
        tokens_seen=32 * step,
        world_size=world_size,
        corpus_fingerprint="c" * 64,
        tokenizer_sha256="t" * 64,
        hash_identity={"seed": 0, "multipliers": [3, 5]},
        config=to_dict(config),
    )


def train_and_save(rank: int, world_size: int, config: RunConfig, folder: Path) -> None:
    """On each rank: two steps, and a complete checkpoint of them."""
    from engram_megatron.layouts.rank_run import SmallRun, train_steps
    from engram_megatron.layouts.records import Plan
    from engram_megatron.layouts.resume_case import save

    run = SmallRun(config, rank, world_size)
    train_steps(run, Plan(num_steps=STEPS), first=0)
    save(run, folder)
    if rank == 0:
        mark_complete(folder, train_state(config, world_size))


def mark_complete(folder: Path, state: TrainState) -> None:
    """With the sums of what stands in `folder`."""
    sums = FileSums(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            sums.add_written(path)
    state.write(folder, sums)
    complete(folder, sums.flush())


def flip_a_byte(file: Path, place: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 1
    file.write_bytes(content)
