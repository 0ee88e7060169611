"""The report of `launch/corpus_info.py` for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def report_lines(report: dict[str, Any]) -> list[str]:
    """`report`: what `corpus_report` gives, with `damage`, `samples`, `ngrams`, `engram` where asked for."""
    damage = report.get("damage")
    if damage:
        return [f"damaged      {problem}" for problem in damage]
    lines = [*_head(report), *_sources(report)]
    if damage is not None:
        lines.append("whole        every size, sha256, crc32c and document end is as it was written")
    for name, part in (("ngrams", _ngrams), ("engram", _engram), ("samples", _samples)):
        if name in report:
            lines += part(report[name])
    return lines


def _head(report: dict[str, Any]) -> Iterator[str]:
    yield report["corpus"]
    tokenizer = report["tokenizer"]
    ids = f"{tokenizer['vocab_size']:,} ids, eos {tokenizer['eos_token_id']}"
    yield f"tokenizer    {tokenizer['name']}, {ids}, sha256 {tokenizer['sha256'][:12]}"
    for name, split in report["splits"].items():
        counts = f"{split['documents']:,} documents, {split['tokens']:,} tokens"
        per_token = "" if split["bytes_per_token"] is None else f" ({split['bytes_per_token']:.2f} per token)"
        yield f"{name:12} {counts}, {split['bytes']:,} bytes{per_token} in {split['files']:,} files"
        yield f"{'':12} fingerprint {split['fingerprint']}"
    yield f"held out     {report['validation_fraction']:g} of the documents, by hash"
    if report["num_rejected"]:
        yield f"rejected     {report['num_rejected']:,} lines, see rejected.jsonl"


def _sources(report: dict[str, Any]) -> Iterator[str]:
    for name, counts in report["sources"].items():
        yield f"source       {name}: " + ", ".join(
            f"{value:,} {what.replace('_', ' ')}" for what, value in counts.items()
        )


def _ngrams(ngrams: dict[str, Any]) -> Iterator[str]:
    sampled = f"{ngrams['num_sampled']:,} training tokens in {ngrams['num_pieces']:,} pieces"
    yield f"n-grams      within documents, of {sampled}"
    for order in ngrams["orders"]:
        name = "tokens" if order["order"] == 1 else f"{order['order']}-grams"
        once = f"{order['num_once'] / order['num_distinct']:.1%} of them once" if order["num_distinct"] else "none"
        tops = "".join(f", top {k:,}: {share:.1%}" for k, share in order["coverage"].items())
        yield f"  {name:10} {order['num_distinct']:,} distinct ({once}){tops}"


def _engram(engram: dict[str, Any]) -> Iterator[str]:
    counted = engram["batches"][-1]["num_sequences"]
    yield f"rows read    by {engram['preset']}, {counted:,} of the {engram['global_batch_size']:,} sequences of a batch"
    for rows in engram["batches"]:
        what = f"{rows['num_sequences']:,} x {rows['sequence_length']:,} tokens"
        unique = f"{rows['num_unique']:,} unique rows ({rows['num_unique'] / rows['num_lookups']:.1%})"
        share = f"{rows['num_unique'] / rows['total_rows']:.3%} of {rows['total_rows']:,}"
        yield f"  {what}: {rows['num_lookups']:,} lookups, {unique}, {share}"


def _samples(samples: list[dict[str, Any]]) -> Iterator[str]:
    for sample in samples:
        yield f"document {sample['document']:,} ({sample['tokens']:,} tokens)"
        more = " ..." if sample["is_cut"] else ""
        yield "  " + " ".join(sample["text"].split()) + more
