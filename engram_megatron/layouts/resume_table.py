"""The table of `make layouts ARGS=--resume`: every pair of layouts, a line each."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from engram_megatron.config_fields import DType
from engram_megatron.layouts.checkpoint_contents import checkpoint_contents, first_difference
from engram_megatron.layouts.compare import DisagreementError
from engram_megatron.layouts.forked_ranks import RanksError, run_ranks
from engram_megatron.layouts.matrix import Layout
from engram_megatron.layouts.records import RankRecord, StepChoices
from engram_megatron.layouts.resume_judge import OneRank, PairRun, ResumeOutcome, judge_pair
from engram_megatron.layouts.resume_pairs import Pair
from engram_megatron.layouts.table import TIMEOUT_S, Line

HEADER = (
    f"{'A: saved -> B: resumed':62} {'run':62} {'tensors':>7} {'B saves':>9} {'A saves':>9} {'A goes on':>9}   "
    f"{'loss':>8} {'bound':>8} {'drift':>8} {'bound':>8}  {'s':>5}"
)


def lines(pairs: Sequence[Pair]) -> Iterator[Line]:
    """Run the pairs and describe each as soon as it is done."""
    one_rank: dict[tuple[object, ...], OneRank] = {}
    for pair in pairs:
        started = time.monotonic()
        try:
            key = (pair.before.memory_layers, pair.mtp, pair.run)
            if key not in one_rank:
                one_rank[key] = run_one_rank(pair)
            run = run_pair(pair, pair.dtype, one_rank[key].float64.choices)
            line = _line(judge_pair(pair, run, one_rank[key]), time.monotonic() - started)
        except DisagreementError as error:
            line = _failed(pair, str(error))
        except RanksError as error:
            line = _failed(pair, error.reason, str(error))
        yield line


def run_one_rank(pair: Pair) -> OneRank:
    """What one rank makes of the pair's run: the experts that all choose, and the bounds."""
    alone = Layout(1, memory_layers=pair.before.memory_layers)
    configs = pair.config(alone, "float64"), pair.config(alone, "float32")
    (found,) = run_ranks(_train_alone, 1, *configs, timeout_s=TIMEOUT_S)
    assert isinstance(found, OneRank)
    return found


def run_pair(pair: Pair, dtype: DType, choices: Sequence[StepChoices] | None) -> PairRun:
    """Run a pair on its ranks; `choices`: experts to replay, if any."""
    before, after = pair.config_before(dtype), pair.config_after(dtype)
    with tempfile.TemporaryDirectory() as scratch:
        first, second, third = folders = [Path(scratch) / name for name in ("saved", "resumed", "back")]
        unbroken = _run(_train_and_save, pair.before, before, choices, first)
        resumed = _run(_load_and_go_on, pair.after, after, choices, first, second)
        back = _run(_load_and_go_on, pair.before, before, choices, second, third)
        saved, *copies = (checkpoint_contents(folder) for folder in folders)
    changed_by_after, changed_by_before = (first_difference(copy, saved) for copy in copies)
    return PairRun(
        unbroken=unbroken,
        resumed=resumed,
        back=back,
        num_tensors=len(saved),
        changed_by_after=changed_by_after,
        changed_by_before=changed_by_before,
    )


def _run(function: Callable[..., RankRecord], layout: Layout, *arguments: Any) -> list[RankRecord]:
    return run_ranks(function, layout.ranks, *arguments, timeout_s=TIMEOUT_S)


def _train_and_save(*arguments: Any) -> RankRecord:
    """Imported on the rank: the process that prints the table stays without megatron-core."""
    from engram_megatron.layouts import resume_case

    return resume_case.train_and_save(*arguments)


def _load_and_go_on(*arguments: Any) -> RankRecord:
    from engram_megatron.layouts import resume_case

    return resume_case.load_and_go_on(*arguments)


def _train_alone(*arguments: Any) -> OneRank:
    from engram_megatron.layouts import resume_case

    return resume_case.train_alone(*arguments)


def _failed(pair: Pair, reason: str, details: str = "") -> Line:
    return Line(f"{pair.name:62} {pair.variation:62} FAIL: {reason}", passes=False, details=details)


def _line(outcome: ResumeOutcome, seconds: float) -> Line:
    pair, run = outcome.pair, outcome.run
    judged = pair.dtype != "bfloat16"
    loss_bound, drift_bound = (
        f"{bound:8.1e}" if judged else f"{'-':>8}" for bound in (outcome.loss_bound, outcome.drift_bound)
    )
    same = [run.changed_by_after is None, run.changed_by_before is None, run.goes_on]
    words = " ".join(f"{'same' if is_same else 'other':>9}" for is_same in same)
    text = (
        f"{pair.name:62} {pair.variation:62} {run.num_tensors:7} {words}   "
        f"{outcome.loss:8.1e} {loss_bound} {outcome.drift:8.1e} {drift_bound}  {seconds:5.1f}"
    )
    if not outcome.passes:
        changed = run.changed_by_after or run.changed_by_before
        text += f"  FAIL: {f'{changed} was changed' if changed else 'it goes on otherwise'}"
    return Line(text, outcome.passes, outcome.drift / outcome.drift_bound if judged else 0.0)
