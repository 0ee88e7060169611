"""The numbers of one step, gathered from all ranks under their TensorBoard tags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from engram_megatron.gather.statistics import GatherStatistics
from engram_megatron.training.parallel import Ranks, sum_over_ranks


def gather_metrics(statistics: GatherStatistics, wait_s: float, ranks: Ranks) -> dict[str, float]:
    """Panel `gather/`: counts and bytes summed over ranks, the ratio of the sums, the mean wait. Collective."""
    local = {name: value for name, value in statistics.scalars().items() if name != "gather/unique_ratio"}
    totals = sum_over_ranks([*local.values(), wait_s], ranks)
    values = dict(zip(local, totals[:-1], strict=True))
    values["gather/unique_ratio"] = values["gather/unique_rows"] / max(values["gather/lookups"], 1.0)
    values["gather/wait_ms"] = totals[-1] / ranks.world_size * 1e3
    return values


def layer_metrics(model: nn.Module) -> dict[str, float]:
    """Panels `engram/` and `mhc/` of this rank's last microbatch: gate mean per layer and stream, streams' cosine."""
    values: dict[str, float] = {}
    for layer in _layers(model):
        gate: Any = getattr(getattr(layer, "engram", None), "last_gate_mean", None)
        if gate is not None:
            for stream, mean in enumerate(gate.tolist()):
                values[f"engram/gate_mean/layer_{layer.layer_number}/stream_{stream}"] = mean
        if layer.last_stream_cosine is not None:
            values[f"mhc/stream_cosine/layer_{layer.layer_number}"] = float(layer.last_stream_cosine)
    return values


def expert_metrics(expert_tokens: Mapping[int, Any], ranks: Ranks) -> dict[str, float]:
    """Panel `moe/`: load of the busiest and the idlest expert as multiples of the mean, per layer. Collective."""
    if not expert_tokens:
        return {}
    layers = sorted(expert_tokens)
    flat = [float(count) for layer in layers for count in expert_tokens[layer].tolist()]
    totals = sum_over_ranks(flat, ranks)
    values: dict[str, float] = {}
    per_layer = len(totals) // len(layers)
    for index, layer in enumerate(layers):
        load = totals[index * per_layer : (index + 1) * per_layer]
        mean = max(sum(load) / per_layer, 1e-9)
        values[f"moe/max_load/layer_{layer}"] = max(load) / mean
        values[f"moe/min_load/layer_{layer}"] = min(load) / mean
    return values


def _layers(model: nn.Module) -> Any:
    while hasattr(model, "module"):
        model = model.module  # type: ignore[assignment]
    return model.decoder.layers  # type: ignore[union-attr]
