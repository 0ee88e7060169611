"""What a run would be, told before anything starts: the text of `--dry-run`.

Reads the config alone: no process group, no accelerator, no corpus, no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from engram_megatron.config import RunConfig
from engram_megatron.model.budget import paper_sparse_ratio
from engram_megatron.model.counts import (
    TABLES_NAME,
    ParameterCounts,
    TensorSpec,
    buffer_specs,
    count_parameters,
    num_moe_layers,
    tensor_specs,
)
from engram_megatron.model.flops import TokenFlops, token_flops
from engram_megatron.model.memory import RankMemory, job_table_bytes, rank_memory
from engram_megatron.model.placement import rank_step_tokens
from engram_megatron.model.traffic import RankTraffic, expected_unique_ratio, rank_traffic
from engram_megatron.optimizer.parameter_groups import describe_tensor, parameter_rules
from engram_megatron.overrides import as_text, leaves

_SHOWN_STAGES = 8  # with more pipeline stages only the most loaded one is shown
_NUMBERED = re.compile(r"\.(layers|local_experts)\.(\d+)(?=\.)")


def describe(config: RunConfig, world_size: int) -> str:
    """The plan of `config` on `world_size` ranks: configuration, parameters, FLOPs, memory, traffic, optimizers.

    Raises `UsageError` for a config or a layout that cannot work.
    """
    config.validate()
    config.validate_layout(world_size)
    sections = {
        "Configuration": _configuration(config),
        "Layout": _layout(config, world_size),
        "Parameters": _parameters(config, count_parameters(config)),
        "FLOPs per token": _flops(token_flops(config), config.data.sequence_length),
        "Memory per rank": _memory(config, world_size),
        "Bytes per step of one rank": _traffic(config, world_size),
        "Optimizer of every tensor": _optimizers(config),
    }
    return "\n\n".join(f"{title}\n{'-' * len(title)}\n{text}" for title, text in sections.items()) + "\n"


def _configuration(config: RunConfig) -> str:
    values = [(key, value) for key, value, _ in leaves(config)]
    width = max(len(key) for key, _ in values)
    return "\n".join(f"{key:<{width}} = {as_text(value)}" for key, value in values)


def _layout(config: RunConfig, world_size: int) -> str:
    parallel, training = config.parallel, config.training
    data = parallel.data(world_size)
    step_tokens = training.global_batch_size * config.data.sequence_length
    ranks = {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "context": parallel.context,
        "data": data,
        "expert": parallel.expert,
    }
    return _table(
        [
            ["world size", f"{world_size} = " + " x ".join(f"{name} {ranks[name]}" for name in list(ranks)[:4])],
            ["expert ranks", f"{parallel.expert}, out of tensor x context x data"],
            ["microbatches per step", f"{training.num_microbatches(data)} of {training.micro_batch_size} sequences"],
            [
                "tokens per step",
                f"{step_tokens:,} ({rank_step_tokens(config, world_size):,} per data and context rank)",
            ],
            ["tokens of the run", f"{_short(step_tokens * training.num_steps)} in {training.num_steps:,} steps"],
        ]
    )


def _parameters(config: RunConfig, counts: ParameterCounts) -> str:
    rows = [[part, f"{count:,}", _short(count)] for part, count in counts.by_part.items()]
    rows.append(["stored (all of the above)", f"{counts.stored:,}", _short(counts.stored)])
    summary = [
        [
            "total, as the paper counts",
            _short(counts.total),
            f"{counts.total:,}: one of token embedding and output head",
        ],
        [
            "activated, as the paper counts",
            _short(counts.activated),
            f"{counts.activated:,}: no token embedding, no head, no table rows",
        ],
    ]
    if counts.engram_tables:
        summary += [
            ["Engram tables", _short(counts.engram_tables), f"{counts.engram_tables:,}: rows in host memory"],
            ["Engram dense", _short(counts.engram_dense), "projections, norms, convolution"],
        ]
    if counts.engram_tables and num_moe_layers(config.model):
        rho, num_experts = paper_sparse_ratio(config)
        equal_moe = f"1 - Engram tables / inactive parameters of the equal MoE of {num_experts} experts"
        summary += [
            ["sparse ratio rho", f"{rho:.2%}", equal_moe],
            ["experts' share", f"{counts.sparse_ratio:.2%}", "of this model's own inactive parameters"],
        ]
    return _table(rows, right=(1, 2)) + "\n\n" + _table(summary, right=(1,))


def _flops(flops: TokenFlops, sequence_length: int) -> str:
    names = {
        "attention_projections": "attention projections",
        "attention_core": f"causal attention at {sequence_length:,} tokens",
        "feed_forward": "feed-forwards and active experts",
        "router": "router",
        "hyper_connections": "hyper-connections",
        "engram": "Engram",
        "head": "output head",
        "multi_token_prediction": "multi-token prediction",
    }
    rows = [[text, _short(getattr(flops, name))] for name, text in names.items()]
    rows.append(["forward", _short(flops.forward)])
    rows.append(["forward and backward", _short(flops.forward_backward)])
    return _table(rows, right=(1,)) + "\n2 per multiply-add; backward is twice forward; recomputation is not counted."


def _memory(config: RunConfig, world_size: int) -> str:
    rules = parameter_rules(config.model, config.engram)

    def state_values(spec: TensorSpec) -> int:
        """Values that the optimizer keeps per element: Muon's momentum, or Adam's two moments."""
        return 1 if rules.rule(spec.name, spec.shape).optimizer == "muon" else 2

    memories = [rank_memory(config, world_size, stage, state_values) for stage in range(config.parallel.pipeline)]
    kinds: dict[str, Callable[[RankMemory], int]] = {
        "weights": lambda m: m.weights,
        "gradients": lambda m: m.gradients,
        "float32 master weights": lambda m: m.master_weights,
        "optimizer state": lambda m: m.optimizer_state,
        "activations (estimate)": lambda m: m.activations,
        "device in all": lambda m: m.device,
        "host tables with moments": lambda m: m.host_tables,
    }
    shown = _shown_stages([m.device for m in memories])
    rows = [["", *(f"stage {stage}" for stage in shown)]]
    rows += [[kind, *(_bytes(value(memories[stage])) for stage in shown)] for kind, value in kinds.items()]
    rows.append(["microbatches in flight", *(str(memories[stage].microbatches_in_flight) for stage in shown)])
    lines = [
        _table(rows, right=range(1, len(rows[0]))),
        "Plain data parallelism: every replica holds whole gradients and optimizer state.",
    ]
    if config.engram is not None:
        lines.append(f"Host tables of the whole job: {_bytes(job_table_bytes(config, world_size))}.")
    return "\n".join(lines)


def _traffic(config: RunConfig, world_size: int) -> str:
    traffics = [rank_traffic(config, world_size, stage) for stage in range(config.parallel.pipeline)]
    kinds: dict[str, Callable[[RankTraffic], int]] = {
        "gradients, dense": lambda t: t.dense_gradients,
        "gradients, routed experts": lambda t: t.expert_gradients,
        "expert all-to-all (estimate)": lambda t: t.expert_all_to_all,
        "table rows (upper bound)": lambda t: t.table_rows,
        "table gradients (upper bound)": lambda t: t.table_gradients,
        "tensor parallel (estimate)": lambda t: t.tensor_parallel,
        "pipeline": lambda t: t.pipeline,
        "context (estimate)": lambda t: t.context,
        "in all": lambda t: t.total,
    }
    shown = _shown_stages([t.total for t in traffics])
    rows = [["", *(f"stage {stage}" for stage in shown)]]
    for kind, value in kinds.items():
        if kind == "in all" or any(value(t) for t in traffics):
            rows.append([kind, *(_bytes(value(traffics[stage])) for stage in shown)])
    text = _table(rows, right=range(1, len(rows[0])))
    if config.engram is None:
        return text
    tokens = rank_step_tokens(config, world_size) // config.parallel.tensor
    return (
        f"{text}\nTable rows: every lookup counted. Expectation, if each rank leaves duplicates out of a whole step: "
        f"about {expected_unique_ratio(tokens):.0%} of\nthem stay (measured with the 27B tables on technical text, "
        f"{tokens:,} tokens per rank and step)."
    )


def _optimizers(config: RunConfig) -> str:
    """One line per group of tensors that differ in layer and expert number only; buffers last."""
    groups: dict[tuple[str, tuple[int, ...], str], list[str]] = {}
    updates = [(spec, _update(config, spec)) for spec in tensor_specs(config)]
    updates += [(spec, "no gradient: loss-free balancing moves it") for spec in buffer_specs(config)]
    for spec, update in updates:
        groups.setdefault((_NUMBERED.sub(r".\1.#", spec.name), spec.shape, update), []).append(spec.name)
    return _table(
        [
            [_collapsed(pattern, names), f"[{', '.join(map(str, shape))}]", update]
            for (pattern, shape, update), names in groups.items()
        ]
    )


def _update(config: RunConfig, spec: TensorSpec) -> str:
    """What changes a tensor. The tables are no parameters of the backbone's optimizers."""
    if spec.name == TABLES_NAME:
        multiplier = config.optimizer.table_learning_rate_multiplier
        return f"row Adam, learning rate x {multiplier:g}, no weight decay"
    return describe_tensor(spec.name, spec.shape)


def _collapsed(pattern: str, names: Iterable[str]) -> str:
    """`pattern` with every `#` replaced by the numbers that `names` have there, as {0..3,7}."""
    columns = zip(*([int(number) for _, number in _NUMBERED.findall(name)] for name in names), strict=True)
    for numbers in columns:
        pattern = pattern.replace("#", _ranges(sorted(set(numbers))), 1)
    return pattern


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as 5 or {0..3,7}."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    if len(numbers) == 1:
        return str(numbers[0])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs) + "}"


def _shown_stages(load: Sequence[int]) -> list[int]:
    """All pipeline stages, or the most loaded one where they are many."""
    return list(range(len(load))) if len(load) <= _SHOWN_STAGES else [max(range(len(load)), key=load.__getitem__)]


def _table(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Rows as aligned columns; the columns `right` are flush right."""
    flush_right = set(right)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in flush_right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _short(count: int) -> str:
    """A count in T, B, M or K with three decimals."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.3f} {unit}"
    return str(count)


def _bytes(count: int) -> str:
    """Bytes in GiB, or in MiB below a tenth of one."""
    if count == 0:
        return "0"
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.2f} MiB"
