"""Flags of a job over the site's file over the defaults; what cannot be is one line."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from engram_megatron.errors import UsageError
from engram_megatron.jobs.options import JobOptions, add_options, job_options, options_from_json


def _options(flags: str, site: Path | None = None) -> JobOptions:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_options(parser)
    return job_options(parser.parse_args(flags.split()), site)


def test_flags_stand_over_the_site_and_that_over_the_defaults(tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text('partition = "gpu"\ngpus_per_node = 8\nsbatch = ["--exclusive"]\nretries = 5\n')
    options = _options("--nodes 4 --retries 7 --environment A=1 --environment B=x=y", site)
    assert (options.nodes, options.partition, options.retries, options.sbatch) == (4, "gpu", 7, ("--exclusive",))
    assert options.environment == ("A=1", "B=x=y")
    assert (options.ranks_on_node, options.world_size) == (8, 32)
    assert options_from_json(json.loads(json.dumps(asdict(options)))) == options


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--nodes 0", "--nodes 0 must be at least 1"),
        ("--nodes 2 --min-nodes 3", "--min-nodes 3 must be at most --nodes 2"),
        ("--time 1h", "--time '1h' is no time of Slurm's"),
        ("--environment A", "--environment 'A' is not NAME=VALUE"),
        ("--sbatch exclusive", "--sbatch 'exclusive' is no option of sbatch's"),
        ("--container-image a --apptainer-image b", "choose one way"),
        ("--container-mounts /a:/b", "needs --container-image or --apptainer-image"),
        ("--apptainer-image /nowhere/image.sif", "container image /nowhere/image.sif does not exist"),
    ],
)
def test_value_that_cannot_be_is_told(flags: str, told: str) -> None:
    with pytest.raises(UsageError) as raised:
        _options(flags)
    assert told in str(raised.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('partitoin = "gpu"', "'partitoin' is no option of a job; there are nodes, "),
        ('nodes = "4"', "nodes = '4' should be of type int"),
        ("nodes = ", "are no TOML"),
    ],
)
def test_site_that_cannot_be_is_told_with_its_file(tmp_path: Path, text: str, told: str) -> None:
    site = tmp_path / "site.toml"
    site.write_text(text)
    with pytest.raises(UsageError) as raised:
        _options("", site)
    assert told in str(raised.value)
    assert str(site) in str(raised.value)


def test_site_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        _options("", tmp_path / "none.toml")
