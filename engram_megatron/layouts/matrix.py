"""Which layouts are compared, and with which variations of the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Layout:
    """A way to spread the model over `ranks` processes: sizes of the axes; what is left over is data parallelism.

    `memory_layers`: the two Engram layers of the model's four, counted from 1.
    """

    ranks: int
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    expert: int = 1
    context: int = 1
    pipeline_layout: str = "auto"
    memory_layers: tuple[int, int] = (2, 3)
    distributed_optimizer: bool = False

    @property
    def name(self) -> str:
        """`TP2xPP2xEP2`, in the words of users."""
        data = self.ranks // (self.tensor * self.pipeline * self.context)
        axes = {
            "TP": self.tensor,
            "PP": self.pipeline,
            "VPP": self.virtual_pipeline,
            "CP": self.context,
            "DP": data,
            "EP": self.expert,
        }
        text = "x".join(f"{axis}{size}" for axis, size in axes.items() if size > 1) or "1 rank"
        text += "+SP" if self.tensor > 1 else ""
        text += "+ZeRO1" if self.distributed_optimizer else ""
        text += f" {self.pipeline_layout}" if self.pipeline_layout != "auto" else ""
        return text + (f" memory@{self.memory_layers}".replace(" ", "") if self.memory_layers != (2, 3) else "")

    def overrides(self) -> list[str]:
        """The layout as a user would write it on the command line."""
        first, second = self.memory_layers
        return [
            f"parallel.tensor={self.tensor}",
            f"parallel.pipeline={self.pipeline}",
            f"parallel.virtual_pipeline={self.virtual_pipeline}",
            f"parallel.pipeline_layout={self.pipeline_layout}",
            f"parallel.context={self.context}",
            f"parallel.expert={self.expert}",
            f"parallel.distributed_optimizer={str(self.distributed_optimizer).lower()}",
            f"engram.layer_numbers={first},{second}",
            f"engram.hash_seed_ids={first},{second}",
        ]


@dataclass(frozen=True)
class Variation:
    """What a run does beside its layout."""

    packed: bool
    recompute: Recompute
    mtp: bool

    @property
    def name(self) -> str:
        """`packed, recompute full, MTP`."""
        words = ["packed" if self.packed else "one document", f"recompute {self.recompute}", "MTP" if self.mtp else ""]
        return ", ".join(filter(None, words))

    def overrides(self) -> list[str]:
        """The variation as a user would write it on the command line."""
        packed = str(self.packed).lower()
        modules = "attention,feed_forward,mhc,engram" if self.recompute == "selective" else ""
        return [
            f"data.separate_documents={packed}",
            f"engram.cut_at_documents={packed}",
            f"training.recompute={self.recompute}",
            f"training.recompute_modules={modules}",
            f"model.mtp.num_layers={int(self.mtp)}",
        ]


LAYOUTS = (
    Layout(2, tensor=2),
    Layout(4, tensor=4),
    Layout(2, pipeline=2),
    Layout(4, pipeline=4),
    Layout(2, pipeline=2, virtual_pipeline=2),
    Layout(2, expert=2),
    Layout(4, expert=4),
    Layout(2, context=2),
    Layout(4, context=4),
    Layout(2),
    Layout(4),
    Layout(2, distributed_optimizer=True),
    Layout(4, tensor=2),
    Layout(4, tensor=2, expert=2),
    Layout(4, tensor=2, expert=4),
    Layout(4, tensor=2, pipeline=2),
    Layout(4, tensor=2, pipeline=2, virtual_pipeline=2),
    Layout(4, tensor=2, context=2),
    Layout(4, pipeline=2, expert=2),
    Layout(4, pipeline=2, virtual_pipeline=2, expert=2, distributed_optimizer=True),
    Layout(4, pipeline=2, context=2),
    Layout(4, context=2, expert=2),
    Layout(4, context=2),
    Layout(4, context=2, distributed_optimizer=True),
    Layout(8, tensor=2, pipeline=2, expert=2),
    Layout(8, tensor=2, pipeline=2, expert=4, distributed_optimizer=True),
    Layout(8, tensor=2, context=2, expert=4),
    Layout(8, tensor=2, pipeline=2, context=2),
    Layout(8, pipeline=2, virtual_pipeline=2, context=2, expert=2),
    Layout(8, pipeline=4, expert=2),
    # Engram layers: first and last on a stage, both on one stage, the other stage without any; unequal stages
    Layout(2, pipeline=2, memory_layers=(1, 4)),
    Layout(2, pipeline=2, memory_layers=(1, 2)),
    Layout(2, pipeline=2, memory_layers=(3, 4)),
    Layout(4, tensor=2, pipeline=2, pipeline_layout="Ettt|tL", memory_layers=(1, 3)),
    Layout(2, pipeline=2, virtual_pipeline=2, memory_layers=(1, 4)),
)

_RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
VARIATIONS = tuple(Variation(*values) for values in product((True, False), _RECOMPUTES, (False, True)))


def all_cases() -> list[tuple[Layout, Variation]]:
    """Every layout with every variation."""
    return list(product(LAYOUTS, VARIATIONS))


def pairwise_cases(layouts: Sequence[Layout] = LAYOUTS) -> list[tuple[Layout, Variation]]:
    """A selection in which every two values of two different factors (layout, packing, recomputation, prediction of
    one or two tokens) meet: three variations per layout, one for each recomputation."""
    return [(layout, variation) for number, layout in enumerate(layouts) for variation in _covering(number)]


def third_of(cases: Sequence[tuple[Layout, Variation]], number: int) -> list[tuple[Layout, Variation]]:
    """Part `number` (1, 2 or 3) of `pairwise_cases()`: every layout once, every recomputation in a third of them.

    The three parts together are all cases, so that three days of CI run the whole table."""
    assert number in (1, 2, 3), number
    rows = len(_RECOMPUTES)
    return [case for place, case in enumerate(cases) if (place // rows + place) % rows == number - 1]


def _covering(number: int) -> Iterator[Variation]:
    for recompute_number, recompute in enumerate(_RECOMPUTES):
        # Both values of packing and of prediction occur in three variations; shifted from layout to layout, every
        # recomputation meets all four combinations of them.
        packed = (number + recompute_number) % 2 == 0
        mtp = (number // 2 + recompute_number // 2 + recompute_number) % 2 == 1
        yield Variation(packed, recompute, mtp)
