"""The checked exchange between ranks against the bare all-to-all of the same bytes. Run by all ranks alike.

Every rank sends every rank an equal share of `MEGABYTES`, its own share too. All work in buffers that they keep, as a
step's exchanges do; the checked exchange takes checksums of what it sends to others and receives, and sends them too.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from engram_kernels.checksum import piece_checksums, piece_seeds
from engram_megatron.benchmarks.measure import Candidate, Comparison, interleaved
from engram_megatron.gather.transport import CheckedTransport, GlooTransport, MpiTransport, TransportKind
from engram_megatron.gather.transport.groups import all_ranks_transport
from engram_megatron.gather.transport.protocol import byte_view
from engram_megatron.layouts.forked_ranks import free_port

MEGABYTES = 16
ROW_DIM = 80  # Engram-27B: 160 bytes in bfloat16
TARGET = 0.9
TIMEOUT_S = 120.0


def checksum(repeats: int) -> list[Comparison]:
    """The checksum against one copy, on this rank's threads. Not collective."""
    data = np.random.default_rng(0).integers(0, 256, MEGABYTES * 10**6, dtype=np.uint8)
    copy = np.zeros_like(data)
    sizes, seeds = np.array([data.size // 2] * 2), piece_seeds(1, 0, np.arange(2))
    candidates: dict[str, Candidate] = {
        "ours": lambda: piece_checksums(data, sizes, seeds),
        "memcpy": lambda: np.copyto(copy, data),
    }
    seconds = interleaved(candidates, repeats)
    return [Comparison(f"checksum of {MEGABYTES} MB", seconds["ours"], "memcpy", seconds["memcpy"], 1.0)]


def exchange(kind: TransportKind, repeats: int) -> list[Comparison]:
    """Rows over `kind`, gloo or MPI; collective over the default process group of several ranks.

    Raises:
        UsageError: this kind cannot work here.
    """
    checked = all_ranks_transport(TIMEOUT_S, kind)
    assert isinstance(checked, CheckedTransport), "nothing is exchanged by a lone rank"
    share = MEGABYTES * 10**6 // (2 * ROW_DIM * checked.size)
    counts = np.full(checked.size, share, np.int64)
    rows = torch.ones(share * checked.size, ROW_DIM, dtype=torch.bfloat16)
    received = torch.zeros_like(rows)
    candidates: dict[str, Candidate] = {
        "checked": lambda: checked.exchange(rows, counts, counts, out=received),
        "fresh": lambda: checked.exchange(rows, counts, counts),
        "bare": _bare(checked.inner, rows, received),
    }
    seconds = interleaved(candidates, repeats)
    name = f"{MEGABYTES} MB, {checked.size} ranks, {kind}"
    return [
        Comparison(f"checked exchange, {name}", seconds["checked"], "bare all-to-all", seconds["bare"], TARGET),
        Comparison(f"checked exchange, {name}", seconds["checked"], "to a new tensor", seconds["fresh"]),
    ]


def _bare(transport: Any, rows: torch.Tensor, received: torch.Tensor) -> Candidate:
    """The library's all-to-all and nothing else."""
    if isinstance(transport, MpiTransport):
        from mpi4py import MPI

        size = rows.numel() * rows.element_size() // transport.size
        spec = ([size] * transport.size, [size * r for r in range(transport.size)])
        outgoing, incoming = [byte_view(rows), spec, MPI.BYTE], [byte_view(received), spec, MPI.BYTE]
        return lambda: transport.communicator.Alltoallv(outgoing, incoming)
    assert isinstance(transport, GlooTransport), transport
    return lambda: dist.all_to_all_single(received, rows, group=transport.group)


def loopback_speed() -> str:
    """What iperf3 moves over one TCP connection of this host to itself, in words. Not collective."""
    if shutil.which("iperf3") is None:
        return "iperf3 is not installed: no bare TCP speed beside these"
    port = str(free_port())
    with subprocess.Popen(["iperf3", "-s", "-1", "-p", port], stdout=subprocess.DEVNULL) as server:
        time.sleep(0.5)  # it says nothing when it is ready
        client = subprocess.run(
            ["iperf3", "-c", "127.0.0.1", "-p", port, "-t", "2", "-J"], capture_output=True, text=True
        )
        server.terminate()
    answer = json.loads(client.stdout or "{}")
    if client.returncode != 0 or "end" not in answer:
        return f"iperf3 failed: {answer.get('error', client.stderr.strip())}"
    bits = answer["end"]["sum_received"]["bits_per_second"]
    return f"iperf3, one connection over loopback: {bits / 8e9:.2f} GB/s"
