"""What every test file shares: dtype × layout × threads × instruction set, and how large an error may be."""

from __future__ import annotations

import importlib
import os
import random
import subprocess
import sys
import textwrap
import time
from collections import Counter

import hypothesis
import numpy as np
import pytest

import fastnorm as fn
from fastnorm import _runtime

LEVELS = _runtime.available_levels()
# Lengths around the widths that kernels care about: empty, one, vector widths of every level ± 1, LANES ± 1.
TAILS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 257]


def python(code, timeout=60, **environment):
    """Run code, which may import from this folder, in a fresh interpreter with these environment variables."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FASTNORM_", "OMP_"))}
    env["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *filter(None, [env.get("PYTHONPATH")])])
    return subprocess.run([sys.executable, "-c", code], env=env | environment, capture_output=True, text=True,
                          timeout=timeout)


def integration(library):
    """Import ``fastnorm.integrations.library``, or skip visibly where that library is missing or of another version."""
    try:
        return importlib.import_module(f"fastnorm.integrations.{library}")
    except ImportError as error:
        if error.name != library:
            raise
        return pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(params=LEVELS)
def level(request):
    """Run the test once for each instruction-set level that this machine has."""
    before = _runtime.kernels.level
    _runtime.kernels.load(request.param)
    yield request.param
    _runtime.kernels.load(before)


@pytest.fixture
def assume_subnormals(level):
    """What the loops for subnormals depend on, the processor's slowness with them, as a test wants it: 0 or 1."""
    modules = [getattr(_runtime.kernels, name) for name in ("activation", "optimizer", "softmax")]

    def assume(slow):
        for module in modules:
            module.assume_slow_subnormals(slow)

    yield assume
    assume(-1)


@pytest.fixture(params=[1, 2, 3, 7])
def threads(request):
    """Run the test once for each number of threads."""
    before = fn.get_num_threads()
    fn.set_num_threads(request.param)
    yield request.param
    fn.set_num_threads(before)


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    return np.dtype(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(20261120)


def every_magnitude(n, rng):
    """Floats of any bits, of bits around the least normal number's, and of a few of the least subnormal's; zeros."""
    any_bits = rng.integers(0, 2**32, n, dtype=np.uint32)
    small = rng.integers(0, 2**25, n, dtype=np.uint32)
    least = rng.integers(0, 9, n, dtype=np.uint32)
    sign = rng.integers(0, 2, n, dtype=np.uint32) << 31
    return np.choose(rng.integers(0, 4, n), [any_bits, small | sign, least | sign, sign]).view(np.float32)


def assert_same_bits(a, b):
    """Zeros by their sign too; one NaN is as good as another."""
    nan = np.isnan(a)
    np.testing.assert_array_equal(np.isnan(b), nan)
    unsigned = np.dtype(f"u{a.itemsize}")
    np.testing.assert_array_equal(a.view(unsigned)[~nan], b.view(unsigned)[~nan])


def _fortran(a):
    return np.asfortranarray(a)


def _channels_last(a):
    """The memory of NHWC seen as NCHW: a permuted dense block."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1) if a.ndim > 1 else a.copy()


def _strided(a):
    """Every other element of a larger array: not dense."""
    large = np.full(tuple(2 * n for n in a.shape), np.nan, a.dtype)
    view = large[tuple(slice(None, None, 2) for _ in a.shape)]
    view[...] = a
    return view


def _reversed(a):
    """Negative strides."""
    return np.ascontiguousarray(a[tuple(slice(None, None, -1) for _ in a.shape)])[
        tuple(slice(None, None, -1) for _ in a.shape)]


def _unaligned(a):
    """At an address that is no multiple of the item size."""
    raw = np.zeros(a.nbytes + 1, np.uint8)
    view = raw[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


LAYOUTS = {"C": np.ascontiguousarray, "F": _fortran, "channels_last": _channels_last, "strided": _strided,
           "reversed": _reversed, "unaligned": _unaligned}


@pytest.fixture(params=list(LAYOUTS))
def layout(request):
    """A function that gives an array of the same values in another memory layout."""
    return LAYOUTS[request.param]


def assert_close(actual, expected, *, ulps, scale=None):
    """Require |actual - expected| <= ulps * eps * scale, where scale is the sum of the magnitudes of the terms that the
    exact result is a sum of (|expected| itself by default); NaN and infinity must match exactly.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    info = np.finfo(actual.dtype)
    size = np.abs(expected, dtype=np.float64) if scale is None else np.broadcast_to(scale, expected.shape)
    error = np.abs(actual[finite].astype(np.float64) - expected[finite].astype(np.float64))
    # + one subnormal spacing an ulp: results there cannot be closer
    allowed = ulps * (info.eps * size[finite] + info.smallest_subnormal)
    worst = np.argmax(error - allowed) if error.size else 0
    assert np.all(error <= allowed), (
        f"error {error[worst]:.3g} > allowed {allowed[worst]:.3g} at flat position {worst} "
        f"(got {actual[finite][worst]!r}, expected {expected[finite][worst]!r})")


def snapshot(*arrays):
    """Copies of the memory behind arrays, to prove later that nothing was written."""
    return [a.copy() for a in arrays]


def assert_unchanged(before, *arrays):
    """Require that arrays hold the bits that `snapshot` saw."""
    for old, new in zip(before, arrays, strict=True):
        assert old.tobytes() == new.tobytes()


# -- options, and property tests ---------------------------------------------------------------------------------------

EXAMPLES = 200  # of each function, where nothing is said: a few seconds in all
BATCH = 250  # examples of one seed in a run of many minutes: a second or two


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the tests that take minutes or tens of GB of memory, too")
    group = parser.getgroup("fuzz", "property tests (tests/test_properties.py)")
    group.addoption("--fuzz-examples", type=int, default=EXAMPLES, metavar="N", help="examples of each function")
    group.addoption("--fuzz-minutes", type=float, metavar="N",
                    help="run for N minutes in all, with one seed after another")
    group.addoption("--fuzz-seed", type=int, metavar="N", help="first seed (0; with --fuzz-minutes, a random one)")


class Fuzzer:
    """Runs property tests as the options say, and counts their examples by name."""

    def __init__(self, config):
        minutes = config.getoption("--fuzz-minutes")
        self.seed = config.getoption("--fuzz-seed")
        if self.seed is None:
            self.seed = random.randrange(2**32) if minutes else 0
        self.minutes = minutes
        self.examples = BATCH if minutes else config.getoption("--fuzz-examples")
        self.tests = 1  # that share the minutes
        self.counts = Counter()

    def __call__(self, name, strategy, example):
        """Run one property on examples of a strategy."""
        end = time.monotonic() + (self.minutes * 60 / self.tests if self.minutes else 0)
        seed = self.seed
        self.run(name, strategy, example, seed)
        while time.monotonic() < end:
            seed += 1
            self.run(name, strategy, example, seed)

    def run(self, name, strategy, example, seed):
        """One batch of examples, which a seed fixes."""
        def counted(drawn):
            self.counts[name] += 1
            example(drawn)

        # No deadline: rare examples are large, on purpose. No database: the seed alone says what runs.
        settings = hypothesis.settings(
            max_examples=self.examples, deadline=None, database=None,
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink])
        try:
            hypothesis.seed(seed)(settings(hypothesis.given(strategy)(counted)))()
        except BaseException as error:
            error.add_note(f"again: --fuzz-seed {seed} --fuzz-examples {self.examples}")
            raise


FUZZER = pytest.StashKey[Fuzzer]()


def pytest_configure(config):
    config.stash[FUZZER] = Fuzzer(config)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --long"))
    config.stash[FUZZER].tests = max(1, sum("fuzz" in getattr(item, "fixturenames", ()) for item in items))


@pytest.fixture
def fuzz(request):
    """``fuzz(name, strategy, example)`` runs ``example`` on what the strategy draws, as often as the options say."""
    return request.config.stash[FUZZER]


def pytest_terminal_summary(terminalreporter, config):
    fuzzer = config.stash[FUZZER]
    if fuzzer.counts:
        terminalreporter.section("property tests")
        counts = ", ".join(f"{name} {n:,}" for name, n in fuzzer.counts.items())
        total = f"{fuzzer.counts.total():,} examples, first seed {fuzzer.seed}: {counts}"
        for line in textwrap.wrap(total, 120, break_on_hyphens=False):
            terminalreporter.write_line(line)
