"""The Engram layer: its parameters, its start, and what reaches what. Its numbers are checked by the golden vectors
(tests/launch/test_conformance.py)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from engram_kernels.reference import engram_gate, short_conv
from engram_megatron.model.engram_layer import EngramLayer

T, B, M, C, E, K = 10, 2, 3, 8, 12, 4


def build(**changes: Any) -> EngramLayer:
    torch.manual_seed(3)
    settings: dict[str, Any] = {
        "hidden_size": C,
        "memory_dim": E,
        "num_streams": M,
        "conv_kernel_size": K,
        "conv_dilation": 3,
        "gate": True,
        "conv": True,
        "bias": False,
        "norm_eps": 1e-20,
        "conv_norm_eps": 1e-5,
        "init_std": 0.1,
        "dtype": torch.float32,
    }
    return EngramLayer(**(settings | changes))


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(T, B, M, C, generator=generator).to(dtype), torch.randn(T, B, E, generator=generator).to(dtype)


def open_conv(layer: EngramLayer) -> EngramLayer:
    """Give the convolution weights, as training would."""
    assert layer.short_conv is not None
    torch.nn.init.normal_(layer.short_conv.weight)
    return layer


FULL = {
    "key_value.weight": ((1 + M) * C, E),
    "norm_query.weight": (M, C),
    "norm_key.weight": (M, C),
    "norm_conv.weight": (M, C),
    "short_conv.weight": (M * C, 1, K),
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, FULL),
        ({"bias": True}, FULL | {"key_value.bias": ((1 + M) * C,)}),
        ({"conv": False}, {name: FULL[name] for name in ("key_value.weight", "norm_query.weight", "norm_key.weight")}),
        (
            {"gate": False},
            {
                "key_value.weight": (C, E),
                "norm_conv.weight": FULL["norm_conv.weight"],
                "short_conv.weight": FULL["short_conv.weight"],
            },
        ),
        ({"gate": False, "conv": False}, {"key_value.weight": (C, E)}),
    ],
)
def test_a_variant_has_exactly_the_parameters_that_it_uses(
    changes: dict[str, bool], expected: dict[str, tuple[int, ...]]
) -> None:
    layer = build(**changes)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == expected
    hidden, memory = inputs()
    update = open_conv(layer)(hidden, memory, None) if "conv" not in changes else layer(hidden, memory, None)
    assert update.shape == hidden.shape
    update.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_initial_update_is_the_gated_value_alone() -> None:
    hidden, memory = inputs()
    torch.testing.assert_close(build()(hidden, memory, None), build(conv=False)(hidden, memory, None), rtol=0, atol=0)


def test_initial_parameters_follow_init_std() -> None:
    layer = build(hidden_size=64, memory_dim=256, bias=True, init_std=0.02)
    # 65,536 draws: their standard deviation is known to 0.3 %, so 2 % is seven sigma
    assert float(layer.key_value.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert layer.norm_query is not None
    assert layer.short_conv is not None
    assert (layer.key_value.bias == 0).all()
    assert (layer.norm_query.weight == 1).all()
    assert (layer.short_conv.weight == 0).all()


def test_meta_layer_becomes_the_same_layer_once_it_has_memory() -> None:
    layer = build(device="meta")
    assert all(p.is_meta for p in layer.parameters())
    layer = layer.to_empty(device="cpu")
    torch.manual_seed(3)
    layer.reset_parameters()
    for (name, ours), (_, expected) in zip(layer.named_parameters(), build().named_parameters(), strict=True):
        assert torch.equal(ours, expected), name


def test_update_is_gate_plus_convolution_of_the_fused_projection() -> None:
    layer = open_conv(build(bias=True, dtype=torch.float64))
    hidden, memory = inputs(torch.float64)
    parts = layer.key_value(memory)
    value, keys = parts[..., :C], [parts[..., (1 + m) * C : (2 + m) * C] for m in range(M)]
    assert layer.norm_query is not None
    assert layer.norm_key is not None
    assert layer.norm_conv is not None
    assert layer.short_conv is not None
    gated, _ = engram_gate(
        hidden, torch.stack(keys, dim=2), value, layer.norm_query.weight, layer.norm_key.weight, 1e-20
    )
    conv = short_conv(gated, layer.norm_conv.weight, layer.short_conv.weight, 1e-5, 3, None)
    torch.testing.assert_close(layer(hidden, memory, None), gated + conv, rtol=0, atol=1e-12)


def test_documents_of_a_packed_sequence_do_not_reach_each_other() -> None:
    layer = open_conv(build())
    hidden, memory = inputs()
    ids = torch.tensor([[0] * 4 + [1] * 6] * B, dtype=torch.int32)
    changed = memory.clone()
    changed[:4] += 1.0
    before, after = layer(hidden, memory, ids), layer(hidden, changed, ids)
    assert torch.equal(before[4:], after[4:])
    assert not torch.equal(layer(hidden, memory, None)[4:], layer(hidden, changed, None)[4:])


def test_gate_mean_is_kept_per_stream_in_float32_without_a_graph() -> None:
    layer = build(conv=False, dtype=torch.float64)
    hidden, memory = inputs(torch.float64)
    assert layer.last_gate_mean is None
    update = layer(hidden, memory, None)
    value = layer.key_value(memory)[..., :C]
    gate_mean = (update / value.unsqueeze(2)).mean(dim=(0, 1, 3))
    assert layer.last_gate_mean is not None
    assert layer.last_gate_mean.dtype == torch.float32
    assert not layer.last_gate_mean.requires_grad
    torch.testing.assert_close(layer.last_gate_mean.double(), gate_mean, rtol=1e-6, atol=0)
    assert "last_gate_mean" not in layer.state_dict()


def test_without_the_gate_every_stream_gets_the_value() -> None:
    layer = build(gate=False, conv=False)
    hidden, memory = inputs()
    update = layer(hidden, memory, None)
    torch.testing.assert_close(update, layer.key_value(memory).unsqueeze(2).expand(T, B, M, C))
    assert layer.last_gate_mean is None


def test_bfloat16_layer_is_close_to_float64() -> None:
    layer = open_conv(build(dtype=torch.bfloat16))
    hidden, memory = inputs(torch.bfloat16)
    update = layer(hidden, memory, None)
    assert update.dtype == torch.bfloat16
    exact = build(dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    # bfloat16 keeps 8 bits (4e-3); projection, gated value, convolution and their sum each round once
    torch.testing.assert_close(update.double(), exact(hidden.double(), memory.double(), None), rtol=0.05, atol=0.05)


def test_zeroed_memory_gives_finite_gradients() -> None:
    layer = build()
    hidden, memory = inputs()
    memory = torch.zeros_like(memory).requires_grad_()
    hidden.requires_grad_()
    (hidden + layer(hidden, memory, None)).square().sum().backward()
    assert memory.grad is not None
    assert memory.grad.isfinite().all()
    assert memory.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
