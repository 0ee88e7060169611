"""What one node of an allocation says about itself before training starts. It judges nothing: see `node_rules`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import engram_checkpoints
import engram_data
import engram_kernels
import engram_megatron
from engram_checkpoints.checkpoint_files import COMPLETE, read_manifest
from engram_checkpoints.run_checkpoints import complete_checkpoints
from engram_data.corpus import Corpus
from engram_data.errors import CorpusError
from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.jobs.installed import code_digest, imported_version
from engram_megatron.tables.host_memory import available_bytes
from engram_megatron.tables.nvme_placement import check_folder
from engram_megatron.training.run_folder import write_text

MODULES = {  # by the name of the package
    "torch": "torch",
    "megatron-core": "megatron.core",
    "emerging-optimizers": "emerging_optimizers",
    "numpy": "numpy",
    "zarr": "zarr",
    "triton": "triton",
    "numba": "numba",
}
OUR_PACKAGES = (engram_megatron, engram_checkpoints, engram_data, engram_kernels)
SHARED_MEMORY = Path("/dev/shm")
_GPU_QUERY = "name,driver_version,ecc.errors.uncorrected.volatile.total"


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """Of one node; goes through JSON. Bytes are free ones, if nothing else is said."""

    host: str  # as Slurm calls it
    versions: dict[str, str]  # of what must be the same on all nodes
    cores: int  # that this process may use
    memory_bytes: int
    shm_size_bytes: int
    shm_bytes: int
    gpus: list[str]  # names, as the driver lists them
    usable_gpus: int  # that torch sees
    gpu_errors: int  # uncorrected errors of their memory since the driver was loaded
    corpus: str  # fingerprint of the training split; "": see `problems`
    checkpoint: str  # newest complete one: name and sum of its manifest; "" where there is none
    nvme_bytes: int  # on the disk of tables.nvme_dir; 0 where that is not set
    problems: list[str]  # what this node cannot do

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> NodeFacts:
        return cls(**json.loads(text))


def collect_facts(config: RunConfig, host: str, token: str) -> NodeFacts:
    """The facts of this node, called `host`, as a run of `config` needs them. What fails becomes a problem.

    Leaves `token` in a file of the run folder, for the others to find: see `unseen_files`.
    """
    problems: list[str] = []

    def attempt(action: Callable[[], str]) -> str:
        try:
            return action()
        except (UsageError, CorpusError, OSError, ValueError, KeyError) as error:
            problems.append(" ".join(str(error).split()))
            return ""

    attempt(lambda: _leave_file(Path(config.run_dir), host, token))
    nvme_dir, local_dir = config.tables.nvme_dir, config.checkpoint.local_dir
    corpus = attempt(lambda: Corpus.open(config.data.corpus, "train").fingerprint)
    checkpoint = attempt(lambda: newest_checkpoint(Path(config.run_dir)))
    nvme = attempt(lambda: _nvme_bytes(nvme_dir)) if nvme_dir else ""
    if local_dir:
        attempt(lambda: _write_to("checkpoint.local_dir", Path(local_dir)))
    gpus = attempt(lambda: _nvidia_smi(_GPU_QUERY)).splitlines()
    names, drivers, errors = zip(*(_fields(line) for line in gpus), strict=True) if gpus else ((), (), ())
    return NodeFacts(
        host=host,
        versions=versions() | ({"CUDA driver": drivers[0]} if gpus else {}),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=available_bytes(),
        shm_size_bytes=shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else 0,
        shm_bytes=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0,
        gpus=list(names),
        usable_gpus=torch.cuda.device_count(),
        gpu_errors=sum(int(error) for error in errors if error.isdigit()),
        corpus=corpus,
        checkpoint=checkpoint,
        nvme_bytes=int(nvme or 0),
        problems=problems,
    )


def unseen_files(run_dir: Path, hosts: Sequence[str], token: str, timeout_s: float) -> list[str]:
    """Those of `hosts` whose file with `token` does not show here, at the latest after `timeout_s` seconds: a network
    file system may show a new file late."""
    deadline = time.monotonic() + timeout_s
    while True:
        unseen = [host for host in hosts if not _holds(host_file(run_dir, host), token)]
        if not unseen or time.monotonic() > deadline:
            return unseen
        time.sleep(0.2)


def host_file(run_dir: Path, host: str) -> Path:
    """What node `host` leaves in the run folder for the others to find."""
    return run_dir / "job" / "preflight" / host


def _holds(path: Path, text: str) -> bool:
    try:
        os.listdir(path.parent)  # NFS remembers for a while that a file was not there, but not what a folder holds
        return path.read_text() == text
    except OSError:
        return False


def _leave_file(run_dir: Path, host: str, token: str) -> str:
    path = host_file(run_dir, host)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, token)
    except OSError as error:
        raise UsageError(f"run_dir = {run_dir} cannot be written: {error.strerror}") from error
    return ""


def versions() -> dict[str, str]:
    """Of what runs here, by name. Our own is the sum of its code, which changes with every edit."""
    found = {"python": ".".join(map(str, sys.version_info[:3])), "CUDA": str(torch.version.cuda)}
    found |= {package: imported_version(module, package) for package, module in MODULES.items()}
    folders = [Path(path) for package in OUR_PACKAGES for path in package.__path__]
    return found | {"code of engram-megatron": code_digest(folders)}


def newest_checkpoint(run_dir: Path) -> str:
    """The newest complete checkpoint of the run and the CRC-32C of its manifest; "" where there is none."""
    complete = complete_checkpoints(run_dir)
    if not complete:
        return ""
    read_manifest(complete[-1])  # it is what COMPLETE says
    crc32c = json.loads((complete[-1] / COMPLETE).read_text())["manifest_crc32c"]
    return f"{complete[-1].name} (manifest's CRC-32C {crc32c:08x})"


def _nvme_bytes(nvme_dir: str) -> str:
    check_folder(nvme_dir)
    _write_to("tables.nvme_dir", Path(nvme_dir))
    return str(shutil.disk_usage(nvme_dir).free)


def _write_to(key: str, folder: Path) -> str:
    """Prove that files can be made in `folder`, the value of `key`, which is made where it does not exist."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"preflight")
            file.flush()
    except OSError as error:
        raise UsageError(f"{key} = {folder} cannot be written: {error.strerror}") from error
    return ""


def _nvidia_smi(query: str) -> str:
    """A line per GPU; nothing where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired as error:
        raise UsageError("nvidia-smi does not answer: the driver hangs; reboot the node") from error
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
        raise UsageError(f"nvidia-smi fails with exit code {done.returncode}: {said[-1]}")
    return done.stdout.strip()


def _fields(line: str) -> tuple[str, str, str]:
    """Name, driver and count of errors of a GPU. The count is no number where its memory has no check."""
    name, driver, errors = (field.strip() for field in line.split(","))
    return name, driver, errors
