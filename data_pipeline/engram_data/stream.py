"""Batches of a corpus for one data-parallel rank, as a pure function of the step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engram_data.batch import Batch, make_batch
from engram_data.corpus import Corpus
from engram_data.errors import CorpusError
from engram_data.order import num_samples, samples_of
from engram_data.skipped_samples import Windows, positions_of


class TokenStream:
    """`microbatches(step)` of rank `data_rank` of `data_ranks`.

    Microbatch m of rank r holds samples m * micro_batch_size * data_ranks + r * micro_batch_size + 0.. of the global
    batch (Megatron's order). So the global batch of a step is the same for any number of ranks and any microbatch
    size, and the step and the windows that the run leaves out are the state of the stream: to resume, ask for another
    step.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        sequence_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_ranks: int,
        seed: int,
        separate_documents: bool = True,
        skipped: Windows = (),
    ) -> None:
        """Sizes in tokens and sequences. `separate_documents`: see `Batch`. `skipped`: see `skipped_samples`. Raises
        `CorpusError` where the corpus is shorter than one sample or the global batch does not divide."""
        assert 0 <= data_rank < data_ranks, (data_rank, data_ranks)
        per_pass = micro_batch_size * data_ranks
        if global_batch_size % per_pass:
            raise CorpusError(
                f"global batch size {global_batch_size} is not divisible by micro batch size * data ranks = "
                f"{micro_batch_size} * {data_ranks} = {per_pass}"
            )
        self.num_samples = num_samples(corpus.num_tokens, sequence_length)
        if self.num_samples == 0:
            raise CorpusError(
                f"{corpus.path} has {corpus.num_tokens} tokens, fewer than one sample of sequence_length + 1 = "
                f"{sequence_length + 1}: take more text, or a shorter sequence length"
            )
        self._corpus, self._sequence_length, self._seed = corpus, sequence_length, seed
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        self._num_microbatches = global_batch_size // per_pass
        self._separate_documents, self._skipped = separate_documents, skipped
        self._group_size = max(1, corpus.chunk_tokens // sequence_length)  # windows of one chunk
        microbatch = np.arange(self._num_microbatches)[:, None] * per_pass
        self._places_MB = microbatch + data_rank * micro_batch_size + np.arange(micro_batch_size)

    def samples(self, step: int) -> list[list[int]]:
        """Sample indices that this rank reads in `step` (0-based), per microbatch."""
        assert step >= 0, step
        positions = positions_of(step * self._global_batch_size + self._places_MB, self._skipped)
        samples = samples_of(self._seed, positions.reshape(-1), self.num_samples, self._group_size)
        return [[int(sample) for sample in row] for row in samples.reshape(self._places_MB.shape)]

    def microbatches(self, step: int) -> list[Batch]:
        """The microbatches of this rank in `step` (0-based). Raises `CorpusError` for a damaged chunk."""
        return [self.batch(samples) for samples in self.samples(step)]

    def batch(self, samples: Sequence[int]) -> Batch:
        """The samples of these numbers (0 .. num_samples - 1, in the order of the corpus). Raises as `microbatches`."""
        starts = [sample * self._sequence_length for sample in samples]
        windows = [self._corpus.tokens(start, start + self._sequence_length + 1) for start in starts]
        document_starts = [
            self._corpus.document_ends_between(start, start + self._sequence_length) - start for start in starts
        ]
        return make_batch(windows, document_starts, self._separate_documents)
