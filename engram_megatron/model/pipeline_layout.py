"""Which layers stand on which pipeline stage: arithmetic on a `RunConfig`, no process groups.

A *chunk* is what one pass of a schedule runs on one rank: with `virtual_pipeline` = V every pipeline rank holds V of
them, and a microbatch visits chunk 0 of all ranks, then chunk 1 of all ranks, and so on (interleaved 1F1B, arXiv
2104.04473).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from engram_megatron.config import ParallelConfig, RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.model.pipeline_balance import balanced_layers, model_costs

_CHUNK = re.compile(r"(E?)((?:t(?:\*\d+)?)*)(m?)(L?)")
_LAYERS = re.compile(r"t(?:\*(\d+))?")


@dataclass(frozen=True)
class PipelineLayout:
    """`num_layers[i]`: decoder layers of the i-th chunk that a microbatch visits; chunk i stands on pipeline rank
    i % ranks. The embedding belongs to the first, the head, the loss and a multi-token prediction layer to the last.
    """

    ranks: int
    num_layers: tuple[int, ...]
    has_mtp: bool = False

    @property
    def chunks_per_rank(self) -> int:
        """Chunks of one pipeline rank, 1 without interleaving."""
        return len(self.num_layers) // self.ranks

    def layers(self, rank: int, chunk: int) -> range:
        """Decoder layers, counted from 0, of chunk `chunk` of pipeline rank `rank`."""
        place = chunk * self.ranks + rank
        first = sum(self.num_layers[:place])
        return range(first, first + self.num_layers[place])

    def layers_of_rank(self, rank: int) -> list[int]:
        """Decoder layers of all chunks of pipeline rank `rank`, rising."""
        return [layer for chunk in range(self.chunks_per_rank) for layer in self.layers(rank, chunk)]

    def as_lists(self) -> list[list[str]]:
        """The layout in the words of megatron-core's `PipelineParallelLayerLayout`, chunk by chunk.

        Without the multi-token prediction layer: it is ours, megatron-core is not told of it."""
        chunks = [["decoder"] * count for count in self.num_layers]
        chunks[0].insert(0, "embedding")
        chunks[-1].append("loss")
        return chunks

    def as_text(self) -> str:
        """The layout as `parallel.pipeline_layout` takes it: `Et*3|t*4|t*3L`."""
        layers = ["" if count == 0 else "t" if count == 1 else f"t*{count}" for count in self.num_layers]
        layers[0] = "E" + layers[0]
        layers[-1] += "mL" if self.has_mtp else "L"
        return "|".join(layers)


def pipeline_layout(config: RunConfig) -> PipelineLayout:
    """The layout that `parallel.pipeline_layout` asks for. Every chunk has at least one decoder layer.

    Raises:
        UsageError: the text cannot be read, names another number of chunks or layers than the config has, or leaves a
            chunk empty.
    """
    if config.parallel.pipeline_layout == "auto":
        return _balanced(config)
    return _parsed(config)


def chunk_memory_layers(config: RunConfig, layers: range) -> tuple[int, ...]:
    """Numbers (1-based, as in the config) of the Engram layers among `layers` (counted from 0)."""
    if config.engram is None:
        return ()
    return tuple(number for number in config.engram.layer_numbers if number - 1 in layers)


@cache
def _balanced(config: RunConfig) -> PipelineLayout:
    """Asked for at many places, so computed once for a config."""
    ranks, chunks_per_rank = config.parallel.pipeline, config.parallel.virtual_pipeline
    counts = balanced_layers(model_costs(config), ranks, chunks_per_rank)
    return PipelineLayout(ranks, counts, has_mtp=config.model.mtp.num_layers > 0)


def _parsed(config: RunConfig) -> PipelineLayout:
    parallel, text = config.parallel, config.parallel.pipeline_layout
    what = f"parallel.pipeline_layout = {text!r}"
    matches = [_CHUNK.fullmatch(chunk) for chunk in text.split("|")]
    if not all(matches):
        raise UsageError(
            f"{what}: cannot be read; write one part per chunk, divided by |, t for a layer (t*4 for four), E first "
            "and L last, m before L for multi-token prediction: Et*3|t*4|t*3L"
        )
    _check_number_of_chunks(parallel, what, len(matches))
    parts = [match.groups() for match in matches if match is not None]
    has_mtp = config.model.mtp.num_layers > 0
    last = len(parts) - 1
    for index, (embedding, _, mtp, loss) in enumerate(parts):
        if bool(embedding) != (index == 0) or bool(loss) != (index == last) or bool(mtp) != (index == last and has_mtp):
            raise UsageError(
                f"{what}: E belongs to the first part, {'mL' if has_mtp else 'L'} to the last, none to another "
                f"(model.mtp.num_layers = {config.model.mtp.num_layers})"
            )
    counts = tuple(sum(int(m[1] or 1) for m in _LAYERS.finditer(layers)) for _, layers, _, _ in parts)
    if 0 in counts:
        raise UsageError(f"{what}: part {counts.index(0) + 1} has no layer, every chunk needs one")
    if sum(counts) != config.model.num_layers:
        raise UsageError(f"{what}: has {sum(counts)} layers, model.num_layers = {config.model.num_layers}")
    return PipelineLayout(parallel.pipeline, counts, has_mtp)


def _check_number_of_chunks(parallel: ParallelConfig, what: str, found: int) -> None:
    wanted = parallel.pipeline * parallel.virtual_pipeline
    if found != wanted:
        raise UsageError(
            f"{what}: has {found} parts, parallel.pipeline * virtual_pipeline = {parallel.pipeline} * "
            f"{parallel.virtual_pipeline} = {wanted}"
        )
