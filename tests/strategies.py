"""Hypothesis strategies for whole calls: which arrays lie where in memory, with which values, what is wrong with them.

A call is drawn as *plans*, plain tuples that say how to build its arrays. `build` makes the arrays of one call from
them and can be run again for the twin: both get the same bits in memory of their own. Values come from shared pools, so
that an example costs a few draws and one copy an array; shapes, layouts, options and faults are Hypothesis's to shrink.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import exporters
import numpy as np
from hypothesis import strategies as st

# -- shapes ------------------------------------------------------------------------------------------------------------

# Empty, one, and tails around the widths of vectors, short runs (16) and long ones (256).
SHAPES = [(1, 1), (2, 1), (3, 5), (4, 2, 3), (2, 3, 2, 2), (7,), (1,), (5, 3), (2, 17), (33, 3), (4, 16), (65, 2),
          (17,), (3, 2, 9), (2, 4, 3, 3), (1, 4, 1), (2, 2, 1, 3, 2), (3, 1, 4, 4), (9, 31), (2, 3, 15), (1, 2, 257),
          (130, 3), (2, 129), (66, 4), (127,), (257,), (0,), (0, 3), (4, 0), (2, 3, 0), (1, 0, 2), (0, 2, 2, 1)]
# Above the sizes from which threads share the work (65,536 elements at most) ...
LARGE_SHAPES = [(70_001,), (281, 257), (9, 7_400), (7_400, 9), (3, 5, 4_500), (8, 16, 24, 23)]
# ... and from which outputs are streamed past the cache (16 MB).
STREAMED_SHAPES = [(4_200_001,), (2, 33, 64_000), (70_100, 60)]
LARGE_EVERY, STREAMED_EVERY = 101, 3_989  # primes: nothing falls in step


def shapes(*, minimum_rank: int = 0) -> st.SearchStrategy[tuple[int, ...]]:
    """Mostly small shapes; now and then a large one, rarely one that is streamed."""
    small = [s for s in [(), *SHAPES] if len(s) >= minimum_rank]

    def by_number(i: int) -> tuple[int, ...]:
        # Not at the ends of the interval, which Hypothesis prefers.
        group = (STREAMED_SHAPES if i % STREAMED_EVERY == STREAMED_EVERY // 2
                 else LARGE_SHAPES if i % LARGE_EVERY == LARGE_EVERY // 2 + 1 else small)
        return group[i // STREAMED_EVERY % len(group)] if group is not small else group[i % len(group)]

    return st.integers(0, 2**20).map(by_number)


# -- values ------------------------------------------------------------------------------------------------------------

POOL = 4_099  # a prime: a pool repeated does not fall in step with rows


@cache
def pool(kind: str, dtype: str, positive: bool = False) -> np.ndarray:
    """Values of one kind, shared by all examples; never handed out, only copied from."""
    rng = np.random.default_rng(4)
    of = np.dtype(dtype)
    values = rng.standard_normal(POOL)
    if of.kind not in "fc":
        return rng.integers(0, 2, POOL).astype(of)
    info = np.finfo(of)
    if kind == "whole":
        values = rng.integers(-3, 4, POOL).astype(float)
    elif kind == "special":
        at = rng.random(POOL) < 0.05
        values[at] = rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0], at.sum())
    elif kind == "shifted":
        values += 1e4
    elif kind == "large":  # up to the largest number
        values = np.clip(values, -1, 1) * float(info.max) ** rng.uniform(0.4, 1, POOL)
    elif kind == "small":
        values *= float(info.tiny) ** rng.uniform(0.2, 0.6, POOL)
    elif kind == "subnormal":
        values *= float(info.tiny) / 4
    elif kind == "zero":
        values *= 0
    elif kind == "unit":  # what sigmoid and tanh give
        values = np.where(rng.random(POOL) < 0.05, rng.choice([0.0, 1.0, np.nan], POOL), rng.random(POOL))
    if positive:
        values = np.abs(values)
    return values.astype(of)


@cache
def label_pool(classes: int, dtype: str, valid: bool) -> np.ndarray:
    """Class labels, a tenth of them -100 where the dtype has it; without ``valid``, some that are no class at all."""
    rng = np.random.default_rng(5)
    info = np.iinfo(dtype)
    values = rng.integers(0, min(classes, info.max), POOL).astype(dtype)
    if info.min <= -100:
        values[rng.random(POOL) < 0.1] = -100
    if not valid:
        at = rng.random(POOL) < 0.3
        values[at] = rng.choice(np.array([min(classes, info.max), info.min, info.max], dtype), at.sum())
    return values


# -- layouts -----------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How elements lie in memory: steps between neighbors, and the order of the axes."""

    order: str = "C"
    step: int = 1  # elements from one to the next along the innermost axis
    padding: int = 0  # elements left out behind each row
    reversed: bool = False
    overlap: str = ""  # "broadcast": the first axis does not move; "windows": all axes move by one element
    misaligned: bool = False


LAYOUTS = {"C": Layout(), "F": Layout("F"), "channels last": Layout("channels last"), "strided": Layout(step=2),
           "padded": Layout(padding=1), "padded F": Layout("F", padding=3), "reversed": Layout(reversed=True),
           "strided, reversed": Layout("F", step=3, reversed=True), "misaligned": Layout(misaligned=True),
           "broadcast": Layout(overlap="broadcast"), "windows": Layout(overlap="windows")}
WRITABLE = [name for name, layout in LAYOUTS.items() if not layout.overlap]
# Half of all arrays are plain: where all are exotic, no call takes the path without a copy.
READ_LAYOUTS = ["C"] * 8 + list(LAYOUTS)
WRITTEN_LAYOUTS = ["C"] * 8 + WRITABLE


@cache
def steps(name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
    """Strides of a layout, position of the first element and extent in memory, all in elements."""
    layout = LAYOUTS[name]
    rank = len(shape)
    axes = list(range(rank))
    if layout.order == "F":
        axes.reverse()
    elif layout.order == "channels last" and rank > 2:
        axes = [0, *range(2, rank), 1]
    strides = [0] * rank
    step = layout.step
    for axis in reversed(axes):
        strides[axis] = step
        step = (step * max(shape[axis], 1) + layout.padding) if layout.overlap != "windows" else 1
    if layout.overlap == "broadcast" and rank:
        strides[0] = 0
    if 0 in shape:
        return tuple(strides), 0, 0
    extent = sum(stride * (n - 1) for stride, n in zip(strides, shape, strict=True)) + 1
    if layout.reversed:
        return tuple(-s for s in strides), extent - 1, extent
    return tuple(strides), 0, extent


# -- plans and what is built from them ---------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How to build one array."""

    shape: tuple[int, ...]
    dtype: str
    kind: str = "normal"
    positive: bool = False
    classes: int = 0  # of labels
    start: int = 0  # where in the pool
    layout: str = "C"
    read_only: bool = False
    masked: bool = False
    exported: str = ""  # handed over as what another library has: the name of a class in `exporters`
    shares: str = ""  # label of the argument whose memory it lies in
    shift: int = 0  # elements between the beginning of that memory and this array


class Given(NamedTuple):
    """The arguments of one call, and by label their arrays and the memory that these lie in."""

    arguments: dict[str, Any]
    arrays: dict[str, np.ndarray]
    memory: dict[str, np.ndarray]


ALIGNMENT = 64
SLACK = 8  # elements of memory beyond what a layout needs: room for `shift`


def _values(plan: Plan, n: int) -> np.ndarray:
    """The next n values of the plan's pool."""
    source = (label_pool(plan.classes, plan.dtype, plan.kind != "invalid") if plan.classes
              else pool(plan.kind, plan.dtype, plan.positive))
    start = plan.start % POOL
    return source[start:start + n] if start + n <= POOL else np.resize(np.roll(source, -start), n)


def _allocate(plan: Plan, elements: int) -> tuple[np.ndarray, int]:
    """Bytes filled with the plan's values from a given alignment on, and where that is."""
    itemsize = np.dtype(plan.dtype).itemsize
    memory = np.zeros(elements * itemsize + 2 * ALIGNMENT, np.uint8)
    memory = memory[-memory.ctypes.data % ALIGNMENT:]
    memory = memory[:elements * itemsize + ALIGNMENT]
    first = plan.start % 3 * itemsize + LAYOUTS[plan.layout].misaligned
    memory[first:first + elements * itemsize].view(plan.dtype)[...] = _values(plan, elements)
    return memory, first


def flatten(arguments: dict[str, Any]) -> dict[str, Plan]:
    """The plans by label, `params` or `params[0]`, in the order of the arguments."""
    plans = {}
    for name, value in arguments.items():
        if isinstance(value, Plan):
            plans[name] = value
        elif isinstance(value, (list, tuple)):
            plans |= {f"{name}[{i}]": plan for i, plan in enumerate(value) if isinstance(plan, Plan)}
    return plans


def _owner(plans: dict[str, Plan], label: str) -> str:
    """Label of the array whose memory it is: its own where the other one was replaced by no array."""
    while plans[label].shares in plans:
        label = plans[label].shares
    return label


def build(arguments: dict[str, Any], *, export: bool = True) -> Given:
    """Make the arrays; everything that is no plan is handed on as it is. Without ``export``, all stay ndarrays."""
    plans = flatten(arguments)
    needed: dict[str, int] = {}
    for label, plan in plans.items():
        owner = _owner(plans, label)
        extent = (steps(plan.layout, plan.shape)[2] + plan.shift) * np.dtype(plan.dtype).itemsize
        needed[owner] = max(needed.get(owner, 0), -(-extent // np.dtype(plans[owner].dtype).itemsize))
    allocated = {owner: _allocate(plans[owner], n + SLACK) for owner, n in needed.items()}
    arrays: dict[str, np.ndarray] = {}
    for label, plan in plans.items():
        memory, first = allocated[_owner(plans, label)]
        strides, begin, _ = steps(plan.layout, plan.shape)
        itemsize = np.dtype(plan.dtype).itemsize
        array = np.ndarray(plan.shape, plan.dtype, memory, first + (begin + plan.shift) * itemsize,
                           tuple(s * itemsize for s in strides))
        array.flags.writeable = not plan.read_only
        arrays[label] = np.ma.masked_array(array) if plan.masked else array

    def handed_over(label: str, plan: Plan) -> Any:
        array = arrays[label]
        return getattr(exporters, plan.exported)(array) if export and plan.exported else array

    def realize(name: str, value: Any) -> Any:
        if isinstance(value, Plan):
            return handed_over(name, value)
        if isinstance(value, (list, tuple)) and any(isinstance(a, Plan) for a in value):
            return type(value)(handed_over(f"{name}[{i}]", a) if isinstance(a, Plan) else a
                               for i, a in enumerate(value))
        return value

    return Given({name: realize(name, value) for name, value in arguments.items()}, arrays,
                 {owner: memory for owner, (memory, _) in allocated.items()})


# -- faults ------------------------------------------------------------------------------------------------------------

NO_ARRAYS = [None, 1.5, [1.0, 2.0], (), "x", np.float32(1), object(), np.array([None, 1]), np.zeros(2, "U3"), {}, True]
WRONG_DTYPES = ["float16", "int32", "complex64", "bool", "longdouble", ">f4", ">f8", "uint8", "float32", "float64",
                ">i8"]
ODD_OPTIONS = [-1.0, math.nan, math.inf, -math.inf, 1e300, 1e-300, 10**400, -(10**400), 2**63, 2**64, -1, 0, 1, 2, True,
               None, "1", "relu", b"x", 1j, [1.0], (0.5,), np.float32(0.25), np.float64(0.1), np.int64(1),
               np.bool_(True),
               np.broadcast_to(0.5, ()), np.broadcast_to(1, 2), object()]  # read-only: examples share them
EXPORTED = ["Shared", "Converted", "Shared", "Converted", "Copied", "WithoutCopy", "OnGpu", "Refusing"]
ARRAY_FAULTS = ["no array", "exported", "exported", "dtype", "shape", "read-only", "masked", "layout", "same",
                "shifted", "other layout", "beside"]


def _reshaped(shape: tuple[int, ...], detail: int) -> tuple[int, ...]:
    """A shape near this one that is another, mostly."""
    longer = tuple(n + 1 for n in shape)
    choices = [shape[1:], (*shape, 1), shape[::-1], longer, (0, *shape[1:]), (math.prod(shape),), ()]
    return choices[detail % len(choices)]


def _spoil(arguments: dict[str, Any], fault: str, at: int, detail: int) -> dict[str, Any]:
    """The arguments with one thing changed, most often to what is refused."""
    plans = flatten(arguments)
    names = [name for name in arguments if name not in plans and not name.startswith("_")]
    if fault == "option":
        if not names:
            return arguments
        return arguments | {names[at % len(names)]: ODD_OPTIONS[detail % len(ODD_OPTIONS)]}
    if not plans:
        return arguments
    labels = list(plans)
    label = labels[at % len(labels)]
    plan = plans[label]
    if fault == "no array":
        changed: Any = NO_ARRAYS[detail % len(NO_ARRAYS)]
    elif fault == "exported":
        changed = plan._replace(exported=EXPORTED[detail % len(EXPORTED)])
    elif fault == "dtype":
        changed = plan._replace(dtype=WRONG_DTYPES[detail % len(WRONG_DTYPES)], classes=0)
    elif fault == "shape":
        changed = plan._replace(shape=_reshaped(plan.shape, detail))
    elif fault in ("read-only", "masked"):
        changed = plan._replace(**{fault.replace("-", "_"): True})
    elif fault == "layout":
        changed = plan._replace(layout=["broadcast", "windows"][detail % 2])
    else:  # in the memory of an argument before it
        if labels.index(label) == 0:
            return arguments
        other = labels[detail % labels.index(label)]
        owner = plans[other]
        layout, shift = {"same": (owner.layout, owner.shift), "shifted": (owner.layout, owner.shift + 1),
                         "other layout": (WRITABLE[detail % len(WRITABLE)], owner.shift),
                         "beside": (plan.layout, owner.shift + steps(owner.layout, owner.shape)[2])}[fault]
        changed = plan._replace(shares=other, layout=layout, shift=shift)
    return _replaced(arguments, label, changed)


def _replaced(arguments: dict[str, Any], label: str, changed: Any) -> dict[str, Any]:
    name, _, index = label.rstrip("]").partition("[")
    if not index:
        return arguments | {name: changed}
    changed_list = list(arguments[name])
    changed_list[int(index)] = changed
    return arguments | {name: type(arguments[name])(changed_list)}


FAULTS = st.tuples(st.sampled_from([*ARRAY_FAULTS, "option", "option"]), st.integers(0, 30), st.integers(0, 1000))


@st.composite
def spoiled(draw: st.DrawFn, calls: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    """A call as it should be, or with one or two things changed that may make it one to refuse."""
    arguments = draw(calls)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2]))):
        arguments = _spoil(arguments, *draw(FAULTS))
    return arguments
