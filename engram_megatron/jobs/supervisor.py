"""A job's batch step: trains until the run has ended, whatever comes between, or says why it cannot.

    try ends                               then
    ------------------------------------   ------------------------------------------------------------------
    the last step is done                  finished
    asked to by the file STOP              the job ends; the run goes on when it is submitted again
    by a signal: time limit, preemption    back into the queue
    a rank failed, or all hang             another try in this allocation, from the newest checkpoint
    the loss spiked, the run rolled back   another try in this allocation, from the checkpoint before the spike
    a user's mistake                       gave up
    the preflight found bad nodes          the job ends, and another one is queued that excludes them (gave up
                                           where Slurm has fewer than --min-nodes others)
    `retries` tries that came no further   gave up: this and later jobs of the submission end at once

A node that is lost takes the job with it: Slurm puts it back into the queue, and the next start says so.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.jobs import slurm
from engram_megatron.jobs.allocation import Allocation
from engram_megatron.jobs.allocation_check import EXIT_USAGE, check_allocation
from engram_megatron.jobs.events import Event, append_event, read_events
from engram_megatron.jobs.frozen import Frozen
from engram_megatron.jobs.job_log import JobLog
from engram_megatron.jobs.replacement import no_others, queue_elsewhere
from engram_megatron.jobs.training_step import Ended, TrainingStep, newest_step
from engram_megatron.overrides import apply_overrides
from engram_megatron.presets import preset
from engram_megatron.training.rollback_log import as_fields, read_rollbacks

_STACKS_S = 120.0
_REQUEUE_AGAIN_S = 30.0
_WITH_JOB = ("allocated", "preflight", "started", "hang")  # events that a job lives to follow by another
_OVER = ("finished", "gave_up", "stopped")


@dataclass(eq=False)
class Supervisor:
    """Of one job. `run` returns its exit code."""

    frozen: Frozen
    allocation: Allocation
    python: str
    signals: list[str] = field(default_factory=list)  # that Slurm has sent to this process

    def __post_init__(self) -> None:
        self._told_rollbacks = len(read_rollbacks(self.frozen.run_dir))
        path = self.frozen.run_dir / "logs" / f"{self.allocation.job_id}.log"
        self._job_log, self._log = JobLog(path), JobLog(path)  # since the start of this job, and of the last try
        self._job_log.mark()

    def run(self) -> int:
        over = over_since_submission(read_events(self.run_dir))
        if over is not None:
            print(f"nothing to do: the run {over.kind.replace('_', ' ')} in job {over.job}", flush=True)
            return 0
        self._tell_loss()
        self._event("allocated", **self.allocation.told(self.frozen.options.nodes))
        code = self._check_nodes()
        if code is not None:
            return code
        number = 0
        while True:
            fruitless = fruitless_tries(read_events(self.run_dir), newest_step(self.run_dir))
            if fruitless >= self.frozen.options.retries:
                return self._give_up(
                    f"{fruitless} tries in a row came no further than step {newest_step(self.run_dir)}"
                )
            if self.signals:
                return self._requeue(self._why_signalled())
            number += 1
            ended = self._try(number)
            code = self._after(ended)
            if code is not None:
                return code

    @property
    def run_dir(self) -> Path:
        return self.frozen.run_dir

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """The handler of Slurm's signals."""
        self.signals.append(signal.Signals(number).name)

    def _tell_loss(self) -> None:
        """Of the job's last start, where nobody was left to tell it."""
        lost = lost_start(read_events(self.run_dir))
        if lost is not None:
            reason = in_words(slurm.unusable_nodes(lost.fields["nodes"])) or "its nodes are up by now"
            self._event("lost", reason=reason, step=newest_step(self.run_dir))

    def _check_nodes(self) -> int | None:
        """The exit code of the job; None: its nodes can be used."""
        self._log.mark()
        checked = check_allocation(self.frozen, self.allocation, self.python)
        if self.signals:
            return self._requeue(self._why_signalled())
        self._event("preflight", code=checked.code, bad_nodes=checked.bad_nodes)
        if not checked.is_usable:
            return self._give_up(self._log.first_error() or "the preflight ended with exit code 2")
        if not checked.bad_nodes:
            return None
        bad = f"bad nodes {', '.join(checked.bad_nodes)}"
        try:
            job_id = queue_elsewhere(self.frozen, self.allocation.job_id, read_events(self.run_dir))
        except UsageError as error:
            return self._give_up(f"{bad}, and {no_others(self.frozen.options)}: {error}")
        self._event("requeued", reason=bad, next_job=job_id)
        return 0

    def _try(self, number: int) -> Ended:
        (self.run_dir / "STOP").unlink(missing_ok=True)
        self._event("started", **{"try": number}, step=newest_step(self.run_dir), nodes=list(self.allocation.nodes))
        self._log.mark()
        step = TrainingStep(self.frozen, self.allocation, self.python, number)
        return step.wait(self._wants_stop, lambda idle_s: self._tell_hang(number, idle_s))

    def _wants_stop(self) -> bool:
        if self.signals:
            self._tell_scancel()  # at once: Slurm may kill all before the ranks have saved
        return bool(self.signals)

    def _tell_scancel(self) -> bool:
        """Whether somebody has ended the job for good."""
        if self._job_log.ended_by() != "":
            return False
        if read_events(self.run_dir)[-1].kind != "stopped":
            self._event("stopped", step=newest_step(self.run_dir), reason="scancel")
        return True

    def _after(self, ended: Ended) -> int | None:
        """The exit code of the job; None: try again."""
        step = newest_step(self.run_dir)
        if ended.is_orderly and ended.stopped_by is None and step == self._num_steps():
            self._event("finished", step=step)
            return 0
        if ended.is_orderly:
            why = self._why_signalled() if self.signals else str(ended.stopped_by)
            self._event("ended", code=ended.code, reason=f"stopped by {why}", step=step)
            if self.signals or not why.startswith("file"):
                return self._requeue(why)
            self._event("stopped", step=step)
            return 0
        for rollback in read_rollbacks(self.run_dir)[self._told_rollbacks :]:
            self._told_rollbacks += 1
            self._event("loss_spike", **as_fields(rollback))
        if ended.hung_s is not None:
            reason = f"no progress for {ended.hung_s:.0f} s"
        else:
            reason = self._lost_nodes() or self._log.first_error() or f"exit code {ended.code}"
        self._event("ended", code=ended.code, reason=reason, step=step)
        if ended.code == EXIT_USAGE and ended.hung_s is None:
            return self._give_up(reason)
        return None

    def _tell_hang(self, number: int, idle_s: float) -> None:
        """With the stacks of all ranks, which are still there."""
        job = f"{self.allocation.job_id}.{self.allocation.restarts}"
        stacks = self.run_dir / "logs" / f"stacks_{job}_try_{number}"
        program = [self.python, str(self.frozen.code / "slurm/dump_stacks.py"), str(self.run_dir), str(stacks)]
        slurm.run_beside(program, _STACKS_S)
        self._event("hang", step=newest_step(self.run_dir), seconds=round(idle_s, 1), stacks=str(stacks))

    def _lost_nodes(self) -> str | None:
        """What Slurm says of them, where it ends this job for their loss."""
        if self._job_log.ended_by() != "NODE FAILURE":
            return None
        return in_words(slurm.unusable_nodes(self.allocation.nodes)) or "a node failed"

    def _why_signalled(self) -> str:
        return (
            self._lost_nodes()
            or slurm.why_signalled(self.allocation.job_id, self.frozen.options.signal_s)
            or self.signals[0]
        )

    def _requeue(self, reason: str) -> int:
        """Returns only where the job is not to go on."""
        if self._tell_scancel():
            return 0
        self._event("requeued", reason=reason)
        while True:  # until Slurm ends this process; its controller may be away for a while
            try:
                slurm.requeue(self.allocation.job_id)
            except slurm.SlurmError as error:  # after the loss of a node Slurm does so itself
                print(f"Slurm does not requeue the job for us: {error}", flush=True)
            time.sleep(_REQUEUE_AGAIN_S)

    def _give_up(self, reason: str) -> int:
        self._event("gave_up", reason=reason)
        print(f"error: gave up: {reason}", flush=True)
        return 1

    def _event(self, kind: str, **fields: object) -> None:
        append_event(self.run_dir, kind, **fields)
        print(json.dumps({"event": kind, **fields}), flush=True)

    def _num_steps(self) -> int:
        config: RunConfig = apply_overrides(preset(self.frozen.preset), list(self.frozen.overrides))
        return config.training.num_steps


def over_since_submission(events: list[Event]) -> Event | None:
    """The event that ended the run, since it was last submitted."""
    for event in reversed(events):
        if event.kind == "submitted":
            return None
        if event.kind in _OVER:
            return event
    return None


def in_words(states: Mapping[str, str]) -> str:
    return ", ".join(f"{name} is {state}" for name, state in states.items())


def lost_start(events: list[Event]) -> Event | None:
    """The newest event that names the nodes of a job that ended without a word: with its head node."""
    if not events or events[-1].kind not in _WITH_JOB:
        return None
    return next(event for event in reversed(events) if event.kind == "allocated")


def fruitless_tries(events: list[Event], step: int) -> int:
    """Starts in a row from checkpoint `step`, the newest, that did not end in order; since it was last submitted. One
    that was never told to have ended was lost with its node."""
    count, ended_in_order = 0, False
    for event in reversed(events):
        if event.kind == "submitted" or (event.kind == "started" and event.fields["step"] != step):
            break
        if event.kind in ("requeued", "loss_spike"):
            ended_in_order = True
        if event.kind == "started":
            count += 0 if ended_in_order else 1
            ended_in_order = False
    return count
