"""mHC: the mappings, their limits, and one sub-layer against a plain reading of the paper's equations."""

import pytest
import torch

from engram_megatron.config import HyperConnectionConfig
from engram_megatron.model.hyper_connection import (
    HyperConnection,
    contract_streams,
    expand_streams,
    sinkhorn,
    stream_cosine,
)


def _mixing(init: str = "zero_bias") -> HyperConnection:
    config = HyperConnectionConfig(num_streams=4, init=init, mapping_dtype="float64")
    module = HyperConnection(config, hidden_size=6, home_stream=2, norm_eps=1e-20)
    module.reset_parameters(torch.Generator().manual_seed(0))
    return module


def test_sinkhorn_is_doubly_stochastic() -> None:
    logits = torch.randn(50, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    matrix = sinkhorn(logits, 20)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(50, 4, dtype=torch.float64), atol=1e-14, rtol=0)
    # Columns converge linearly: on standard normal logits 20 iterations leave about 1e-5, 40 about 1e-10.
    assert (matrix.sum(-2) - 1).abs().max() < 1e-4
    assert (sinkhorn(logits, 40).sum(-2) - 1).abs().max() < 1e-8


def test_sinkhorn_survives_logits_beyond_exp_range() -> None:
    matrix = sinkhorn(torch.tensor([[1000.0, 990.0], [995.0, 1000.0]]), 20)
    assert torch.isfinite(matrix).all()
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2))


def test_sub_layer_equals_the_equations_of_the_paper() -> None:
    module = _mixing()
    with torch.no_grad():
        module.bias.normal_(generator=torch.Generator().manual_seed(2))
        module.alpha.copy_(torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64))
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    output = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    flat = x.reshape(-1)
    normed = flat / (flat.square().mean()).sqrt()
    tilde = [module.mapping.weight[a:b] @ normed for a, b in ((0, 4), (4, 8), (8, 24))]
    pre = torch.sigmoid(0.5 * tilde[0] + module.bias[:4])
    post = 2 * torch.sigmoid(0.7 * tilde[1] + module.bias[4:8])
    res = torch.exp(0.9 * tilde[2].reshape(4, 4) + module.bias[8:].reshape(4, 4))
    for _ in range(20):
        res = res / res.sum(0, keepdim=True)
        res = res / res.sum(1, keepdim=True)

    hidden, mixing = module(x[None, None])
    merged = mixing.merge(x[None, None], output[None, None])
    # float64 with some hundred operations on numbers of order one
    torch.testing.assert_close(hidden[0, 0], pre @ x, atol=1e-13, rtol=0)
    torch.testing.assert_close(merged[0, 0], res @ x + post[:, None] * output, atol=1e-13, rtol=0)


def test_near_identity_reads_home_stream_and_keeps_streams_apart() -> None:
    module = _mixing("near_identity")
    x = torch.randn(3, 2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    hidden, mixing = module(x)
    home = torch.sigmoid(torch.tensor(3.0, dtype=torch.float64))
    others = torch.sigmoid(torch.tensor(-3.0, dtype=torch.float64))
    expected = home * x[..., 2, :] + others * (x[..., 0, :] + x[..., 1, :] + x[..., 3, :])
    torch.testing.assert_close(hidden, expected)
    assert (mixing.res_TBMM.diagonal(dim1=-2, dim2=-1) > 0.99).all()
    torch.testing.assert_close(mixing.post_TBM, torch.ones_like(mixing.post_TBM))


@pytest.mark.parametrize("init", ["near_identity", "zero_bias"])
def test_gradients_reach_every_parameter(init: str) -> None:
    module = _mixing(init)
    x = torch.randn(3, 2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    hidden, mixing = module(x)
    mixing.merge(x, hidden.tanh()).square().sum().backward()
    assert module.mapping.weight.grad is not None
    assert (module.mapping.weight.grad != 0).any(dim=1).all()
    assert (module.bias.grad != 0).all()
    # alpha multiplies phi x: with phi = 0 (near_identity) it has no gradient yet
    assert (module.alpha.grad != 0).all() == (init == "zero_bias")


def test_expand_then_contract_is_identity() -> None:
    hidden = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(7))
    streams = expand_streams(hidden, 4).unflatten(-1, (4, 6))
    torch.testing.assert_close(contract_streams(streams), hidden)
    assert float(stream_cosine(streams)) == pytest.approx(1.0, abs=1e-6)


def test_stream_cosine_of_orthogonal_streams_is_zero() -> None:
    assert float(stream_cosine(torch.eye(4)[None, None])) == pytest.approx(0.0, abs=1e-7)
