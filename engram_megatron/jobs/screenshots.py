"""Pictures of TensorBoard, taken by a headless Chromium."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from engram_megatron.errors import UsageError

DASHBOARDS = ("timeseries", "custom_scalars", "text", "hparams")
PINNED = ("train/loss", "validation/loss", "perf/tokens_per_second")  # atop the page of all curves
_WIDTH, _HEIGHT, _PAGE_MS, _TIMEOUT_S = 1400, 2200, 20_000, 120.0


def screenshots(logdir: Path, folder: Path) -> list[Path]:
    """A picture of each dashboard of the runs below `logdir`, in `folder`, which is made.

    Raises:
        UsageError: there is no Chromium or no run, or a program fails.
    """
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise UsageError("neither chromium nor google-chrome is installed (Debian: apt-get install chromium)")
    if not any(logdir.rglob("events.out.tfevents.*")):
        raise UsageError(f"{logdir} holds nothing that TensorBoard could show; name a run_dir or a folder of runs")
    folder.mkdir(parents=True, exist_ok=True)
    with _tensorboard(logdir) as address:
        return [_screenshot(browser, f"{address}/{page_of(name)}", folder / f"{name}.png") for name in DASHBOARDS]


def page_of(dashboard: str) -> str:
    """The address of a dashboard after TensorBoard's own."""
    cards = json.dumps([{"plugin": "scalars", "tag": tag} for tag in PINNED], separators=(",", ":"))
    query = f"?pinnedCards={urllib.parse.quote(cards)}" if dashboard == "timeseries" else ""
    return f"{query}#{dashboard}"


@contextlib.contextmanager
def _tensorboard(logdir: Path) -> Iterator[str]:
    """The address of one that has read the runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for_runs(address, server)
            yield address
        finally:
            server.terminate()


def _wait_for_runs(address: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"{address}/data/runs") as answer:
            if json.load(answer):
                return
        time.sleep(0.5)
    raise UsageError(f"TensorBoard did not show a run within {_TIMEOUT_S:g} s; try tensorboard --logdir by hand")


def _screenshot(browser: str, address: str, file: Path) -> Path:
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless=new", "--no-sandbox", "--disable-3d-apis", "--disable-dev-shm-usage"]
        command += [f"--user-data-dir={profile}", f"--window-size={_WIDTH},{_HEIGHT}", "--hide-scrollbars"]
        command += [f"--virtual-time-budget={_PAGE_MS}", f"--screenshot={file.absolute()}", address]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise UsageError(f"{browser} took no picture within {_TIMEOUT_S:g} s") from error
    if done.returncode != 0 or not file.exists():
        raise UsageError(f"{browser} took no picture: {' '.join(done.stderr.split())[-300:]}")
    return file
