"""Row Adam against torch.optim.Adam on the whole table as one dense weight."""

import numpy as np
import pytest
import torch

from engram_kernels.catch_up import CatchUp
from engram_megatron.optimizer.row_adam import RowAdam
from engram_megatron.tables.row_gradients import RowGradients
from engram_megatron.tables.row_layout import RowLayout
from engram_megatron.tables.table_shard import TableShard

ROWS, DIM = 3000, 5  # more rows than one task of the kernel
BETAS, EPS, LR = (0.9, 0.95), 1e-20, 1e-2


def _shard(dtype: str, num_rows: int = ROWS) -> TableShard:
    shard = TableShard(RowLayout(num_rows, 64, 1), 0, DIM, dtype)
    shard.initialize(seed=0, std=1.0)
    return shard


def _optimizer(shard: TableShard, eps: float = EPS) -> RowAdam:
    return RowAdam(shard, CatchUp(*BETAS, eps))


def _weights(optimizer: RowAdam) -> np.ndarray:
    return optimizer.shard.finished(optimizer.read_as_of)


def _gradients(step: int, dtype: str, magnitude: float = 1.0) -> RowGradients:
    """Rows of a moving window, so that rows are new, repeated, left alone for many steps, and never used."""
    rng = np.random.default_rng(step)
    window = ROWS // 3 * (step // 10 % 2) + rng.choice(ROWS // 2, 200, replace=False)
    return RowGradients(np.sort(window), (rng.standard_normal((200, DIM)) * magnitude).astype(dtype))


def _dense(gradients: RowGradients, scale: float) -> torch.Tensor:
    dense = torch.zeros(ROWS, DIM, dtype=torch.from_numpy(gradients.gradients).dtype)
    dense[torch.from_numpy(gradients.local_rows)] = torch.from_numpy(gradients.gradients) * scale
    return dense


def _bound(dtype: str, num_steps: int, lr: float, max_weight: float) -> float:
    """Rounding that two correct implementations may differ by, u = half an ulp of 1.

    Relative to the sums of absolute gradients, a step adds at most 4 roundings to m and to v; older ones fade with
    beta1 and beta2, so at most 4 / (1 - beta1) = 40 and 4 / (1 - beta2) = 80 of them live, of which the square root
    halves the latter; six more in the update: under 90 u. The update itself is at most 2 lr (Cauchy-Schwarz over the
    two moments: 1.17 lr, more only through the bias corrections). Subtracting from the weight adds u |w|. Twice, for
    two implementations.
    """
    u = float(np.finfo(dtype).eps) / 2
    return 2 * num_steps * (2 * lr * 90 * u + max_weight * u)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("eps", [EPS, 1e-8])
def test_forty_steps_equal_dense_adam_with_rows_left_alone(dtype: str, eps: float) -> None:
    shard = _shard(dtype)
    optimizer = _optimizer(shard, eps)
    weight = torch.nn.Parameter(torch.from_numpy(_weights(optimizer)))
    reference = torch.optim.Adam([weight], lr=LR, betas=BETAS, eps=eps)
    used: set[int] = set()
    for step in range(40):
        gradients, lr, scale = _gradients(step, dtype), LR / (1 + step % 3), 0.25 + step % 2
        used.update(gradients.local_rows.tolist())
        reference.param_groups[0]["lr"] = lr
        weight.grad = _dense(gradients, scale)
        reference.step()
        optimizer.step(gradients, lr, scale)
        bound = _bound(dtype, step + 1, LR, float(weight.detach().abs().max()))
        np.testing.assert_allclose(_weights(optimizer), weight.detach().numpy(), rtol=0, atol=bound)
    state = reference.state[weight]
    # Relative to the largest moment: the 40 u and 80 u of `_bound`.
    missed = (40 - shard.rows.last_step.astype(np.float64))[:, None]
    for ours, theirs in (
        (shard.rows.exp_avg * BETAS[0] ** missed, state["exp_avg"]),
        (shard.rows.exp_avg_sq * BETAS[1] ** missed, state["exp_avg_sq"]),
    ):
        np.testing.assert_allclose(
            ours, theirs.numpy(), rtol=0, atol=80 * np.finfo(dtype).eps * float(theirs.abs().max())
        )
    assert optimizer.catch_up.step == 40
    assert set(np.flatnonzero(shard.rows.last_step)) == used
    assert len(used) < ROWS, "no row was left untouched"


def test_rows_that_never_had_a_gradient_stay_bit_identical() -> None:
    shard = _shard("float32")
    optimizer = _optimizer(shard)
    before = _weights(optimizer)
    optimizer.step(RowGradients(np.array([7]), np.ones((1, DIM), np.float32)), LR)
    for _ in range(3):
        optimizer.step(RowGradients(np.array([], np.int64), np.empty((0, DIM), np.float32)), LR)
    others = np.arange(ROWS) != 7
    np.testing.assert_array_equal(_weights(optimizer)[others], before[others])
    # Constant decaying moments still move row 7: four steps against the gradient, none larger than lr but for rounding.
    moved = before[7] - _weights(optimizer)[7]
    assert (moved > 2 * LR).all()
    assert (moved < 4.01 * LR).all()


def test_row_left_alone_for_thousands_of_steps_comes_to_rest() -> None:
    shard = _shard("float32")
    optimizer = _optimizer(shard)
    optimizer.step(RowGradients(np.array([0]), np.full((1, DIM), 1e-3, np.float32)), LR)
    nothing = RowGradients(np.array([], np.int64), np.empty((0, DIM), np.float32))
    for _ in range(1000):
        optimizer.step(nothing, LR)
    at_rest = _weights(optimizer)[0]
    for _ in range(1500):
        optimizer.step(nothing, LR)
    np.testing.assert_array_equal(_weights(optimizer)[0], at_rest)
    optimizer.step(RowGradients(np.array([0]), np.zeros((1, DIM), np.float32)), LR)
    assert (shard.rows.exp_avg[0] == 0).all()
    assert (shard.rows.exp_avg_sq[0] == 0).all()
    np.testing.assert_array_equal(_weights(optimizer)[0], at_rest)


def test_touched_only_leaves_rows_without_a_gradient_as_they_are() -> None:
    shard = _shard("float32")
    optimizer = RowAdam(shard, CatchUp(*BETAS, EPS), touched_only=True)
    before = _weights(optimizer)
    optimizer.step(RowGradients(np.array([7]), np.ones((1, DIM), np.float32)), LR)
    after = _weights(optimizer)
    np.testing.assert_allclose(before[7] - after[7], LR, rtol=1e-5)
    moments = shard.rows.state.copy()
    optimizer.step(RowGradients(np.array([8]), np.ones((1, DIM), np.float32)), LR)
    np.testing.assert_array_equal(_weights(optimizer)[7], after[7])
    np.testing.assert_array_equal(shard.rows.state[7], moments[7])


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_update_does_not_depend_on_the_size_of_the_gradients(factor: float) -> None:
    """With an epsilon of 1e-20 Adam is invariant to the gradients' scale, also where their squares are 1e-24."""
    moved = []
    for magnitude in (1.0, factor):
        shard = _shard("float32")
        optimizer = _optimizer(shard)
        for step in range(3):
            optimizer.step(_gradients(step, "float32", magnitude), LR)
        moved.append(_weights(optimizer))
    # Scaling by a power of two rounds nothing, so only the epsilon shows: relative to a root of the second moment that
    # is at least 0.6 of the smallest gradient (0.05 g^2 / (1 - 0.95^3)), on updates of at most 2 lr in 3 steps.
    smallest = min(float(np.abs(_gradients(step, "float32").gradients).min()) for step in range(3))
    effect = EPS / (0.6 * smallest * min(factor, 1.0))
    np.testing.assert_allclose(moved[0], moved[1], rtol=1e-6, atol=3 * 2 * LR * effect)
    assert effect < 1e-3


def test_step_is_the_same_for_any_number_of_threads() -> None:
    import numba

    results = []
    threads = numba.get_num_threads()
    for number in (1, threads):
        numba.set_num_threads(number)
        shard = _shard("float32")
        optimizer = _optimizer(shard)
        for step in range(5):
            optimizer.step(_gradients(step, "float32"), LR)
        results.append((_weights(optimizer), optimizer.gradient_norm_squared(_gradients(0, "float32"))))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_gradient_norm_is_summed_in_float64() -> None:
    # In float32 the sum of these squares overflows to infinity.
    gradients = np.full((300, DIM), 1e19, np.float32)
    norm_squared = _optimizer(_shard("float32")).gradient_norm_squared(RowGradients(np.arange(300), gradients))
    assert norm_squared == pytest.approx(float((gradients.astype(np.float64) ** 2).sum()), rel=1e-13)


def test_shard_without_rows_takes_a_step() -> None:
    shard = TableShard(RowLayout(10, 10, 2), 1, DIM)
    optimizer = _optimizer(shard)
    optimizer.step(RowGradients(np.array([], np.int64), np.empty((0, DIM), np.float32)), LR)
    assert optimizer.catch_up.step == 1
