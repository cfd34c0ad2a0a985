"""Optimizer updates and gradient clipping: against the twin, against the formulas in float64, and what they refuse."""

from __future__ import annotations

import _thread
import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
from conftest import TAILS, assert_close, assert_same_bits, assert_unchanged, every_magnitude, snapshot

import fastnorm as fn
from fastnorm import _runtime
from fastnorm._kernels import checks
from fastnorm.reference import updates as reference

BACKENDS = pytest.mark.parametrize("backend", [fn, reference], ids=["compiled", "reference"])

# -- the formulas, written once more -----------------------------------------------------------------------------------
# Each takes float64 arrays and returns the new ones and, for each, the sum of the magnitudes of its terms: what an
# error of one rounding in every term amounts to.


def plain_momentum(a, step, *, lr, momentum=0.9, dampening=0.0, nesterov=False, weight_decay=0.0, maximize=False):
    p, grad = a["params"], a["grads"]
    g = (-1 if maximize else 1) * grad + weight_decay * p
    g_terms = abs(grad) + weight_decay * abs(p)
    v = momentum * a["velocities"] + (1 - dampening) * g
    v_terms = momentum * abs(a["velocities"]) + abs(1 - dampening) * g_terms
    d, d_terms = (g + momentum * v, g_terms + momentum * v_terms) if nesterov else (v, v_terms)
    return {"params": (p - lr * d, abs(p) + lr * d_terms), "velocities": (v, v_terms)}


def plain_rmsprop(a, step, *, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False,
                  eps_inside_sqrt=False, maximize=False):
    p, grad = a["params"], a["grads"]
    g = (-1 if maximize else 1) * grad + weight_decay * p
    g_terms = abs(grad) + weight_decay * abs(p)
    s = alpha * a["square_avgs"] + (1 - alpha) * g * g
    s_terms = s + 2 * (1 - alpha) * abs(g) * g_terms
    out = {"square_avgs": (s, s_terms)}
    variance, variance_terms = s, s_terms
    if centered:
        m = alpha * a["grad_avgs"] + (1 - alpha) * g
        m_terms = alpha * abs(a["grad_avgs"]) + (1 - alpha) * g_terms
        out["grad_avgs"] = m, m_terms
        variance, variance_terms = s - m * m, s_terms + 2 * abs(m) * m_terms
    root = np.sqrt(variance + eps) if eps_inside_sqrt else np.sqrt(variance) + eps
    d = g / root
    d_terms = g_terms / root + abs(d) * variance_terms / (2 * variance)
    if momentum:
        d_terms = momentum * abs(a["momentum_buffers"]) + d_terms
        d = momentum * a["momentum_buffers"] + d
        out["momentum_buffers"] = d, d_terms
    out["params"] = p - lr * d, abs(p) + lr * d_terms
    return out


def plain_adam(a, step, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled_weight_decay=False,
               amsgrad=False, epsilon_hat=False, maximize=False):
    p, grad = a["params"], a["grads"]
    p_terms = abs(p)
    g, g_terms = (-1 if maximize else 1) * grad, abs(grad)
    if decoupled_weight_decay:
        p, p_terms = p - lr * weight_decay * p, p_terms + lr * weight_decay * abs(p)
    else:
        g, g_terms = g + weight_decay * p, g_terms + weight_decay * abs(p)
    m = betas[0] * a["exp_avgs"] + (1 - betas[0]) * g
    m_terms = betas[0] * abs(a["exp_avgs"]) + (1 - betas[0]) * g_terms
    v = betas[1] * a["exp_avg_sqs"] + (1 - betas[1]) * g * g
    v_terms = v + 2 * (1 - betas[1]) * abs(g) * g_terms
    out = {"exp_avgs": (m, m_terms), "exp_avg_sqs": (v, v_terms)}
    if amsgrad:
        v = np.maximum(v, a["max_exp_avg_sqs"])
        out["max_exp_avg_sqs"] = v, np.maximum(v, v_terms)
    m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    root = np.sqrt(v_hat) + (eps / math.sqrt(1 - betas[1] ** step) if epsilon_hat else eps)
    d = m_hat / root
    d_terms = m_terms / (1 - betas[0] ** step) / root + abs(d) * v_terms / (2 * v)
    out["params"] = p - lr * d, p_terms + lr * d_terms
    return out


def plain_adagrad(a, step, *, lr=1e-2, lr_decay=0.0, eps=1e-10, weight_decay=0.0, maximize=False):
    p, grad = a["params"], a["grads"]
    g = (-1 if maximize else 1) * grad + weight_decay * p
    g_terms = abs(grad) + weight_decay * abs(p)
    s = a["state_sums"] + g * g
    s_terms = s + 2 * abs(g) * g_terms
    d = g / (np.sqrt(s) + eps)
    d_terms = g_terms / (np.sqrt(s) + eps) + abs(d) * s_terms / (2 * s)
    rate = lr / (1 + (step - 1) * lr_decay)
    return {"params": (p - rate * d, abs(p) + rate * d_terms), "state_sums": (s, s_terms)}


# -- every combination of options --------------------------------------------------------------------------------------


class Case(NamedTuple):
    function: str
    options: dict

    @property
    def plain(self):
        return globals()["plain_" + self.function.removesuffix("_step")]

    @property
    def takes_step(self):
        return self.function in ("adam_step", "adagrad_step")

    @property
    def buffers(self):
        o = self.options
        return {"momentum_step": ["velocities"], "adagrad_step": ["state_sums"],
                "rmsprop_step": ["square_avgs"] + ["grad_avgs"] * bool(o.get("centered"))
                + ["momentum_buffers"] * bool(o.get("momentum")),
                "adam_step": ["exp_avgs", "exp_avg_sqs"] + ["max_exp_avg_sqs"] * bool(o.get("amsgrad")),
                }[self.function]

    def call(self, arguments, step=1, backend=fn):
        extra = {"step": step} if self.takes_step else {}
        return getattr(backend, self.function)(**arguments, **self.options, **extra)


def product(function, **choices):
    for values in itertools.product(*choices.values()):
        yield Case(function, dict(zip(choices, values, strict=True)))


BOTH = [False, True]
CASES = [
    *product("momentum_step", lr=[0.1], momentum=[0.0, 0.9], dampening=[0.0, 0.3], nesterov=BOTH,
             weight_decay=[0.0, 0.02], maximize=BOTH),
    *product("rmsprop_step", lr=[0.1], alpha=[0.9], momentum=[0.0, 0.8], centered=BOTH, eps_inside_sqrt=BOTH,
             weight_decay=[0.0, 0.02], maximize=BOTH, eps=[1e-3]),
    *product("adam_step", lr=[0.1], betas=[(0.8, 0.95)], amsgrad=BOTH, decoupled_weight_decay=BOTH, epsilon_hat=BOTH,
             weight_decay=[0.0, 0.02], maximize=BOTH, eps=[1e-3]),
    *product("adagrad_step", lr=[0.1], lr_decay=[0.0, 0.05], weight_decay=[0.0, 0.02], maximize=BOTH),
]
# One of each loop that is compiled for itself: for the tests whose subject is not the options.
LOOPS = [
    Case("momentum_step", {"lr": 0.1, "nesterov": True, "weight_decay": 0.02}),
    Case("rmsprop_step", {"lr": 0.1}),
    Case("rmsprop_step", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02}),
    Case("rmsprop_step", {"lr": 0.1, "centered": True}),
    Case("rmsprop_step", {"lr": 0.1, "centered": True, "momentum": 0.9, "eps_inside_sqrt": True}),
    Case("adam_step", {"lr": 0.1}),
    Case("adam_step", {"lr": 0.1, "amsgrad": True, "weight_decay": 0.02}),
    Case("adagrad_step", {"lr": 0.1}),
]
ONE_EACH = [LOOPS[0], LOOPS[4], LOOPS[6], LOOPS[7]]


def case_id(case):
    return case.function.removesuffix("_step") + "".join(
        f"-{name}{'' if value is True else value}" for name, value in case.options.items() if value and name != "lr")


def all_cases(cases=CASES):
    return pytest.mark.parametrize("case", cases, ids=case_id)


def random_arguments(case, shape, dtype, rng):
    """Parameters, gradients and buffers of order one; what stands under a root is away from zero."""
    arguments = {"params": rng.standard_normal(shape), "grads": rng.standard_normal(shape)}
    for name in case.buffers:
        under_root = name in ("square_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_sums")
        arguments[name] = rng.uniform(0.5, 1.5, shape) if under_root else rng.uniform(-0.6, 0.6, shape)
    return {name: np.asarray(a, dtype) for name, a in arguments.items()}


def copies(arguments):
    return {name: [b.copy() for b in a] if isinstance(a, list) else a.copy() for name, a in arguments.items()}


def assert_step_close(case, before, after, expected, step=1):
    """One step from ``before``: at most 8 roundings of the terms between kernel and twin (7 operations to an element of
    params, and the twin's last rounding).
    """
    scales = case.plain({name: a.astype(np.float64) for name, a in before.items()}, step, **case.options)
    for name, (_, terms) in scales.items():
        assert_close(after[name], expected[name], ulps=8, scale=terms)


# -- against the twin --------------------------------------------------------------------------------------------------


@all_cases()
def test_step_equals_twin(case, dtype, rng):
    before = random_arguments(case, (3, 67), dtype, rng)
    after, expected = copies(before), copies(before)
    assert case.call(after, step=3) is None
    assert case.call(expected, step=3, backend=reference) is None
    assert_step_close(case, before, after, expected, step=3)
    np.testing.assert_array_equal(after["grads"], before["grads"])


@all_cases(LOOPS)
def test_step_equals_twin_at_every_level_and_length(case, level, dtype, rng):
    for n in [0, *TAILS, 16383, 16385]:
        before = random_arguments(case, n, dtype, rng)
        after, expected = copies(before), copies(before)
        case.call(after)
        case.call(expected, backend=reference)
        assert_step_close(case, before, after, expected)


@all_cases(LOOPS)
@pytest.mark.parametrize("shape", [(1,), (5, 7), (2, 3, 4, 5), (4, 0, 3)], ids=str)
def test_step_equals_twin_in_every_layout(case, layout, dtype, shape, rng):
    """Every array in the layout, and each one alone in the layout among C-contiguous ones."""
    before = random_arguments(case, shape, dtype, rng)
    expected = copies(before)
    case.call(expected, backend=reference)
    for odd in [None, *before]:
        after = {name: layout(a.copy()) if odd in (None, name) else a.copy() for name, a in before.items()}
        addresses = {name: a.__array_interface__["data"] for name, a in after.items()}
        case.call(after)
        assert_step_close(case, before, after, expected)
        assert addresses == {name: a.__array_interface__["data"] for name, a in after.items()}
        np.testing.assert_array_equal(after["grads"], before["grads"])


def test_gaps_of_a_strided_array_are_left_alone(rng):
    large = rng.standard_normal((8, 8))
    before = large.copy()
    fn.momentum_step(large[::2, ::2], np.ones((4, 4)), np.zeros((4, 4)), lr=1.0)
    before[::2, ::2] -= 1.0
    np.testing.assert_array_equal(large, before)


def mixed_lists(case, rng, sizes=((40, 50), (3,), (), (0, 4), (140_001,), (2, 3, 4, 5), (16_390,))):
    """Lists whose parameters alternate in dtype."""
    items = [random_arguments(case, shape, (np.float32, np.float64)[i % 2], rng) for i, shape in enumerate(sizes)]
    return items, {name: [item[name] for item in items] for name in items[0]}


@all_cases(LOOPS)
def test_list_of_mixed_dtypes_and_layouts(case, level, threads, layout, rng):
    items, lists = mixed_lists(case, rng, ((20, 30), (3,), (), (0, 4), (2_001,), (2, 3, 4, 5), (1,)))
    after = {name: [layout(a.copy()) if i % 3 == 0 else a.copy() for i, a in enumerate(arrays)]
             for name, arrays in lists.items()}
    case.call(after)
    for i, before in enumerate(items):
        expected = copies(before)
        case.call(expected, backend=reference)
        assert_step_close(case, before, {name: arrays[i] for name, arrays in after.items()}, expected)


@all_cases(ONE_EACH)
def test_list_equals_its_parts_and_twin_takes_lists(case, rng):
    items, lists = mixed_lists(case, rng)
    together, twin = copies(lists), {name: tuple(arrays) for name, arrays in copies(lists).items()}
    case.call(together)
    case.call(twin, backend=reference)
    for i, item in enumerate(items):
        alone, expected = copies(item), copies(item)
        case.call(alone)
        case.call(expected, backend=reference)
        for name in item:
            np.testing.assert_array_equal(together[name][i], alone[name])
            np.testing.assert_array_equal(twin[name][i], expected[name])


def moved_by(a, n):
    """A copy at an address n elements further from a vector's boundary than another copy."""
    room = np.empty(n + a.size, a.dtype)
    room[n:] = a.ravel()
    return room[n:].reshape(a.shape)


@all_cases(LOOPS)
def test_threads_and_alignment_do_not_change_a_bit(case, level, rng):
    _, lists = mixed_lists(case, rng)
    expected = copies(lists)
    before = fn.get_num_threads()
    try:
        fn.set_num_threads(1)
        case.call(expected)
        for n in (2, 3, 7):
            fn.set_num_threads(n)
            after = {name: [moved_by(a, i + n) for i, a in enumerate(arrays)] for name, arrays in lists.items()}
            case.call(after)
            for name, arrays in expected.items():
                for a, b in zip(after[name], arrays, strict=True):
                    np.testing.assert_array_equal(a, b)
    finally:
        fn.set_num_threads(before)


@all_cases([*LOOPS, *(case._replace(options={**case.options, "eps": 0.0}) for case in LOOPS[1:]),
            Case("momentum_step", {"lr": 1e-3, "momentum": 0.5, "dampening": 0.5})])
def test_loops_for_subnormals_give_the_same_bits(case, assume_subnormals, rng):
    arguments = {name: every_magnitude(100_000, rng) for name in ("params", "grads", *case.buffers)}
    results = []
    for slow in (0, 1):
        assume_subnormals(slow)
        after = copies(arguments)
        case.call(after)
        results.append(after)
    for name, a in results[0].items():
        assert_same_bits(a, results[1][name])


@pytest.mark.parametrize("power", [1.0, 2.0**-101, 2.0**100])
@pytest.mark.parametrize("sign", [1, -1])
def test_loops_for_subnormals_round_once(assume_subnormals, power, sign):
    # p + half an ulp (1 - 2**-46) is nearer to p; rounded to double first it lies in the middle, and would end at the
    # even neighbor.
    n, odd, results = 1000, 1 + 2.0**-23, []
    for slow in (0, 1):
        assume_subnormals(slow)
        p = np.full(n, sign * power * odd, np.float32)
        g = np.full(n, -sign * power * (1 - 2.0**-23) * 2.0**-24, np.float32)
        g[:64] = 1e-45
        fn.momentum_step([p], [g], None, lr=odd, momentum=0.0)
        results.append(p[64:])
    np.testing.assert_array_equal(results[0], results[1])
    if _runtime.kernels.level != "baseline":  # which may round twice
        assert (results[0] == np.float32(sign * power * odd)).all()


@all_cases(ONE_EACH)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_the_twins(case, level, dtype, value, rng):
    for name in ("params", "grads", *case.buffers):
        before = random_arguments(case, 40, dtype, rng)
        before[name][[0, 17, 39]] = value
        after, expected = copies(before), copies(before)
        case.call(after)
        case.call(expected, backend=reference)
        for other in before:
            np.testing.assert_array_equal(np.isnan(after[other]), np.isnan(expected[other]))
            np.testing.assert_allclose(after[other], expected[other], rtol=64 * np.finfo(dtype).eps,
                                       atol=64 * np.finfo(dtype).eps)


def test_weight_decay_of_zero_does_not_look_at_the_parameter(level, dtype):
    p, v = np.full(9, np.inf, dtype), np.zeros(9, dtype)
    fn.momentum_step(p, np.ones(9, dtype), v, lr=0.5)
    np.testing.assert_array_equal(p, np.inf)
    np.testing.assert_array_equal(v, 1)


def test_amsgrad_keeps_nan(level, dtype):
    """A NaN in either of the two running quantities stays."""
    p, m, v, v_max, g = (np.zeros(3, dtype) for _ in range(5))
    v[0] = v_max[1] = np.nan
    fn.adam_step(p, g, m, v, step=1, amsgrad=True, max_exp_avg_sqs=v_max)
    np.testing.assert_array_equal(np.isnan(v_max), [True, True, False])
    np.testing.assert_array_equal(np.isnan(p), [True, True, False])


def test_centered_rmsprop_clamps_a_negative_variance(level, dtype):
    """Averages that say |mean| > root mean square, as rounding may leave them: the variance is 0, not NaN."""
    p, g, s, m = (np.full(5, x, dtype) for x in (1.0, 1.0, 1.0, 2.0))
    twin = [a.copy() for a in (p, g, s, m)]
    fn.rmsprop_step(p, g, s, lr=0.5, eps=0.25, centered=True, grad_avgs=m)
    reference.rmsprop_step(*twin[:3], lr=0.5, eps=0.25, centered=True, grad_avgs=twin[3])
    np.testing.assert_array_equal(p, 1.0 - 0.5 / 0.25)
    np.testing.assert_array_equal(p, twin[0])


def test_centered_rmsprop_in_float32_with_a_steady_gradient(level):
    """The variance is a small difference of large averages: one step still agrees with float64 to a few ulp."""
    rng = np.random.default_rng(1)
    g = (100 + 0.01 * rng.standard_normal(257)).astype(np.float32)
    m = np.full(257, 100, np.float32)
    s = np.nextafter(m * m, np.float32(np.inf))
    p, expected = np.ones(257, np.float32), np.ones(257, np.float32)
    twin = s.copy(), m.copy()
    fn.rmsprop_step(p, g, s, lr=1.0, centered=True, grad_avgs=m)
    reference.rmsprop_step(expected, g, twin[0], lr=1.0, centered=True, grad_avgs=twin[1])
    assert_close(p, expected, ulps=4, scale=1 + abs(expected.astype(np.float64)))


# -- options -----------------------------------------------------------------------------------------------------------


def test_momentum_without_velocities_is_the_same_update(level, dtype, rng):
    for nesterov in BOTH:
        p, g = rng.standard_normal((2, 33)).astype(dtype)
        q, twin, v = p.copy(), p.copy(), np.zeros(33, dtype)
        options = {"lr": 0.1, "momentum": 0.0, "dampening": 0.25, "nesterov": nesterov, "weight_decay": 0.1}
        fn.momentum_step(p, g, None, **options)
        fn.momentum_step(q, g, v, **options)
        reference.momentum_step(twin, g, None, **options)
        np.testing.assert_array_equal(p, q)
        assert_close(p, twin, ulps=8, scale=1 + abs(twin))
        assert np.all(v != 0)


@BACKENDS
def test_optional_buffers_with_their_flag_off_are_left_alone(backend, rng):
    p, g, s = np.ones(5), np.ones(5), np.zeros(5)
    spare = [rng.standard_normal(5) for _ in range(2)]
    before = snapshot(*spare)
    for a in spare:
        a.flags.writeable = False  # not written, so this is no reason to refuse them
    backend.rmsprop_step(p, g, s, momentum_buffers=spare[0], grad_avgs=spare[1])
    backend.adam_step(p, g, s, np.zeros(5), step=1, max_exp_avg_sqs=spare[0])
    assert_unchanged(before, *spare)


def test_numbers_of_every_kind_are_taken(rng):
    p, g, m, v = (rng.standard_normal(5) ** 2 for _ in range(4))
    fn.adam_step(p, g, m, v, step=np.int64(2), lr=np.float32(0.5), betas=[0, np.float64(0.5)], eps=0, weight_decay=1,
                 amsgrad=np.False_)
    fn.adam_step(p, g, m, v, step=10**400)  # every bias correction is 1 by then
    assert np.isfinite(p).all()


def test_read_only_and_shared_gradients_are_fine(rng):
    g = rng.standard_normal(6)
    g.flags.writeable = False
    p, v = [np.ones(6), np.ones(6)], [np.zeros(6), np.zeros(6)]
    fn.momentum_step(p, [g, g], v, lr=0.1)
    np.testing.assert_array_equal(p[0], p[1])
    np.testing.assert_array_equal(p[0], 1 - 0.1 * g)


def test_columns_of_one_array_are_separate_parameters(rng):
    """Ranges that meet without a shared byte pass: the exact test decides."""
    block, g = rng.standard_normal((6, 4)), rng.standard_normal((6, 4))
    expected = block - 0.5 * g
    fn.momentum_step(list(block.T), list(g.T), None, lr=0.5, momentum=0.0)
    np.testing.assert_array_equal(block, expected)


@BACKENDS
def test_empty_lists_do_nothing(backend):
    backend.momentum_step([], [], None, lr=0.1, momentum=0)
    backend.rmsprop_step([], [], [])
    backend.adam_step((), [], (), [], step=1)
    backend.adagrad_step([], [], [], step=1)
    assert backend.clip_grad_norm([], 1.0) == 0.0


def test_subclasses_and_permuted_blocks(tmp_path, rng):
    """A memory map is updated in its file; equal permutations of contiguous blocks are updated where they are."""
    file = np.memmap(tmp_path / "w", np.float64, "w+", shape=(3, 4))
    file[...] = 1.0
    fn.momentum_step(file, np.ones((3, 4)), np.zeros((3, 4)), lr=0.25)
    np.testing.assert_array_equal(file, 0.75)
    permuted = [rng.standard_normal((2, 3, 4, 5)).transpose(0, 3, 1, 2) for _ in range(4)]
    arguments = tuple((f"argument{i}", [a], True) for i, a in enumerate(permuted))
    assert checks.optimizer_lists(arguments) == tuple((a,) for a in permuted)
    permuted[1] = permuted[1].copy(order="C")
    assert checks.optimizer_lists((*arguments[:3], ("argument3", [permuted[1]], True))) is None


# -- trajectories ------------------------------------------------------------------------------------------------------


@all_cases()
def test_100_steps_against_the_formulas(case, dtype):
    """Kernel and twin after 100 steps from zero buffers. At most 10 roundings a step and no step magnifies an error:
    1000 units of rounding of the largest value on the way.
    """
    rng = np.random.default_rng(7)
    n = 21
    start = {name: np.zeros(n, dtype) for name in case.buffers} | {"params": rng.standard_normal(n).astype(dtype)}
    target = rng.standard_normal(n)
    exact = {name: a.astype(np.float64) for name, a in start.items()}
    runs = [(fn, copies(start)), (reference, copies(start))]
    largest = {name: np.zeros(n) for name in start}
    for step in range(1, 101):
        exact["grads"] = (rng.standard_normal(n) + 0.5 * np.sign(target)).astype(dtype).astype(np.float64)
        exact |= {name: value for name, (value, _) in case.plain(exact, step, **case.options).items()}
        for name in start:
            largest[name] = np.maximum(largest[name], abs(exact[name]))
        for backend, arguments in runs:
            case.call(arguments | {"grads": exact["grads"].astype(dtype)}, step=step, backend=backend)
    for _, arguments in runs:
        for name in start:
            assert_close(arguments[name], exact[name].astype(dtype), ulps=1000, scale=largest[name])


# -- clipping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0,), (1,), (5, 7), (2, 3, 4, 5), (16_385,), (40_000,)], ids=str)
def test_clip_equals_twin(level, dtype, layout, shape, rng):
    before = rng.standard_normal(shape).astype(dtype)
    for max_norm in (0.0, 0.5, 1e6, np.inf):
        g, expected = layout(before.copy()), before.copy()
        norm = fn.clip_grad_norm(g, max_norm)
        assert type(norm) is float
        # float64 sums of nonnegative terms: n roundings at most, sqrt(n) likely; far fewer with 32 partial sums
        assert norm == pytest.approx(reference.clip_grad_norm(expected, max_norm), rel=1e-13, abs=0)
        assert_close(g, expected, ulps=3)


def test_clip_of_exact_data_is_exact(level, threads, dtype):
    """Sums of squares of small integers are exact in any order."""
    g = [np.full(s, v, dtype) for s, v in ((100_000, 2), (33, 4), (75_000 - 33, 4), ((), 3), (0, 5))]
    assert fn.clip_grad_norm(g, np.inf) == math.sqrt(100_000 * 4 + 75_000 * 16 + 9)


def test_threads_and_alignment_do_not_change_a_bit_of_clipping(level, rng):
    grads = [rng.standard_normal(n).astype((np.float32, np.float64)[i % 2])
             for i, n in enumerate([5, 70_000, 1, 16_384, 0, 50_001, 16_385, 16_390, 32_780])]
    before = fn.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 7):
            fn.set_num_threads(n)
            clipped = [moved_by(a, i + n) for i, a in enumerate(grads)]
            results.append((fn.clip_grad_norm(clipped, 1.5), clipped))
    finally:
        fn.set_num_threads(before)
    for norm, clipped in results:
        assert norm == results[0][0]
        for a, b in zip(clipped, results[0][1], strict=True):
            np.testing.assert_array_equal(a, b)
    assert math.sqrt(sum(np.sum(a.astype(np.float64) ** 2) for a in results[0][1])) == pytest.approx(1.5, rel=1e-6)


@BACKENDS
def test_clip_of_nonfinite_gradients(level, dtype, backend):
    """As torch.nn.utils.clip_grad_norm_ with error_if_nonfinite=False."""
    g = [np.array([1, 2], dtype), np.array([np.nan, 3], dtype)]
    assert math.isnan(backend.clip_grad_norm(g, 1.0))
    assert all(np.isnan(a).all() for a in g)
    g = [np.array([1, 2], dtype), np.array([-np.inf, 3], dtype)]
    assert backend.clip_grad_norm(g, 1.0) == math.inf
    np.testing.assert_array_equal(g, [[0, 0], [np.nan, 0]])
    g = [np.array([1, np.inf], dtype)]
    assert backend.clip_grad_norm(g, math.inf) == math.inf
    np.testing.assert_array_equal(g, [[1, np.inf]])


@BACKENDS
def test_clip_to_infinity_measures_read_only_arrays(backend):
    g = np.array([3.0, 4.0])
    g.flags.writeable = False
    assert backend.clip_grad_norm([g, g], math.inf) == math.sqrt(50)


# -- values that are not finite ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [0, *TAILS, 16_384, 16_385, 16_400, 40_000])
def test_one_value_that_is_not_finite_is_found_anywhere(level, dtype, n, rng):
    """At every position of short arrays, and around the ends of tiles and vectors of long ones."""
    largest = np.finfo(dtype).max
    a = moved_by(rng.choice(np.array([largest, -largest, 0.0, np.finfo(dtype).smallest_subnormal], dtype), n), 3)
    assert fn.all_finite(a)
    ends = {i + d for i in (0, 16_384, 32_768, n) for d in range(-17, 18)}
    for at in range(n) if n <= 257 else sorted(i for i in ends if 0 <= i < n):
        for value in (np.nan, -np.nan, np.inf, -np.inf):
            kept, a[at] = a[at], value
            assert fn.all_finite(a) is False
            a[at] = kept
    assert fn.all_finite(a) is True


@BACKENDS
def test_lists_are_searched_to_their_end(level, threads, layout, backend, rng):
    arrays = [layout(rng.standard_normal(shape).astype((np.float32, np.float64)[i % 2]))
              for i, shape in enumerate([(3, 5), (0, 4), (300, 301), (2, 3, 4, 5)])] + [np.array(1.0)]
    assert backend.all_finite(arrays) is True
    for a in arrays:
        for at in list(np.ndindex(a.shape))[::7919]:
            kept, a[at] = a[at], np.inf
            assert backend.all_finite(arrays) is False
            a[at] = kept
    assert backend.all_finite([]) is True


@BACKENDS
def test_finite_arrays_may_be_read_only_and_listed_twice(backend):
    a = frozen(3)
    assert backend.all_finite([a, a]) is True
    assert backend.all_finite(a) is True


@BACKENDS
@pytest.mark.parametrize(("arrays", "message"), [
    (3.0, "arrays: expected an array or a list of arrays, got float"),
    ([np.ones(3), np.ones(3, int)], "arrays[1]: expected dtype float32 or float64, got int64"),
    ([[1.0]], "arrays[0]: expected a numpy.ndarray, got list"),
], ids=["number", "int64", "list"])
def test_what_all_finite_refuses(backend, arrays, message):
    with pytest.raises(TypeError) as caught:
        backend.all_finite(arrays)
    assert message in str(caught.value)


# -- what they refuse --------------------------------------------------------------------------------------------------


def frozen(shape):
    a = np.ones(shape)
    a.flags.writeable = False
    return a


def adam_arguments():
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    return {name: [np.ones((2, 3)), np.ones(4)] for name in names} | {"step": 1}


def momentum_arguments():
    return {name: np.ones(4) for name in ("params", "grads", "velocities")} | {"lr": 0.1}


def rmsprop_arguments():
    return {name: [np.ones(4)] for name in ("params", "grads", "square_avgs")}


def adagrad_arguments():
    return {name: np.ones(4) for name in ("params", "grads", "state_sums")} | {"step": 1}


def clip_arguments():
    return {"grads": [np.ones(4), np.ones((2, 3))], "max_norm": 1.0}


# function, argument, bad value (or a function from the other arguments to it), exception, part of the message
REFUSED = [
    # lists
    ("adam_step", "params", {"w": np.ones(4)}, TypeError, "params: expected an array or a list of arrays, got dict"),
    ("adam_step", "params", lambda a: (x for x in a["params"]), TypeError,
     "params: expected an array or a list of arrays, got generator"),
    ("adam_step", "params", None, TypeError, "params: expected an array or a list of arrays, got NoneType"),
    ("adam_step", "grads", lambda a: (x for x in a["grads"]), TypeError,
     "grads: expected a list, as params is, of arrays, got generator"),
    ("adam_step", "grads", lambda a: a["grads"][0], TypeError,
     "grads: expected a list, as params is, of arrays, got ndarray"),
    ("adam_step", "exp_avgs", lambda a: a["exp_avgs"][:1], ValueError,
     "exp_avgs: expected 2 arrays as in params, got 1"),
    ("adam_step", "grads", [], ValueError, "grads: expected 2 arrays as in params, got 0"),
    ("momentum_step", "grads", lambda a: [a["grads"]], TypeError, "grads: expected a numpy.ndarray, got list"),
    # arrays
    ("adam_step", "params", lambda a: [a["params"][0], [1.0, 2.0]], TypeError,
     "params[1]: expected a numpy.ndarray, got list"),
    ("adam_step", "params", lambda a: [np.float64(1.0), a["params"][1]], TypeError,
     "params[0]: expected a numpy.ndarray, got float64"),
    ("adam_step", "params", lambda a: [np.ones((2, 3), np.int64), a["params"][1]], TypeError,
     "params[0]: expected dtype float32 or float64, got int64"),
    ("adam_step", "params", lambda a: [np.ones((2, 3), np.float16), a["params"][1]], TypeError,
     "params[0]: expected dtype float32 or float64, got float16"),
    ("adam_step", "params", lambda a: [np.ones((2, 3), ">f8"), a["params"][1]], TypeError, "non-native byte order"),
    ("adam_step", "grads", lambda a: [np.ma.ones((2, 3)), a["grads"][1]], TypeError, "grads[0]: expected a plain"),
    ("adam_step", "grads", lambda a: [a["grads"][0], None], TypeError,
     "grads[1]: expected a numpy.ndarray, got NoneType"),
    ("adam_step", "grads", lambda a: [a["grads"][0], np.ones(4, np.float32)], TypeError,
     "grads[1]: expected dtype float64, got float32"),
    ("adam_step", "grads", lambda a: [a["grads"][0].T, a["grads"][1]], ValueError,
     "grads[0]: expected shape (2, 3), got (3, 2)"),
    ("adam_step", "grads", lambda a: a["grads"][::-1], ValueError, "grads[0]: expected shape (2, 3), got (4,)"),
    ("momentum_step", "velocities", np.ones(5), ValueError, "velocities: expected shape (4,), got (5,)"),
    ("momentum_step", "params", frozen(4), ValueError, "params: expected a writeable array, got a read-only one"),
    ("adam_step", "exp_avg_sqs", lambda a: [a["exp_avg_sqs"][0], frozen(4)], ValueError,
     "exp_avg_sqs[1]: expected a writeable array, got a read-only one"),
    ("momentum_step", "params", lambda a: np.lib.stride_tricks.as_strided(np.ones(1), (4,), (0,)), ValueError,
     "params: expected an array whose elements do not overlap"),
    # overlap
    ("adam_step", "params", lambda a: [np.ones(4), np.ones(4)], ValueError, "grads[0]: expected shape (4,)"),
    ("adam_step", "exp_avgs", lambda a: a["params"], ValueError,
     "exp_avgs[0]: expected an array that does not overlap params[0], got one that does"),
    ("momentum_step", "grads", lambda a: a["params"], ValueError,
     "params: expected an array that does not overlap grads, got one that does"),
    ("momentum_step", "velocities", lambda a: a["params"][::-1], ValueError,
     "velocities: expected an array that does not overlap params, got one that does"),
    ("clip_grad_norm", "grads", lambda a: [a["grads"][0], a["grads"][0]], ValueError,
     "grads[1]: expected an array that does not overlap grads[0], got one that does"),
    ("clip_grad_norm", "grads", lambda a: [a["grads"][0], a["grads"][0][1:3]], ValueError,
     "grads[1]: expected an array that does not overlap grads[0], got one that does"),
    ("clip_grad_norm", "grads", lambda a: [a["grads"][0], frozen(3)], ValueError,
     "grads[1]: expected a writeable array, got a read-only one"),
    ("clip_grad_norm", "grads", 3.0, TypeError, "grads: expected an array or a list of arrays, got float"),
    # optional buffers
    ("momentum_step", "velocities", None, ValueError,
     "velocities: expected arrays like params because momentum is 0.9, got None"),
    ("rmsprop_step", "centered", True, ValueError, "grad_avgs: expected arrays like params because centered is True"),
    ("rmsprop_step", "momentum", 0.5, ValueError,
     "momentum_buffers: expected arrays like params because momentum is 0.5, got None"),
    ("adam_step", "amsgrad", True, ValueError, "max_exp_avg_sqs: expected arrays like params because amsgrad is True"),
    ("rmsprop_step", "grad_avgs", [np.ones(5)], ValueError, "grad_avgs[0]: expected shape (4,), got (5,)"),
    ("rmsprop_step", "momentum_buffers", [np.ones(4, np.float32)], TypeError, "momentum_buffers[0]: expected dtype"),
    ("rmsprop_step", "momentum_buffers", lambda a: a["params"], ValueError,
     "params[0]: expected an array that does not overlap momentum_buffers[0]"),
    ("adam_step", "max_exp_avg_sqs", [], ValueError, "max_exp_avg_sqs: expected 2 arrays as in params, got 0"),
    # numbers
    ("adam_step", "step", 0, ValueError, "step: expected an integer >= 1, got 0"),
    ("adam_step", "step", 1.0, TypeError, "step: expected an integer, got float"),
    ("adam_step", "step", True, TypeError, "step: expected an integer, got bool"),
    ("adagrad_step", "step", -3, ValueError, "step: expected an integer >= 1, got -3"),
    ("adam_step", "betas", 0.9, TypeError, "betas: expected a pair of numbers, got float"),
    ("adam_step", "betas", (0.9,), ValueError, "betas: expected a pair of numbers, got 1"),
    ("adam_step", "betas", (1.0, 0.9), ValueError, "betas[0]: expected a number in [0, 1), got 1"),
    ("adam_step", "betas", (0.9, -0.1), ValueError, "betas[1]: expected a number in [0, 1), got -0.1"),
    ("adam_step", "betas", (0.9, "x"), TypeError, "betas[1]: expected a real number, got str"),
    ("rmsprop_step", "alpha", 1.5, ValueError, "alpha: expected a number in [0, 1], got 1.5"),
    ("clip_grad_norm", "max_norm", -1.0, ValueError, "max_norm: expected a number >= 0, got -1"),
    ("clip_grad_norm", "max_norm", math.nan, ValueError, "max_norm: expected a number >= 0, got nan"),
    ("clip_grad_norm", "max_norm", None, TypeError, "max_norm: expected a real number, got NoneType"),
    *[(function, name, bad, error, f"{name}: expected a {text}")
      for function, names in (("momentum_step", ("lr", "momentum", "dampening", "weight_decay")),
                              ("rmsprop_step", ("lr", "eps", "weight_decay", "momentum")),
                              ("adam_step", ("lr", "eps", "weight_decay")),
                              ("adagrad_step", ("lr", "lr_decay", "eps", "weight_decay")))
      for name in names
      for bad, error, text in ((-0.1, ValueError, "finite number >= 0, got -0.1"),
                               (math.nan, ValueError, "finite number >= 0, got nan"),
                               (math.inf, ValueError, "finite number >= 0, got inf"),
                               ("1", TypeError, "real number, got str"), (True, TypeError, "real number, got bool"))],
    *[(function, name, 1, TypeError, f"{name}: expected True or False, got int")
      for function, names in (("momentum_step", ("nesterov", "maximize")),
                              ("rmsprop_step", ("centered", "eps_inside_sqrt", "maximize")),
                              ("adam_step", ("decoupled_weight_decay", "amsgrad", "epsilon_hat", "maximize")),
                              ("adagrad_step", ("maximize",)))
      for name in names],
]


@BACKENDS
@pytest.mark.parametrize(("function", "argument", "bad", "error", "message"), REFUSED,
                         ids=[f"{row[0]}-{row[1]}-{row[4][-24:]}" for row in REFUSED])
def test_refused_and_nothing_written(backend, function, argument, bad, error, message):
    arguments = globals()[function.split("_")[0] + "_arguments"]()
    arguments[argument] = bad(arguments) if callable(bad) else bad
    arrays = [a for value in arguments.values() if isinstance(value, (list, np.ndarray))
              for a in (value if isinstance(value, list) else [value]) if isinstance(a, np.ndarray)]
    before = snapshot(*arrays)
    with pytest.raises(error) as caught:
        getattr(backend, function)(**arguments)
    assert message in str(caught.value)
    for old, new in zip(before, arrays, strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_last_of_many_lists_is_checked_before_the_first_is_written():
    params, grads = [np.ones(10) for _ in range(50)], [np.ones(10) for _ in range(50)]
    grads[49] = np.ones(11)
    with pytest.raises(ValueError, match=r"grads\[49\]: expected shape \(10,\), got \(11,\)"):
        fn.momentum_step(params, grads, None, lr=1.0, momentum=0.0)
    np.testing.assert_array_equal(params, 1.0)


@pytest.mark.parametrize("start", [1, 3, 7, 15])
def test_a_shared_byte_among_many_ranges_is_found(start):
    """The sorted ranges: a long written array over short ones, wherever it stands in the list."""
    memory = np.zeros(1000)
    params = [memory[10 * i:10 * i + 10] for i in range(16)]
    fn.momentum_step(params, params_like(params), None, lr=1.0, momentum=0.0)  # neighbors that only touch
    params[0] = memory[10 * start + 5:10 * start + 405]
    with pytest.raises(ValueError, match=r"params\[\d+\]: expected an array that does not overlap params\[0\]"):
        fn.momentum_step(params, params_like(params), None, lr=1.0, momentum=0.0)


def params_like(params):
    return [np.ones_like(p) for p in params]


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("module", [fn, reference])
def test_subclasses_count_as_plain_arrays(module):
    """The ** of np.matrix is the matrix power."""
    plain = [np.arange(4.0).reshape(2, 2) + k for k in range(4)]
    matrices = [a.copy().view(np.matrix) for a in plain]
    for arrays in (plain, matrices):
        module.adam_step(*arrays, step=3)
        module.rmsprop_step(*arrays[:3])
        module.adagrad_step(*arrays[:3], step=2)
        module.momentum_step(*arrays[:3], lr=0.1)
        assert module.clip_grad_norm(arrays, 1.0) > 1
    for a, b in zip(plain, matrices, strict=True):
        np.testing.assert_array_equal(a, b)


def test_squares_of_large_gradients_overflow_only_in_the_average(level):
    """(1 - beta) * g**2 fits float32 where g**2 does not."""
    for name, arrays in (("adam_step", 4), ("rmsprop_step", 3)):
        fast, twin = ([np.full(70, value, np.float32) for value in (1.0, 1e20, 0.0, 0.0)[:arrays]] for _ in range(2))
        options = {"step": 1} if arrays == 4 else {"alpha": 0.999}
        getattr(fn, name)(*fast, **options)
        getattr(reference, name)(*twin, **options)
        assert np.isfinite(fast[-1]).all()
        for a, b in zip(fast, twin, strict=True):
            assert_close(a, b, ulps=4)


@pytest.mark.parametrize("beta", [0.25, 0.5, 0.9])
def test_averages_at_the_ends_of_the_range(level, dtype, beta):
    """A difference of such values overflows, or is NaN; their average does not."""
    largest = np.finfo(dtype).max
    m = np.resize(np.array([largest, -largest, np.inf, -np.inf, np.inf], dtype), 70)
    g = np.resize(np.array([-largest, largest, np.inf, -np.inf, 1], dtype), 70)
    fast, twin = ([np.zeros(70, dtype), g, m.copy(), np.zeros(70, dtype)] for _ in range(2))
    fn.adam_step(*fast, step=1, betas=(beta, 0.999))
    reference.adam_step(*twin, step=1, betas=(beta, 0.999))
    # Four roundings, each of half an ulp of less than the largest number.
    np.testing.assert_allclose(fast[2], twin[2], rtol=0, atol=2 * np.finfo(dtype).eps * largest)


def test_averages_without_decay_forget_everything(level, dtype):
    """m + (g - m) is not g where m is much larger."""
    p, g, m, v = (np.full(70, value, dtype) for value in (0.0, 3.0, 1e30, 1e30))
    fn.adam_step(p, g, m, v, step=1, betas=(0.0, 0.0))
    np.testing.assert_array_equal(m, 3)
    np.testing.assert_array_equal(v, 9)


def test_twin_keeps_the_bits_of_subnormal_gradients():
    """lr * g rounds to few bits where g is subnormal; g / eps first is a normal number."""
    g = 0.8 * np.finfo(np.float64).tiny
    for name, buffers, options in (("adagrad_step", 1, {}), ("adam_step", 2, {"betas": (0.0, 0.0)})):
        p = np.zeros(1)
        getattr(reference, name)(p, np.full(1, g), *np.zeros((buffers, 1)), step=1, lr=0.1, eps=1e-8, **options)
        assert_close(p, -0.1 * (np.full(1, g) / 1e-8), ulps=2)


def test_clipping_large_gradients_to_a_small_norm(level):
    """The factor itself is too small for float32."""
    fast, twin = (np.linspace(-1e38, 1e38, 70, dtype=np.float32) for _ in range(2))
    assert fn.clip_grad_norm(fast, 1e-3) == pytest.approx(reference.clip_grad_norm(twin, 1e-3), rel=1e-14)
    assert_close(fast, twin, ulps=1)


def test_adam_bias_corrections_do_not_cancel(level):
    """1 - 0.999**2, rounded after the power, is off by 60 ulp. Steady gradients make every step lr / (1 + eps)."""
    for backend in (fn, reference):
        p, m, v = np.zeros(5), np.zeros(5), np.zeros(5)
        for t in (1, 2, 3):
            backend.adam_step(p, np.ones(5), m, v, step=t, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
        assert_close(p, np.full(5, -3e-3 / (1 + 1e-8)), ulps=6)  # two a step


def test_an_interrupt_finds_kernel_and_copies_done():
    """What a signal handler raises comes between Python's calls: these are one."""
    target, source = np.zeros((4, 6))[:, ::2], np.ones((4, 3))
    with pytest.raises(KeyboardInterrupt):
        checks.run_and_copy(_thread.interrupt_main, (), [target, target[:0]], [source, source[:0]])
    np.testing.assert_array_equal(target, 1)
