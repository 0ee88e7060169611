"""The comparison runs on every rank; its numbers are not judged here."""

from ranks import run_ranks

from engram_megatron.benchmarks.exchange import checksum, exchange


def _compare(rank: int, world_size: int) -> list[str]:
    return [comparison.name for comparison in checksum(1) + exchange("gloo", 1)]


def test_every_rank_gets_the_table() -> None:
    for names in run_ranks(_compare, 2):
        assert names == ["checksum of 16 MB", *["checked exchange, 16 MB, 2 ranks, gloo"] * 2]
