"""Arrays of other libraries, handed to every public function; the property tests hand over more of them."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import numpy as np
import pytest
from calls import CALLS, make, private, rebuild, to_bytes
from conftest import assert_unchanged, python, snapshot
from exporters import Cheating, Converted, Copied, Exporter, OnGpu, Refusing, Shared, WithoutCopy

import fastnorm as fn
from fastnorm._arrays import as_array, has_protocol

BACKENDS = pytest.mark.parametrize("backend", [fn, fn.reference], ids=["fastnorm", "reference"])
SHARING = pytest.mark.parametrize("kind", [Shared, Converted])
FOR_WRITING = tuple(map(int, np.__version__.split(".")[:2])) >= (2, 1)
needs_writeable_dlpack = pytest.mark.skipif(not FOR_WRITING, reason="NumPy 2.0 imports DLPack read-only")


def address(a):
    return a.__array_interface__["data"][0]


def unwrapped(results):
    return [result.array if isinstance(result, Exporter) else result for result in results]


# -- every function ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", [pytest.param(Shared, marks=needs_writeable_dlpack), Converted])
def test_every_function_takes_them(name, kind, dtype):
    call, shape = CALLS[name], (6, 5, 4)
    plain, own = (private(call, make(shape, dtype)) for _ in range(2))
    exported = rebuild(own, kind)._replace(labels=kind(own.labels))
    expected = to_bytes(call.run(plain))
    assert to_bytes(unwrapped(call.run(exported))) == expected
    for label in call.writes:  # in the caller's memory
        assert to_bytes(np.atleast_1d(getattr(own, label))) == to_bytes(np.atleast_1d(getattr(plain, label)))


@BACKENDS
@pytest.mark.parametrize("kind", [pytest.param(Shared, marks=needs_writeable_dlpack), Converted])
def test_out_is_written_and_its_view_returned(backend, kind, rng):
    x, scale = rng.standard_normal((4, 3)), np.ones(3)
    moments = backend.Moments()
    moments.update(kind(x))
    dy, cache = rng.standard_normal((4, 3)), backend.batch_norm_forward(kind(x))[1]
    calls = {
        "batch_norm_forward": lambda out: backend.batch_norm_forward(kind(x), out=out)[0],
        "batch_norm_inference": lambda out: backend.batch_norm_inference(kind(x), kind(scale), kind(scale), out=out),
        "batch_norm_backward": lambda out: backend.batch_norm_backward(kind(dy), cache, out=out)[0],
        "softmax": lambda out: backend.softmax(kind(x), out=out),
        "softmax_cross_entropy": lambda out: backend.softmax_cross_entropy(kind(x), kind(abs(x)), out=out)[1],
        "relu": lambda out: backend.relu(kind(x), out=out),
        "tanh_backward": lambda out: backend.tanh_backward(kind(dy), kind(x), out=out),
        "dropout": lambda out: backend.dropout(kind(x), 0.5, seed=1, out=out),
        "standardize": lambda out: moments.standardize(kind(x), out=out)}
    for name, call in calls.items():
        memory = np.full((4, 3), np.nan)
        result = call(kind(memory))
        assert type(result) is np.ndarray, name
        assert address(result) == address(memory), name
        np.testing.assert_array_equal(memory, call(None), err_msg=name)


@BACKENDS
@SHARING
def test_out_may_be_the_input_exported_twice(backend, kind, rng):
    if kind is Shared and not FOR_WRITING:
        pytest.skip("NumPy 2.0 imports DLPack read-only")
    x = rng.standard_normal((4, 3))
    expected = backend.softmax(x)
    backend.softmax(kind(x), out=kind(x))
    np.testing.assert_array_equal(x, expected)
    with pytest.raises(ValueError, match="out: expected the same array as x or one that does not overlap it"):
        backend.softmax(kind(x[1:]), out=kind(x[:-1]))
    with pytest.raises(ValueError, match=r"params\[1\]: expected an array that does not overlap params\[0\]"):
        backend.momentum_step([kind(x), kind(x)], [x.copy(), x.copy()], None, lr=0.1, momentum=0.0)


# -- without a copy ----------------------------------------------------------------------------------------------------


@SHARING
@pytest.mark.parametrize("a", [np.arange(6.0).reshape(2, 3), np.arange(6, dtype=np.float32).reshape(2, 3).T,
                               np.arange(12.0)[::2], np.arange(3), np.zeros((0, 2)), np.array(1.0)],
                         ids=["C", "F", "strided", "labels", "empty", "0-d"])
def test_reading_shares_memory(kind, a):
    view = as_array("x", kind(a))
    assert (view.shape, view.dtype) == (a.shape, a.dtype)
    assert a.size == 0 or (address(view), view.strides) == (address(a), a.strides)


@needs_writeable_dlpack
def test_optimizers_keep_views_of_the_parameters(rng):
    params = [rng.standard_normal(s).astype(np.float32) for s in ((3, 4), (5,))]
    plain = [p.copy() for p in params]
    exported, usual = (fn.optim.Adam(p, lr=0.1, nonfinite="skip") for p in ([*map(Shared, params)], plain))
    assert [address(p) for p in exported.params] == [address(p) for p in params]
    for _ in range(3):
        grads = [rng.standard_normal(p.shape).astype(np.float32) for p in params]
        exported.step([Shared(grads[0]), Converted(grads[1])])
        usual.step(grads)
    assert to_bytes(params) == to_bytes(plain)
    state = usual.state_dict()
    exported.load_state_dict(state | {name: [*map(Converted, state[name])] for name in ("exp_avgs", "exp_avg_sqs")})
    assert exported.state_dict()["step"] == 3


@SHARING
def test_one_parameter_and_gradients_that_are_not_finite(kind):
    if kind is Shared and not FOR_WRITING:
        pytest.skip("NumPy 2.0 imports DLPack read-only")
    w = np.ones(3)
    optimizer = fn.optim.SGD(kind(w), lr=0.5, nonfinite="raise")
    optimizer.step(kind(np.ones(3)))
    np.testing.assert_array_equal(w, 0.5)
    with pytest.raises(FloatingPointError, match="grads: expected finite values, got nan at position 1"):
        optimizer.step(kind(np.array([0.0, np.nan, 0.0])))
    with pytest.raises(TypeError, match=r"grads: expected a numpy\.ndarray, got list"):
        optimizer.step([np.ones(3)])


@SHARING
def test_layers_take_them(kind, rng):
    x, dy, labels = (rng.standard_normal(s).astype(np.float32) for s in ((6, 4), (6, 3), (6,)))
    labels = (labels > 0).astype(np.int64)

    def network():
        return fn.layers.Sequential(
            fn.layers.Dense(4, 5, rng=0), fn.layers.BatchNorm(5), fn.layers.ReLU(), fn.layers.Dropout(seed=1),
            fn.layers.DropConnect(5, 3, rng=1, seed=2), fn.layers.Tanh())
    usual, exported = network(), network()
    exported.load_state_dict({name: kind(a) for name, a in usual.state_dict().items()})
    assert exported.forward(kind(x)).tobytes() == usual.forward(x).tobytes()
    assert exported.backward(kind(dy)).tobytes() == usual.backward(dy).tobytes()
    assert to_bytes(exported.grads) == to_bytes(usual.grads)
    for layer in [fn.layers.ReLU(), fn.layers.Dropout(seed=1), fn.layers.BatchNorm(4), fn.layers.Dense(4, 3, rng=0)]:
        y = layer.forward(kind(x))
        assert type(y) is type(layer.backward(kind(y))) is type(layer.forward(kind(x), training=False)) is np.ndarray
    criterion = fn.layers.SoftmaxCrossEntropy(weight=kind(np.ones(4, np.float32)))
    assert criterion.forward(kind(x), kind(labels)) == fn.softmax_cross_entropy(x, labels)[0]
    assert type(fn.layers.Sequential().forward(kind(x))) is np.ndarray


@SHARING
def test_one_label_of_one_row(kind):
    logits = np.array([1.0, 2.0])
    assert fn.softmax_cross_entropy(kind(logits), kind(np.array(1)))[0] == fn.softmax_cross_entropy(logits, 1)[0]


@SHARING
def test_checkpoints_hold_their_values(kind, tmp_path):
    fn.checkpoint.save(tmp_path / "run.npz", inputs={"mean": kind(np.arange(3.0)), "labels": [kind(np.arange(2))]})
    inputs = fn.checkpoint.load(tmp_path / "run.npz")["inputs"]
    np.testing.assert_array_equal(inputs["mean"], np.arange(3.0))
    np.testing.assert_array_equal(inputs["labels"][0], np.arange(2))


# -- refusals ----------------------------------------------------------------------------------------------------------


def read_only():
    a = np.ones(3)
    a.flags.writeable = False
    return a


def disabled(a):
    """A type that says it has no ``__array__``."""
    return type("Disabled", (Exporter,), {"__array__": None})(a)


def returning(value):
    """An ``__array__`` that does not do what it is for."""
    return type("Strange", (), {"__array__": lambda self: value})()


def raising(error):
    """An ``__array__`` that fails."""
    def fail(self):
        raise error
    return type("Strange", (), {"__array__": fail})()


def on_device(*device):
    """A type with another answer to where its memory is."""
    return type("Placed", (Shared,), {"device": device})(np.ones(3))


def test_a_device_that_is_none_is_left_to_the_export():
    for device in ((None, None), (), ("cpu", 0)):
        np.testing.assert_array_equal(fn.relu(on_device(*device)), 1)


@BACKENDS
@pytest.mark.parametrize(("x", "message"), [
    ([1.0], "x: expected a numpy.ndarray, got list"),
    ((1.0,), "x: expected a numpy.ndarray, got tuple"),
    (1.0, "x: expected a numpy.ndarray, got float"),
    (np.float64(1), "x: expected a numpy.ndarray, got float64"),
    (memoryview(np.ones(3)), "x: expected a numpy.ndarray, got memoryview"),
    (np.ndarray, "x: expected a numpy.ndarray, got type"),
    (disabled(np.ones(3)), "x: expected a numpy.ndarray, got Disabled"),
    (Shared(np.arange(3)), "x: expected dtype float32 or float64, got int64"),
    (Converted(np.array([None])), "x: expected dtype float32 or float64, got object"),
    (Converted(np.ma.array([1.0])), "x: expected a plain numpy.ndarray, got MaskedArray, whose mask would be ignored"),
    (OnGpu(np.ones(3)), "x: expected an array in CPU memory, got OnGpu on device type 2"),
    (Refusing(np.ones(3)), "x: expected an array that NumPy can read, got Refusing (detach it first)"),
    (returning([1.0]), "x: expected an array that NumPy can read, got Strange (__array__ returned list)"),
    (raising(KeyError("column")), "x: expected an array that NumPy can read, got Strange ('column')"),
    (raising(OSError(5, "disk")), "x: expected an array that NumPy can read, got Strange ([Errno 5] disk)"),
], ids=lambda value: type(value).__name__ if not isinstance(value, str) else "")
def test_what_is_no_array(backend, x, message):
    with pytest.raises(TypeError) as error:
        backend.relu(x)
    assert str(error.value) == message


@BACKENDS
@pytest.mark.parametrize(("kind", "error", "message"), [
    (lambda a: Converted(read_only()), ValueError,
     "{}: expected a writeable array, got Converted, whose memory is read-only"),
    (lambda a: Shared(read_only()), ValueError,
     "{}: expected a writeable array, got Shared, whose memory is read-only"),
    (Copied, ValueError, "{}: expected a writeable array, got Copied, which does not share its memory"),
    (Cheating, ValueError, "{}: expected a writeable array, got Cheating, which does not share its memory"),
    (WithoutCopy, ValueError, "{}: expected a writeable array, got WithoutCopy, which does not share its memory"),
    (OnGpu, TypeError, "{}: expected an array in CPU memory, got OnGpu on device type 2"),
    (Refusing, TypeError, "{}: expected an array that NumPy can read, got Refusing (detach it first)"),
    (lambda a: Converted(np.broadcast_to(a[:1], 3).view()), ValueError,
     "{}: expected a writeable array, got Converted, whose memory is read-only"),
], ids=["Converted", "Shared", "Copied", "Cheating", "WithoutCopy", "OnGpu", "Refusing", "broadcast"])
def test_what_cannot_be_written(backend, kind, error, message):
    if not FOR_WRITING and kind(np.ones(3)).__class__ is Shared:
        pytest.skip("NumPy 2.0 exports no read-only array by DLPack")
    x, a = np.ones((2, 3)), np.ones(3)
    state = [np.ones(3) for _ in range(3)]
    before = snapshot(x, a, *state)
    calls = {
        "out": lambda: backend.relu(a, out=kind(a.copy())),
        "params": lambda: backend.momentum_step(kind(a), state[0], state[1], lr=0.1),
        "velocities[0]": lambda: backend.momentum_step([state[0]], [state[1]], [kind(a)], lr=0.1),
        "running_var": lambda: backend.batch_norm_forward(x, None, None, state[0], kind(a)),
        "grads": lambda: backend.clip_grad_norm(kind(a), 0.1)}
    for name, call in calls.items():
        with pytest.raises(error) as raised:
            call()
        assert str(raised.value) == message.format(name)
    with pytest.raises(error, match="params: "):
        fn.optim.SGD(kind(a), backend=backend)
    assert_unchanged(before, x, a, *state)


@BACKENDS
def test_what_is_only_read_may_be_read_only_or_copied(backend):
    x, a = np.arange(6.0).reshape(2, 3), read_only()
    expected = backend.batch_norm_inference(x, a, a, a, a)
    for kind in (Shared, Converted, Copied, WithoutCopy):
        if kind is Shared and not FOR_WRITING:
            continue
        np.testing.assert_array_equal(backend.batch_norm_inference(kind(x), *[kind(a)] * 4), expected)
    assert backend.clip_grad_norm([Copied(a)], np.inf) == backend.clip_grad_norm([a], np.inf)
    w = np.ones(3)
    backend.momentum_step(w, WithoutCopy(a), None, lr=1.0, momentum=0.0)
    np.testing.assert_array_equal(w, 0.0)


def test_errors_that_are_no_refusal_go_through():
    class Broken(Exporter):
        def __array__(self, dtype=None, copy=None):
            raise MemoryError("no memory")

    with pytest.raises(MemoryError, match="no memory"):
        fn.relu(Broken(np.ones(3)))


def test_numbers_and_ndarrays_are_no_foreign_arrays():
    assert not any(map(has_protocol, [np.ones(1), np.float32(1), 1.0, [1.0], None, "x", np.ma.array([1.0])]))


# -- real libraries ----------------------------------------------------------------------------------------------------


class TestTorch:
    @pytest.fixture(autouse=True)
    def torch(self):
        """On one thread: PyTorch's threads spin where others want to run."""
        torch = pytest.importorskip("torch", reason="PyTorch is not installed")
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield torch
        torch.set_num_threads(before)

    @BACKENDS
    def test_tensors_are_read_in_place(self, backend, torch):
        x = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, 3, (4, 2, 2))
        view = as_array("x", x)
        assert address(view) == x.data_ptr()
        y = backend.softmax_cross_entropy(x, labels, axis=1)[1]
        assert type(y) is np.ndarray
        assert y.strides == view.strides
        assert to_bytes(backend.softmax_cross_entropy(x.numpy(), labels.numpy(), axis=1)[1]) == to_bytes(y)

    @needs_writeable_dlpack
    @BACKENDS
    def test_tensors_are_written_in_place(self, backend, torch):
        x, mean, var = torch.randn(8, 3), torch.zeros(3), torch.ones(3)
        out = torch.empty_like(x)
        y, _ = backend.batch_norm_forward(x, None, None, mean, var, out=out)
        assert address(y) == out.data_ptr()
        expected = torch.nn.BatchNorm1d(3, affine=False)
        torch.testing.assert_close(out, expected(x))
        torch.testing.assert_close(var, expected.running_var)
        layer = torch.nn.Linear(3, 2)
        params = [p.detach() for p in layer.parameters()]
        before = [p.clone() for p in params]
        optimizer = fn.optim.SGD(params, lr=1.0, backend=backend)
        optimizer.step([torch.ones_like(p) for p in params])
        assert all(torch.equal(p, old - 1) for p, old in zip(layer.parameters(), before, strict=True))

    @pytest.mark.parametrize(("make", "error", "message"), [
        (lambda torch: torch.ones(3, requires_grad=True), TypeError, r"x: .*got Tensor \(.*requires grad.*detach"),
        (lambda torch: torch.ones(3, dtype=torch.bfloat16), TypeError, r"x: .*got Tensor \(.*BFloat16\)"),
        (lambda torch: torch.ones(3, device="meta"), TypeError, r"x: .*got Tensor \(.*meta"),
        (lambda torch: torch.ones(3, 3).to_sparse(), TypeError, r"x: .*got Tensor \(.*[Ss]parse"),
        (lambda torch: torch.ones(3, dtype=torch.float16), TypeError, "x: .*got float16"),
    ], ids=["gradient", "bfloat16", "meta", "sparse", "float16"])
    def test_what_numpy_cannot_hold(self, torch, make, error, message):
        with pytest.raises(error, match=message):
            fn.relu(make(torch))
        with pytest.raises(error, match=message.replace("x: ", "out: ")):
            fn.relu(np.ones(3), out=make(torch))


def use_jax_arrays():
    """What `test_jax_arrays` runs in an interpreter of its own."""
    import jax
    from jax import numpy as jnp

    x = jnp.arange(6.0, dtype=jnp.float32).reshape(2, 3)
    assert address(as_array("x", x)) == x.unsafe_buffer_pointer()
    for backend in (fn, fn.reference):
        assert to_bytes([backend.softmax(x)]) == to_bytes([backend.softmax(np.asarray(x))])
        with pytest.raises(ValueError, match=r"params: .*writeable array, got ArrayImpl, whose memory is read-only"):
            backend.momentum_step(x, x, None, lr=0.1, momentum=0.0)
        w = np.ones((2, 3), np.float32)
        backend.momentum_step(w, x, None, lr=1.0, momentum=0.0)
        np.testing.assert_array_equal(w, 1 - np.asarray(x))
    with pytest.raises(TypeError, match="x: expected dtype float32 or float64, got bfloat16"):
        fn.relu(jnp.ones(3, jnp.bfloat16))
    with pytest.raises(TypeError, match=r"x: .*NumPy can read, got \w*Tracer \(.*traced array"):
        jax.jit(fn.relu)(jnp.ones(3))
    deleted = jnp.ones(3) + 1
    deleted.delete()
    with pytest.raises(TypeError, match=r"x: .*got ArrayImpl \(Array has been deleted"):
        fn.relu(deleted)


@pytest.mark.skipif(find_spec("jax") is None, reason="JAX is not installed")
def test_jax_arrays():
    """Where JAX has been imported every fork warns, those of later tests too."""
    done = python("import test_interchange\ntest_interchange.use_jax_arrays()", 120)
    assert done.returncode == 0, done.stderr


class TestPandas:
    @pytest.fixture(autouse=True)
    def pandas(self):
        return pytest.importorskip("pandas", reason="pandas is not installed")

    @BACKENDS
    def test_columns_and_tables_are_read(self, backend, pandas, rng):
        x, labels = rng.standard_normal((5, 3)), np.array([0, 2, 1, 1, 0])
        table = pandas.DataFrame(x, columns=list("abc"))
        assert address(as_array("x", table)) == address(table.to_numpy())
        loss, dlogits = backend.softmax_cross_entropy(table, pandas.Series(labels), weight=pandas.Series(np.ones(3)))
        assert loss == backend.softmax_cross_entropy(x, labels)[0]
        assert type(dlogits) is np.ndarray
        moments = backend.Moments()
        moments.update(table)
        np.testing.assert_allclose(moments.mean, table.mean(), rtol=0, atol=1e-15)

    def test_what_is_no_table_of_numbers(self, pandas):
        with pytest.raises(TypeError, match="x: expected dtype float32 or float64, got object"):
            fn.relu(pandas.DataFrame({"a": [1.0], "b": ["x"]}))
        mixed = pandas.DataFrame({"a": [1.0], "b": np.ones(1, np.float32)})
        with (warnings.catch_warnings(action="ignore", category=FutureWarning),  # pandas 2, of what 3 does
              pytest.raises(ValueError, match="out: expected a writeable array, got DataFrame, which does not share")):
            fn.relu(np.ones((1, 2)), out=mixed)

    def test_copy_on_write_is_read_only(self, pandas):
        column = pandas.Series(np.ones(3))
        if as_array("x", column).flags.writeable:
            pytest.skip("pandas before copy-on-write hands out writeable views")
        with pytest.raises(ValueError, match=r"params: .*writeable array, got Series, whose memory is read-only"):
            fn.momentum_step(column, np.ones(3), None, lr=0.1, momentum=0.0)
