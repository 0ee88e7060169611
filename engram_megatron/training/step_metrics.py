"""The numbers of one step, gathered from all ranks under their TensorBoard tags.

Layers stand on different pipeline ranks: each rank fills in what it knows of the whole model, zeros elsewhere, and the
sum over ranks is everybody's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
from torch import nn

from engram_megatron import platform
from engram_megatron.config import RunConfig
from engram_megatron.gather.statistics import GatherStatistics, collision_estimate
from engram_megatron.model.counts import has_mtp_experts
from engram_megatron.model.parameter_names import unwrapped
from engram_megatron.tables.host_memory import available_bytes
from engram_megatron.training.conditional_memory import ConditionalMemory
from engram_megatron.training.parallel import Ranks, max_over_ranks, sum_over_ranks

TASKS = ("plan", "fetch", "return", "update")


def gather_metrics(statistics: GatherStatistics, wait_s: float, ranks: Ranks) -> dict[str, float]:
    """Panel `gather/`: counts and bytes summed over ranks, ratios of the sums, the mean wait. Collective."""
    local = {name: value for name, value in statistics.scalars().items() if name != "gather/unique_ratio"}
    totals = sum_over_ranks([*local.values(), wait_s], ranks)
    values = dict(zip(local, totals[:-1], strict=True))
    values["gather/unique_ratio"] = values["gather/unique_rows"] / max(values["gather/lookups"], 1.0)
    values["gather/hottest_share"] = values["gather/hottest_lookups"] / max(values["gather/lookups"], 1.0)
    values["gather/wait_ms"] = totals[-1] / ranks.world_size * 1e3
    return values


def table_metrics(memory: ConditionalMemory, num_steps: int, ranks: Ranks) -> dict[str, float]:
    """Panel `tables/`. Collective.

    Milliseconds per step that the tables' thread spent on each kind of task in the `num_steps` steps since the last
    call, mean over ranks; rows of the busiest owner in the last update, as a multiple of the mean; share of rows that
    never had a gradient, and what it says of collisions; root mean square of an update relative to that of the weights.
    """
    update, shard = memory.optimizer.last_update, memory.shard
    seconds = memory.worker.take_seconds()
    sums = sum_over_ranks(
        [
            *(seconds.get(task, 0.0) for task in TASKS),
            float(update.rows),
            update.update_square,
            update.weight_square,
            float(shard.touched_rows),
        ],
        ranks,
    )
    rows, update_square, weight_square, touched = sums[len(TASKS) :]
    (busiest,) = max_over_ranks([float(update.rows)], ranks)
    touched_share = touched / shard.layout.total_rows
    per_step = 1e3 / (ranks.world_size * max(num_steps, 1))
    return {f"tables/{task}_ms": total * per_step for task, total in zip(TASKS, sums, strict=False)} | {
        "tables/owner_imbalance": busiest * ranks.world_size / max(rows, 1.0),
        "tables/never_touched": 1.0 - touched_share,
        "tables/collision_estimate": collision_estimate(touched_share),
        "tables/update_to_weight": math.sqrt(update_square / max(weight_square, 1e-300)),
    }


def rank_metrics(compute_s: float, data_wait_s: float, ranks: Ranks) -> dict[str, float]:
    """What differs between ranks, in panels `perf/`, `data/` and `memory/`. Collective.

    `compute_s` of the slowest and the fastest rank, the longest `data_wait_s`; memory of the largest rank, in its
    process and on its GPU, and of the host that has the least left.
    """
    gib = 1024**3
    slowest, fastest, data_wait, peak, resident, device, used_up = max_over_ranks(
        [
            compute_s,
            -compute_s,
            data_wait_s,
            platform.peak_memory_bytes() / gib,
            psutil.Process().memory_info().rss / gib,
            platform.device_memory_bytes() / gib,
            -available_bytes() / gib,
        ],
        ranks,
    )
    values = {
        "perf/slowest_compute_ms": slowest * 1e3,
        "perf/fastest_compute_ms": -fastest * 1e3,
        "data/wait_ms": data_wait * 1e3,
        "perf/peak_memory_gib": peak,
        "memory/resident_gib": resident,
        "memory/host_available_gib": -used_up,
    }
    return values | ({"memory/device_gib": device} if device > 0 else {})


def layer_metrics(config: RunConfig, chunks: Sequence[nn.Module], ranks: Ranks) -> dict[str, float]:
    """Panels `engram/` and `mhc/`: gate mean per layer and stream, and the streams' cosine per layer, of the last
    microbatch, averaged over the ranks that hold the layer. Collective."""
    local: dict[str, float] = {}
    for layer in (layer for chunk in chunks for layer in unwrapped(chunk).decoder.layers):
        gate: Any = getattr(getattr(layer, "engram", None), "last_gate_mean", None)
        if gate is not None:
            local |= {_gate_tag(layer.layer_number, stream): mean for stream, mean in enumerate(gate.tolist())}
        if layer.last_stream_cosine is not None:
            local[_cosine_tag(layer.layer_number)] = float(layer.last_stream_cosine)
    return _mean_over_holders(_layer_tags(config), local, ranks)


def expert_metrics(config: RunConfig, expert_tokens: Mapping[int, Any], ranks: Ranks) -> dict[str, float]:
    """Panel `moe/`: load of the busiest and the idlest expert as multiples of the mean, per layer. Collective.

    `expert_tokens`: for the layer numbers of this rank, the tokens that it sent to each expert of the model.
    """
    moe = config.model.moe
    if moe is None:
        return {}
    layers = list(range(moe.num_leading_dense_layers + 1, config.model.num_layers + 1))
    if has_mtp_experts(config.model):
        layers.append(config.model.num_layers + 1)
    nothing = [0.0] * moe.num_experts
    flat = [float(n) for layer in layers for n in expert_tokens.get(layer, nothing)]
    totals = sum_over_ranks(flat, ranks)
    values: dict[str, float] = {}
    for index, layer in enumerate(layers):
        load = totals[index * moe.num_experts : (index + 1) * moe.num_experts]
        mean = max(sum(load) / moe.num_experts, 1e-9)
        name = "mtp" if layer > config.model.num_layers else f"layer_{layer}"
        values[f"moe/max_load/{name}"] = max(load) / mean
        values[f"moe/min_load/{name}"] = min(load) / mean
    return values


def _mean_over_holders(tags: Sequence[str], local: Mapping[str, float], ranks: Ranks) -> dict[str, float]:
    """Means over the ranks that have a value; tags that no rank has are left out. All ranks give the same `tags`."""
    assert set(local) <= set(tags), set(local) - set(tags)
    totals = sum_over_ranks(
        [*(local.get(tag, 0.0) for tag in tags), *(float(tag in local) for tag in tags)],
        ranks,
    )
    sums, holders = totals[: len(tags)], totals[len(tags) :]
    return {tag: total / count for tag, total, count in zip(tags, sums, holders, strict=True) if count}


def _layer_tags(config: RunConfig) -> list[str]:
    streams = config.model.mhc.num_streams
    gates = [
        _gate_tag(number, stream)
        for number in (config.engram.layer_numbers if config.engram is not None else ())
        for stream in range(streams)
    ]
    return gates + [_cosine_tag(number) for number in range(1, config.model.num_layers + 1)]


def _gate_tag(layer_number: int, stream: int) -> str:
    return f"engram/gate_mean/layer_{layer_number}/stream_{stream}"


def _cosine_tag(layer_number: int) -> str:
    return f"mhc/stream_cosine/layer_{layer_number}"
