"""Delta checkpoints hold less, and restore the same, on two ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_run import Start, run_starts, tiny_config, train_losses

from engram_checkpoints.checkpoint_files import is_complete
from engram_checkpoints.deltas import base_of
from engram_checkpoints.table_reader import TableReader
from engram_megatron.errors import UsageError

# A step uses few of these rows, and no step sweeps over the others.
RUN = ("engram.rows_per_head=4001", "tables.block_rows=512", "tables.update=touched", "checkpoint.every_steps=1")
DELTAS = ("checkpoint.deltas_between_full=2",)


@pytest.fixture(scope="module")
def folder(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps saved whole (`full`), with deltas (`deltas`), with deltas of which the newest is kept (`one`), and with
    deltas, broken off after the one of step 3 and resumed (`resumed`)."""
    folder = tmp_path_factory.mktemp("deltas")
    configs = {
        "full": (*RUN, "checkpoint.keep_last=0"),
        "deltas": (*RUN, *DELTAS, "checkpoint.keep_last=0"),
        "one": (*RUN, *DELTAS, "checkpoint.keep_last=1"),
        "resumed": (*RUN, *DELTAS, "checkpoint.keep_last=0"),
    }
    starts = [Start(tiny_config(tiny_corpus, folder / name, *options)) for name, options in configs.items()]
    results = run_starts([*starts[:3], starts[3]._replace(stop_after=2), starts[3]._replace(resume=True)])
    assert all(not isinstance(result, tuple) for result in results[0]), results[0]
    return folder


def _checkpoints(run_dir: Path) -> dict[int, Path]:
    return {int(path.name[5:]): path for path in sorted((run_dir / "checkpoints").iterdir()) if is_complete(path)}


def _bytes(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in (checkpoint / "tables.zarr").rglob("c.*"))


def test_two_deltas_stand_between_full_checkpoints_and_are_smaller(folder: Path) -> None:
    full, deltas = _checkpoints(folder / "full"), _checkpoints(folder / "deltas")
    bases = {step: base_of(path) for step, path in deltas.items()}
    assert [step for step, base in bases.items() if base is None] == [1, 4]
    for step, base in bases.items():
        if base is not None:
            assert base.checkpoint == f"step_{1 if step < 4 else 4:08d}"
            assert _bytes(deltas[step]) < 0.8 * _bytes(full[step])
        else:
            assert _bytes(deltas[step]) == _bytes(full[step])


def test_every_delta_restores_the_rows_of_the_full_checkpoint(folder: Path) -> None:
    for step, path in _checkpoints(folder / "full").items():
        ours, theirs = (
            TableReader(checkpoint / "tables.zarr") for checkpoint in (_checkpoints(folder / "deltas")[step], path)
        )
        a, b = (reader.rows(0, reader.description.total_rows) for reader in (ours, theirs))
        np.testing.assert_array_equal(a.weight, b.weight)
        np.testing.assert_array_equal(a.state, b.state)
        np.testing.assert_array_equal(a.last_step, b.last_step)


def test_resume_from_a_delta_goes_on_bit_identically(folder: Path) -> None:
    assert train_losses(folder / "resumed") == train_losses(folder / "full")
    last = [_checkpoints(folder / name)[6] / "tables.zarr" for name in ("resumed", "full")]
    a, b = (TableReader(path).rows(0, 16000) for path in last)
    np.testing.assert_array_equal(a.weight, b.weight)


def test_base_of_a_kept_delta_is_kept(folder: Path) -> None:
    assert list(_checkpoints(folder / "one")) == [4, 6]


def test_delta_without_its_base_or_with_another_is_refused(folder: Path, tmp_path: Path) -> None:
    delta = _checkpoints(folder / "deltas")[2]
    shutil.copytree(delta, tmp_path / "checkpoints" / delta.name)
    with pytest.raises(UsageError, match=r"is a delta of .*step_00000001, which is not there"):
        TableReader(tmp_path / "checkpoints" / delta.name / "tables.zarr")
    shutil.copytree(_checkpoints(folder / "deltas")[4], tmp_path / "checkpoints/step_00000001")
    with pytest.raises(UsageError, match=r"is a delta of another checkpoint than .*step_00000001"):
        TableReader(tmp_path / "checkpoints" / delta.name / "tables.zarr")
