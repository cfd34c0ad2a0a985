"""Memory: none is lost, none is written when there is none, and arrays may be larger than 32 bits can count."""

from __future__ import annotations

import ctypes
import gc
import os
import sys

import numpy as np
import pytest
from calls import CALLS, flat, make, private, to_bytes
from conftest import assert_unchanged, python, snapshot

import fastnorm as fn
from fastnorm import _runtime

BUILD_FLAGS = _runtime.kernels.batchnorm.build_flags()
needs_debug = pytest.mark.skipif("-DFASTNORM_DEBUG" not in BUILD_FLAGS,
                                 reason="needs a debug build (FASTNORM_DEBUG=1), whose scratch memory can fail")
GB = 10**9


# -- leaks -------------------------------------------------------------------------------------------------------------


class MallInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def bytes_in_use():
    """Bytes that malloc has handed out and not got back, or 0 where the C library does not tell."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return 0
    mallinfo.restype = MallInfo
    return mallinfo().uordblks


def repeat(call, arrays, times):
    for _ in range(times):
        call.run(arrays)


@pytest.mark.parametrize("name", CALLS)
def test_small_calls_lose_no_memory(name):
    """One object or block of 8 bytes lost in each call would be 2,000 more of them: ten times what is allowed."""
    call, arrays, times = CALLS[name], make((4, 3), np.float32), 2000
    repeat(call, arrays, 200)
    gc.collect()
    references = [sys.getrefcount(a) for a in flat(arrays)]
    blocks, in_use = sys.getallocatedblocks(), bytes_in_use()
    repeat(call, arrays, times)
    gc.collect()
    assert sys.getallocatedblocks() - blocks < times // 10
    assert bytes_in_use() - in_use < 8 * times // 10
    assert [sys.getrefcount(a) for a in flat(arrays)] == references


def resident():
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_ten_million_small_calls_do_not_grow_memory():
    """A leak of 8 bytes a call would be 80 MB."""
    arrays, times = make((4, 3), np.float32), 10_000_000
    with np.errstate(all="ignore"):
        for call in CALLS.values():
            repeat(call, arrays, 1000)
        gc.collect()
        before = resident()
        for call in CALLS.values():
            repeat(call, arrays, -(-times // len(CALLS)))
        gc.collect()
    growth = resident() - before
    print(f"{times:,} calls of {len(CALLS)} functions: {growth / 1e6:.2f} MB more")
    assert growth < 4_000_000


# -- allocations that fail ---------------------------------------------------------------------------------------------


ELEMENTWISE = ("relu", "leaky_relu", "elu", "celu", "sigmoid", "tanh", "dropout")


@needs_debug
@pytest.mark.parametrize("shape", [(3001, 70), (8, 16, 41, 40), (700, 300), (4, 3)], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_no_scratch_memory(name, shape, dtype, monkeypatch):
    """The call raises and has written nothing; elementwise ones need no scratch."""
    call, arrays = CALLS[name], make(shape, dtype)
    expected = to_bytes(call.run(private(call, arrays)))
    own = private(call, arrays)
    before = snapshot(*flat(own))
    monkeypatch.setenv("FASTNORM_FAIL_ALLOC", "1")
    if name.removesuffix("_backward") in ELEMENTWISE:
        assert to_bytes(call.run(own)) == expected
        return
    with pytest.raises(MemoryError, match="fastnorm: no memory"):
        call.run(own)
    assert_unchanged(before, *flat(own))


@needs_debug
def test_no_memory_for_long_optimizer_lists(monkeypatch):
    lists = [[np.ones(3) for _ in range(20)] for _ in range(3)]
    monkeypatch.setenv("FASTNORM_FAIL_ALLOC", "1")
    with pytest.raises(MemoryError, match="fastnorm: no memory for the address ranges"):
        fn.momentum_step(*lists, lr=0.1)
    assert all((a == 1).all() for arrays in lists for a in arrays)


# In a process of its own. While a call runs there is no room for an output of its arrays' size, or for a copy.
FAILING = """
import resource
import numpy as np, fastnorm as fn
from calls import CALLS, flat, make, private, rebuild

def every_other(a):
    return np.repeat(a, 2, axis=-1)[..., ::2]

def run(call, arrays):
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 1_000_000, resource.RLIM_INFINITY))
    try:
        call.run(arrays)
    except MemoryError:
        return "refused"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "done"

fn.set_num_threads(1)
for name, call in CALLS.items():
    call.run(private(call, make((4, 3), np.float64)))  # what is imported or cached at the first call
    for layout in (np.copy, every_other):
        arrays = rebuild(make((1000, 300), np.float64), layout)  # 2.4 MB each
        before = [a.copy() for a in flat(arrays)]
        outcome = run(call, arrays)
        same = all(np.array_equal(old, new) for old, new in zip(before, flat(arrays)))
        print(name, layout.__name__, outcome, "same" if same else "changed")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit of the address space")
@pytest.mark.skipif("sanitize" in BUILD_FLAGS, reason="sanitizers reserve terabytes")
def test_no_memory_for_outputs_and_copies():
    """A call that needs them raises and has written nothing. Updates of dense arrays in place need none."""
    result = python(FAILING, MALLOC_MMAP_THRESHOLD_="1000000")
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert len(lines) == 2 * len(CALLS)
    for name, layout, outcome, same in lines:
        if name.endswith(("_step", "clip_grad_norm")) and layout == "copy":
            assert (outcome, same) == ("done", "changed"), name
        else:
            assert (outcome, same) == ("refused", "same"), (name, layout)


# -- large arrays ------------------------------------------------------------------------------------------------------


def free_memory():
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024


def need(n_bytes):
    if not os.path.exists("/proc/meminfo") or free_memory() < n_bytes:
        pytest.skip(f"needs {n_bytes / GB:.0f} GB of free memory")


ROWS, CLASSES = 1000, 64  # of the block that large arrays repeat


def block():
    return make((ROWS, CLASSES), np.float32)


def repeated(rows, a):
    """An array of this many rows that repeats those of a."""
    large = np.empty((rows, *a.shape[1:]), a.dtype)
    for start in range(0, rows, len(a)):
        large[start:start + len(a)] = a[:rows - start]
    return large


def assert_repeats(large, expected):
    """Require expected's rows again and again."""
    for start in range(0, len(large), len(expected)):
        part = large[start:start + len(expected)]
        assert np.array_equal(part, expected[:len(part)]), f"from row {start}"


BEYOND_BYTES = 2**31 // (4 * CLASSES) + 1001  # rows of float32 whose bytes an int cannot count
BEYOND_ELEMENTS = 2**31 // CLASSES + 1001     # rows whose elements it cannot
IN_PLACE = {
    "softmax": lambda x, a: fn.softmax(x, out=x),
    "log_softmax": lambda x, a: fn.log_softmax(x, out=x),
    "relu": lambda x, a: fn.relu(x, out=x),
    "elu": lambda x, a: fn.elu(x, out=x),
    "batch_norm_inference": lambda x, a: fn.batch_norm_inference(x, *a.vectors, out=x),
    "softmax_cross_entropy": lambda x, a: fn.softmax_cross_entropy(
        x, np.resize(a.labels, len(x)), reduction="sum", out=x),
}


@pytest.mark.long
@pytest.mark.parametrize("name", IN_PLACE)
def test_more_elements_than_an_int_counts(name):
    """8.6 GB of float32, in place."""
    need(12 * GB)
    arrays = block()
    x, expected = repeated(BEYOND_ELEMENTS, arrays.x), arrays.x.copy()
    IN_PLACE[name](expected, arrays)
    IN_PLACE[name](x, arrays)
    assert x.size > 2**31
    assert_repeats(x, expected)


@pytest.mark.long
def test_more_elements_than_an_int_counts_clipped_and_dropped():
    """In one array: 8.6 GB of float32; and channels first, statistics alone."""
    need(12 * GB)
    x = np.ones((BEYOND_ELEMENTS, CLASSES), np.float32)
    assert fn.clip_grad_norm(x, np.inf) == np.sqrt(float(x.size))
    moments = fn.Moments(axis=1)
    moments.update(x)
    assert moments.count == BEYOND_ELEMENTS
    assert np.array_equal(moments.mean, np.ones(CLASSES))
    assert np.array_equal(moments.var(), np.zeros(CLASSES))
    fn.dropout(x, 0.5, seed=3, out=x)
    # A word belongs to an element's number in C order: the first rows are those of a small array.
    assert np.array_equal(x[:1000], fn.reference.dropout(np.ones((1000, CLASSES), np.float32), 0.5, seed=3))
    kept = np.count_nonzero(x[-1000:]) / x[-1000:].size
    assert abs(kept - 0.5) < 5 * 0.5 / np.sqrt(x[-1000:].size)
    assert not np.array_equal(x[-1000:], x[:1000])


@pytest.mark.long
@pytest.mark.parametrize("name", ["momentum_step", "adagrad_step"])
def test_updates_of_more_bytes_than_an_int_counts(name):
    need(9 * GB)
    arrays, call = block(), CALLS[name]
    large = arrays._replace(x=repeated(BEYOND_BYTES, arrays.x), g=repeated(BEYOND_BYTES, arrays.g),
                            states=(repeated(BEYOND_BYTES, arrays.states[0]),))
    assert large.x.nbytes > 2**31
    call.run(large)
    call.run(arrays)
    assert_repeats(large.x, arrays.x)
    assert_repeats(large.states[0], arrays.states[0])


@pytest.mark.long
def test_batch_norm_of_more_bytes_than_an_int_counts():
    """Whole repetitions of a block have the block's statistics: its outputs and gradients, within a few ulp."""
    need(9 * GB)
    times = 2**31 // (4 * CLASSES * ROWS) + 1
    arrays = block()
    x = repeated(times * ROWS, arrays.x)
    assert x.nbytes > 2**31
    y, cache = fn.batch_norm_forward(x)
    small, small_cache = fn.batch_norm_forward(arrays.x)
    np.testing.assert_allclose(y[-ROWS:], small, rtol=4e-7, atol=4e-7)
    assert_repeats(y, y[:ROWS].copy())
    g = repeated(times * ROWS, arrays.g)
    dx = fn.batch_norm_backward(g, cache, out=g)[0]
    small_dx = fn.batch_norm_backward(arrays.g, small_cache)[0]
    np.testing.assert_allclose(dx[-ROWS:], small_dx, rtol=4e-7, atol=2e-6)
    assert_repeats(dx, dx[:ROWS].copy())
