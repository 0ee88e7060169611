"""What one rank's process does around a run: speak up when it fails, and end so that all other ranks end too."""

from __future__ import annotations

import logging
import os
import socket
import sys
import traceback
import warnings

from engram_data.errors import CorpusError
from engram_megatron import platform
from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError

EXIT_USAGE, EXIT_FAILURE = 2, 1


def run_rank(config: RunConfig, *, resume: bool) -> None:
    """Train on this rank. Leaves the process on failure, without any further collective: the others' collectives
    then break, and torchrun or Slurm ends them."""
    warnings.filterwarnings("ignore", module=r"(megatron|torch|emerging_optimizers)\b.*")
    for chatty in ("megatron.core.models.gpt.gpt_model", "torch.utils.cpp_extension"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    rank = os.environ.get("RANK", "0")
    try:
        platform.limit_threads(threads_per_rank())
        platform.install()
        from engram_megatron.training.run import train  # megatron-core must be imported after `install`

        summary = train(config, resume=resume)
    except (UsageError, CorpusError) as error:
        _leave(f"error: {error}" if rank == "0" else "", EXIT_USAGE)
    except BaseException as error:
        trace = "".join(traceback.format_exception(error))
        where = f"rank {rank} on {socket.gethostname()} failed"
        _leave(f"{trace}error: {where}: {type(error).__name__}: {error}", EXIT_FAILURE)
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


def threads_per_rank() -> int:
    """This host's usable cores divided by its ranks (torchrun's LOCAL_WORLD_SIZE), at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _leave(message: str, code: int) -> None:
    if message:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit: destructors of process groups can hang on ranks that are gone
