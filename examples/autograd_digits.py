"""Train a two-layer network on the digits with HIPS autograd: by `autograd.numpy` alone, and with fastnorm inside.

    python examples/autograd_digits.py --epochs 10
    python examples/autograd_digits.py --hidden 512 --batch 256
    python examples/autograd_digits.py --dtype float64        # where roundings do not show

Both train from the same weights on the same batches, epoch by epoch in turns. The shortest time of a step counts.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import autograd.numpy as np
from autograd import value_and_grad
from autograd.tracer import getval

import fastnorm as fn
from fastnorm._demo.data import load_digits
from fastnorm.integrations.autograd import batch_norm, softmax_cross_entropy

SEED, EPS, MOMENTUM = 0, 1e-5, 0.1


def plain_hidden(z, gamma, beta, running):
    """Batch norm and ReLU as autograd's users write them; running statistics in place, as fastnorm does."""
    mean = np.mean(z, axis=0)
    var = np.mean((z - mean) ** 2, axis=0)
    for average, value in zip(running, (mean, var * len(z) / (len(z) - 1)), strict=True):
        average += MOMENTUM * (getval(value) - average)
    return np.maximum(gamma * ((z - mean) / np.sqrt(var + EPS)) + beta, 0)


def plain_loss(logits, labels):
    """Mean cross-entropy of the softmax."""
    logits = logits - np.max(logits, axis=1, keepdims=True)
    log_p = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    return -np.mean(log_p[np.arange(len(labels)), labels])


class PlainAdam:
    """Adam in NumPy."""

    def __init__(self, params, lr):
        self.params, self.lr, self.steps = params, lr, 0
        self.m, self.v = ([np.zeros_like(p) for p in params] for _ in range(2))

    def step(self, gradients):
        """Update every parameter."""
        self.steps += 1
        for p, g, m, v in zip(self.params, gradients, self.m, self.v, strict=True):
            m += 0.1 * (g - m)
            v += 0.001 * (g * g - v)
            p -= self.lr / (1 - 0.9 ** self.steps) * m / (np.sqrt(v / (1 - 0.999 ** self.steps)) + 1e-8)


class Training:
    """A network, its optimizer, and the function that autograd differentiates."""

    def __init__(self, fast, data, options):
        rng, dtype = np.random.default_rng(SEED), options.dtype
        self.params = [fn.init.he_normal((data.train.images.shape[1], options.hidden), rng=rng, dtype=dtype),
                       np.ones(options.hidden, dtype), np.zeros(options.hidden, dtype),
                       fn.init.he_normal((options.hidden, data.classes), rng=rng, dtype=dtype),
                       np.zeros(data.classes, dtype)]
        self.running = np.zeros(options.hidden, dtype), np.ones(options.hidden, dtype)
        self.fast, self.seconds = fast, float("inf")
        self.optimizer = (fn.optim.Adam if fast else PlainAdam)(self.params, lr=1e-2)
        self.gradient = value_and_grad(self.loss)

    def loss(self, params, x, labels):
        """Mean loss of a batch: dense, batch norm with ReLU, dense, cross-entropy."""
        w1, gamma, beta, w2, b2 = params
        z = np.dot(x, w1)
        if self.fast:
            hidden = batch_norm(z, gamma, beta, *self.running, momentum=MOMENTUM, eps=EPS, activation="relu")
            return softmax_cross_entropy(np.dot(hidden, w2) + b2, labels)
        return plain_loss(np.dot(plain_hidden(z, gamma, beta, self.running), w2) + b2, labels)

    def epoch(self, part, batches):
        """Train on all batches; return the mean loss."""
        total = 0.0
        for rows in batches:
            x, labels = part.images[rows], part.labels[rows]
            start = time.perf_counter()
            value, gradients = self.gradient(self.params, x, labels)
            self.optimizer.step(gradients)
            self.seconds = min(self.seconds, time.perf_counter() - start)
            total += float(value) * len(rows)
        return total / sum(map(len, batches))

    def accuracy(self, part):
        """Share of the images that are read right, with the running statistics."""
        w1, gamma, beta, w2, b2 = self.params
        hidden = batch_norm(np.dot(part.images, w1), gamma, beta, *self.running, training=False, activation="relu")
        return np.mean(np.argmax(np.dot(hidden, w2) + b2, axis=1) == part.labels)


def main() -> None:
    """Train both ways, print the losses of each epoch, the time of a step and the accuracy on held-out images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=64, help="units of the hidden layer")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    options = parser.parse_args()

    data, rng = load_digits(), np.random.default_rng(SEED)
    train, test = (replace(part, images=part.images.astype(options.dtype)) for part in (data.train, data.test))
    plain, fast = Training(False, data, options), Training(True, data, options)
    for epoch in range(options.epochs):
        order = rng.permutation(len(train))
        batches = np.array_split(order, max(1, len(order) // options.batch))
        losses = [training.epoch(train, batches) for training in (plain, fast)]
        print(f"epoch {epoch + 1:2d}   loss {losses[0]:.6f} by autograd.numpy, {losses[1]:.6f} with fastnorm")
    print(f"a step {1e3 * plain.seconds:.3f} ms by autograd.numpy, {1e3 * fast.seconds:.3f} ms with fastnorm, "
          f"{plain.seconds / fast.seconds:.2f} x")
    print(f"held out {100 * fast.accuracy(test):.1f} %")


if __name__ == "__main__":
    main()
