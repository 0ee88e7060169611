"""Another version of zarr, which Python code can import and use as the one that is installed."""

from __future__ import annotations

import shutil
from importlib.metadata import distribution
from pathlib import Path

OTHER_VERSION = "2.0.1"
ZARR_VERSION = distribution("zarr").version
FOLDERS = ("zarr", f"zarr-{ZARR_VERSION}.dist-info")


def installed_zarr() -> Path:
    """The folder that FOLDERS lie in."""
    return Path(str(distribution("zarr").locate_file("")))


def install_other_zarr(folder: Path) -> None:
    """The same code in `folder`, under another version's number, and under FOLDERS' names."""
    for name in FOLDERS:
        shutil.copytree(installed_zarr() / name, folder / name)
    for file, line in (
        ("zarr/_version.py", "__version__ = version = '{}'"),
        (f"{FOLDERS[1]}/METADATA", "\nVersion: {}"),
    ):
        text = (folder / file).read_text()
        assert line.format(ZARR_VERSION) in text
        (folder / file).write_text(text.replace(line.format(ZARR_VERSION), line.format(OTHER_VERSION)))
