"""The reference for whole runs: one process, the memory a dense `torch.nn.Embedding` over the joined row space, its
weight moved by `torch.optim.Adam`, all sequences of a step in one forward and backward pass, and the clipping rule
written out. Of the project it takes the backbone, its optimizer and the hash, which have tests of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
from small_run import global_batch, numbers, small_groups, small_hasher

from engram_megatron.config import RunConfig


def dense_run(rank: int, world_size: int, config: RunConfig, num_steps: int) -> dict[str, Any]:
    """On one rank: {"logits" of the first batch before any step, "steps": numbers of each step, "parameters",
    "initial" (parameters before), "table", "expert_bias"} as numpy arrays by global name."""
    import torch
    from megatron.core.distributed import finalize_model_grads

    from engram_megatron.layouts.weights import roughen
    from engram_megatron.model.backbone_config import TORCH_DTYPE
    from engram_megatron.model.builder import build_model_chunks, wrap_data_parallel
    from engram_megatron.model.parameter_names import global_named_parameters
    from engram_megatron.optimizer.backbone import build_backbone_optimizer
    from engram_megatron.optimizer.schedule import learning_rate_schedule

    assert (rank, world_size) == (0, 1)
    assert config.engram is not None
    optimizer_config = config.optimizer
    small_groups(config, rank, world_size)
    backbone = build_model_chunks(config)
    roughen(backbone)
    chunks = wrap_data_parallel(backbone, TORCH_DTYPE[config.training.dtype])
    (model,) = chunks
    hasher = small_hasher(config)
    embedding = dense_table(config, hasher.total_rows)
    backbone_optimizer = build_backbone_optimizer(chunks, config)
    betas = (optimizer_config.adam_beta1, optimizer_config.adam_beta2)
    table_optimizer = torch.optim.Adam(embedding.parameters(), lr=0.0, betas=betas, eps=optimizer_config.adam_eps)
    schedule = learning_rate_schedule(optimizer_config, config.training.num_steps)
    initial = {name: numbers(parameter) for name, parameter in global_named_parameters(chunks)}
    result: dict[str, Any] = {"initial": initial, "initial_table": numbers(embedding.weight), "steps": []}
    for step in range(num_steps):
        batch = global_batch(step, separate_documents=config.data.separate_documents)
        tokens, labels, mask, documents = (
            torch.from_numpy(array) for array in (batch.tokens, batch.labels, batch.loss_mask, batch.document_ids)
        )
        attention_documents = documents if config.data.separate_documents else None
        cut = config.engram.cut_at_documents
        rows_LBTH = torch.from_numpy(hasher.rows(batch.tokens, batch.document_ids if cut else None))
        backbone_optimizer.zero_grad()
        embedding.zero_grad()
        memory_LTBE = embedding(rows_LBTH).flatten(-2).transpose(1, 2)
        logits = model(tokens, attention_documents, memory_LTBE, documents if cut else None)
        if step == 0:
            result["logits"] = numbers(logits)
        log_probability = torch.log_softmax(logits, dim=-1).gather(-1, labels[..., None])[..., 0]
        loss_sum = -log_probability[mask].sum()
        loss_sum.backward()
        finalize_model_grads([model], None)  # balances the experts
        num_tokens = int(mask.sum())

        backbone_optimizer.prepare_gradients()
        gradients = [parameter.main_grad for parameter in model.parameters()] + [embedding.weight.grad]
        norm = float(torch.cat([g.double().flatten() for g in gradients]).norm()) / num_tokens
        limit = optimizer_config.clip_grad_norm
        scale = (limit / (norm + 1e-6) if norm + 1e-6 > limit > 0 else 1.0) / num_tokens
        gradient = {name: numbers(p.main_grad * scale) for name, p in global_named_parameters(chunks)}
        embedding.weight.grad *= scale
        lr = schedule.at(step)
        backbone_optimizer.step(lr, scale)
        for group in table_optimizer.param_groups:
            group["lr"] = lr * optimizer_config.table_learning_rate_multiplier
        table_optimizer.step()
        result["steps"].append(
            {
                "loss": loss_sum.item() / num_tokens,
                "norm": norm,
                "num_tokens": num_tokens,
                "gradient": gradient,
                "table_gradient": numbers(embedding.weight.grad),
            }
        )
    result["parameters"] = {name: numbers(parameter) for name, parameter in global_named_parameters(chunks)}
    result["table"] = numbers(embedding.weight)
    result["expert_bias"] = expert_biases(chunks)
    return result


def expert_biases(chunks: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The balancing biases by global name."""
    from engram_megatron.model.parameter_names import global_named_buffers

    return {name: numbers(b) for name, b in global_named_buffers(chunks) if name.endswith("expert_bias")}


def dense_table(config: RunConfig, total_rows: int) -> Any:
    import torch

    from engram_megatron.tables.row_init import fill_initial_rows

    assert config.engram is not None
    weight = np.zeros((total_rows, config.engram.row_dim), config.tables.dtype)
    fill_initial_rows(weight, 0, config.training.seed, config.engram.init_std)
    return torch.nn.Embedding(total_rows, config.engram.row_dim, _weight=torch.from_numpy(weight))


def whole_table(
    parts: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]], like: np.ndarray[Any, Any], empty: float
) -> np.ndarray[Any, Any]:
    """A table from the (global rows, values) of all ranks; rows that nobody has are `empty`."""
    table = np.full_like(like, empty)
    for rows, values in parts:
        table[rows] = values
    return table


def largest_difference(ours: dict[str, np.ndarray[Any, Any]], theirs: dict[str, np.ndarray[Any, Any]]) -> float:
    """Over all tensors, relative to the largest value of each."""
    assert set(ours) == set(theirs)
    return max(relative_difference(ours[name], theirs[name]) for name in theirs)


def relative_difference(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> float:
    """Largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
