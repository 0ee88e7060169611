"""The folder of a run: who may write to it, where things stand, and which checkpoint is the newest.

run_dir/
  config.json            the resolved config of the latest start
  ended.json             how that has ended, once it has, and in order
  run_id                 of this run alone, even if another one stands in its place later
  metrics.jsonl          one line per logged step
  tensorboard/  profile/
  heartbeats/            a file per rank: `heartbeat`
  events.jsonl  job/  logs/    what happened to it, what was submitted, and what that printed: `engram_megatron.jobs`
  skipped_windows.jsonl  samples that it leaves out after spikes of the loss: `rollback_log`
  checkpoints/step_00000100/   complete when it holds COMPLETE
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from engram_checkpoints.checkpoint_files import COMPLETE
from engram_checkpoints.deltas import bases_of
from engram_checkpoints.rolled_back import rolled_back_checkpoints
from engram_checkpoints.run_checkpoints import complete_checkpoints
from engram_megatron.config import CheckpointConfig, RunConfig
from engram_megatron.config_fields import RESUME_FREE
from engram_megatron.errors import UsageError
from engram_megatron.overrides import from_dict, leaves, to_dict
from engram_megatron.training.heartbeat import HEARTBEATS
from engram_megatron.training.run_events import EVENTS_FILE
from engram_megatron.training.stop_signal import STOP_FILE

LOCK, RUN_ID = ".lock", "run_id"
JOB, LOGS = "job", "logs"


class RunFolder:
    """Paths below `run_dir`. Nothing is created before `claim`."""

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir)
        self.config_file = self.path / "config.json"
        self.ended_file = self.path / "ended.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"
        self.checkpoints = self.path / "checkpoints"
        self.heartbeats = self.path / HEARTBEATS
        self._lock: Any = None

    def check_unused(self) -> None:
        """Raise `UsageError` if a run stands in the folder (to continue it, `--resume`)."""
        if self.config_file.exists():
            raise UsageError(f"{self.path} already holds a run; continue it with --resume or choose another run_dir")
        self.check_is_run_or_empty()

    def check_is_run_or_empty(self) -> None:
        """Raise `UsageError` if there is something else than a run at the path. A start cut short left only a lock,
        and a submitted job that has not started what it was submitted with."""
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"run_dir = {self.path} is not a folder; choose another run_dir")
        if self.path.exists() and not self.config_file.exists():
            ours = {LOCK, RUN_ID, STOP_FILE, EVENTS_FILE, JOB, LOGS, *(path.name for path in self._subfolders())}
            others = sorted(path.name for path in self.path.iterdir() if path.name not in ours)
            if others:
                raise UsageError(f"run_dir = {self.path} holds no run but other files ({others[0]}); choose another")

    def check_writable(self) -> None:
        """Raise `UsageError` if the folder cannot be made, or not be written to."""
        check_writable("run_dir", self.path)

    def check_unlocked(self) -> None:
        """Raise `UsageError` if a live process trains in this folder. Any number of ranks may ask at a time."""
        try:
            handle = (self.path / LOCK).open()
        except OSError:
            return
        with handle:
            self._try_lock(handle, fcntl.LOCK_SH)

    def lock(self) -> None:
        """Create the folder and hold its lock until this process ends. First rank only; again, it does nothing.

        Raises:
            UsageError: another live process trains in it.
        """
        if self._lock is None:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / LOCK).open("a")
            self._try_lock(handle, fcntl.LOCK_EX)
            self._lock = handle

    def claim(self, config: RunConfig) -> None:
        """`lock`, and make what a run needs in its folder. First rank only.

        Raises:
            UsageError: another live process trains in it.
        """
        self.lock()
        for folder in self._subfolders():
            folder.mkdir(exist_ok=True)
        if self.run_id() is None or not self.config_file.exists():
            write_text(self.path / RUN_ID, secrets.token_hex(4) + "\n")
        self.ended_file.unlink(missing_ok=True)
        write_json(self.config_file, to_dict(config))

    def run_id(self) -> str | None:
        """None before the run was claimed, and where that was by an older version."""
        try:
            return (self.path / RUN_ID).read_text().strip()
        except FileNotFoundError:
            return None

    def _subfolders(self) -> tuple[Path, ...]:
        return self.tensorboard, self.checkpoints, self.heartbeats

    def _try_lock(self, handle: Any, kind: int) -> None:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{self.path} is in use by a running job; choose another run_dir") from error

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}"

    def complete_checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return complete_checkpoints(self.path)

    def remove_old_checkpoints(self, keep: CheckpointConfig) -> None:
        """Remove all but the newest `keep_last` complete checkpoints (0 keeps all) and those of every
        `keep_every_steps`-th step, what those and the ones that a rollback set aside are deltas of, and older
        incomplete ones.

        COMPLETE goes first, so that a removal cut short never leaves a folder that looks whole.
        """
        complete = self.complete_checkpoints()
        newest = complete[-1] if complete else None
        stale = complete[: -keep.keep_last] if keep.keep_last else []
        if keep.keep_every_steps:
            stale = [path for path in stale if step_of(path) % keep.keep_every_steps]
        kept = [path for path in complete if path not in stale] + rolled_back_checkpoints(self.path)
        bases = {path.resolve() for path in bases_of(kept)}
        stale = [path for path in stale if path.resolve() not in bases]
        stale += [p for p in self.checkpoints.glob("step_*") if newest and p < newest and p not in complete]
        for path in stale:
            (path / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(path)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def check_resumable(saved: dict[str, Any], config: RunConfig) -> None:
    """Raise `UsageError` naming the first key that a resume must not change (fields not marked `RESUME_FREE`).

    A field that the checkpoint's version did not know yet had its default's behaviour.
    """
    before = {key: value for key, value, _ in leaves(from_dict(RunConfig, saved))}
    for key, value, field in leaves(config):
        if field.metadata.items() >= RESUME_FREE.items() or (key in before and before[key] == value):
            continue
        # An optional part that was switched on or off since has other keys.
        was = repr(_as_json(before[key])) if key in before else "None"
        if any(other.startswith(f"{key}.") for other in before):
            was = f"{key} set"
        if was != "None" or value is not None:
            raise UsageError(
                f"cannot resume with {key} = {_as_json(value)!r}: the checkpoint was made with {was}; restore it, or "
                "start a new run with checkpoint.init_from (weights only)"
            )


def check_writable(key: str, path: Path) -> None:
    """Raise `UsageError` if folder `path`, the value of `key`, cannot be made, or not be written to."""
    path = path.absolute()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if existing.is_dir() and not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{key} = {path} cannot be written: no permission in {existing}")
    if path.exists() and not path.is_dir():
        raise UsageError(f"{key} = {path} is not a folder; choose another {key}")
    if not existing.is_dir():
        raise UsageError(f"{key} = {path} cannot be made: {existing} is not a folder")


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def write_json(path: Path, value: Any) -> None:
    """Write atomically: a reader sees the old file or the new one."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write atomically: a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)
