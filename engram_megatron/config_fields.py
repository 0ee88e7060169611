"""What the dataclasses of a run's config share: how a field is marked, and how a rule is stated."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from engram_megatron.errors import UsageError

RESUME_FREE = {"resume": "free"}
PATH = {"kind": "path"}
DType = Literal["bfloat16", "float32", "float64"]
DTYPE_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}


def free(default: Any) -> Any:
    """A field that may change at a resume."""
    return field(default=default, metadata=RESUME_FREE)


def path(*, free: bool = False) -> Any:
    """A field that names a file or folder; a relative one counts from where the run was started, or submitted."""
    return field(default="", metadata=PATH | RESUME_FREE if free else PATH)


def check(condition: bool, message: str) -> None:
    """Raise `UsageError(message)` unless `condition`."""
    if not condition:
        raise UsageError(message)
