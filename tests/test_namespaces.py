"""Nothing is left of namespaces and of what ran in them, however that ended."""

from __future__ import annotations

import signal
import subprocess
import sys

import namespaces
import pytest
from namespaces import ADDRESSES, INTERFACE, joined_namespaces, run_in_namespaces


def test_namespace_has_no_other_way_out_than_the_pair() -> None:
    devices = "import socket; print(sorted(name for _, name in socket.if_nameindex()))"
    for told in run_in_namespaces([[sys.executable, "-c", devices]] * 2, [{}, {}]):
        assert told == f"{['lo', INTERFACE]}\n"


def _fail_while_something_sleeps(started: list[subprocess.Popen[bytes]], named: list[str]) -> None:
    with joined_namespaces() as names:
        named.extend(names)
        started.append(subprocess.Popen(["ip", "netns", "exec", names[1], "sleep", "100"]))
        raise RuntimeError("the test fails")


def test_namespaces_and_what_runs_in_them_end_with_a_failed_test() -> None:
    started: list[subprocess.Popen[bytes]] = []
    named: list[str] = []
    with pytest.raises(RuntimeError, match="the test fails"):
        _fail_while_something_sleeps(started, named)
    assert started[0].wait(10) == -signal.SIGKILL
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not any(name in left for name in named), left


def test_hang_and_failure_end_both_commands_and_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = [sys.executable, "-c", "import time; print('sleeps', flush=True); time.sleep(100)"]
    fail = [sys.executable, "-c", f"print('at {ADDRESSES[1]}'); raise SystemExit(7)"]
    with pytest.raises(AssertionError, match=rf"namespace 1 ended with exit code 7\n(.|\n)*at {ADDRESSES[1]}"):
        run_in_namespaces([sleep, fail], [{}, {}])
    monkeypatch.setattr(namespaces, "TIMEOUT_S", 1)
    with pytest.raises(AssertionError, match=r"hang: exit codes after 1 s are \[None, None\]\n(.|\n)*sleeps"):
        run_in_namespaces([sleep, sleep], [{}, {}])
