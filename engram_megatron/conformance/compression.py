"""Cases of kind "compression": the vocabulary projection of one tokenizer."""

from __future__ import annotations

from engram_megatron.conformance.case import Case, Mismatch, check_equal, check_sha256
from engram_megatron.hashing.vocab_projection import VocabProjection


def tokenizer_name(case: Case) -> str:
    """The tokenizer's short name stands in the file's name: `compression_<tokenizer>.npz`."""
    return case.file.removeprefix("compression_").removesuffix(".npz")


def check_compression(case: Case, projection: VocabProjection) -> float:
    """Compare `projection` with the case; 0.0, for integers are equal or a `Mismatch`."""
    if "file" in case.entry["tokenizer"]:
        check_sha256(case.directory / case.entry["tokenizer"]["file"], case.entry["tokenizer"]["json_sha256"])
    check_equal("lookup", projection.lookup, case.arrays()["lookup"])
    if projection.compressed_size != case.entry["compressed_vocab"]:
        raise Mismatch(f"compressed size {projection.compressed_size}, expected {case.entry['compressed_vocab']}")
    if projection.digest != case.entry["lookup_sha256_int64le"]:
        raise Mismatch(f"digest {projection.digest}, expected {case.entry['lookup_sha256_int64le']}")
    return 0.0
