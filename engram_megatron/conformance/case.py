"""One case of a directory of vectors: its manifest entry, its arrays, and how far ours may be from them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_megatron.errors import UsageError

Array = NDArray[Any]
Arrays = dict[str, Array]


class Mismatch(Exception):
    """A case does not hold, or its vectors cannot be read: the message says what."""


@dataclass(frozen=True)
class Case:
    """A manifest entry: `kind`, `file` (an .npz next to the manifest), and whatever else its kind needs."""

    directory: Path
    entry: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.entry.get("kind"))

    @property
    def file(self) -> str:
        return str(self.entry.get("file"))

    def arrays(self) -> Arrays:
        """All arrays of the case, after its file's sha256 was found to be the manifest's. Raises `Mismatch`."""
        check_sha256(self.directory / self.file, str(self.entry["sha256"]))
        with np.load(self.directory / self.file, allow_pickle=False) as archive:
            return dict(archive)


def read_manifest(directory: Path) -> list[Case]:
    """The cases of `directory`. Raises `UsageError` where there is no manifest, or one without cases."""
    path = directory / "manifest.json"
    try:
        cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no manifest of vectors: {type(error).__name__}: {error}") from error
    if not isinstance(cases, list) or not cases or not all(isinstance(entry, dict) for entry in cases):
        raise UsageError(f"{path} holds no cases: expected a non-empty list of objects under 'cases'")
    return [Case(directory, entry) for entry in cases]


def check_sha256(path: Path, expected: str) -> None:
    """Raise `Mismatch` unless the file has this sha256."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise Mismatch(f"{path.name}: sha256 is {found}, the manifest says {expected}")


def check_equal(name: str, ours: Array, expected: Array) -> None:
    """Raise `Mismatch` unless two integer arrays are equal in shape and value."""
    _check_shape(name, ours, expected)
    wrong = np.flatnonzero(ours != expected)
    if len(wrong) > 0:
        first = wrong[0]
        raise Mismatch(
            f"{name}: {len(wrong)} of {expected.size} differ, first at flat index {first}: "
            f"ours {ours.flat[first]}, expected {expected.flat[first]}"
        )


def check_close(name: str, ours: Array, expected: Array) -> float:
    """The largest absolute difference; raises `Mismatch` above 1e-11 for float64, above 2e-5 for float32."""
    _check_shape(name, ours, expected)
    # Both sides compute in one type, only the order of sums differs: some 1e-14 and 2e-6 for vectors of order one. A
    # wrong formula stands out by orders of magnitude.
    tolerance = 1e-11 if expected.dtype == np.float64 else 2e-5
    difference = float(np.max(np.abs(ours - expected), initial=0.0))
    if not difference <= tolerance:  # so written, a NaN is a mismatch
        raise Mismatch(f"{name}: largest difference {difference:.2e} exceeds {tolerance:.0e}")
    return difference


def _check_shape(name: str, ours: Array, expected: Array) -> None:
    if ours.shape != expected.shape:
        raise Mismatch(f"{name}: our shape {ours.shape}, expected {expected.shape}")
