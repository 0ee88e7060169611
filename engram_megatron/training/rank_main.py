"""What one rank's process does around a run: speak up when it fails, and end so that all other ranks end too.

Exit codes: 0 finished, or stopped because that was asked for; 2 a user's mistake, or spikes of the loss that rollbacks
do not cure; 3 rolled back after such a spike: to be resumed; 1 anything else.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

from engram_data.errors import CorpusError
from engram_megatron import platform
from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.training.loss_spike import EXIT_ROLLED_BACK, RolledBackError, SpikesNotCuredError
from engram_megatron.training.stop_signal import StopSignal

EXIT_USAGE, EXIT_FAILURE = 2, 1
# Errors that all ranks meet alike are told by rank 0, which whoever started the ranks then ends the others for.
SECONDS_FOR_RANK_0 = 10.0


def run_rank(config: RunConfig, *, resume: bool) -> int:
    """Train on this rank and return 0. Leaves the process on failure, without any further collective: the others'
    collectives then break, and whoever started the ranks ends them."""
    warnings.filterwarnings("ignore", module=r"(megatron|torch|emerging_optimizers)\b.*")
    for chatty in ("megatron.core.models.gpt.gpt_model", "torch.utils.cpp_extension"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    rank = os.environ.get("RANK", "0")
    try:
        with StopSignal(Path(config.run_dir), watch_file=rank == "0") as stop:
            platform.limit_threads(threads_per_rank())
            platform.install()
            # megatron-core must be imported after `install`
            from engram_megatron.training.checkpoint_writer import SaveError
            from engram_megatron.training.run import train
            from engram_megatron.training.trainer import NonFiniteLossError

            try:
                summary = train(config, resume=resume, stop=stop, on_table_failure=_leave_failed)
            except (NonFiniteLossError, SaveError) as error:
                _leave_together(rank, error, EXIT_FAILURE)
            except RolledBackError as error:
                _leave_together(rank, error, EXIT_ROLLED_BACK)
            except SpikesNotCuredError as error:
                _leave_together(rank, error, EXIT_USAGE)
    except (UsageError, CorpusError) as error:
        _leave_together(rank, error, EXIT_USAGE)
    except BaseException as error:
        _leave_failed(error)
    if rank == "0":
        if summary.stopped_by is not None:
            print(f"stopped by {summary.stopped_by} after step {summary.step}; continue with --resume")
        else:
            print(
                f"validation loss {summary.first_validation_loss:.4f} -> {summary.last_validation_loss:.4f} nats per "
                f"token after {summary.step} steps, {summary.tokens_seen:,} tokens"
            )
        print(f"run folder   {config.run_dir}\ncheckpoint   {summary.checkpoint}")
        print(f"look at it   {os.path.relpath(sys.executable)[: -len('python')]}tensorboard --logdir {config.run_dir}")
    return 0


def threads_per_rank() -> int:
    """This host's usable cores divided by its ranks (torchrun's LOCAL_WORLD_SIZE), at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _leave_failed(error: BaseException) -> NoReturn:
    trace = "".join(traceback.format_exception(error))
    where = f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()} failed"
    _leave(f"{trace}error: {where}: {type(error).__name__}: {error}", EXIT_FAILURE)


def _leave_together(rank: str, error: Exception, code: int) -> NoReturn:
    """Leave with one line, told by rank 0 if it failed too; another rank speaks where rank 0 did not fail."""
    line = " ".join(str(error).split())
    if rank != "0":
        # The launcher's word, or srun's on another node, that rank 0 has spoken: the code stays that of all ranks.
        signal.signal(signal.SIGTERM, lambda _number, _frame: os._exit(code))
        time.sleep(SECONDS_FOR_RANK_0)
        line = f"rank {rank} on {socket.gethostname()}: {line}"
    _leave(f"error: {line}", code)


def _leave(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"{message}\n")  # at once: another rank may write here too, and `print` writes the end apart
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit: destructors of process groups can hang on ranks that are gone
