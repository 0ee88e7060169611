"""A corpus of real text, small enough for a test and large enough for a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import build_tiny_corpus


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 80,000 training tokens of State of the Union addresses, 1,024 ids. Copy it to break it."""
    return build_tiny_corpus(tmp_path_factory.mktemp("tiny") / "corpus")
