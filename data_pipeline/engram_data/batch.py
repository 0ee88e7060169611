"""One microbatch of one rank, and how a window of tokens becomes a row of it.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Batch:
    """`tokens` int64[B, T]; `labels` int64[B, T], the next tokens; `loss_mask` bool[B, T], where the loss counts;
    `document_ids` int32[B, T], which document of its sample a token belongs to: 0 for the first one of the window
    (whole or not), one more at every document start, whether documents are kept apart or not.

    Where documents are kept apart, the loss does not count at positions whose label is the first token of another
    document: that token would be predicted from a document of which the model may see nothing afterwards, and which
    has nothing to do with it. So two documents packed into one sample give the loss of the two alone. Where they are
    packed as one stream of text, the loss counts everywhere.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    document_ids: NDArray[np.int32]


def make_batch(
    windows: Sequence[NDArray[Any]], document_starts: Sequence[NDArray[np.int64]], separate_documents: bool
) -> Batch:
    """A batch of B `windows` of T + 1 tokens; documents start at the offsets `document_starts[b]`, each in 1..T."""
    window_BS = np.stack(windows).astype(np.int64)
    starts_BS = np.zeros(window_BS.shape, np.int32)
    for row, starts in zip(starts_BS, document_starts, strict=True):
        row[starts] = 1
    document_ids_BS = np.cumsum(starts_BS, axis=1, dtype=np.int32)
    if separate_documents:
        loss_mask = starts_BS[:, 1:] == 0
    else:
        loss_mask = np.ones((len(window_BS), window_BS.shape[1] - 1), bool)
    return Batch(
        tokens=np.ascontiguousarray(window_BS[:, :-1]),
        labels=np.ascontiguousarray(window_BS[:, 1:]),
        loss_mask=loss_mask,
        document_ids=np.ascontiguousarray(document_ids_BS[:, :-1]),
    )


def after_next(batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(labels int64 [B, T], loss mask bool [B, T]) of the tokens after the next, for multi-token prediction.

    The mask is True where position, next token and the one after it count as one text: not across a document start
    where documents are kept apart, and not at the last position, whose second token lies beyond the window (its label
    is 0).
    """
    labels, mask = np.zeros_like(batch.labels), np.zeros_like(batch.loss_mask)
    labels[:, :-1] = batch.labels[:, 1:]
    mask[:, :-1] = batch.loss_mask[:, :-1] & batch.loss_mask[:, 1:]
    return labels, mask
