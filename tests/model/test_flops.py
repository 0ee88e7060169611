"""FLOPs by formula against torch's counter run over a plain PyTorch model of the same shapes (on the meta device)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny_shapes import tiny_shapes
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engram_megatron.config import HyperConnectionConfig, RunConfig
from engram_megatron.model.counts import count_parameters
from engram_megatron.model.flops import token_flops
from engram_megatron.presets import engram_27b, moe_27b

TOKENS = 256  # one sequence of `tiny_shapes`


def _weight(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta", requires_grad=True)


def _counted(function: Callable[[], Tensor], *, backward: bool = False) -> int:
    with FlopCounterMode(display=False) as counter:
        output = function()
        if backward:
            output.sum().backward()
    return int(counter.get_total_flops())


def _tokens(width: int) -> Tensor:
    return torch.empty(TOKENS, width, device="meta", requires_grad=True)


def _swiglu(x: Tensor, ffn: int) -> Tensor:
    gate, up = (x @ _weight(x.shape[-1], 2 * ffn)).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ _weight(ffn, x.shape[-1])


def _attention_projections(config: RunConfig) -> Tensor:
    """MLA's projections as DeepSeek-V2 writes them, without the core."""
    a, x = config.model.attention, _tokens(config.model.hidden_size)
    width, heads = config.model.hidden_size, a.num_heads
    if a.query_lora_rank is None:
        queries = x @ _weight(width, heads * (a.nope_head_dim + a.rope_head_dim))
    else:
        latent = x @ _weight(width, a.query_lora_rank)
        queries = latent @ _weight(a.query_lora_rank, heads * (a.nope_head_dim + a.rope_head_dim))
    compressed = x @ _weight(width, a.kv_lora_rank + a.rope_head_dim)
    keys_values = compressed[:, : a.kv_lora_rank] @ _weight(
        a.kv_lora_rank, heads * (a.nope_head_dim + a.value_head_dim)
    )
    return keys_values[:, : heads * a.value_head_dim] @ _weight(heads * a.value_head_dim, width) + queries.sum()


@pytest.mark.parametrize("query_lora_rank", [None, 48])
def test_attention_projections_match_a_counted_forward_pass(query_lora_rank: int | None) -> None:
    tiny = tiny_shapes()
    attention = replace(tiny.model.attention, query_lora_rank=query_lora_rank)
    tiny = replace(tiny, model=replace(tiny.model, attention=attention))
    counted = tiny.model.num_layers * _counted(lambda: _attention_projections(tiny))
    assert token_flops(tiny).attention_projections * TOKENS == counted


def test_causal_attention_is_half_of_the_counted_square() -> None:
    tiny = tiny_shapes()
    a = tiny.model.attention

    def square() -> Tensor:
        queries = torch.empty(a.num_heads, TOKENS, a.nope_head_dim + a.rope_head_dim, device="meta")
        values = torch.empty(a.num_heads, TOKENS, a.value_head_dim, device="meta")
        return (queries @ queries.transpose(1, 2)).softmax(dim=-1) @ values

    assert 2 * token_flops(tiny).attention_core * TOKENS == tiny.model.num_layers * _counted(square)


def test_feed_forwards_router_and_head_match_a_counted_forward_pass() -> None:
    tiny = tiny_shapes()
    model, moe = tiny.model, tiny.model.moe
    assert moe is not None
    width = model.hidden_size
    dense = _counted(lambda: _swiglu(_tokens(width), model.dense_ffn_size))
    expert = _counted(lambda: _swiglu(_tokens(width), moe.expert_ffn_size))  # one expert that sees every token
    layers = model.num_layers - 1
    flops = token_flops(tiny)
    assert flops.feed_forward * TOKENS == dense + layers * (moe.top_k + moe.num_shared_experts) * expert
    router = _counted(lambda: _tokens(width) @ _weight(width, moe.num_experts))
    assert flops.router * TOKENS == layers * router
    assert flops.head * TOKENS == _counted(lambda: _tokens(width) @ _weight(width, model.vocab_size))


def test_hyper_connections_match_a_counted_forward_pass() -> None:
    tiny = tiny_shapes()
    n, width = tiny.model.mhc.num_streams, tiny.model.hidden_size

    def sub_layer() -> Tensor:
        streams = _tokens(n * width)
        coefficients = streams @ _weight(n * width, n * n + 2 * n)
        pre, post, residual = coefficients.split([n, n, n * n], dim=-1)
        x = streams.view(TOKENS, n, width)
        hidden = torch.bmm(pre.unsqueeze(1), x)
        return torch.bmm(residual.reshape(TOKENS, n, n), x) + torch.bmm(post.unsqueeze(2), hidden)

    counted = 2 * tiny.model.num_layers * _counted(sub_layer)
    assert token_flops(tiny).hyper_connections * TOKENS == counted
    single = replace(tiny, model=replace(tiny.model, mhc=HyperConnectionConfig(num_streams=1)))
    assert token_flops(single).hyper_connections == 0


@pytest.mark.parametrize(
    ("gate", "conv", "multi_branch"), [(True, True, True), (False, True, True), (True, False, False)]
)
def test_engram_matches_a_counted_forward_pass(gate: bool, conv: bool, multi_branch: bool) -> None:
    tiny = tiny_shapes()
    assert tiny.engram is not None
    engram = replace(tiny.engram, gate=gate, conv=conv, multi_branch=multi_branch)
    width, streams = tiny.model.hidden_size, tiny.model.mhc.num_streams if multi_branch else 1

    def layer() -> Tensor:
        outputs = (1 + streams if gate else 1) * width
        key_value = _tokens(engram.memory_dim) @ _weight(engram.memory_dim, outputs)
        gated = key_value[:, :width].unsqueeze(1).expand(TOKENS, streams, width)
        if gate:
            hidden, keys = _tokens(streams * width), key_value[:, width:]
            scores = torch.bmm(hidden.view(TOKENS * streams, 1, width), keys.reshape(TOKENS * streams, width, 1))
            gated = torch.bmm(scores, gated.reshape(TOKENS * streams, 1, width)).view(TOKENS, streams, width)
        if conv:  # one tap after another: channel-wise products of TOKENS positions with a filter, as matrix products
            taps = gated.reshape(TOKENS, streams * width, 1).expand(-1, -1, engram.conv_kernel_size)
            filters = _weight(streams * width, engram.conv_kernel_size, 1)
            gated = torch.bmm(taps.transpose(0, 1), filters).view(TOKENS, streams, width)
        return gated

    flops = token_flops(replace(tiny, engram=engram)).engram
    assert flops * TOKENS == len(engram.layer_numbers) * _counted(layer)


def test_backward_pass_costs_twice_the_forward_pass() -> None:
    forward = _counted(lambda: _swiglu(_tokens(128), 384))
    both = _counted(lambda: _swiglu(_tokens(128), 384), backward=True)
    assert both == 3 * forward
    flops = token_flops(tiny_shapes())
    assert flops.forward_backward == 3 * flops.forward


def test_active_matrices_give_the_usual_six_flops_per_parameter() -> None:
    """6 * activated parameters, plus head, attention's core and stream mixing; vectors are 0.01 % of the parameters."""
    config = engram_27b()
    flops = token_flops(config)
    counts = count_parameters(config)
    mixing = flops.hyper_connections - 2 * counts.by_part["hyper-connections"]
    rest = flops.attention_core + mixing
    parameters = counts.activated + counts.by_part["output head"]
    assert flops.forward_backward - 3 * rest == pytest.approx(6 * parameters, rel=1e-3)


def test_multi_token_prediction_costs_a_layer_a_projection_and_the_head() -> None:
    plain = moe_27b()
    config = replace(plain, model=replace(plain.model, mtp=replace(plain.model.mtp, num_layers=1)))
    shallow = replace(plain, model=replace(plain.model, num_layers=plain.model.num_layers - 1))
    one_layer = token_flops(plain).forward - token_flops(shallow).forward
    width = plain.model.hidden_size
    extra = one_layer + 2 * 2 * width**2 + token_flops(plain).head
    assert token_flops(config).multi_token_prediction == extra
    assert token_flops(config).forward == token_flops(plain).forward + extra
