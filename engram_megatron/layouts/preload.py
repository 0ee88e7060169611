"""Imported once by the fork server of `forked_ranks`: megatron-core on the CPU, so that every rank starts with it."""

from engram_megatron import platform

platform.install()

import megatron.core
import megatron.core.dist_checkpointing
import megatron.core.distributed
import megatron.core.models.gpt.gpt_model
import megatron.core.optimizer
import megatron.core.pipeline_parallel.schedules
import numba

import engram_megatron.layouts.case
