"""The pool that keeps the memory of large outputs."""

import gc
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import python

import fastnorm as fn
from fastnorm import _runtime
from fastnorm._kernels import output_pool
from fastnorm._outputs import POOLED_BYTES, empty_like

pytestmark = pytest.mark.skipif(not output_pool.available(), reason="the pool is there on Linux alone")

LARGE = POOLED_BYTES // 4  # float32 elements of the smallest output that the pool takes
MB = 1 << 20
BUILD_FLAGS = _runtime.kernels.batchnorm.build_flags()


@pytest.fixture(autouse=True)
def pool():
    """A pool of 256 MB with nothing in it."""
    before = fn.get_output_pool()
    fn.set_output_pool(0)
    fn.set_output_pool(256 * MB)
    yield
    fn.set_output_pool(before)


def standardized(x):
    moments = fn.Moments()
    moments.update(x)
    return moments.standardize(x)


def address(a):
    return a.__array_interface__["data"][0]


def test_memory_of_a_large_output_is_used_again():
    x = np.full(LARGE, -1, np.float32)
    y = fn.relu(x)
    first = address(y)
    del y
    assert output_pool.waiting() >= 4 * LARGE
    y = fn.relu(x + 2)
    assert address(y) == first
    assert output_pool.waiting() == 0
    assert (y == 1).all()


def test_an_output_in_use_keeps_its_memory():
    x = np.ones(LARGE, np.float32)
    outputs = [fn.relu(x * k) for k in range(1, 5)]
    view = outputs[0][5:]
    del outputs[0]
    fn.relu(x)
    assert (view == 1).all()
    assert all((y == k).all() for k, y in enumerate(outputs, 2))


def test_small_outputs_are_numpys_own():
    y = fn.relu(np.ones(LARGE - 1, np.float32))
    del y
    assert output_pool.waiting() == 0


@pytest.mark.parametrize("call", [
    lambda x: [fn.relu(x)],
    lambda x: [fn.dropout(x, 0.5, seed=0, offset=0)],
    lambda x: [fn.softmax(x.reshape(-1, 64))],
    lambda x: [fn.softmax_cross_entropy(x.reshape(-1, 64), np.zeros(x.size // 64, int))[1]],
    lambda x: [fn.batch_norm_forward(x.reshape(-1, 64), None, None)[0]],
    lambda x: fn.batch_norm_backward(x.reshape(-1, 64), fn.batch_norm_forward(
        x.reshape(-1, 64), None, None, residual=x.reshape(-1, 64))[1])[::3],
    lambda x: [standardized(x.reshape(-1, 64))],
], ids=["relu", "dropout", "softmax", "cross-entropy", "batch norm forward", "batch norm backward", "standardize"])
def test_every_kind_of_large_output_comes_from_the_pool(call):
    outputs = call(np.ones(LARGE, np.float32))
    assert all(y is not None and y.nbytes == 4 * LARGE for y in outputs)
    before, n = output_pool.waiting(), len(outputs)
    del outputs
    assert output_pool.waiting() - before >= n * 4 * LARGE


def test_the_memory_order_is_the_inputs():
    x = np.asfortranarray(np.ones((4, LARGE), np.float32))
    y = fn.relu(x)
    assert y.flags.f_contiguous
    assert type(y) is np.ndarray
    nhwc = np.ones((LARGE // 16, 2, 2, 4), np.float32).transpose(0, 3, 1, 2)
    assert fn.relu(nhwc).strides == nhwc.strides


def test_results_are_ordinary_arrays():
    y = fn.relu(np.arange(LARGE, dtype=np.float32))
    assert y.flags.owndata
    assert y.flags.writeable
    assert y.base is None
    assert address(y) % 64 == 0
    assert np.array_equal(pickle.loads(pickle.dumps(y)), y)
    y.resize(LARGE + 3, refcheck=False)
    assert np.array_equal(y, [*range(LARGE), 0, 0, 0])
    y.resize(10, refcheck=False)
    assert np.array_equal(y, range(10))
    z = np.zeros_like(fn.relu(np.ones(LARGE, np.float32)))  # NumPy's own arrays do not use the pool
    waiting = output_pool.waiting()
    del z
    assert output_pool.waiting() == waiting


def test_the_limit_holds_and_the_oldest_goes_first():
    fn.set_output_pool(96 * MB)
    x = np.ones(LARGE, np.float32)
    outputs = [fn.relu(x) for _ in range(6)]
    order = [address(y) for y in outputs]
    while outputs:
        del outputs[0]
        assert output_pool.waiting() <= 96 * MB
    kept = output_pool.waiting() // (36 * MB)  # 32 MB and a line are a block of 36 MB
    assert kept == 2
    again = [empty_like(x) for _ in range(2)]
    assert [address(y) for y in again] == order[-1:-3:-1]


def test_many_sizes_do_not_fill_the_list():
    fn.set_output_pool(1 << 50)
    arrays = [empty_like(np.broadcast_to(np.float32(0), LARGE + n * MB)) for n in range(100)]
    del arrays
    gc.collect()
    assert output_pool.waiting() > 0
    fn.set_output_pool(0)
    assert output_pool.waiting() == 0


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_no_pool_gives_everything_back():
    x = np.ones(8 * LARGE, np.float32)
    before = resident()
    y = fn.relu(x)
    assert resident() - before > 200 * MB
    del y
    fn.set_output_pool(0)
    assert output_pool.waiting() == 0
    assert resident() - before < 32 * MB
    y = fn.relu(x)
    del y
    assert output_pool.waiting() == 0
    assert resident() - before < 32 * MB


def test_page_faults_are_paid_once():
    import resource

    x = np.ones(4 * LARGE, np.float32)
    y = fn.relu(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        y = fn.relu(x)
        del y
    # one block may be fresh (y lived while the second was computed): huge pages or small ones
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1.5 * x.nbytes / os.sysconf("SC_PAGESIZE")


def test_the_caller_s_allocator_is_left_as_it_was():
    from numpy._core.multiarray import get_handler_name

    before = get_handler_name()
    y = fn.relu(np.ones(LARGE, np.float32))
    assert get_handler_name(y) == "fastnorm_output_pool"
    assert get_handler_name() == before
    assert get_handler_name(np.ones(3)) == before


def test_no_memory_is_a_memory_error():
    huge = np.broadcast_to(np.float32(0), (1 << 40,))
    with pytest.raises(MemoryError):
        empty_like(np.lib.stride_tricks.as_strided(huge, (1 << 44,), (0,)))


# In a process of its own: 300 MB wait in the pool, and the limit leaves no room for 400.
CROWDED = """
import resource
import numpy as np, fastnorm as fn
from fastnorm._kernels import output_pool

fn.set_output_pool(1 << 30)
x, small = np.ones(100_000_000, np.float32), np.ones(75_000_000, np.float32)
y = fn.relu(small)
del y, small
waiting = output_pool.waiting()
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 200_000_000, resource.RLIM_INFINITY))
y = fn.relu(x)
print(waiting >= 300_000_000, output_pool.waiting(), y.min())
"""


@pytest.mark.skipif("sanitize" in BUILD_FLAGS, reason="sanitizers reserve terabytes")
def test_what_waits_makes_room_where_the_process_has_a_limit():
    result = python(CROWDED)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["True", "0", "1.0"]


def test_threads_share_the_pool():
    x = np.ones(LARGE, np.float32)
    wrong = []

    def work(k):
        for n in range(30):
            y = fn.relu(x * k)
            if not (y == k).all():
                wrong.append((k, n))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_child_has_a_pool_of_its_own():
    x = np.ones(LARGE, np.float32)
    y = fn.relu(x)
    del y
    child = os.fork()
    if child == 0:  # what waits in the parent is the child's too, as a copy
        try:
            y = fn.relu(2 * x)
            os._exit(0 if (y == 2).all() and output_pool.waiting() == 0 else 1)
        finally:
            os._exit(2)
    y = fn.relu(3 * x)
    assert os.waitpid(child, 0)[1] == 0
    assert (y == 3).all()


@pytest.mark.parametrize(("value", "shown"), [("0", "0"), ("12345678", "12345678"), ("", None)])
def test_the_environment_sets_the_limit(value, shown):
    run = subprocess.run([sys.executable, "-c", "import fastnorm as fn; print(fn.get_output_pool())"],
                         env={**os.environ, "FASTNORM_OUTPUT_POOL": value}, capture_output=True, text=True, check=True)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    assert run.stdout.strip() == (shown or str(min(memory // 16, 4 << 30)))


def test_a_wrong_environment_is_an_error():
    run = subprocess.run([sys.executable, "-c", "import fastnorm"], env={**os.environ, "FASTNORM_OUTPUT_POOL": "1 GB"},
                         capture_output=True, text=True)
    assert run.returncode != 0
    assert "FASTNORM_OUTPUT_POOL: expected a number of bytes, got '1 GB'" in run.stderr


@pytest.mark.parametrize(("value", "error", "message"), [
    (-1, ValueError, "n_bytes: expected an integer >= 0, got -1"),
    (1e9, TypeError, "n_bytes: expected an integer, got float"),
    ("1 GB", TypeError, "n_bytes: expected an integer, got str"),
    (True, TypeError, "n_bytes: expected an integer, got bool"),
])
def test_set_output_pool_refuses(value, error, message):
    before = fn.get_output_pool()
    with pytest.raises(error, match=message):
        fn.set_output_pool(value)
    assert fn.get_output_pool() == before
