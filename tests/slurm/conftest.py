"""A real Slurm cluster on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from slurm_cluster import Cluster, cluster_of


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Cluster]:
    """Four nodes. Skips where none can be."""
    with cluster_of(4) as cluster:
        yield cluster
