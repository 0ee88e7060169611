"""The n-gram hash on the host: one compiled pass over the tokens, bit for bit `reference.ngram_hash`.

Shape letters: L Engram layers, B sequences, T positions, N largest n-gram order, J heads of one order,
H = (N - 1) * J heads of one layer.

The remainder is taken with a reciprocal in float64 instead of an integer division, which is what the time would go
to. For 0 <= mix < 2^63 and prime >= 2^13 the quotient stays below 2^50; three roundings of 2^-53 each move it by less
than one half, so that its floor is off by at most one and a single correction makes the remainder exact. Smaller
primes and negative mixes (negative token ids) take the floor modulo of the language.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

SMALLEST_RECIPROCAL_PRIME = 2**13

Int64 = NDArray[np.int64]


def ngram_hash(
    tokens_BT: Int64,
    document_ids_BT: NDArray[np.int32] | None,
    multipliers_LN: Int64,
    primes_LOJ: Int64,
    row_offsets_LH: Int64,
    pad_id: int,
    out: Int64 | None = None,
) -> Int64:
    """Row numbers of all n-grams that end at each position. Arguments and result as `reference.ngram_hash`; the result
    is written to `out` int64 [L, B, T, H], contiguous, where it is given.

    Runs on numba's threads (`numba.set_num_threads`) and releases the GIL; the first call of a process loads or
    compiles the machine code.
    """
    B, T = tokens_BT.shape
    L, N = multipliers_LN.shape
    H = row_offsets_LH.shape[1]
    assert primes_LOJ.shape == (L, N - 1, H // (N - 1))
    assert document_ids_BT is None or document_ids_BT.shape == (B, T)
    rows_LBTH = np.empty((L, B, T, H), dtype=np.int64) if out is None else out
    assert rows_LBTH.shape == (L, B, T, H), (rows_LBTH.shape, (L, B, T, H))
    assert rows_LBTH.dtype == np.int64, rows_LBTH.dtype
    assert rows_LBTH.flags.c_contiguous, rows_LBTH.strides
    documents = np.zeros((0, 0), dtype=np.int32) if document_ids_BT is None else document_ids_BT
    _hash_tokens(
        np.ascontiguousarray(tokens_BT, dtype=np.int64),
        np.ascontiguousarray(documents, dtype=np.int32),
        multipliers_LN,
        primes_LOJ,
        1.0 / primes_LOJ,
        row_offsets_LH,
        pad_id,
        bool((primes_LOJ >= SMALLEST_RECIPROCAL_PRIME).all()),
        rows_LBTH,
    )
    return rows_LBTH


@numba.njit(parallel=True, nogil=True, cache=True)
def _hash_tokens(
    tokens_BT: Int64,
    document_ids_BT: NDArray[np.int32],
    multipliers_LN: Int64,
    primes_LOJ: Int64,
    reciprocals_LOJ: NDArray[np.float64],
    row_offsets_LH: Int64,
    pad_id: int,
    use_reciprocals: bool,
    rows_LBTH: Int64,
) -> None:
    B, T = tokens_BT.shape
    L, num_orders, J = primes_LOJ.shape
    cut = document_ids_BT.size > 0
    for i in numba.prange(L * B * T):
        # numba types a parallel index as unsigned; unsigned with signed would turn into float64
        n = np.int64(i)
        layer, b, t = n // (B * T), (n // T) % B, n % T
        mix = tokens_BT[b, t] * multipliers_LN[layer, 0]
        blocked = False
        for order in range(num_orders):
            past = t - order - 1
            # a start of the sequence or of a document hides everything older
            blocked = blocked or past < 0 or (cut and document_ids_BT[b, past] != document_ids_BT[b, past + 1])
            token = pad_id if blocked else tokens_BT[b, past]
            mix ^= token * multipliers_LN[layer, order + 1]
            real = np.float64(mix)
            for j in range(J):
                prime = primes_LOJ[layer, order, j]
                if use_reciprocals and mix >= 0:
                    remainder = mix - np.int64(real * reciprocals_LOJ[layer, order, j]) * prime
                    if remainder < 0:
                        remainder += prime
                    elif remainder >= prime:
                        remainder -= prime
                else:
                    remainder = mix % prime
                rows_LBTH[layer, b, t, order * J + j] = remainder + row_offsets_LH[layer, order * J + j]
