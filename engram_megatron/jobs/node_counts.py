"""With how many nodes a run can go on, of the numbers that Slurm may give to its jobs (`--min-nodes` to `--nodes`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engram_megatron.config import RunConfig
from engram_megatron.errors import UsageError
from engram_megatron.jobs.options import JobOptions
from engram_megatron.model.layout_rules import check_layout


@dataclass(frozen=True)
class NodeCounts:
    """`usable`: numbers of nodes, rising; the first is `--min-nodes`, the last `--nodes`. `refused`: numbers between
    them, and why no run fits them."""

    usable: Sequence[int]
    refused: Mapping[int, str]

    def of_given(self, nodes: int) -> int:
        """How many of `nodes` nodes, as Slurm has given them, take part; the others stay idle."""
        return max(count for count in self.usable if count <= nodes)

    def lines(self) -> list[str]:
        """A line for each number of nodes that a job may get and not use whole."""
        return [f"on {count} nodes {self.of_given(count)} train: {why}" for count, why in self.refused.items()]


def node_counts(config: RunConfig, options: JobOptions) -> NodeCounts:
    """Try the layout of `config`, validated, on every number of nodes that a job may get.

    Raises `UsageError` where `--min-nodes` or `--nodes` itself cannot be.
    """
    refused = {}
    for count in range(options.least_nodes, options.nodes + 1):
        try:
            check_layout(config, count * options.ranks_on_node)
        except UsageError as error:
            refused[count] = str(error)
    usable = [count for count in range(options.least_nodes, options.nodes + 1) if count not in refused]
    if options.nodes in refused:
        raise UsageError(refused[options.nodes])
    if options.least_nodes in refused:
        raise UsageError(
            f"--min-nodes {options.min_nodes}: a job that gets no more could not train: {refused[options.min_nodes]}; "
            f"from there up to --nodes {options.nodes} the layout fits {', '.join(map(str, usable))}"
        )
    return NodeCounts(usable, refused)
