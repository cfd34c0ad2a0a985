"""Train a two-layer network on the digits with HIPS autograd, and fastnorm's functions and Adam inside:
``python examples/autograd_digits.py --epochs 10``.
"""

from __future__ import annotations

import argparse

import autograd.numpy as np
from autograd import value_and_grad

import fastnorm as fn
from fastnorm._demo.data import load_digits
from fastnorm.integrations.autograd import batch_norm, softmax_cross_entropy

SEED, HIDDEN, BATCH = 0, 64, 64


def logits(params, x, running, training):
    """Dense, batch norm with ReLU, dense; without a bias where the batch norm has one."""
    w1, gamma, beta, w2, b2 = params
    hidden = batch_norm(np.dot(x, w1), gamma, beta, *running, training=training, activation="relu")
    return np.dot(hidden, w2) + b2


def main() -> None:
    """Train and print the loss of each epoch and the accuracy on held-out images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs

    data, rng = load_digits(), np.random.default_rng(SEED)
    pixels = data.train.images.shape[1]
    params = [fn.init.he_normal((pixels, HIDDEN), rng=rng, dtype="float32"), np.ones(HIDDEN, "float32"),
              np.zeros(HIDDEN, "float32"), fn.init.he_normal((HIDDEN, data.classes), rng=rng, dtype="float32"),
              np.zeros(data.classes, "float32")]
    running = np.zeros(HIDDEN, "float32"), np.ones(HIDDEN, "float32")

    def loss(params, x, labels):
        return softmax_cross_entropy(logits(params, x, running, training=True), labels)

    optimizer = fn.optim.Adam(params, lr=1e-2)
    for epoch in range(epochs):
        order, total = rng.permutation(len(data.train)), 0.0
        for rows in np.array_split(order, len(order) // BATCH):
            value, gradients = value_and_grad(loss)(params, data.train.images[rows], data.train.labels[rows])
            optimizer.step(gradients)
            total += float(value) * len(rows)
        print(f"epoch {epoch + 1:2d}   loss {total / len(order):.4f}")
    guesses = np.argmax(logits(params, data.test.images, running, training=False), axis=1)
    print(f"held out {100 * np.mean(guesses == data.test.labels):.1f} %")


if __name__ == "__main__":
    main()
