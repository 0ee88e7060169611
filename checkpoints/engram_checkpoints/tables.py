"""One rank's rows of the tables from disk (`table_format` says what stands there)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engram_checkpoints.table_reader import TableReader
from engram_megatron.errors import UsageError
from engram_megatron.optimizer.row_optimizer import RowOptimizer
from engram_megatron.tables.row_layout import Block
from engram_megatron.tables.table_shard import InitialRows, TableShard, without_history


def load_shard(path: Path, optimizer: RowOptimizer, *, weights_only: bool = False) -> None:
    """Fill the shard of `optimizer` with its rows and moments, and its history with the steps so far, from a group that
    any number of ranks wrote, in blocks of any size.

    `weights_only` takes the weights, as of the last step, and starts the optimizer anew, whatever optimizer trained
    them.
    Raises `UsageError` where there is no such group, where its total_rows, row_dim, dtype or (unless `weights_only`)
    update is another, for a damaged or missing chunk, which it names, and where a lazy shard cannot hold what the group
    has.
    """
    shard, reader = optimizer.shard, TableReader(path)
    _check_fits(reader, shard, None if weights_only else optimizer.rule)
    initial = reader.description.initial
    if shard.commit == "lazy" and (weights_only or initial is None):
        raise UsageError(
            f"tables.commit = lazy makes rows from the seed until they are updated, but those of {path} were started "
            "from another checkpoint (checkpoint.init_from); set tables.commit=eager"
        )
    shard.take_space()
    optimizer.restore(np.empty(0) if weights_only else reader.learning_rates())
    shard.initial = None if weights_only or initial is None else InitialRows(**initial)
    shard.touched_rows = 0
    catch_up = reader.catch_up() if weights_only else None
    blocks = list(shard.layout.blocks(shard.shard))
    for number, block in enumerate(blocks):
        for following in blocks[number + 1 : number + 2]:
            reader.read_ahead(following.start, following.stop)
        for start, stop in reader.pieces(block.start, block.stop):
            piece = Block(block.number, start, stop, block.local_start + start - block.start)
            if weights_only:
                values = without_history(reader.weights(start, stop, catch_up), shard.moments)
                shard.write(np.arange(piece.num_rows) + piece.local_start, values)
            else:
                _load_piece(reader, shard, piece)


def _load_piece(reader: TableReader, shard: TableShard, piece: Block) -> None:
    """Rows of one stored block; a shard that makes rows from the seed takes those that ever had a gradient."""
    last_step = reader.last_step(piece.start, piece.stop)
    shard.touched_rows += int(np.count_nonzero(last_step))
    if shard.initial is not None and not last_step.any():
        shard.set_initial(piece)
        return
    local, rows = np.arange(piece.local.start, piece.local.stop), reader.rows(piece.start, piece.stop)
    if shard.makes_rows:
        touched = np.flatnonzero(last_step)
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
