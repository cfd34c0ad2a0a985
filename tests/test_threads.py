"""How many threads kernels use, and that nothing else depends on it: bits, other threads of Python, other libraries."""

from __future__ import annotations

import math
import os
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from calls import CALLS, flat, make, private, rebuild, to_bytes
from conftest import python

import fastnorm as fn
from fastnorm import _runtime
from fastnorm._quota import cpu_quota

has_openmp = pytest.mark.skipif(not _runtime._facts.openmp_version(), reason="built without OpenMP: one thread")
has_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
                                  reason="needs two CPUs and a system that sets affinity")


@pytest.fixture(autouse=True)
def _same_setting_after():
    before = _runtime._num_threads
    yield
    _runtime._num_threads = before


# -- the same bits -----------------------------------------------------------------------------------------------------


def shifted(offset):
    """A function that copies an array to an address `offset` elements past a cache line."""
    def copy(a):
        memory = np.empty(a.size + 64, a.dtype)
        start = -memory.ctypes.data % 64 // a.itemsize + offset
        view = memory[start:start + a.size].reshape(a.shape)
        view[...] = a
        return view
    return copy


@pytest.mark.parametrize("shape", [(3001, 70), (8, 16, 41, 40), (700, 300)], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_same_bits_for_threads_runs_and_alignments(name, shape, dtype):
    arrays, call = make(shape, dtype), CALLS[name]
    fn.set_num_threads(1)
    expected = to_bytes(call.run(private(call, arrays)))
    for threads in (1, 2, 3, 7, 64):
        fn.set_num_threads(threads)
        for _ in range(2):
            assert to_bytes(call.run(private(call, arrays))) == expected, f"{threads} threads"
    fn.set_num_threads(3)
    for offset in (0, 1, 3, 7):
        assert to_bytes(call.run(rebuild(arrays, shifted(offset)))) == expected, f"offset {offset}"


def has_libgomp():
    """Whether fastnorm runs on the system's libgomp (a wheel's own has another name)."""
    maps = Path("/proc/self/maps")
    return maps.exists() and "/libgomp.so.1" in maps.read_text()


NESTED = """
import ctypes, numpy as np, fastnorm as fn
runtime = ctypes.CDLL("libgomp.so.1")
x = np.random.default_rng(0).standard_normal((8, 3, 100000)).astype(np.float32)
wanted = fn.batch_norm_forward(x)[0]
fn.set_num_threads(1)
found = {}

@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def body(_):
    if runtime.omp_get_thread_num() in CALLERS:
        found[runtime.omp_get_thread_num()] = fn.batch_norm_forward(x)[0]

runtime.GOMP_parallel(body, None, 2, 0)
assert sorted(found) == sorted(CALLERS) and all(np.array_equal(y, wanted) for y in found.values())
"""


@pytest.mark.skipif(not has_libgomp(), reason="calls GCC's OpenMP runtime by its own names")
@pytest.mark.parametrize("callers", ["{0}", "{0, 1}"])
def test_calls_from_somebody_elses_parallel_region(callers):
    done = python(NESTED.replace("CALLERS", callers))
    assert done.returncode == 0, done.stderr


HASHES = """
import hashlib, numpy as np, fastnorm as fn
from calls import CALLS, make, private, to_bytes
fn.set_num_threads({threads})
for name, call in CALLS.items():
    arrays = make((3001, 70), np.dtype("float32"))
    call.run(private(call, arrays))
    print(name, hashlib.sha256(repr(to_bytes(call.run(private(call, arrays)))).encode()).hexdigest())
"""


@has_openmp
@pytest.mark.parametrize("environment", [{"OMP_THREAD_LIMIT": "2"}, {"OMP_DYNAMIC": "true"}], ids=str)
def test_same_bits_where_openmp_gives_fewer_threads_than_asked_for(environment):
    wanted = python(HASHES.format(threads=1))
    found = python(HASHES.format(threads=7), **environment)
    assert wanted.returncode == found.returncode == 0, found.stderr
    assert found.stdout == wanted.stdout
    assert len(wanted.stdout.splitlines()) == len(CALLS)


# -- threads of Python -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_eight_python_threads_on_different_arrays(name):
    call = CALLS[name]
    cases = [make((701, 64), np.float32, seed) for seed in range(8)]
    expected = [to_bytes(call.run(private(call, arrays))) for arrays in cases]
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(call.run, private(call, arrays)) for _ in range(5) for arrays in cases]
        results = [to_bytes(future.result()) for future in futures]
    assert results == expected * 5


@pytest.mark.parametrize("name", CALLS)
def test_eight_python_threads_on_the_same_read_only_arrays(name):
    call, arrays = CALLS[name], make((701, 64), np.float32)
    for a in flat(arrays):
        a.flags.writeable = False
    expected = to_bytes(call.run(private(call, arrays)))
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(call.run, private(call, arrays)) for _ in range(40)]
        assert all(to_bytes(future.result()) == expected for future in futures)


@pytest.mark.parametrize("name", CALLS)
def test_a_python_thread_counts_while_a_kernel_runs(name):
    """Ticks in the middle of a call: another thread held the GIL. A busy machine may need several calls for that."""
    call, arrays = CALLS[name], make((2000, 1000), np.float64)
    ticks, stop = [], threading.Event()

    def count():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(1e-4)

    counter = threading.Thread(target=count)
    counter.start()
    fn.set_num_threads(1)
    try:
        for _ in range(200):
            own = private(call, arrays)
            ticks.clear()
            start = time.perf_counter()
            call.run(own)
            end = time.perf_counter()
            if any(0.4 < (tick - start) / (end - start) < 0.6 for tick in list(ticks)):
                break
        else:
            pytest.fail("no tick in the middle of 200 calls")
    finally:
        stop.set()
        counter.join()


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="needs a free-threaded interpreter")
def test_import_leaves_the_gil_off():
    assert python("import sys, fastnorm; print(sys._is_gil_enabled())").stdout.strip() == "False"


# -- how many ----------------------------------------------------------------------------------------------------------

THREADS = "import fastnorm as fn; print(fn.get_num_threads())"
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def printed(code, **environment):
    """What code prints, as integers."""
    result = python(code, **environment)
    assert result.returncode == 0, result.stderr
    return [int(word) for word in result.stdout.split()]


@has_openmp
def test_the_order_of_settings():
    both = {"FASTNORM_NUM_THREADS": "5", "OMP_NUM_THREADS": "3"}
    assert printed(THREADS + "; fn.set_num_threads(9); print(fn.get_num_threads())", **both) == [5, 9]
    assert printed(THREADS, OMP_NUM_THREADS="3") == [3]
    assert printed(THREADS, OMP_NUM_THREADS="3,2") == [3]
    assert printed(THREADS, FASTNORM_NUM_THREADS="") == [min(CPUS, math.ceil(min(cpu_quota(), CPUS)))]


@has_openmp
@has_affinity
def test_affinity_is_obeyed_unless_told_otherwise():
    mask = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    assert printed(mask + THREADS) == [1]
    assert printed(THREADS + "; " + mask + "print(fn.get_num_threads())")[1:] == [1]
    assert printed(mask + THREADS, OMP_NUM_THREADS="3") == [3]
    for nothing in ("abc", "0", "2,"):  # to OpenMP
        assert printed(THREADS + "; " + mask + "print(fn.get_num_threads())", OMP_NUM_THREADS=nothing)[1:] == [1]
    assert printed(mask + THREADS, FASTNORM_NUM_THREADS="2") == [2]


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(("cgroup", "files", "quota"), [
    ("0::/", {}, math.inf),
    ("0::/", {f"{V2}/cpu.max": "max 100000"}, math.inf),
    ("0::/", {f"{V2}/cpu.max": "150000 100000"}, 1.5),
    ("0::/a/b", {f"{V2}/a/b/cpu.max": "max 100000", f"{V2}/a/cpu.max": "300000 100000"}, 3.0),
    ("0::/not/mounted", {f"{V2}/cpu.max": "50000 100000"}, 0.5),
    ("4:memory:/m\n1:cpu,cpuacct:/j", {f"{V1}/j/cpu.cfs_quota_us": "250000", f"{V1}/j/cpu.cfs_period_us": "100000"},
     2.5),
    ("1:cpu,cpuacct:/", {f"{V1}/cpu.cfs_quota_us": "-1", f"{V1}/cpu.cfs_period_us": "100000"}, math.inf),
    ("1:cpu,cpuacct:/", {f"{V1}/cpu.cfs_quota_us": "nonsense"}, math.inf),
])
def test_quota_of_a_control_group(tmp_path, cgroup, files, quota):
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert cpu_quota(tmp_path) == quota


def test_quota_without_control_groups(tmp_path):
    assert cpu_quota(tmp_path) == math.inf


@has_openmp
def test_quota_is_obeyed_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(_runtime, "_num_threads", None)
    monkeypatch.setattr(_runtime, "_openmp_was_told", False)
    monkeypatch.setattr(_runtime, "_quota", 1)
    assert fn.get_num_threads() == 1
    fn.set_num_threads(7)
    assert fn.get_num_threads() == 7


LIMITS = """
import fastnorm as fn, threading
from threadpoolctl import threadpool_limits
before = fn.get_num_threads()
fn.set_num_threads(5)
with threadpool_limits(2):
    print(fn.get_num_threads())
    other = threading.Thread(target=lambda: print(fn.get_num_threads()))
    other.start()
    other.join()
    with threadpool_limits(1, user_api="openmp"):
        print(fn.get_num_threads())
print(fn.get_num_threads())
"""


@has_openmp
def test_limits_of_threadpoolctl_are_obeyed():
    pytest.importorskip("threadpoolctl")
    assert printed(LIMITS, OMP_NUM_THREADS="4") == [2, 5, 1, 5]


TOGETHER = """
import os, sys
import numpy as np
{imports}
x = np.random.default_rng(0).standard_normal((400, 500))

def others():
    a = torch.from_numpy(x)
    return [torch.softmax(a * 2, 1).sum().item(), scipy.linalg.norm(x @ x.T), float(scipy.linalg.svdvals(x[:50]).sum())]

def own():
    y, cache = fn.batch_norm_forward(x)
    return [y.tobytes(), fn.batch_norm_backward(x, cache)[0].tobytes(), fn.softmax(x).tobytes()]

def tasks():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
fn.set_num_threads(2)
expected = others()
alone = tasks()
expected_own = own()
print(tasks() - alone)
for _ in range(3):
    assert np.allclose(others(), expected, rtol=1e-12)
    assert own() == expected_own
print(tasks() - alone)
with open("/proc/self/maps") as maps:
    print(len({{line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line or "libiomp" in line}}))
torch.set_num_threads(1)
print(fn.get_num_threads())
"""


@has_openmp
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc")
@pytest.mark.parametrize("first", ["fastnorm", "torch"])
def test_pytorch_and_scipy_in_one_process(first):
    """All compute; fastnorm works with the threads that PyTorch has, and adds none where they share one OpenMP."""
    pytest.importorskip("torch", exc_type=ImportError)
    pytest.importorskip("scipy")
    lines = {"fastnorm": "import fastnorm as fn", "torch": "import torch", "scipy": "import scipy.linalg"}
    imports = "\n".join(sorted(lines.values(), key=lambda line: line != lines[first]))
    added, added_later, runtimes, limited = printed(TOGETHER.format(imports=imports), OMP_NUM_THREADS="2")
    if runtimes > 1:  # a wheel that brings an OpenMP of its own
        pytest.skip(f"{runtimes} OpenMP runtimes in one process: nothing is shared")
    assert (added, added_later, limited) == (0, 0, 1)
