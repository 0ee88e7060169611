"""Everything that can be refused before a rank starts work: config, layout, corpus, run folder, checkpoints.

`launch/train.py` calls it in the process that the user started, so that a mistake costs a second and one line.
Nothing here makes a process group, imports torch, or writes to disk, but to set a damaged checkpoint aside.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from engram_checkpoints.train_state import TrainState
from engram_data.corpus import Corpus
from engram_data.skipped_samples import Windows
from engram_data.stream import TokenStream
from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.hashing.ngram_hasher import NgramHasher
from engram_megatron.hashing.vocab_projection import build_vocab_projection, identity_projection
from engram_megatron.model.counts import parameter_specs
from engram_megatron.model.layout_rules import check_layout
from engram_megatron.optimizer.schedule import learning_rate_schedule
from engram_megatron.overrides import from_dict
from engram_megatron.tables.expected_rows import expected_touched_rows
from engram_megatron.tables.placement import placement_of
from engram_megatron.tables.row_layout import RowLayout
from engram_megatron.tables.row_store import RowFormat
from engram_megatron.training.run_folder import RunFolder, check_writable
from engram_megatron.training.train_state import advice_on_damage, check_hash_identity, check_resume, check_tokenizer


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a run reads: both splits of its corpus, the n-gram hash, and where it continues from."""

    train: Corpus
    validation: Corpus
    hasher: NgramHasher | None
    resume_from: Path | None


def check_start(config: RunConfig, num_ranks: int, *, resume: bool, set_aside: bool = False) -> None:
    """What the process that the user started checks before it starts `num_ranks` ranks on this host.

    `set_aside`: the newest checkpoint is read through first, and set aside where it is damaged, with a line that says
    so, until one is whole.

    Raises:
        UsageError, CorpusError: the first thing that cannot work, in one line.
    """
    if set_aside and config.run_dir:
        from engram_checkpoints.verify import set_aside_damaged  # loads torch, which nothing else here needs

        folder = RunFolder(config.run_dir)
        folder.check_unlocked()
        folder.check_writable()
        set_aside_damaged(folder.complete_checkpoints(), print)
    inputs = open_inputs(config, num_ranks, resume=resume)
    if config.engram is not None and inputs.hasher is not None:
        tables = config.tables
        layout = RowLayout(inputs.hasher.total_rows, tables.block_rows, num_ranks)
        row_format = RowFormat(config.engram.row_dim, tables.dtype, tables.moments)
        placement_of(tables).check(layout, row_format, num_ranks, expected_touched_rows(config, layout))


def open_inputs(config: RunConfig, world_size: int, *, resume: bool) -> Inputs:
    """Open and check what the run reads, and the state of its run folder.

    Raises:
        UsageError, CorpusError: the first thing that cannot work, in one line.
    """
    config.validate()
    check_layout(config, world_size)
    if not config.run_dir:
        raise UsageError("run_dir is not set: add run_dir=PATH, the folder that this run writes to")
    if not config.data.corpus:
        raise UsageError("data.corpus is not set: add data.corpus=PATH, a folder that launch/build_corpus.py made")
    learning_rate_schedule(config.optimizer, config.training.num_steps)
    train, validation = (Corpus.open(config.data.corpus, split) for split in ("train", "validation"))
    _check_vocabulary(config, train)
    for corpus in (train, validation):
        stream_of(config, corpus)
    hasher = hasher_of(config, train)
    identity = None if hasher is None else hasher.identity()
    _check_folders(config, resume)
    inputs = Inputs(train, validation, hasher, None)
    if resume:
        inputs = resumed(inputs, config)
    if inputs.resume_from is None and config.checkpoint.init_from:
        source = Path(config.checkpoint.init_from)
        state = TrainState.read(source)
        check_tokenizer(state, train.tokenizer.sha256, source)
        check_hash_identity(state, identity, source)
        _check_same_tensors(state, config, source)
    return inputs


def resumed(inputs: Inputs, config: RunConfig) -> Inputs:
    """`inputs` of a run that continues from the newest checkpoint, if there is one.

    Raises `UsageError` where that would not be the same run.
    """
    complete = RunFolder(config.run_dir).complete_checkpoints()
    if not complete:
        return inputs
    with advice_on_damage():
        state = TrainState.read(complete[-1])
    check_resume(state, config, inputs.train.fingerprint)
    check_hash_identity(state, None if inputs.hasher is None else inputs.hasher.identity(), complete[-1])
    return replace(inputs, resume_from=complete[-1])


def stream_of(
    config: RunConfig, corpus: Corpus, *, data_rank: int = 0, data_ranks: int = 1, skipped: Windows = ()
) -> TokenStream:
    """What a data replica reads. Raises as `TokenStream`."""
    return TokenStream(
        corpus,
        sequence_length=config.data.sequence_length,
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
        data_rank=data_rank,
        data_ranks=data_ranks,
        seed=config.data.shuffle_seed,
        separate_documents=config.data.separate_documents,
        skipped=skipped,
    )


def _check_vocabulary(config: RunConfig, corpus: Corpus) -> None:
    if config.data.tokenizer:
        try:
            digest = hashlib.sha256(Path(config.data.tokenizer).read_bytes()).hexdigest()
        except OSError as error:
            raise UsageError(f"data.tokenizer = {config.data.tokenizer} cannot be read: {error.strerror}") from error
        if digest != corpus.tokenizer.sha256:
            raise UsageError(
                f"{config.data.corpus} was made with tokenizer {corpus.tokenizer.name} (sha256 "
                f"{corpus.tokenizer.sha256[:12]}), data.tokenizer = {config.data.tokenizer} has {digest[:12]}; rebuild "
                "the corpus or leave data.tokenizer unset"
            )
    # Models round the vocabulary up a little (DeepSeek-V3: 128,815 ids in 129,280); a tenth is no rounding.
    if not 0.9 * config.model.vocab_size <= corpus.tokenizer.vocab_size <= config.model.vocab_size:
        raise UsageError(
            f"{config.data.corpus} was made with tokenizer {corpus.tokenizer.name} of {corpus.tokenizer.vocab_size} "
            f"ids, model.vocab_size = {config.model.vocab_size}; use the corpus of this model's tokenizer, or set "
            "model.vocab_size to the number of its ids, rounded up"
        )


def hasher_of(config: RunConfig, corpus: Corpus) -> NgramHasher | None:
    """The n-gram hash of a run on `corpus`, whose tokenizer decides which ids are equal; None without Engram."""
    if config.engram is None:
        return None
    if config.engram.compression:
        projection = build_vocab_projection(corpus.tokenizer_file)
    else:
        projection = identity_projection(config.model.vocab_size)
    return NgramHasher.from_config(config.engram, projection, config.model.vocab_size)


def _check_same_tensors(state: TrainState, config: RunConfig, source: Path) -> None:
    """Raise `UsageError` where the weights of `source` do not fit this model: other tensors, or other shapes."""
    ours = {spec.name: spec.shape for spec in parameter_specs(config)}
    theirs = {spec.name: spec.shape for spec in parameter_specs(from_dict(RunConfig, state.config))}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise UsageError(
                f"checkpoint.init_from = {source} holds another model: {name} has shape {theirs.get(name, 'none')} "
                f"there and {ours.get(name, 'none')} here"
            )


def _check_folders(config: RunConfig, resume: bool) -> None:
    folder = RunFolder(config.run_dir)
    folder.check_unlocked()
    folder.check_writable()
    if resume:
        folder.check_is_run_or_empty()
    else:
        folder.check_unused()
    if config.checkpoint.local_dir:
        check_writable("checkpoint.local_dir", Path(config.checkpoint.local_dir))
