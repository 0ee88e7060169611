"""The optimizer of everything but the tables: Muon and AdamW over the chunks that Megatron's DDP wraps.

A step of the trainer, in this order (the tables' optimizer joins in the middle):

    optimizer.zero_grad()                      gradient buffers to zero
    forward and backward of all microbatches; finalize_model_grads(chunks, num_tokens)
    optimizer.prepare_gradients()              the reduced float32 (or float64) sums become the gradients
    total = optimizer.gradient_norm_squared() + the tables'
    optimizer.step(lr, clip coefficient)       identical on every rank that holds the same parameter

Parameters in bfloat16 are updated through float32 masters, from DDP's float32 gradient buffers.

Built on torch optimizers, not on megatron-core's FP32Optimizer / Float16OptimizerWithFloat16Params: those clip by
themselves, number their state by position in the parameter groups (which differs between layouts, and in a chain of
optimizers), and lose AdamW's `step` on loading. Here the state belongs to parameter names and there is one step count.
Every data-parallel replica holds the whole state and repeats the same update; with `parallel.distributed_optimizer`
each holds its share, updates that, and gives the new weights to the others (`ownership`, `replica_shards`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from engram_megatron import platform
from engram_megatron.config import RunConfig
from engram_megatron.config_optimizer import OptimizerConfig
from engram_megatron.optimizer.backbone_tensors import UpdatedPart, backbone_tensors
from engram_megatron.optimizer.muon import Muon, muon_group
from engram_megatron.optimizer.parameter_groups import ParameterRules, parameter_rules
from engram_megatron.optimizer.replica_shards import ReplicaShards

_MASTER = "master"  # the float32 copy of a bfloat16 parameter, among the optimizer's state


class BackboneOptimizer:
    """See `build_backbone_optimizer`."""

    def __init__(
        self,
        model_chunks: Sequence[torch.nn.Module],
        rules: ParameterRules,
        config: OptimizerConfig,
        newton_schulz_dtype: torch.dtype | None,
        *,
        distributed: bool,
    ):
        self.model_chunks = list(model_chunks)
        self.num_steps = 0  # updates done; AdamW's bias correction counts them
        self._tensors = list(backbone_tensors(model_chunks, rules))
        self._shards = ReplicaShards(model_chunks, self._tensors) if distributed else None
        self._parts = (
            [UpdatedPart(tensor, 0, len(tensor.parameter), is_only_owner=False) for tensor in self._tensors]
            if self._shards is None
            else self._shards.parts
        )
        matrices = [part for part in self._parts if part.tensor.rule.optimizer == "muon"]
        rest = [part for part in self._parts if part.tensor.rule.optimizer == "adam"]
        self._optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            self._optimizers.append(Muon(_muon_groups(matrices, config), config, newton_schulz_dtype))
        if rest:
            self._optimizers.append(_adam(rest, config))
        self._initialize_state()

    def zero_grad(self) -> None:
        """Zero DDP's gradient buffers and drop the gradients; before the first microbatch of a step."""
        for chunk in self.model_chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        for tensor in self._tensors:
            tensor.parameter.grad = None
        for part in self._parts:
            part.main.grad = None

    @torch.no_grad()
    def prepare_gradients(self) -> None:
        """Take DDP's reduced and scaled gradient buffers as the gradients: without a copy where every replica has the
        sum, else collected from the replicas, a collective."""
        for part in self._parts:
            dtype = part.tensor.parameter.main_grad.dtype  # type: ignore[attr-defined]
            assert dtype == part.main.dtype, (
                f"{part.name}: the gradient buffer is {dtype}, the optimizer works in {part.main.dtype}; "
                "DDP needs grad_reduce_in_fp32 for bfloat16"
            )
        if self._shards is not None:
            self._shards.collect_gradients()
            return
        for part in self._parts:
            part.main.grad = part.tensor.parameter.main_grad  # type: ignore[attr-defined]

    @torch.no_grad()
    def whole_gradients(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """The prepared gradient of each parameter of this rank, in its shape, for those who compare layouts: training
        needs it nowhere. A copy, collected from the owners, a collective, where the optimizer is distributed."""
        if self._shards is None:
            return {part.tensor.parameter: part.main.grad for part in self._parts}  # type: ignore[misc]
        whole = {tensor.parameter: torch.zeros_like(tensor.parameter.main_grad) for tensor in self._tensors}  # type: ignore[attr-defined]
        for part in self._parts:
            assert part.main.grad is not None, "whole_gradients() before prepare_gradients()"
            whole[part.tensor.parameter][part.first_row : part.end_row] = part.main.grad
        for tensor in self._tensors:
            dist.all_reduce(whole[tensor.parameter], group=tensor.replica_group)
        return whole

    @torch.no_grad()
    def gradient_norm_squared(self) -> float:
        """Sum of squares of all gradients of the whole model, each parameter counted once. float64; a collective.

        Parameters replicated over tensor-parallel ranks count on the first, copies for another pipeline stage (Megatron
        marks them `shared`) not at all; sums then run over the tensor- and pipeline-parallel ranks, and for experts
        over the expert-parallel ranks too; over all ranks where each gradient has one owner.
        """
        dense = self._local_square(is_expert=False)
        experts = self._local_square(is_expert=True)
        if self._shards is not None:
            total = dense + experts
            dist.all_reduce(total)
            return float(total)
        dist.all_reduce(dense, group=parallel_state.get_model_parallel_group())
        dist.all_reduce(experts, group=parallel_state.get_expert_tensor_model_pipeline_parallel_group())
        return float(dense + experts)

    @torch.no_grad()
    def step(self, lr: float, gradient_scale: float = 1.0) -> None:
        """Update the parameters with learning rate `lr` from `gradient_scale` times the prepared gradients."""
        gradients = [part.main.grad for part in self._parts]
        assert all(gradient is not None for gradient in gradients), "step() before prepare_gradients()"
        if gradient_scale != 1.0 and gradients:  # with more replicas than tensors, some own nothing
            torch._foreach_mul_(gradients, gradient_scale)  # type: ignore[arg-type]
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        self.num_steps += 1
        for part in self._parts:
            part.main.grad = None
        self._take_masters()

    def state_dict(self) -> dict[str, Any]:
        """{"num_steps": int, "state": {name: {state name: tensor}}} of this rank; tensors are not copied. A name is the
        parameter's, with "[first row:end row]" behind it where other replicas hold the state of the other rows."""
        return {"num_steps": self.num_steps, "state": {part.name: self._stored(part) for part in self._parts}}

    def sharded_state_dict(self, model_sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
        """`state_dict` whose tensors have the place of their parameter, or of its rows, in the whole model: key
        `optimizer.<state name>.<parameter key>`, the same whoever holds the state.

        `model_sharded_state_dict` is the sharded state dict of the chunks, not yet passed through `apply_factories`.
        """
        sharded_by_id = {
            id(value.data): value
            for value in nested_values(model_sharded_state_dict)
            if isinstance(value, ShardedTensor | ShardedTensorFactory)
        }
        state = {}
        for part in self._parts:
            shard = sharded_by_id.get(id(part.tensor.parameter))
            assert shard is not None, f"{part.name} is not in the model's sharded state dict"
            state[part.name] = {key: part.sharded(shard, key, tensor) for key, tensor in self._stored(part).items()}
        return {"num_steps": self.num_steps, "state": state}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict`, or the loaded `sharded_state_dict`, holds. Parameters in bfloat16 follow their
        masters. Collective over the replicas of a distributed optimizer."""
        self.num_steps = int(state_dict["num_steps"])
        for part in self._parts:
            loaded = state_dict["state"][part.name]
            for key, tensor in self._stored(part).items():
                tensor.copy_(loaded[key])
        self._set_adam_steps()
        self._take_masters()

    @torch.no_grad()
    def reload_masters(self) -> None:
        """Take the masters anew from the parameters, after weights alone were loaded."""
        for part in self._parts:
            if part.has_master:
                part.main.copy_(part.weight)

    def _take_masters(self) -> None:
        """Round masters to the weights, and give every replica the weights of the others."""
        for part in self._parts:
            if part.has_master:
                part.weight.copy_(part.main)
        if self._shards is not None:
            self._shards.share_weights()

    def _local_square(self, *, is_expert: bool) -> torch.Tensor:
        expert_group = parallel_state.get_expert_tensor_parallel_group()
        gradients = []
        for part in self._parts:
            assert part.main.grad is not None, "gradient_norm_squared() before prepare_gradients()"
            parameter = part.tensor.parameter
            first = param_is_not_tensor_parallel_duplicate(parameter, expert_tp_group=expert_group)
            if part.tensor.is_expert == is_expert and first and param_is_not_shared(parameter):
                gradients.append(part.main.grad)
        if not gradients:
            return torch.zeros((), dtype=torch.float64, device=platform.device())
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float64)
        return torch.stack(norms).square().sum()

    def _stored(self, part: UpdatedPart) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of one part beside the weight."""
        state = next(o.state[part.main] for o in self._optimizers if part.main in o.state)
        tensors = {key: tensor for key, tensor in state.items() if key != "step"}
        return {_MASTER: part.main, **tensors} if part.has_master else tensors

    def _initialize_state(self) -> None:
        """Zeros, as the first step would make them, so that a fresh optimizer can be saved and loaded."""
        for optimizer in self._optimizers:
            keys = ("momentum_buffer",) if isinstance(optimizer, Muon) else ("exp_avg", "exp_avg_sq")
            for group in optimizer.param_groups:
                for tensor in group["params"]:
                    optimizer.state[tensor] = {key: torch.zeros_like(tensor) for key in keys}
        self._set_adam_steps()

    def _set_adam_steps(self) -> None:
        """A step counter for each parameter: AdamW adds 1 in place, so a shared one would run too fast."""
        for optimizer in self._optimizers:
            if isinstance(optimizer, torch.optim.AdamW):
                for tensor, state in optimizer.state.items():
                    where = tensor.device if optimizer.defaults["fused"] else torch.device("cpu")
                    state["step"] = torch.full((), float(self.num_steps), dtype=torch.float32, device=where)


def build_backbone_optimizer(model_chunks: Sequence[torch.nn.Module], config: RunConfig) -> BackboneOptimizer:
    """The optimizer of the chunks of this rank, each a `megatron.core.distributed.DistributedDataParallel` with
    `use_distributed_optimizer` as `parallel.distributed_optimizer` says.

    Newton-Schulz runs in bfloat16 where the run is in bfloat16 on a GPU (as Moonlight does), else in the dtype of the
    masters. Raises ValueError for a parameter that `parameter_groups` does not know.
    """
    on_gpu = platform.device().type == "cuda"
    low_precision = torch.bfloat16 if on_gpu and config.training.dtype == "bfloat16" else None
    rules = parameter_rules(config.model, config.engram)
    distributed = config.parallel.distributed_optimizer
    assert all(chunk.ddp_config.use_distributed_optimizer == distributed for chunk in model_chunks)  # type: ignore
    return BackboneOptimizer(model_chunks, rules, config.optimizer, low_precision, distributed=distributed)


def _muon_groups(parts: Sequence[UpdatedPart], config: OptimizerConfig) -> list[dict[str, Any]]:
    """One group per way of splitting and sharding."""

    def same(part: UpdatedPart) -> tuple[Any, ...]:
        tensor = part.tensor
        return tensor.rule, tensor.partition_dim, tensor.tensor_group if tensor.partition_dim is not None else None

    return [
        muon_group(
            [part.main for part in members],
            weight_decay=config.weight_decay if rule.weight_decay else 0.0,
            split=rule.split,
            partition_dim=partition_dim,
            tensor_parallel_group=group,
        )
        for (rule, partition_dim, group), members in _grouped(parts, same).items()
    ]


def _adam(parts: Sequence[UpdatedPart], config: OptimizerConfig) -> torch.optim.AdamW:
    groups = [
        {"params": [part.main for part in members], "weight_decay": config.weight_decay if decay else 0.0}
        for decay, members in _grouped(parts, lambda part: part.tensor.rule.weight_decay).items()
    ]
    on_gpu = parts[0].main.device.type == "cuda"
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.adam_eps, fused=on_gpu)


def _grouped(parts: Sequence[UpdatedPart], key: Callable[[UpdatedPart], Any]) -> dict[Any, list[UpdatedPart]]:
    groups: dict[Any, list[UpdatedPart]] = {}
    for part in parts:
        groups.setdefault(key(part), []).append(part)
    return groups
