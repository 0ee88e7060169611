"""The plain definitions against other formulations: torch's own modules, the paper's formula, finite differences."""

import pytest
import torch
from torch import Tensor

from engram_kernels.reference import engram_gate, position_in_document, rms_norm, short_conv

T, B, M, C = 11, 2, 3, 8


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gate_inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(T, B, M, C), (T, B, M, C), (T, B, C), (M, C), (M, C)]
    return [draw(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]


def paper_gate(hidden: Tensor, key: Tensor, value: Tensor, wq: Tensor, wk: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The demo's order of operations: two norms, their product, the signed root, one stream at a time."""
    gates = []
    for m in range(hidden.shape[2]):
        query = torch.nn.functional.rms_norm(hidden[:, :, m], hidden.shape[-1:], wq[m], eps)
        normed_key = torch.nn.functional.rms_norm(key[:, :, m], key.shape[-1:], wk[m], eps)
        score = (query * normed_key).sum(dim=-1) / hidden.shape[-1] ** 0.5
        gates.append(torch.sigmoid(score.abs().clamp_min(1e-6).sqrt() * score.sign()))
    gate = torch.stack(gates, dim=2)
    return gate.unsqueeze(-1) * value.unsqueeze(2), gate


def cotangents() -> tuple[Tensor, Tensor]:
    return draw(T, B, M, C, seed=20), draw(T, B, M, seed=21)


@pytest.mark.parametrize("eps", [None, 1e-5])
def test_rms_norm_is_that_of_torch(eps: float | None) -> None:
    x, weight = draw(5, C), draw(C, seed=1)
    torch.testing.assert_close(rms_norm(x, weight, eps), torch.nn.functional.rms_norm(x, (C,), weight, eps))


def test_gate_and_its_gradients_are_those_of_the_demo() -> None:
    results = []
    for function in (engram_gate, paper_gate):
        inputs = gate_inputs()
        outputs = function(*inputs, 1e-6)
        torch.autograd.backward(outputs, cotangents())
        results.append([*outputs, *(x.grad for x in inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)  # float64, sums of 8 and 66 terms


def test_gate_gradients_agree_with_finite_differences() -> None:
    inputs = [x[:2].detach().requires_grad_() if x.dim() > 2 else x for x in gate_inputs()]
    assert torch.autograd.gradcheck(lambda *x: engram_gate(*x, 1e-6), inputs)


def test_gate_of_a_zero_score_is_one_half() -> None:
    hidden, key, value, wq, wk = gate_inputs()
    gated, gate = engram_gate(torch.zeros_like(hidden), key, value, wq, wk, None)
    assert (gate == 0.5).all()
    torch.testing.assert_close(gated, (0.5 * value).unsqueeze(2).expand_as(gated))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zeroed_tables_give_finite_gradients_and_still_teach_the_value(dtype: torch.dtype) -> None:
    hidden, key, value, wq, wk = gate_inputs(dtype)
    zero_key, zero_value = torch.zeros_like(key).requires_grad_(), torch.zeros_like(value).requires_grad_()
    gated, _ = engram_gate(hidden, zero_key, zero_value, wq, wk, 1e-20)
    gated.sum().backward()
    for x in (hidden, zero_key, wq, wk):
        assert x.grad is not None
        assert (x.grad == 0).all()
    assert zero_value.grad is not None
    assert (zero_value.grad == 0.5 * M).all()


@pytest.mark.parametrize("exponent", [-38, -30, -20, -15, -12, -10, -8, -6, -3, 0, 4, 8])
def test_gradients_are_finite_and_right_for_keys_of_every_size(exponent: int) -> None:
    size = 10.0**exponent
    results = []
    for dtype in (torch.float32, torch.float64):
        hidden, key, value, wq, wk = gate_inputs(torch.float32)
        inputs = [x.detach().to(dtype).requires_grad_() for x in (hidden, key * size, value, wq, wk)]
        gated, gate = engram_gate(*inputs, 1e-20)
        torch.autograd.backward([gated, gate], [g.to(dtype) for g in cotangents()])
        results.append([gate.detach().double(), *(x.grad.double() for x in inputs if x.grad is not None)])
    assert len(results[0]) == 6
    for narrow, wide in zip(*results, strict=True):
        assert narrow.isfinite().all()
        # float32 against float64: relative 1e-7 per operation, made larger where terms of a sum cancel
        torch.testing.assert_close(narrow, wide, rtol=1e-3, atol=1e-4 * float(wide.abs().max()))


def test_gradients_are_finite_for_subnormal_keys() -> None:
    # their values are not compared: float32 loses the sign of such a score, so the gate is 0.5 or 0.5 +- 2.5e-4
    hidden, key, value, wq, wk = gate_inputs(torch.float32)
    subnormal = (key.detach() * 1e-45).requires_grad_()
    torch.autograd.backward(engram_gate(hidden, subnormal, value, wq, wk, 1e-20), [g.float() for g in cotangents()])
    for x in (hidden, subnormal, value, wq, wk):
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_bfloat16_gate_computes_in_float32() -> None:
    inputs = gate_inputs(torch.bfloat16)
    gated, gate = engram_gate(*inputs, 1e-20)
    assert (gated.dtype, gate.dtype) == (torch.bfloat16, torch.float32)
    _, exact = engram_gate(*(x.double() for x in inputs), 1e-20)
    # scores near 0 have slope up to 500 in the score; those of this draw stay far from it
    torch.testing.assert_close(gate.double(), exact, rtol=0, atol=1e-5)


def conv_inputs(K: int = 4) -> list[Tensor]:
    return [x.requires_grad_() for x in (draw(T, B, M, C), draw(M, C, seed=1), draw(M * C, 1, K, seed=2))]


def torch_conv(value: Tensor, norm_weight: Tensor, conv_weight: Tensor, eps: float, dilation: int) -> Tensor:
    """nn.Conv1d as the demo calls it: channels first, padded on both sides, cropped."""
    T, B, M, C = value.shape
    K = conv_weight.shape[-1]
    normed = torch.cat([torch.nn.functional.rms_norm(value[:, :, m], (C,), norm_weight[m], eps) for m in range(M)], -1)
    out = torch.nn.functional.conv1d(
        normed.permute(1, 2, 0), conv_weight, padding=(K - 1) * dilation, dilation=dilation, groups=M * C
    )
    return torch.nn.functional.silu(out[..., :T]).permute(2, 0, 1).view(T, B, M, C)


@pytest.mark.parametrize(("kernel", "dilation"), [(4, 3), (1, 1), (2, 4), (4, 12)])
def test_short_conv_and_its_gradients_are_those_of_conv1d(kernel: int, dilation: int) -> None:
    results = []
    for documents in ("none", "one", "torch"):
        inputs = conv_inputs(kernel)
        if documents == "torch":
            out = torch_conv(*inputs, 1e-5, dilation)
        else:
            ids = torch.full((B, T), 7, dtype=torch.int32) if documents == "one" else None
            out = short_conv(*inputs, 1e-5, dilation, ids)
        out.backward(draw(T, B, M, C, seed=20))
        results.append([out, *(x.grad for x in inputs)])
    for ours, with_one_document, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(with_one_document, expected, rtol=1e-11, atol=1e-12)


def test_short_conv_of_packed_documents_is_that_of_each_alone() -> None:
    value, norm_weight, conv_weight = conv_inputs()
    ids = torch.tensor([[3] * 4 + [9] * 5 + [3] * 2, [1] * 1 + [2] * 10], dtype=torch.int32)
    packed = short_conv(value, norm_weight, conv_weight, 1e-5, 2, ids)
    for b, parts in enumerate([[(0, 4), (4, 9), (9, 11)], [(0, 1), (1, 11)]]):
        for start, end in parts:
            alone = short_conv(value[start:end, b : b + 1], norm_weight, conv_weight, 1e-5, 2, None)
            torch.testing.assert_close(packed[start:end, b : b + 1], alone, rtol=0, atol=1e-14)


def test_short_conv_does_not_carry_a_nan_into_the_next_document() -> None:
    value, norm_weight, conv_weight = (x.detach() for x in conv_inputs())
    value[:5] = float("nan")
    ids = torch.tensor([[0] * 5 + [1] * 6] * B)
    assert short_conv(value, norm_weight, conv_weight, 1e-5, 1, ids)[5:].isfinite().all()


def test_short_conv_looks_only_back() -> None:
    value, norm_weight, conv_weight = (x.detach() for x in conv_inputs())
    changed = value.clone()
    changed[6:] += 1.0
    before, after = (short_conv(v, norm_weight, conv_weight, 1e-5, 1, None) for v in (value, changed))
    assert torch.equal(before[:6], after[:6])
    assert not torch.equal(before[6:], after[6:])


def test_short_conv_of_zeros_has_finite_gradients() -> None:
    _, norm_weight, conv_weight = conv_inputs()
    value = torch.zeros(T, B, M, C, requires_grad=True)
    short_conv(value, norm_weight.float(), conv_weight.float(), 1e-20, 3, None).sum().backward()
    assert value.grad is not None
    assert value.grad.isfinite().all()


def test_position_in_document_starts_again_at_every_change() -> None:
    ids = torch.tensor([[4, 4, 4, 6, 6, 4, 4], [1, 2, 3, 3, 3, 3, 3]])
    assert position_in_document(ids).tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 0, 0, 1, 2, 3, 4]]


def test_no_positions_and_no_sequences_are_cases_too() -> None:
    for t, b in ((0, 2), (3, 0)):
        ids = torch.zeros(b, t, dtype=torch.int32)
        value = torch.zeros(t, b, M, C)
        assert short_conv(value, torch.ones(M, C), torch.ones(M * C, 1, 4), 1e-5, 3, ids).shape == value.shape
        gated, gate = engram_gate(value, value, value[:, :, 0], torch.ones(M, C), torch.ones(M, C), 1e-5)
        assert gated.shape == value.shape
        assert gate.shape == (t, b, M)
