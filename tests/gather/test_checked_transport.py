"""Damage on the way is caught where it arrives, named, and ends every rank."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from ranks import RanksError, run_ranks
from sharded_tables import Tables, sharded_tables

from engram_megatron.gather.transport import (
    CheckedTransport,
    DamageError,
    GlooTransport,
    LoopbackTransport,
    Member,
    TransportError,
    exercise_pairs,
)

Bytes = NDArray[np.uint8]
Int64 = NDArray[np.int64]
Damage = Callable[[Bytes], Bytes]

SOURCE, DESTINATION = 1, 2


def _flip_a_bit(data: Bytes) -> Bytes:
    data[data.size // 2] ^= 16
    return data


def _shift_by_a_byte(data: Bytes) -> Bytes:
    return np.roll(data, 1)


def _huge(data: Bytes) -> Bytes:
    """Of a count: 2^55 rows."""
    data[6] ^= 128
    return data


class _DamagingGloo(GlooTransport):
    """A network that damages what is called `what` on its way from rank SOURCE to rank DESTINATION."""

    def __init__(self, group: dist.ProcessGroup, damage: Damage, what: str) -> None:
        super().__init__(group)
        self.damage, self.what = damage, what

    def exchange(
        self, rows: torch.Tensor, send_counts: Int64, receive_counts: Int64, *, what: str = "rows", out: Any = None
    ) -> torch.Tensor:
        received = super().exchange(rows, send_counts, receive_counts, what=what, out=out)
        if what == self.what and self.rank == DESTINATION:
            first = int(receive_counts[:SOURCE].sum())
            piece = received[first : first + int(receive_counts[SOURCE])]
            if piece.numel() > 0:
                damaged = self.damage(piece.reshape(-1).view(torch.uint8).numpy().copy())
                piece.copy_(torch.from_numpy(damaged).view(piece.dtype).reshape(piece.shape))
        return received


def _damaged_transport(world_size: int, damage: Damage, what: str) -> CheckedTransport:
    inner = _DamagingGloo(dist.new_group(backend="gloo", timeout=timedelta(seconds=60)), damage, what)
    return CheckedTransport(inner, [Member(rank, f"node-{'abc'[rank]}") for rank in range(world_size)])


def _gather_until_it_fails(transport: CheckedTransport) -> None:
    lookup, _ = sharded_tables(Tables(rows=400, row_dim=8), transport.rank, transport.size)
    lookup.groups = replace(lookup.groups, rail=transport)
    for _ in range(100):
        rows = lookup.read(np.random.default_rng(transport.rank).integers(0, 400, (2, 3, 50)))
        (rows.expand() ** 2).sum().backward()
        lookup.return_gradients(rows)


def _train_until_it_fails(rank: int, world_size: int, folder: Path, damage: Damage, what: str) -> None:
    """As in a run: a rank tells its first error and ends its process, without another word to the others."""
    transport = _damaged_transport(world_size, damage, what)
    with pytest.raises(TransportError) as failure:
        _gather_until_it_fails(transport)
    unfinished = folder / f"unfinished{rank}"
    unfinished.write_text(f"{failure.type.__name__}: {failure.value}")
    unfinished.rename(folder / str(rank))
    if rank > 0:
        os._exit(0)
    while len(list(folder.iterdir())) < world_size:  # the first death that `run_ranks` sees ends all that are left
        time.sleep(0.01)
    raise SystemExit("every rank has failed")


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (_flip_a_bit, "row ids"),
        (_shift_by_a_byte, "row ids"),
        (_flip_a_bit, "rows"),
        (_shift_by_a_byte, "gradients"),
        (_huge, "row counts"),
    ],
)
def test_damage_is_named_where_it_arrives_and_ends_every_rank(damage: Damage, what: str, tmp_path: Path) -> None:
    with pytest.raises(RanksError, match="every rank has failed"):
        run_ranks(_train_until_it_fails, 3, tmp_path, damage, what)
    told = {rank: (tmp_path / str(rank)).read_text() for rank in range(3)}
    assert told[DESTINATION].startswith(
        f"DamageError: rank 2 (node-c) received {what} from rank 1 (node-b) that differ from what was sent: exchange "
    )
    for rank in (0, 1):
        assert told[rank].startswith(f"TransportError: rank {rank} (node-{'ab'[rank]}) could not exchange ")


def _deliver_elsewhere(rank: int, world_size: int) -> tuple[tuple[int, ...], str]:
    """Pieces of ranks 0 and 1 change places on their way to rank 2; they are equal in size, and whole."""

    class Misrouting(GlooTransport):
        def exchange(
            self, rows: torch.Tensor, send_counts: Int64, receive_counts: Int64, *, what: str = "rows", out: Any = None
        ) -> torch.Tensor:
            received = super().exchange(rows, send_counts, receive_counts, what=what, out=out)
            return received[[1, 0, 2]] if self.rank == 2 and what == "rows" and received.dim() == 2 else received

    members = [Member(10 * r, "host") for r in range(world_size)]
    transport = CheckedTransport(Misrouting(dist.new_group(backend="gloo")), members)
    one_each = np.ones(world_size, np.int64)
    try:
        transport.exchange(torch.full((world_size, 6), float(rank)), one_each, one_each)
    except DamageError as error:
        return error.sources, str(error)
    return (), ""


def test_pieces_that_changed_places_are_noticed() -> None:
    answers = run_ranks(_deliver_elsewhere, 3)
    assert [sources for sources, _ in answers] == [(), (), (0, 1)]
    assert "rank 20 (host) received rows from rank 0 (host)" in answers[2][1]
    assert "so do those from 1 other ranks: rank 10 (host)" in answers[2][1]


def _repeat_an_exchange(rank: int, world_size: int) -> str:
    """Rank 1 believes that it is one exchange ahead: what it gets is what the others sent an exchange ago."""
    members = [Member(r, "host") for r in range(world_size)]
    transport = CheckedTransport(GlooTransport(dist.new_group(backend="gloo")), members)
    transport.num_exchanges += rank
    one_each = np.ones(world_size, np.int64)
    with pytest.raises(DamageError) as failure:
        transport.exchange(torch.zeros(world_size, 4), one_each, one_each)
    return str(failure.value)


def test_piece_of_another_exchange_is_noticed() -> None:
    for message in run_ranks(_repeat_an_exchange, 2):
        assert "16 bytes, checksum" in message


def _lose_a_rank(rank: int, world_size: int) -> str:
    members = [Member(r, "host") for r in range(world_size)]
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=3))
    transport = CheckedTransport(GlooTransport(group), members)
    if rank == 1:
        time.sleep(6)  # longer than the group waits
        return ""
    one_each = np.ones(world_size, np.int64)
    with pytest.raises(TransportError) as failure:
        transport.exchange(torch.zeros(world_size, 4), one_each, one_each, what="gradients")
    return str(failure.value)


def test_rank_that_does_not_answer_is_an_error_in_bounded_time() -> None:
    message = run_ranks(_lose_a_rank, 2)[0]
    assert message.startswith("rank 0 (host) could not exchange gradients with the 1 other ranks of its group")
    assert "\n" not in message


def _exercise(rank: int, world_size: int, checked: bool, is_damaged: bool) -> str:
    damage = _flip_a_bit if is_damaged else lambda data: data
    transport = _damaged_transport(world_size, damage, "test bytes")
    try:
        exercise_pairs(transport if checked else transport.inner, sizes=(0, 1, 9, 5003), round_bytes=10_006)
    except TransportError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("checked", [True, False])
def test_exercise_names_the_bad_pair_on_every_rank(checked: bool) -> None:
    pair = "from rank 1 (node-b) to rank 2 (node-c)" if checked else "from rank 1 to rank 2"
    for message in run_ranks(_exercise, 3, checked, True):
        assert message.startswith(f"other bytes arrive than are sent {pair}: ")


def test_exercise_of_a_good_network_says_nothing() -> None:
    assert run_ranks(_exercise, 3, True, False) == [""] * 3
    exercise_pairs(LoopbackTransport())
