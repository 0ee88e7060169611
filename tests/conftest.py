"""A corpus of real text, small enough for a test and large enough for a run; a folder that lies on a disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import build_tiny_corpus

from engram_megatron.tables.nvme_placement import IN_MEMORY, file_system


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 80,000 training tokens of State of the Union addresses, 1,024 ids. Copy it to break it."""
    return build_tiny_corpus(tmp_path_factory.mktemp("tiny") / "corpus")


@pytest.fixture(scope="session")
def disk_folders(tmp_path_factory: pytest.TempPathFactory) -> pytest.TempPathFactory:
    """Makes folders for `tables.nvme_dir`, which must not lie in memory."""
    if file_system(tmp_path_factory.getbasetemp()) in IN_MEMORY:
        pytest.skip("temporary files lie in memory here: give --basetemp=PATH, on a disk")
    return tmp_path_factory


@pytest.fixture
def disk(disk_folders: pytest.TempPathFactory) -> Path:
    """An empty folder on a disk."""
    return disk_folders.mktemp("disk")
