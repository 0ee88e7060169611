"""The definition of every op, in plain PyTorch (numpy for integers). Fast versions are tested against these.

Shape letters: T positions, B sequences, M residual streams, C hidden width, K taps of the convolution;
for the hash also L Engram layers, N largest n-gram order, J heads of one order, H = (N - 1) * J heads of one layer.
Activations are sequence first, token ids batch first.

Precision: floating ops compute in float32, or in float64 where an input is float64, and return the type that their
docstring names. `eps = None` means the machine epsilon of that compute type (the demo's `nn.RMSNorm` without eps).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of `tensors` is float64, otherwise float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _reciprocal_rms(x: Tensor, eps: float | None) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, which is kept with size 1."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    """RMSNorm (arXiv 1910.07467) over the last axis: x / sqrt(mean(x^2) + eps) * weight.

    x [..., C], weight broadcastable to it; the result has x's dtype.
    """
    dtype = compute_dtype(x, weight)
    wide = x.to(dtype)
    return (wide * _reciprocal_rms(wide, eps) * weight.to(dtype)).to(x.dtype)


def engram_gate(
    hidden_TBMC: Tensor,
    key_TBMC: Tensor,
    value_TBC: Tensor,
    weight_query_MC: Tensor,
    weight_key_MC: Tensor,
    eps: float | None,
    clamp: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The context-aware gate (Engram, arXiv 2601.07372, Eq. 3, 4, 6) with the signed root of DeepSeek's demo.

    score = RMSNorm(hidden) . RMSNorm(key) / sqrt(C);  gate = sigmoid(sign(score) * sqrt(max(|score|, clamp)));
    gated = gate * value. The root is in the demo, in TileKernels and in DeepSeek-V4.1, not in the paper's formula.

    Returns gated_TBMC in value's dtype and gate_TBM in the compute type. The two norm weights act only as a product.

    Gradients. Below `clamp` the root is flat, so the score has gradient 0 there; at the clamp the slope is largest,
    0.5 / sqrt(clamp) = 500. A key of exact zeros (zeroed tables) has score 0, hence gradient 0, whatever eps: nothing
    is multiplied by 1 / sqrt(eps) but zeros. Its value still learns, through a gate of 0.5. A key that is tiny but
    not zero has a gradient that grows as 1 / |key|, because the norm takes its length away; that is the derivative,
    bounded by 1 / sqrt(eps), and it is finite in float32 down to the smallest eps in use, 1e-20.
    """
    dtype = compute_dtype(hidden_TBMC, key_TBMC)
    hidden, key = hidden_TBMC.to(dtype), key_TBMC.to(dtype)
    weight_MC = weight_query_MC.to(dtype) * weight_key_MC.to(dtype)
    # one dot product and two lengths: the normalised tensors themselves are never needed
    dot_TBM = (hidden * weight_MC * key).sum(dim=-1)
    lengths_TBM = (_reciprocal_rms(hidden, eps) * _reciprocal_rms(key, eps)).squeeze(-1)
    score_TBM = dot_TBM * lengths_TBM * hidden.shape[-1] ** -0.5
    gate_TBM = torch.sigmoid(score_TBM.sign() * score_TBM.abs().clamp_min(clamp).sqrt())
    gated_TBMC = gate_TBM.unsqueeze(-1) * value_TBC.to(dtype).unsqueeze(2)
    return gated_TBMC.to(value_TBC.dtype), gate_TBM


def position_in_document(document_ids_BT: Tensor) -> Tensor:
    """How many positions back the document of each position starts, int64 [B, T]. A change of id starts a document."""
    T = document_ids_BT.shape[1]
    position_T = torch.arange(T, device=document_ids_BT.device)
    starts_BT = torch.zeros_like(document_ids_BT, dtype=torch.int64)
    if T > 1:
        changed_BT = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
        starts_BT[:, 1:] = torch.where(changed_BT, position_T[1:], 0).cummax(dim=1).values
    return position_T - starts_BT


def short_conv(
    value_TBMC: Tensor,
    norm_weight_MC: Tensor,
    conv_weight: Tensor,
    eps: float | None,
    dilation: int,
    document_ids_BT: Tensor | None,
) -> Tensor:
    """SiLU(causal depthwise dilated convolution of RMSNorm(value)) (Engram, arXiv 2601.07372, Eq. 5, without + value).

    conv_weight [M*C, 1, K] as `nn.Conv1d` with groups = M*C stores it (channel = stream * C + c); tap k sees the
    position (K - 1 - k) * dilation back. Positions before the start of the sequence count as zero, and with
    `document_ids_BT` (integers) also those before the start of the document. Returns value's dtype and shape.

    A value of exact zeros is multiplied by 1 / sqrt(eps) in the backward wherever the convolution's weights are not
    zero. That is why the demo gives this norm 1e-5 and not the 1e-20 of the gate's norms.
    """
    T, _, M, C = value_TBMC.shape
    K = conv_weight.shape[-1]
    dtype = compute_dtype(value_TBMC, conv_weight)
    value = value_TBMC.to(dtype)
    normed = value * _reciprocal_rms(value, eps) * norm_weight_MC.to(dtype)
    taps_KMC = conv_weight.to(dtype).view(M, C, K).permute(2, 0, 1)
    position_TB = None if document_ids_BT is None else position_in_document(document_ids_BT).t()
    total = normed * taps_KMC[K - 1]
    # K shifted products. nn.Conv1d wants channels first (two transposes) and is several times slower for depthwise on
    # a CPU; adding in place into a part of `total` copies all of its gradient once per tap.
    padded = torch.nn.functional.pad(normed, (0, 0, 0, 0, 0, 0, (K - 1) * dilation, 0))
    for k in range(K - 1):
        past = padded[k * dilation : k * dilation + T]
        if position_TB is not None:
            past = torch.where((position_TB >= (K - 1 - k) * dilation)[:, :, None, None], past, 0)
        total = torch.addcmul(total, past, taps_KMC[k])
    return torch.nn.functional.silu(total).to(value_TBMC.dtype)


def ngram_hash(
    tokens_BT: NDArray[np.int64],
    document_ids_BT: NDArray[np.int32] | None,
    multipliers_LN: NDArray[np.int64],
    primes_LOJ: NDArray[np.int64],
    row_offsets_LH: NDArray[np.int64],
    pad_id: int,
) -> NDArray[np.int64]:
    """Row numbers of all n-grams of orders 2..N that end at each position (Engram, arXiv 2601.07372, Eq. 1; the demo).

    mix_n[t] = XOR over k < n of x[t - k] * multipliers[k] in wrapping int64; row = mix_n mod prime (floor modulo, never
    negative) + row offset. x is `tokens_BT`, compressed ids; positions before the start of the sequence, or of the
    document where `document_ids_BT` is given, count as `pad_id`. A document ends where the id changes: what lies
    before a change is hidden even if the same id comes again.

    multipliers_LN, primes_LOJ (O = N - 1 orders, J heads each), row_offsets_LH int64 -> rows_LBTH int64; heads order by
    order.
    """
    B, T = tokens_BT.shape
    L, N = multipliers_LN.shape
    position_BT = np.broadcast_to(np.arange(T), (B, T))
    if document_ids_BT is not None and T > 0:
        changed_BT = np.diff(document_ids_BT, axis=1, prepend=document_ids_BT[:, :1]) != 0
        position_BT = position_BT - np.maximum.accumulate(np.where(changed_BT, position_BT, 0), axis=1)
    window_NBT = np.full((N, B, T), pad_id, dtype=np.int64)
    for k in range(min(N, T)):
        window_NBT[k, :, k:] = tokens_BT[:, : T - k]
        window_NBT[k] = np.where(position_BT >= k, window_NBT[k], pad_id)
    rows = []
    for layer in range(L):
        mix_BT = window_NBT[0] * multipliers_LN[layer, 0]
        for n in range(1, N):
            mix_BT = mix_BT ^ (window_NBT[n] * multipliers_LN[layer, n])
            rows.append(mix_BT[..., None] % primes_LOJ[layer, n - 1])
    rows_LBTH = np.stack([np.concatenate(rows[i * (N - 1) : (i + 1) * (N - 1)], axis=-1) for i in range(L)])
    return rows_LBTH + row_offsets_LH[:, None, None, :]


def piece_checksum(data: bytes, seed: int) -> int:
    """The checksum of one piece of a message (`checksum.py`), 64 bits; mix is splitmix64's finalizer.

    mix(sum over i of mix(word_i XOR (seed + i * golden)) + mix(seed + length)), all modulo 2^64. Words are 8 bytes,
    little-endian, the last one filled up with zeros; the length is in bytes.
    """
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    total = sum(mix(word ^ (seed + i * golden & mask)) for i, word in enumerate(words))
    return mix((total + mix((seed + len(data)) & mask)) & mask)
