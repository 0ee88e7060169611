"""Muon in Moonlight's form (arXiv 2502.16982; K. Jordan 2024 for the iteration), exact under tensor parallelism.

    buffer   = momentum * buffer + gradient
    update   = gradient + momentum * buffer            (Nesterov) or buffer
    X        = update / (|update|_F + 1e-7);  ns_steps times:  X = aX + (bA + cA^2)X  with A = X X^T
    W        = W (1 - lr * weight_decay) - lr * update_rms * sqrt(max(rows, columns)) * X

The step, the momentum and the weight decay are emerging-optimizers' `OrthogonalizedOptimizer`; so is the iteration.
It keeps the momentum as an average, (1 - momentum) times the buffer above: the direction is the same, and the 1e-7 is
scaled alike, so that the update is the one above. Its own Newton-Schulz driver is not used: it takes float32 only and
clamps the norm instead of adding to it.

Every rank of a tensor-parallel group gathers the whole matrix, orthogonalises it and keeps its slice ("duplicated" in
megatron-core's words): the same update as without tensor parallelism up to rounding, for one all-gather of the matrix.

Shapes: R rows, C columns, N matrices of a stack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from emerging_optimizers.orthogonalized_optimizers.muon_utils import batched_newton_schulz_step, newton_schulz_step
from emerging_optimizers.orthogonalized_optimizers.orthogonalized_optimizer import OrthogonalizedOptimizer

from engram_megatron.config_optimizer import OptimizerConfig
from engram_megatron.optimizer.parameter_groups import MatrixSplit

_NORM_EPS = 1e-7


def muon_group(
    parameters: Sequence[torch.Tensor],
    *,
    weight_decay: float,
    split: MatrixSplit | None = None,
    partition_dim: int | None = None,
    tensor_parallel_group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """A parameter group of `Muon`: matrices [R, C] or stacks [N, R, C] that are split and sharded alike.

    `partition_dim` is the dimension that is sharded over the ranks of `tensor_parallel_group`; None: not sharded.
    """
    assert (partition_dim is None) == (tensor_parallel_group is None)
    return {
        "params": list(parameters),
        "weight_decay": weight_decay,
        "split": split,
        "partition_dim": partition_dim,
        "tensor_parallel_group": tensor_parallel_group,
    }


class Muon(OrthogonalizedOptimizer):
    """The optimizer over groups made by `muon_group`; the caller sets each group's `lr` before a step.

    `compute_dtype` is the dtype of the Newton-Schulz matrix products (bfloat16 as in Moonlight, or the parameters'
    own dtype for exactness); momentum and update keep the parameters' dtype. Float32 products run in full float32
    (no TF32) and leave torch's global precision setting as it was.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], config: OptimizerConfig, compute_dtype: torch.dtype | None = None
    ):
        self.ns_steps = config.muon_ns_steps
        self.ns_coefficients = config.muon_ns_coefficients
        self.update_rms = config.muon_update_rms
        self.compute_dtype = compute_dtype
        super().__init__(
            list(groups),
            lr=0.0,
            momentum=config.muon_momentum,
            weight_decay=config.weight_decay,
            nesterov=config.muon_nesterov,
            weight_decay_method="decoupled",
            fp32_matmul_prec="highest",
            scaled_orthogonalize_fn=self._orthogonalize_part,
        )

    def orthogonalize(
        self,
        p: torch.Tensor,
        grad: torch.Tensor,
        *,
        momentum: float,
        split: MatrixSplit | None,
        partition_dim: int | None,
        tensor_parallel_group: dist.ProcessGroup | None,
        **_group: Any,
    ) -> torch.Tensor:
        """The scaled update of one parameter, of its (local) shape and dtype; called by the base class's `step`."""
        eps = _NORM_EPS * (1 - momentum)  # the base class's momentum is an average: see the module's docstring
        if tensor_parallel_group is None or tensor_parallel_group.size() == 1:
            return self._orthogonalize_parts(grad, split, 1, eps)
        assert partition_dim is not None
        ranks = tensor_parallel_group.size()
        shards = [torch.empty_like(grad, memory_format=torch.contiguous_format) for _ in range(ranks)]
        dist.all_gather(shards, grad.contiguous(), group=tensor_parallel_group)
        whole = self._orthogonalize_parts(torch.cat(shards, dim=partition_dim), split, ranks, eps)
        return whole.chunk(ranks, dim=partition_dim)[tensor_parallel_group.rank()]

    def _orthogonalize_parts(
        self, update: torch.Tensor, split: MatrixSplit | None, ranks: int, eps: float
    ) -> torch.Tensor:
        """[..., R, C] of all `ranks` one after another -> the same shape, each part orthogonalised on its own."""
        if split is None:
            return self._orthogonalize_part(update, eps)
        repeats, sizes = split.blocks(ranks)
        *stack, rows, columns = update.shape
        blocks = update.view(*stack, repeats, rows // repeats, columns)
        parts = [
            self._orthogonalize_part(part.reshape(*stack, -1, columns), eps).view(*stack, repeats, -1, columns)
            for part in blocks.split(sizes, dim=-2)
        ]
        return torch.cat(parts, dim=-2).view_as(update)

    def _orthogonalize_part(self, update: torch.Tensor, eps: float) -> torch.Tensor:
        """[R, C] or [N, R, C] -> update_rms * sqrt(max(R, C)) * orthogonalised, in the input's dtype."""
        x = orthogonalize(update, self.ns_steps, self.ns_coefficients, eps, self.compute_dtype)
        return x * (self.update_rms * math.sqrt(max(update.shape[-2:])))


def orthogonalize(
    update: torch.Tensor,
    num_steps: int,
    coefficients: tuple[float, float, float],
    eps: float,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`num_steps` Newton-Schulz steps towards U V^T, where update = U S V^T.

    update: [R, C] or [N, R, C], any float dtype; the result has its shape and dtype, singular values near 1.
    `eps` is added to each matrix's Frobenius norm, so a zero matrix stays zero.
    """
    assert update.ndim in (2, 3), f"matrices or a stack of matrices, not {tuple(update.shape)}"
    norm = torch.linalg.matrix_norm(update, keepdim=True)
    x = (update / (norm + eps)).to(compute_dtype or update.dtype)
    transpose = x.size(-2) > x.size(-1)
    if transpose:
        x = x.mT
    step = newton_schulz_step if x.ndim == 2 else batched_newton_schulz_step
    for _ in range(num_steps):
        x = step(x, *coefficients)
    x = x.mT if transpose else x
    result: torch.Tensor = x.to(update.dtype)
    return result
