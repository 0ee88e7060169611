"""What two models differ in, and whether the one can be made from the weights of the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engram_megatron.config import EngramConfig, RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.overrides import as_text, leaves

TableChange = Literal["none", "add", "rehash"]
_NUM_EXPERTS = "model.moe.num_experts"
_FREE_ENGRAM_KEYS = ("engram.rows_per_head", "engram.init_std")


@dataclass(frozen=True, kw_only=True)
class Changes:
    """From the source's model to the target's. `kept_experts`: None where it keeps all."""

    kept_experts: int | None
    tables: TableChange


def changes_between(source: RunConfig, target: RunConfig, where: Path) -> Changes:
    """Raises `UsageError` for a difference that no upgrade makes, and where there is none. `where` is the source."""
    if source.model.moe is None and target.model.moe is not None:
        raise UsageError(
            f"{where} is a dense model: experts are not made of its feed-forwards (upcycling); start from a checkpoint "
            "with experts, or set model.moe=none"
        )
    ours, theirs = _values(target.model, "model."), _values(source.model, "model.")
    for key in theirs | ours:
        if key != _NUM_EXPERTS and ours.get(key) != theirs.get(key):
            raise UsageError(
                f"{key} = {as_text(ours.get(key))} is {as_text(theirs.get(key))} in {where}: an upgrade changes "
                f"engram.* and {_NUM_EXPERTS} only; give the source's value"
            )
    kept, present = ours.get(_NUM_EXPERTS), theirs.get(_NUM_EXPERTS)
    if kept is not None and kept > present:
        raise UsageError(
            f"{_NUM_EXPERTS} = {kept} is more than the {present} of {where}: experts can be given up, not added"
        )
    changes = Changes(
        kept_experts=None if kept == present else kept,
        tables=_table_change(source.engram, target.engram, where),
    )
    if changes == Changes(kept_experts=None, tables="none"):
        raise UsageError(f"{where} holds this model already: start from it with checkpoint.init_from={where}")
    return changes


def _table_change(source: EngramConfig | None, target: EngramConfig | None, where: Path) -> TableChange:
    if source is None:
        return "none" if target is None else "add"
    if target is None:
        raise UsageError(f"{where} has Engram, the target none (engram=none): memory is added, never taken away")
    ours, theirs = _values(target, "engram."), _values(source, "engram.")
    for key, value in ours.items():
        if key not in _FREE_ENGRAM_KEYS and value != theirs[key]:
            raise UsageError(
                f"{key} = {as_text(value)} is {as_text(theirs[key])} in {where}, which has Engram already: of trained "
                "tables only engram.rows_per_head can change; give the source's value"
            )
    return "none" if source.rows_per_head == target.rows_per_head else "rehash"


def _values(config: Any, prefix: str) -> dict[str, Any]:
    return {key: value for key, value, _ in leaves(config, prefix)}
