"""What a run would be, told before anything starts: the text of `--dry-run`.

Reads the config alone: no process group, no accelerator, no corpus, no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

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
from engram_megatron.model.layout_rules import check_layout
from engram_megatron.model.placement import rank_step_tokens
from engram_megatron.optimizer.parameter_groups import describe_tensor
from engram_megatron.overrides import as_text, leaves
from engram_megatron.training.plan_layout import memory_text, pipeline_text, traffic_text
from engram_megatron.training.plan_text import short, table

_NUMBERED = re.compile(r"\.(layers|local_experts)\.(\d+)(?=\.)")


def describe(config: RunConfig, world_size: int) -> str:
    """The plan of `config` on `world_size` ranks: configuration, parameters, FLOPs, memory, traffic, optimizers.

    Raises `UsageError` for a config or a layout that cannot work.
    """
    config.validate()
    check_layout(config, world_size)
    sections = {"Configuration": _configuration(config), "Layout": _layout(config, world_size)}
    if config.parallel.pipeline > 1:
        sections["Pipeline"] = pipeline_text(config, world_size)
    sections |= {
        "Parameters": _parameters(config, count_parameters(config)),
        "FLOPs per token": _flops(token_flops(config), config.data.sequence_length),
        "Memory per rank": memory_text(config, world_size),
        "Bytes that one rank sends per step": traffic_text(config, world_size),
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
    return table(
        [
            ["world size", f"{world_size} = " + " x ".join(f"{name} {ranks[name]}" for name in list(ranks)[:4])],
            ["expert ranks", f"{parallel.expert}, out of tensor x context x data"],
            ["microbatches per step", f"{training.num_microbatches(data)} of {training.micro_batch_size} sequences"],
            [
                "tokens per step",
                f"{step_tokens:,} ({rank_step_tokens(config, world_size):,} per data and context rank)",
            ],
            ["tokens of the run", f"{short(step_tokens * training.num_steps)} in {training.num_steps:,} steps"],
        ]
    )


def _parameters(config: RunConfig, counts: ParameterCounts) -> str:
    rows = [[part, f"{count:,}", short(count)] for part, count in counts.by_part.items()]
    rows.append(["stored (all of the above)", f"{counts.stored:,}", short(counts.stored)])
    summary = [
        [
            "total, as the paper counts",
            short(counts.total),
            f"{counts.total:,}: one of token embedding and output head",
        ],
        [
            "activated, as the paper counts",
            short(counts.activated),
            f"{counts.activated:,}: no token embedding, no head, no table rows",
        ],
    ]
    if counts.engram_tables:
        summary += [
            ["Engram tables", short(counts.engram_tables), f"{counts.engram_tables:,}: rows in host memory"],
            ["Engram dense", short(counts.engram_dense), "projections, norms, convolution"],
        ]
    if counts.engram_tables and num_moe_layers(config.model):
        rho, num_experts = paper_sparse_ratio(config)
        equal_moe = f"1 - Engram tables / inactive parameters of the equal MoE of {num_experts} experts"
        summary += [
            ["sparse ratio rho", f"{rho:.2%}", equal_moe],
            ["experts' share", f"{counts.sparse_ratio:.2%}", "of this model's own inactive parameters"],
        ]
    return table(rows, right=(1, 2)) + "\n\n" + table(summary, right=(1,))


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
    always = [name for name in names if name != "multi_token_prediction" or flops.multi_token_prediction]
    rows = [[names[name], short(getattr(flops, name))] for name in always]
    rows.append(["forward", short(flops.forward)])
    rows.append(["forward and backward", short(flops.forward_backward)])
    return table(rows, right=(1,)) + "\n2 per multiply-add; backward is twice forward; recomputation is not counted."


def _optimizers(config: RunConfig) -> str:
    """One line per group of tensors that differ in layer and expert number only; buffers last."""
    groups: dict[tuple[str, tuple[int, ...], str], list[str]] = {}
    updates = [(spec, _update(config, spec)) for spec in tensor_specs(config)]
    updates += [(spec, "no gradient: loss-free balancing moves it") for spec in buffer_specs(config)]
    for spec, update in updates:
        groups.setdefault((_NUMBERED.sub(r".\1.#", spec.name), spec.shape, update), []).append(spec.name)
    return table(
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
