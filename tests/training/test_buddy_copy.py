"""Files that ranks swap over the network: all of their bytes, and what goes wrong on one rank leaves none waiting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

PIECE_BYTES = 1000
SIZES = {  # of the files of each rank
    0: {"a": 2500, "below/b": 0, "below/c": 1000, "d": 1},
    1: {"x/y/z": 9999},
    2: {"empty": 0},
}


def _content(rank: int, name: str) -> bytes:
    return bytes((rank * 31 + number * 7 + len(name)) % 251 for number in range(SIZES[rank][name]))


def _swap(rank: int, world_size: int, folder: Path, fault: str) -> tuple[str | None, dict[str, bytes]]:
    """What was raised, and the files that came."""
    import torch.distributed as dist

    from engram_checkpoints.checkpoint_files import FileSums, sum_of
    from engram_megatron.training.buddy_copy import Neighbours, swap_files

    mine, theirs = folder / f"of_{rank}", folder / f"at_{rank}"
    for name in SIZES[rank]:
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_bytes(_content(rank, name))
    files = {name: sum_of(mine / name) for name in SIZES[rank]}
    if rank == 1 and fault == "shorter":
        (mine / "x/y/z").write_bytes(b"short")
    if rank == 1 and fault == "other":
        (mine / "x/y/z").write_bytes(bytes(9999))
    if rank == 2 and fault == "no folder":
        theirs.write_text("in its place")
    received = FileSums(theirs)
    neighbours = Neighbours(dist.group.WORLD, (rank + 1) % world_size, (rank - 1) % world_size)  # type: ignore[arg-type]
    raised = None
    try:
        swap_files(neighbours, mine, files, received, PIECE_BYTES)
        assert received.sums() == {name: sum_of(theirs / name) for name in received.sums()}
    except OSError as error:
        raised = str(error)
    dist.barrier()
    found = {}
    if theirs.is_dir():
        found = {str(path.relative_to(theirs)): path.read_bytes() for path in theirs.rglob("*") if path.is_file()}
    return raised, found


def test_each_rank_gets_the_files_of_the_one_before(tmp_path: Path) -> None:
    for rank, (raised, found) in enumerate(run_ranks(_swap, 3, tmp_path, "")):
        before = (rank - 1) % 3
        assert raised is None
        assert found == {name: _content(before, name) for name in SIZES[before]}


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("shorter", {1: "of_1/x/y/z has become shorter", 2: "at_2/x/y/z is damaged"}),
        ("other", {2: "at_2/x/y/z is damaged"}),
        ("no folder", {2: "at_2"}),
    ],
)
def test_fault_is_told_on_its_ranks_and_the_others_get_everything(
    tmp_path: Path, fault: str, told: dict[int, str]
) -> None:
    results: list[Any] = run_ranks(_swap, 3, tmp_path, fault)
    for rank, (raised, found) in enumerate(results):
        if rank in told:
            assert told[rank] in raised
        else:
            before = (rank - 1) % 3
            assert raised is None
            assert found == {name: _content(before, name) for name in SIZES[before]}
