"""Which part of which tensor stands in which of Megatron's per-rank files: arithmetic on a `RunConfig`.

A stored tensor is one of a `torch_dist` backbone (see `backbone`), a local one that of a rank's model: layers are
counted from the first of its chunk, experts from the first of its rank, and a gated feed-forward has one `linear_fc1`,
the rank's part of the gate above its part of the up projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm

from engram_megatron.config import RunConfig
from engram_megatron.model.counts import TensorSpec, buffer_specs, parameter_specs
from engram_megatron.model.pipeline_layout import PipelineLayout, pipeline_layout
from engram_megatron.model.placement import EMBEDDING, ROUTED, is_tensor_divided

_GATED = "linear_fc1.weight"
_BY_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


@dataclass(frozen=True)
class LegacyRank:
    """The coordinates that a file is named after."""

    tensor: int
    pipeline: int
    expert: int

    def folder(self, config: RunConfig) -> str:
        """As Megatron-LM's `get_checkpoint_name` has it."""
        pipeline = f"_{self.pipeline:03d}" if config.parallel.pipeline > 1 else ""
        expert = f"_{self.expert:03d}" if config.parallel.expert > 1 else ""
        return f"mp_rank_{self.tensor:02d}{pipeline}{expert}"


@dataclass(frozen=True)
class Part:
    """Rows first_row .. first_row + num_rows - 1 of the stored tensor `name`, and of their columns `columns` (None:
    all), which are the local tensor's rows from `local_row` on. A tensor without rows counts as one."""

    name: str
    first_row: int
    num_rows: int
    columns: tuple[int, int] | None
    local_row: int


@dataclass(frozen=True)
class LocalTensor:
    """A tensor of chunk `chunk` of a rank's model."""

    chunk: int
    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    is_buffer: bool
    has_extra_state: bool  # its module is a megatron-core linear layer, whose `_extra_state` is None here


def legacy_ranks(config: RunConfig) -> list[LegacyRank]:
    """Ranks that write a file. Expert ranks are taken from tensor * context * data, tensor ranks running fastest, so
    not every expert rank meets every tensor rank."""
    parallel = config.parallel
    return [
        LegacyRank(place % parallel.tensor, pipeline, place % parallel.expert)
        for pipeline in range(parallel.pipeline)
        for place in range(lcm(parallel.tensor, parallel.expert))
    ]


def local_tensors(config: RunConfig, rank: LegacyRank) -> Iterator[LocalTensor]:
    """The tensors of a rank's model, chunk by chunk."""
    layout = pipeline_layout(config)
    specs = [(spec, False) for spec in parameter_specs(config)] + [(spec, True) for spec in buffer_specs(config)]
    for chunk in range(layout.chunks_per_rank):
        for spec, is_buffer in specs:
            if _stands_on(spec, layout, rank.pipeline, chunk) and _has_expert(spec, config, rank.expert):
                yield _local_tensor(spec, config, layout, rank, chunk, is_buffer=is_buffer)


def stored_shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all stored weights and buffers."""
    shapes = {}
    for spec in [*parameter_specs(config), *buffer_specs(config)]:
        for name in _stored_names(spec.name):
            shapes[name] = (spec.shape[0] // len(_stored_names(spec.name)), *spec.shape[1:])
    return shapes


def _stands_on(spec: TensorSpec, layout: PipelineLayout, pipeline: int, chunk: int) -> bool:
    if spec.layer is not None:
        return spec.layer in layout.layers(pipeline, chunk)
    is_first, is_last = (pipeline, chunk) == (0, 0), (pipeline, chunk) == (layout.ranks - 1, layout.chunks_per_rank - 1)
    if spec.part == EMBEDDING:
        return is_first or (is_last and layout.has_mtp)  # multi-token prediction embeds tokens
    return is_last


def _has_expert(spec: TensorSpec, config: RunConfig, expert_rank: int) -> bool:
    if spec.placed_as != ROUTED:
        return True
    assert config.model.moe is not None
    per_rank = config.model.moe.num_experts // config.parallel.expert
    return _expert(spec.name) // per_rank == expert_rank


def _expert(name: str) -> int:
    return int(name.partition(".local_experts.")[2].partition(".")[0])


def _local_tensor(
    spec: TensorSpec, config: RunConfig, layout: PipelineLayout, rank: LegacyRank, chunk: int, *, is_buffer: bool
) -> LocalTensor:
    ranks = config.parallel.tensor if is_tensor_divided(spec) and not is_buffer else 1
    by_columns = spec.name.endswith(_BY_COLUMNS)
    names = _stored_names(spec.name)
    rows = spec.shape[0] // len(names)
    share = rows if by_columns else rows // ranks
    columns = None
    shape = (share * len(names), *spec.shape[1:])
    if by_columns and ranks > 1:
        width = spec.shape[1] // ranks
        columns, shape = (rank.tensor * width, (rank.tensor + 1) * width), (rows, width)
    first = 0 if by_columns or ranks == 1 else rank.tensor * share
    return LocalTensor(
        chunk=chunk,
        name=_local_name(spec, config, layout.layers(rank.pipeline, chunk)),
        shape=shape,
        parts=tuple(Part(name, first, share, columns, half * share) for half, name in enumerate(names)),
        is_buffer=is_buffer,
        has_extra_state=len(spec.shape) == 2
        and (is_tensor_divided(spec) or spec.placed_as == ROUTED)
        and spec.part != EMBEDDING,
    )


def _local_name(spec: TensorSpec, config: RunConfig, layers: range) -> str:
    name = spec.name
    if spec.layer is not None:
        name = name.replace(f".layers.{spec.layer}.", f".layers.{spec.layer - layers.start}.", 1)
    if spec.placed_as == ROUTED:
        assert config.model.moe is not None
        per_rank = config.model.moe.num_experts // config.parallel.expert
        name = name.replace(f".local_experts.{_expert(name)}.", f".local_experts.{_expert(name) % per_rank}.")
    return name


def _stored_names(name: str) -> tuple[str, ...]:
    stored = name.replace(".local_experts.", ".experts.")
    return (f"{stored}_w", f"{stored}_v") if stored.endswith(_GATED) else (stored,)
