"""What a job asks of Slurm, and how it goes on after a fault: flags of `slurm/submit.py`, defaults of a site's file."""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from engram_megatron.config_fields import check
from engram_megatron.errors import UsageError

# Slurm's: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds.
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """Of a job. Empty text and 0 leave a choice to Slurm, where not said otherwise."""

    nodes: int = _option(1, "nodes that train")
    min_nodes: int = _option(0, "nodes that do where Slurm has no more; 0: as many as --nodes")
    ranks_per_node: int = _option(0, "processes on each node; 0: one for each of its GPUs")
    gpus_per_node: int = _option(0, "GPUs of each node")
    cpus_per_node: int = _option(0, "cores of each node, for all of its ranks")
    memory: str = _option("", "memory of each node, as sbatch --mem takes it; 0: all")
    time: str = _option("", "limit of one job; the run saves before it and goes on in the queue")
    partition: str = _option("", "partition")
    account: str = _option("", "account")
    qos: str = _option("", "quality of service")
    constraint: str = _option("", "features of nodes")
    exclude: str = _option("", "nodes not to use")
    reservation: str = _option("", "reservation")
    sbatch: tuple[str, ...] = _option((), "another line for sbatch, such as --comment=x; may be repeated")
    environment: tuple[str, ...] = _option((), "NAME=VALUE for all ranks; may be repeated")
    container_image: str = _option("", "image in which ranks run, by pyxis (srun --container-image)")
    container_mounts: str = _option("", "SOURCE:TARGET,... for the container")
    apptainer_image: str = _option("", "image in which ranks run, by apptainer")
    launcher: str = _option("torchrun", "torchrun: a task per node starts its ranks; srun: a task per rank")
    chain: int = _option(1, "jobs in the queue, one after the other: the next takes over where one is lost")
    signal_s: int = _option(300, "seconds before the time limit at which the run saves and ends")
    retries: int = _option(3, "tries in a row that come no further before the run gives up")
    hang_s: int = _option(
        900, "seconds without progress of any rank, four times as many to start or save, before all are started again"
    )

    def validate(self) -> None:
        """Raise `UsageError` for a value that cannot be."""
        for name, least in (("nodes", 1), ("chain", 1), ("signal_s", 1), ("retries", 1), ("hang_s", 10)):
            check(getattr(self, name) >= least, f"--{_flag(name)} {getattr(self, name)} must be at least {least}")
        for name in ("min_nodes", "ranks_per_node", "gpus_per_node", "cpus_per_node"):
            check(getattr(self, name) >= 0, f"--{_flag(name)} {getattr(self, name)} must not be negative")
        check(self.min_nodes <= self.nodes, f"--min-nodes {self.min_nodes} must be at most --nodes {self.nodes}")
        check(
            not self.time or _TIME.fullmatch(self.time) is not None,
            f"--time {self.time!r} is no time of Slurm's: write HOURS:MINUTES:SECONDS or DAYS-HOURS",
        )
        check(self.launcher in ("torchrun", "srun"), f"--launcher {self.launcher!r} is neither torchrun nor srun")
        for variable in self.environment:
            check(_VARIABLE.fullmatch(variable) is not None, f"--environment {variable!r} is not NAME=VALUE")
        for line in self.sbatch:
            check(line.startswith("-") and "\n" not in line, f"--sbatch {line!r} is no option of sbatch's")
        check(
            not (self.container_image and self.apptainer_image),
            "--container-image and --apptainer-image: choose one way to run containers",
        )
        check(
            not self.container_mounts or bool(self.container_image or self.apptainer_image),
            f"--container-mounts {self.container_mounts} needs --container-image or --apptainer-image",
        )
        image = self.apptainer_image or self.container_image
        if image.startswith(("/", ".")) and not Path(image).exists():
            raise UsageError(f"container image {image} does not exist")

    @property
    def ranks_on_node(self) -> int:
        return self.ranks_per_node or max(1, self.gpus_per_node)

    @property
    def least_nodes(self) -> int:
        return self.min_nodes or self.nodes

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_on_node


def add_options(parser: argparse.ArgumentParser) -> None:
    """A flag for each option. One that is not given is not in the namespace."""
    group = parser.add_argument_group("job")
    for option in fields(JobOptions):
        kind: dict[str, Any] = {"type": type(option.default)}
        if isinstance(option.default, tuple):
            kind = {"action": "append", "type": str}
        text = option.metadata["help"] + (f" ({option.default})" if option.default else "")
        group.add_argument(f"--{_flag(option.name)}", default=argparse.SUPPRESS, help=text, **kind)


def job_options(arguments: argparse.Namespace, site: Path | None) -> JobOptions:
    """The flags that were given, over the site's file, over the defaults.

    Raises `UsageError` for a value that cannot be, or a key that is none.
    """
    options = _with(JobOptions(), read_site(site), str(site)) if site is not None else JobOptions()
    names = {option.name for option in fields(JobOptions)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    options = _with(options, given, "the command line")
    options.validate()
    return options


def read_site(path: Path) -> dict[str, Any]:
    """The options of a TOML file. Raises `UsageError` where it cannot be read."""
    try:
        with path.open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise UsageError(f"site defaults {path} cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"site defaults {path} are no TOML: {error}") from error


def options_from_json(values: Mapping[str, Any]) -> JobOptions:
    """What `dataclasses.asdict` and JSON made of options."""
    return _with(JobOptions(), values, "job/options.json")


def _with(options: JobOptions, values: Mapping[str, Any], source: str) -> JobOptions:
    defaults = {option.name: option.default for option in fields(JobOptions)}
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name not in defaults:
            raise UsageError(f"{source}: {name!r} is no option of a job; there are {', '.join(defaults)}")
        default = defaults[name]
        value = tuple(value) if isinstance(default, tuple) and isinstance(value, list) else value
        if type(value) is not type(default):
            raise UsageError(f"{source}: {name} = {value!r} should be of type {type(default).__name__}")
        changes[name] = value
    return replace(options, **changes)


def _flag(name: str) -> str:
    return name.replace("_", "-")
