"""Draw the pictures of the documentation, each for light and for dark pages: `python docs/figures.py`.

What they show is computed by fastnorm itself, with fixed seeds, or read from docs/speed.md: the same versions draw the
same files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

import fastnorm as fn

FOLDER = Path(__file__).parent / "figures"
# M. Okabe, K. Ito, "Color universal design", 2008: told apart with any color vision.
BLUE, RED, GREEN, ORANGE, PINK, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
WIDTH = 7.2  # inches


@dataclass(frozen=True)
class Scheme:
    """The colors of text and of what stands back, on the theme's background."""

    name: str
    ink: str
    faint: str

    @property
    def style(self) -> Any:
        """Matplotlib's settings."""
        return {"text.color": self.ink, "axes.labelcolor": self.ink, "axes.edgecolor": self.ink,
                "xtick.color": self.ink, "ytick.color": self.ink, "axes.facecolor": "none", "figure.facecolor": "none",
                "savefig.facecolor": "none", "legend.frameon": False, "font.size": 9, "axes.titlesize": 10,
                "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "fastnorm",
                "legend.fontsize": 8.5}


SCHEMES = (Scheme("light", "#1a1a1a", "#9a9a9a"), Scheme("dark", "#e4e4e4", "#7d7d7d"))


# -- the front page ----------------------------------------------------------------------------------------------------


def overview(figure: Any, scheme: Scheme) -> None:
    """How many times as fast as each rival, by kernel: the geometric means of docs/speed.md, and the least ratios."""
    report = Path(__file__).with_name("speed.md").read_text(encoding="utf-8")
    _, means = report.split("## Geometric means", 1)
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in means.split("\n\n")[2].split("\n")[2:]]
    ax = figure.subplots()
    for column, (rival, color) in enumerate((("PyTorch", BLUE), ("JAX", ORANGE)), 2):
        pairs = [re.fullmatch(r"([0-9.]+) \(([0-9.]+)\)", row[column]) for row in rows]
        mean, least = np.array([[float(pair[1]), float(pair[2])] for pair in pairs if pair]).T
        at = np.arange(len(rows)) + 0.38 * (column - 2.5)
        ax.barh(at, mean, 0.36, color=color, label=f"over {rival}, the mean of all cases")
        ax.plot(least, at, "|", color=scheme.ink, markersize=9, label="" if column == 2 else "the least of all cases")
        for y, value in zip(at, mean, strict=True):
            ax.annotate(f"{value:.1f} ×", (value, y), va="center", fontsize=8, xytext=(3, 0),
                        textcoords="offset points")
    ax.axvline(1, color=scheme.faint, linestyle="--")
    ax.set_yticks(range(len(rows)), [row[0].strip("*") for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel("times as fast, float32, two threads")
    figure.legend(loc="outside upper center", ncols=3)


# -- batch norm --------------------------------------------------------------------------------------------------------


def batch_norm_channels(figure: Any, scheme: Scheme) -> None:
    """Histograms of three channels: as they come, normalized, and after gamma and beta."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((4000, 3)) * [0.5, 2.0, 1.0] + [-3.0, 1.0, 4.0]
    gamma, beta = np.array([1.5, 0.6, 1.0]), np.array([0.0, 1.0, -2.0])
    stages = (("x: as it comes", x), ("normalized", fn.batch_norm_forward(x)[0]),
              ("y: after γ and β, which are learned", fn.batch_norm_forward(x, gamma, beta)[0]))
    bins = np.linspace(-7, 8, 76).tolist()
    for ax, (title, values) in zip(figure.subplots(1, 3, sharex=True, sharey=True), stages, strict=True):
        for channel, color in enumerate((BLUE, RED, GREEN)):
            ax.hist(values[:, channel], bins, color=color, alpha=0.65, label=f"channel {channel}")
        ax.set_title(title)
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
    ax.legend()


def batch_norm_axes(figure: Any, scheme: Scheme) -> None:
    """Which values share a mean: the slab of one channel in a batch of images and in a batch of vectors."""
    images, vectors = figure.subplots(1, 2, subplot_kw={"projection": "3d"})
    for ax, shape, title, labels in (
            (images, (4, 5, 6), "images: (N, C, H × W)", ("N", "C", "H × W")),
            (vectors, (6, 5, 1), "vectors: (N, C)", ("N", "C", ""))):
        n, channels, inner = shape
        slab = np.zeros((channels, n, inner), bool)
        slab[2] = True
        # Two calls: within one, faces between two cells are left out, and the slab would be hollow.
        ax.voxels(slab, facecolors=BLUE, edgecolor=scheme.faint, linewidth=0.4)
        ax.voxels(~slab, facecolors=scheme.faint + "18", edgecolor=scheme.faint, linewidth=0.4)
        ax.set_title(title)
        ax.set_xlabel(labels[1], labelpad=-12)
        ax.set_ylabel(labels[0], labelpad=-12)
        ax.set_zlabel(labels[2], labelpad=-12)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_zticks([])
        ax.set_aspect("equal")
        ax.view_init(24, -58)
        for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
            axis.pane.set_visible(False)
            axis.line.set_visible(False)


def batch_norm_test_time(figure: Any, scheme: Scheme) -> None:
    """One value normalized with many batches and with the running statistics; and how those settle."""
    rng = np.random.default_rng(2)
    population_mean, population_std, value = 3.0, 2.0, 4.0
    spread, settling = figure.subplots(1, 2)

    sizes = (4, 16, 64)
    for row, size in enumerate(sizes):
        outputs = []
        for _ in range(150):
            batch = rng.normal(population_mean, population_std, (size, 1))
            batch[0] = value
            outputs.append(fn.batch_norm_forward(batch)[0][0, 0])
        spread.plot(outputs, row + rng.uniform(-0.25, 0.25, 150), ".", color=BLUE, alpha=0.5, markersize=4)
    spread.axvline((value - population_mean) / population_std, color=RED, label="with running statistics")
    spread.set_yticks(range(len(sizes)), [f"batch of {size}" for size in sizes])
    spread.set_xlabel("what one and the same input becomes")
    spread.set_title("batch statistics: it depends on its neighbors")
    spread.set_ylim(-0.6, 3.2)
    spread.legend(loc="upper right")

    steps = 80
    for momentum, color in ((0.5, ORANGE), (0.1, BLUE), (0.02, GREEN)):
        mean, var = np.zeros(1), np.ones(1)
        course = []
        batches = np.random.default_rng(3)
        for _ in range(steps):
            fn.batch_norm_forward(batches.normal(population_mean, population_std, (16, 1)), None, None, mean, var,
                                  momentum=momentum)
            course.append(mean[0])
        settling.plot(course, color=color, label=f"momentum {momentum:g}")
    settling.axhline(population_mean, color=scheme.faint, linestyle="--", label="mean of all data")
    settling.set_xlabel("training steps")
    settling.set_title("the running mean settles")
    settling.legend()


# -- initialization ----------------------------------------------------------------------------------------------------


def initialization_depth(figure: Any, scheme: Scheme) -> None:
    """The size of the signal after each of 30 ReLU layers, and of the gradient on its way back."""
    depth, width = 30, 256
    forward, backward = figure.subplots(1, 2, sharey=True)
    lecun, he = 1 / width, 2 / width
    for name, variance, color in (("He: 2 / fan_in", he, BLUE), ("LeCun: 1 / fan_in", lecun, GREEN),
                                  ("too small: 0.5 / fan_in", lecun / 2, ORANGE),
                                  ("too large: 4 / fan_in", 2 * he, RED)):
        rng = np.random.default_rng(4)
        weights = [rng.standard_normal((width, width)) * np.sqrt(variance) for _ in range(depth)]
        h = rng.standard_normal((128, width))
        inputs, sizes = [], [1.0]
        for w in weights:
            inputs.append(h @ w)
            h = fn.relu(inputs[-1])
            sizes.append(float(np.sqrt(np.mean(h**2))))
        forward.semilogy(sizes, color=color, label=name)
        dy = rng.standard_normal(h.shape)
        sizes = [1.0]
        for w, z in zip(reversed(weights), reversed(inputs), strict=True):
            dy = fn.relu_backward(dy, z) @ w.T
            sizes.append(float(np.sqrt(np.mean(dy**2))))
        backward.semilogy(range(depth, -1, -1), sizes, color=color)
    forward.set_title("forward: root mean square of the signal")
    backward.set_title("backward: of the gradient")
    forward.set_xlabel("layer")
    backward.set_xlabel("layer")
    forward.legend(loc="lower left")


# -- softmax -----------------------------------------------------------------------------------------------------------


def softmax_gradient(figure: Any, scheme: Scheme) -> None:
    """Logits, probabilities and gradient of one row."""
    logits = np.array([[2.0, 3.1, 0.5, -1.0, 1.2]])
    label = 0
    _, gradient = fn.softmax_cross_entropy(logits, np.array([label]))
    panels = (("logits x", logits[0]), ("softmax p", fn.softmax(logits)[0]), ("gradient p − q", gradient[0]))
    for ax, (title, values) in zip(figure.subplots(1, 3), panels, strict=True):
        colors = [RED if c == label else BLUE for c in range(len(values))]
        ax.bar(range(len(values)), values, color=colors, width=0.7)
        ax.axhline(0, color=scheme.ink, linewidth=0.8)
        ax.set_title(title)
        ax.set_xlabel("class (the label is red)")
        ax.set_xticks(range(len(values)))
        ax.margins(y=0.15)
        for c, value in enumerate(values):
            ax.annotate(f"{value:.2f}", (c, value), ha="center", va="bottom" if value >= 0 else "top", fontsize=8,
                        xytext=(0, 1 if value >= 0 else -1), textcoords="offset points")


# -- optimizers --------------------------------------------------------------------------------------------------------


def optimizer_paths(figure: Any, scheme: Scheme) -> None:
    """The way of each optimizer down a long, slanted valley."""
    slopes = np.array([0.12, 2.0])
    start = np.array([-8.0, 2.2])
    rules: tuple[tuple[str, str, Callable[[Any], fn.optim.Optimizer]], ...] = (
        ("SGD", ORANGE, lambda p: fn.optim.SGD(p, lr=0.4)),
        ("SGD, momentum 0.9", BLUE, lambda p: fn.optim.SGD(p, lr=0.1, momentum=0.9)),
        ("the same, Nesterov", SKY, lambda p: fn.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)),
        ("Adagrad", PINK, lambda p: fn.optim.Adagrad(p, lr=1.5)),
        ("RMSProp", GREEN, lambda p: fn.optim.RMSProp(p, lr=0.25, alpha=0.9)),
        ("Adam", RED, lambda p: fn.optim.Adam(p, lr=0.5)))
    x, y = np.meshgrid(np.linspace(-9, 4, 200), np.linspace(-3, 3, 120))
    height = 0.5 * (slopes[0] * x**2 + slopes[1] * y**2)
    for ax, (name, color, make) in zip(figure.subplots(2, 3, sharex=True, sharey=True).flat, rules, strict=True):
        point = start.copy()
        optimizer = make(point)
        path = [point.copy()]
        for _ in range(40):
            optimizer.step(slopes * point)
            path.append(point.copy())
        ax.contour(x, y, height, levels=np.geomspace(0.05, 14, 9).tolist(), colors=scheme.faint, linewidths=0.6)
        ax.plot(*np.array(path).T, ".-", color=color, linewidth=1.3, markersize=4)
        ax.plot(0, 0, "+", color=scheme.ink, markersize=9)
        ax.set_title(f"{name} (lr {optimizer.lr:g})")
        ax.set_xticks([])
        ax.set_yticks([])


def adam_bias(figure: Any, scheme: Scheme) -> None:
    """Why Adam corrects its averages: the first steps with and without."""
    gradients = 1 + 0.3 * np.random.default_rng(5).standard_normal(60)
    b1, b2 = 0.9, 0.999
    m = v = 0.0
    raw, corrected = [], []
    for t, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        raw.append(m / np.sqrt(v))
        corrected.append(m / (1 - b1**t) / np.sqrt(v / (1 - b2**t)))
    ax = figure.subplots()
    ax.plot(range(1, 61), raw, color=ORANGE, label="without bias correction")
    ax.plot(range(1, 61), corrected, color=BLUE, label="with it")
    ax.axhline(1, color=scheme.faint, linestyle="--")
    ax.set_xlabel("step")
    ax.set_ylabel("step / learning rate")
    ax.set_ylim(0, None)
    ax.legend()


# -- the tutorial ------------------------------------------------------------------------------------------------------


def digits(figure: Any, scheme: Scheme) -> None:
    """The first scans of the data set."""
    from sklearn.datasets import load_digits

    data = load_digits()
    for ax, image, label in zip(figure.subplots(2, 10).flat, data.images, data.target, strict=False):
        ax.imshow(image, cmap="gray_r" if scheme.name == "light" else "gray")
        ax.set_title(str(label), fontsize=9)
        ax.axis("off")


PICTURES: dict[Callable[[Any, Scheme], None], float] = {  # and the height in inches
    overview: 3.6, batch_norm_channels: 2.2, batch_norm_axes: 2.8, batch_norm_test_time: 2.8, initialization_depth: 2.8,
    softmax_gradient: 2.3, optimizer_paths: 3.6, adam_bias: 2.4, digits: 1.8}


def main() -> None:
    """Draw all pictures."""
    FOLDER.mkdir(exist_ok=True)
    for paint, height in PICTURES.items():
        for scheme in SCHEMES:
            with rc_context(scheme.style):
                figure = Figure(figsize=(WIDTH, height), layout="constrained")
                paint(figure, scheme)
                file = FOLDER / f"{paint.__name__.replace('_', '-')}-{scheme.name}.svg"
                figure.savefig(file, metadata={"Date": None})  # no date inside: the same file every time
                print(file)


if __name__ == "__main__":
    main()
