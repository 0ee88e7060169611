"""Runs that start from upgraded checkpoints, on megatron-core ranks."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import Start, backbone, run_starts, tiny_config, train_losses

from engram_checkpoints.backbone_reader import BackboneReader
from engram_checkpoints.offline_writer import OfflineWriter
from engram_checkpoints.table_reader import TableReader
from engram_checkpoints.train_state import TrainState
from engram_data.build import build_corpus
from engram_data.tokenizer import load_tokenizer
from engram_megatron.config import RunConfig
from engram_megatron.upgrade.new_memory import rows_left_out, table_of
from engram_megatron.upgrade.upgrade import plan_upgrade, run_upgrade

pytestmark = pytest.mark.slow
MOE = "engram=none"
ENGRAM = "decoder.layers.1.engram."
ONE_RANK = "parallel.expert=1"
GROWN_ROWS = ("engram.rows_per_head=500000", "tables.block_rows=65536")


class Runs:
    """Configs of runs in one folder on one corpus, and upgraded checkpoints beside them."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder, self.corpus = folder, corpus

    def config(self, name: str, *overrides: str, start: Path | None = None) -> RunConfig:
        init = () if start is None else (f"checkpoint.init_from={start}",)
        return tiny_config(self.corpus, self.folder / name, "checkpoint.every_steps=0", *init, *overrides)

    def last(self, name: str) -> Path:
        """A run's last checkpoint."""
        return max((self.folder / name / "checkpoints").iterdir())

    def upgrade(self, source: Path, name: str, *overrides: str, kept: dict[str, list[int]] | None = None) -> Path:
        experts = None
        if kept is not None:
            experts = self.folder / f"{name}.json"
            experts.write_text(json.dumps(kept))
        target, said = self.folder / name, list[str]()
        plan = plan_upgrade(source, self.config("unused", *overrides), experts)
        run_upgrade(plan, target, max_bytes=10**9, say=said.append)
        (self.folder / f"{name}.txt").write_text("\n".join(said))
        return target


@pytest.fixture(scope="module")
def runs(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """`moe`, without Engram, trained for three steps on two ranks, and `added`: the same with Engram."""
    runs = Runs(tmp_path_factory.mktemp("runs"), tiny_corpus)
    run_starts([Start(runs.config("moe", MOE), stop_after=3)])
    runs.upgrade(runs.last("moe"), "added")
    return runs


@pytest.fixture(scope="module")
def continued(runs: Runs) -> list[Any]:
    """From `moe`: one step without Engram, six with it, on two ranks."""
    starts = [
        Start(runs.config("without", MOE, start=runs.last("moe")), stop_after=1),
        Start(runs.config("with", start=runs.folder / "added")),
    ]
    return run_starts(starts)[0]


def test_added_memory_changes_no_loss_and_trains_on_two_ranks(runs: Runs, continued: list[Any]) -> None:
    without, with_memory = continued
    assert with_memory.first_validation_loss == without.first_validation_loss
    losses = train_losses(runs.folder / "with")
    assert losses[1] == train_losses(runs.folder / "without")[1]
    assert with_memory.last_validation_loss < with_memory.first_validation_loss - 0.05
    before, after = (backbone(checkpoint) for checkpoint in (runs.folder / "added", runs.last("with")))
    width = before["embedding.word_embeddings.weight"].shape[1]
    for name in ("key_value.weight", "norm_query.weight", "norm_key.weight", "norm_conv.weight", "short_conv.weight"):
        assert (before[ENGRAM + name] != after[ENGRAM + name]).any(), name
    for part in (slice(0, width), slice(width, None)):  # value, keys
        moved = before[f"{ENGRAM}key_value.weight"][part] != after[f"{ENGRAM}key_value.weight"][part]
        assert moved.all()
    start, found = (TableReader(path / "tables.zarr") for path in (runs.folder / "added", runs.last("with")))
    everything = (0, start.description.total_rows)
    moved = (found.rows(*everything).weight != start.rows(*everything).weight).any(axis=1)
    used = found.last_step(*everything) > 0
    assert not moved[~used].any()
    assert moved[used].mean() > 0.9, "a row has no gradient at a document's last token alone"


def test_added_memory_changes_no_loss_on_one_rank_and_lazy_tables_take_it(runs: Runs) -> None:
    starts = [
        Start(runs.config("one_without", MOE, ONE_RANK, start=runs.last("moe")), stop_after=1),
        Start(runs.config("one_with", ONE_RANK, start=runs.folder / "added"), stop_after=3),
        Start(runs.config("lazy", ONE_RANK, "tables.commit=lazy", start=runs.folder / "added"), stop_after=3),
        Start(runs.config("new", ONE_RANK), stop_after=0),
    ]
    without, with_memory, lazy, _ = run_starts(starts, 1)[0]
    assert with_memory.first_validation_loss == without.first_validation_loss == lazy.first_validation_loss
    losses = train_losses(runs.folder / "one_with")
    assert losses[1] == train_losses(runs.folder / "one_without")[1]
    assert losses == train_losses(runs.folder / "lazy")
    added, new = backbone(runs.folder / "added"), backbone(runs.last("new"))
    names = [name for name in new if name.startswith(ENGRAM)]
    assert len(names) == 5
    assert [name for name in names if not torch.equal(added[name], new[name])] == []
    table = TableReader(runs.folder / "added/tables.zarr")
    assert table.description.total_rows == TableReader(runs.last("new") / "tables.zarr").description.total_rows
    assert not table.rows(0, table.description.total_rows).weight.any()
    assert not list((runs.folder / "added/tables.zarr/weight").glob("c.*")), "rows were stored"


def _changed(source: Path, target: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a checkpoint without tables whose tensors are what `change` makes of them."""
    reader, writer = BackboneReader(source / "backbone"), OfflineWriter(target)
    for name, info in reader.tensors.items():
        writer.backbone.add_rows(name, info, slice(None), change(name, reader.read(name)))
    writer.finish(TrainState.read(source), reader.num_steps)
    return target


def test_without_experts_that_no_token_chose_the_loss_is_the_same(runs: Runs) -> None:
    """Traded for tables at once: both the experts that go and the memory that comes are without effect."""

    biases = torch.tensor([0.0, -1e9, 0.0, 0.0])

    def unwanted(name: str, value: torch.Tensor) -> torch.Tensor:
        return biases if name.startswith("decoder.") and name.endswith("expert_bias") else value

    source = _changed(runs.last("moe"), runs.folder / "unwanted", unwanted)
    traded = runs.upgrade(source, "traded", "model.moe.num_experts=3", kept={"decoder.layers.1": [0, 2, 3]})
    starts = [
        Start(runs.config("all_experts", MOE, ONE_RANK, start=source), stop_after=0),
        Start(runs.config("three_experts", "model.moe.num_experts=3", ONE_RANK, start=traded), stop_after=2),
    ]
    whole, fewer = run_starts(starts, 1)[0]
    assert fewer.first_validation_loss == whole.first_validation_loss
    assert fewer.step == 2


def _phrases(corpus: Path, out: Path) -> Path:
    """A corpus of few n-grams, in the tokens of `corpus`."""
    phrases = ["the state of the union is strong", "we will work with congress", "our nation is at peace"]
    order = random.Random(0)
    texts = [". ".join(order.choices(phrases, k=60)) for _ in range(24)]
    out.with_suffix(".jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = load_tokenizer(str(corpus / "tokenizer.json"), None)
    build_corpus([str(out.with_suffix(".jsonl"))], out, tokenizer, 0.2, lambda _progress: None)
    return out


def test_grown_tables_give_the_old_loss_where_no_ngrams_collide(runs: Runs, continued: list[Any]) -> None:
    corpus = f"data.corpus={_phrases(runs.corpus, runs.folder / 'phrases')}"
    grown = runs.upgrade(runs.last("with"), "grown", *GROWN_ROWS, corpus)
    assert "0.00% of its lookups read a mean" in (runs.folder / "grown.txt").read_text()
    starts = [
        Start(runs.config("old_rows", ONE_RANK, corpus, start=runs.last("with")), stop_after=1),
        Start(runs.config("new_rows", ONE_RANK, corpus, *GROWN_ROWS, start=grown), stop_after=1),
        Start(runs.config("lost_rows", ONE_RANK, corpus, *GROWN_ROWS, start=_reset(runs, grown)), stop_after=1),
    ]
    run_starts(starts, 1)
    old, new, lost = (train_losses(runs.folder / name)[1] for name in ("old_rows", "new_rows", "lost_rows"))
    assert new == old
    assert abs(lost - old) > 1e-4, "the loss does not see the rows"


def _reset(runs: Runs, grown: Path) -> Path:
    """`grown` with new rows."""
    reader, writer = BackboneReader(grown / "backbone"), OfflineWriter(runs.folder / "reset")
    for name in reader.tensors:
        writer.backbone.add(name, reader)
    config = runs.config("unused", *GROWN_ROWS)
    description = table_of(config, TableReader(grown / "tables.zarr").description.total_rows)
    writer.write_tables(description, np.empty(0), lambda start, stop: rows_left_out(description, start, stop))
    writer.finish(TrainState.read(grown), 0)
    return runs.folder / "reset"
