"""Fork, spawn and joblib: kernels in child processes, whatever the parent was doing."""

from __future__ import annotations

import multiprocessing
import os
import sys

import pytest
from calls import CALLS, make, private, to_bytes
from conftest import python

import fastnorm as fn
from fastnorm import _runtime

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
TEAM = (os.cpu_count() or 1) + 1  # one that always gets its threads: smaller ones may work alone for a while
NAMES = ("batch_norm_forward", "batch_norm_backward", "softmax_cross_entropy", "adam_step", "dropout")


def results(threads=None):
    """The bits of several kernels, on arrays large enough for a team."""
    if threads:
        fn.set_num_threads(threads)
    arrays = make((3000, 40), "float32")
    return [to_bytes(CALLS[name].run(private(CALLS[name], arrays))) for name in NAMES]


# In a process of its own: a child that hangs is ended with it.
FORKED = """
import multiprocessing, os, sys, threading, time, warnings
warnings.simplefilter("ignore")  # newer Pythons warn of a fork beside threads, which is what is tested
import fastnorm as fn
from test_processes import TEAM, results

children, busy = int(sys.argv[1]), bool(int(sys.argv[2]))
expected = results(TEAM)

def work(i):  # in a child: on the one thread it starts with, then on many
    alone = fn.get_num_threads() == 1 and results() == expected
    return alone and results(TEAM) == expected and fn.get_num_threads() == (TEAM if openmp else 1)

from fastnorm import _runtime
openmp = _runtime._facts.openmp_version()
stop = threading.Event()

def compute():
    while not stop.is_set():
        assert results() == expected

threads = [threading.Thread(target=compute) for _ in range(busy)]
for thread in threads:
    thread.start()
done = 0
while done < children:
    assert results() == expected  # this thread has workers again
    with multiprocessing.get_context("fork").Pool(4) as pool:
        answers = pool.map_async(work, range(4), chunksize=1).get(timeout=60)
        assert answers == [True] * 4, answers
        pool.close()
        pool.join()
    done += len(answers)
stop.set()
for thread in threads:
    thread.join()
print(done, "children")
"""


def forked(children, busy):
    """Run FORKED; the number of children that computed."""
    code = f"import sys; sys.argv = ['', '{children}', '{int(busy)}']\n{FORKED}"
    result = python(code, timeout=600)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    return int(result.stdout.split()[0])


@needs_fork
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "inside a kernel"])
def test_forked_children_compute(busy):
    """After the parent used threads; and forked while another Python thread is inside a kernel."""
    assert forked(12, busy) == 12


@needs_fork
@pytest.mark.long
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "inside a kernel"])
def test_500_forked_children_compute(busy):
    assert forked(500, busy) == 500


@needs_fork
@pytest.mark.skipif(not _runtime._facts.openmp_version(), reason="built without OpenMP: one thread")
def test_child_stays_on_one_thread_where_workers_cannot_be_released(monkeypatch):
    monkeypatch.setattr(_runtime, "_num_threads", 2)
    monkeypatch.setattr(_runtime, "_one_thread_only", False)
    monkeypatch.setattr(_runtime, "_workers_released", False)
    _runtime._after_fork_in_child()
    fn.set_num_threads(2)
    assert fn.get_num_threads() == 1


def test_spawned_children_compute():
    expected = results()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map_async(results, [None, TEAM]).get(timeout=120) == [expected] * 2


@pytest.mark.parametrize("backend", ["loky", "multiprocessing", "threading"])
def test_joblib(backend):
    joblib = pytest.importorskip("joblib")
    if backend == "multiprocessing" and sys.version_info >= (3, 12):
        pytest.skip("this Python warns of every fork beside threads")
    before, expected = fn.get_num_threads(), results(TEAM)
    try:
        assert joblib.Parallel(2, backend=backend)(joblib.delayed(results)() for _ in range(4)) == [expected] * 4
    finally:
        fn.set_num_threads(before)
        if backend == "loky":  # its workers would stay
            joblib.externals.loky.get_reusable_executor().shutdown(wait=True)
