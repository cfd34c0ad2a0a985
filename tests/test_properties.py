"""Properties of every public function, over calls that Hypothesis makes up: right ones and ones to refuse.

A call either gives what the twin gives, within a bound that a running error analysis derives (`bounds.py`), writes what
it is to write and not a byte beside it; or it raises the TypeError or ValueError that the twin raises, word for word,
and has changed nothing. `CONTRIBUTING.md` says how to run it for longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from bounds import Bounded, differing
from conftest import LEVELS
from hypothesis import assume, note
from hypothesis import strategies as st
from property_cases import FUNCTIONS, OBJECTS, Arguments, Errors, Function
from strategies import Given, build, spoiled

import fastnorm as fn
from fastnorm import _runtime, reference

FLOAT32_TINY, FLOAT32_MAX = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


# -- what other work is about to change --------------------------------------------------------------------------------
# Calls on which kernels and twin are known to differ, or the twin itself overflows. Each corner goes with its fix.


def finite_sizes(a: np.ndarray) -> np.ndarray:
    return np.abs(a[np.isfinite(a)])


def option_beyond_float32(name: str, given: Given) -> bool:
    """lr, eps, ... that float32 cannot hold."""
    numbers = [v for v in given.arguments.values() if isinstance(v, float) and math.isfinite(v) and v != 0]
    return (any(a.dtype == np.float32 for a in given.arrays.values())
            and any(not FLOAT32_TINY <= abs(v) <= FLOAT32_MAX for v in numbers))


def batch_beyond_squares(name: str, given: Given) -> bool:
    """Batch statistics: |x - mean| beyond float32, squares beyond float64, subnormal x, gamma / std beyond float32."""
    if not name.startswith(("batch_norm", "Moments", "layers.BatchNorm")):
        return False
    for label, a in given.arrays.items():
        if a.dtype not in (np.float32, np.float64):
            continue
        info, sizes = np.finfo(a.dtype), finite_sizes(a)
        most = float(info.max) / 2 if a.dtype == np.float32 else math.sqrt(float(info.max)) / 4
        if label in ("x", "other") and np.any((sizes > most) | ((sizes < info.tiny) & (sizes > 0))):
            return True
        if label == "gamma" and np.any(sizes > 1e15):
            return True
    return False


def gradient_beyond_squares(name: str, given: Given) -> bool:
    """Optimizers, float64: the twin's g**2 overflows where the kernels' (1 - beta2) * g * g does not."""
    return (name.endswith("_step") or name.startswith("optim.")) and any(
        a.dtype == np.float64 and bool(np.any(finite_sizes(a) > 1e150)) for a in given.arrays.values())


def infinite_masses(name: str, given: Given) -> bool:
    """Cross-entropy: infinite weights and targets."""
    return name == "softmax_cross_entropy" and any(
        label in ("targets", "weight") and a.dtype.kind == "f" and bool(np.isinf(a).any())
        for label, a in given.arrays.items())


def label_beyond_int64(name: str, given: Given) -> bool:
    """Cross-entropy: labels of 2**63 and more."""
    targets = given.arrays.get("targets")
    return targets is not None and targets.dtype == np.uint64 and bool(np.any(targets >= 2**63))


def underflowing_slope(name: str, given: Given) -> bool:
    """ELU and CELU backward: slopes below the smallest normal number."""
    x = given.arrays.get("x")
    if name not in ("elu_backward", "celu_backward") or x is None or x.dtype not in (np.float32, np.float64):
        return False
    alpha = given.arguments.get("alpha", 1.0)
    if not isinstance(alpha, (int, float)) or not 0 < alpha < FLOAT32_MAX:
        alpha = 1.0
    lowest = -87 if x.dtype == np.float32 else -708
    # ELU's slope is alpha times an exponential, CELU's one of x / alpha.
    return bool(np.any(x < (lowest - math.log(alpha) if name == "elu_backward" else lowest * alpha)))


KNOWN_CORNERS = [option_beyond_float32, batch_beyond_squares, gradient_beyond_squares, infinite_masses,
                 label_beyond_int64, underflowing_slope]


# -- the check ---------------------------------------------------------------------------------------------------------


def outcome(function: Function, module: Any, given: Given) -> tuple[Any, Exception | None]:
    """What a call returned, or the error that it may raise; any other one is a failure."""
    try:
        return function(module, given.arguments), None
    except (TypeError, ValueError) as error:
        return None, error


def labeled(function: Function, result: Any) -> dict[str, Any]:
    """The parts of a returned value by name."""
    parts = result if isinstance(result, tuple) else (result,)
    return dict(zip(function.results, parts, strict=False))


def is_written(function: Function, label: str) -> bool:
    return label.partition("[")[0] in function.written


def assert_same_kind(actual: Any, expected: Any, label: str) -> None:
    """Kind, dtype, shape, and memory order, which is promised of all but the losses of rows."""
    assert type(actual) is type(expected), f"{label}: {type(actual)} and {type(expected)}"
    if not isinstance(actual, np.ndarray):
        return
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), label
    if actual.size and label != "losses":
        orders = [[s for s, n in zip(a.strides, a.shape, strict=True) if n > 1] for a in (actual, expected)]
        assert orders[0] == orders[1], f"{label}: strides {actual.strides} and {expected.strides}"


def assert_within(errors: Callable[[], Errors], pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Results equal the twin's; the bound is derived only where bits differ."""
    unequal = {label: pair for label, pair in pairs.items() if pair[0].tobytes() != pair[1].tobytes()}
    if not unequal:
        return
    with np.errstate(all="ignore"):
        bound = errors()
        for label, (actual, expected) in unequal.items():
            error = bound.get(label, 0.0)  # of buffers that a step leaves alone: none
            error = np.broadcast_to(error.error if isinstance(error, Bounded) else error, actual.shape)
            wrong = differing(actual, expected, error)
            if wrong.any():
                at = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
                raise AssertionError(f"{label}: {wrong.sum()} of {wrong.size} differ, first at {tuple(map(int, at))}: "
                                     f"{actual[at]!r}, the twin {expected[at]!r}, bound {error[at]!r}")


def check(function: Function, arguments: Arguments) -> None:
    """The property that this file is about."""
    fast, slow, before = build(arguments), build(arguments), build(arguments)
    assume(not any(corner(function.name, before) for corner in KNOWN_CORNERS))
    result, error = outcome(function, fn, fast)
    expected, twins_error = outcome(function, reference, slow)
    assert (type(error), str(error)) == (type(twins_error), str(twins_error))
    if error is not None:
        note(f"both raised {error!r}")
        for given in (fast, slow):
            for owner, memory in given.memory.items():
                assert memory.tobytes() == before.memory[owner].tobytes(), f"{owner} was written before {error!r}"
        return

    parts, expected_parts = labeled(function, result), labeled(function, expected)
    assert parts.keys() == expected_parts.keys()
    pairs = {}
    for label, part in parts.items():
        twins = expected_parts[label]
        assert_same_kind(part, twins, label)
        for name, array in fast.arrays.items():
            assert (part is array) == (twins is slow.arrays[name]), f"{label} and {name}"
        if isinstance(part, (np.ndarray, np.floating, float)):
            pairs[label] = np.asarray(part), np.asarray(twins)
        else:
            assert part == twins, label
    for label, array in fast.arrays.items():
        if is_written(function, label):
            pairs[label] = array, slow.arrays[label]
    assert_within(lambda: function.errors(before.arguments), pairs)
    # Nothing but the elements of what is written has changed.
    for label, array in fast.arrays.items():
        if is_written(function, label) and before.arrays[label].flags.writeable:
            before.arrays[label][...] = array
    for owner, memory in fast.memory.items():
        assert memory.tobytes() == before.memory[owner].tobytes(), f"{owner}: bytes beside the written elements changed"


# -- the tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [*FUNCTIONS, *OBJECTS], ids=lambda f: f.name.replace(" ", "-"))
def test_equals_twin_or_refuses(function, fuzz):
    setting = st.tuples(st.sampled_from(LEVELS), st.sampled_from([1, 2, 3, 7]))

    def example(drawn):
        (level, threads), arguments = drawn
        _runtime.kernels.load(level)
        fn.set_num_threads(threads)
        fn.set_output_pool(pool)
        check(function, arguments)

    level, threads, pool = _runtime.kernels.level, fn.get_num_threads(), fn.get_output_pool()
    try:
        fuzz(function.name, st.tuples(setting, spoiled(function.calls)), example)
    finally:
        _runtime.kernels.load(level)
        fn.set_num_threads(threads)


def test_every_public_function_is_here():
    """What is not: modules, and what takes no array."""
    named = {f.name.partition(" ")[0] for f in FUNCTIONS}
    others = {"checkpoint", "init", "layers", "optim", "reference", "get_num_threads", "set_num_threads",
              "get_output_pool", "set_output_pool", "show_config"}
    assert named | others == set(fn.__all__)
