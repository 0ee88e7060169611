"""Multi-token prediction against a plain re-implementation of DeepSeek-V3's equations 21 to 25 on one rank, in every
kind of layout; documents that do not see each other; the embedding's copy on the last pipeline stage."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dense_run import dense_table, expert_biases
from ranks import run_ranks
from small_run import (
    LENGTH,
    build_small_run,
    global_batch,
    microbatches,
    numbers,
    small_groups,
    small_hasher,
    small_run_config,
)

from engram_checkpoints.checkpoint_files import FileSums
from engram_data.batch import Batch, after_next
from engram_megatron.layouts.compare import live
from engram_megatron.layouts.small_model import take

# Sums over tokens run in another order; float64 has 1e-16, and norms with an epsilon of 1e-20 enlarge it.
ONE_RANK, LAYOUT = 1e-12, 1e-9
WEIGHT = 0.3
MTP = ("model.mtp.num_layers=1", "model.attention.num_heads=4", "optimizer.clip_grad_norm=0")
VARIANTS = {
    "experts": MTP,
    "dense": (*MTP, "model.moe=none"),
    "one stream": (*MTP, "model.mhc.num_streams=1"),
    "one stream of text": (*MTP, "data.separate_documents=false", "engram.cut_at_documents=false"),
    "four layers": (*MTP, "model.num_layers=4"),
}
TENSOR, EXPERT, CONTEXT, PIPELINE = (f"parallel.{axis}=2" for axis in ("tensor", "expert", "context", "pipeline"))
LAYOUTS: list[tuple[str, int, tuple[str, ...]]] = [
    *((variant, 1, ()) for variant in VARIANTS),
    ("experts", 1, ("training.recompute=full",)),
    ("experts", 1, ("training.recompute=selective", "training.recompute_modules=mhc,feed_forward")),
    *((variant, 2, (TENSOR,)) for variant in VARIANTS),
    ("experts", 2, (EXPERT,)),
    ("experts", 2, (TENSOR, EXPERT)),
    ("experts", 2, ()),
    ("experts", 2, (PIPELINE,)),
    ("dense", 2, (PIPELINE,)),
    ("four layers", 2, (PIPELINE, "parallel.virtual_pipeline=2")),
    ("four layers", 2, (PIPELINE, "parallel.virtual_pipeline=2", "training.recompute=full")),
    ("experts", 2, (CONTEXT,)),
    ("experts", 4, (TENSOR, PIPELINE)),
    ("experts", 4, (CONTEXT, PIPELINE)),
    ("experts", 4, (EXPERT, PIPELINE)),
    ("experts", 4, (PIPELINE, "parallel.distributed_optimizer=true")),
]


def _reference(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    return {name: _plain(small_run_config("float64", overrides)) for name, overrides in VARIANTS.items()}


def _plain(config: Any) -> dict[str, Any]:
    """One step's losses and gradients, per next token of the global batch, with the prediction written out."""
    import torch
    from megatron.core.distributed import finalize_model_grads

    from engram_megatron.layouts.weights import roughen
    from engram_megatron.model.builder import build_model_chunks, wrap_data_parallel
    from engram_megatron.model.parameter_names import global_named_parameters

    small_groups(config, 0, 1)
    [model] = build_model_chunks(config)
    roughen([model])
    [wrapped] = wrap_data_parallel([model], torch.float64)
    wrapped.zero_grad_buffer()
    hasher = small_hasher(config)
    table = dense_table(config, hasher.total_rows)
    separate = config.data.separate_documents
    batch = global_batch(0, separate_documents=separate)
    documents = torch.from_numpy(batch.document_ids) if separate else None
    rows = torch.from_numpy(hasher.rows(batch.tokens, batch.document_ids if separate else None))
    memory = table(rows).flatten(-2).transpose(1, 2)
    hidden = []
    model.decoder.register_forward_hook(lambda _module, _inputs, output: hidden.append(output))
    logits = wrapped(torch.from_numpy(batch.tokens), documents, memory, documents)
    after = _predicted(model, hidden[0], torch.from_numpy(batch.labels), documents)
    next_targets, after_targets = _targets(batch, separate)
    loss, mtp_loss = _sum(logits, next_targets), _sum(after, after_targets)
    # Divided afterwards, as the trainer does: megatron-core's routers differentiate their sigmoid in float32, where
    # another scale rounds differently.
    (loss + WEIGHT * mtp_loss).backward()
    finalize_model_grads([wrapped], None)
    tokens = len(next_targets)
    return {
        "loss": loss.item() / tokens,
        "mtp_loss": mtp_loss.item() / len(after_targets),
        "gradient": {name: numbers(p.main_grad) / tokens for name, p in global_named_parameters([model])},
        "table_gradient": numbers(table.weight.grad) / tokens,
        "expert_bias": expert_biases([model]),
    }


def _predicted(model: Any, hidden_TBC: Any, next_tokens_BT: Any, documents: Any) -> Any:
    """Logits [B, T, V] of the tokens after the next."""
    import torch

    layer = model.mtp.layers[0]

    def norm(x: Any, weight: Any) -> Any:
        return x / (x.square().mean(-1, keepdim=True) + model.config.layernorm_epsilon).sqrt() * weight

    embedded_TBC = model.embedding.word_embeddings.weight[next_tokens_BT].transpose(0, 1)
    joined = torch.cat(
        [norm(hidden_TBC, layer.hidden_layernorm.weight), norm(embedded_TBC, layer.embedding_layernorm.weight)], dim=-1
    )
    output, _ = layer.mtp_model_layer(joined @ layer.projection.weight.t(), attention_mask=documents)
    return (norm(output, layer.final_layernorm.weight) @ model.output_layer.weight.t()).transpose(0, 1)


def _targets(batch: Batch, separate: bool) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """(sequence, position, token) of every next token that counts, and of every one after the next."""
    found: tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]] = ([], [])
    for sequence, (tokens, labels) in enumerate(zip(batch.tokens, batch.labels, strict=True)):
        window = [*tokens, labels[-1]]
        document = list(batch.document_ids[sequence])
        document.append(document[-1] + (not batch.loss_mask[sequence, -1]))
        for ahead in (1, 2):
            for position in range(LENGTH + 1 - ahead):
                if not separate or document[position] == document[position + ahead]:
                    found[ahead - 1].append((sequence, position, int(window[position + ahead])))
    return found


def _sum(logits_BTV: Any, targets: list[tuple[int, int, int]]) -> Any:
    sequence, position, token = np.array(targets).T
    return -logits_BTV.log_softmax(-1)[sequence, position, token].sum()


def _step(rank: int, world_size: int, overrides: tuple[str, ...], expected: dict[str, Any]) -> dict[str, Any]:
    """One step of the trainer; the largest differences to `expected` of what this rank holds, by name."""
    import torch

    from engram_megatron.model.parameter_names import global_named_parameters
    from engram_megatron.model.tensor_shard import take_shard

    run = build_small_run(small_run_config("float64", overrides), rank, world_size)
    step, applied = run.memory.step, {}

    def record(gradients: Any, learning_rate: float, scale: float) -> None:
        applied["rows"] = run.memory.lookup.layout.global_row(rank, gradients.local_rows)
        applied["gradients"] = gradients.gradients * scale
        step(gradients, learning_rate, scale)

    update, gradients = run.optimizer.step, {}

    def record_gradients(learning_rate: float, scale: float) -> None:
        gradients.update({p: gradient * scale for p, gradient in run.optimizer.whole_gradients().items()})
        update(learning_rate, scale)

    run.memory.step, run.optimizer.step = record, record_gradients
    batch = global_batch(0, separate_documents=run.config.data.separate_documents)
    result = run.trainer.train_step(
        0, microbatches(batch, run.ranks.data_rank, run.ranks.data_ranks), stop_requested=False
    )
    different = {}
    for name, parameter in global_named_parameters(run.chunks):
        whole = expected["gradient"][name]
        part = numbers(take_shard(name, parameter, torch.from_numpy(whole)))
        [(ours)], [(theirs)] = live({name: numbers(gradients[parameter])}).values(), live({name: part}).values()
        different[name] = float(np.abs(ours - theirs).max() / max(np.abs(whole).max(), 1e-30))
    table = expected["table_gradient"]
    different["table"] = float(np.abs(applied["gradients"] - table[applied["rows"]]).max() / np.abs(table).max())
    for name, bias in expert_biases(run.chunks).items():
        different[name] = float(np.abs(bias - expected["expert_bias"][name]).max())
    different["loss"] = abs(result.loss / expected["loss"] - 1)
    different["mtp_loss"] = abs(result.mtp_loss / expected["mtp_loss"] - 1)
    square = sum(float(np.square(g).sum()) for g in (*expected["gradient"].values(), table))
    different["norm"] = abs(result.gradient_norm / square**0.5 - 1)
    embeddings = [
        numbers(c.module.embedding.word_embeddings.weight) for c in run.chunks if hasattr(c.module, "embedding")
    ]
    return {"different": different, "embeddings": embeddings, "metrics": run.trainer.metrics(result)}


def _layouts(rank: int, world_size: int, expected: dict[str, Any]) -> list[dict[str, Any] | None]:
    return [
        _step(rank, world_size, (*VARIANTS[variant], *overrides), expected[variant]) if ranks == world_size else None
        for variant, ranks, overrides in LAYOUTS
    ]


@cache
def _expected() -> dict[str, dict[str, Any]]:
    return run_ranks(_reference, 1)[0]


@cache
def _found(world_size: int) -> list[list[dict[str, Any] | None]]:
    return run_ranks(_layouts, world_size, _expected(), timeout_s=300.0)


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=[f"{n}-{r}-{','.join(o)}" for n, r, o in LAYOUTS])
def test_losses_gradients_and_norm_are_those_of_the_equations(index: int) -> None:
    variant, world_size, _ = LAYOUTS[index]
    limit = ONE_RANK if world_size == 1 else LAYOUT
    seen = set()
    for of_rank in _found(world_size):
        assert of_rank[index] is not None
        different = of_rank[index]["different"]
        seen |= set(different)
        assert {name: value for name, value in different.items() if not value <= limit} == {}
    assert set(_expected()[variant]["gradient"]) <= seen
    assert "mtp.layers.0.projection.weight" in seen
    assert ("mtp.layers.0.mtp_model_layer.mlp.router.expert_bias" in seen) == (variant != "dense")


def test_both_embeddings_of_a_pipeline_stay_equal() -> None:
    """After an optimizer step, bit for bit."""
    for index, (_, world_size, overrides) in enumerate(LAYOUTS):
        if PIPELINE in overrides and TENSOR not in overrides:
            copies = [e for rank in _found(world_size) for e in (rank[index] or {})["embeddings"]]
            assert len(copies) == world_size
            for copy in copies[1:]:
                np.testing.assert_array_equal(copy, copies[0])


def test_metrics_tell_the_loss_and_the_load_of_the_prediction_layer() -> None:
    metrics = (_found(1)[0][0] or {})["metrics"]
    assert metrics["train/mtp_loss"] == pytest.approx(_expected()["experts"]["mtp_loss"])
    assert 0 <= metrics["moe/min_load/mtp"] <= 1 <= metrics["moe/max_load/mtp"]


def _alone_and_packed(rank: int, world_size: int) -> tuple[list[float], list[float]]:
    """Sums of the prediction's losses of two documents: each in a sequence of its own, and both in one."""
    from engram_megatron.layouts.weights import roughen
    from engram_megatron.model.builder import build_model_chunks
    from engram_megatron.training.forward_step import forward_step, make_microbatch

    config = small_run_config("float64", [*MTP, "engram=none"])
    small_groups(config, rank, world_size)
    [model] = build_model_chunks(config)
    roughen([model])

    def losses(batch: Batch) -> list[float]:
        inputs = make_microbatch(
            batch, None, separate_documents=True, cut_memory_at_documents=True, multi_token_prediction=True
        )
        logits, loss = forward_step(iter([inputs]), model, mtp_loss_weight=WEIGHT)
        total, _, report = loss(logits)
        return [total.item(), report["loss_sum"].item(), report["mtp_loss_sum"].item(), float(report["mtp_tokens"])]

    packed = take(global_batch(0), slice(1, 2))  # one document start
    [start] = np.flatnonzero(np.diff(packed.document_ids[0])) + 1
    parts = []
    for piece in (slice(0, start), slice(start, LENGTH)):
        part = Batch(*(getattr(packed, f)[:, piece] for f in ("tokens", "labels", "loss_mask", "document_ids")))
        parts.append(losses(part))
    return losses(packed), [sum(values) for values in zip(*parts, strict=True)]


def test_two_packed_documents_give_the_losses_of_the_two_alone() -> None:
    packed, alone = run_ranks(_alone_and_packed, 1)[0]
    assert packed[3] == alone[3] > 2
    # RoPE's angles are float32 and do not start anew: 24 radians are rounded by 24 * 2^-24 = 1.4e-6.
    assert packed == pytest.approx(alone, rel=1e-7)


def test_after_next_stops_at_document_starts_and_at_the_end_of_the_window() -> None:
    batch = Batch(
        tokens=np.array([[5, 6, 7, 8, 9]]),
        labels=np.array([[6, 7, 8, 9, 4]]),
        loss_mask=np.array([[True, True, False, True, True]]),  # 8 starts a document
        document_ids=np.array([[0, 0, 0, 1, 1]], np.int32),
    )
    labels, mask = after_next(batch)
    assert labels.tolist() == [[7, 8, 9, 4, 0]]
    assert mask.tolist() == [[True, False, False, True, False]]


def _saved_and_loaded(rank: int, world_size: int, folder: str) -> tuple[list[Any], list[Any]]:
    """Every tensor of this rank before a save, and after other numbers were put in and the save loaded."""
    import torch

    from engram_checkpoints.backbone import load_backbone, save_backbone

    run = build_small_run(small_run_config("float64", [*MTP, PIPELINE]), rank, world_size)
    mine = microbatches(global_batch(0), run.ranks.data_rank, run.ranks.data_ranks)
    run.trainer.train_step(0, mine, stop_requested=False)

    def tensors() -> list[Any]:
        state = run.optimizer.state_dict()["state"].values()
        return [numbers(t) for c in run.chunks for t in c.parameters()] + [
            numbers(t) for s in state for t in s.values()
        ]

    save_backbone(Path(folder), run.chunks, run.optimizer, FileSums(Path(folder)))
    before = tensors()
    with torch.no_grad():
        for chunk in run.chunks:
            for parameter in chunk.parameters():
                parameter.fill_(7.0)
        for state in run.optimizer.state_dict()["state"].values():
            for tensor in state.values():
                tensor.fill_(7.0)
    load_backbone(Path(folder), run.chunks, run.optimizer)
    return before, tensors()


def test_checkpoint_holds_the_embedding_once_and_fills_both_copies(tmp_path: Path) -> None:
    for before, after in run_ranks(_saved_and_loaded, 2, str(tmp_path)):
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(one, other)


def _losses_with_and_without(rank: int, world_size: int) -> tuple[float, float]:
    """Evaluation of the same model; only one knows multi-token prediction."""
    losses = []
    for count in (1, 0):
        config = small_run_config("float64", [*MTP, f"model.mtp.num_layers={count}"])
        run = build_small_run(replace(config, name=f"mtp {count}"), rank, world_size)
        mine = microbatches(global_batch(0), 0, 1)
        microbatches_of_chunks = run.trainer._prepare(mine, run.trainer._rows(mine), is_training=False)
        losses.append(run.trainer.runner.evaluate(microbatches_of_chunks, 2).loss)
    return losses[0], losses[1]


def test_validation_loss_is_the_next_tokens_alone() -> None:
    with_prediction, without = run_ranks(_losses_with_and_without, 1)[0]
    assert with_prediction == without
