"""Properties of every public function, over calls that Hypothesis makes up: right ones and ones to refuse.

A call either gives what the twin gives, within a bound that a running error analysis derives (`bounds.py`), writes what
it is to write and not a byte beside it; or it raises the TypeError or ValueError that the twin raises, word for word,
and has changed nothing. `CONTRIBUTING.md` says how to run it for longer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from bounds import Bounded, differing
from conftest import LEVELS
from hypothesis import note
from hypothesis import strategies as st
from property_cases import FUNCTIONS, OBJECTS, Arguments, Errors, Function
from strategies import Given, build, spoiled

import fastnorm as fn
from fastnorm import _runtime, reference

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
    fast, slow, before = build(arguments), build(arguments), build(arguments, export=False)
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
