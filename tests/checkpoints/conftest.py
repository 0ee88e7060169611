"""A whole checkpoint of a small model that two ranks trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks
from whole_checkpoint import model_config, train_and_save


@pytest.fixture(scope="session")
def saved_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not change it."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints/step_00000002"
    folder.mkdir(parents=True)
    run_ranks(train_and_save, 2, model_config("parallel.expert=2"), folder)
    return folder
