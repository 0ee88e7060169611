"""Cases of kind "hash": multipliers, primes, offsets and the rows of token sequences."""

from __future__ import annotations

from typing import Any

import numpy as np

from engram_megatron.conformance.case import Case, check_equal
from engram_megatron.hashing.ngram_hasher import NgramHasher
from engram_megatron.hashing.vocab_projection import VocabProjection


def case_hasher(config: dict[str, Any], projection: VocabProjection) -> NgramHasher:
    """Our hasher for the `config` of a case; its layer ids are what seeds the demo's multipliers."""
    return NgramHasher(
        projection=projection,
        rows_per_head=config["engram_vocab_size"],
        num_heads_per_order=config["n_head_per_ngram"],
        hash_seed_ids=config["layer_ids"],
        layer_numbers=config["layer_ids"],
        hash_seed=config["seed"],
        pad_token_id=config["pad_id"],
    )


def check_hash(case: Case, projection: VocabProjection) -> float:
    """Compare our hasher with the case; 0.0, for integers are equal or a `Mismatch`."""
    arrays = case.arrays()
    hasher = case_hasher(case.entry["config"], projection)
    check_equal("multipliers", hasher.multipliers_LN, arrays["multipliers"])
    check_equal("primes", hasher.primes_LOJ, arrays["primes"])
    check_equal("offsets", hasher.head_offsets_LH, arrays["offsets"])
    check_equal("total_rows", hasher.primes_LOJ.sum(axis=(1, 2)), arrays["total_rows"])
    layer_start_L = np.cumsum(arrays["total_rows"]) - arrays["total_rows"]
    row_offsets_LH = arrays["offsets"] + layer_start_L[:, None]
    for sequence in case.entry["sequences"]:
        name = sequence["name"]
        tokens_BT, hash_LBTH = arrays[f"ids__{name}"], arrays[f"hash__{name}"]
        check_equal(f"compressed {name}", hasher.compress(tokens_BT), arrays[f"compressed__{name}"])
        check_equal(f"hash {name}", hasher.hashes(tokens_BT), hash_LBTH)
        check_equal(f"rows {name}", hasher.rows(tokens_BT, None), hash_LBTH + row_offsets_LH[:, None, None, :])
    return 0.0
