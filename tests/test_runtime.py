"""Which build is loaded, threads, fork, and what a user is told."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import LEVELS, python

import fastnorm as fn
from fastnorm import _runtime

SHOW = "import fastnorm as fn; from fastnorm import _runtime; print(_runtime.kernels.level, fn.get_num_threads())"


def test_best_level_is_the_default():
    assert python(SHOW).stdout.split()[0] == LEVELS[-1]


@pytest.mark.parametrize("name", LEVELS)
def test_environment_picks_a_level(name):
    assert python(SHOW, FASTNORM_ISA=name).stdout.split()[0] == name


def test_unknown_level_is_a_clear_error_at_import():
    result = python(SHOW, FASTNORM_ISA="sse9")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        f"ImportError: FASTNORM_ISA: expected one of {', '.join(LEVELS)}, got 'sse9': no such level")


def test_level_that_the_machine_lacks_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(_runtime._facts, "cpu_supports", lambda level: level == "baseline", raising=True)
    if "avx2" in _runtime.built_levels():
        with pytest.raises(ImportError, match="expected one of baseline, got 'avx2': this machine cannot run it"):
            _runtime.choose_level("avx2")
    assert _runtime.choose_level(None)[0] == "baseline"


def test_level_that_was_not_built_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(_runtime, "built_levels", lambda: ["baseline"])
    with pytest.raises(ImportError, match="got 'avx512': this build does not hold it"):
        _runtime.choose_level("avx512")


def test_unbuilt_tree_says_what_to_do(tmp_path):
    package = tmp_path / "fastnorm"
    source = os.path.dirname(fn.__file__)
    package.mkdir()
    (package / "_kernels").mkdir()
    for name in ("__init__.py", "_runtime.py", "_quota.py", "_arrays.py", "_interchange.py", "_kernels/__init__.py"):
        shutil.copy(os.path.join(source, name), package / name)
    result = subprocess.run([sys.executable, "-c", "import fastnorm"], cwd=tmp_path, capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": str(tmp_path)}, timeout=60)
    assert result.returncode == 1
    assert "no compiled kernels in" in result.stderr
    assert "pip install -e ." in result.stderr


has_openmp = pytest.mark.skipif(not _runtime._facts.openmp_version(), reason="built without OpenMP: one thread")


def test_import_leaves_numpy_random_alone():
    """It is a third of what `import fastnorm` would cost; NumPy's own import loads it up to 2.2."""
    done = python("import sys, numpy\nbefore = set(sys.modules)\nimport fastnorm\nprint(set(sys.modules) - before)")
    assert "'fastnorm'" in done.stdout
    assert "'numpy.random'" not in done.stdout
    for name in ("fastnorm.checkpoint", "hashlib", "zipfile"):  # half of the rest
        assert f"'{name}'" not in done.stdout


def test_checkpoint_is_imported_when_it_is_asked_for():
    done = python("import sys, fastnorm\nassert 'checkpoint' in dir(fastnorm)\n"
                  "assert 'fastnorm.checkpoint' not in sys.modules\nfastnorm.checkpoint.save\n"
                  "assert 'fastnorm.checkpoint' in sys.modules\nprint(hasattr(fastnorm, 'nonsense'))")
    assert done.stdout.strip() == "False", done.stderr


ONE_POOL = """
import ctypes
try:
    ctypes.CDLL("libgomp.so.1")
except OSError:
    raise SystemExit("no libgomp outside fastnorm")
from fastnorm import _runtime
print(_runtime._openmp_runtime())
"""


@has_openmp
def test_an_openmp_runtime_that_is_already_loaded_is_used():
    """Two copies of libgomp are two pools of threads, which spin on the same cores; a repaired wheel brings a copy."""
    done = python(ONE_POOL)
    if "libgomp" not in fn._runtime._openmp_runtime() or "no libgomp outside" in done.stderr:
        pytest.skip("fastnorm's libgomp is the only one here")
    assert done.stdout.count("libgomp") == 1, done.stdout


@has_openmp
def test_thread_settings():
    assert python(SHOW, FASTNORM_NUM_THREADS="5", OMP_NUM_THREADS="3").stdout.split()[1] == "5"
    assert python(SHOW, OMP_NUM_THREADS="3").stdout.split()[1] == "3"
    assert int(python(SHOW).stdout.split()[1]) >= 1
    before = fn.get_num_threads()
    fn.set_num_threads(9)
    assert fn.get_num_threads() == 9
    fn.set_num_threads(before)


@pytest.mark.parametrize("value", ["0", "two", "-1", "1e9", "100000"])
def test_bad_thread_environment_is_a_clear_error(value):
    result = python(SHOW, FASTNORM_NUM_THREADS=value)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: FASTNORM_NUM_THREADS: expected an integer in [1, 1024], got")


@pytest.mark.parametrize(("n", "error", "message"), [
    (0, ValueError, "n: expected an integer >= 1, got 0"),
    (-3, ValueError, "n: expected an integer >= 1, got -3"),
    (10**9, ValueError, "n: expected an integer <= 1024, got 1000000000"),
    (2.0, TypeError, "n: expected an integer, got float"),
    ("2", TypeError, "n: expected an integer, got str"),
    (True, TypeError, "n: expected an integer, got bool"),
])
def test_set_num_threads_refuses(n, error, message):
    before = fn.get_num_threads()
    with pytest.raises(error) as raised:
        fn.set_num_threads(n)
    assert str(raised.value) == message
    assert fn.get_num_threads() == before


def work(_):
    y, cache = fn.batch_norm_forward(np.arange(600000.0).reshape(3000, 200))
    return fn.get_num_threads(), float(y[7].sum()), float(fn.batch_norm_backward(y, cache)[0].sum())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_children_compute_after_the_parent_used_threads():
    before = fn.get_num_threads()
    fn.set_num_threads(2)
    expected = work(None)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.map_async(work, range(4)).get(timeout=60)
    fn.set_num_threads(before)
    assert {n for n, *_ in results} == {1}  # a forked child has no OpenMP workers, and does not start any
    assert {tuple(values) for _, *values in results} == {tuple(expected[1:])}


def test_show_config(capsys):
    fn.show_config()
    text = capsys.readouterr().out
    for title in ("fastnorm", "instruction set", "available", "threads", "OpenMP runtime", "compiler", "flags"):
        assert title in text
    assert _runtime.kernels.level in text


def test_kernels_release_the_gil_and_are_safe_from_many_python_threads():
    from concurrent.futures import ThreadPoolExecutor

    x = np.random.default_rng(0).standard_normal((500, 300))
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: fn.batch_norm_forward(x)[0].tobytes(), range(64)))
    assert len(set(results)) == 1


def test_import_needs_numpy_alone():
    """No extra is imported with the package."""
    code = ("import sys, fastnorm;"
            "print(sorted({'sklearn', 'matplotlib', 'rich', 'threadpoolctl', 'scipy'} & set(sys.modules)))")
    assert python(code).stdout.strip() == "[]"


TEAM_PROBE = """
import os, subprocess, sys, time
import numpy as np
import fastnorm as fn
x = np.random.default_rng(0).standard_normal((2000, 1000), dtype=np.float32)
out = np.empty_like(x)
expected = fn.batch_norm_forward(x)[0].tobytes()
hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
try:
    end = time.perf_counter() + 1.5
    while time.perf_counter() < end:
        assert fn.batch_norm_forward(x, out=out)[0].tobytes() == expected
finally:
    for hog in hogs:
        hog.kill()
print("same")
"""


def test_same_bits_while_other_processes_hold_the_cores():
    """A stalled team makes the caller work alone for a while, which must not show in the results."""
    assert python(TEAM_PROBE).stdout.strip() == "same"


ALONE_PROBE = """
import os, time
import numpy as np
import fastnorm as fn
def threads():
    return len(os.listdir("/proc/self/task"))
x = np.ones((512, 1024), np.float32)
labels = np.zeros(512, int)
fn.set_num_threads(2)
before = threads()
for _ in range(3):
    time.sleep(0.02)
    fn.softmax_cross_entropy(x, labels)
after_pauses = threads()
end = time.perf_counter() + 0.05
while time.perf_counter() < end:
    fn.relu(x)
print(after_pauses - before, threads() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in Linux's /proc")
def test_small_calls_after_a_pause_wake_no_threads():
    """Waking a thread may take a time slice; calls that follow each other closely do it once."""
    threads = min(2, len(os.sched_getaffinity(0)))
    if threads == 1 or "none" in fn._runtime.config()["OpenMP runtime"]:
        pytest.skip("needs OpenMP and two cores")
    assert python(ALONE_PROBE).stdout.split() == ["0", "1"]
