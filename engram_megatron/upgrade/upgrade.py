"""Make a checkpoint that starts a run of `config` from one of a smaller or other model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from engram_checkpoints.backbone_reader import BackboneReader
from engram_checkpoints.checkpoint_files import damages, read_manifest
from engram_checkpoints.offline_writer import BACKBONE, TABLES, OfflineWriter
from engram_checkpoints.table_format import is_table_chunk
from engram_checkpoints.table_reader import TableReader
from engram_checkpoints.target_folder import check_is_new
from engram_checkpoints.tensor_source import TensorSource
from engram_checkpoints.train_state import TrainState
from engram_data.corpus import Corpus
from engram_data.stream import TokenStream
from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.hashing.ngram_hasher import NgramHasher
from engram_megatron.overrides import from_dict, to_dict
from engram_megatron.tables.table_shard import InitialRows
from engram_megatron.training.preflight import hasher_of
from engram_megatron.training.train_state import check_hash_identity, check_tokenizer
from engram_megatron.upgrade.changes import Changes, changes_between
from engram_megatron.upgrade.fewer_experts import FewerExperts, Kept, most_wanted, read_kept
from engram_megatron.upgrade.new_memory import NewMemoryWeights, rows_left_out, table_of
from engram_megatron.upgrade.rehash import Rehash, TokenBatch
from engram_megatron.upgrade.weights import Weights

GIB = 1024**3
_BATCH_TOKENS = 2**17  # hashed at a time when tables are rehashed
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True, kw_only=True)
class Upgrade:
    """What is to be done, checked. `corpus`, `old_hasher` and `hasher` where there are tables."""

    source: Path
    state: TrainState  # of the source
    config: RunConfig
    changes: Changes
    weights: TensorSource  # of the source
    kept: Kept | None
    corpus: Corpus | None
    old_hasher: NgramHasher | None
    hasher: NgramHasher | None


def plan_upgrade(source: Path, config: RunConfig, experts: Path | None) -> Upgrade:
    """Check everything that can be checked without reading the weights. `experts` names those to keep (`read_kept`).

    Raises:
        UsageError, CorpusError: the first thing that cannot work, in one line.
    """
    config.validate()
    state = TrainState.read(source)
    before = from_dict(RunConfig, state.config)
    changes = changes_between(before, config, source)
    if changes.kept_experts is None and experts is not None:
        raise UsageError(f"--experts {experts} needs model.moe.num_experts below that of {source}")
    weights = Weights(BackboneReader(source / BACKBONE))
    corpus = None
    if config.engram is not None:
        if not config.data.corpus:
            raise UsageError("data.corpus is not set: add data.corpus=PATH; its tokenizer addresses the tables")
        corpus = Corpus.open(config.data.corpus, "train")
        check_tokenizer(state, corpus.tokenizer.sha256, source)
    old_hasher = None if corpus is None else hasher_of(before, corpus)
    check_hash_identity(state, None if old_hasher is None else old_hasher.identity(), source)
    return Upgrade(
        source=source,
        state=state,
        config=config,
        changes=changes,
        weights=weights,
        kept=_kept(weights, changes.kept_experts, experts),
        corpus=corpus,
        old_hasher=old_hasher,
        hasher=None if corpus is None else hasher_of(config, corpus),
    )


def run_upgrade(upgrade: Upgrade, target: Path, *, max_bytes: int, say: Callable[[str], None]) -> None:
    """Write `target`. `max_bytes`: of table heads in memory while they are rehashed; `say` is given lines to print.

    Raises:
        UsageError, CorpusError: something stands at `target`, or a file of the source or the corpus is damaged.
    """
    check_is_new(target)
    _check_files(upgrade.source)
    writer = OfflineWriter(target)
    for source in _tensors(upgrade, say):
        for name in source.tensors:
            writer.backbone.add(name, source)
    if upgrade.config.engram is not None:
        _write_tables(upgrade, writer, max_bytes, say)
    writer.finish(_state(upgrade), num_steps=0)


def _kept(weights: TensorSource, num_kept: int | None, experts: Path | None) -> Kept | None:
    if num_kept is None:
        return None
    return most_wanted(weights, num_kept) if experts is None else read_kept(experts, weights, num_kept)


def _tensors(upgrade: Upgrade, say: Callable[[str], None]) -> Iterator[TensorSource]:
    """The sources of all tensors of the new backbone."""
    if upgrade.kept is None:
        yield upgrade.weights
    else:
        yield FewerExperts(upgrade.weights, upgrade.kept)
        for layer, experts in upgrade.kept.items():
            say(f"{layer}: kept experts {', '.join(map(str, experts))}")
    if upgrade.changes.tables == "add":
        added = NewMemoryWeights(upgrade.config, upgrade.weights.tensors[_EMBEDDING].dtype)
        yield added
        say(f"added {len(added.tensors)} tensors of Engram")


def _write_tables(upgrade: Upgrade, writer: OfflineWriter, max_bytes: int, say: Callable[[str], None]) -> None:
    assert upgrade.hasher is not None
    description, no_rates = table_of(upgrade.config, upgrade.hasher.total_rows), np.empty(0)
    if upgrade.changes.tables == "add":
        writer.write_tables(description, no_rates, partial(rows_left_out, description))
        say(f"added tables of {description.total_rows:,} rows of zeros: no effect before the first step")
        return
    reader = TableReader(upgrade.source / TABLES)
    if upgrade.changes.tables == "none":
        writer.write_tables(replace(reader.description, base=None), reader.learning_rates(), reader.rows)
        return
    rehash = _rehash(upgrade, reader, description.num_moments, max_bytes, say)
    writer.write_tables(replace(description, initial=None), no_rates, rehash.rows)
    report = rehash.report
    say(
        f"{reader.description.total_rows:,} rows became {report.rows:,}: {report.addressed_rows / report.rows:.1%} of "
        f"them are read by the corpus, {report.mixed_lookups / report.lookups:.2%} of its lookups read a mean of "
        "several old rows"
    )


def _rehash(upgrade: Upgrade, reader: TableReader, moments: int, max_bytes: int, say: Callable[[str], None]) -> Rehash:
    config, corpus, old, new = upgrade.config, upgrade.corpus, upgrade.old_hasher, upgrade.hasher
    assert config.engram is not None
    assert corpus is not None
    assert old is not None
    assert new is not None
    return Rehash(
        reader,
        old,
        new,
        partial(_batches, config, corpus),
        InitialRows(config.training.seed, config.engram.init_std),
        moments=moments,
        max_bytes=max_bytes,
        on_pass=lambda done, heads: say(f"heads {done + 1}.. of {heads}: reading {corpus.path}"),
    )


def _batches(config: RunConfig, corpus: Corpus) -> Iterator[TokenBatch]:
    """All samples of `corpus` once, with the windows that training sees."""
    assert config.engram is not None
    stream = TokenStream(
        corpus,
        sequence_length=config.data.sequence_length,
        global_batch_size=1,
        micro_batch_size=1,
        data_rank=0,
        data_ranks=1,
        seed=0,
        separate_documents=config.data.separate_documents,
    )
    size = max(1, _BATCH_TOKENS // config.data.sequence_length)
    for start in range(0, stream.num_samples, size):
        batch = stream.batch(range(start, min(start + size, stream.num_samples)))
        yield batch.tokens, batch.document_ids if config.engram.cut_at_documents else None


def _check_files(source: Path) -> None:
    """Raise `UsageError` for a damaged file; chunks of tables carry sums of their own, which reading compares."""
    files = [(name, wanted) for name, wanted in read_manifest(source).items() if not is_table_chunk(name)]
    damage = next(damages(source, files), None)
    if damage is not None:
        raise UsageError(f"{damage}; use another checkpoint")


def _state(upgrade: Upgrade) -> TrainState:
    """A start: nothing of the source's run is continued. The config says where the weights are from."""
    config = upgrade.config
    config = replace(config, checkpoint=replace(config.checkpoint, init_from=str(upgrade.source)))
    return replace(
        upgrade.state,
        step=0,
        tokens_seen=0,
        world_size=1,
        hash_identity=None if upgrade.hasher is None else upgrade.hasher.identity(),
        config=to_dict(config),
    )
