"""Cases of kind "module": the whole Engram layer, from tokens over rows to the update and all gradients.

Shape letters as in `model.engram_layer`; the vectors are batch first, their G branches are our M streams, their D is
our C, and their channels and rows are ordered as ours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engram_kernels.reference import engram_gate, short_conv
from engram_megatron.conformance.case import Array, Arrays, Case, check_close, check_equal
from engram_megatron.conformance.module_weights import module_inputs
from engram_megatron.conformance.ngram_hash import case_hasher
from engram_megatron.hashing.vocab_projection import VocabProjection
from engram_megatron.model.engram_layer import EngramLayer


def check_module(case: Case, projection: VocabProjection) -> float:
    """Compare hash rows, forward and gradients in float32 and float64; the largest float64 difference."""
    config, arrays = case.entry["config"], case.arrays()
    hasher = case_hasher(config, projection)
    layer = config["layer_ids"].index(config["layer"])
    hash_BTH = hasher.hashes(arrays["input_ids"])[layer]
    check_equal("hash", hash_BTH, arrays["hash"])
    check_equal("rows", hash_BTH + hasher.head_offsets_LH[layer], arrays["rows"])
    inputs = module_inputs(case, arrays)
    for check in (_check_forward, _check_gradients):
        check(case, inputs, arrays, torch.float32)
    return max(check(case, inputs, arrays, torch.float64) for check in (_check_forward, _check_gradients))


def build_layer(case: Case, inputs: Arrays, dtype: torch.dtype) -> EngramLayer:
    """Our layer with the case's weights: value rows first, then the keys branch by branch."""
    config = case.entry["config"]
    C, M = config["hidden_size"], config["hc_mult"]
    gate_eps = config.get("gate_norm_eps")
    layer = EngramLayer(
        hidden_size=C,
        memory_dim=inputs["value_w"].shape[1],
        num_streams=M,
        conv_kernel_size=config["kernel_size"],
        conv_dilation=config["conv_dilation"],
        gate=True,
        conv=True,
        bias=True,
        norm_eps=float(gate_eps) if isinstance(gate_eps, int | float) else None,  # words: the compute type's epsilon
        conv_norm_eps=config["conv_norm_eps"],
        init_std=0.0,
        dtype=dtype,
        device="meta",
    )
    weights = {
        "key_value.weight": np.concatenate([inputs["value_w"], inputs["key_w"].reshape(M * C, -1)]),
        "key_value.bias": np.concatenate([inputs["value_b"], inputs["key_b"].reshape(M * C)]),
        "norm_query.weight": inputs["norm_query"],
        "norm_key.weight": inputs["norm_key"],
        "norm_conv.weight": inputs["conv_norm"],
        "short_conv.weight": inputs["conv_w"],
    }
    state = {name: torch.from_numpy(weight.copy()).to(dtype) for name, weight in weights.items()}
    layer.load_state_dict(state, strict=True, assign=True)
    return layer.requires_grad_()


def _sequence_first(array: Array, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(array).to(dtype).transpose(0, 1)


def _batch_first(tensor: Tensor) -> Array:
    return tensor.detach().transpose(0, 1).numpy()


def _memory(inputs: Arrays, dtype: torch.dtype) -> Tensor:
    """memory_TBE of the rows that the case reads."""
    B, T, _ = inputs["row_index"].shape
    return _sequence_first(inputs["embedding_rows"][inputs["row_index"]].reshape(B, T, -1), dtype)


def _check_forward(case: Case, inputs: Arrays, arrays: Arrays, dtype: torch.dtype) -> float:
    """Retrieved rows, gate, gated value, convolution and output in `dtype`."""
    layer = build_layer(case, inputs, dtype)
    hidden, memory = _sequence_first(inputs["hidden"], dtype), _memory(inputs, dtype)
    assert layer.norm_query is not None
    assert layer.norm_key is not None
    assert layer.norm_conv is not None
    assert layer.short_conv is not None
    key_value = layer.key_value(memory)
    value, key = key_value[..., : layer.hidden_size], key_value[..., layer.hidden_size :].view_as(hidden)
    gated, gate = engram_gate(hidden, key, value, layer.norm_query.weight, layer.norm_key.weight, layer.norm_eps)
    conv = short_conv(
        gated, layer.norm_conv.weight, layer.short_conv.weight, layer.conv_norm_eps, layer.conv_dilation, None
    )
    suffix = "f64" if dtype == torch.float64 else "f32"
    ours = {
        "retrieved": memory,
        "gate": gate,
        "gated_value": gated,
        "conv_out": conv,
        "output": layer(hidden, memory, None),
    }
    return max(
        check_close(f"{name}_{suffix}", _batch_first(tensor), arrays[f"{name}_{suffix}"])
        for name, tensor in ours.items()
    )


def _check_gradients(case: Case, inputs: Arrays, arrays: Arrays, dtype: torch.dtype) -> float:
    """Gradients of sum(output * cotangent) in `dtype` for the hidden state, the rows read and every parameter.

    The vectors hold them in float64; the float32 ones are compared with those, rounded.
    """
    layer = build_layer(case, inputs, dtype)
    hidden = _sequence_first(inputs["hidden"], dtype).requires_grad_()
    memory = _memory(inputs, dtype).requires_grad_()
    (layer(hidden, memory, None) * _sequence_first(inputs["cotangent"], dtype)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert hidden.grad is not None
    assert memory.grad is not None
    assert all(gradient is not None for gradient in gradients.values())
    numpy = {name: gradient.numpy() for name, gradient in gradients.items() if gradient is not None}
    C = layer.hidden_size
    ours = {
        "hidden": _batch_first(hidden.grad),
        "embedding_vals": _row_gradients(inputs, _batch_first(memory.grad)),
        "value_w": numpy["key_value.weight"][:C],
        "key_w": numpy["key_value.weight"][C:].reshape(layer.num_streams, C, -1),
        "value_b": numpy["key_value.bias"][:C],
        "key_b": numpy["key_value.bias"][C:].reshape(layer.num_streams, C),
        "norm_query": numpy["norm_query.weight"],
        "norm_key": numpy["norm_key.weight"],
        "conv_norm": numpy["norm_conv.weight"],
        "conv_w": numpy["short_conv.weight"],
    }
    if case.entry["weights"] == "formula":  # the two matrices' gradients are too large for a file of vectors
        del ours["value_w"], ours["key_w"]
    check_equal("grad_embedding_rows", inputs["unique_rows"], arrays["grad_embedding_rows"])
    return max(
        check_close(f"grad_{name}", ours[name], arrays[f"grad_{name}_f64"].astype(ours[name].dtype)) for name in ours
    )


def _row_gradients(inputs: Arrays, grad_memory_BTE: Array) -> Array:
    """The gradient of each row that was read: the sum over all places that read it."""
    rows = np.zeros(inputs["embedding_rows"].shape, dtype=grad_memory_BTE.dtype)
    np.add.at(rows, inputs["row_index"].reshape(-1), grad_memory_BTE.reshape(-1, rows.shape[1]))
    return rows
