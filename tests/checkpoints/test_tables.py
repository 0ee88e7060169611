"""A checkpoint of the tables must give every layout the same rows, and never give wrong ones silently."""

from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import zarr
from ranks import run_ranks

from engram_checkpoints.tables import MOMENTS, WEIGHT, create, load_shard, write_shard
from engram_megatron.errors import UsageError
from engram_megatron.optimizer.row_adam import RowAdam
from engram_megatron.tables.row_gradients import RowGradients
from engram_megatron.tables.row_init import fill_initial_rows
from engram_megatron.tables.row_layout import RowLayout
from engram_megatron.tables.table_shard import TableShard

ROWS, DIM, BLOCK_ROWS = 230, 6, 16  # 15 blocks, the last one short
Table = dict[str, np.ndarray]


def _shard(shard: int, num_shards: int, block_rows: int = BLOCK_ROWS, dtype: str = "float32") -> TableShard:
    return TableShard(RowLayout(ROWS, block_rows, num_shards), shard, DIM, dtype)


def _train(shard: TableShard, steps: range) -> None:
    """Steps with gradients that are a function of step and row, over rows that change; rows from 200 on never occur."""
    optimizer = RowAdam(shard, beta1=0.9, beta2=0.95, eps=1e-20)
    everything = shard.layout.global_row(shard.shard, np.arange(shard.num_rows))
    for step in steps:
        gradients = np.empty((ROWS, DIM), shard.dtype)
        fill_initial_rows(gradients, 0, seed=step, std=1.0)
        used = np.flatnonzero((everything % 5 == step % 5) & (everything < 200))
        optimizer.step(RowGradients(used, gradients[everything[used]]), lr=0.01)


def _table(shards: list[TableShard]) -> Table:
    """The whole table of all shards in the order of row ids."""
    table = {name: np.full((ROWS, DIM), np.nan, shards[0].dtype) for name in (WEIGHT, *MOMENTS)}
    for shard in shards:
        rows = shard.layout.global_row(shard.shard, np.arange(shard.num_rows))
        for name in table:
            table[name][rows] = getattr(shard, name)
    return table


def _assert_same(ours: Table, theirs: Table) -> None:
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def _loaded(path: Path, num_shards: int, block_rows: int = BLOCK_ROWS, **options: bool) -> list[TableShard]:
    shards = [_shard(number, num_shards, block_rows) for number in range(num_shards)]
    for shard in shards:
        shard.weight[:] = np.nan  # what a load leaves out shows
        load_shard(path, shard, **options)
    return shards


def _save_on_rank(rank: int, world_size: int, path: Path) -> None:
    shard = _shard(rank, world_size)
    shard.initialize(seed=0, std=1.0)
    _train(shard, range(5))
    if rank == 0:
        create(path, shard)
    dist.barrier()
    write_shard(path, shard)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables that two ranks wrote at the same time after five steps."""
    path = tmp_path_factory.mktemp("run") / "tables.zarr"
    run_ranks(_save_on_rank, 2, path)
    return path


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Tables of one shard that a test may damage."""
    shard = _shard(0, 1)
    shard.initialize(seed=0, std=1.0)
    _train(shard, range(5))
    create(tmp_path / "tables.zarr", shard)
    write_shard(tmp_path / "tables.zarr", shard)
    return tmp_path / "tables.zarr"


def _never_saved(steps: range) -> TableShard:
    shard = _shard(0, 1)
    shard.initialize(seed=0, std=1.0)
    _train(shard, steps)
    return shard


@pytest.mark.parametrize("num_shards", [1, 2, 4, 20])
def test_training_goes_on_bit_identically_on_any_number_of_ranks(saved: Path, num_shards: int) -> None:
    shards = _loaded(saved, num_shards)
    _assert_same(_table(shards), _table([_never_saved(range(5))]))
    for shard in shards:
        assert shard.step_count == 5
        _train(shard, range(5, 12))
    _assert_same(_table(shards), _table([_never_saved(range(12))]))


@pytest.mark.parametrize("block_rows", [1, 10, 64, 1000])
def test_load_into_blocks_of_another_size(saved: Path, block_rows: int) -> None:
    _assert_same(_table(_loaded(saved, 3, block_rows)), _table([_never_saved(range(5))]))


def test_rows_that_never_had_a_gradient_are_known_after_a_load(saved: Path) -> None:
    (shard,) = _loaded(saved, 1)
    np.testing.assert_array_equal(shard.touched, np.arange(ROWS) < 200)


def test_weights_only_starts_the_optimizer_anew(saved: Path) -> None:
    shard = _never_saved(range(3))
    load_shard(saved, shard, weights_only=True)
    np.testing.assert_array_equal(shard.weight, _never_saved(range(5)).weight)
    assert not shard.exp_avg.any()
    assert not shard.exp_avg_sq.any()
    assert not shard.touched.any()
    assert shard.step_count == 0


def test_float64_tables_are_saved_in_full(tmp_path: Path) -> None:
    shard = _shard(0, 1, dtype="float64")
    shard.initialize(seed=0, std=1.0)
    create(tmp_path / "t.zarr", shard)
    write_shard(tmp_path / "t.zarr", shard)
    loaded = _shard(0, 1, dtype="float64")
    load_shard(tmp_path / "t.zarr", loaded)
    np.testing.assert_array_equal(loaded.weight, shard.weight)


def test_each_block_is_one_file_and_plain_zarr_reads_the_table(saved: Path) -> None:
    table = _table([_never_saved(range(5))])
    group = zarr.open_group(saved, mode="r")
    assert dict(group.attrs) == {
        "total_rows": ROWS,
        "row_dim": DIM,
        "block_rows": BLOCK_ROWS,
        "dtype": "float32",
        "step_count": 5,
    }
    for name in table:
        np.testing.assert_array_equal(group[name][:], table[name])
        files = {path.name for path in (saved / name).iterdir()}
        assert files == {"zarr.json"} | {f"c.{block}.0" for block in range(15)}


def test_tables_are_never_written_over_others(own: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        create(own, _shard(0, 1))


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (TableShard(RowLayout(ROWS + 1, BLOCK_ROWS, 1), 0, DIM), "have total_rows = 230, this run's have 231"),
        (TableShard(RowLayout(ROWS, BLOCK_ROWS, 1), 0, DIM + 1), "have row_dim = 6, this run's have 7"),
        (
            TableShard(RowLayout(ROWS, BLOCK_ROWS, 1), 0, DIM, "float64"),
            "have dtype = float32, this run's have float64",
        ),
    ],
)
def test_tables_of_another_geometry_are_refused(saved: Path, shard: TableShard, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_shard(saved, shard)


def test_folder_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no tables"):
        load_shard(tmp_path / "nothing", _shard(0, 1))


@pytest.mark.parametrize("name", [WEIGHT, *MOMENTS])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.99])
def test_truncated_chunk_is_named(own: Path, name: str, kept: float) -> None:
    chunk = own / name / "c.3.0"
    content = chunk.read_bytes()
    chunk.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UsageError, match=rf"chunk {name}/c\.3\.0 \(rows 48\.\.63\) is damaged"):
        load_shard(own, _shard(0, 1))


@pytest.mark.parametrize("position", [0.0, 0.5, 1.0])
def test_flipped_bit_in_a_chunk_is_named(own: Path, position: float) -> None:
    chunk = own / WEIGHT / "c.14.0"  # the short one
    content = bytearray(chunk.read_bytes())
    content[int((len(content) - 1) * position)] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(UsageError, match=r"chunk weight/c\.14\.0 \(rows 224\.\.229\) is damaged"):
        load_shard(own, _shard(0, 1))


def test_missing_chunk_is_named_and_not_read_as_zeros(own: Path) -> None:
    (own / "exp_avg" / "c.5.0").unlink()
    with pytest.raises(UsageError, match=r"chunk exp_avg/c\.5\.0 \(rows 80\.\.95\) is missing"):
        load_shard(own, _shard(0, 1))


def test_rank_reads_only_the_chunks_of_its_own_rows(own: Path) -> None:
    (own / WEIGHT / "c.1.0").unlink()  # rank 1's
    load_shard(own, _shard(0, 2))
    with pytest.raises(UsageError, match=r"weight/c\.1\.0"):
        load_shard(own, _shard(1, 2))
