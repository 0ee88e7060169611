"""A checkpoint as Megatron's legacy files, one per tensor, pipeline and expert rank.

    TARGET/
      latest_checkpointed_iteration.txt
      iter_0000100/
        mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt
            model (model0, model1, ... with virtual_pipeline)   what `load_state_dict` of the rank's chunk takes
            optimizer      {num_steps, state: {chunk0.module.<parameter>: {exp_avg: ...}}}
            iteration, checkpoint_version, args (the sizes of the layout)
            engram_megatron                                     train_state and the tables' description
        tables/rank_RRRRR_<array>.pt      rows of the r-th of these ranks: blocks of tables.block_rows, dealt in turn
        tables/learning_rates.pt
        manifest.json, COMPLETE           as our format has them; Megatron does not look at them

Files are what `torch.save` writes. They are written tensor by tensor and piece by piece, whatever their size.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engram_checkpoints.backbone_writer import PIECE_BYTES
from engram_checkpoints.checkpoint_files import SummedFile
from engram_checkpoints.checkpoint_source import CheckpointSource, row_bytes
from engram_checkpoints.legacy_layout import LegacyRank, LocalTensor, Part, legacy_ranks, local_tensors
from engram_checkpoints.legacy_reader import (
    RANK_FILE,
    model_key,
    state_key,
    stored_name,
    table_file,
    table_layout,
)
from engram_checkpoints.table_format import LEARNING_RATES
from engram_checkpoints.target_folder import TargetFolder
from engram_checkpoints.tensor_source import TensorInfo, row_pieces
from engram_checkpoints.tensor_tables import row_tensors, table_tensors
from engram_checkpoints.torch_dist_format import TRACKER, iteration_folder, our_state
from engram_checkpoints.torch_file import PlannedTensor, TorchFileWriter
from engram_checkpoints.train_state import TrainState
from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.model.layout_rules import check_model_divides
from engram_megatron.overrides import from_dict
from engram_megatron.tables.row_layout import RowLayout


@dataclass(frozen=True, eq=False)
class _Planned(PlannedTensor):
    """A local tensor, or a state of it (None: the weight itself), of a rank's file."""

    tensor: LocalTensor
    state: str | None


class LegacyWriter:
    """Writes `source` under the layout of `state.config`. `write` does it all."""

    def __init__(
        self,
        source: CheckpointSource,
        state: TrainState,
        *,
        piece_bytes: int = PIECE_BYTES,
        on_bytes: Callable[[int], None] = lambda _bytes: None,
    ) -> None:
        """Raises `UsageError` where the model cannot be divided so, or has tensors that its config does not name."""
        self._source, self._state = source, state
        self._config: RunConfig = from_dict(RunConfig, state.config)
        self._piece_bytes, self._on_bytes = piece_bytes, on_bytes
        self._config.parallel.validate()
        check_model_divides(self._config)
        self._ranks = legacy_ranks(self._config)
        self._check_names()

    @property
    def num_bytes(self) -> int:
        """Of all files together: tensors that ranks hold whole are in each one's file."""
        planned = [p for rank in self._ranks for p in self._planned(rank)]
        return sum(p.info.num_bytes for p in planned) + self._source.table_bytes

    def write(self, target: Path, job: dict[str, Any]) -> None:
        """See `TargetFolder`."""
        folder = TargetFolder(target, job, iteration_folder(self._state.step))
        for rank in self._ranks:
            name = f"{rank.folder(self._config)}/{RANK_FILE}"
            if folder.sums.is_done(name):
                self._on_bytes(sum(planned.info.num_bytes for planned in self._planned(rank)))
                continue
            (folder.folder / name).parent.mkdir(exist_ok=True)
            with io.BufferedWriter(SummedFile(folder.folder / name, folder.sums)) as stream:
                self._write_rank(rank, stream)
            folder.sums.commit(name)
        self._write_tables(folder)
        folder.finish({TRACKER: f"{self._state.step}\n"})

    def _check_names(self) -> None:
        known = {
            stored_name(part, planned.state)
            for rank in self._ranks
            for planned in self._planned(rank)
            for part in planned.tensor.parts
        }
        unknown = sorted(set(self._source.backbone.tensors) - known)
        if unknown:
            raise UsageError(f"{self._source.path} holds {unknown[0]}, which the model of its config does not have")

    def _planned(self, rank: LegacyRank) -> Iterator[_Planned]:
        """The tensors of a rank's file in the order in which they stand there."""
        tensors = list(local_tensors(self._config, rank))
        for state in [None, *self._states()]:
            for tensor in tensors:
                stored = self._source.backbone.tensors.get(stored_name(tensor.parts[0], state))
                if stored is not None:
                    yield _Planned(TensorInfo(tensor.shape, stored.dtype), tensor, state)
                elif state is None:
                    raise UsageError(f"{self._source.path} lacks {tensor.parts[0].name}, which the model has")

    def _states(self) -> list[str]:
        names = self._source.backbone.tensors
        return sorted({name.split(".")[1] for name in names if name.startswith("optimizer.")})

    def _write_rank(self, rank: LegacyRank, stream: Any) -> None:
        with TorchFileWriter(stream, self._content(rank)) as writer:
            for planned in writer.tensors:
                assert isinstance(planned, _Planned)
                for part in planned.tensor.parts:
                    for values in self._part(part, planned):
                        writer.write(values)
                        self._on_bytes(values.nbytes)

    def _part(self, part: Part, planned: _Planned) -> Iterator[torch.Tensor]:
        name = stored_name(part, planned.state)
        whole = self._source.backbone.tensors[name]
        of_part = TensorInfo((part.num_rows, *whole.shape[1:]), whole.dtype)
        for rows in row_pieces(of_part, self._piece_bytes):
            start, stop, _ = rows.indices(part.num_rows)
            values = self._source.backbone.read(name, slice(start + part.first_row, stop + part.first_row))
            yield values if part.columns is None else values[:, part.columns[0] : part.columns[1]]

    def _content(self, rank: LegacyRank) -> dict[str, Any]:
        parallel = self._config.parallel
        description = None if self._source.tables is None else self._source.tables.description
        content = our_state(self._state, description) | {
            "args": {
                "tensor_model_parallel_size": parallel.tensor,
                "pipeline_model_parallel_size": parallel.pipeline,
                "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline,
                "expert_model_parallel_size": parallel.expert,
                "expert_tensor_parallel_size": 1,
            }
        }
        models: dict[str, Any] = {model_key(chunk, self._config): {} for chunk in range(parallel.virtual_pipeline)}
        states: dict[str, dict[str, Any]] = {}
        for planned in self._planned(rank):
            tensor = planned.tensor
            if planned.state is not None:
                states.setdefault(state_key(tensor), {})[planned.state] = planned
                continue
            model = models[model_key(tensor.chunk, self._config)]
            model[tensor.name] = planned
            if tensor.has_extra_state:
                model[f"{tensor.name.removesuffix('weight')}_extra_state"] = None
        return content | models | {"optimizer": {"num_steps": self._source.num_steps, "state": states}}

    def _write_tables(self, folder: TargetFolder) -> None:
        tables = self._source.tables
        if tables is None:
            return
        layout = table_layout(tables.description, self._config)
        (folder.folder / "tables").mkdir(exist_ok=True)
        for rank in range(layout.num_shards):
            if folder.sums.is_done(f"tables of rank {rank}"):
                self._on_bytes(layout.num_local_rows(rank) * row_bytes(tables.description))
            else:
                self._write_rows(folder, layout, rank)
                folder.sums.commit(f"tables of rank {rank}")
        rates = torch.from_numpy(tables.learning_rates())
        with _array_file(folder, f"tables/{LEARNING_RATES}.pt", rates.shape, rates.dtype) as file:
            file.write(rates)

    def _write_rows(self, folder: TargetFolder, layout: RowLayout, rank: int) -> None:
        assert self._source.tables is not None
        description, num_rows = self._source.tables.description, layout.num_local_rows(rank)
        with contextlib.ExitStack() as files:
            writers = {}
            for name, info in table_tensors(description).items():
                array = name.rpartition(".")[2]
                if array != LEARNING_RATES:
                    path, shape = table_file(rank, array), (num_rows, *info.shape[1:])
                    writers[name] = files.enter_context(_array_file(folder, path, shape, info.dtype))
            for block in layout.blocks(rank):
                for name, values in row_tensors(description, self._source.tables.rows(block.start, block.stop)).items():
                    writers[name].write(values)
                self._on_bytes(block.num_rows * row_bytes(description))


@contextlib.contextmanager
def _array_file(
    folder: TargetFolder, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Iterator[TorchFileWriter]:
    """One tensor in a file of its own."""
    with (
        io.BufferedWriter(SummedFile(folder.folder / name, folder.sums)) as stream,
        TorchFileWriter(stream, PlannedTensor(TensorInfo(tuple(shape), dtype))) as writer,
    ):
        yield writer
