"""The hasher against published rows, against Python integers, and in what documents and checkpoints rely on."""

import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_megatron.config import EngramConfig
from engram_megatron.errors import UsageError
from engram_megatron.hashing.ngram_hasher import NgramHasher, identity_difference
from engram_megatron.hashing.vocab_projection import VocabProjection

SMALL = EngramConfig(
    layer_numbers=(2, 4),
    hash_seed_ids=(2, 4),
    max_ngram_order=4,
    num_heads_per_order=2,
    rows_per_head=101,
    memory_dim=12,
)
VOCAB = 50
# merges ids pairwise; id 2, the pad, becomes 1
PROJECTION = VocabProjection(np.arange(VOCAB, dtype=np.int64) // 2, VOCAB // 2)
HASHER = NgramHasher.from_config(SMALL, PROJECTION, VOCAB)

# "Only Alexander the Great could tame the horse Bucephalus." without begin-of-sentence, DeepSeek-V3's ids
SENTENCE = np.array([[22898, 19737, 270, 9327, 1494, 112253, 270, 15000, 406, 11999, 25670, 349, 16]])


@pytest.mark.parametrize(
    ("rows_per_head", "seed_ids", "layer", "total", "sha256_start"),
    [
        (646400, (1, 15), 0, 66952355, "f5eea3fc70aff49c"),
        (646400, (1, 15), 1, 69797794, "a92529823b036a68"),
        (2262400, (1, 14), 0, 220038292, "0b134248b542958b"),
        (2262400, (1, 14), 1, 248396211, "7c9ea20229368a11"),
    ],
)
def test_rows_of_the_demo_for_its_own_sentence(
    dsv3_projection: VocabProjection,
    rows_per_head: int,
    seed_ids: tuple[int, int],
    layer: int,
    total: int,
    sha256_start: str,
) -> None:
    engram = EngramConfig(rows_per_head=rows_per_head, hash_seed_ids=seed_ids)
    rows = NgramHasher.from_config(engram, dsv3_projection, 129280).hashes(SENTENCE)[layer, 0]
    assert rows.sum() == total
    assert hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16] == sha256_start


def row_by_hand(hasher: NgramHasher, layer: int, window: list[int], order: int, head: int) -> int:
    """`window`: compressed ids, the current token first. Python integers, one n-gram."""
    mix = 0
    for token, multiplier in zip(window[:order], hasher.multipliers_LN[layer].tolist(), strict=False):
        mix ^= token * multiplier
    return mix % int(hasher.primes_LOJ[layer, order - 2, head])


documents_and_tokens = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)), min_size=1, max_size=5
)


@settings(deadline=None)  # the first example compiles the kernel
@given(documents_and_tokens)
def test_rows_are_those_of_python_integers_within_each_document(parts: list[tuple[int, list[int]]]) -> None:
    # neighbours with equal ids are one document: shift every second one by 4 so that they differ, ids still repeat
    ids = [part + 4 * (i % 2) for i, (part, tokens) in enumerate(parts) for _ in tokens]
    tokens = [token for _, part in parts for token in part]
    rows = HASHER.rows(np.array([tokens]), np.array([ids], dtype=np.int32))
    assert rows.shape == (2, 1, len(tokens), SMALL.num_heads)
    t = 0
    for _, part in parts:
        for inside in range(len(part)):
            past = [part[inside - k] // 2 if inside >= k else 1 for k in range(4)]
            for layer in range(2):
                head_row = 0
                for order in (2, 3, 4):
                    for head in range(2):
                        column = (order - 2) * 2 + head
                        start = layer * int(HASHER.layer_offsets[1]) + head_row
                        assert rows[layer, 0, t, column] == start + row_by_hand(HASHER, layer, past, order, head)
                        head_row += int(HASHER.primes_LOJ[layer, order - 2, head])
            t += 1


def test_packed_documents_hash_as_they_do_alone() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, VOCAB, size=(2, 30))
    ids = np.repeat(np.array([[5, 7, 5]], dtype=np.int32), 10, axis=1).repeat(2, axis=0)
    packed = HASHER.rows(tokens, ids)
    for start in (0, 10, 20):
        alone = HASHER.rows(tokens[:, start : start + 10], None)
        np.testing.assert_array_equal(packed[:, :, start : start + 10], alone)
    assert (packed[:, :, 10:] != HASHER.rows(tokens, None)[:, :, 10:]).any()


def test_every_head_has_rows_of_its_own_and_all_lie_in_the_joined_space() -> None:
    rows = HASHER.rows(np.random.default_rng(2).integers(0, VOCAB, size=(4, 200)), None)
    ends = np.append(HASHER.row_offsets_LH.reshape(-1), HASHER.total_rows)[1:].reshape(2, -1)
    assert (rows >= HASHER.row_offsets_LH[:, None, None]).all()
    assert (rows < ends[:, None, None]).all()
    assert HASHER.total_rows == HASHER.primes_LOJ.sum()
    assert HASHER.layer_offsets.tolist() == [0, int(HASHER.primes_LOJ[0].sum())]


def test_negative_ids_are_hashed_as_they_are() -> None:
    tokens = np.array([[3, -1, -5, 7]])
    assert HASHER.compress(tokens).tolist() == [[1, -1, -5, 3]]
    rows = HASHER.hashes(tokens)
    assert (rows >= 0).all()
    assert rows[0, 0, 2, 0] == row_by_hand(HASHER, 0, [-5, -1], 2, 0)


def test_int32_tokens_and_empty_batches_are_accepted() -> None:
    tokens = np.array([[1, 2, 3]])
    np.testing.assert_array_equal(HASHER.rows(tokens.astype(np.int32), None), HASHER.rows(tokens, None))
    assert HASHER.rows(np.zeros((0, 4), dtype=np.int64), None).shape == (2, 0, 4, 6)
    assert HASHER.rows(np.zeros((3, 0), dtype=np.int64), np.zeros((3, 0), dtype=np.int32)).shape == (2, 3, 0, 6)


def test_id_beyond_the_vocabulary_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"token id 50 .* 50 ids"):
        HASHER.rows(np.array([[1, 50]]), None)


def test_ids_that_only_the_model_has_hash_like_the_pad() -> None:
    hasher = NgramHasher.from_config(SMALL, PROJECTION, VOCAB + 10)
    np.testing.assert_array_equal(hasher.rows(np.array([[4, 59, 8]]), None), hasher.rows(np.array([[4, 2, 8]]), None))


def test_pad_outside_the_vocabulary_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="pad_token_id = 99"):
        NgramHasher.from_config(replace(SMALL, pad_token_id=99), PROJECTION, VOCAB)


def test_identity_survives_json_and_equals_itself() -> None:
    saved = json.loads(json.dumps(HASHER.identity()))
    assert identity_difference(saved, NgramHasher.from_config(SMALL, PROJECTION, VOCAB).identity()) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows_per_head": 103}, "total_rows was"),
        ({"hash_seed": 1}, "hash_seed was 0 and is now 1"),
        ({"hash_seed_ids": (1, 4)}, "hash_seed_ids was [2, 4] and is now [1, 4]"),
        ({"layer_numbers": (2, 5)}, "layer_numbers"),
        ({"pad_token_id": 4}, "pad_id was 1 and is now 2"),
        ({"num_heads_per_order": 4}, "num_heads_per_order"),
    ],
)
def test_identity_names_what_changed_in_the_config(change: dict[str, Any], words: str) -> None:
    other = NgramHasher.from_config(replace(SMALL, **change), PROJECTION, VOCAB)
    difference = identity_difference(HASHER.identity(), other.identity())
    assert difference is not None
    assert words in difference


def test_identity_names_another_tokenizer() -> None:
    swapped = PROJECTION.lookup.copy()
    swapped[[10, 12]] = swapped[[12, 10]]
    other = NgramHasher.from_config(SMALL, VocabProjection(swapped, PROJECTION.compressed_size), VOCAB)
    difference = identity_difference(HASHER.identity(), other.identity())
    assert difference is not None
    assert "projection_sha256" in difference


def test_identity_names_a_field_that_one_side_lacks() -> None:
    saved = HASHER.identity()
    del saved["pad_id"]
    assert identity_difference(saved, HASHER.identity()) == "hash pad_id is only in the current identity"


def test_layers_alone_have_the_rows_that_they_have_among_all() -> None:
    tokens = np.random.default_rng(5).integers(0, VOCAB, size=(2, 12))
    whole = HASHER.rows(tokens, None)
    for layers in ([0], [1], [1, 0], []):
        found = HASHER.rows(tokens, None, layers)
        assert found.shape == (len(layers), *whole.shape[1:])
        np.testing.assert_array_equal(found, whole[layers])
