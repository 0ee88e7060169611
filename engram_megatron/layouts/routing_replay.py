"""Experts as one rank chose them: recorded there, replayed in every other run.

Two runs that differ in the last bit sooner or later choose another expert for some token whose scores nearly tie; from
there on they are two different models, and nothing can be concluded from a comparison. With the reference's choices
replayed they stay comparable. float64 runs are compared without.

Shape letters: S sequences of the global batch, T positions, B sequences and N tokens of a microbatch on this rank,
E experts, K chosen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from engram_megatron.config import RunConfig
from engram_megatron.layouts.records import StepChoices
from engram_megatron.model.parameter_names import global_named_parameters
from engram_megatron.model.router import SigmoidRouter
from engram_megatron.training.parallel import Ranks


class ChoiceRecorder:
    """Listens to the routers of one rank that holds the whole model and runs one sequence per microbatch."""

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        self._heard: dict[str, list[Tensor]] = defaultdict(list)
        for name, router in _routers(chunks).items():
            _listen(router, self._heard[name].append)

    def take_step(self) -> StepChoices:
        """What was chosen since the last call."""
        step = {name: torch.stack(heard).numpy() for name, heard in self._heard.items()}
        for heard in self._heard.values():
            heard.clear()
        return step


class ChoiceReplay:
    """Has the routers of a rank, in any layout, choose what the reference chose."""

    def __init__(self, chunks: Sequence[nn.Module], config: RunConfig, ranks: Ranks) -> None:
        data_rank, self._size = ranks.data_rank, config.training.micro_batch_size
        self._first = data_rank * config.training.global_batch_size // ranks.data_ranks
        self._positions = ranks.memory_positions(config.data.sequence_length)
        self._step: StepChoices = {}
        self._calls: dict[tuple[str, bool], int] = defaultdict(int)
        for name, router in _routers(chunks).items():
            _replace(router, lambda _, router_name=name: self._next(router_name))  # type: ignore[misc]

    def start_step(self, choices: StepChoices) -> None:
        """Replay `choices` in the step that follows."""
        self._step = choices
        self._calls.clear()

    def _next(self, name: str) -> Tensor:
        """[N, K] of the router's next microbatch. Schedules run the forward passes of a chunk in the order of
        microbatches, and the recomputations within its backward passes too."""
        in_backward = torch._C._current_graph_task_id() != -1
        index = self._calls[name, in_backward]
        self._calls[name, in_backward] += 1
        first = self._first + index * self._size
        choices_BTK = self._step[name][first : first + self._size, self._positions]
        return torch.from_numpy(choices_BTK).transpose(0, 1).flatten(0, 1)


def _routers(chunks: Sequence[nn.Module]) -> dict[str, SigmoidRouter]:
    names = {id(parameter): name for name, parameter in global_named_parameters(chunks)}
    modules = (module for chunk in chunks for module in chunk.modules())
    return {names[id(module.weight)]: module for module in modules if isinstance(module, SigmoidRouter)}


def _listen(router: SigmoidRouter, hear: Callable[[Tensor], None]) -> None:
    choose = router.choose

    def chosen(biased_NE: Tensor) -> Tensor:
        chosen_NK = choose(biased_NE)
        hear(chosen_NK)
        return chosen_NK

    _replace(router, chosen)


def _replace(router: SigmoidRouter, choose: Callable[[Tensor], Tensor]) -> None:
    router.choose = choose  # type: ignore[method-assign, assignment]
