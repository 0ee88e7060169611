"""What a node says of itself is what this machine has, and what fails is told."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import tiny_config

from engram_data.corpus import Corpus
from engram_megatron.jobs.node_facts import MODULES, NodeFacts, collect_facts, host_file, unseen_files


def test_facts_are_those_of_this_machine_and_go_through_json(tiny_corpus: Path, tmp_path: Path) -> None:
    facts = collect_facts(tiny_config(tiny_corpus, tmp_path / "run"), "n7", "token")
    assert facts.host == "n7"
    assert facts.problems == []
    assert facts.versions["numpy"] == np.__version__
    assert facts.versions["torch"] == torch.__version__
    assert [name for name in MODULES if facts.versions[name] == "none" or "code" in facts.versions[name]] == []
    assert facts.cores == len(os.sched_getaffinity(0))
    shm = os.statvfs("/dev/shm")
    assert facts.shm_size_bytes == shm.f_blocks * shm.f_frsize
    assert 0 < facts.memory_bytes < 2**50
    assert facts.corpus == Corpus.open(tiny_corpus, "train").fingerprint
    assert facts.checkpoint == ""
    assert NodeFacts.from_json(facts.to_json()) == facts


def test_what_cannot_be_read_or_written_is_a_problem(tiny_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    overrides = ("checkpoint.local_dir=/proc/nobody", "checkpoint.local_every_steps=1")
    config = tiny_config(tiny_corpus / "no", tmp_path / "file", *overrides)
    problems = collect_facts(config, "n0", "token").problems
    assert f"run_dir = {tmp_path}/file cannot be written: Not a directory" in problems
    assert any(problem.startswith("checkpoint.local_dir = /proc/nobody cannot be written") for problem in problems)
    assert any(f"{tiny_corpus}/no" in problem for problem in problems)


def test_nvme_folder_tells_its_free_space_or_why_not(tiny_corpus: Path, tmp_path: Path, disk: Path) -> None:
    for folder, found in ((disk, True), (tmp_path / "none", False)):
        config = tiny_config(tiny_corpus, tmp_path / "run", "tables.placement=nvme", f"tables.nvme_dir={folder}")
        facts = collect_facts(config, "n0", "token")
        assert (facts.nvme_bytes > 0, facts.problems == []) == (found, found)
        assert abs(facts.nvme_bytes - shutil.disk_usage(disk).free) < 2**30 or not found


@pytest.mark.parametrize(
    ("script", "gpus", "errors", "problem"),
    [
        ("echo 'H100, 550.1, 0'; echo 'H100, 550.1, 3'", ["H100", "H100"], 3, None),
        ("echo 'RTX 3090, 550.1, [N/A]'", ["RTX 3090"], 0, None),
        ("echo 'Unable to talk to the driver'; exit 9", [], 0, "nvidia-smi fails with exit code 9: Unable to talk"),
    ],
)
def test_gpus_are_told_as_the_driver_tells_them(
    script: str,
    gpus: list[str],
    errors: int,
    problem: str | None,
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    facts = collect_facts(tiny_config(tiny_corpus, tmp_path / "run"), "n0", "token")
    assert (facts.gpus, facts.gpu_errors) == (gpus, errors)
    assert ("CUDA driver" in facts.versions) == bool(gpus)
    assert [p[: len(problem or "")] for p in facts.problems] == ([] if problem is None else [problem])


def test_file_of_an_earlier_preflight_does_not_count(tmp_path: Path) -> None:
    for host, token in (("a", "new"), ("b", "old")):
        host_file(tmp_path, host).parent.mkdir(parents=True, exist_ok=True)
        host_file(tmp_path, host).write_text(token)
    assert unseen_files(tmp_path, ["a", "b", "c"], "new", 0.3) == ["b", "c"]
