"""What ranks, srun and Slurm have said into the log of a job."""

from __future__ import annotations

import re
from pathlib import Path

_ERROR = re.compile(r"^(?:\d+: )?error: (.+)$", re.MULTILINE)  # with srun's label of the task
# srun's word of a task that a signal ended: nobody else tells it without torchrun's agent.
_TASK = re.compile(r"^srun: error: (\S+): tasks? ([\d,-]+): (Killed|Segmentation fault|Bus error|Aborted)", re.M)
_LOST_PEER = " by peer"  # connection closed, reset
# Slurm's word when it ends a job.
_ENDED = re.compile(
    r"^slurmstepd\S*: error: \*\*\* JOB \d+ ON \S+ CANCELLED AT \S+(?: DUE TO ([^,]+?)(?:,.*)?)? \*\*\*$", re.M
)
_KILLED = " was ended by SIG"  # of a rank: others then fail in a collective with it, and may be faster to say so


class JobLog:
    """The file that Slurm writes what a job prints to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._from = 0

    def mark(self) -> None:
        """What comes from now on is of the next try."""
        self._from = self.path.stat().st_size if self.path.exists() else 0

    def first_error(self) -> str | None:
        """What went wrong since the mark: of a rank that was killed, else the first line `error: ...`, without that
        word; others are what came of it."""
        text = self._text()
        found: list[str] = _ERROR.findall(text)
        killed = next((line for line in found if _KILLED in line), None)
        if killed is not None:
            return killed
        first = next(iter(found), None)
        # Those that srun itself ends, as the others have failed, are told alike, but not by an error of a lost peer.
        if first is None or _LOST_PEER in first:
            for node, numbers, how in _TASK.findall(text):
                return f"task {numbers} on {node} was ended by a signal: {how}"
        return first

    def ended_by(self) -> str | None:
        """Why Slurm has ended the job since the mark, in its words: NODE FAILURE, TIME LIMIT, PREEMPTION, JOB REQUEUE;
        "" for scancel; None while it has not. Its commands say no more than COMPLETING as long as processes end."""
        found = _ENDED.findall(self._text())
        return found[-1] if found else None

    def _text(self) -> str:
        try:
            with self.path.open("rb") as stream:
                stream.seek(self._from)
                return stream.read().decode(errors="replace")
        except OSError:
            return ""
