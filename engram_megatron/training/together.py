"""A step that all ranks take or none: nobody waits for a rank that gave up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

Result = TypeVar("Result")


@dataclass(frozen=True)
class Together:
    """Takes steps on all ranks of `group`, which is gloo. What fails on one rank has failed on all: they raise
    `error`, with the `reason` of the lowest rank that has one.

    An error that is not `expected` is raised as it is on the rank that met it, to be told with its traceback.
    """

    group: dist.ProcessGroup
    expected: tuple[type[BaseException], ...]
    error: type[Exception]
    reason: Callable[[BaseException], str]

    def __call__(self, action: Callable[[], Result]) -> list[Result]:
        """What `action` gives on each rank, once it is done on all. Collective."""
        result, failure = None, None
        try:
            result = action()
        except (Exception, CheckpointException) as error:  # torch wraps its writers' errors, in no Exception
            failure = error
        outcomes: list[Any] = [None] * dist.get_world_size(self.group)
        told = None if failure is None else self.reason(failure)
        dist.all_gather_object(outcomes, (told, result), group=self.group)
        if failure is not None and not isinstance(failure, self.expected):
            raise failure
        for problem, _ in outcomes:
            if problem is not None:
                raise self.error(problem) from failure
        return [of_rank for _, of_rank in outcomes]


def last_line(error: BaseException) -> str:
    """Of what `error` says, or its class: where torch puts what went wrong."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
