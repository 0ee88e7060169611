"""The projection rule on hand-made vocabularies, and the two tokenizers whose tables are known."""

import json
from pathlib import Path

import numpy as np
import pytest

from engram_megatron.errors import UsageError
from engram_megatron.hashing.vocab_projection import VocabProjection, build_vocab_projection, identity_projection

GOLDEN = Path(__file__).parents[1] / "golden"


def write_tokenizer(path: Path, tokens: dict[str, int]) -> Path:
    """A byte-level vocabulary without merges: decoding a single id gives the token's bytes."""
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": tokens, "merges": []},
    }
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    return path


def classes(path: Path, tokens: list[str]) -> list[int]:
    projection = build_vocab_projection(write_tokenizer(path, {token: i for i, token in enumerate(tokens)}))
    assert projection.compressed_size == max(projection.lookup) + 1
    return projection.lookup.tolist()


def test_case_accents_width_and_outer_space_do_not_count(tmp_path: Path) -> None:
    # byte-level spelling: Ġ is a space, Ã¤ the two bytes of ä, ï½ģ the three of the full-width a
    assert classes(tmp_path / "t.json", ["apple", "b", "APPLE", "Ġapple", "a", "Ã¤", "ï½ģ", "ab"]) == (
        [0, 1, 0, 0, 2, 2, 2, 3]
    )


def test_runs_of_white_space_are_one_space_and_a_lone_space_survives(tmp_path: Path) -> None:
    # space, tab, newline, three spaces and CR LF are one class; "a b" and "a<tab>b" another; "ab" a third
    assert classes(tmp_path / "t.json", ["Ġ", "ĉ", "Ċ", "ĠĠĠ", "čĊ", "aĠb", "aĉb", "ab"]) == [0, 0, 0, 0, 0, 1, 1, 2]


def test_text_that_normalises_to_nothing_keeps_its_own_class(tmp_path: Path) -> None:
    # U+0301, U+0300: combining accents alone are stripped to nothing, so their plain texts are the keys
    assert classes(tmp_path / "t.json", ["Ìģ", "ÌĢ", "e", "eÌģ"]) == [0, 1, 2, 2]


def test_broken_characters_are_told_apart_by_their_bytes(tmp_path: Path) -> None:
    # single bytes 0xC3 and 0xE4 both decode to U+FFFD
    assert classes(tmp_path / "t.json", ["Ã", "ä", "a"]) == [0, 1, 2]


def test_toy_tokenizer_gives_the_golden_table(toy_projection: VocabProjection) -> None:
    with np.load(GOLDEN / "compression_toy.npz") as golden:
        np.testing.assert_array_equal(toy_projection.lookup, golden["lookup"])
    assert toy_projection.compressed_size == 3204


def test_deepseek_v3_gives_the_published_size_and_the_golden_digest(dsv3_projection: VocabProjection) -> None:
    assert len(dsv3_projection.lookup) == 128815
    assert dsv3_projection.compressed_size == 98627  # 23.43 % fewer (Engram, appendix C)
    assert dsv3_projection.digest == "0e84461b633329215755b30226757dc28a1c49772f351048fe3b4c2070fb7649"


def test_extension_maps_unknown_ids_to_the_compressed_pad() -> None:
    projection = VocabProjection(np.array([0, 1, 0, 2], dtype=np.int64), 3)
    extended = projection.extended(7, pad_token_id=3)
    assert extended.lookup.tolist() == [0, 1, 0, 2, 2, 2, 2]
    assert extended.compressed_size == 3
    assert extended.digest != projection.digest


def test_extension_refuses_a_tokenizer_larger_than_the_model() -> None:
    with pytest.raises(UsageError, match=r"128 ids.*model\.vocab_size = 100"):
        identity_projection(128).extended(100, pad_token_id=2)


def test_extension_refuses_a_pad_that_the_tokenizer_lacks() -> None:
    with pytest.raises(UsageError, match=r"pad_token_id = 128 .*0\.\.127"):
        identity_projection(128).extended(200, pad_token_id=128)


def test_identity_keeps_every_id() -> None:
    projection = identity_projection(5)
    assert projection.lookup.tolist() == [0, 1, 2, 3, 4]
    assert projection.compressed_size == 5


def test_table_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        identity_projection(5).lookup[0] = 1


def test_missing_tokenizer_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.json"):
        build_vocab_projection(tmp_path / "absent.json")


def test_malformed_tokenizer_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"model": {}}')
    with pytest.raises(UsageError, match=r"t\.json"):
        build_vocab_projection(tmp_path / "t.json")


def test_gaps_in_the_ids_are_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"2 tokens but ids up to 3.*compression=false"):
        build_vocab_projection(write_tokenizer(tmp_path / "t.json", {"a": 0, "b": 3}))
