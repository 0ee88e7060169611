"""Two documents packed into one sequence are the two alone: attention, n-gram windows and convolution stop between,
wherever the sequence is divided over ranks."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from ranks import run_ranks
from small_run import LENGTH, VOCAB, build_small_run, small_run_config

from engram_data.batch import Batch, make_batch

FIRST = LENGTH // 3  # tokens of the first document
PACKED, ALONE, OTHER = "packed", "alone", "behind another document"
# What may look across: (separate_documents, cut_at_documents).
ISOLATION = {"both apart": (True, True), "attention across": (False, True), "memory across": (True, False)}


class Layout(NamedTuple):
    tensor: int
    context: int


ONE = Layout(1, 1)
# Both documents alone divide over all of them: 8 and 16 tokens.
LAYOUTS = [ONE, Layout(2, 1), Layout(1, 2), Layout(1, 4), Layout(2, 2)]


def _token_losses(rank: int, world_size: int, layout: Layout) -> dict[tuple[str, str], np.ndarray[Any, Any]]:
    """Cross entropy of the tokens of both documents, in order, by (isolation, how they were given); zeros for tokens
    of other ranks."""
    import torch
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    from engram_megatron.training.conditional_memory import StepRows
    from engram_megatron.training.forward_step import make_microbatch

    overrides = [f"parallel.tensor={layout.tensor}", f"parallel.context={layout.context}"]
    run = build_small_run(small_run_config(overrides=overrides), rank, world_size)
    run.chunks[0].eval()

    def losses(batch: Batch, separate: bool, cut: bool) -> Any:
        length = batch.tokens.shape[1]
        ids = run.memory.hasher.rows(batch.tokens, batch.document_ids if cut else None)
        own_ids = ids[None, :, :, run.ranks.memory_positions(length)]
        rows = StepRows(run.memory.worker.submit(lambda: run.memory.lookup.plan(own_ids)))
        run.memory.fetch(rows)
        memory_LTBE = run.memory.of_microbatch(rows, 0)
        positions = run.ranks.token_positions(length)
        m = make_microbatch(
            batch, memory_LTBE, separate_documents=separate, cut_memory_at_documents=cut, positions=positions
        )
        with torch.no_grad():
            logits = run.chunks[0](m.tokens_BT, m.document_ids_BT, m.memory_LTBE, m.memory_document_ids_BT)
            logits = gather_from_tensor_model_parallel_region(logits)
        every = np.zeros(length)
        every[positions] = torch.nn.functional.cross_entropy(logits[0], m.labels_BT[0], reduction="none").numpy()
        return every[batch.loss_mask[0]]

    window = np.random.default_rng(0).integers(0, VOCAB, LENGTH + 1)
    replaced = np.concatenate([(window[:FIRST] + 1) % VOCAB, window[FIRST:]])
    packed, other = (make_batch([tokens], [np.array([FIRST])], True) for tokens in (window, replaced))
    # The first document's last token has no label in it; the one that it is given here does not count.
    first = make_batch([np.append(window[:FIRST], 0)], [np.array([FIRST])], True)
    alone = [first, make_batch([window[FIRST:]], [np.array([], np.int64)], True)]
    found = {}
    for name, (separate, cut) in ISOLATION.items():
        found[name, PACKED] = losses(packed, separate, cut)
        found[name, OTHER] = losses(other, separate, cut)
        found[name, ALONE] = np.concatenate([losses(part, separate, cut) for part in alone])
    return found


@cache
def _found(layout: Layout) -> dict[tuple[str, str], np.ndarray[Any, Any]]:
    ranks = run_ranks(_token_losses, layout.tensor * layout.context, layout)
    return {key: sum(rank[key] for rank in ranks[:: layout.tensor]) for key in ranks[0]}  # type: ignore[misc]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_packed_documents_have_the_losses_of_the_two_alone(layout: Layout) -> None:
    packed, alone = _found(layout)["both apart", PACKED], _found(layout)["both apart", ALONE]
    # The token that starts the second document is predicted by neither.
    assert packed.shape == alone.shape == (LENGTH - 1,)
    # The second document stands elsewhere in the sequence; its angles are float64 too.
    np.testing.assert_allclose(packed, alone, rtol=0, atol=1e-9)
    np.testing.assert_allclose(packed, _found(ONE)["both apart", PACKED], rtol=0, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_packed_document_does_not_depend_on_the_one_before_it(layout: Layout) -> None:
    packed, other = _found(layout)["both apart", PACKED], _found(layout)["both apart", OTHER]
    np.testing.assert_allclose(packed[FIRST - 1 :], other[FIRST - 1 :], rtol=0, atol=1e-9)
    assert (packed[: FIRST - 1] != other[: FIRST - 1]).all()


@pytest.mark.parametrize("isolation", ["attention across", "memory across"])
def test_without_isolation_the_second_document_sees_the_first(isolation: str) -> None:
    packed = _found(ONE)[isolation, PACKED]
    first = np.abs(packed - _found(ONE)[isolation, ALONE])[: FIRST - 1]
    assert first.max() < 1e-9, "the first document cannot see the second"
    second = np.abs(packed - _found(ONE)[isolation, OTHER])[FIRST - 1 :]
    assert second.max() > 1e-3
