"""Added memory is silent at first, and all of it learns within three steps."""

from __future__ import annotations

import pytest
import torch
from tiny_shapes import tiny_shapes

from engram_megatron.model.engram_layer import EngramLayer
from engram_megatron.upgrade.new_memory import NewMemoryWeights

T, B = 12, 2
STEP_1 = {"memory"}
STEP_2 = STEP_1 | {"value", "key", "norm_query.weight", "norm_key.weight", "short_conv.weight"}
STEP_3 = STEP_2 | {"norm_conv.weight"}


@pytest.fixture
def layer() -> EngramLayer:
    """An Engram layer of engram_tiny with the weights of an upgrade."""
    config = tiny_shapes()
    assert config.engram is not None
    layer = EngramLayer(
        hidden_size=config.model.hidden_size,
        memory_dim=config.engram.memory_dim,
        num_streams=config.model.mhc.num_streams,
        conv_kernel_size=config.engram.conv_kernel_size,
        conv_dilation=config.engram.max_ngram_order,
        gate=True,
        conv=True,
        bias=False,
        norm_eps=config.engram.norm_eps,
        conv_norm_eps=config.engram.conv_norm_eps,
        init_std=config.model.init_std,
        dtype=torch.float32,
    )
    added = NewMemoryWeights(config, torch.float32)
    prefix = "decoder.layers.1.engram."
    layer.load_state_dict({n.removeprefix(prefix): added.read(n) for n in added.tensors if n.startswith(prefix)})
    return layer


def test_update_is_zero_and_gradients_arrive_step_by_step(layer: EngramLayer) -> None:
    generator = torch.Generator().manual_seed(0)
    width, streams = layer.hidden_size, layer.num_streams
    hidden = torch.randn(T, B, streams, width, generator=generator)
    memory = torch.nn.Parameter(torch.zeros(T, B, layer.key_value.in_features))
    wanted = torch.randn(hidden.shape, generator=generator)
    parameters = dict(layer.named_parameters()) | {"memory": memory}
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-3, eps=1e-20)
    for expected in (STEP_1, STEP_2, STEP_3):
        update = layer(hidden, memory, None)
        if expected is STEP_1:
            assert not update.any()
            assert torch.equal(hidden + update, hidden)
        optimizer.zero_grad()
        (update * wanted).sum().backward()
        gradients = {name: parameter.grad for name, parameter in parameters.items()}
        key_value = gradients.pop("key_value.weight")
        assert key_value is not None
        gradients |= {"value": key_value[:width], "key": key_value[width:]}
        assert {name for name, gradient in gradients.items() if gradient is not None and gradient.any()} == expected
        optimizer.step()
    with torch.no_grad():
        memory[T // 2] = 0  # rows that are used for the first time now
    optimizer.zero_grad()
    (layer(hidden, memory, None) * wanted).sum().backward()
    assert memory.grad is not None
    late, others = memory.grad[T // 2].norm(), memory.grad[T // 2 + 1].norm()
    assert 0 < late < 10 * others
