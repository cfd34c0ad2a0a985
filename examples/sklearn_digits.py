"""Train scikit-learn's MLPClassifier on the digits, by itself and with fastnorm inside: same losses, both times.

    python examples/sklearn_digits.py                              # the classifier's defaults: 100 units, Adam
    python examples/sklearn_digits.py --hidden 512 512 --solver sgd
    python examples/sklearn_digits.py --epochs 3 --rounds 1        # a quick look
    python examples/sklearn_digits.py --one-thread                 # on a machine that has other things to do

What changes is one line: `with accelerate()`. The trainings alternate, and the shortest time of each counts. float64
(`--dtype float64`) shows that the computation is the same; in float32 training amplifies roundings.
"""

from __future__ import annotations

import argparse
import time
import warnings
from contextlib import nullcontext

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits

import fastnorm as fn
from fastnorm._demo.data import load_digits
from fastnorm.integrations.sklearn import accelerate

SEED = 0
WAYS = {"scikit-learn": nullcontext, "with fastnorm": accelerate}


def main() -> None:
    """Train both ways in turns and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="*", default=[100], help="units of each hidden layer")
    parser.add_argument("--activation", choices=["identity", "logistic", "tanh", "relu"], default="relu")
    parser.add_argument("--solver", choices=["adam", "sgd"], default="adam")
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5, help="trainings each way")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--one-thread", action="store_true", help="measure the CPU time of one thread")
    options = parser.parse_args()
    clock = time.perf_counter
    if options.one_thread:
        fn.set_num_threads(1)
        threadpool_limits(1, "blas")
        clock = time.thread_time

    warnings.simplefilter("ignore", ConvergenceWarning)  # so many epochs and no more are asked for
    data = load_digits()
    images, test_images = (part.images.astype(options.dtype) for part in (data.train, data.test))
    print(f"{data.name}: {len(images)} images, {options.epochs} epochs in batches of {options.batch}, hidden layers "
          f"{options.hidden}, {options.activation}, {options.solver}, {options.dtype}")
    models, seconds = {}, dict.fromkeys(WAYS, np.inf)
    for _ in range(options.rounds):
        for name, way in WAYS.items():
            model = MLPClassifier(
                options.hidden, options.activation, solver=options.solver, batch_size=options.batch,
                max_iter=options.epochs, n_iter_no_change=options.epochs, random_state=SEED)
            with way():
                began = clock()
                model.fit(images, data.train.labels)
                seconds[name] = min(seconds[name], clock() - began)
            models[name] = model
    for name, model in models.items():
        print(f"{name:14s} loss {model.loss_curve_[0]:.6f} -> {model.loss_curve_[-1]:.6f}   held out "
              f"{100 * model.score(test_images, data.test.labels):.1f} %   "
              f"{1e3 * seconds[name] / options.epochs:7.2f} ms an epoch")
    theirs, ours = (np.array(models[name].loss_curve_) for name in WAYS)
    slow, quick = (seconds[name] for name in WAYS)
    print(f"losses differ by {np.max(np.abs(ours - theirs) / theirs):.1e} at most, relatively; "
          f"{slow / quick:.2f} times as fast")


if __name__ == "__main__":
    main()
