"""The job that builds a corpus: MPI ranks on two nodes, put back into the queue, give the bytes of one process."""

from __future__ import annotations

import lzma
import sys
from pathlib import Path

import pytest
from slurm_cluster import ROOT, Cluster, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_job_that_is_cut_short_goes_on_to_the_bytes_of_one_process(
    slurm_cluster: Cluster, tiny_corpus: Path, tmp_path: Path
) -> None:
    text, out, alone, log = (tmp_path / name for name in ("text.jsonl", "out", "alone", "job.log"))
    text.write_bytes(lzma.decompress((ROOT / "data_pipeline/samples/sotu.jsonl.xz").read_bytes()))
    options = ("--tokenizer", str(tiny_corpus / "tokenizer.json"), "--unit-mib", "0.25")
    slurm_cluster.command(sys.executable, "launch/build_corpus.py", str(text), str(alone), *options)

    size = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")
    place = ("--parsable", f"--output={log}", f"--export=ALL,PYTHON={sys.executable}")
    job = slurm_cluster.command(
        "sbatch", *size, *place, "slurm/build_corpus.sbatch", str(text), str(out), *options
    ).strip()
    pieces = tmp_path / "out.partial/pieces"
    wait_until(lambda: len(list(pieces.glob("*"))) >= 3, "pieces", log.read_text)
    slurm_cluster.command("scancel", "--batch", "--signal=USR1", job)  # what comes before the time limit
    wait_until(out.exists, "the corpus", log.read_text)

    assert "going on: " in log.read_text(), log.read_text()
    found, expected = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (out, alone)
    )
    assert found == expected
    slurm_cluster.wait_until_ended(job)
