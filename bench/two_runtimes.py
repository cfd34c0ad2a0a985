"""A training step that alternates PyTorch and fastnorm, for several builds of fastnorm side by side.

Both libraries keep a pool of OpenMP threads, and idle threads spin for a while. Where each brings a runtime of its own,
two pools want the same cores. This measures what that costs: one process a build, in turns of a few steps, while the
others sleep.

    python bench/two_runtimes.py source=. wheel=wheelhouse/fastnorm-0.1.0-cp311-cp311-manylinux_2_34_x86_64.whl

The first build is what the others are compared with. `imports` is which library was imported first: it decides whose
runtime is loaded. Needs PyTorch; run nothing else meanwhile.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

ORDERS = ("torch, fastnorm", "fastnorm, torch")
PAUSE = 20e-3  # seconds before a turn: libgomp's idle threads spin for some milliseconds
QUANTILE = 0.2
ROWS, FEATURES, HIDDEN, CLASSES = 1024, 256, 512, 100


def training_step():
    """One step of a two-layer network: matrix products and GELU by PyTorch, everything else by fastnorm."""
    import torch

    import fastnorm as fn

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    x = torch.randn(ROWS, FEATURES)
    labels = rng.integers(0, CLASSES, ROWS)
    params = [fn.init.he_normal(shape, rng=rng) for shape in ((FEATURES, HIDDEN), (HIDDEN, CLASSES))]
    first, second = map(torch.from_numpy, params)
    optimizer = fn.optim.Adam(params, lr=1e-3)

    def step():
        hidden = torch.nn.functional.gelu(x @ first)
        y, cache = fn.batch_norm_forward(hidden.numpy(), activation="relu")
        y = torch.from_numpy(y)
        _, dlogits = fn.softmax_cross_entropy((y @ second).numpy(), labels)
        dlogits = torch.from_numpy(dlogits)
        dhidden, _, _ = fn.batch_norm_backward((dlogits @ second.T).numpy(), cache)
        dfirst = x.T @ torch.ops.aten.gelu_backward(torch.from_numpy(dhidden), hidden)
        optimizer.step([dfirst.numpy(), (y.T @ dlogits).numpy()])

    return step


def loaded_runtimes():
    """Names of the OpenMP runtimes in this process, one for each file."""
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    return sorted(name for path in paths if (name := Path(path).name).startswith(("libgomp", "libomp", "libiomp")))


def serve(order):
    """Take turns: for each line on stdin, that many steps, answered by their times in one line."""
    for name in order.split(", "):
        __import__(name)
    step = training_step()
    step()
    print(", ".join(loaded_runtimes()), flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        print(*times, flush=True)


class Build:
    """A process that has one build of fastnorm and PyTorch, imported in one order."""

    def __init__(self, name, folder, order):
        self.name, self.order, self.times = name, order, []
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path[:0] = {[str(folder), str(Path(__file__).parent)]!r}\n"
             f"import two_runtimes; two_runtimes.serve({order!r})"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.runtimes = self.process.stdout.readline().strip()
        if not self.runtimes:
            raise SystemExit(f"{name}: no fastnorm and PyTorch to import in {folder}")

    def turn(self, steps):
        """Run some steps; the first of a turn wakes the threads and does not count."""
        time.sleep(PAUSE)
        self.process.stdin.write(f"{steps + 1}\n")
        self.process.stdin.flush()
        self.times += [float(word) for word in self.process.stdout.readline().split()][1:]

    def close(self):
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def unpacked(path, folder):
    """A folder to import from: an unpacked wheel, or the path itself."""
    if path.suffix != ".whl":
        return path.resolve()
    zipfile.ZipFile(path).extractall(folder)
    return folder


def report(builds):
    """Print a line for each build and order; ratios are over the first build with the same order."""
    print(f"{'build':14s} {'imports':16s} {'20 % ms':>8s} {'median ms':>10s} {'ratio':>6s}  OpenMP runtimes")
    base = {build.order: np.quantile(build.times, QUANTILE) for build in reversed(builds)}
    for build in builds:
        low, median = np.quantile(build.times, QUANTILE), np.median(build.times)
        print(f"{build.name:14s} {build.order:16s} {low * 1e3:8.3f} {median * 1e3:10.3f} {low / base[build.order]:6.3f}"
              f"  {build.runtimes}")


def main():
    """Measure the builds named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("builds", nargs="+", metavar="NAME=PATH", help="a wheel, or a folder that holds fastnorm/")
    parser.add_argument("--turns", type=int, default=60, help="turns of each build (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps a turn (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        builds = []
        for text in arguments.builds:
            name, _, path = text.partition("=")
            folder = unpacked(Path(path), Path(scratch, name))
            builds += [Build(name, folder, order) for order in ORDERS]
        for _ in range(arguments.turns):
            for build in builds:
                build.turn(arguments.steps)
        for build in builds:
            build.close()
    report(builds)


if __name__ == "__main__":
    main()
