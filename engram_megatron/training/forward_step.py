"""One microbatch through the model, in the form that megatron-core's schedules call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor, nn

from engram_data.batch import Batch, after_next
from engram_megatron import platform
from engram_megatron.model.loss import token_loss_sum


@dataclass(frozen=True)
class Microbatch:
    """What the model needs for B sequences of T tokens, on its device.

    Tokens, labels and loss mask are of the T / context positions of this context rank, document ids of all.
    `document_ids_BT` None: attention sees the whole sequence. `memory_document_ids_BT` None: the convolution runs
    across documents. `memory_LTBE` holds this rank's T / (context * tensor) positions; None: a model without Engram.
    `after_next_...` None: no multi-token prediction.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    loss_mask_BT: Tensor
    document_ids_BT: Tensor | None
    memory_document_ids_BT: Tensor | None
    memory_LTBE: Tensor | None
    after_next_labels_BT: Tensor | None = None
    after_next_mask_BT: Tensor | None = None


def make_microbatch(
    batch: Batch,
    memory_LTBE: Tensor | None,
    *,
    separate_documents: bool,
    cut_memory_at_documents: bool,
    multi_token_prediction: bool = False,
    positions: NDArray[np.int64] | slice = slice(None),
) -> Microbatch:
    """A `Batch` of numpy arrays and its memory as tensors on the model's device.

    `positions`: those whose tokens, labels and loss this context rank computes, all by default.
    """

    def to_device(array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array).to(platform.device())

    labels = mask = None
    if multi_token_prediction:  # from the whole sequence: the next position may be another context rank's
        labels, mask = (to_device(array[:, positions]) for array in after_next(batch))
    document_ids = to_device(batch.document_ids) if separate_documents or cut_memory_at_documents else None
    return Microbatch(
        tokens_BT=to_device(batch.tokens[:, positions]),
        labels_BT=to_device(batch.labels[:, positions]),
        loss_mask_BT=to_device(batch.loss_mask[:, positions]),
        document_ids_BT=document_ids if separate_documents else None,
        memory_document_ids_BT=document_ids if cut_memory_at_documents else None,
        memory_LTBE=memory_LTBE,
        after_next_labels_BT=labels,
        after_next_mask_BT=mask,
    )


def forward_step(
    microbatches: Iterator[Microbatch], model: nn.Module, *, mtp_loss_weight: float = 0.0
) -> tuple[Any, Any]:
    """Run the next microbatch. Returns (output, loss function), as `get_forward_backward_func` expects."""
    batch = next(microbatches)
    inputs = (batch.tokens_BT, batch.document_ids_BT, batch.memory_LTBE, batch.memory_document_ids_BT)
    if batch.after_next_labels_BT is None:
        return model(*inputs), partial(_loss, batch)
    return model(*inputs, batch.labels_BT), partial(_loss_with_mtp, batch, mtp_loss_weight)


def _loss(batch: Microbatch, logits_BTV: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss sum to differentiate, number of tokens, what the trainer reads)."""
    vocabulary_group = parallel_state.get_tensor_model_parallel_group()
    loss_sum, tokens = token_loss_sum(logits_BTV, batch.labels_BT, batch.loss_mask_BT, vocabulary_group)
    return loss_sum, tokens.to(torch.int), {"loss_sum": loss_sum.detach(), "tokens": tokens}


def _loss_with_mtp(
    batch: Microbatch, weight: float, logits: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`_loss` plus `weight` times the sum over the tokens after the next (DeepSeek-V3, Eq. 24 and 25).

    Both sums will be divided by the global number of *next* tokens. DeepSeek averages each over its own tokens; one
    divisor keeps the weight of a token the same in every document, however short, and the loss a plain sum.
    """
    assert batch.after_next_labels_BT is not None
    assert batch.after_next_mask_BT is not None
    loss_sum, tokens, report = _loss(batch, logits[0])
    vocabulary_group = parallel_state.get_tensor_model_parallel_group()
    mtp_sum, mtp_tokens = token_loss_sum(
        logits[1], batch.after_next_labels_BT, batch.after_next_mask_BT, vocabulary_group
    )
    report |= {"mtp_loss_sum": mtp_sum.detach(), "mtp_tokens": mtp_tokens}
    return loss_sum + weight * mtp_sum, tokens, report
