"""One rank's rows of the tables from disk (`table_format` says what stands there)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numba
import numpy as np

from engram_checkpoints.table_reader import TableReader
from engram_kernels.catch_up import CatchUp
from engram_kernels.row_state import RowState
from engram_megatron.errors import UsageError
from engram_megatron.optimizer.row_optimizer import RowOptimizer
from engram_megatron.tables.row_layout import Block
from engram_megatron.tables.table_shard import InitialRows, TableShard, without_history

_THREADS = 3  # one waits for the disk while the other unpacks
_PIECES_AHEAD = 5


def load_shard(path: Path, optimizer: RowOptimizer, *, weights_only: bool = False) -> None:
    """Fill the shard of `optimizer` with its rows and moments, and its history with the steps so far, from a group that
    any number of ranks wrote, in blocks of any size.

    `weights_only` takes the weights, as of the last step, and starts the optimizer anew, whatever optimizer trained
    them. Tables that no step has moved yet go on being made from the seed.
    Raises `UsageError` where there is no such group, where its total_rows, row_dim, dtype or (unless `weights_only`)
    update is another, for a damaged or missing chunk, which it names, and where a lazy shard cannot hold what the group
    has.
    """
    shard, reader = optimizer.shard, TableReader(path)
    _check_fits(reader, shard, None if weights_only else optimizer.rule)
    initial = reader.description.initial
    if weights_only and reader.description.step_count > 0:
        initial = None
    if shard.commit == "lazy" and initial is None:
        raise UsageError(
            f"tables.commit = lazy makes rows from the seed until they are updated, but those of {path} were started "
            "from another checkpoint (checkpoint.init_from); set tables.commit=eager"
        )
    shard.take_space()
    optimizer.restore(np.empty(0) if weights_only else reader.learning_rates())
    shard.initial = None if initial is None else InitialRows(**initial)
    shard.touched_rows = 0
    is_anew = weights_only and initial is None
    catch_up = reader.catch_up() if is_anew else None
    # numba's limit is each thread's own: a new one would take all cores, also those of the other ranks of this host.
    limit = numba.get_num_threads()
    with ThreadPoolExecutor(_THREADS, initializer=numba.set_num_threads, initargs=(limit,)) as pool:
        for piece, rows in _read_ahead(pool, reader, shard, catch_up, is_anew=is_anew):
            _take(shard, piece, rows)


def _read_ahead(
    pool: ThreadPoolExecutor, reader: TableReader, shard: TableShard, catch_up: CatchUp | None, *, is_anew: bool
) -> Iterator[tuple[Block, RowState | None]]:
    """The shard's rows piece by piece, each in one stored block, some pieces read before they are asked for.
    `is_anew`: as of the last step, without a history."""

    def read(piece: Block) -> RowState | None:
        for later in islice(pieces_ahead, 1):
            reader.read_ahead(later.start, later.stop)
        if is_anew:
            return without_history(reader.weights(piece.start, piece.stop, catch_up), shard.moments)
        if shard.initial is not None and not reader.last_step(piece.start, piece.stop).any():
            return None
        return reader.rows(piece.start, piece.stop)

    every = [
        Block(block.number, start, stop, block.local_start + start - block.start)
        for block in shard.layout.blocks(shard.shard)
        for start, stop in reader.pieces(block.start, block.stop)
    ]
    pieces, pieces_ahead = iter(every), islice(every, _PIECES_AHEAD, None)
    reading = deque((piece, pool.submit(read, piece)) for piece in islice(pieces, _PIECES_AHEAD))
    while reading:
        piece, rows = reading.popleft()
        yield piece, rows.result()
        reading.extend((piece, pool.submit(read, piece)) for piece in islice(pieces, 1))


def _take(shard: TableShard, piece: Block, rows: RowState | None) -> None:
    """Write a piece; None: none of its rows ever had a gradient. A shard that makes rows from the seed takes the others
    only."""
    if rows is None:
        shard.set_initial(piece)
        return
    local = np.arange(piece.local.start, piece.local.stop)
    shard.touched_rows += int(np.count_nonzero(rows.last_step))
    if shard.makes_rows:
        touched = np.flatnonzero(rows.last_step)
        local, rows = local[touched], rows.exact(touched)
    shard.write(local, rows)


def _check_fits(reader: TableReader, shard: TableShard, update: str | None) -> None:
    """Raise `UsageError` unless the table is the one that `shard` is part of, trained by `update` (None: any)."""
    wanted = {"total_rows": shard.layout.total_rows, "row_dim": shard.row_dim, "dtype": shard.wide.name}
    wanted |= {} if update is None else {"update": update}
    for name, value in wanted.items():
        stored = getattr(reader.description, name)
        if stored != value:
            raise UsageError(
                f"tables in {reader.path} have {name} = {stored}, this run's have {value}; load them with the engram "
                "settings (rows, heads, layers, memory_dim), tables.dtype and tables.update that they were trained with"
            )
