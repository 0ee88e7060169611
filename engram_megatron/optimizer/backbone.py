"""The optimizer of everything but the tables: Muon and AdamW over the chunks that Megatron's DDP wraps.

A step of the trainer, in this order (the tables' optimizer joins in the middle):

    optimizer.zero_grad()                      gradient buffers to zero
    forward and backward of all microbatches; finalize_model_grads(chunks, num_tokens)
    optimizer.prepare_gradients()              the reduced float32 (or float64) buffers become the gradients
    total = optimizer.gradient_norm_squared() + the tables'
    optimizer.step(lr, clip coefficient)       identical on every rank that holds the same parameter

Parameters in bfloat16 are updated through float32 masters, from DDP's float32 gradient buffers.

Built on torch optimizers, not on megatron-core's FP32Optimizer / Float16OptimizerWithFloat16Params: those clip by
themselves, number their state by position in the parameter groups (which differs between layouts, and in a chain of
optimizers), and lose AdamW's `step` on loading. Here the state belongs to parameter names and there is one step count.
Every data-parallel replica holds the whole state and repeats the same update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from engram_megatron import platform
from engram_megatron.config import OptimizerConfig, RunConfig
from engram_megatron.optimizer.muon import Muon, muon_group
from engram_megatron.optimizer.parameter_groups import ParameterRules, TensorRule, parameter_rules

_MASTER = "master"  # the float32 copy of a bfloat16 parameter, among the optimizer's state


@dataclass(frozen=True, eq=False)
class _Entry:
    """One parameter: `main` is what the optimizer moves, the parameter itself unless that is in bfloat16."""

    name: str  # unique on this rank
    parameter: torch.nn.Parameter
    main: torch.Tensor
    rule: TensorRule
    partition_dim: int | None  # dimension sharded over the ranks of `group`
    group: dist.ProcessGroup  # tensor-parallel group, the experts' own for experts

    @property
    def is_expert(self) -> bool:
        """Whether gradients are reduced over the experts' data-parallel group (Megatron's mark)."""
        return not getattr(self.parameter, "allreduce", True)


class BackboneOptimizer:
    """See `build_backbone_optimizer`."""

    def __init__(
        self,
        model_chunks: Sequence[torch.nn.Module],
        rules: ParameterRules,
        config: OptimizerConfig,
        newton_schulz_dtype: torch.dtype | None,
    ):
        self.model_chunks = list(model_chunks)
        self.num_steps = 0  # updates done; AdamW's bias correction counts them
        self._entries = list(_entries(model_chunks, rules))
        matrices = [e for e in self._entries if e.rule.optimizer == "muon"]
        rest = [e for e in self._entries if e.rule.optimizer == "adam"]
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
        for entry in self._entries:
            entry.parameter.grad = entry.main.grad = None

    def prepare_gradients(self) -> None:
        """Take DDP's reduced and scaled gradient buffers as the gradients, without a copy."""
        for entry in self._entries:
            gradient = entry.parameter.main_grad  # type: ignore[attr-defined]
            assert gradient.dtype == entry.main.dtype, (
                f"{entry.name}: the gradient buffer is {gradient.dtype}, the optimizer works in {entry.main.dtype}; "
                "DDP needs grad_reduce_in_fp32 for bfloat16"
            )
            entry.main.grad = gradient

    @torch.no_grad()
    def gradient_norm_squared(self) -> float:
        """Sum of squares of all gradients of the whole model, each parameter counted once. float64; a collective.

        Parameters replicated over tensor-parallel ranks count on the first, copies for another pipeline stage (Megatron
        marks them `shared`) not at all; sums then run over the tensor- and pipeline-parallel ranks, and for experts
        over the expert-parallel ranks too.
        """
        dense = self._local_square(is_expert=False)
        experts = self._local_square(is_expert=True)
        dist.all_reduce(dense, group=parallel_state.get_model_parallel_group())
        dist.all_reduce(experts, group=parallel_state.get_expert_tensor_model_pipeline_parallel_group())
        return float(dense + experts)

    @torch.no_grad()
    def step(self, lr: float, gradient_scale: float = 1.0) -> None:
        """Update the parameters with learning rate `lr` from `gradient_scale` times the prepared gradients."""
        gradients = [entry.main.grad for entry in self._entries]
        assert all(gradient is not None for gradient in gradients), "step() before prepare_gradients()"
        if gradient_scale != 1.0:
            torch._foreach_mul_(gradients, gradient_scale)  # type: ignore[arg-type]
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        self.num_steps += 1
        for entry in self._entries:
            # A gradient left on a parameter would be added to the buffer it aliases by the next backward pass.
            entry.main.grad = None
            if entry.main is not entry.parameter:
                entry.parameter.copy_(entry.main)

    def state_dict(self) -> dict[str, Any]:
        """{"num_steps": int, "state": {parameter name: {state name: tensor}}} of this rank; tensors are not copied."""
        return {"num_steps": self.num_steps, "state": {entry.name: self._tensors(entry) for entry in self._entries}}

    def sharded_state_dict(self, model_sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
        """`state_dict` whose tensors are sharded as the parameters are: key `optimizer.<state name>.<parameter key>`.

        `model_sharded_state_dict` is the sharded state dict of the chunks, not yet passed through `apply_factories`.
        """
        sharded_by_id = {
            id(value.data): value
            for value in nested_values(model_sharded_state_dict)
            if isinstance(value, ShardedTensor | ShardedTensorFactory)
        }
        state = {}
        for entry in self._entries:
            sharded = sharded_by_id.get(id(entry.parameter))
            assert sharded is not None, f"{entry.name} is not in the model's sharded state dict"
            state[entry.name] = {
                key: make_sharded_optimizer_tensor(sharded, tensor, prefix=f"optimizer.{key}")
                for key, tensor in self._tensors(entry).items()
            }
        return {"num_steps": self.num_steps, "state": state}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict`, or the loaded `sharded_state_dict`, holds. Parameters in bfloat16 follow their
        masters."""
        self.num_steps = int(state_dict["num_steps"])
        for entry in self._entries:
            loaded = state_dict["state"][entry.name]
            for key, tensor in self._tensors(entry).items():
                tensor.copy_(loaded[key])
            if entry.main is not entry.parameter:
                entry.parameter.copy_(entry.main)
        self._set_adam_steps()

    @torch.no_grad()
    def reload_masters(self) -> None:
        """Take the masters anew from the parameters, after weights alone were loaded."""
        for entry in self._entries:
            if entry.main is not entry.parameter:
                entry.main.copy_(entry.parameter)

    def _local_square(self, *, is_expert: bool) -> torch.Tensor:
        expert_group = parallel_state.get_expert_tensor_parallel_group()
        gradients = []
        for entry in self._entries:
            assert entry.main.grad is not None, "gradient_norm_squared() before prepare_gradients()"
            first = param_is_not_tensor_parallel_duplicate(entry.parameter, expert_tp_group=expert_group)
            if entry.is_expert == is_expert and first and param_is_not_shared(entry.parameter):
                gradients.append(entry.main.grad)
        if not gradients:
            return torch.zeros((), dtype=torch.float64, device=platform.device())
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float64)
        return torch.stack(norms).square().sum()

    def _tensors(self, entry: _Entry) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of one parameter beside the parameter."""
        state = self._state(entry)
        tensors = {key: tensor for key, tensor in state.items() if key != "step"}
        return tensors if entry.main is entry.parameter else {_MASTER: entry.main, **tensors}

    def _state(self, entry: _Entry) -> dict[str, torch.Tensor]:
        return next(o.state[entry.main] for o in self._optimizers if entry.main in o.state)

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
    """The optimizer of the chunks of this rank, each a `megatron.core.distributed.DistributedDataParallel` without
    the distributed optimizer.

    Newton-Schulz runs in bfloat16 where the run is in bfloat16 on a GPU (as Moonlight does), else in the dtype of the
    masters. Raises ValueError for a parameter that `parameter_groups` does not know.
    """
    on_gpu = platform.device().type == "cuda"
    low_precision = torch.bfloat16 if on_gpu and config.training.dtype == "bfloat16" else None
    rules = parameter_rules(config.model, config.engram)
    return BackboneOptimizer(model_chunks, rules, config.optimizer, low_precision)


def _entries(model_chunks: Sequence[torch.nn.Module], rules: ParameterRules) -> Iterator[_Entry]:
    for number, chunk in enumerate(model_chunks):
        for name, parameter in chunk.named_parameters():
            if not parameter.requires_grad:
                continue
            group, partition_dim = _sharding(parameter)
            shape = list(parameter.shape)
            if partition_dim is not None:
                shape[partition_dim] *= group.size()
            low = parameter.dtype == torch.bfloat16
            yield _Entry(
                name=f"chunk{number}.{name}",
                parameter=parameter,
                main=parameter.detach().clone().float() if low else parameter,
                rule=rules.rule(name, shape),
                partition_dim=partition_dim,
                group=group,
            )


def _sharding(parameter: torch.nn.Parameter) -> tuple[dist.ProcessGroup, int | None]:
    is_expert = not getattr(parameter, "allreduce", True)
    group = (
        parallel_state.get_expert_tensor_parallel_group()
        if is_expert
        else parallel_state.get_tensor_model_parallel_group()
    )
    sharded = getattr(parameter, "tensor_model_parallel", False) and group.size() > 1
    return group, parameter.partition_dim if sharded else None  # type: ignore[attr-defined]


def _muon_groups(entries: Sequence[_Entry], config: OptimizerConfig) -> list[dict[str, Any]]:
    """One group per way of splitting and sharding."""

    def same(entry: _Entry) -> tuple[Any, ...]:
        group = entry.group if entry.partition_dim is not None else None
        return entry.rule, entry.partition_dim, group

    return [
        muon_group(
            [entry.main for entry in members],
            weight_decay=config.weight_decay if rule.weight_decay else 0.0,
            split=rule.split,
            partition_dim=partition_dim,
            tensor_parallel_group=group,
        )
        for (rule, partition_dim, group), members in _grouped(entries, same).items()
    ]


def _adam(entries: Sequence[_Entry], config: OptimizerConfig) -> torch.optim.AdamW:
    groups = [
        {"params": [entry.main for entry in members], "weight_decay": config.weight_decay if decay else 0.0}
        for decay, members in _grouped(entries, lambda entry: entry.rule.weight_decay).items()
    ]
    on_gpu = entries[0].main.device.type == "cuda"
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.adam_eps, fused=on_gpu)


def _grouped(entries: Sequence[_Entry], key: Callable[[_Entry], Any]) -> dict[Any, list[_Entry]]:
    groups: dict[Any, list[_Entry]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return groups
