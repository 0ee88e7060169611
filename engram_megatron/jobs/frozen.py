"""A submission, as it stands in the run folder: what is run again after a requeue, whatever was edited meanwhile.

RUN_DIR/job/003/          the third submission of the run
  submit.sbatch           what sbatch got
  options.json            what was asked of Slurm
  command.json            preset and overrides
  code/                   the programs, as they were
  code.diff  code.json    against the git commit named there, for people
  environment.txt         versions of all packages
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from engram_megatron.jobs.options import JobOptions, options_from_json
from engram_megatron.training.run_folder import write_json

ROOT = Path(__file__).parents[2]
_CODE = ("engram_megatron", "kernels", "data_pipeline", "checkpoints", "launch", "slurm")
_OPTIONS, _COMMAND = "options.json", "command.json"


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """The folder of a submission, and what training is started with."""

    path: Path
    options: JobOptions
    preset: str
    overrides: tuple[str, ...]

    @property
    def run_dir(self) -> Path:
        return self.path.parents[1]

    @property
    def code(self) -> Path:
        return self.path / "code"

    @property
    def script(self) -> Path:
        return self.path / "submit.sbatch"

    def train_command(self) -> list[str]:
        """The arguments of Python that make a rank of the run; it goes on where the run stands."""
        return [str(self.code / "launch/train.py"), self.preset, *self.overrides, "--resume"]


def next_folder(run_dir: Path) -> Path:
    """Where the next submission of a run goes."""
    numbers = [int(path.name) for path in (run_dir / "job").glob("[0-9]*") if path.name.isdigit()]
    return run_dir / "job" / f"{max(numbers, default=0) + 1:03d}"


def freeze(frozen: Frozen) -> None:
    """Write all of it but the script. Raises `OSError`."""
    frozen.path.mkdir(parents=True)
    write_json(frozen.path / _OPTIONS, asdict(frozen.options))
    write_json(frozen.path / _COMMAND, {"preset": frozen.preset, "overrides": frozen.overrides})
    _copy_code(frozen.code)
    commit, diff = _git("rev-parse", "HEAD").strip(), _git("diff", "HEAD")
    write_json(frozen.path / "code.json", {"commit": commit or None, "changed": bool(diff), "copied_from": str(ROOT)})
    (frozen.path / "code.diff").write_text(diff)
    packages = sorted(f"{found.name}=={found.version}" for found in importlib.metadata.distributions())
    (frozen.path / "environment.txt").write_text("\n".join([f"python=={platform.python_version()}", *packages]) + "\n")


def read_frozen(path: Path) -> Frozen:
    """The submission in folder `path`."""
    command = json.loads((path / _COMMAND).read_text())
    return Frozen(
        path=path,
        options=options_from_json(json.loads((path / _OPTIONS).read_text())),
        preset=command["preset"],
        overrides=tuple(command["overrides"]),
    )


def _copy_code(target: Path) -> None:
    """With times of change, by which numba knows what it has compiled: that comes along."""
    target.mkdir()
    for folder in _CODE:
        shutil.copytree(ROOT / folder, target / folder, ignore=_not_code)


def _not_code(folder: str, names: Sequence[str]) -> set[str]:
    compiled = Path(folder).name == "__pycache__" and "kernels" in Path(folder).parts
    kept = (".py", ".sh", ".c", ".h", ".json", ".toml", ".txt")
    return {
        name
        for name in names
        if not ((Path(folder) / name).is_dir() or name.endswith(kept) or (compiled and not name.endswith(".pyc")))
        or (name == "__pycache__" and "kernels" not in Path(folder).parts)
        or name == "samples"
    }


def _git(*arguments: str) -> str:
    """Empty outside a checkout, or without git."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""
