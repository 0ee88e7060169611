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

from engram_data.batch import Batch
from engram_megatron import platform
from engram_megatron.model.loss import token_loss_sum


@dataclass(frozen=True)
class Microbatch:
    """What the model needs for B sequences of T tokens, on its device.

    Tokens, labels and loss mask are of the T / context positions of this context rank, document ids of all.
    `document_ids_BT` None: attention sees the whole sequence. `memory_document_ids_BT` None: the convolution runs
    across documents. `memory_LTBE` holds this rank's T / (context * tensor) positions; None: a model without Engram.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    loss_mask_BT: Tensor
    document_ids_BT: Tensor | None
    memory_document_ids_BT: Tensor | None
    memory_LTBE: Tensor | None


def make_microbatch(
    batch: Batch,
    memory_LTBE: Tensor | None,
    *,
    separate_documents: bool,
    cut_memory_at_documents: bool,
    positions: NDArray[np.int64] | slice = slice(None),
) -> Microbatch:
    """A `Batch` of numpy arrays and its memory as tensors on the model's device.

    `positions`: those whose tokens, labels and loss this context rank computes, all by default.
    """

    def to_device(array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array).to(platform.device())

    document_ids = to_device(batch.document_ids) if separate_documents or cut_memory_at_documents else None
    return Microbatch(
        tokens_BT=to_device(batch.tokens[:, positions]),
        labels_BT=to_device(batch.labels[:, positions]),
        loss_mask_BT=to_device(batch.loss_mask[:, positions]),
        document_ids_BT=document_ids if separate_documents else None,
        memory_document_ids_BT=document_ids if cut_memory_at_documents else None,
        memory_LTBE=memory_LTBE,
    )


def forward_step(microbatches: Iterator[Microbatch], model: nn.Module) -> tuple[Tensor, Any]:
    """Run the next microbatch. Returns (logits, loss function), as `get_forward_backward_func` expects."""
    batch = next(microbatches)
    logits = model(batch.tokens_BT, batch.document_ids_BT, batch.memory_LTBE, batch.memory_document_ids_BT)
    return logits, partial(_loss, batch)


def _loss(batch: Microbatch, logits_BTV: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss sum to differentiate, number of tokens, what the trainer reads)."""
    vocabulary_group = parallel_state.get_tensor_model_parallel_group()
    loss_sum, tokens = token_loss_sum(logits_BTV, batch.labels_BT, batch.loss_mask_BT, vocabulary_group)
    return loss_sum, tokens.to(torch.int), {"loss_sum": loss_sum.detach(), "tokens": tokens}
