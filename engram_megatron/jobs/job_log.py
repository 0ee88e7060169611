"""What ranks have said into the log of their job."""

from __future__ import annotations

import re
from pathlib import Path

_ERROR = re.compile(r"^(?:\d+: )?error: (.+)$", re.MULTILINE)  # with srun's label of the task
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
        """What went wrong since the mark: the first line `error: ...`, without that word, of a rank that was killed,
        else of any; others are what came of it."""
        try:
            with self.path.open("rb") as stream:
                stream.seek(self._from)
                found = _ERROR.findall(stream.read().decode(errors="replace"))
        except OSError:
            return None
        return next((line for line in found if _KILLED in line), next(iter(found), None))
