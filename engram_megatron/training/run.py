"""A whole run on one rank: build, resume, loop, close."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engram_data.batch import Batch
from engram_data.read_ahead import ReadAhead
from engram_data.skipped_samples import Windows
from engram_megatron import platform
from engram_megatron.config import RunConfig
from engram_megatron.training import parallel
from engram_megatron.training.heartbeat import Heartbeat
from engram_megatron.training.live_run import LiveRun, build_run
from engram_megatron.training.loss_spike import LossSpikeError, RolledBackError, Spike
from engram_megatron.training.node_resume import publish_newest
from engram_megatron.training.node_snapshots import node_snapshots
from engram_megatron.training.preflight import Inputs, open_inputs, resumed
from engram_megatron.training.profiler import profiler_of_steps
from engram_megatron.training.rollback import roll_back, settle_rollbacks
from engram_megatron.training.run_folder import RunFolder, write_json
from engram_megatron.training.stop_signal import StopSignal
from engram_megatron.training.trainer import NonFiniteLossError, StepResult


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """How a run ended. Validation losses in nats per token; the first is taken before this process's first step."""

    step: int
    tokens_seen: int
    first_validation_loss: float
    last_validation_loss: float
    checkpoint: Path
    stopped_by: str | None


def train(
    config: RunConfig,
    *,
    resume: bool,
    stop: StopSignal,
    on_table_failure: Callable[[BaseException], None] | None = None,
) -> RunSummary:
    """Train on this rank of the job until `training.num_steps`, or until a stop is asked for. All ranks call it.

    Nothing is written before the checkpoint to start from has been read. `on_table_failure` is called, in the tables'
    thread, as something goes wrong there: it should end the process, since another rank may wait for this one.

    Raises:
        UsageError, CorpusError: before any work, on every rank alike; later, for a corpus that cannot be read.
        SaveError: a checkpoint could not be written.
        NonFiniteLossError: on every rank alike; the last checkpoint stands.
        RolledBackError, SpikesNotCuredError: on every rank alike, with `spikes.max_rollbacks`, after a spike of the
            loss; one that is not finite is one.
    """
    rank, world_size, _ = parallel.world_from_environment()
    inputs = open_inputs(config, world_size, resume=resume)
    heartbeat = Heartbeat(
        config.run_dir, rank, config.training.heartbeat_every_s, device_bytes=platform.device_memory_bytes
    )
    with heartbeat:
        return _train(config, inputs, heartbeat, resume=resume, stop=stop, on_table_failure=on_table_failure)


def _train(
    config: RunConfig,
    inputs: Inputs,
    heartbeat: Heartbeat,
    *,
    resume: bool,
    stop: StopSignal,
    on_table_failure: Callable[[BaseException], None] | None,
) -> RunSummary:
    ranks = parallel.initialize(config)
    heartbeat.progress(0, "loading")
    folder = RunFolder(config.run_dir)
    skipped: Windows = ()
    has_moved, published = False, None
    if resume:
        skipped, has_moved = settle_rollbacks(folder, ranks)
        published = publish_newest(config, folder, ranks, skipped)
    if has_moved or published is not None:
        inputs = resumed(inputs, config)
    run = build_run(config, ranks, folder, inputs, skipped, heartbeat, on_table_failure)
    if config.checkpoint.local_dir:
        run.snapshots = node_snapshots(config, folder, ranks, keep=published)
    try:
        summary = _loop(run, stop)
    except (NonFiniteLossError, LossSpikeError) as error:
        run.finish_saving()  # all ranks are here, and the message names the last checkpoint
        _roll_back(run, error)
        raise
    finally:
        if run.log is not None:
            run.log.close()
    run.writer.close()
    if run.trainer.memory is not None:
        run.trainer.memory.close()
    if run.snapshots is not None and summary.stopped_by is None:
        run.snapshots.remove()  # nobody will resume
    if run.log is not None:
        stop.stop_file.unlink(missing_ok=True)
        write_json(folder.ended_file, {"step": summary.step, "stopped_by": summary.stopped_by})
    parallel.close()
    return summary


def _loop(run: LiveRun, stop: StopSignal) -> RunSummary:
    config, num_steps = run.config, run.config.training.num_steps
    first_validation = last_validation = _validate(run)
    stopped_by = _stopped_before_the_first_step(run, stop)
    with (
        ReadAhead(run.train.microbatches, run.step, num_steps) as reader,
        profiler_of_steps(config.training, run.step, run.folder, run.ranks.rank, run.say) as profiler,
    ):
        batches = reader.take()
        while batches is not None and stopped_by is None:
            asks_to_stop = stop.reason() is not None or run.writer.has_failed
            upcoming = reader.take()
            result = run.trainer.train_step(run.step, batches, stop_requested=asks_to_stop, next_batches=upcoming)
            batches = upcoming
            run.step += 1
            run.tokens_seen += result.num_tokens
            run.heartbeat.stepped(run.step, result.seconds, result.gather_wait_s, result.compute_s)
            _log_step(run, result, reader.waited_s())
            run.log_saved()
            run.losses.add(run.step, result.loss)
            if profiler is not None:
                profiler.step()
            if result.stop_requests:
                stopped_by = stop.reason() or "another rank"  # asked again: it may have come while the step ran
            elif _due(run.step, config.training.validate_every_steps) and run.step < num_steps:
                last_validation = _validate(run)
            if _due(run.step, config.checkpoint.every_steps):
                run.save()
            elif _due(run.step, config.checkpoint.local_every_steps) and run.step < num_steps and stopped_by is None:
                run.save_on_nodes()
    if stopped_by is None:
        last_validation = _validate(run)
    run.save()
    run.finish_saving()
    return RunSummary(
        step=run.step,
        tokens_seen=run.tokens_seen,
        first_validation_loss=first_validation,
        last_validation_loss=last_validation,
        checkpoint=run.folder.checkpoint(run.step),
        stopped_by=stopped_by,
    )


def _roll_back(run: LiveRun, error: NonFiniteLossError | LossSpikeError) -> None:
    """Raise what becomes of a run whose loss has spiked; without `spikes.max_rollbacks` nothing does."""
    if run.config.spikes.max_rollbacks == 0:
        return
    failed_step = run.step + 1  # of a loss that is not finite
    spike = error.spike if isinstance(error, LossSpikeError) else Spike(failed_step, failed_step, str(error))
    rollback = roll_back(run.folder, run.config, run.ranks, spike, run.skipped)
    raise RolledBackError(f"the loss spiked; rolled {rollback.details}; continue with --resume") from error


def _stopped_before_the_first_step(run: LiveRun, stop: StopSignal) -> str | None:
    """Later stop requests travel with the loss of a step."""
    reason = stop.reason()
    asked = parallel.sum_over_ranks([float(reason is not None)], run.ranks)[0]
    return (stop.reason() or "another rank") if asked else None


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _log_step(run: LiveRun, result: StepResult, data_wait_s: float) -> None:
    if _due(run.step, run.config.training.log_every_steps) or run.step == run.config.training.num_steps:
        values = run.trainer.metrics(result, data_wait_s)  # collective
        if run.log is not None:
            run.log.step(run.step, values | {"data/tokens_seen": float(run.tokens_seen)})


def _validate(run: LiveRun) -> float:
    available = run.validation.num_samples // run.config.training.global_batch_size
    batches = max(1, min(run.config.training.validation_batches, available))

    def microbatches(index: int) -> Sequence[Batch]:
        run.progress("validating")
        return run.validation.microbatches(index)

    loss = run.trainer.validate(microbatches, batches)
    run.progress("training")
    if run.log is not None:
        run.log.validation(run.step, {"validation/loss": loss})
    return loss
