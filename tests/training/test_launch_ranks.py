"""The launcher with children of a few lines in place of training ranks: signals, failures, environments."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engram_megatron.training.launch_ranks import launch_ranks

LISTENING = """
import os, sys, time
from pathlib import Path
from engram_megatron.training.stop_signal import StopSignal
stop = StopSignal(Path("nowhere"))
with stop:
    Path(sys.argv[1], "ready" + os.environ["RANK"]).touch()
    while not stop.reason():
        time.sleep(0.01)
    Path(sys.argv[1], "got" + os.environ["RANK"]).write_text(stop.reason())
"""
DEAF = """
import os, signal, sys, time
from pathlib import Path
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: Path(sys.argv[1], "got" + os.environ["RANK"]).touch())
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT])
Path(sys.argv[1], "ready" + os.environ["RANK"]).touch()
time.sleep(60)
"""
LAUNCHER = """
import os, sys
from engram_megatron.training.launch_ranks import launch_ranks
sys.exit(launch_ranks([sys.executable, "-c", sys.argv[1], sys.argv[2]], 2))
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, f"{files} are not there after 60 s"
        time.sleep(0.02)


def start(code: str, folder: Path) -> subprocess.Popen[str]:
    """A launcher of two ranks that run `code`, once both are ready."""
    launcher = subprocess.Popen(
        python(LAUNCHER, code, str(folder)),
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run under nohup hand down an ignored SIGHUP, which the launcher would leave ignored.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    wait_for(folder / "ready0", folder / "ready1")
    return launcher


def test_ranks_get_torchruns_variables_and_their_share_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import json,os,sys; open(sys.argv[1] + os.environ['RANK'], 'w').write(json.dumps(dict(os.environ)))"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert launch_ranks(python(code, f"{tmp_path}/"), 2) == 0
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    for rank, found in enumerate((first, second)):
        expected = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        assert {name: found[name] for name in expected} == expected
        assert int(found["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    assert (first["MASTER_ADDR"], first["MASTER_PORT"]) == (second["MASTER_ADDR"], second["MASTER_PORT"])


def test_omp_num_threads_of_the_user_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os,sys; sys.exit(os.environ['OMP_NUM_THREADS'] != '7')"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launch_ranks(python(code), 1) == 0


@pytest.mark.parametrize(
    ("end", "code", "told"),
    [("sys.exit(5)", 5, "ended with exit code 5"), ("os.kill(os.getpid(), 9)", 137, "was ended by SIGKILL")],
)
def test_failed_rank_ends_the_others_and_is_named(
    end: str, code: int, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    listen = "import signal; signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])"
    program = f"import os,sys,time\n{listen}\nif os.environ['RANK'] == '1': {end}\ntime.sleep(100)"
    started = time.monotonic()
    assert launch_ranks(python(program), 3) == code
    assert time.monotonic() - started < 50  # the others sleep for 100 s
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: rank 1 (pid ")
    assert told in line


@pytest.mark.parametrize("code", [2, 3])
def test_usage_error_or_rollback_was_told_by_the_rank_itself(code: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_ranks(python(f"import sys; sys.exit({code})"), 2) == code
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("sent", "received"),
    [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGUSR1", "SIGUSR1"), ("SIGHUP", "SIGTERM")],
)
def test_stop_signal_reaches_every_rank_and_ends_with_0(sent: str, received: str, tmp_path: Path) -> None:
    launcher = start(LISTENING, tmp_path)
    launcher.send_signal(getattr(signal, sent))
    _, errors = launcher.communicate(timeout=60)
    assert (launcher.returncode, errors) == (0, "")
    assert [(tmp_path / f"got{rank}").read_text() for rank in range(2)] == [received] * 2


def test_signal_before_a_rank_listens_is_not_lost(tmp_path: Path) -> None:
    late = (
        "import sys, time\nopen(sys.argv[1] + '/up' + __import__('os').environ['RANK'], 'w')\ntime.sleep(1)" + LISTENING
    )
    launcher = subprocess.Popen(python(LAUNCHER, late, str(tmp_path)), stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "up0", tmp_path / "up1")
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=60)
    assert (launcher.returncode, errors) == (0, "")
    assert [(tmp_path / f"got{rank}").read_text() for rank in range(2)] == ["SIGTERM"] * 2


def test_second_signal_ends_ranks_that_do_not_stop(tmp_path: Path) -> None:
    launcher = start(DEAF, tmp_path)
    launcher.send_signal(signal.SIGINT)
    wait_for(tmp_path / "got0", tmp_path / "got1")
    time.sleep(2.5)
    assert launcher.poll() is None, "one signal must leave a rank the time to save"
    launcher.send_signal(signal.SIGINT)
    _, errors = launcher.communicate(timeout=30)
    assert launcher.returncode == 137
    assert errors == "error: ended by SIGKILL without saving\n"
