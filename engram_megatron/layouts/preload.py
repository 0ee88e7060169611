"""Imported once by the fork server of `forked_ranks`: megatron-core on the CPU, so that every rank starts with it."""

import logging
import warnings

from engram_megatron import platform

platform.install()
# What megatron-core and torch say of parts that we do not use would bury the lines of a table.
warnings.filterwarnings("ignore", module=r"(megatron|torch|emerging_optimizers)\b.*")
for chatty in ("megatron.core.models.gpt.gpt_model", "torch.utils.cpp_extension"):
    logging.getLogger(chatty).setLevel(logging.ERROR)

import megatron.core
import megatron.core.dist_checkpointing
import megatron.core.distributed
import megatron.core.models.gpt.gpt_model
import megatron.core.optimizer
import megatron.core.pipeline_parallel.schedules
import numba

import engram_megatron.layouts.case
import engram_megatron.layouts.resume_case
