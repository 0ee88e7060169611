"""The one place that knows CPU from CUDA: lets megatron-core run on CPU and gloo.

megatron-core 0.19.2 calls `torch.cuda.*` in many places without asking. Without a GPU, `install()` redirects exactly
the calls that it makes to their CPU meaning; with a GPU it does nothing. It must run before the first
`import megatron`, because some modules bind the names they use (`device="cuda"` literals, `torch.compile`) at import.
`torch.cuda.is_available()` stays False. The Ascend port of Megatron (MindSpeed) works the same way.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib.util
import logging
import sys
from typing import Any

import numba
import torch
import torch.distributed as dist
import torch.utils._device

_FACTORIES = (
    *("zeros", "ones", "empty", "full", "tensor", "as_tensor", "arange", "rand", "randn"),
    *("zeros_like", "ones_like", "empty_like", "full_like"),
)


def install() -> bool:
    """Redirect `torch.cuda` to the CPU where there is no GPU. Returns whether it did; a second call does nothing."""
    if torch.cuda.is_available() or getattr(torch.cuda, "_engram_redirected", False):
        return False
    assert "megatron.core" not in sys.modules, "platform.install() must run before the first import of megatron"
    torch.cuda._engram_redirected = True  # type: ignore[attr-defined]
    # Gradients that fade through Sinkhorn's iterations and Adam's moments of idle rows can end in denormals, on which
    # x86 works a hundred times slower. GPUs flush them too.
    torch.set_flush_denormal(True)
    _redirect_device_calls()
    _redirect_random_state()
    _redirect_streams()
    _redirect_factories()
    _redirect_tensor_methods()
    _redirect_all_to_all()
    return True


def device() -> torch.device:
    """Where this rank's model lives. Under `with torch.device("meta")` a CPU process answers meta."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.get_default_device()


def backend() -> str:
    """Process-group backend: NCCL for tensors on GPUs (gloo beside it for host tensors), gloo otherwise."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def select_device(local_rank: int) -> None:
    """Bind this process to its GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)


def limit_threads(num_threads: int) -> None:
    """Give this process `num_threads` CPU threads, for torch and numba alike.

    Ranks that share a host must divide its cores: both libraries take all of them by default, sit on one OpenMP
    runtime whose idle threads spin, and slow each other down tenfold. numba must hear of it before its first kernel.
    """
    numba.config.NUMBA_NUM_THREADS = num_threads
    numba.set_num_threads(num_threads)
    torch.set_num_threads(num_threads)


def synchronize() -> None:
    """Wait for the device; free on CPU."""
    torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """Peak memory of this process's device allocator on CUDA, peak resident set on CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_memory_bytes() -> int:
    """Memory that this process's allocator holds of its GPU; 0 on CPU."""
    return int(torch.cuda.memory_reserved()) if torch.cuda.is_available() else 0


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be used: it needs a GPU, and importing it without one fails on libcuda."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def has_grad_accumulation_fusion() -> bool:
    """Whether NVIDIA apex's weight-gradient kernel is there. PyPI's `apex` is another package; the extension is asked
    for by name, never `import apex`."""
    return torch.cuda.is_available() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def _redirect_device_calls() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = device
    cuda.set_device = lambda _device: None
    cuda.synchronize = lambda *_args, **_kwargs: None
    cuda.empty_cache = lambda: None
    cuda.memory_stats = lambda *_args, **_kwargs: collections.defaultdict(int)
    cuda.is_current_stream_capturing = lambda: False
    cuda._lazy_call = lambda function, **_kwargs: function()
    cuda._lazy_init = lambda: None
    # megatron-core's jit_fuser is an unconditional torch.compile; on CPU that costs a C++ compiler and seconds.
    torch.compile = lambda function=None, **_kwargs: function if function is not None else (lambda f: f)  # type: ignore


class _CpuGenerators:
    """`torch.cuda.default_generators[i]` is the CPU generator, whatever i."""

    def __getitem__(self, _index: Any) -> torch.Generator:
        return torch.default_generator


def _redirect_random_state() -> None:
    cuda: Any = torch.cuda
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.default_generators = _CpuGenerators()
    # megatron-core warns on each fork that the CPU state changed; here that is its purpose.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


class _NoStream:
    """A stream or event on a machine that runs everything in order: every method is a no-op."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *_args, **_kwargs: self if name == "record_event" else None

    def query(self) -> bool:
        return True

    def elapsed_time(self, _other: Any) -> float:
        return 0.0


def _redirect_streams() -> None:
    cuda: Any = torch.cuda
    only = _NoStream()
    cuda.Stream = cuda.Event = _NoStream
    cuda.current_stream = cuda.default_stream = lambda *_args, **_kwargs: only
    cuda.set_stream = lambda _stream: None
    cuda.stream = lambda _stream: contextlib.nullcontext()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_args, **_kwargs: 0


def _is_cuda(where: Any) -> bool:
    if isinstance(where, torch.device):
        return where.type == "cuda"
    return isinstance(where, str) and where.startswith("cuda")


def _redirect_factories() -> None:
    def wrap(factory: Any) -> Any:
        @functools.wraps(factory)
        def on_cpu(*args: Any, **kwargs: Any) -> Any:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = device()
            return factory(*args, **kwargs)

        return on_cpu

    # `with torch.device("meta")` knows factories by identity: it must make its list before they are replaced.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, wrap(getattr(torch, name)))


def _redirect_tensor_methods() -> None:
    to, type_ = torch.Tensor.to, torch.Tensor.type

    def to_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (device(), *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = device()
        return to(self, *args, **kwargs)

    def type_as_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # megatron-core's optimizers compare `param.type()` with 'torch.cuda.FloatTensor' and its kin.
        name = type_(self, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.", 1) if isinstance(name, str) else name

    tensor: Any = torch.Tensor
    tensor.to, tensor.type = to_cpu, type_as_cuda
    tensor.cuda = lambda self, *_args, **_kwargs: self
    tensor.record_stream = lambda _self, _stream: None
    module: Any = torch.nn.Module
    module.cuda = lambda self, *_args, **_kwargs: self


def _redirect_all_to_all() -> None:
    exchange = dist.all_to_all_single

    @functools.wraps(exchange)
    def with_list_splits(
        output: Any,
        input: Any,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # The MoE dispatcher turns its split tensors into lists only when they live on a GPU.
        def as_list(splits: Any) -> Any:
            return splits.tolist() if isinstance(splits, torch.Tensor) else splits

        return exchange(output, input, as_list(output_split_sizes), as_list(input_split_sizes), *args, **kwargs)

    dist.all_to_all_single = with_list_splits
