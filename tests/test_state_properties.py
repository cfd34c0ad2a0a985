"""Properties of what is saved and loaded, and of the layers, over examples that Hypothesis makes up.

A state is loaded whole, or refused with a TypeError or ValueError and nothing has changed; what `checkpoint.save`
takes, `load` gives back to the last bit, and a file with changed bytes is refused; a layer computes what its twin does.
`CONTRIBUTING.md` says how to run it for longer.
"""

from __future__ import annotations

import copy
import functools
import math
import operator
import pickle

import numpy as np
import pytest
from hypothesis import strategies as st

import fastnorm as fn
from fastnorm import checkpoint

OPTIONAL = ("nonfinite", "skipped_steps")  # keys of optimizers that older states do not have
DTYPES = ["f4", "f8", ">f4", ">f8", "f2", "i4", "i8", "u8", "?", "c8"]

# -- states of layers and optimizers -----------------------------------------------------------------------------------


def network():
    return fn.layers.Sequential(
        fn.layers.Dense(3, 4, rng=0), fn.layers.BatchNorm(4, activation="relu"), fn.layers.Dropout(0.5, seed=1),
        fn.layers.Dense(4, 2, rng=0, dtype=np.float64))


def stepped(kind):
    made = kind([np.ones(3), np.ones((2, 2), np.float32)])
    made.step([np.ones(3), np.ones((2, 2), np.float32)])
    return made


HOLDERS = {
    "Dense": lambda: fn.layers.Dense(3, 4, rng=0), "BatchNorm": lambda: fn.layers.BatchNorm(3),
    "Dropout": lambda: fn.layers.Dropout(0.5, seed=1), "Sequential": network,
    "SGD": lambda: stepped(lambda params: fn.optim.SGD(params, momentum=0.5)),
    "Adam": lambda: stepped(fn.optim.Adam), "RMSProp": lambda: stepped(fn.optim.RMSProp),
    "Adagrad": lambda: stepped(fn.optim.Adagrad),
}


def memory_of(value):
    """A value's bits, with the types that they are of."""
    if isinstance(value, dict):
        return {key: memory_of(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [memory_of(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    return repr(value)


def places(value, path=()):
    """Where the parts of a state are: keys into it."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in parts:
        yield (*path, key)
        yield from places(item, (*path, key))


def changed(value, path, change):
    """The state with another part at this place; the parts are not copied."""
    if not path:
        return change(value)
    if isinstance(value, dict):
        return value | {path[0]: changed(value[path[0]], path[1:], change)}
    parts = list(value)
    parts[path[0]] = changed(parts[path[0]], path[1:], change)
    return parts


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


SAME = {  # as good as what was saved
    "copied": lambda a: a.copy(), "every other": lambda a: np.repeat(a, 2, axis=-1)[..., ::2] if a.ndim else a.copy(),
    "Fortran order": lambda a: a.copy(order="F"), "read-only": read_only}
OTHER = {
    "dtype": lambda a, other: a.astype(other), "shape": lambda a, _: a[np.newaxis], "list": lambda a, _: a.tolist(),
    "masked": lambda a, _: np.ma.array(a), "None": lambda a, _: None, "text": lambda a, _: "text",
    "function": lambda a, _: len, "NaN": lambda a, _: math.nan, "huge": lambda a, _: 10 ** 400,
    "negative": lambda a, _: -1, "empty": lambda a, _: {}}


@pytest.mark.parametrize("name", HOLDERS)
def test_a_state_is_loaded_whole_or_refused(name, fuzz):
    def example(drawn):
        at, how, dtype, drop = drawn
        holder, given = HOLDERS[name](), HOLDERS[name]().state_dict()
        given = {key: np.asarray(value + 1) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value
                 for key, value in given.items()}
        paths = list(places(given))
        path = paths[at % len(paths)]
        if drop == 0:
            given.pop(path[0])
        elif drop == 1:
            given["another"] = np.ones(3)
        else:
            def change(part):
                if how in SAME and isinstance(part, np.ndarray):
                    return SAME[how](part)
                if how in OTHER and (isinstance(part, np.ndarray) or how not in ("dtype", "shape", "list", "masked")):
                    return OTHER[how](part, dtype)
                return part
            given = changed(given, path, change)
        before, refusal = memory_of(holder.state_dict()), None
        try:
            holder.load_state_dict(given)
        except (TypeError, ValueError) as error:
            refusal = str(error)
        if refusal is not None:
            assert memory_of(holder.state_dict()) == before
            assert how not in SAME or drop < 2, refusal
            return
        assert drop > 0 or path[0] in OPTIONAL
        loaded = holder.state_dict()
        for where in places(given):
            expected, found = (functools.reduce(operator.getitem, where, tree) for tree in (given, loaded))
            if isinstance(expected, np.ndarray):
                assert memory_of(np.array(expected)) == memory_of(found)

    fuzz(f"{name}.load_state_dict", st.tuples(st.integers(0, 100), st.sampled_from([*SAME, *OTHER]),
                                               st.sampled_from(DTYPES), st.integers(0, 9)), example)


# -- checkpoints -------------------------------------------------------------------------------------------------------


@st.composite
def arrays(draw):
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    n = math.prod(shape)
    raw = draw(st.binary(min_size=n * dtype.itemsize, max_size=n * dtype.itemsize))
    a = (np.frombuffer(raw, np.uint8) % 2 == 1 if dtype.kind == "b" else np.frombuffer(raw, dtype)).reshape(shape)
    return {"C": a, "F": a.copy(order="F"), "reversed": a[::-1] if a.ndim else a}[
        draw(st.sampled_from(["C", "F", "reversed"]))]


LEAVES = st.one_of(arrays(), st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
VALUES = st.recursive(LEAVES, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5).filter(lambda key: key != "__array__"), inner,
                                                 max_size=3)), max_leaves=8)


def test_a_checkpoint_gives_back_every_bit_or_is_refused(fuzz, tmp_path):
    file = tmp_path / "run.npz"
    model = fn.layers.Dense(3, 2, rng=0)

    def example(drawn):
        value, at, bits = drawn
        checkpoint.save(file, value=value, model=model)
        assert memory_of(checkpoint.load(file)["value"]) == memory_of(value)
        whole, before = file.read_bytes(), memory_of(model.state_dict())
        damaged = bytearray(whole)
        damaged[at % len(whole)] ^= bits
        for content in (bytes(damaged), whole[:at % len(whole)], whole + bytes([bits])):
            file.write_bytes(content)
            with pytest.raises(ValueError, match=r"run\.npz: .*checkpoint|expected version"):
                checkpoint.restore(file, model=model)
        assert memory_of(model.state_dict()) == before

    fuzz("checkpoint", st.tuples(VALUES, st.integers(0, 1 << 20), st.integers(1, 255)), example)


# -- layers ------------------------------------------------------------------------------------------------------------


def test_layers_compute_what_their_twins_compute_after_any_copy(fuzz):
    """A loss behind a Sequential: forward; backward from a copy or a pickle; with other statistics, as at test time."""
    copies = {"same": lambda pair: pair, "deepcopy": copy.deepcopy,
              "pickle": lambda pair: pickle.loads(pickle.dumps(pair))}

    def example(drawn):
        seed, rows, way = drawn
        rng = np.random.default_rng(seed)
        x, seen = (rng.standard_normal((n, k)).astype(np.float32) for n, k in ((rows, 3), (5, 4)))
        labels, results = rng.integers(0, 2, rows), []
        for backend in (fn, fn.reference):
            model = fn.layers.Sequential(
                fn.layers.Dense(3, 4, rng=0, backend=backend),
                fn.layers.BatchNorm(4, activation="relu", backend=backend),
                fn.layers.Dropout(0.3, seed=1, backend=backend), fn.layers.Dense(4, 2, rng=1, backend=backend))
            loss = fn.layers.SoftmaxCrossEntropy(backend=backend)
            values = [loss.forward(model.forward(x), labels)]
            model, loss = copies[way]((model, loss))
            values += [model.backward(loss.backward()), *model.grads]
            moments = backend.Moments()
            moments.update(seen)
            model.layers[1].set_statistics(moments)
            results.append([*values, *model.state_dict().values(), model.forward(x, training=False)])
        for ours, theirs in zip(*results, strict=True):
            # Sums of at most 40 terms below 10, which batch norm may divide by a deviation of 1e-3.
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)

    fuzz("layers", st.tuples(st.integers(0, 1 << 30), st.integers(2, 40), st.sampled_from(list(copies))), example)
