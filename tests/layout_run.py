"""One rank's part of a whole training run under any layout, for tests that look closer than `make layouts` does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from dense_run import expert_biases, largest_difference, relative_difference, whole_table
from small_run import build_small_run, finished_table, global_batch, microbatches, numbers

from engram_megatron.layouts.compare import live, whole_tensors
from engram_megatron.layouts.records import Shard

# See test_against_dense_model for what enlarges float64's 1e-16 to less than this.
FLOAT64 = 1e-9


def train(rank: int, world_size: int, config: Any, num_steps: int) -> dict[str, Any]:
    """Inside a rank function: "initial" parameters; "steps", each with its "result", "gradient" (clipped and divided as
    the optimizer takes it), "parameters" afterwards, "rows" and gradients of the own tables' rows, "ids" that were
    asked for; at the end the own rows of the "table", and the "expert_bias"es."""
    from engram_megatron.model.parameter_names import global_named_parameters
    from engram_megatron.model.tensor_shard import partition_dim

    run = build_small_run(config, rank, world_size)
    layout, ranks = run.memory.lookup.layout, run.ranks
    applied: dict[str, Any] = {}
    memory_step, plan = run.memory.step, run.memory.lookup.plan

    def record_step(gradients: Any, learning_rate: float, scale: float) -> None:
        applied["rows"] = (layout.global_row(rank, gradients.local_rows), gradients.gradients * scale)
        memory_step(gradients, learning_rate, scale)

    def record_plan(ids: Any) -> Any:
        applied["ids"] = ids.copy()
        return plan(ids)

    run.memory.step, run.memory.lookup.plan = record_step, record_plan

    def shards(gradients: bool) -> dict[str, Shard]:
        return {
            name: Shard(numbers(p.main_grad if gradients else p), partition_dim(p), ranks.tensor_rank)
            for name, p in global_named_parameters(run.chunks)
        }

    initial, steps = shards(gradients=False), []
    for step in range(num_steps):
        batch = global_batch(step, separate_documents=config.data.separate_documents)
        mine = microbatches(batch, ranks.data_rank, ranks.data_ranks)
        result = run.trainer.train_step(step, mine, stop_requested=False)
        after = shards(gradients=False)
        steps.append({"result": result, "gradient": shards(gradients=True), "parameters": after, **applied})
    owned = layout.global_row(rank, np.arange(run.memory.shard.num_rows))
    return {
        "initial": initial,
        "steps": steps,
        "table": (owned, finished_table(run.memory)),
        "expert_bias": expert_biases(run.chunks),
    }


def check_steps(ranks: list[dict[str, Any]], dense: dict[str, Any]) -> None:
    """Loss, clip norm, tokens, every gradient and the table's, in every step, are those of `dense_run`."""
    for step, expected in enumerate(dense["steps"]):
        of_ranks = [rank["steps"][step] for rank in ranks]
        for one in of_ranks:
            assert one["result"].loss == pytest.approx(expected["loss"], rel=FLOAT64)
            assert one["result"].gradient_norm == pytest.approx(expected["norm"], rel=FLOAT64)
            assert one["result"].num_tokens == expected["num_tokens"]
        gradient = whole_tensors([one["gradient"] for one in of_ranks])
        assert largest_difference(live(gradient), live(expected["gradient"])) < FLOAT64
        table = whole_table([one["rows"] for one in of_ranks], expected["table_gradient"], 0.0)
        assert relative_difference(table, expected["table_gradient"]) < FLOAT64
