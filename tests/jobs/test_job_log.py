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
