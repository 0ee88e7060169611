"""A stop that was asked for is remembered, whatever way it came."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engram_megatron.training.stop_signal import StopSignal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_is_remembered_and_its_handler_restored(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    with StopSignal(tmp_path) as stop:
        assert stop.reason() is None
        os.kill(os.getpid(), number)
        assert stop.reason() == number.name
        assert stop.reason() == number.name, "a reason is not used up by asking"
    assert signal.getsignal(number) is before


def test_blocked_signal_arrives_when_the_handler_stands(tmp_path: Path) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # other threads of pytest do not block it
    with StopSignal(tmp_path) as stop:
        assert stop.reason() == "SIGTERM"


def test_stop_file_asks_for_a_stop(tmp_path: Path) -> None:
    with StopSignal(tmp_path) as stop:
        (tmp_path / "STOP").touch()
        assert stop.reason() == "file STOP"


def test_only_the_watching_rank_looks_for_the_stop_file(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    assert StopSignal(tmp_path, watch_file=False).reason() is None


def test_second_signal_ends_a_process_that_hangs(tmp_path: Path) -> None:
    hang = f"""
import signal, time
from pathlib import Path
from engram_megatron.training.stop_signal import StopSignal
with StopSignal(Path({str(tmp_path)!r})):
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""
    process = subprocess.Popen([sys.executable, "-c", hang], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    time.sleep(2.5)
    assert process.poll() is None, "a launcher's echo of the same signal must not end a rank that saves"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM
    process.stdout.close()
