"""Which pairs of layouts are compared: saved under one, resumed under the other, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engram_megatron.config import RunConfig
from engram_megatron.config_fields import DType
from engram_megatron.layouts.matrix import Layout, Variation
from engram_megatron.layouts.small_model import case_config
from engram_megatron.overrides import apply_overrides


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A run under `before` that is resumed under `after`.

    `run`: what both train, beside the small model; `after_too`: keys that change with the layout. Both as a user writes
    them on the command line.
    """

    before: Layout
    after: Layout
    dtype: Literal["float32", "bfloat16"] = "float32"
    mtp: bool = False
    run: tuple[str, ...] = ()
    after_too: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.before.memory_layers == self.after.memory_layers, "another model"

    @property
    def name(self) -> str:
        """`TP4+SP -> 1 rank`."""
        return f"{self.before.name} -> {self.after.name}"

    @property
    def variation(self) -> str:
        """`bfloat16, MTP, tables.dtype=bfloat16; then tables.block_rows=20`."""
        words = [self.dtype, "MTP" if self.mtp else "", *self.run]
        then = f"; then {', '.join(self.after_too)}" if self.after_too else ""
        return ", ".join(filter(None, words)) + then

    def config_before(self, dtype: DType) -> RunConfig:
        """Of the run that is saved."""
        return self.config(self.before, dtype)

    def config_after(self, dtype: DType) -> RunConfig:
        """Of the run that goes on."""
        return apply_overrides(self.config(self.after, dtype), list(self.after_too))

    def config(self, layout: Layout, dtype: DType) -> RunConfig:
        """Of the same run under any layout."""
        variation = Variation(packed=True, recompute="none", mtp=self.mtp)
        return apply_overrides(case_config(layout, variation, dtype), list(self.run))


_ONE = Layout(1)
_STAGES = Layout(4, tensor=2, pipeline=2, pipeline_layout="Ettt|tL", memory_layers=(1, 3))
_BATCH_OF_12 = ("training.global_batch_size=12",)

PAIRS = (
    Pair(before=Layout(4, tensor=4), after=_ONE),
    Pair(before=Layout(4, pipeline=4), after=_ONE),
    Pair(before=Layout(4, expert=4), after=_ONE),
    Pair(before=Layout(8, tensor=2, pipeline=2, expert=2), after=Layout(4)),
    Pair(before=Layout(8, tensor=2, pipeline=2, expert=2), after=Layout(3), run=_BATCH_OF_12),
    Pair(before=Layout(2, pipeline=2, virtual_pipeline=2), after=Layout(2, pipeline=2)),
    Pair(before=Layout(2, pipeline=2, virtual_pipeline=2), after=_ONE, mtp=True),
    Pair(before=Layout(2, context=2), after=_ONE),
    Pair(before=Layout(4, context=2, expert=2), after=Layout(2, tensor=2)),
    Pair(before=Layout(2, distributed_optimizer=True), after=Layout(2)),
    # Muon's matrices dealt over replicas, those of experts over the replicas of their experts
    Pair(before=Layout(4, expert=2, distributed_optimizer=True), after=Layout(4, expert=4)),
    Pair(
        before=Layout(4, pipeline=2, virtual_pipeline=2, expert=2, distributed_optimizer=True),
        after=Layout(4, tensor=2, distributed_optimizer=True),
        dtype="bfloat16",
    ),
    Pair(
        before=Layout(8, tensor=2, pipeline=2, expert=4, distributed_optimizer=True),
        after=Layout(4, context=2, distributed_optimizer=True),
    ),
    # two copies of the embedding, on the first stage and on that of the predicted token
    Pair(before=Layout(4, pipeline=4), after=Layout(2, tensor=2), mtp=True),
    Pair(before=Layout(4, tensor=2, pipeline=2), after=Layout(4, expert=2), mtp=True, dtype="bfloat16"),
    Pair(before=Layout(2, tensor=2), after=Layout(4, pipeline=2, expert=2), dtype="bfloat16"),
    Pair(before=_STAGES, after=Layout(4, pipeline=4, memory_layers=(1, 3))),
    # the tables' own: blocks of another size, numbers of another type, another optimizer
    Pair(before=Layout(4), after=Layout(2), after_too=("tables.block_rows=20", "training.micro_batch_size=2")),
    Pair(
        before=Layout(4, expert=2),
        after=Layout(2, context=2),
        run=("tables.dtype=bfloat16",),
        after_too=("tables.block_rows=100",),
    ),
    Pair(
        before=Layout(2, pipeline=2),
        after=Layout(4),
        run=("tables.update=sinkhorn",),
        after_too=("tables.block_rows=20",),
    ),
)
