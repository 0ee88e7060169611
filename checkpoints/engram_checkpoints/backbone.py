"""The backbone's part of a checkpoint: weights and optimizer state in megatron-core's `torch_dist` format.

Every tensor is stored under its global name with its global shape and offset, nothing of the rank count:

    <parameter>                              layers numbered over the model, experts over all ranks
    optimizer.<state>.<parameter>            momentum_buffer | exp_avg, exp_avg_sq | master (bfloat16 runs)
    num_steps                                updates done, once

Weights that megatron-core fuses are stored apart: a gated feed-forward's `linear_fc1.weight_w` (gate) and `_v` (up).
A folder is whole only when the caller has marked it so: nothing here tells a torn save from a finished one.
All functions are collective over all ranks.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

from engram_checkpoints.backbone_load import PartsLoad
from engram_checkpoints.checkpoint_files import FileSums, SummedFile
from engram_megatron import platform
from engram_megatron.errors import UsageError
from engram_megatron.model.parameter_names import unwrapped
from engram_megatron.optimizer.backbone import BackboneOptimizer

_OPTIMIZER_PREFIX = "optimizer."
_NOTHING = "_extra_state"  # megatron-core's layers have one each, for Transformer Engine's FP8 scales; here it is None


def save_backbone(
    folder: Path, model_chunks: Sequence[nn.Module], optimizer: BackboneOptimizer, sums: FileSums
) -> None:
    """Write the weights of all ranks and the optimizer's state into `folder`, which is made if it is not there; `sums`
    takes those of this rank's files."""
    BackboneSnapshot(model_chunks, optimizer).write(folder, sums)
    dist.barrier()


class BackboneSnapshot:
    """What this rank writes of the weights and the optimizer's state, copied to the host's memory when this is made.

    Files are written by this process: megatron-core 0.19.2's own synchronous save is its asynchronous one waited for,
    which spawns a helper process on every rank; a daemonic process may not, and it imports the program's main module
    anew. This does what `dist_checkpointing.save` does, cut in two; the files are the same.
    """

    def __init__(self, model_chunks: Sequence[nn.Module], optimizer: BackboneOptimizer) -> None:
        """Collective, on the default group; raises `CheckpointingException` where ranks do not make up all tensors."""
        sharded, common = save_preprocess(_sharded_state(model_chunks, optimizer))
        sharded["common_state"] = ShardedObject("common_state", common, (1,), (0,), replica_id=dist.get_rank())
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        for part in (part for parts in by_key.values() for part in parts if isinstance(part, ShardedTensor)):
            part.data = part.data.detach().to("cpu", copy=True)
        self._state = mcore_to_pyt_state_dict(by_key, False)

    def write(self, folder: Path, sums: FileSums, group: dist.ProcessGroup | None = None) -> None:
        """Write into `folder`, which is made if it is not there; `sums` takes those of this rank's files. Collective on
        `group` (None: the default) alone, so that a thread may call it; a barrier must follow.

        Raises:
            CheckpointException: a rank could not write; on all ranks.
            OSError: rank 0 could not write metadata.json; there alone.
        """
        planner = MCoreSavePlanner(
            dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False
        )
        # Nothing is to be copied ahead from a GPU, which would take a stream on this thread's device: the first GPU.
        writer = FileSystemWriter(folder, sync_files=False, per_thread_copy_ahead=0)
        writer.fs = _SummedFileSystem(sums)
        save_state_dict(self._state, storage_writer=writer, planner=planner, process_group=group)
        if dist.get_rank() == 0:
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))
            sums.add_written(folder / "metadata.json")


class _SummedFileSystem(FileSystem):
    """Opens files that add themselves to `sums`."""

    def __init__(self, sums: FileSums) -> None:
        self._sums = sums

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Called for new files, and to read none."""
        assert mode == "wb", mode
        with io.BufferedWriter(SummedFile(Path(path), self._sums)) as stream:
            yield stream

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self._sums.rename(Path(path), Path(new_path))


def load_backbone(folder: Path, model_chunks: Sequence[nn.Module], optimizer: BackboneOptimizer) -> None:
    """Resume: read what `save_backbone` wrote into the chunks and the optimizer, bit for bit.

    Raises `UsageError` on every rank where the folder holds no checkpoint, lacks a tensor that the model has, has a
    tensor that the model lacks, or holds one of another shape; then nothing was changed. Raises it for a file that is
    damaged, too.
    """
    _check(folder, _sharded_state(model_chunks, optimizer), ignored_prefix=None)
    loaded = _read(folder, _sharded_state(model_chunks, optimizer))
    _load_weights(model_chunks, loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])


def load_backbone_weights(folder: Path, model_chunks: Sequence[nn.Module], optimizer: BackboneOptimizer) -> None:
    """Start from the weights of another run: read the weights alone; the optimizer's state stays as it is.

    The optimizer takes its masters from the weights that were read. Raises as `load_backbone` does.
    """
    _check(folder, _sharded_state(model_chunks, None), ignored_prefix=_OPTIMIZER_PREFIX)
    loaded = _read(folder, _sharded_state(model_chunks, None))
    _load_weights(model_chunks, loaded["model"])
    optimizer.reload_masters()


def _read(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Load the tensors that `state` names. A file that cannot be read is a `UsageError` on the ranks that met it."""
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(folder), sharded_strategy=PartsLoad())
    except (Exception, CheckpointException) as error:  # what the damage happens to break: pickle, zip, end of file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UsageError(f"{folder} is damaged ({reason}); use another checkpoint") from error
    return loaded


def _sharded_state(model_chunks: Sequence[nn.Module], optimizer: BackboneOptimizer | None) -> dict[str, Any]:
    # singleton_local_shards: one key per layer and expert, no axis of layers or experts put before the tensor's own.
    # Keys then name what they hold, and any other layout asks for whole keys.
    metadata = {
        "singleton_local_shards": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    model = {
        f"chunk{number}": {
            name: value
            for name, value in unwrapped(chunk).sharded_state_dict(metadata=metadata).items()
            if not name.endswith(_NOTHING)
        }
        for number, chunk in enumerate(model_chunks)
    }
    state: dict[str, Any] = {"model": model}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(model)
    return state


def _load_weights(model_chunks: Sequence[nn.Module], loaded: dict[str, Any]) -> None:
    for number, chunk in enumerate(model_chunks):
        missing, unexpected = unwrapped(chunk).load_state_dict(loaded[f"chunk{number}"], strict=False)
        assert not unexpected, unexpected
        assert all(name.endswith(_NOTHING) for name in missing), missing


def _check(folder: Path, state: dict[str, Any], *, ignored_prefix: str | None) -> None:
    """Raise `UsageError` on all ranks for the first tensor that does not fit, before anything is read."""
    present = dist_checkpointing.check_is_distributed_checkpoint(str(folder))
    _raise_first(None if present else f"{folder} holds no backbone checkpoint (metadata.json is missing)")
    stored = {key: value.global_shape for key, value in dist_checkpointing.load_tensors_metadata(str(folder)).items()}
    apply_factories(state)
    wanted = {v.key: v.global_shape for v in nested_values(state) if isinstance(v, ShardedTensor)}
    _raise_first(_first_misfit(folder, wanted, stored))
    if ignored_prefix is not None:
        stored = {key: shape for key, shape in stored.items() if not key.startswith(ignored_prefix)}
    _raise_first(_first_unused(folder, set(wanted), sorted(stored)))


def _first_misfit(folder: Path, wanted: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]]) -> str | None:
    for key, shape in sorted(wanted.items()):
        if key not in stored:
            return f"{folder} has no tensor {key}, which this model has with shape {tuple(shape)}: other configuration?"
        if tuple(stored[key]) != tuple(shape):
            return f"{folder}: {key} has shape {tuple(stored[key])}, this model needs {tuple(shape)}"
    return None


def _first_unused(folder: Path, wanted: set[str], stored: list[str]) -> str | None:
    """The first stored tensor that no rank wants; the same answer on every rank."""
    used = torch.tensor([key in wanted for key in stored], dtype=torch.int32, device=platform.device())
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    unused = [key for key, flag in zip(stored, used.tolist(), strict=True) if not flag]
    if not unused:
        return None
    return f"{folder} has {unused[0]} and {len(unused) - 1} more tensors that this model lacks: other configuration?"


def _raise_first(problem: str | None) -> None:
    """Raise the problem of the lowest rank that has one, on all ranks: nobody waits for a rank that gave up."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise UsageError(found)
