"""Who holds which positions: everything once, in pieces of one size, with the same causal work for every rank."""

from __future__ import annotations

import numpy as np
import pytest

from engram_megatron.model.sequence_partition import SequencePartition

SIZES = [(context, tensor) for context in (1, 2, 3, 4) for tensor in (1, 2, 3, 4)]


@pytest.mark.parametrize(("context", "tensor"), SIZES)
def test_every_position_has_one_owner_and_pieces_are_runs_of_one_length(context: int, tensor: int) -> None:
    partition = SequencePartition(context=context, tensor=tensor)
    length = 5 * partition.divisor
    held = [partition.positions(length, rank) for rank in range(partition.num_ranks)]
    np.testing.assert_array_equal(np.sort(np.concatenate(held)), np.arange(length))
    for rank, positions in enumerate(held):
        pieces = [np.arange(start, start + 5) for start in partition.piece_starts(length, rank)]
        assert len(pieces) == partition.num_pieces == (1 if context == 1 else 2)
        np.testing.assert_array_equal(positions, np.concatenate(pieces))


@pytest.mark.parametrize(("context", "tensor"), SIZES)
def test_tensor_ranks_hold_consecutive_slices_of_what_their_context_rank_holds(context: int, tensor: int) -> None:
    partition = SequencePartition(context=context, tensor=tensor)
    length = 3 * partition.divisor
    for context_rank in range(context):
        slices = [partition.positions(length, context_rank * tensor + rank) for rank in range(tensor)]
        whole = partition.context_positions(length, context_rank)
        np.testing.assert_array_equal(np.concatenate(slices), whole)
        runs = [np.arange(run.start, run.stop) for run in partition.chunks(length, context_rank)]
        np.testing.assert_array_equal(np.concatenate(runs), whole)


@pytest.mark.parametrize("context", [2, 3, 4])
def test_zigzag_is_megatron_cores_and_gives_every_context_rank_the_same_causal_work(context: int) -> None:
    partition = SequencePartition(context=context)
    length = 4 * partition.divisor
    chunks = np.arange(length).reshape(2 * context, -1)
    work = set()
    for rank in range(context):
        positions = partition.context_positions(length, rank)
        # get_pos_emb_on_this_cp_rank and get_batch_on_this_cp_rank of megatron-core 0.19.2
        np.testing.assert_array_equal(positions, chunks[[rank, 2 * context - 1 - rank]].ravel())
        work.add(int((positions + 1).sum()))  # keys that its queries see
    assert work == {length * (length + 1) // 2 // context}


def test_two_context_ranks_of_two_tensor_ranks() -> None:
    """Written out by hand, for 16 positions in 8 blocks."""
    partition = SequencePartition(context=2, tensor=2)
    held = [partition.positions(16, rank).tolist() for rank in range(4)]
    assert held == [[0, 1, 2, 3], [12, 13, 14, 15], [4, 5, 6, 7], [8, 9, 10, 11]]
    three = SequencePartition(context=2, tensor=3)  # the middle tensor rank has the end of one chunk, the start of one
    assert three.positions(12, 1).tolist() == [2, 9]


def test_length_that_does_not_divide_is_told_apart_from_one_that_does() -> None:
    partition = SequencePartition(context=2, tensor=3)
    assert partition.block_length(24) == 2
    with pytest.raises(AssertionError, match="18 positions do not divide over 6 ranks in 12 blocks"):
        partition.positions(18, 0)
