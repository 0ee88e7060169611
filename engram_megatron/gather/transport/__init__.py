"""Exchange of host tensors between the ranks of a group. Nothing here knows what a row is.

protocol   what a transport is, and the loopback of a rank with itself
gloo       over TCP
mpi        over MPI, on the same host buffers
device     through GPUs and NCCL
checked    around each of them: proof that what arrived is what was sent
groups     makes the transport of this rank's group
exercise   every pair of ranks once, before a run begins
"""

from engram_megatron.gather.transport.checked import CheckedTransport, DamageError
from engram_megatron.gather.transport.device import DeviceTransport
from engram_megatron.gather.transport.exercise import exercise_pairs
from engram_megatron.gather.transport.gloo import GlooTransport
from engram_megatron.gather.transport.groups import TransportKind, all_ranks_transport, group_transport
from engram_megatron.gather.transport.mpi import MpiTransport
from engram_megatron.gather.transport.protocol import (
    LoopbackTransport,
    Member,
    Transport,
    TransportError,
    UncheckedTransport,
)

__all__ = [
    "CheckedTransport",
    "DamageError",
    "DeviceTransport",
    "GlooTransport",
    "LoopbackTransport",
    "Member",
    "MpiTransport",
    "Transport",
    "TransportError",
    "TransportKind",
    "UncheckedTransport",
    "all_ranks_transport",
    "exercise_pairs",
    "group_transport",
]
