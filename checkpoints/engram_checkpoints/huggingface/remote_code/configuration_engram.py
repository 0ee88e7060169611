"""Configuration of an Engram model: DeepSeek-V3's fields for the backbone, DeepSeek-V4.1's for memory and streams."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig


class EngramConfig(PreTrainedConfig):
    """Every field is written at the export; the defaults stand for fields that are absent.

    Shape letters: L Engram layers, O n-gram orders (2 .. engram_max_ngram_size), J heads of one order.
    """

    model_type = "engram"

    vocab_size: int = 129280
    hidden_size: int = 2560
    num_hidden_layers: int = 30
    intermediate_size: int = 12288
    rms_norm_eps: float = 1e-20
    initializer_range: float = 0.006
    max_position_embeddings: int = 4096
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    # Multi-head Latent Attention
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_parameters: dict[str, Any] = field(default_factory=dict)  # rope_type, rope_theta, YaRN's numbers
    rope_interleave: bool = True
    attention_bias: bool = False

    # DeepSeekMoE; n_routed_experts 0: dense feed-forward in every layer
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 1536
    first_k_dense_replace: int = 1
    routed_scaling_factor: float = 2.5
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    n_group: int = 1
    topk_group: int = 1
    num_nextn_predict_layers: int = 0  # stored behind the layers, not run

    # Hyper-connections; hc_mult 1: one residual stream
    hc_mult: int = 1
    hc_sinkhorn_iters: int = 20

    # Conditional memory; no engram_layer_ids: none
    engram_layer_ids: list[int] = field(default_factory=list)  # from 0
    engram_hash_seed_ids: list[int] = field(default_factory=list)
    engram_hash_seed: int = 0
    engram_num_embeddings: list[int] = field(default_factory=list)  # rows of each layer
    engram_max_ngram_size: int = 3
    engram_vocab_size: int = 0  # the least rows of a head
    engram_n_heads: int = 8  # of one order
    engram_head_dim: int = 80
    engram_pad_token_id: int = 2
    engram_compressed_vocab_size: int = 0
    engram_primes: list[list[list[int]]] = field(default_factory=list)  # rows of each head [L, O, J]
    # multipliers, compressed pad id, digest of the token map, ...
    engram_hash_identity: dict[str, Any] = field(default_factory=dict)
    engram_gate: bool = True
    engram_conv: bool = True
    engram_conv_kernel_size: int = 4
    engram_conv_norm_eps: float = 1e-5
    engram_norm_eps: float = 1e-20
    engram_bias: bool = False
    engram_multi_branch: bool = True
    engram_compression: bool = True

    # Documents of one sequence: each ends with `document_end_token_id` (None: a sequence is one document)
    document_end_token_id: int | None = None
    separate_documents: bool = True  # attention stays inside a document
    engram_cut_at_documents: bool = True  # n-gram windows and convolution do
