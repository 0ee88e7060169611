"""Which version of a package a rank that starts here would import, without an import of more than is loaded."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path


def imported_version(module: str, package: str) -> str:
    """What `module` (a folder, such as megatron.core) says of itself where this process has loaded it; else the version
    of `package` that lies beside it where Python finds it.

    Another one, further down Python's path, is installed as well and not imported. Where none lies there (a checkout,
    an editable install) the sum of the code speaks for it; "none" where there is no such module.
    """
    loaded = getattr(sys.modules.get(module), "__version__", None)
    if isinstance(loaded, str):
        return str(loaded)  # torch has a class of its own
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # nor its parent
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return "none"
    folder = Path(spec.submodule_search_locations[0])
    installed_in = folder.parents[module.count(".")]
    for found in importlib.metadata.distributions(name=package, path=[str(installed_in)]):
        return found.version
    return f"code {code_digest([folder])}"


def code_digest(folders: Sequence[Path]) -> str:
    """First 12 digits of the SHA-256 over the Python files below `folders`, their names included."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{folder.name}/{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]
