"""Tables and their moments in one zarr v3 group, written and read by any number of ranks.

    tables.zarr/                attributes: total_rows, row_dim, block_rows, dtype, step_count, update, catch_up,
                                initial
      weight/                   [total_rows, row_dim] float32 (float64), one chunk per row block: c.<block>.0
      exp_avg/  exp_avg_sq/     likewise; the former alone where `update` is sinkhorn, whose momentum it is
      last_step/                [total_rows] int32, likewise: c.<block>
      learning_rates/           [step_count] float64, one chunk

The arrays are global and know no rank: a block has one owner, so a chunk has one writer and is always written whole.
Weights are exact: bfloat16 tables save the float32 numbers that they are trained as. A row is saved as it stands, as of
its `last_step`; what has become of it since follows from that and the learning rates of all steps (see `CatchUp`, whose
constants are `catch_up`), so nothing is brought up to date for a save. A block of which no row ever had a gradient is
left out where it has its initial values, a function of `initial` (seed, std). Chunks carry a CRC-32C over the
compressed bytes, so damage and truncation are found; a missing chunk, which zarr would read as zeros, is looked for.
One block is in flight at a time.

Compression is LZ4 after a byte shuffle: where it was measured it cost no time over none, took 5 % off normally
distributed float32 values and all but 0.5 % of the zeros of untouched rows' moments. zstd and bitshuffle took 3 to 4 %
more off the former at about half the speed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from engram_kernels.catch_up import CatchUp
from engram_kernels.row_adam import read_rows
from engram_kernels.row_state import RowState
from engram_megatron.errors import UsageError
from engram_megatron.optimizer.row_optimizer import RowOptimizer
from engram_megatron.tables.row_init import fill_initial_rows
from engram_megatron.tables.row_layout import Block
from engram_megatron.tables.table_shard import InitialRows, TableShard, without_history

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam; the first alone of balanced momentum
LAST_STEP, LEARNING_RATES = "last_step", "learning_rates"
_ATTRIBUTES = ("total_rows", "row_dim", "dtype", "block_rows", "step_count", "update", "catch_up", "initial")


def create(path: Path, optimizer: RowOptimizer) -> None:
    """Make the group for the table that `optimizer` updates a part of, without its rows. One rank calls it; a barrier
    must follow.

    Raises `UsageError` where something stands at `path` already.
    """
    shard, layout = optimizer.shard, optimizer.shard.layout
    try:
        group = zarr.open_group(path, mode="w-", zarr_format=3)
    except FileExistsError as error:
        raise UsageError(f"{path} exists already; tables are never written over others, remove it first") from error
    for name in (WEIGHT, *MOMENTS[: shard.moments]):
        _create_array(group, name, (layout.total_rows, shard.row_dim), (layout.block_rows, shard.row_dim), shard.wide)
    _create_array(group, LAST_STEP, (layout.total_rows,), (layout.block_rows,), np.dtype(np.int32))
    rates = optimizer.learning_rates
    _create_array(group, LEARNING_RATES, rates.shape, (max(1, rates.size),), rates.dtype)[:] = rates
    initial, as_of = shard.initial, optimizer.read_as_of
    group.update_attributes(
        {
            "total_rows": layout.total_rows,
            "row_dim": shard.row_dim,
            "block_rows": layout.block_rows,
            "dtype": shard.wide.name,
            "step_count": optimizer.step_count,
            "update": optimizer.rule,
            "catch_up": None if as_of is None else {"beta1": as_of.beta1, "beta2": as_of.beta2, "eps": as_of.eps},
            "initial": None if initial is None else {"seed": initial.seed, "std": initial.std},
        }
    )


def _create_array(group: Any, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    return group.create_array(
        name,
        shape=shape,
        chunks=chunks,
        dtype=dtype.name,
        filters=None,
        compressors=[BloscCodec(cname="lz4", clevel=1, shuffle="shuffle", typesize=dtype.itemsize), Crc32cCodec()],
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        # By default zarr leaves out chunks of zeros; here a chunk that is not there is a lost one.
        config={"write_empty_chunks": True},
    )


def write_shard(path: Path, shard: TableShard) -> None:
    """Write this rank's rows into the group that `create` made. Ranks may write at the same time."""
    arrays: dict[str, Any] = {
        name: zarr.open_array(path / name, mode="r+", config={"write_empty_chunks": True})
        for name in (WEIGHT, *MOMENTS[: shard.moments], LAST_STEP)
    }
    for block in shard.layout.blocks(shard.shard):
        span, local = slice(block.start, block.stop), np.arange(block.local.start, block.local.stop)
        last_step = shard.last_step[block.local]
        arrays[LAST_STEP][span] = last_step
        if shard.initial is None or last_step.any():
            rows = shard.exact(local)
            arrays[WEIGHT][span] = rows.weight
            for name, moment in zip(MOMENTS, np.hsplit(rows.state, shard.moments), strict=False):
                arrays[name][span] = moment


def load_shard(path: Path, optimizer: RowOptimizer, *, weights_only: bool = False) -> None:
    """Fill the shard of `optimizer` with its rows and moments, and its history with the steps so far, from a group that
    any number of ranks wrote.

    `weights_only` takes the weights, as of the last step, and starts the optimizer anew, whatever optimizer trained
    them. The block size may differ from the stored one; where it is smaller, a stored chunk is read once per block of
    this shard that lies in it.
    Raises `UsageError` where there is no such group, where its total_rows, row_dim, dtype or (unless `weights_only`)
    update is another, for a damaged or missing chunk, which it names, and where a lazy shard cannot hold what the group
    has.
    """
    shard = optimizer.shard
    source = _Source(path, _open_for(path, shard, None if weights_only else optimizer.rule))
    if shard.commit == "lazy" and (weights_only or source.initial is None):
        raise UsageError(
            f"tables.commit = lazy makes rows from the seed until they are updated, but those of {path} were started "
            "from another checkpoint (checkpoint.init_from); set tables.commit=eager"
        )
    shard.take_space()
    optimizer.restore(np.empty(0) if weights_only else source.learning_rates())
    shard.initial = None if weights_only else source.initial
    shard.touched_rows = 0
    catch_up = source.catch_up() if weights_only else None
    for block in shard.layout.blocks(shard.shard):
        for piece in source.pieces(block):
            if weights_only:
                values = without_history(source.finished_weights(piece, catch_up), shard.moments)
                shard.write(np.arange(piece.num_rows) + piece.local_start, values)
            else:
                _load_piece(source, shard, piece)


def _load_piece(source: _Source, shard: TableShard, piece: Block) -> None:
    """Rows of one stored chunk; a shard that makes rows from the seed takes those that ever had a gradient."""
    last_step = source.read(LAST_STEP, piece)
    shard.touched_rows += int(np.count_nonzero(last_step))
    if source.initial is not None and not last_step.any():
        shard.set_initial(piece)
        return
    rows = np.flatnonzero(last_step) if shard.makes_rows else np.arange(piece.num_rows)
    shard.write(rows + piece.local_start, source.rows(piece, last_step, shard.moments).exact(rows))


def _open_for(path: Path, shard: TableShard, update: str | None) -> Any:
    """The group at `path`, if its table is the one that `shard` is part of, trained by `update` (None: any)."""
    try:
        group = zarr.open_group(path, mode="r")
        stored = {name: group.attrs[name] for name in _ATTRIBUTES}
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise UsageError(f"{path} holds no tables of a finished save: {error}") from error
    wanted = {"total_rows": shard.layout.total_rows, "row_dim": shard.row_dim, "dtype": shard.wide.name}
    wanted |= {} if update is None else {"update": update}
    for name, value in wanted.items():
        if stored[name] != value:
            raise UsageError(
                f"tables in {path} have {name} = {stored[name]}, this run's have {value}; load them with the engram "
                "settings (rows, heads, layers, memory_dim), tables.dtype and tables.update that they were trained with"
            )
    return group


class _Source:
    """The arrays of a group, read block by block of a layout whose blocks may have another size."""

    def __init__(self, path: Path, group: Any) -> None:
        self.path = path
        self.group = group
        self.block_rows = int(group.attrs["block_rows"])
        initial = group.attrs["initial"]
        self.initial = None if initial is None else InitialRows(int(initial["seed"]), float(initial["std"]))

    def pieces(self, block: Block) -> list[Block]:
        """The rows of a block, cut where one stored chunk ends and the next begins; `number` is the chunk's."""
        borders = range(block.start // self.block_rows * self.block_rows, block.stop, self.block_rows)
        cuts = [(max(first, block.start), min(first + self.block_rows, block.stop)) for first in borders]
        return [
            Block(start // self.block_rows, start, stop, block.local_start + start - block.start)
            for start, stop in cuts
        ]

    def read(self, name: str, piece: Block) -> NDArray[Any]:
        """A piece's rows of array `name`; raises `UsageError` for a damaged or missing chunk."""
        chunk = f"{name}/c.{piece.number}" + ("" if name == LAST_STEP else ".0")
        rows = f"(rows {piece.start}..{piece.stop - 1})"
        if not (self.path / chunk).is_file():
            raise UsageError(f"{self.path}: chunk {chunk} {rows} is missing; use another save")
        try:
            return np.asarray(self.group[name][piece.start : piece.stop])
        except Exception as error:  # each codec has its own class for bytes that it cannot decode
            raise UsageError(f"{self.path}: chunk {chunk} {rows} is damaged ({error}); use another save") from error

    def rows(self, piece: Block, last_step: NDArray[np.int32], moments: int) -> RowState:
        """A piece's rows, exact."""
        state = np.concatenate([self.read(name, piece) for name in MOMENTS[:moments]], axis=1)
        return RowState(self.read(WEIGHT, piece), state, last_step)

    def finished_weights(self, piece: Block, catch_up: CatchUp | None) -> NDArray[Any]:
        """A piece's weights as of the last step, exact; `catch_up` as of `catch_up()`."""
        last_step = self.read(LAST_STEP, piece)
        if self.initial is not None and not last_step.any():
            array = self.group[WEIGHT]
            values = np.empty((piece.num_rows, array.shape[1]), array.dtype)
            fill_initial_rows(values, piece.start, self.initial.seed, self.initial.std)
            return values
        if catch_up is None:
            return self.read(WEIGHT, piece)
        whole = self.rows(piece, last_step, len(MOMENTS))
        values = np.empty_like(whole.weight)
        read_rows(whole, np.arange(piece.num_rows), values, catch_up)
        return values

    def catch_up(self) -> CatchUp | None:
        """What rows have missed since their last step; None where they have missed nothing."""
        adam = self.group.attrs["catch_up"]
        if adam is None:
            return None
        catch_up = CatchUp(adam["beta1"], adam["beta2"], adam["eps"])
        catch_up.replay(self.learning_rates())
        return catch_up

    def learning_rates(self) -> NDArray[np.float64]:
        """Of all steps so far; raises `UsageError` where they cannot be read."""
        steps = int(self.group.attrs["step_count"])
        chunk = self.path / LEARNING_RATES / "c.0"
        if steps and not chunk.is_file():
            raise UsageError(f"{self.path}: chunk {LEARNING_RATES}/c.0 is missing; use another save")
        try:
            return np.asarray(self.group[LEARNING_RATES][:])
        except Exception as error:
            raise UsageError(f"{self.path}: {LEARNING_RATES} is damaged ({error}); use another save") from error
