"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): a layer that predicts the token after the next.

    h'_i = M [RMSNorm(h_i); RMSNorm(Emb(t_{i+1}))]        Eq. 21; h: the model's hidden states after its final norm
    P_{i+2} = OutHead(RMSNorm(Layer(h'_{1:i})))           Eq. 22, 23; embedding and head are the model's own

The layer is of the kind of the model's last one, with residual streams of its own and without memory. megatron-core's
`MultiTokenPredictionBlock` is not used: it takes shifted tokens, labels and masks from neighbouring ranks instead of
from the host, which has the whole sequence; it knows documents only as Transformer Engine's packed sequences; and its
loss is computed in float32 whatever the run's dtype.

Shape legend: T positions (this tensor rank's share), B sequences, C hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from engram_megatron.model.recompute import run_again_with_router


@dataclass(frozen=True)
class PredictionSubmodules:
    """What a prediction layer is built of: classes with megatron-core's constructors, and a decoder layer's spec."""

    norm: Any
    column_parallel_linear: Any
    transformer_layer: ModuleSpec


class PredictionLayer(MegatronModule):
    """From hidden states at i and the embedding of token i + 1 to hidden states that predict token i + 2."""

    def __init__(self, config: Any, submodules: PredictionSubmodules, layer_number: int) -> None:
        super().__init__(config=config)
        width, eps = config.hidden_size, config.layernorm_epsilon
        self.hidden_layernorm = submodules.norm(config=config, hidden_size=width, eps=eps)
        self.embedding_layernorm = submodules.norm(config=config, hidden_size=width, eps=eps)
        self.projection = submodules.column_parallel_linear(
            2 * width,
            width,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
        )
        # The name under which megatron-core's schedules look for it.
        self.mtp_model_layer = build_module(
            submodules.transformer_layer, config=config, layer_number=layer_number, is_mtp_layer=True
        )
        self.final_layernorm = submodules.norm(config=config, hidden_size=width, eps=eps)

    def forward(self, hidden_TBC: Tensor, embedded_TBC: Tensor, document_ids_BT: Tensor | None) -> Tensor:
        """Hidden states [T, B, C] for the output head. Document ids are those of the whole sequence.

        A position whose next token starts another document gets that token's embedding too. Nobody sees it: its own
        prediction has no target, and no later position of its document exists that could attend to it.
        """
        joined = torch.cat([self.hidden_layernorm(hidden_TBC), self.embedding_layernorm(embedded_TBC)], dim=-1)
        projected, _ = self.projection(joined)
        if self.config.sequence_parallel:
            # From the whole sequence and a share of the width to a share of the sequence and the whole width
            projected = scatter_to_sequence_parallel_region(gather_from_tensor_model_parallel_region(projected))
        if self.config.recompute_granularity == "full" and self.training:
            output = run_again_with_router(self._transform, projected, document_ids_BT)
        else:
            output = self._transform(projected, document_ids_BT)
        predicted: Tensor = self.final_layernorm(output)
        return predicted

    def _transform(self, hidden_TBC: Tensor, document_ids_BT: Tensor | None) -> Tensor:
        output, _ = self.mtp_model_layer(hidden_TBC, attention_mask=document_ids_BT)
        return output  # type: ignore[no-any-return]


class MultiTokenPrediction(MegatronModule):
    """The prediction layers, of which there is one."""

    def __init__(self, config: Any, submodules: PredictionSubmodules) -> None:
        super().__init__(config=config)
        self.layers = nn.ModuleList([PredictionLayer(config, submodules, layer_number=config.num_layers + 1)])

    def forward(self, hidden_TBC: Tensor, embedded_TBC: Tensor, document_ids_BT: Tensor | None) -> Tensor:
        """See `PredictionLayer.forward`."""
        predicted: Tensor = self.layers[0](hidden_TBC, embedded_TBC, document_ids_BT)
        return predicted

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Layer by layer: megatron-core would take a ModuleList's tensors as whole on every tensor rank."""
        state: dict[str, Any] = {}
        for index, layer in enumerate(self.layers):
            state |= layer.sharded_state_dict(f"{prefix}layers.{index}.", sharded_offsets, metadata)  # type: ignore
        return state


def embedding_copy(config: Any, vocab_size: int, max_sequence_length: int) -> LanguageModelEmbedding:
    """The embedding for a last pipeline stage that does not hold the first one's.

    It starts equal (initial weights are a function of the name), and stays equal: `sum_embedding_gradients` gives both
    the same gradient. It counts in no norm (`shared`) and is not saved twice.
    """
    embedding = LanguageModelEmbedding(
        config=config,
        vocab_size=vocab_size,
        max_sequence_length=max_sequence_length,
        position_embedding_type="none",
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    )
    embedding.word_embeddings.weight.shared = True
    return embedding
