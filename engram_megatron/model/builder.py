"""Builds this rank's part of the model on megatron-core's GPTModel.

GPTModel is marked deprecated in megatron-core 0.19 in favour of HybridModel, whose attention needs Transformer
Engine; this file is the only one that knows which of them carries the backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.multi_token_prediction import tie_word_embeddings_state_dict
from torch import Tensor, nn

from engram_megatron import platform
from engram_megatron.config import RunConfig
from engram_megatron.model.backbone_config import backbone_config
from engram_megatron.model.initialization import initialize_weights
from engram_megatron.model.layer_specs import block_submodules, prediction_submodules
from engram_megatron.model.multi_token_prediction import (
    MultiTokenPrediction,
    PredictionSubmodules,
    embedding_copy,
)
from engram_megatron.model.pipeline_layout import pipeline_layout


class EngramModel(GPTModel):
    """One chunk of the model: GPTModel that takes token ids, document ids and memory, and returns logits."""

    def __init__(self, *, prediction: PredictionSubmodules | None, **of_gpt_model: Any) -> None:
        """`prediction`: of multi-token prediction, on the model's last chunk, where the config asks for it."""
        super().__init__(**of_gpt_model)
        self.has_mtp = prediction is not None
        if prediction is not None:  # megatron-core's schedules take any attribute `mtp` for a module
            self.mtp = MultiTokenPrediction(self.config, prediction)
        if self.has_mtp and not self.pre_process:
            self.embedding = embedding_copy(self.config, self.vocab_size, self.max_sequence_length)

    def forward(  # type: ignore[override]
        self,
        tokens_BT: Tensor,
        document_ids_BT: Tensor | None,
        memory_LTBE: Tensor | None,
        memory_document_ids_BT: Tensor | None,
        next_tokens_BT: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, T, V / tensor] of the model's last chunk, hidden states [T / tensor, B, M*C] of the others.

        T counts the positions of this context rank (see `sequence_partition`), in document ids all positions.

        Args:
            tokens_BT: int64 ids.
            document_ids_BT: int32, equal numbers are one document, attention stays inside; None: one document.
            memory_LTBE: rows of every Engram layer of this chunk, heads side by side, of this rank's T / tensor
                positions; None without Engram.
            memory_document_ids_BT: where the convolution restarts; None: it runs across documents.
            next_tokens_BT: for multi-token prediction, which then adds its own logits [B, T, V / tensor], of the tokens
                after the next, to the result of the last chunk; None: it is left out.
        """
        predict = None
        if self.has_mtp and next_tokens_BT is not None:
            predict = partial(self._predict, next_tokens_BT, document_ids_BT)
        output: Tensor | tuple[Tensor, Tensor] = super().forward(
            tokens_BT,
            position_ids=None,
            attention_mask=document_ids_BT,
            extra_block_kwargs={"context": memory_LTBE, "context_mask": memory_document_ids_BT},
            output_processor=predict,
        )
        return output

    def _predict(
        self,
        next_tokens_BT: Tensor,
        document_ids_BT: Tensor | None,
        *,
        hidden_states: Tensor,
        **_unused: Any,
    ) -> tuple[Tensor, Tensor]:
        """Logits of the next tokens and of those after them; GPTModel calls it in place of its output layer."""
        embedded = self.embedding(input_ids=next_tokens_BT, position_ids=None)
        predicted = self.mtp(hidden_states, embedded, document_ids_BT)
        logits, after_next = (self.output_layer(hidden)[0] for hidden in (hidden_states, predicted))
        return logits.transpose(0, 1).contiguous(), after_next.transpose(0, 1).contiguous()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """megatron-core's, where the last stage's copy of the embedding is a replica of the first stage's."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.has_mtp and not self.pre_process:
            tie_word_embeddings_state_dict(
                state,
                self.embedding.word_embeddings.weight,
                f"{prefix}embedding.word_embeddings.weight",
                tp_group=self.pg_collection.tp,
                dp_cp_group=(metadata or {})["dp_cp_group"],
            )
        return state


def build_model_chunks(config: RunConfig, *, initialize: bool = True) -> list[EngramModel]:
    """The chunks of this pipeline rank, one unless `virtual_pipeline` > 1, in the order in which a microbatch visits
    them; initialised unless told otherwise (or under the meta device).

    megatron-core's parallel state must be initialised.
    """
    megatron = backbone_config(config)  # one object for all chunks: the schedule reads the first one's
    chunks = [_chunk(config, megatron, number) for number in range(config.parallel.virtual_pipeline)]
    if any(parameter.is_meta for chunk in chunks for parameter in chunk.parameters()):
        return chunks
    for chunk in chunks:
        chunk.to(platform.device())  # megatron-core's router is made on the CPU and expects its user to move it
    if initialize:
        initialize_weights(chunks, seed=config.training.seed, std=config.model.init_std)
    return chunks


def _chunk(config: RunConfig, megatron: Any, number: int) -> EngramModel:
    pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
    last = config.parallel.virtual_pipeline - 1
    is_last = number == last and pipeline_rank == config.parallel.pipeline - 1
    chunk = EngramModel(
        prediction=prediction_submodules(config) if is_last and config.model.mtp.num_layers > 0 else None,
        config=megatron,
        transformer_layer_spec=block_submodules(config, pipeline_layout(config).layers(pipeline_rank, number)),
        vocab_size=config.model.vocab_size,
        max_sequence_length=config.data.sequence_length,
        pre_process=number == 0 and pipeline_rank == 0,
        post_process=is_last,
        position_embedding_type="none",
        share_embeddings_and_output_weights=False,
        parallel_output=True,
        vp_stage=number if last > 0 else None,
    )
    if config.model.mtp.num_layers > 0 and config.parallel.pipeline > 1 and hasattr(chunk, "embedding"):
        # Two stages add up their gradients of it after the distributed optimizer's reduce-scatter: a bucket of its own,
        # which this mark asks for, is cut alike on both.
        chunk.embedding.word_embeddings.weight.shared_embedding = True
    return chunk


def wrap_data_parallel(
    chunks: Sequence[EngramModel], dtype: torch.dtype, *, distributed_optimizer: bool = False
) -> list[nn.Module]:
    """megatron-core's DistributedDataParallel: gradients summed (not averaged) over replicas, in float32 at least.

    Sums, because the loss is divided by the global number of tokens, which is known only after the step. With
    `distributed_optimizer` a replica gets the sum of its shard alone, and weights move into DDP's buffers.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=dtype is torch.bfloat16,
        overlap_grad_reduce=False,
        use_distributed_optimizer=distributed_optimizer,
        check_for_nan_in_grad=False,
    )
    wrapped: list[nn.Module] = [
        DistributedDataParallel(
            chunk.config, ddp, chunk, full_param_layout=_shard_layout(chunk, ddp) if distributed_optimizer else None
        )
        for chunk in chunks
    ]
    for chunk in wrapped:
        chunk.broadcast_params()  # type: ignore[operator]
    return wrapped


def _shard_layout(chunk: EngramModel, ddp: Any) -> Any:
    """megatron-core's own layout of buckets that divide over the replicas. DDP would make the same, with a warning."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return DistributedOptimizer.compute_full_param_layout(
        [parameter for parameter in chunk.parameters() if parameter.requires_grad],
        None,  # one bucket per dtype: gradients are not reduced during the backward pass
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        ddp,
        expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size(),
    )
