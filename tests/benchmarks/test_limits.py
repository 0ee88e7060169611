"""The table of limits, and what slurmctld's log says of a job's start. Nothing here asserts a speed."""

from __future__ import annotations

from datetime import datetime

import pytest

from engram_megatron.benchmarks.job_times import last_start
from engram_megatron.benchmarks.limits import Limited, limits_table

LOG = """\
[2026-11-26T07:30:31.911] _slurm_rpc_submit_batch_job: JobId=2 InitPrio=4294901758 usec=723
[2026-11-26T07:30:32.213] sched: Allocate JobId=2 NodeList=node[1-2] #CPUs=2 Partition=main
[2026-11-26T07:31:02.000] sched/backfill: _start_job: Started JobId=2 in main on node[1,3]
[2026-11-26T07:31:05.000] sched: Allocate JobId=22 NodeList=node[1-2] #CPUs=2 Partition=main
[2026-11-26T07:32:13.585] _job_complete: JobId=2 WEXITSTATUS 0
"""


def test_limit_is_missed_above_it() -> None:
    assert not Limited("start", 2.0, 2.0).is_missed
    assert Limited("start", 2.1, 2.0).is_missed
    assert Limited("start", 3.0, 2.0).ratio == 1.5
    assert not Limited("a part of it", 1e9).is_missed


def test_table_holds_measured_limit_ratio_and_verdict() -> None:
    lines = limits_table([Limited("start", 3.0, 2.0), Limited("a part", 0.25)]).splitlines()
    assert lines[1].split() == ["start", "3", "s", "2", "s", "1.50", "missed"]
    assert lines[2].split() == ["a", "part", "250", "ms", "-", "-", "-"]


def test_start_is_the_last_of_its_job_by_either_scheduler() -> None:
    assert last_start(LOG, "2") == datetime(2026, 11, 26, 7, 31, 2).timestamp()
    assert last_start(LOG, "22") == datetime(2026, 11, 26, 7, 31, 5).timestamp()
    with pytest.raises(ValueError, match="job 3"):
        last_start(LOG, "3")
