"""Speed as ratios: fastnorm beside its NumPy twin, and beside PyTorch where it is installed.

    python bench/ratios.py [--threads N] [--seconds S]

All rivals of a case run in this process, interleaved call by call; a figure is a low quantile of many calls. Warm:
every rival has run, inputs as they lie in the caches after the others' calls. `fresh`: outputs are allocated by the
call; `out=`: they are given. Exit status 1 if a case is less than 4 times as fast as the twin.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np

import fastnorm as fn
from fastnorm import reference

try:
    import torch
except ImportError:
    torch = None

REQUIRED = 4.0  # times as fast as the twin

Rivals = dict[str, Callable[[], object]]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def batch_norm_forward() -> Rivals:
    x, gamma, beta = normal(32, 64, 56, 56), normal(64), normal(64)
    mean, var, out = np.zeros(64, np.float32), np.ones(64, np.float32), np.empty_like(x)
    rivals: Rivals = {
        "fresh": lambda: fn.batch_norm_forward(x, gamma, beta, mean, var),
        "out=": lambda: fn.batch_norm_forward(x, gamma, beta, mean, var, out=out),
        "twin": lambda: reference.batch_norm_forward(x, gamma, beta, mean, var),
    }
    if torch:
        args = [torch.from_numpy(a) for a in (x, gamma, beta, mean, var)]
        rivals["torch"] = lambda: torch.native_batch_norm(*args, True, 0.1, 1e-5)
    return rivals


def batch_norm_backward() -> Rivals:
    x, dy, gamma, beta = normal(32, 64, 56, 56), normal(32, 64, 56, 56), normal(64), normal(64)
    cache, twin = fn.batch_norm_forward(x, gamma, beta)[1], reference.batch_norm_forward(x, gamma, beta)[1]
    out = np.empty_like(x)
    rivals: Rivals = {
        "fresh": lambda: fn.batch_norm_backward(dy, cache),
        "out=": lambda: fn.batch_norm_backward(dy, cache, out=out),
        "twin": lambda: reference.batch_norm_backward(dy, twin),
    }
    if torch:
        tx, td, tg, tb = (torch.from_numpy(a) for a in (x, dy, gamma, beta))
        saved = torch.native_batch_norm(tx, tg, tb, None, None, True, 0.1, 1e-5)[1:]
        rivals["torch"] = lambda: torch.ops.aten.native_batch_norm_backward(
            td, tx, tg, None, None, *saved, True, 1e-5, [True] * 3)
    return rivals


def cross_entropy(n: int, classes: int) -> Rivals:
    logits, out = normal(n, classes), np.empty((n, classes), np.float32)
    targets = np.random.default_rng(1).integers(0, classes, n)
    rivals: Rivals = {
        "fresh": lambda: fn.softmax_cross_entropy(logits, targets),
        "out=": lambda: fn.softmax_cross_entropy(logits, targets, out=out),
        "twin": lambda: reference.softmax_cross_entropy(logits, targets),
    }
    if torch:
        leaf, labels = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(targets)

        def theirs() -> None:
            leaf.grad = None
            torch.nn.functional.cross_entropy(leaf, labels).backward()

        rivals["torch"] = theirs
    return rivals


def adam(size: int) -> Rivals:
    def state() -> list[np.ndarray]:
        return [normal(size), normal(size), np.zeros(size, np.float32), np.zeros(size, np.float32)]

    mine, twin = state(), state()
    rivals: Rivals = {
        "out=": lambda: fn.adam_step(*mine, step=10),
        "twin": lambda: reference.adam_step(*twin, step=10),
    }
    if torch:
        p = torch.from_numpy(normal(size)).requires_grad_()
        p.grad = torch.from_numpy(normal(size))
        rivals["torch"] = torch.optim.Adam([p], fused=True).step
    return rivals


CASES: dict[str, Callable[[], Rivals]] = {
    "batch norm forward (32,64,56,56)": batch_norm_forward,
    "batch norm backward (32,64,56,56)": batch_norm_backward,
    "cross-entropy + gradient (4096,1000)": lambda: cross_entropy(4096, 1000),
    "cross-entropy + gradient (4096,10)": lambda: cross_entropy(4096, 10),
    "Adam, 1 M parameters": lambda: adam(1_000_000),
}


def measure(rivals: Rivals, seconds: float) -> dict[str, float]:
    """The 20 % quantile of each rival's times, in seconds; their calls interleaved."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for call in rivals.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["twin"]) < 5:
        for name, call in rivals.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: sorted(values)[len(values) // 5] for name, values in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=fn.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each case runs (default: 3)")
    args = parser.parse_args()
    fn.set_num_threads(args.threads)
    if torch:
        torch.set_num_threads(args.threads)
    level = fn._runtime.kernels.level
    print(f"float32, {args.threads} threads, {level}; milliseconds, 20 % quantile, calls interleaved")
    print(f"{'':38s}{'fresh':>9s}{'out=':>9s}{'twin':>9s}{'torch':>9s}{'x twin':>9s}{'x torch':>9s}")
    slow = False
    for title, build in CASES.items():
        times = measure(build(), args.seconds)
        mine = times.get("fresh", times["out="])  # what rivals do by themselves: allocate
        names = ("fresh", "out=", "twin", "torch")
        cells = [f"{times[name] * 1e3:9.3f}" if name in times else f"{'':9s}" for name in names]
        ratios = [f"{times[name] / mine:9.1f}" if name in times else f"{'':9s}" for name in ("twin", "torch")]
        print(f"{title:38s}" + "".join(cells + ratios), flush=True)
        slow |= times["twin"] < REQUIRED * mine
    if slow:
        print(f"ratios: a case is less than {REQUIRED:g} times as fast as its twin", file=sys.stderr)
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
