"""What the row kernels are held against: a gather in C, bare traffic over the same records, Adam over a whole table."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from engram_kernels.prefetch import prefetch_bytes

Gather = Callable[[NDArray[Any], NDArray[np.int64], NDArray[Any]], None]

_C_GATHER = r"""
#include <stdint.h>
#include <string.h>

void gather(const char *weight, const int64_t *rows, int64_t count, int64_t row_bytes, char *out, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        if (i + 8 < count)
            for (int64_t b = 0; b < row_bytes + 63; b += 64) __builtin_prefetch(weight + rows[i + 8] * row_bytes + b);
        memcpy(out + i * row_bytes, weight + rows[i] * row_bytes, row_bytes);
    }
}
"""


def compile_c_gather(folder: Path, num_threads: int) -> Gather | None:
    """A gather compiled by gcc for this machine into `folder`; None where there is no gcc."""
    compiler = shutil.which("gcc")
    if compiler is None:
        return None
    source, library = folder / "gather.c", folder / "gather.so"
    source.write_text(_C_GATHER)
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).gather

    def gather(weight: NDArray[Any], rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        function(
            ctypes.c_void_p(weight.ctypes.data),
            ctypes.c_void_p(rows.ctypes.data),
            ctypes.c_int64(rows.size),
            ctypes.c_int64(weight.strides[0]),
            ctypes.c_void_p(out.ctypes.data),
            ctypes.c_int(num_threads),
        )

    return gather


@njit(nogil=True, cache=True, parallel=True)
def read_modify_write(weight: Any, state: Any, rows: Any) -> None:
    """Change every number of the rows and of their records: the traffic of an update without its arithmetic."""
    rows_per_task, ahead = 256, 4
    weight_base, state_base = np.intp(weight.ctypes.data), np.intp(state.ctypes.data)
    weight_bytes, state_bytes = weight.shape[1] * weight.itemsize, state.shape[1] * state.itemsize
    for task in prange((rows.size + rows_per_task - 1) // rows_per_task):
        start = np.int64(task) * rows_per_task
        for i in range(start, min(start + rows_per_task, rows.size)):
            if i + ahead < rows.size:
                prefetch_bytes(weight_base + rows[i + ahead] * weight_bytes, weight_bytes)
                prefetch_bytes(state_base + rows[i + ahead] * state_bytes, state_bytes)
            for column in range(weight.shape[1]):
                weight[rows[i], column] ^= 1
            for column in range(state.shape[1]):
                state[rows[i], column] ^= 1


@njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def dense_sweep(weight: Any, state: Any, last_step: Any, rows: Any, gradients: Any, step: Any, scalars: Any) -> None:
    """One step of Adam over all float32 rows that ever had a gradient: the alternative to catching rows up.

    `scalars` float32: 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), eps.
    """
    rows_per_task = 1024
    num_rows, row_dim = weight.shape
    one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_root, eps = scalars
    for task in prange((num_rows + rows_per_task - 1) // rows_per_task):
        start = np.int64(task) * rows_per_task
        coming = np.searchsorted(rows, start)
        for row in range(start, min(start + rows_per_task, num_rows)):
            has_gradient = coming < rows.size and rows[coming] == row
            if not has_gradient and last_step[row] == 0:
                continue
            for column in range(row_dim):
                g = gradients[coming, column] if has_gradient else np.float32(0)
                m = state[row, column]
                m += one_minus_beta1 * (g - m)
                v = beta2 * state[row, row_dim + column] + one_minus_beta2 * (g * g)
                weight[row, column] -= step_size * (m / (math.sqrt(v) * inverse_root + eps))
                state[row, column] = m
                state[row, row_dim + column] = v
            if has_gradient:
                last_step[row] = step
                coming += 1
