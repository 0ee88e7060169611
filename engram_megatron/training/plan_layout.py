"""What a layout costs: the parts of a plan that differ between pipeline ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engram_megatron.config import RunConfig
from engram_megatron.model.counts import TensorSpec
from engram_megatron.model.memory import RankMemory, rank_memory, rank_table_bytes
from engram_megatron.model.pipeline_balance import FLOPS_PER_BYTE, model_costs
from engram_megatron.model.pipeline_layout import chunk_memory_layers, pipeline_layout
from engram_megatron.model.pipeline_schedule import idle_share
from engram_megatron.model.placement import gradient_ranks, rank_step_tokens
from engram_megatron.model.traffic import expected_unique_ratio, rank_traffic
from engram_megatron.optimizer.parameter_groups import parameter_rules
from engram_megatron.training.plan_text import byte_count, table

_SHOWN_RANKS = 8  # with more pipeline ranks only the most loaded one is shown


def pipeline_text(config: RunConfig, world_size: int) -> str:
    """Layers and relative cost of every chunk, and the share of the time that a pipeline rank idles."""
    parallel, layout = config.parallel, pipeline_layout(config)
    costs = model_costs(config).chunks(layout.num_layers)
    slowest, whole = max(cost.total for cost in costs), sum(cost.total for cost in costs)
    rows = [["rank", "chunk", "layers", "Engram layers", "cost", "of the slowest", "cost of the rank"]]
    for rank in range(layout.ranks):
        of_rank = sum(cost.total for cost in costs[rank :: layout.ranks])
        for chunk in range(layout.chunks_per_rank):
            layers = layout.layers(rank, chunk)
            cost = costs[chunk * layout.ranks + rank].total
            engram = ",".join(map(str, chunk_memory_layers(config, layers))) or "-"
            shown = f"{layers.start + 1}..{layers.stop}" if layers else "-"
            shares = (f"{cost / whole:.1%}", f"{cost / slowest:.1%}", "" if chunk else f"{of_rank / whole:.1%}")
            rows.append([str(rank), str(chunk), shown, engram, *shares])
    microbatches = config.training.num_microbatches(parallel.data(world_size))
    idle = idle_share(costs, layout.ranks, microbatches)
    equal = (layout.ranks - 1) / (layout.chunks_per_rank * microbatches + layout.ranks - 1)
    return (
        f"parallel.pipeline_layout = {layout.as_text()}\n{table(rows, right=range(7))}\n"
        f"Cost: FLOPs, and {FLOPS_PER_BYTE} for each byte that hyper-connections, Engram and loss move.\n"
        f"Bubble: {idle:.1%} of its time a pipeline rank idles, on average, in a simulation with these costs, without "
        f"communication;\n(p - 1) / (v m + p - 1) = {equal:.1%} if all chunks cost the same: p ranks, v chunks each, "
        f"m = {microbatches} microbatches."
    )


def memory_text(config: RunConfig, world_size: int) -> str:
    """Bytes by kind, one column per pipeline rank."""
    memories = planned_memory(config, world_size)
    kinds: dict[str, Callable[[RankMemory], int]] = {
        "weights": lambda m: m.weights,
        "gradients": lambda m: m.gradients,
        "float32 master weights": lambda m: m.master_weights,
        "optimizer state": lambda m: m.optimizer_state,
        "activations (estimate)": lambda m: m.activations,
        "device in all": lambda m: m.device,
        "host tables with moments": lambda m: m.host_tables,
    }
    if config.tables.placement == "nvme":
        kinds["tables on NVMe with moments"] = lambda m: m.disk_tables
    shown = _shown_ranks([m.device for m in memories])
    rows = [_header(shown)]
    rows += [[kind, *(byte_count(value(memories[rank])) for rank in shown)] for kind, value in kinds.items()]
    in_flight = "microbatches in flight" if config.parallel.virtual_pipeline == 1 else "chunk passes in flight"
    rows.append([in_flight, *(str(memories[rank].passes_in_flight) for rank in shown)])
    recomputed = {
        "none": "Without recomputation.",
        "full": "Every layer is recomputed.",
        "selective": f"Recomputed: {', '.join(config.training.recompute_modules)}.",
    }
    shared = config.parallel.distributed_optimizer
    lines = [
        table(rows, right=range(1, len(rows[0]))),
        "Every data replica holds "
        + (
            "whole gradients and its share of the optimizer state, here the mean. "
            if shared
            else "the whole of these. "
        )
        + recomputed[config.training.recompute],
    ]
    if config.engram is not None:
        host, disk = (byte_count(world_size * size) for size in rank_table_bytes(config, world_size))
        on_disk = f"; on NVMe: {disk}" if config.tables.placement == "nvme" else ""
        lines.append(f"Host tables of the whole job: {host}{on_disk}.")
    return "\n".join(lines)


def planned_memory(config: RunConfig, world_size: int) -> list[RankMemory]:
    """Memory of a rank of each pipeline rank."""
    is_muon = takes_muon(config)

    def state_values(spec: TensorSpec) -> int:
        """Values that the optimizer keeps per element: Muon's momentum, or Adam's two moments."""
        return 1 if is_muon(spec) else 2

    def shares(specs: Sequence[TensorSpec]) -> list[float]:
        """Of a distributed optimizer's replicas the mean: matrices are dealt whole."""
        return [1 / gradient_ranks(spec, config.parallel, world_size) for spec in specs]

    state_shares = shares if config.parallel.distributed_optimizer else None
    return [
        rank_memory(config, world_size, rank, state_values, state_shares) for rank in range(config.parallel.pipeline)
    ]


def traffic_text(config: RunConfig, world_size: int) -> str:
    """Bytes by purpose, process group and collective, one column per pipeline rank."""
    is_muon = takes_muon(config)
    per_rank = [
        {(t.purpose, t.group, t.collective): t.bytes for t in rank_traffic(config, world_size, rank, is_muon)}
        for rank in range(config.parallel.pipeline)
    ]
    totals = [sum(transfers.values()) for transfers in per_rank]
    shown = _shown_ranks(totals)
    kinds = list(dict.fromkeys(kind for transfers in per_rank for kind in transfers))
    rows = [["purpose", "ranks", "collective", *_header(shown)[1:]]]
    rows += [[*kind, *(byte_count(per_rank[rank].get(kind, 0)) for rank in shown)] for kind in kinds]
    rows.append(["in all", "", "", *(byte_count(totals[rank]) for rank in shown)])
    text = table(rows, right=range(3, len(rows[0])))
    if config.engram is None:
        return text
    tokens = rank_step_tokens(config, world_size) // config.parallel.tensor
    return (
        f"{text}\nTables: every lookup counted. Expectation, if each rank leaves duplicates out of a whole step: "
        f"about {expected_unique_ratio(tokens):.0%} of\nthem stay (measured with the 27B tables on technical text, "
        f"{tokens:,} tokens per rank and step)."
    )


def takes_muon(config: RunConfig) -> Callable[[TensorSpec], bool]:
    """Whether Muon updates a tensor of `config`."""
    rules = parameter_rules(config.model, config.engram)
    return lambda spec: rules.rule(spec.name, spec.shape).optimizer == "muon"


def _header(shown: Sequence[int]) -> list[str]:
    return ["", *(f"pipeline rank {rank}" for rank in shown)]


def _shown_ranks(load: Sequence[int]) -> list[int]:
    """All pipeline ranks, or the most loaded one where they are many."""
    return list(range(len(load))) if len(load) <= _SHOWN_RANKS else [max(range(len(load)), key=load.__getitem__)]
