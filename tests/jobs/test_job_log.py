"""The first error line of a try, as srun labels it."""

from __future__ import annotations

from pathlib import Path

from engram_megatron.jobs.job_log import JobLog


def test_first_error_since_the_mark_is_the_reason(tmp_path: Path) -> None:
    log = JobLog(tmp_path / "1.log")
    log.mark()
    assert log.first_error() is None
    log.path.write_text("0: step 1\n0: error: a peer is gone\n1: error: rank 1 (pid 7) was ended by SIGKILL\n")
    assert log.first_error() == "rank 1 (pid 7) was ended by SIGKILL"
    log.mark()
    with log.path.open("ab") as stream:
        stream.write(b"0: no error: here\nerror: run_job\xff\n")
    assert log.first_error() == "run_job�"


def test_task_that_a_signal_ended_is_the_reason_where_others_lost_a_peer(tmp_path: Path) -> None:
    log = JobLog(tmp_path / "1.log")
    ends = "srun: Terminating StepId=4.1\nsrun: error: node2: task 3: Killed\n"
    log.path.write_text(f"0: error: rank 0 failed: Connection reset by peer\n{ends}")
    assert log.first_error() == "task 3 on node2 was ended by a signal: Killed"
    log.path.write_text(f"0: error: loss is nan\n{ends}")
    assert log.first_error() == "loss is nan", "srun has killed what was left"


def test_job_that_somebody_cancelled_is_told_from_one_that_slurm_ends(tmp_path: Path) -> None:
    log = JobLog(tmp_path / "4.log")
    assert log.ended_by() is None
    word = "slurmstepd-node1: error: *** JOB 4 ON node1 CANCELLED AT 2026-11-26T08:16:30"
    for more, why in (
        (" DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS", "NODE FAILURE"),
        (" DUE TO JOB REQUEUE", "JOB REQUEUE"),
        ("", ""),
    ):
        with log.path.open("a") as stream:
            stream.write(f"0: step 1\n{word}{more} ***\n")
        assert log.ended_by() == why
    log.mark()
    assert log.ended_by() is None, "of an earlier start"
