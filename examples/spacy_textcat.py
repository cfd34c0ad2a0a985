"""Train spaCy's text classifier twice, with thinc's Adam and with fastnorm's: same losses, both times.

    python examples/spacy_textcat.py                # reviews made up from a vocabulary
    python examples/spacy_textcat.py --steps 5      # a quick look
    python examples/spacy_textcat.py --model cnn    # fewer weights, more computation: less to gain

What changes is the optimizer's name in spaCy's configuration. The classifier is the one that `spacy init config` gives,
a linear model over a bag of words with 262,144 weights a label, or a convolutional network over embedded words.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field

import numpy as np
import spacy
from spacy.cli.init_config import init_config
from spacy.tokens import Doc
from spacy.training import Example
from thinc.api import fix_random_seed

SEED, WARM_UP = 0, 2  # steps that no time is taken of
WORDS, WORDS_A_LABEL, LENGTH = 2000, 100, 40  # of the vocabulary; that say the label; of a review
CNN = {
    "@architectures": "spacy.TextCatReduce.v1", "exclusive_classes": True, "use_reduce_first": False,
    "use_reduce_last": False, "use_reduce_max": False, "use_reduce_mean": True, "nO": None,
    "tok2vec": {"@architectures": "spacy.HashEmbedCNN.v2", "pretrained_vectors": None, "width": 96, "depth": 4,
                "embed_size": 2000, "window_size": 1, "maxout_pieces": 3, "subword_features": True},
}
OPTIMIZERS = {"thinc": "Adam.v1", "with fastnorm": "fastnorm.Adam.v1"}


def reviews(vocabulary: spacy.Vocab, count: int, labels: int) -> list[Example]:
    """Reviews of random words, of which every fourth is one of its label's own."""
    rng = np.random.default_rng(SEED)
    words = np.array([f"word{i}" for i in range(WORDS)])
    made = []
    for label in rng.integers(labels, size=count):
        chosen = rng.integers(WORDS, size=LENGTH)
        chosen[::4] = label * WORDS_A_LABEL + rng.integers(WORDS_A_LABEL, size=LENGTH // 4)
        cats = {f"label{i}": float(i == label) for i in range(labels)}
        made.append(Example.from_dict(Doc(vocabulary, words[chosen].tolist()), {"cats": cats}))
    return made


@dataclass
class Training:
    """A pipeline in training; the same seed makes the same one."""

    name: str
    model: str
    count: int
    labels: int
    losses: list[float] = field(default_factory=list)
    times: dict[str, list[float]] = field(default_factory=lambda: {"step": [], "optimizer": []})

    def __post_init__(self) -> None:
        fix_random_seed(SEED)
        config = init_config(lang="en", pipeline=["textcat"], optimize="efficiency", gpu=False)
        if self.model == "cnn":
            config["components"]["textcat"]["model"] = CNN
        config["training"]["optimizer"]["@optimizers"] = OPTIMIZERS[self.name]  # the one change
        self.nlp = spacy.util.load_model_from_config(config, auto_fill=True)
        self.examples = reviews(self.nlp.vocab, self.count, self.labels)
        self.optimizer = self.nlp.initialize(lambda: self.examples)

    def step(self, rows: np.ndarray) -> None:
        """One batch: gradients, and the update that is timed by itself as well."""
        batch = [self.examples[row] for row in rows]
        began = time.perf_counter()
        losses = self.nlp.update(batch, sgd=False, losses={})  # gradients alone
        computed = time.perf_counter()
        self.nlp.get_pipe("textcat").finish_update(self.optimizer)
        self.optimizer.step_schedules()
        ended = time.perf_counter()
        self.times["step"].append(ended - began)
        self.times["optimizer"].append(ended - computed)
        self.losses.append(losses["textcat"])

    def milliseconds(self, part: str) -> float:
        """The median over the steps."""
        return 1e3 * float(np.median(self.times[part][min(WARM_UP, len(self.losses) - 1):]))


def main() -> None:
    """Train both, in turns, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["bow", "cnn"], default="bow")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--labels", type=int, default=4)
    options = parser.parse_args()
    trainings = [Training(name, options.model, 10 * options.batch, options.labels) for name in OPTIMIZERS]
    rng = np.random.default_rng(SEED)
    for _ in range(options.steps):
        rows = rng.choice(10 * options.batch, options.batch, replace=False)
        for training in trainings:
            training.step(rows)
    print(f"{options.model}, {options.labels} labels: {options.steps} steps of {options.batch} reviews")
    for training in trainings:
        print(f"{training.name:14s} loss {training.losses[0]:.6f} -> {training.losses[-1]:.6f}   "
              f"{training.milliseconds('step'):7.2f} ms a step, of which the optimizer "
              f"{training.milliseconds('optimizer'):6.2f}")
    before, after = trainings
    apart = max(abs(a - b) / abs(b) for a, b in zip(after.losses, before.losses, strict=True))
    print(f"losses differ by {apart:.1e} at most, relatively; "
          f"{before.milliseconds('step') / after.milliseconds('step'):.2f} times as fast")


if __name__ == "__main__":
    main()
