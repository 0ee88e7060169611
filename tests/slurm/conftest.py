"""A real Slurm cluster on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_runs import Cluster

from engram_megatron.errors import UsageError
from engram_megatron.local_cluster import cluster


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Cluster]:
    """Four nodes of a core each: a rank computes in one thread, as it does on one host. Skips where none can be."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # a short path: sockets lie below it
        try:
            settings = cluster.up(Path(folder) / "c", 4, 1, plain=False)
        except UsageError as error:
            pytest.skip(str(error))
        try:
            if not settings.isolated:
                pytest.skip("no namespaces here: nodes would share a name and memory")
            yield Cluster(settings)
        finally:
            cluster.down(Path(folder) / "c")
