"""The backbone's parameters as the optimizer sees them, and the parts of them that one rank updates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

from engram_megatron.optimizer.parameter_groups import ParameterRules, TensorRule


@dataclass(frozen=True, eq=False)
class BackboneTensor:
    """A parameter of this rank, with its rule."""

    name: str  # unique on this rank
    parameter: torch.nn.Parameter
    whole_shape: tuple[int, ...]  # of all tensor-parallel ranks together
    rule: TensorRule
    partition_dim: int | None  # dimension sharded over the ranks of `tensor_group`
    tensor_group: dist.ProcessGroup  # tensor-parallel group, the experts' own for experts

    @property
    def is_expert(self) -> bool:
        """Whether gradients are reduced over the experts' data-parallel group (Megatron's mark)."""
        return is_expert(self.parameter)

    @property
    def replica_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same part of the tensor."""
        if self.is_expert:
            return parallel_state.get_expert_data_parallel_group()
        return parallel_state.get_data_parallel_group(with_context_parallel=True)


def is_expert(parameter: torch.nn.Parameter) -> bool:
    """Megatron's mark of a routed expert's parameter."""
    return not getattr(parameter, "allreduce", True)


def backbone_tensors(model_chunks: Sequence[torch.nn.Module], rules: ParameterRules) -> Iterator[BackboneTensor]:
    """All trained parameters of the chunks, in the order of the model, which is the same on all replicas and tensor
    ranks. Raises ValueError for a parameter that `parameter_groups` does not know."""
    for number, chunk in enumerate(model_chunks):
        for name, parameter in chunk.named_parameters():
            if not parameter.requires_grad:
                continue
            group, partition_dim = _sharding(parameter)
            shape = list(parameter.shape)
            if partition_dim is not None:
                shape[partition_dim] *= group.size()
            yield BackboneTensor(
                name=f"chunk{number}.{name}",
                parameter=parameter,
                whole_shape=tuple(shape),
                rule=rules.rule(name, shape),
                partition_dim=partition_dim,
                tensor_group=group,
            )


def _sharding(parameter: torch.nn.Parameter) -> tuple[dist.ProcessGroup, int | None]:
    group = (
        parallel_state.get_expert_tensor_parallel_group()
        if is_expert(parameter)
        else parallel_state.get_tensor_model_parallel_group()
    )
    sharded = getattr(parameter, "tensor_model_parallel", False) and group.size() > 1
    return group, parameter.partition_dim if sharded else None  # type: ignore[attr-defined]


class UpdatedPart:
    """Rows of a tensor that this rank's optimizer moves: all of them, unless the optimizer is distributed.

    `weight` is a view of the parameter; `main` is what the optimizer moves: a float32 master of a bfloat16 weight, else
    the weight itself. `is_only_owner`: no other data replica has this state.
    """

    def __init__(self, tensor: BackboneTensor, first_row: int, end_row: int, *, is_only_owner: bool):
        self.tensor = tensor
        self.first_row, self.end_row = first_row, end_row
        self.is_only_owner = is_only_owner
        self.weight = tensor.parameter.detach()[first_row:end_row]
        self.has_master = self.weight.dtype == torch.bfloat16
        self.main = self.weight.float() if self.has_master else self.weight
        self.is_whole = end_row - first_row == len(tensor.parameter)
        self.name = tensor.name if self.is_whole else f"{tensor.name}[{first_row}:{end_row}]"

    def sharded(self, parameter_shard: Any, state_name: str, values: torch.Tensor) -> Any:
        """`values`, of the shape of `main`, as a checkpoint stores it: key `optimizer.<state name>.<parameter key>`.

        `parameter_shard` is the parameter's own ShardedTensor or factory. Its `replica_id` ends with the number of the
        data replica and replica 0 writes; the only owner of a state writes it whichever replica it is.
        """
        if self.is_only_owner:
            parameter_shard = replace(parameter_shard, replica_id=(*parameter_shard.replica_id[:-1], 0))
        prefix = f"optimizer.{state_name}"
        if self.is_whole and not self.tensor.rule.by_rows:
            return make_sharded_optimizer_tensor(parameter_shard, values, prefix)
        assert isinstance(parameter_shard, ShardedTensor)
        assert parameter_shard.prepend_axis_num == 0
        first, *rest = parameter_shard.global_offset
        return replace(
            parameter_shard,
            key=f"{prefix}.{parameter_shard.key}",
            data=values,
            dtype=values.dtype,
            local_shape=tuple(values.shape),
            global_offset=(first + self.first_row, *rest),
            axis_fragmentations=None,  # shares of rows need not be equal
        )
