"""Two documents packed into one sequence are the two alone: attention, n-gram windows and convolution stop between."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks
from small_run import LENGTH, VOCAB, build_small_run, small_run_config

from engram_data.batch import Batch, make_batch

FIRST = LENGTH // 3  # tokens of the first document
PACKED, ALONE, OTHER = "packed", "alone", "behind another document"
# What may look across: (separate_documents, cut_at_documents).
ISOLATION = {"both apart": (True, True), "attention across": (False, True), "memory across": (True, False)}


def _token_losses(rank: int, world_size: int) -> dict[tuple[str, str], np.ndarray[Any, Any]]:
    """Cross entropy of the tokens of both documents, in order, by (isolation, how they were given)."""
    import torch

    from engram_megatron.training.forward_step import make_microbatch

    run = build_small_run(small_run_config(), rank, world_size)
    run.chunks[0].eval()

    def losses(batch: Batch, separate: bool, cut: bool) -> Any:
        ids = run.memory.hasher.rows(batch.tokens, batch.document_ids if cut else None)
        rows = run.memory.lookup.start(ids[None]).wait()
        memory_LTBE = run.memory.of_microbatch(rows, 0)
        m = make_microbatch(batch, memory_LTBE, separate_documents=separate, cut_memory_at_documents=cut)
        with torch.no_grad():
            logits = run.chunks[0](m.tokens_BT, m.document_ids_BT, m.memory_LTBE, m.memory_document_ids_BT)
        every = torch.nn.functional.cross_entropy(logits[0], m.labels_BT[0], reduction="none")
        return every[m.loss_mask_BT[0]].numpy()

    window = np.random.default_rng(0).integers(0, VOCAB, LENGTH + 1)
    replaced = np.concatenate([(window[:FIRST] + 1) % VOCAB, window[FIRST:]])
    packed, other = (make_batch([tokens], [np.array([FIRST])], True) for tokens in (window, replaced))
    alone = [make_batch([part], [np.array([], np.int64)], True) for part in (window[:FIRST], window[FIRST:])]
    found = {}
    for name, (separate, cut) in ISOLATION.items():
        found[name, PACKED] = losses(packed, separate, cut)
        found[name, OTHER] = losses(other, separate, cut)
        found[name, ALONE] = np.concatenate([losses(part, separate, cut) for part in alone])
    return found


@cache
def _found() -> dict[tuple[str, str], np.ndarray[Any, Any]]:
    return run_ranks(_token_losses, 1)[0]


def test_packed_documents_have_the_losses_of_the_two_alone() -> None:
    packed, alone = _found()["both apart", PACKED], _found()["both apart", ALONE]
    # The token that starts the second document is predicted by neither.
    assert packed.shape == alone.shape == (LENGTH - 1,)
    # Float64, and the first document stands at the same positions in both.
    np.testing.assert_allclose(packed[: FIRST - 1], alone[: FIRST - 1], rtol=0, atol=1e-9)
    # The second does not, and RoPE's angles are float32: 24 radians are rounded by 24 * 2^-24 = 1.4e-6, which changes
    # a score by that times its size, and a loss by less than the largest such change.
    np.testing.assert_allclose(packed, alone, rtol=0, atol=1.4e-6)


def test_a_packed_document_does_not_depend_on_the_one_before_it() -> None:
    packed, other = _found()["both apart", PACKED], _found()["both apart", OTHER]
    np.testing.assert_allclose(packed[FIRST - 1 :], other[FIRST - 1 :], rtol=0, atol=1e-9)
    assert (packed[: FIRST - 1] != other[: FIRST - 1]).all()


@pytest.mark.parametrize("isolation", ["attention across", "memory across"])
def test_without_isolation_the_second_document_sees_the_first(isolation: str) -> None:
    packed = _found()[isolation, PACKED]
    first = np.abs(packed - _found()[isolation, ALONE])[: FIRST - 1]
    assert first.max() < 1e-9, "the first document cannot see the second"
    second = np.abs(packed - _found()[isolation, OTHER])[FIRST - 1 :]
    assert second.max() > 1e-3
