"""A checkpoint of the tables must give every layout the same rows, and never give wrong ones silently."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from ranks import run_ranks
from saved_tables import save_tables

from engram_checkpoints.table_format import LAST_STEP, MOMENTS, WEIGHT
from engram_checkpoints.table_reader import TableReader
from engram_checkpoints.tables import load_shard
from engram_kernels.catch_up import CatchUp
from engram_megatron.errors import UsageError
from engram_megatron.optimizer.row_adam import RowAdam
from engram_megatron.tables.host_rows import HostPlacement
from engram_megatron.tables.nvme_placement import NvmePlacement
from engram_megatron.tables.row_gradients import RowGradients
from engram_megatron.tables.row_init import fill_initial_rows
from engram_megatron.tables.row_layout import RowLayout
from engram_megatron.tables.row_store import Placement
from engram_megatron.tables.table_shard import TableShard

ROWS, DIM, BLOCK_ROWS = 230, 6, 16  # 15 blocks, the last one short
Table = dict[str, np.ndarray]


def _adam(
    shard: int,
    num_shards: int,
    block_rows: int = BLOCK_ROWS,
    dtype: str = "float32",
    placement: Placement | None = None,
) -> RowAdam:
    layout = RowLayout(ROWS, block_rows, num_shards)
    return RowAdam(TableShard(layout, shard, DIM, dtype, placement=placement), CatchUp(0.9, 0.95, 1e-20))


def _train(adam: RowAdam, steps: range) -> None:
    """Steps with gradients that are a function of step and row, over rows that change; rows from 200 on never occur."""
    shard = adam.shard
    everything = shard.layout.global_row(shard.shard, np.arange(shard.num_rows))
    for step in steps:
        gradients = np.empty((ROWS, DIM), shard.wide)
        fill_initial_rows(gradients, 0, seed=step, std=1.0)
        used = np.flatnonzero((everything % 5 == step % 5) & (everything < 200))
        adam.step(RowGradients.summed(used, [gradients[everything[used]]]), lr=0.01)


def _table(adams: list[RowAdam]) -> Table:
    """The whole table of all shards in the order of row ids, as it is saved."""
    wide = adams[0].shard.wide
    table: Table = {name: np.full((ROWS, DIM), np.nan, wide) for name in (WEIGHT, *MOMENTS)}
    table[LAST_STEP] = np.full(ROWS, -1, np.int32)
    for adam in adams:
        shard = adam.shard
        for block in shard.layout.blocks(shard.shard):
            rows = slice(block.start, block.stop)
            exact = shard.exact(np.arange(block.local.start, block.local.stop))
            table[WEIGHT][rows], table[LAST_STEP][rows] = exact.weight, exact.last_step
            table["exp_avg"][rows], table["exp_avg_sq"][rows] = exact.exp_avg, exact.exp_avg_sq
    return table


def _assert_same(ours: Table, theirs: Table) -> None:
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def _loaded(path: Path, num_shards: int, block_rows: int = BLOCK_ROWS, **options: bool) -> list[RowAdam]:
    adams = [_adam(number, num_shards, block_rows) for number in range(num_shards)]
    for adam in adams:
        adam.shard.rows.weight[:] = np.nan  # what a load leaves out shows
        load_shard(path, adam, **options)
    return adams


def _save_on_rank(rank: int, world_size: int, path: Path) -> None:
    adam = _adam(rank, world_size)
    adam.shard.initialize(seed=0, std=1.0)
    _train(adam, range(5))
    save_tables(path, adam)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables that two ranks wrote at the same time after five steps."""
    path = tmp_path_factory.mktemp("run") / "tables.zarr"
    run_ranks(_save_on_rank, 2, path)
    return path


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Tables of one shard that a test may damage."""
    return save_tables(tmp_path / "tables.zarr", _never_saved(range(5)))


def _never_saved(steps: range, **options: Any) -> RowAdam:
    adam = _adam(0, 1, **options)
    adam.shard.initialize(seed=0, std=1.0)
    _train(adam, steps)
    return adam


@pytest.mark.parametrize("num_shards", [1, 2, 4, 20])
def test_training_goes_on_bit_identically_on_any_number_of_ranks(saved: Path, num_shards: int) -> None:
    adams = _loaded(saved, num_shards)
    _assert_same(_table(adams), _table([_never_saved(range(5))]))
    for adam in adams:
        assert adam.catch_up.step == 5
        _train(adam, range(5, 12))
    _assert_same(_table(adams), _table([_never_saved(range(12))]))


@pytest.mark.parametrize("block_rows", [1, 10, 64, 1000])
def test_load_into_blocks_of_another_size(saved: Path, block_rows: int) -> None:
    _assert_same(_table(_loaded(saved, 3, block_rows)), _table([_never_saved(range(5))]))


def test_rows_that_never_had_a_gradient_are_known_after_a_load(saved: Path) -> None:
    (adam,) = _loaded(saved, 1)
    np.testing.assert_array_equal(adam.shard.rows.last_step > 0, np.arange(ROWS) < 200)


def test_weights_only_takes_them_as_of_the_last_step_and_starts_the_optimizer_anew(saved: Path) -> None:
    adam = _never_saved(range(3))
    load_shard(saved, adam, weights_only=True)
    expected = _never_saved(range(5))
    np.testing.assert_array_equal(adam.shard.rows.weight, expected.shard.finished(expected.catch_up))
    assert (expected.shard.rows.weight != adam.shard.rows.weight).any(), "no row was behind"
    assert not adam.shard.rows.state.any()
    assert not adam.shard.rows.last_step.any()
    assert adam.catch_up.step == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_exact_weights_are_saved_of_every_dtype(tmp_path: Path, dtype: str) -> None:
    adam = _never_saved(range(5), dtype=dtype)
    loaded = _adam(0, 1, dtype=dtype)
    load_shard(save_tables(tmp_path / "t.zarr", adam), loaded)
    for adam_or_loaded in (adam, loaded):
        _train(adam_or_loaded, range(5, 8))
    np.testing.assert_array_equal(loaded.shard.rows.weight, adam.shard.rows.weight)
    np.testing.assert_array_equal(loaded.shard.rows.state, adam.shard.rows.state)


def test_bfloat16_and_float32_tables_read_each_others_saves(tmp_path: Path) -> None:
    ours, theirs = _never_saved(range(5), dtype="bfloat16"), _never_saved(range(5))
    _assert_same(_table([ours]), _table([theirs]))  # exact weights are trained alike
    loaded = _adam(0, 1)
    load_shard(save_tables(tmp_path / "t.zarr", ours), loaded)
    _assert_same(_table([loaded]), _table([theirs]))


def _placements(disk: Path) -> list[Placement]:
    """In memory and in files, where every update moves rows between memory and file."""
    return [
        placement
        for commit in ("eager", "lazy")
        for placement in (
            HostPlacement(commit=commit),
            NvmePlacement(folder=str(disk), hot_fraction=0.05, commit=commit),
        )
    ]


@pytest.mark.parametrize(
    "dtype", ["float32", *(pytest.param(d, marks=pytest.mark.slow) for d in ("bfloat16", "float64"))]
)
def test_tables_of_every_placement_go_on_as_those_of_every_other(tmp_path: Path, disk: Path, dtype: str) -> None:
    expected_then, expected = (_table([_never_saved(range(steps), dtype=dtype)]) for steps in (5, 8))
    for number, placement in enumerate(_placements(disk)):
        trained = _never_saved(range(5), dtype=dtype, placement=placement)
        path = save_tables(tmp_path / f"{number}.zarr", trained)
        for other in _placements(disk):
            loaded = _adam(0, 1, dtype=dtype, placement=other)
            load_shard(path, loaded)
            _assert_same(_table([loaded]), expected_then)
            _train(loaded, range(5, 8))
            _assert_same(_table([loaded]), expected)
            assert loaded.shard.touched_rows == trained.shard.touched_rows == 200


def test_all_placements_save_the_same_files(tmp_path: Path, disk: Path) -> None:
    def files(number: int, placement: Placement) -> dict[str, bytes]:
        path = save_tables(tmp_path / f"{number}.zarr", _never_saved(range(5), placement=placement))
        return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}

    first, *others = (files(number, placement) for number, placement in enumerate(_placements(disk)))
    assert all(other == first for other in others)


def test_tables_in_files_start_from_other_weights_and_go_on_from_there(saved: Path, tmp_path: Path, disk: Path) -> None:
    """Then no row is what the seed says, whether it had a gradient or not."""
    nvme, host = NvmePlacement(folder=str(disk), hot_fraction=0.05), HostPlacement()
    adams = [_adam(0, 1, placement=placement) for placement in (nvme, host)]
    for adam in adams:
        load_shard(saved, adam, weights_only=True)
    _assert_same(*(_table([adam]) for adam in adams))
    for adam in adams:
        _train(adam, range(3))
    _assert_same(*(_table([adam]) for adam in adams))
    for number, adam in enumerate(adams):
        path = save_tables(tmp_path / f"{number}.zarr", adam)
        again = [_adam(0, 1, placement=placement) for placement in (nvme, host)]
        for loaded in again:
            load_shard(path, loaded)
            _train(loaded, range(3, 6))
        _assert_same(*(_table([loaded]) for loaded in again))


def test_lazy_tables_cannot_start_from_other_weights(saved: Path, disk: Path) -> None:
    for placement in (HostPlacement(commit="lazy"), NvmePlacement(folder=str(disk), commit="lazy")):
        with pytest.raises(UsageError, match=r"set tables\.commit=eager"):
            load_shard(saved, _adam(0, 1, placement=placement), weights_only=True)


def test_each_block_is_one_file_and_plain_zarr_reads_the_table(saved: Path) -> None:
    table = _table([_never_saved(range(5))])
    group = zarr.open_group(saved, mode="r")
    assert dict(group.attrs) == {
        "total_rows": ROWS,
        "row_dim": DIM,
        "block_rows": BLOCK_ROWS,
        "catch_up": {"beta1": 0.9, "beta2": 0.95, "eps": 1e-20},
        "dtype": "float32",
        "step_count": 5,
        "update": "dense",
        "initial": {"seed": 0, "std": 1.0},
        "base": None,
    }
    np.testing.assert_array_equal(group["learning_rates"][:], np.full(5, 0.01))
    np.testing.assert_array_equal(group[LAST_STEP][:], table[LAST_STEP])
    for name in (WEIGHT, *MOMENTS):
        np.testing.assert_array_equal(group[name][:200], table[name][:200])
        assert not group[name][200:].any()
        files = {path.name for path in (saved / name).iterdir()}
        # Of the rows from 200 on none ever had a gradient: they are what the seed says.
        assert files == {"zarr.json"} | {f"c.{block}.0" for block in range(13)}


@pytest.mark.parametrize(("start", "stop"), [(0, ROWS), (5, 6), (15, 17), (190, 230)])
def test_reader_gives_any_rows_whole(saved: Path, start: int, stop: int) -> None:
    """Those that are left out too."""
    table, reader = _table([_never_saved(range(5))]), TableReader(saved)
    rows = reader.rows(start, stop)
    np.testing.assert_array_equal(rows.weight, table[WEIGHT][start:stop])
    np.testing.assert_array_equal(rows.exp_avg_sq, table["exp_avg_sq"][start:stop])
    np.testing.assert_array_equal(reader.last_step(start, stop), table[LAST_STEP][start:stop])
    trained = _never_saved(range(5))
    finished = trained.shard.finished(trained.catch_up)[start:stop]
    np.testing.assert_array_equal(reader.weights(start, stop, reader.catch_up()), finished)


def test_tables_are_never_written_over_others(own: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        save_tables(own, _adam(0, 1))


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
        load_shard(saved, RowAdam(shard, CatchUp(0.9, 0.95, 1e-20)))


def test_folder_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no tables"):
        load_shard(tmp_path / "nothing", _adam(0, 1))


@pytest.mark.parametrize("name", [WEIGHT, *MOMENTS])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.99])
def test_truncated_chunk_is_named(own: Path, name: str, kept: float) -> None:
    chunk = own / name / "c.3.0"
    content = chunk.read_bytes()
    chunk.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UsageError, match=rf"chunk {name}/c\.3\.0 \(rows 48\.\.63\) is damaged"):
        load_shard(own, _adam(0, 1))


@pytest.mark.parametrize("position", [0.0, 0.5, 1.0])
def test_flipped_bit_in_a_chunk_is_named(own: Path, position: float) -> None:
    chunk = own / WEIGHT / "c.12.0"
    content = bytearray(chunk.read_bytes())
    content[int((len(content) - 1) * position)] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(UsageError, match=r"chunk weight/c\.12\.0 \(rows 192\.\.207\) is damaged"):
        load_shard(own, _adam(0, 1))


def test_missing_chunk_is_named_and_not_read_as_zeros(own: Path) -> None:
    (own / "exp_avg" / "c.5.0").unlink()
    with pytest.raises(UsageError, match=r"chunk exp_avg/c\.5\.0 \(rows 80\.\.95\) is missing"):
        load_shard(own, _adam(0, 1))


def test_rank_reads_only_the_chunks_of_its_own_rows(own: Path) -> None:
    (own / WEIGHT / "c.1.0").unlink()  # rank 1's
    load_shard(own, _adam(0, 2))
    with pytest.raises(UsageError, match=r"weight/c\.1\.0"):
        load_shard(own, _adam(1, 2))
