"""The grid: what is measured, on which shapes, and the bytes that each algorithm has to move.

A case knows its inputs, how to call it on either backend (`fastnorm` or `fastnorm.reference`), and its traffic; the
rivals' calls are in `rivals/`. Inputs are made when a case runs, and shared by the backends and the rivals that work on
NumPy's memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import numpy as np

from .._arrays import Array
from . import shapes

FRESH, OUT, IN_PLACE = "fresh", "out", "in place"  # where results go: memory of the call's own, given, the inputs

Calls = dict[str, Callable[[], Any]]  # by where the results go
Inputs = dict[str, Any]
STEP = 10  # of Adam and Adagrad: their bias corrections are those of a training under way
DROPOUT = 0.5


class Traffic(NamedTuple):
    """Bytes that an algorithm has to move when it reads each input once and writes each output once."""

    read: int = 0     # only read
    copied: int = 0   # read in one place, and as many written in another
    updated: int = 0  # read and written back

    @property
    def total(self) -> int:
        """All bytes on the bus, in either direction."""
        return self.read + 2 * self.copied + 2 * self.updated

    def seconds(self, limit: Mapping[str, float]) -> float:
        """The least time, given the bus's speed in bytes a second: {"read": ..., "copy": ..., "update": ...}."""
        return self.read / limit["read"] + 2 * self.copied / limit["copy"] + 2 * self.updated / limit["update"]

    def __add__(self, other: object) -> Traffic:
        """Add up, term by term."""
        assert isinstance(other, Traffic)
        return Traffic(*(a + b for a, b in zip(self, other, strict=True)))


def _normal(shape: tuple[int, ...], dtype: str, seed: int) -> Array:
    """Normal deviates; those of large arrays repeat every 4 MB, for making them takes longer than the measurement."""
    rng = np.random.default_rng(seed)
    size = math.prod(shape)
    period = min(size, (1 << 20) + 7)
    return np.resize(rng.standard_normal(period).astype(dtype), size).reshape(shape)


def _dimensions(shape: tuple[int, ...]) -> str:
    return "(" + ",".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


@dataclass(frozen=True)
class Case:
    """What all cases have; `elements` is the size that a time per element refers to."""

    family: ClassVar[str]
    dtype: str

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return np.dtype(self.dtype).itemsize

    @property
    def _suffix(self) -> str:
        return "" if self.dtype == "float32" else f" {self.dtype}"

    @property
    def title(self) -> str:
        """The operation, without its shape."""
        raise NotImplementedError

    @property
    def size(self) -> str:
        """The shape, in words."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """What a case is called, and found by."""
        return f"{self.title} {self.size}{self._suffix}"

    @property
    def elements(self) -> int:
        """Elements of the largest array, or of all parameters."""
        raise NotImplementedError

    @property
    def traffic(self) -> Traffic:
        """Bytes to move."""
        raise NotImplementedError

    @property
    def array_bytes(self) -> int:
        """Bytes of the largest array, or of all parameters."""
        return self.elements * self.item

    def inputs(self) -> Inputs:
        """Arrays for a call, by name."""
        raise NotImplementedError

    def calls(self, backend: ModuleType, inputs: Inputs) -> Calls:
        """The call on `fastnorm` or `fastnorm.reference`, by where its results go."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What a report groups by, as JSON can hold it."""
        return {"name": self.name, "family": self.family, "title": self.title, "size": self.size,
                "elements": self.elements, "array_bytes": self.array_bytes, "traffic": self.traffic._asdict(),
                **{key: value for key, value in asdict(self).items() if key != "arrays"}}


# -- batch norm --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchNorm(Case):
    """Training forward, backward, both, or inference. ``shape`` is in memory order; layouts: NCHW, NHWC, MC."""

    family: ClassVar[str] = "batch norm"
    what: str
    shape: tuple[int, ...]
    layout: str
    activation: str | None = None
    residual: bool = False

    @property
    def axis(self) -> int:
        """The channel axis."""
        return 1 if self.layout == "NCHW" else -1

    @property
    def title(self) -> str:
        """As `Case.title`."""
        fused = ("+residual" if self.residual else "") + {None: "", "relu": "+ReLU"}[self.activation]
        return f"batch norm{fused} {self.what}"

    @property
    def size(self) -> str:
        """As `Case.size`."""
        return ("" if self.layout == "MC" else f"{self.layout} ") + _dimensions(self.shape)

    @property
    def elements(self) -> int:
        """As `Case.elements`."""
        return math.prod(self.shape)

    @property
    def traffic(self) -> Traffic:
        """Forward reads x (and the residual) and writes y; backward reads dy, x (residual), writes dx (dresidual)."""
        n, extra = self.array_bytes, self.array_bytes * self.residual
        forward, backward = Traffic(read=extra, copied=n), Traffic(read=n, copied=n + extra)
        return {"forward": forward, "inference": forward, "backward": backward, "both": forward + backward}[self.what]

    def inputs(self) -> Inputs:
        """As `Case.inputs`."""
        channels = (self.shape[self.axis],)
        vectors = {name: _normal(channels, self.dtype, seed) for seed, name in enumerate(("gamma", "beta"))}
        has_gradient = self.what in ("backward", "both")
        return {"x": _normal(self.shape, self.dtype, 2), **vectors,
                "dy": _normal(self.shape, self.dtype, 3) if has_gradient else None,
                "residual": _normal(self.shape, self.dtype, 4) if self.residual else None,
                "running_mean": np.zeros(channels, self.dtype), "running_var": np.ones(channels, self.dtype)}

    def calls(self, backend: ModuleType, inputs: Inputs) -> Calls:
        """As `Case.calls`."""
        x, dy = inputs["x"], inputs["dy"]
        affine = inputs["gamma"], inputs["beta"]
        running = inputs["running_mean"], inputs["running_var"]
        options = {"axis": self.axis, "activation": self.activation, "residual": inputs["residual"]}
        y, dx = np.zeros_like(x), np.zeros_like(x)
        forward, backward = backend.batch_norm_forward, backend.batch_norm_backward
        if self.what == "inference":
            inference = backend.batch_norm_inference
            return {FRESH: lambda: inference(x, *running, *affine, **options),
                    OUT: lambda: inference(x, *running, *affine, out=y, **options)}
        if self.what == "forward":
            return {FRESH: lambda: forward(x, *affine, *running, **options),
                    OUT: lambda: forward(x, *affine, *running, out=y, **options)}
        if self.what == "backward":
            cache = forward(x, *affine, **options)[1]
            return {FRESH: lambda: backward(dy, cache), OUT: lambda: backward(dy, cache, out=dx)}
        return {FRESH: lambda: backward(dy, forward(x, *affine, *running, **options)[1]),
                OUT: lambda: backward(dy, forward(x, *affine, *running, out=y, **options)[1], out=dx)}


# -- softmax and cross-entropy -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Softmax(Case):
    """Softmax along one axis."""

    family: ClassVar[str] = "softmax"
    shape: tuple[int, ...]
    axis: int = -1

    @property
    def title(self) -> str:
        """As `Case.title`."""
        return "softmax"

    @property
    def size(self) -> str:
        """As `Case.size`."""
        return _dimensions(self.shape) + ("" if self.axis == -1 else f" axis {self.axis}")

    @property
    def elements(self) -> int:
        """As `Case.elements`."""
        return math.prod(self.shape)

    @property
    def traffic(self) -> Traffic:
        """Reads x and writes as much."""
        return Traffic(copied=self.array_bytes)

    def inputs(self) -> Inputs:
        """As `Case.inputs`."""
        return {"x": _normal(self.shape, self.dtype, 0)}

    def calls(self, backend: ModuleType, inputs: Inputs) -> Calls:
        """As `Case.calls`."""
        x, out = inputs["x"], np.zeros_like(inputs["x"])
        return {FRESH: lambda: backend.softmax(x, axis=self.axis),
                OUT: lambda: backend.softmax(x, axis=self.axis, out=out)}


@dataclass(frozen=True)
class CrossEntropy(Softmax):
    """Mean softmax cross-entropy of integer labels, and its gradient."""

    family: ClassVar[str] = "cross-entropy"

    @property
    def classes(self) -> int:
        """Length of the class axis."""
        return self.shape[self.axis]

    @property
    def title(self) -> str:
        """As `Case.title`."""
        return "cross-entropy + gradient"

    @property
    def traffic(self) -> Traffic:
        """Reads logits and labels, writes the gradient."""
        return Traffic(read=8 * self.elements // self.classes, copied=self.array_bytes)

    def inputs(self) -> Inputs:
        """As `Case.inputs`."""
        axis = self.axis % len(self.shape)
        rows = self.shape[:axis] + self.shape[axis + 1:]
        return {"x": _normal(self.shape, self.dtype, 0),
                "targets": np.random.default_rng(1).integers(0, self.classes, rows)}

    def calls(self, backend: ModuleType, inputs: Inputs) -> Calls:
        """As `Case.calls`."""
        x, targets, out = inputs["x"], inputs["targets"], np.zeros_like(inputs["x"])
        loss = backend.softmax_cross_entropy
        return {FRESH: lambda: loss(x, targets, axis=self.axis)[::-1],  # the gradient first
                OUT: lambda: loss(x, targets, axis=self.axis, out=out)[::-1]}


# -- optimizers --------------------------------------------------------------------------------------------------------

STATES = {"momentum": ("velocities",), "rmsprop": ("square_avgs",), "adam": ("exp_avgs", "exp_avg_sqs"),
          "adagrad": ("state_sums",)}
OPTIONS: dict[str, dict[str, Any]] = {"momentum": {"lr": 1e-3}, "rmsprop": {"lr": 1e-3},
                                      "adam": {"lr": 1e-3, "step": STEP}, "adagrad": {"lr": 1e-3, "step": STEP}}
TITLES = {"momentum": "momentum", "rmsprop": "RMSProp", "adam": "Adam", "adagrad": "Adagrad"}


@dataclass(frozen=True)
class Update(Case):
    """One step of an optimizer on a list of arrays."""

    rule: str
    label: str
    arrays: tuple[tuple[int, ...], ...]

    @property
    def family(self) -> str:  # type: ignore[override]  # each rule is a family of its own
        """The rule."""
        return TITLES[self.rule]

    @property
    def title(self) -> str:
        """As `Case.title`."""
        return TITLES[self.rule]

    @property
    def size(self) -> str:
        """As `Case.size`."""
        return self.label

    @property
    def elements(self) -> int:
        """As `Case.elements`."""
        return sum(map(math.prod, self.arrays))

    @property
    def traffic(self) -> Traffic:
        """Reads the gradients; reads and writes the parameters and each state."""
        return Traffic(read=self.array_bytes, updated=(1 + len(STATES[self.rule])) * self.array_bytes)

    def inputs(self) -> Inputs:
        """As `Case.inputs`."""
        def each(seed: int | None) -> list[Array]:
            return [np.full(shape, 0.1, self.dtype) if seed is None else _normal(shape, self.dtype, seed + at)
                    for at, shape in enumerate(self.arrays)]

        return {"params": each(0), "grads": each(1000)} | {state: each(None) for state in STATES[self.rule]}

    def calls(self, backend: ModuleType, inputs: Inputs) -> Calls:
        """As `Case.calls`."""
        step = getattr(backend, f"{self.rule}_step")
        lists = [inputs[name] for name in ("params", "grads", *STATES[self.rule])]
        if len(self.arrays) == 1:
            lists = [arrays[0] for arrays in lists]
        options = OPTIONS[self.rule]
        return {IN_PLACE: lambda: step(*lists, **options)}


# -- activations and dropout -------------------------------------------------------------------------------------------


NAMES = {"relu": "ReLU", "leaky_relu": "leaky ReLU", "elu": "ELU", "celu": "CELU"}


@dataclass(frozen=True)
class Elementwise(Case):
    """An activation or dropout, forward or backward, on a vector."""

    family: ClassVar[str] = "activations"
    function: str
    what: str
    length: int

    @property
    def title(self) -> str:
        """As `Case.title`."""
        return f"{NAMES.get(self.function, self.function)} {self.what}"

    @property
    def size(self) -> str:
        """As `Case.size`."""
        return f"{self.length:,}"

    @property
    def elements(self) -> int:
        """As `Case.elements`."""
        return self.length

    @property
    def traffic(self) -> Traffic:
        """Forward reads x, backward dy and what the forward saved (dropout: nothing); both write one array."""
        n = self.array_bytes
        return Traffic(read=n if self.what == "backward" and self.function != "dropout" else 0, copied=n)

    def inputs(self) -> Inputs:
        """As `Case.inputs`."""
        x = _normal((self.length,), self.dtype, 0)
        saved = {"sigmoid": 1 / (1 + np.exp(-x)), "tanh": np.tanh(x)}.get(self.function, x)
        return {"x": x, "saved": saved, "dy": _normal((self.length,), self.dtype, 1)}

    def calls(self, backend: ModuleType, inputs: Inputs) -> Calls:
        """As `Case.calls`."""
        out = np.zeros_like(inputs["x"])
        function = getattr(backend, self.function + ("_backward" if self.what == "backward" else ""))
        arguments: tuple[Any, ...] = (inputs["x"],) if self.what == "forward" else (inputs["dy"], inputs["saved"])
        options: dict[str, Any] = {}
        if self.function == "dropout":
            arguments, options = (inputs["x" if self.what == "forward" else "dy"], DROPOUT), {"seed": 1}
        return {FRESH: lambda: function(*arguments, **options), OUT: lambda: function(*arguments, out=out, **options)}


# -- the grid ----------------------------------------------------------------------------------------------------------

FLOAT32, FLOAT64 = "float32", "float64"
NCHW = ((2, 16, 8, 8), (8, 512, 7, 7), (32, 64, 56, 56), (128, 256, 14, 14), (256, 512, 7, 7), (64, 256, 56, 56))
NHWC = ((2, 8, 8, 16), (8, 7, 7, 512), (32, 56, 56, 64), (128, 14, 14, 256), (256, 7, 7, 512), (64, 56, 56, 256))
MC = ((64, 256), (512, 1024), (12544, 512), (100352, 64), (100352, 512))
CLASSES = ((128, 10), (4096, 10), (256, 1000), (4096, 1000), (2048, 32000))
SEGMENTATION = (8, 21, 256, 256)
LISTS: dict[str, Callable[[], list[shapes.Shape]]] = {
    "200 x 1000": lambda: [(1000,)] * 200, "ResNet-50": shapes.resnet50, "GPT-2 small": shapes.gpt2_small}
SINGLES = (1_000, 10_000, 100_000, 1_000_000, 25_000_000)
ACTIVATIONS = ("relu", "leaky_relu", "elu", "celu", "sigmoid", "tanh", "dropout")
ELEMENTS = (100_000, 25_000_000)
SWEEP = tuple(1 << exponent for exponent in range(8, 29, 2))  # elements: 1 KB to 1 GB of float32
SWEEP_CHANNELS, SWEEP_INNER = 64, 784
SWEEP_CLASSES = 1000


def _update(rule: str, label: str | int, dtype: str = FLOAT32) -> Update:
    """One array of so many elements, or a list by its name."""
    if isinstance(label, int):
        return Update(dtype, rule, f"{label:,}", ((label,),))
    return Update(dtype, rule, label, tuple(LISTS[label]()))


def _batch_norms(dtype: str) -> Iterable[Case]:
    for layout, sizes in (("NCHW", NCHW), ("NHWC", NHWC), ("MC", MC)):
        for shape in sizes:
            for what in ("forward", "backward", "both", "inference"):
                yield BatchNorm(dtype, what, shape, layout)
            if dtype == FLOAT32:
                yield BatchNorm(dtype, "both", shape, layout, "relu")
                yield BatchNorm(dtype, "both", shape, layout, "relu", residual=True)
                if layout != "MC":
                    for what in ("forward", "backward"):
                        yield BatchNorm(dtype, what, shape, layout, "relu")


def full() -> list[Case]:
    """Every case of the full run; those of the size sweep are in `sweep`."""
    grid: list[Case] = []
    for dtype in (FLOAT32, FLOAT64):
        grid += _batch_norms(dtype)
        grid += [Softmax(dtype, shape) for shape in CLASSES]
        grid += [CrossEntropy(dtype, shape) for shape in CLASSES]
        grid += [CrossEntropy(dtype, SEGMENTATION, 1)]
        grid += [_update(rule, n, dtype) for rule in STATES for n in SINGLES]
        if dtype == FLOAT32:
            grid += [_update(rule, label, dtype) for rule in STATES for label in LISTS]
            grid += [Elementwise(dtype, function, what, n) for function in ACTIVATIONS
                     for what in ("forward", "backward") for n in ELEMENTS]
    return grid


def sweep() -> list[Case]:
    """A few kernels over sizes from 1 KB to 1 GB an array."""
    grid: list[Case] = []
    for n in SWEEP:
        inner = min(SWEEP_INNER, max(1, n // SWEEP_CHANNELS // 2))
        grid += [BatchNorm(FLOAT32, what, (max(1, n // (SWEEP_CHANNELS * inner)), SWEEP_CHANNELS, inner), "NCHW")
                 for what in ("forward", "backward")]
        grid += [BatchNorm(FLOAT32, "forward", (n // SWEEP_CHANNELS, SWEEP_CHANNELS), "MC")]
        classes = min(SWEEP_CLASSES, n)
        grid += [CrossEntropy(FLOAT32, (max(1, n // classes), classes)), _update("adam", n),
                 Elementwise(FLOAT32, "relu", "forward", n)]
    return grid


def quick() -> list[Case]:
    """The cases of `python -m fastnorm bench`: each kernel where people use it."""
    return [
        BatchNorm(FLOAT32, "forward", (32, 64, 56, 56), "NCHW"),
        BatchNorm(FLOAT32, "backward", (32, 64, 56, 56), "NCHW"),
        BatchNorm(FLOAT32, "both", (32, 64, 56, 56), "NCHW", "relu"),
        BatchNorm(FLOAT32, "forward", (256, 512, 7, 7), "NCHW"),
        BatchNorm(FLOAT32, "forward", (32, 56, 56, 64), "NHWC"),
        BatchNorm(FLOAT32, "forward", (64, 256), "MC"),
        Softmax(FLOAT32, (4096, 1000)),
        CrossEntropy(FLOAT32, (4096, 1000)),
        CrossEntropy(FLOAT32, (4096, 10)),
        CrossEntropy(FLOAT32, (2048, 32000)),
        _update("momentum", 1_000),
        _update("adam", 1_000_000),
        _update("adam", "200 x 1000"),
        _update("adam", "ResNet-50"),
        _update("rmsprop", 1_000_000),
        Elementwise(FLOAT32, "sigmoid", "forward", 1_000_000),
    ]


def matching(cases: Iterable[Case], pattern: str | None) -> list[Case]:
    """Those whose name contains the pattern, in any case; all words of it, in any order."""
    words = (pattern or "").lower().split()
    return [case for case in cases if all(word in case.name.lower() for word in words)]


__all__ = ["FRESH", "IN_PLACE", "OUT", "BatchNorm", "Case", "CrossEntropy", "Elementwise", "Softmax", "Traffic",
           "Update", "full", "matching", "quick", "sweep"]
