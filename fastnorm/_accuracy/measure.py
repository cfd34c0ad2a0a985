"""Errors in ulp: one row for each output of a case, one figure for each instruction set and for PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from .. import _runtime
from .._arrays import Array
from . import ours, references
from .bounds import FACTOR, MEAN_SAME, MEAN_SHARE, SAME, bound
from .cases import FLOAT32, Case
from .pytorch import PyTorch

PYTORCH = "PyTorch"
LONG_DOUBLE = np.dtype(np.longdouble)
# x87's 64 bits of mantissa, or a quad's 113; elsewhere long double is double.
HAS_LONG_DOUBLE = int(np.finfo(np.longdouble).nmant) >= 63


@dataclass
class Error:
    """Largest and mean error over all elements, in ulp."""

    largest: float = 0.0
    total: float = 0.0
    count: int = 0
    by_chunk: list[float] = field(default_factory=list)  # largest errors

    def add(self, errors: Array) -> None:
        """Count the elements of one more chunk."""
        self.by_chunk.append(float(errors.max(initial=0)))
        self.largest = max(self.largest, self.by_chunk[-1])
        with np.errstate(over="ignore"):
            self.total += float(errors.sum(dtype=np.float64))
        self.count += errors.size

    @property
    def mean(self) -> float:
        """Mean error."""
        return self.total / max(self.count, 1)


@dataclass
class Row:
    """One output of one kernel on one kind of data in one dtype."""

    kernel: str
    output: str
    data: str
    dtype: str
    bound: float
    errors: dict[str, Error] = field(default_factory=dict)  # by level, and PyTorch's
    seeds: bool = False  # whether the chunks differ in their random numbers alone

    @property
    def worst(self) -> float:
        """The largest error at any instruction set."""
        return max(error.largest for name, error in self.errors.items() if name != PYTORCH)

    @property
    def within_bound(self) -> bool:
        """Whether the largest error is as documented, at every instruction set."""
        return self.worst <= self.bound

    @property
    def mean_gap(self) -> float:
        """By how much the mean error is larger than PyTorch's, at the best instruction set; 0 where they are the same.

        The mean of thousands of rounding errors is no matter of chance, as the largest is.
        """
        if PYTORCH not in self.errors:
            return 0.0
        ours = [error.mean for name, error in self.errors.items() if name != PYTORCH][-1]
        theirs = self.errors[PYTORCH].mean
        if ours == theirs or abs(ours - theirs) <= max(MEAN_SAME, MEAN_SHARE * min(ours, theirs)):
            return 0.0
        return ours - theirs

    @property
    def behind(self) -> bool:
        """Whether PyTorch's largest error is smaller by more than chance; of several seeds, the median counts."""
        if PYTORCH not in self.errors:
            return False
        figures = {name: median(e.by_chunk) if self.seeds else e.largest for name, e in self.errors.items()}
        theirs = figures.pop(PYTORCH)
        return max(figures.values()) > max(theirs + SAME, FACTOR * theirs)


def ulp(scale: Array, dtype: np.dtype[Any]) -> Array:
    """The spacing of the numbers of a dtype at a magnitude, subnormals included; of scale's own, wider dtype."""
    info = np.finfo(dtype)
    exponent = np.where(scale == 0, info.minexp, np.frexp(scale)[1])  # frexp gives 0 the exponent of 1/2
    exponent = np.clip(exponent, info.minexp + 1, info.maxexp)
    return np.asarray(np.ldexp(scale.dtype.type(1), exponent - 1 - info.nmant))


class Target(NamedTuple):
    """An exact result, its unit by element, and what it rounds to in the kernel's dtype."""

    value: Array
    unit: Array
    rounded: Array


def target(exact: references.Exact, dtype: np.dtype[Any]) -> Target:
    """What a result of this dtype is compared with."""
    with np.errstate(over="ignore"):
        return Target(exact.value, ulp(exact.scale, dtype), exact.value.astype(dtype))


def errors_in_ulp(got: Array, exact: Target) -> Array:
    """|got - exact| in its unit, by element.

    Where the exact result is beyond the dtype, or NaN, the error is 0 for what it rounds to and infinite for all else.
    """
    if got.shape != exact.value.shape:
        raise ValueError(f"got: expected shape {exact.value.shape}, got {got.shape}")
    with np.errstate(all="ignore"):
        errors: Array = np.abs(got - exact.value) / exact.unit
    wild = ~(np.isfinite(got) & np.isfinite(exact.rounded))
    same = (got[wild] == exact.rounded[wild]) | (np.isnan(got[wild]) & np.isnan(exact.rounded[wild]))
    errors[wild] = np.where(same, 0, np.inf)
    return errors


@contextmanager
def _each_level(levels: Sequence[str]) -> Iterator[Iterator[str]]:
    """The levels one after the other, each loaded while it is the current one; the one before in the end."""
    before = _runtime.kernels.level

    def load() -> Iterator[str]:
        for level in levels:
            _runtime.kernels.load(level)
            yield level

    try:
        yield load()
    finally:
        _runtime.kernels.load(before)


def measure(case: Case, levels: Sequence[str], pytorch: PyTorch | None) -> list[Row]:
    """The rows of a case."""
    wide = np.dtype(np.float64) if case.dtype == FLOAT32 else LONG_DOUBLE
    rows: dict[str, Row] = {}
    for chunk in range(case.chunks):
        inputs = case.make(chunk)
        exact = {name: target(value, case.dtype)
                 for name, value in references.exact(case.kernel, inputs, wide).items()}
        for name in exact:
            rows.setdefault(name, Row(case.kernel, name, case.data, case.dtype.name, bound(case, name),
                                      seeds=case.seeds))

        def count(who: str, results: dict[str, Any], exact: dict[str, Target] = exact) -> None:
            for name, value in exact.items():
                rows[name].errors.setdefault(who, Error()).add(errors_in_ulp(results[name], value))

        with _each_level(levels) as each:
            for level in each:
                count(level, ours.results(case.kernel, inputs))
        if pytorch is not None:
            count(PYTORCH, pytorch.results(case.kernel, inputs))
    return list(rows.values())
