"""What happens to each tensor of the backbone: Muon or Adam, weight decay or not, and how a fused matrix is split.

Decided by global name and global shape alone, without torch, so that `--dry-run` says what training will do. A matrix
(or stack of matrices) whose name is not known here is an error, never a guess: Muon on an embedding, or Adam on an
expert, would train silently worse.

Rule (Moonlight, arXiv 2502.16982, section 2; DeepSeek-V4 for the mHC parts): hidden matrices take Muon; the embedding,
the head, and everything that is not a matrix (norms, biases, mHC biases and factors, convolution) take Adam. A weight
that stores several maps in one tensor is orthogonalised map by map. Weight decay acts on matrices, the embedding and
the head, and not on vectors; the Engram paper states the value 0.1 but not the set.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engram_megatron.config import EngramConfig, ModelConfig

Kind = Literal["adam", "embedding", "whole", "gate_up", "latent_rope", "key_value_heads", "hyper_connection", "engram"]

_LAYER = r"(decoder\.layers\.\d+|mtp\.layers\.\d+\.mtp_model_layer)\."
_VECTORS = ("embedding", "adam")
# Each parameter that is not a plain vector, by its global name. Vectors need no entry: they all take Adam.
_KINDS: tuple[tuple[str, Kind], ...] = (
    (r"embedding\.word_embeddings\.weight", "embedding"),
    (r"output_layer\.weight", "embedding"),
    (r"mtp\.layers\.\d+\.projection\.weight", "whole"),
    (_LAYER + r"self_attention\.linear_q_proj\.weight", "whole"),
    (_LAYER + r"self_attention\.linear_q_(down|up)_proj\.weight", "whole"),
    (_LAYER + r"self_attention\.linear_kv_down_proj\.weight", "latent_rope"),
    (_LAYER + r"self_attention\.linear_kv_up_proj\.weight", "key_value_heads"),
    (_LAYER + r"self_attention\.linear_proj\.weight", "whole"),
    (_LAYER + r"mlp\.router\.weight", "whole"),
    (_LAYER + r"mlp\.((experts\.local_experts\.\d+|shared_experts)\.)?linear_fc1\.weight", "gate_up"),
    (_LAYER + r"mlp\.((experts\.local_experts\.\d+|shared_experts)\.)?linear_fc2\.weight", "whole"),
    (_LAYER + r"mlp\.experts\.weight1", "gate_up"),
    (_LAYER + r"mlp\.experts\.weight2", "whole"),
    (_LAYER + r"mhc_(attention|mlp)\.mapping\.weight", "hyper_connection"),
    (_LAYER + r"engram\.key_value\.weight", "engram"),
    # One vector per residual stream, and one filter per channel: matrices and stacks in shape only.
    (_LAYER + r"engram\.norm_(query|key|conv)\.weight", "adam"),
    (_LAYER + r"engram\.short_conv\.weight", "adam"),
)
_LABELS: dict[Kind, tuple[str, ...]] = {
    "gate_up": ("gate", "up"),
    "latent_rope": ("latent", "rope key"),
    "key_value_heads": ("keys of all heads", "values of all heads"),
    "hyper_connection": ("pre", "post", "residual"),
    "engram": ("value", "key of each stream"),
}


@dataclass(frozen=True, kw_only=True)
class MatrixSplit:
    """How the rows of a fused matrix fall into parts that are orthogonalised on their own.

    The global rows are `repeats` blocks, each made of consecutive parts of `sizes` rows; a part gathers its rows from
    all blocks (`repeats` = heads for the key-value up-projection, else 1).

    `per_rank`: under tensor parallelism every rank holds its share of every part (Megatron's gated feed-forward:
    rank r has [gate_r; up_r]), so the ranks' rows one after another are blocks too. Otherwise ranks hold consecutive
    rows of the global matrix.
    """

    sizes: tuple[int, ...]
    repeats: int = 1
    per_rank: bool = False

    def blocks(self, tensor_parallel: int) -> tuple[int, tuple[int, ...]]:
        """(repeats, sizes) of the rows of all `tensor_parallel` ranks put one after another."""
        if not self.per_rank:
            return self.repeats, self.sizes
        assert all(size % tensor_parallel == 0 for size in self.sizes), (self, tensor_parallel)
        return self.repeats * tensor_parallel, tuple(size // tensor_parallel for size in self.sizes)


@dataclass(frozen=True, kw_only=True)
class TensorRule:
    """What the optimizer does to one tensor."""

    optimizer: Literal["muon", "adam"]
    weight_decay: bool
    split: MatrixSplit | None = None  # Muon only; None: the matrix (each matrix of a stack) is taken whole
    by_rows: bool = False  # Adam only; a distributed optimizer divides the tensor's rows over replicas (`ownership`)


@dataclass(frozen=True, kw_only=True)
class ParameterRules:
    """The rules of one model; see `parameter_rules`."""

    nope_head_dim: int
    rope_head_dim: int
    value_head_dim: int
    kv_lora_rank: int
    num_heads: int
    num_streams: int
    num_engram_keys: int

    def rule(self, name: str, shape: Sequence[int]) -> TensorRule:
        """The rule of the tensor called `name` (prefixes `module.` are ignored) of *global* shape `shape`.

        A stack of matrices [..., rows, columns] follows the rule of one of them. Raises ValueError for a tensor of two
        or more dimensions whose name is not known.
        """
        kind = _kind(name, shape)
        if kind in _VECTORS:
            return TensorRule(optimizer="adam", weight_decay=kind == "embedding", by_rows=kind == "embedding")
        split = self._split(kind, shape[-2])
        if split is not None:
            rows = split.repeats * sum(split.sizes)
            assert rows == shape[-2], f"{name}: {shape[-2]} rows, but the configuration's parts have {rows}"
        return TensorRule(optimizer="muon", weight_decay=True, split=split)

    def _split(self, kind: Kind, rows: int) -> MatrixSplit | None:
        streams = self.num_streams
        if kind == "gate_up":
            return MatrixSplit(sizes=(rows // 2, rows // 2), per_rank=True)
        if kind == "latent_rope":
            return MatrixSplit(sizes=(self.kv_lora_rank, self.rope_head_dim))
        if kind == "key_value_heads":
            return MatrixSplit(sizes=(self.nope_head_dim, self.value_head_dim), repeats=self.num_heads)
        if kind == "hyper_connection":
            return MatrixSplit(sizes=(streams, streams, streams * streams))
        if kind == "engram":
            parts = 1 + self.num_engram_keys
            return MatrixSplit(sizes=(rows // parts,) * parts)
        return None


def parameter_rules(model: ModelConfig, engram: EngramConfig | None) -> ParameterRules:
    """The rules for a model: sizes of the parts of fused matrices come from its configuration."""
    num_keys = 0  # without the gate, Engram projects the value alone
    if engram is not None and engram.gate:
        num_keys = model.mhc.num_streams if engram.multi_branch else 1
    return ParameterRules(
        nope_head_dim=model.attention.nope_head_dim,
        rope_head_dim=model.attention.rope_head_dim,
        value_head_dim=model.attention.value_head_dim,
        kv_lora_rank=model.attention.kv_lora_rank,
        num_heads=model.attention.num_heads,
        num_streams=model.mhc.num_streams,
        num_engram_keys=num_keys,
    )


def describe_tensor(name: str, shape: Sequence[int]) -> str:
    """For people: "Muon, split gate | up, weight decay" or "Adam, no weight decay". Same errors as `rule`."""
    kind = _kind(name, shape)
    if kind in _VECTORS:
        return "Adam, weight decay" if kind == "embedding" else "Adam, no weight decay"
    words = ["Muon"]
    if kind in _LABELS:
        words.append("split " + " | ".join(_LABELS[kind]))
    if len(shape) > 2:
        words.append("each matrix of the stack on its own")
    return ", ".join([*words, "weight decay"])


def _kind(name: str, shape: Sequence[int]) -> Kind:
    bare = re.sub(r"^(module\.)+", "", name)
    if len(shape) < 2:
        return "adam"
    for pattern, kind in _KINDS:
        if re.fullmatch(pattern, bare):
            return kind
    raise ValueError(
        f"no optimizer rule for {name} of shape {tuple(shape)}: add it to engram_megatron/optimizer/parameter_groups.py"
    )
