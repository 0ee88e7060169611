"""The Engram layer: memory rows in, an update of the residual streams out.

Shape letters: T positions, B sequences, M residual streams, C hidden width, E memory width (all heads together),
K taps of the convolution. Sequence first. The layer is given its memory and does not know where the rows came from.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engram_kernels.reference import engram_gate, short_conv
from engram_megatron.model.halo import left_halo
from engram_megatron.model.sequence_partition import SequencePartition


class ConstantWeight(nn.Module):
    """One parameter `weight` that starts at a constant: a norm's scale (1) or a silent branch (0)."""

    def __init__(self, shape: tuple[int, ...], value: float, dtype: torch.dtype, device: torch.device | str | None):
        super().__init__()
        self.value = value
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.value)


class EngramLayer(nn.Module):
    """Conditional memory (Engram, arXiv 2601.07372, Eq. 3 to 6): project, gate by the hidden state, convolve.

    update = gated + SiLU(conv(RMSNorm(gated))), gated^(m) = gate^(m) * value, one value and M keys from one matrix.

    Parameters, each absent where its part is switched off:
      key_value.weight  [(1 + M) * C, E]  rows: value, then the keys stream by stream; [C, E] without the gate
      key_value.bias    [(1 + M) * C]     only with `bias` (the demo's variant)
      norm_query.weight, norm_key.weight, norm_conv.weight  [M, C]
      short_conv.weight [M * C, 1, K]     zero at the start: the convolution's branch is silent, the gated value not

    `norm_eps` belongs to the gate's two norms, `conv_norm_eps` to the convolution's; None means the machine epsilon
    of the compute type. Give the convolution a real epsilon (the demo's is 1e-5) if memory can be exactly zero: see
    `engram_kernels.reference.short_conv`.

    Under sequence and context parallelism every rank of `sequence_group` holds the parameters whole and its share of
    the sequence, as `partition` says; the convolution takes what it needs of earlier positions from the ranks that hold
    them. The caller sums the parameters' gradients over the group.

    `last_gate_mean`: mean gate of each stream over the last forward's tokens of this rank, float32 [M], detached, on
    the layer's device; None before the first forward and without the gate.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        memory_dim: int,
        num_streams: int,
        conv_kernel_size: int,
        conv_dilation: int,
        gate: bool,
        conv: bool,
        bias: bool,
        norm_eps: float | None,
        conv_norm_eps: float | None,
        init_std: float,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        partition: SequencePartition | None = None,
        sequence_group: dist.ProcessGroup | None = None,
    ) -> None:
        """`init_std` is that of the key and value projection. On a device other than "meta" parameters are set."""
        super().__init__()
        self.hidden_size = hidden_size
        self.num_streams = num_streams
        self.conv_dilation = conv_dilation
        self.norm_eps = norm_eps
        self.conv_norm_eps = conv_norm_eps
        self.init_std = init_std
        self.partition = partition or SequencePartition()
        self.sequence_group = sequence_group
        self.last_gate_mean: Tensor | None = None
        outputs = hidden_size * (1 + num_streams) if gate else hidden_size
        # nn.Linear would draw its own initial weights from the caller's random stream; skip_init does not
        self.key_value = nn.utils.skip_init(
            nn.Linear, memory_dim, outputs, bias=bias, dtype=dtype, device=device or torch.get_default_device()
        )
        streams = (num_streams, hidden_size)
        self.norm_query = ConstantWeight(streams, 1.0, dtype, device) if gate else None
        self.norm_key = ConstantWeight(streams, 1.0, dtype, device) if gate else None
        self.norm_conv = ConstantWeight(streams, 1.0, dtype, device) if conv else None
        taps = (num_streams * hidden_size, 1, conv_kernel_size)
        self.short_conv = ConstantWeight(taps, 0.0, dtype, device) if conv else None
        if not self.key_value.weight.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every parameter to its start: projection N(0, init_std^2), biases and taps 0, scales 1."""
        nn.init.normal_(self.key_value.weight, mean=0.0, std=self.init_std)
        if self.key_value.bias is not None:
            nn.init.zeros_(self.key_value.bias)
        for part in (self.norm_query, self.norm_key, self.norm_conv, self.short_conv):
            if part is not None:
                part.reset_parameters()

    def forward(self, hidden_TBMC: Tensor, memory_TBE: Tensor, document_ids_BT: Tensor | None) -> Tensor:
        """The update_TBMC that the caller adds to the residual streams, in memory's dtype.

        `document_ids_BT` (integers, equal neighbours = same document, none negative) keeps the convolution within
        documents; None lets it see the whole sequence. With a `sequence_group`, T is this rank's share in everything
        but `document_ids_BT`, which are those of the whole sequence.
        """
        T, B, M, C = hidden_TBMC.shape
        assert (self.num_streams, self.hidden_size) == (M, C)
        key_value = self.key_value(memory_TBE)
        value_TBC = key_value[..., :C]
        if self.norm_query is not None and self.norm_key is not None:
            key_TBMC = key_value[..., C:].view(T, B, M, C)
            gated_TBMC, gate_TBM = engram_gate(
                hidden_TBMC, key_TBMC, value_TBC, self.norm_query.weight, self.norm_key.weight, self.norm_eps
            )
            self.last_gate_mean = gate_TBM.detach().mean(dim=(0, 1)).float()
        else:
            gated_TBMC = value_TBC.unsqueeze(2).expand(T, B, M, C)
        if self.norm_conv is None or self.short_conv is None:
            return gated_TBMC
        return gated_TBMC + self._convolve(gated_TBMC, document_ids_BT)

    def _convolve(self, gated_TBMC: Tensor, document_ids_BT: Tensor | None) -> Tensor:
        """The convolution's branch. Pieces of a divided sequence are convolved as if they were sequences."""
        assert self.norm_conv is not None
        assert self.short_conv is not None
        reach = 0 if self.sequence_group is None else (self.short_conv.weight.shape[-1] - 1) * self.conv_dilation
        seen_TBMC, seen_ids_BT = self._with_halo(gated_TBMC, document_ids_BT, reach)
        convolved_TBMC = short_conv(
            seen_TBMC,
            self.norm_conv.weight,
            self.short_conv.weight,
            self.conv_norm_eps,
            self.conv_dilation,
            seen_ids_BT,
        )
        pieces_TPBMC: Tensor = convolved_TBMC[reach:].unflatten(1, (self.partition.num_pieces, -1))
        return pieces_TPBMC.transpose(0, 1).flatten(0, 1)

    def _with_halo(
        self, gated_TBMC: Tensor, document_ids_BT: Tensor | None, reach: int
    ) -> tuple[Tensor, Tensor | None]:
        """The pieces of this rank's share side by side in the dimension of sequences, each behind the `reach` positions
        before it, and the document ids of both."""
        if self.sequence_group is None:
            return gated_TBMC, document_ids_BT
        halo_HPBMC = left_halo(gated_TBMC, reach, self.partition, self.sequence_group)
        pieces_TPBMC = gated_TBMC.unflatten(0, (self.partition.num_pieces, -1)).transpose(0, 1)
        ids = None if document_ids_BT is None else self._ids_with_halo(document_ids_BT, reach)
        return torch.cat([halo_HPBMC, pieces_TPBMC]).flatten(1, 2), ids

    def _ids_with_halo(self, document_ids_BT: Tensor, reach: int) -> Tensor:
        """Document ids [P * B, reach + length of a piece] of the pieces and what stands before them.

        A document that began before the halo looks as if it began with it, out of every tap's reach. Positions before
        the sequence belong to no document.
        """
        assert self.sequence_group is not None
        length = document_ids_BT.shape[1]
        padded = torch.nn.functional.pad(document_ids_BT, (reach, 0), value=-1)
        size = reach + self.partition.block_length(length)
        starts = self.partition.piece_starts(length, self.sequence_group.rank())
        return torch.cat([padded[:, start : start + size] for start in starts])
