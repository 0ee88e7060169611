"""Reports of `checkpoint_report` as lines for people."""

from __future__ import annotations

import re
from collections.abc import Iterator

from engram_checkpoints.checkpoint_report import Report

_NUMBERED = re.compile(r"\.(layers|experts)\.\d+\.")


def run_lines(report: Report) -> Iterator[str]:
    yield f"{report['run_dir']}: {len(report['checkpoints'])} checkpoints"
    for found in report["checkpoints"]:
        kind = "incomplete" if not found["complete"] else "damaged" if "why" in found else "complete"
        of = f", delta of {found['delta_of']}" if found.get("delta_of") else ""
        why = f": {found['why']}" if "why" in found else ""
        yield f"  {found['path']}  {kind}{of}, {size(found['bytes_on_disk'])}{why}"


def checkpoint_lines(report: Report, *, every_tensor: bool) -> Iterator[str]:
    """`every_tensor`: one line each, else one for all that differ in the numbers of layer and expert alone."""
    yield f"{report['path']}  ({report['format']}, {size(report['bytes_on_disk'])} on disk)"
    yield (
        f"step         {report['step']}, {report['tokens_seen']:,} tokens, {report['optimizer_steps']} updates of the "
        "optimizer"
    )
    layout = ", ".join(f"{key} {value}" for key, value in report["written_by"].items())
    yield f"written by   {layout}"
    overrides = report["config"]["overrides"]
    differences = "no preset" if overrides is None else " ".join(overrides) or "as the preset"
    yield f"config       {report['config']['name']}: {differences}"
    yield f"corpus       {report['corpus'][:12]}, tokenizer {report['tokenizer'][:12]}"
    if report["tables"] is not None:
        yield from _table_lines(report["tables"])
    tensors = report["tensors"]
    yield f"backbone     {len(tensors)} tensors, {size(sum(tensor['bytes'] for tensor in tensors))}"
    yield from _tensor_lines(tensors, every_tensor=every_tensor)
    if "health" in report:
        problems = report["health"]["problems"]
        yield f"health       {len(problems)} problems" if problems else "health       no NaN, no infinity, all trained"
        yield from (f"  {problem}" for problem in problems)


def _table_lines(tables: Report) -> Iterator[str]:
    rows, touched = tables["rows"], tables["touched_rows"]
    of = f", a delta of {tables['delta_of']}" if tables["delta_of"] else ""
    yield (
        f"tables       {rows:,} rows of {tables['row_dim']} {tables['dtype']}, {size(tables['bytes'])} with moments, "
        f"{tables['blocks']:,} blocks of {tables['block_rows']:,}, update {tables['update']}{of}"
    )
    yield f"             {touched:,} rows ({touched / rows:.1%}) ever had a gradient in {tables['steps']} steps"
    for name, norm in tables.get("norms", {}).items():
        yield f"             norm of {name} {norm:.6g}"


def _tensor_lines(tensors: list[Report], *, every_tensor: bool) -> Iterator[str]:
    groups: dict[tuple[str, str, str], list[Report]] = {}
    for tensor in tensors:
        name = tensor["name"] if every_tensor else _NUMBERED.sub(r".\1.*.", _NUMBERED.sub(r".\1.*.", tensor["name"]))
        groups.setdefault((name, tensor["dtype"], str(tensor["shape"])), []).append(tensor)
    for (name, dtype, shape), members in groups.items():
        count = f" x {len(members)}" if len(members) > 1 else ""
        norms = [tensor["norm"] for tensor in members if "norm" in tensor]
        norm = ""
        if norms:
            norm = f"  norm {min(norms):.4g}" + (f" .. {max(norms):.4g}" if len(norms) > 1 else "")
        yield f"  {name}  {dtype} {shape}{count}  {size(sum(tensor['bytes'] for tensor in members))}{norm}"


def size(num_bytes: int) -> str:
    """In the unit that fits: 1.25 GiB."""
    for unit, bytes_of in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if num_bytes >= bytes_of:
            return f"{num_bytes / bytes_of:.2f} {unit}"
    return f"{num_bytes} B"
