"""Token ids to row ids. One joined row space holds the rows of every head of every Engram layer.

Shape letters: L Engram layers, B sequences, T positions, N largest n-gram order, H = (N - 1) * heads per order.
Row spaces: layer by layer, within a layer order by order, within an order head by head; each head has a prime number
of rows (`head_sizes`). Everything is a pure function of the geometry, so that any rank builds the same hasher.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_kernels.ngram_hash import ngram_hash
from engram_megatron.config import EngramConfig
from engram_megatron.errors import UsageError
from engram_megatron.hashing.head_sizes import head_sizes
from engram_megatron.hashing.vocab_projection import VocabProjection

Int64 = NDArray[np.int64]

SEED_STRIDE = 10007  # the demo's: generator seed = hash seed + 10007 * the layer's seed id


class NgramHasher:
    """The n-gram hash of DeepSeek's Engram demo (arXiv 2601.07372, Eq. 1) over all Engram layers of a model.

    Attributes: `multipliers_LN`, `primes_LOJ` (rows of each head, O = N - 1 orders, J heads each), `head_offsets_LH`
    (first row of a head within its layer), `layer_offsets` int64 [L] (first row of a layer), `row_offsets_LH` (first
    row of a head in the joined row space), `total_rows`, `pad_id` (compressed).
    """

    def __init__(
        self,
        *,
        projection: VocabProjection,
        rows_per_head: Sequence[int],
        num_heads_per_order: int,
        hash_seed_ids: Sequence[int],
        layer_numbers: Sequence[int],
        hash_seed: int,
        pad_token_id: int,
    ) -> None:
        """`rows_per_head` holds the least rows of a head for each order 2..N; `pad_token_id` is a raw id.

        Raises `UsageError` where the projection does not know `pad_token_id`.
        """
        assert len(hash_seed_ids) == len(layer_numbers)
        if not 0 <= pad_token_id < len(projection.lookup):
            raise UsageError(
                f"engram.pad_token_id = {pad_token_id} is not in the vocabulary: "
                f"choose one of 0..{len(projection.lookup) - 1}"
            )
        self.projection = projection
        self.layer_numbers = tuple(layer_numbers)
        self.hash_seed_ids = tuple(hash_seed_ids)
        self.hash_seed = hash_seed
        self.pad_id = int(projection.lookup[pad_token_id])
        self.multipliers_LN = np.stack(
            [
                hash_multipliers(hash_seed, seed_id, len(rows_per_head) + 1, projection.compressed_size)
                for seed_id in hash_seed_ids
            ]
        )
        self.primes_LOJ = head_sizes(rows_per_head, len(hash_seed_ids), num_heads_per_order)
        sizes_LH = self.primes_LOJ.reshape(len(hash_seed_ids), -1)
        self.head_offsets_LH = np.cumsum(sizes_LH, axis=1) - sizes_LH
        rows_L = sizes_LH.sum(axis=1)
        self.layer_offsets = np.cumsum(rows_L) - rows_L
        self.total_rows = int(rows_L.sum())
        self.row_offsets_LH = self.head_offsets_LH + self.layer_offsets[:, None]

    @classmethod
    def from_config(cls, engram: EngramConfig, projection: VocabProjection, vocab_size: int) -> NgramHasher:
        """The hasher of a run. `projection` is the tokenizer's; it is extended to the model's `vocab_size` here."""
        return cls(
            projection=projection.extended(vocab_size, engram.pad_token_id),
            rows_per_head=(engram.rows_per_head,) * (engram.max_ngram_order - 1),
            num_heads_per_order=engram.num_heads_per_order,
            hash_seed_ids=engram.hash_seed_ids,
            layer_numbers=engram.layer_numbers,
            hash_seed=engram.hash_seed,
            pad_token_id=engram.pad_token_id,
        )

    def compress(self, tokens_BT: NDArray[np.integer[Any]]) -> Int64:
        """Compressed ids, int64, of raw ids. Negative ids are no tokens and stay as they are (the demo's rule).

        Raises `UsageError` for an id that the vocabulary does not have.
        """
        lookup = self.projection.lookup
        if tokens_BT.size > 0 and int(tokens_BT.max()) >= len(lookup):
            raise UsageError(
                f"token id {int(tokens_BT.max())} is not in the vocabulary of {len(lookup)} ids: "
                "the corpus was written with another tokenizer, or model.vocab_size is too small"
            )
        tokens = tokens_BT.astype(np.int64, copy=False)
        return np.where(tokens >= 0, lookup[np.maximum(tokens, 0)], tokens)

    def rows(
        self,
        tokens_BT: NDArray[np.integer[Any]],
        document_ids_BT: NDArray[np.int32] | None,
        layers: Sequence[int] | None = None,
        out: Int64 | None = None,
    ) -> Int64:
        """Row ids in the joined row space of all layers, int64 [L, B, T, H], of raw token ids.

        `layers`: numbers from 0 of the Engram layers to hash for, may be none; without it all of them.
        With `document_ids_BT` (equal neighbours = same document) a window stops at the start of its document:
        everything older counts as the pad id. None looks back to the start of the sequence, as the demo does.
        The result is written to `out`, contiguous, where it is given.
        Raises `UsageError` for an id that the vocabulary does not have.
        """
        chosen = range(len(self.layer_numbers)) if layers is None else layers
        return self._hash(tokens_BT, document_ids_BT, self.row_offsets_LH, list(chosen), out)

    def hashes(self, tokens_BT: NDArray[np.integer[Any]], document_ids_BT: NDArray[np.int32] | None = None) -> Int64:
        """As `rows`, but numbered within each head: 0..prime - 1."""
        within_head = np.zeros_like(self.row_offsets_LH)
        return self._hash(tokens_BT, document_ids_BT, within_head, list(range(len(self.layer_numbers))))

    def _hash(
        self,
        tokens_BT: NDArray[np.integer[Any]],
        document_ids_BT: NDArray[np.int32] | None,
        offsets_LH: Int64,
        layers: list[int],
        out: Int64 | None = None,
    ) -> Int64:
        multipliers, primes, offsets = self.multipliers_LN[layers], self.primes_LOJ[layers], offsets_LH[layers]
        return ngram_hash(self.compress(tokens_BT), document_ids_BT, multipliers, primes, offsets, self.pad_id, out)

    def identity(self) -> dict[str, Any]:
        """All that decides which row a token window reads, JSON-able; tables are worthless under another identity."""
        return {
            "layer_numbers": list(self.layer_numbers),
            "hash_seed_ids": list(self.hash_seed_ids),
            "hash_seed": self.hash_seed,
            "ngram_orders": list(range(2, self.multipliers_LN.shape[1] + 1)),
            "num_heads_per_order": int(self.primes_LOJ.shape[2]),
            "pad_id": self.pad_id,
            "compressed_size": self.projection.compressed_size,
            "projection_sha256": self.projection.digest,
            "multipliers": self.multipliers_LN.tolist(),
            "total_rows": self.total_rows,
            "primes_sha256": hashlib.sha256(self.primes_LOJ.astype("<i8").tobytes()).hexdigest(),
        }


def hash_multipliers(hash_seed: int, seed_id: int, max_ngram_order: int, compressed_size: int) -> Int64:
    """The odd multipliers of one layer, int64 [max_ngram_order]; a product with a compressed id stays below 2^63."""
    half_bound = max(1, (np.iinfo(np.int64).max // compressed_size) // 2)
    generator = np.random.default_rng(hash_seed + SEED_STRIDE * seed_id)
    return generator.integers(0, half_bound, size=max_ngram_order, dtype=np.int64) * 2 + 1


def identity_difference(saved: dict[str, Any], current: dict[str, Any]) -> str | None:
    """The first field in which two `identity()` dicts differ, in words; None where they are equal."""
    for name in current | saved:
        if name not in saved or name not in current:
            return f"hash {name} is only in the {'saved' if name in saved else 'current'} identity"
        if saved[name] != current[name]:
            return f"hash {name} was {saved[name]} and is now {current[name]}"
    return None
