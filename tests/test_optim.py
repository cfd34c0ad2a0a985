"""Optimizer classes: they find a minimum, follow PyTorch, keep their state, and refuse what does not fit."""

from __future__ import annotations

import inspect
import itertools

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import optim
from fastnorm.reference import updates as reference

BACKENDS = pytest.mark.parametrize("backend", [None, reference], ids=["compiled", "reference"])


def product(name, **choices):
    for values in itertools.product(*choices.values()):
        yield name, dict(zip(choices, values, strict=True))


BOTH = [False, True]
SETTINGS = [
    *[(name, o) for name, o in product("SGD", momentum=[0.0, 0.9], dampening=[0.0, 0.3], nesterov=BOTH,
                                       weight_decay=[0.0, 0.02], maximize=BOTH)
      if not o["nesterov"] or (o["momentum"] and not o["dampening"])],
    *product("RMSProp", momentum=[0.0, 0.9], centered=BOTH, weight_decay=[0.0, 0.02], maximize=BOTH),
    *product("Adam", amsgrad=BOTH, weight_decay=[0.0, 0.02], decoupled_weight_decay=BOTH, maximize=BOTH),
    *product("AdamW", amsgrad=BOTH, weight_decay=[0.0, 0.02], maximize=BOTH),
    *product("Adagrad", lr_decay=[0.0, 0.05], weight_decay=[0.0, 0.02], initial_accumulator_value=[0.0, 0.5],
             maximize=BOTH),
]
OWN = [("RMSProp", {"eps_inside_sqrt": True, "centered": True, "momentum": 0.5}),
       ("Adam", {"epsilon_hat": True}), ("AdamW", {"epsilon_hat": True, "amsgrad": True})]
ONE_EACH = [("SGD", {"momentum": 0.9, "dampening": 0.1}), ("SGD", {}), OWN[0], ("Adam", {"amsgrad": True}),
            ("AdamW", {}), ("Adagrad", {"lr_decay": 0.1})]


def ids(setting):
    name, options = setting
    return name + "".join(f"-{key}{'' if value is True else value}" for key, value in options.items() if value)


def settings(values):
    return pytest.mark.parametrize("setting", values, ids=ids)


def make(setting, params, **more):
    name, options = setting
    return getattr(optim, name)(params, **options, **more)


# -- what they compute -------------------------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize(("setting", "lr", "steps"), [
    (("SGD", {}), 0.1, 100),
    (("SGD", {"momentum": 0.9}), 0.05, 300),
    (("SGD", {"momentum": 0.9, "dampening": 0.5}), 0.05, 300),
    (("SGD", {"momentum": 0.9, "nesterov": True}), 0.05, 300),
    (("RMSProp", {}), 0.01, 2000),
    (("RMSProp", {"momentum": 0.5, "centered": True}), 0.003, 3000),
    (("Adam", {}), 0.1, 500),
    (("Adam", {"amsgrad": True}), 0.1, 2000),
    (("Adam", {"epsilon_hat": True}), 0.1, 500),
    (("AdamW", {"weight_decay": 0.0}), 0.1, 500),
    (("Adagrad", {}), 1.0, 500),
], ids=str)
def test_finds_the_minimum_of_a_parabola(setting, lr, steps, dtype, backend):
    """w**2 - 10 w + 25 is least at 5; RMSProp's last steps are as long as its learning rate."""
    w = np.zeros(1, dtype)
    optimizer = make(setting, w, lr=lr, backend=backend)
    for _ in range(steps):
        optimizer.step(2 * w - 10)
    assert abs(w[0] - 5) < 0.02


def test_maximize_finds_the_maximum(dtype):
    w = np.zeros(1, dtype)
    optimizer = optim.Adam(w, lr=0.1, maximize=True)
    for _ in range(500):
        optimizer.step(10 - 2 * w)  # the gradient of -w**2 + 10 w - 25
    assert abs(w[0] - 5) < 0.01


@settings(SETTINGS)
def test_100_steps_follow_torch(setting):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    ours = [rng.standard_normal(shape) for shape in ((4, 3), (5,))]
    theirs = [torch.nn.Parameter(torch.tensor(w)) for w in ours]
    optimizer = make(setting, ours, lr=0.02)
    name = {"RMSProp": "RMSprop"}.get(setting[0], setting[0])
    peer = getattr(torch.optim, name)(theirs, lr=0.02, **setting[1])
    for _ in range(100):
        grads = [rng.standard_normal(w.shape) + 0.3 for w in ours]
        optimizer.step(grads)
        for w, g in zip(theirs, grads, strict=True):
            w.grad = torch.tensor(g)
        peer.step()
    for w, expected in zip(ours, theirs, strict=True):
        # 100 steps of about 10 roundings each; the first centered steps divide by a variance of few values
        np.testing.assert_allclose(w, expected.detach().numpy(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["SGD", "RMSProp", "Adam", "AdamW", "Adagrad"])
def test_names_and_defaults_are_torchs(name):
    torch = pytest.importorskip("torch")
    theirs = inspect.signature(getattr(torch.optim, {"RMSProp": "RMSprop"}.get(name, name))).parameters
    ours = inspect.signature(getattr(optim, name)).parameters
    speed = {"foreach", "capturable", "differentiable", "fused"}  # how torch computes, not what
    assert set(theirs) - speed == set(ours) - {"backend", "epsilon_hat", "eps_inside_sqrt", "nonfinite"}
    for key in set(theirs) - speed - {"params"}:
        assert ours[key].default == theirs[key].default
    positional = [key for key, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD and key not in speed]
    assert [key for key in ours if key in positional] == positional


def test_clip_follows_torch(dtype):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    for value in (None, np.nan, np.inf):
        for max_norm in (0.5, 1e6, 0.0):
            grads = [rng.standard_normal(shape).astype(dtype) for shape in ((4, 3), (5,))]
            if value is not None:
                grads[1][2] = value
            theirs = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.float64)) for g in grads]
            for w, g in zip(theirs, grads, strict=True):
                w.grad = torch.tensor(g.astype(np.float64))
            expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
            np.testing.assert_allclose(fn.clip_grad_norm(grads, max_norm), expected.item(), rtol=1e-14)
            for g, w in zip(grads, theirs, strict=True):
                np.testing.assert_allclose(g, w.grad.numpy(), rtol=4 * np.finfo(dtype).eps)


@settings([*SETTINGS, *OWN])
def test_backends_agree(setting, rng):
    """20 steps of the compiled kernels and of the twins, float32 and float64 side by side."""
    start = [rng.standard_normal((3, 5)).astype(np.float32), rng.standard_normal(7)]
    ours, twin = [w.copy() for w in start], [w.copy() for w in start]
    one, other = make(setting, ours, lr=0.02), make(setting, twin, lr=0.02, backend=reference)
    for _ in range(20):
        grads = [(rng.standard_normal(w.shape) + 0.3).astype(w.dtype) for w in start]
        one.step(grads)
        other.step(grads)
    for w, expected in zip(ours, twin, strict=True):
        tolerance = 1000 * np.finfo(w.dtype).eps  # 20 steps of at most 10 roundings, with room
        np.testing.assert_allclose(w, expected, rtol=tolerance, atol=tolerance)


def test_sgd_leaves_the_first_step_undampened(dtype):
    w = np.zeros(2, dtype)
    optimizer = optim.SGD(w, lr=1.0, momentum=0.5, dampening=0.75)
    optimizer.step(np.ones(2, dtype))
    np.testing.assert_array_equal(w, -1)
    optimizer.step(np.ones(2, dtype))  # v = 0.5 * 1 + 0.25 * 1
    np.testing.assert_array_equal(w, -1.75)


def test_parameters_of_any_layout_are_updated(layout):
    w = layout(np.ones((4, 6)))
    optimizer = optim.Adam([w], lr=0.5)
    optimizer.step([np.ones((4, 6))])
    np.testing.assert_allclose(w, 0.5, rtol=1e-7)


# -- gradients that are not finite -------------------------------------------------------------------------------------

NONFINITE = pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])


def everything(optimizer):
    """Parameters and state, as they are now."""
    return [w.copy() for w in optimizer.params], optimizer.state_dict()


def two_shapes():
    return [np.ones((2, 3), np.float32), np.ones(40)]


def two_gradients(rng):
    return [rng.standard_normal(w.shape).astype(w.dtype) for w in two_shapes()]


@BACKENDS
@NONFINITE
@settings(ONE_EACH)
def test_a_skipped_step_leaves_no_trace_but_its_count(setting, value, backend, rng):
    """The bits of a run that never met the bad gradient, momentum's first step and Adam's bias correction included."""
    skipping, untouched = (make(setting, two_shapes(), nonfinite=choice, backend=backend)
                           for choice in ("skip", "propagate"))
    for turn in range(4):
        bad = two_gradients(rng)
        bad[turn % 2].flat[-1] = value
        before = everything(skipping)
        before[1]["skipped_steps"] += 1
        skipping.step(bad)
        np.testing.assert_equal(everything(skipping), before)
        good = two_gradients(rng)
        skipping.step(good)
        untouched.step(good)
    assert skipping.skipped_steps == 4
    assert untouched.skipped_steps == 0
    np.testing.assert_equal(everything(skipping), (everything(untouched)[0], untouched.state_dict()
                                                   | {"nonfinite": "skip", "skipped_steps": 4}))


@BACKENDS
@NONFINITE
@settings(ONE_EACH)
def test_a_refused_step_changes_nothing(setting, value, backend, rng):
    optimizer = make(setting, two_shapes(), nonfinite="raise", backend=backend)
    optimizer.step(two_gradients(rng))
    before = everything(optimizer)
    bad = two_gradients(rng)
    bad[0][1, 2] = bad[1][5] = value
    with pytest.raises(FloatingPointError) as caught:
        optimizer.step(bad)
    assert str(caught.value) == f"grads[0]: expected finite values, got {value} at position (1, 2)"
    bad[0][1, 2] = 0
    with pytest.raises(FloatingPointError) as caught:
        optimizer.step(bad)
    assert str(caught.value) == f"grads[1]: expected finite values, got {value} at position 5"
    np.testing.assert_equal(everything(optimizer), before)


def test_the_first_position_is_the_first_in_c_order_whatever_the_layout(layout):
    grad = layout(np.ones((3, 4)))
    grad[0, 3], grad[2, 0] = np.nan, np.inf
    with pytest.raises(FloatingPointError, match=r"^grads: expected finite values, got nan at position \(0, 3\)$"):
        optim.Adam(np.ones((3, 4)), nonfinite="raise").step(grad)
    with pytest.raises(FloatingPointError, match=r"^grads: expected finite values, got inf$"):
        optim.Adam(np.ones(()), nonfinite="raise").step(np.array(np.inf))


@BACKENDS
@settings(ONE_EACH)
def test_by_default_the_reference_decides_what_becomes_of_nan(setting, backend):
    w = np.ones(3)
    optimizer = make(setting, w, backend=backend)
    optimizer.step(np.array([1.0, np.nan, 1.0]))
    np.testing.assert_array_equal(np.isnan(w), [False, True, False])
    assert optimizer.state_dict()["step"] == 1
    assert optimizer.skipped_steps == 0


@BACKENDS
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_wrong_gradient_is_refused_before_it_is_searched(nonfinite, backend):
    optimizer = optim.Adam(np.ones(3), nonfinite=nonfinite, backend=backend)
    with pytest.raises(ValueError, match=r"grads: expected shape \(3,\), got \(4,\)"):
        optimizer.step(np.full(4, np.nan))
    with pytest.raises(TypeError, match="grads: expected dtype float64, got float32"):
        optimizer.step(np.full(3, np.nan, np.float32))
    assert optimizer.skipped_steps == 0


def test_the_choice_and_the_count_are_saved(tmp_path):
    optimizer = optim.SGD(np.ones(3), nonfinite="skip")
    optimizer.step(np.full(3, np.nan))
    again = optim.SGD(np.ones(3), nonfinite="raise")
    again.load_state_dict(through_a_file(optimizer.state_dict(), tmp_path / "state.npz"))
    assert again.skipped_steps == 1
    again.step(np.full(3, np.nan))  # skipped: the options come with the state
    assert again.skipped_steps == 2


def test_a_state_from_before_there_was_the_choice_is_loaded():
    old = {key: value for key, value in optim.Adam(np.ones(3)).state_dict().items()
           if key not in ("nonfinite", "skipped_steps")}
    optimizer = optim.Adam(np.ones(3), nonfinite="skip")
    optimizer.step(np.full(3, np.nan))
    optimizer.load_state_dict(old)
    assert optimizer.skipped_steps == 0
    optimizer.step(np.full(3, np.nan))
    assert optimizer.skipped_steps == 1


# -- state -------------------------------------------------------------------------------------------------------------


def through_a_file(state, path):
    """What a caller does with numpy.savez: lists flattened to one array an item, then put together again."""
    flat = {}
    for key, value in state.items():
        flat |= {f"{key}.{i}": a for i, a in enumerate(value)} if isinstance(value, list) else {key: value}
    np.savez(path, **flat)
    loaded = {}
    with np.load(path) as file:  # no pickle
        for key in file.files:
            name, _, index = key.partition(".")
            if index:
                loaded.setdefault(name, []).append(file[key])
            else:
                loaded[name] = file[key]
    return loaded


@BACKENDS
@settings([*ONE_EACH, *OWN])
def test_a_saved_run_continues_bit_for_bit(setting, backend, tmp_path, rng):
    shapes = [((3, 4), np.float32), ((5,), np.float64), ((), np.float32)]
    grads = [[np.asarray(rng.standard_normal(s), t) for s, t in shapes] for _ in range(6)]
    for steps_before in (0, 1, 3):
        whole = [np.ones(s, t) for s, t in shapes]
        optimizer = make(setting, whole, lr=0.1, backend=backend)
        for g in grads[:steps_before]:
            optimizer.step(g)
        optimizer.lr = 0.05
        state = optimizer.state_dict()
        resumed = [w.copy() for w in whole]
        for g in grads[steps_before:]:
            optimizer.step(g)
        again = getattr(optim, setting[0])(resumed, backend=backend)  # the options come with the state
        again.load_state_dict(through_a_file(state, tmp_path / "state.npz"))
        assert again.lr == 0.05
        for g in grads[steps_before:]:
            again.step(g)
        for a, b in zip(whole, resumed, strict=True):
            np.testing.assert_array_equal(a, b)
        assert list(again.state_dict()) == list(optimizer.state_dict())


def test_state_is_a_copy_both_ways():
    w = np.ones(3)
    optimizer = optim.Adam(w)
    state = optimizer.state_dict()
    assert {type(v) for v in state.values()} <= {str, int, float, bool, tuple, list}
    optimizer.step(np.ones(3))
    np.testing.assert_array_equal(state["exp_avgs"][0], 0)
    optimizer.load_state_dict(state)
    optimizer.step(np.ones(3))
    np.testing.assert_array_equal(state["exp_avgs"][0], 0)
    state["exp_avgs"][0][:] = 7
    assert optimizer.state_dict()["exp_avgs"][0][0] < 1


# change of the state (a dict to merge in, or a key to leave out), exception, part of the message
BAD_STATES = [
    ({"optimizer": "SGD"}, ValueError, "state: expected the state of Adam, got that of SGD"),
    ({"optimizer": None}, ValueError, "state: expected the state of Adam, got that of None"),
    ("optimizer", ValueError, "state: expected the state of Adam, got that of None"),
    ("step", ValueError, "got missing step"),
    ("lr", ValueError, "got missing lr"),
    ("betas", ValueError, "got missing betas"),
    ("exp_avgs", ValueError, "got missing exp_avgs"),
    ({"velocities": []}, ValueError, "got unknown velocities"),
    ({"amsgrad": True}, ValueError, "got missing max_exp_avg_sqs"),
    ({"step": -1}, ValueError, "step: expected an integer >= 0, got -1"),
    ({"step": 1.5}, TypeError, "step: expected an integer, got float"),
    ({"lr": -1.0}, ValueError, "lr: expected a finite number >= 0, got -1"),
    ({"betas": (0.9, 1.0)}, ValueError, "betas[1]: expected a number in [0, 1), got 1"),
    ({"amsgrad": "no"}, TypeError, "amsgrad: expected True or False, got str"),
    ({"nonfinite": "ignore"}, ValueError, "nonfinite: expected one of 'propagate', 'skip', 'raise', got 'ignore'"),
    ({"skipped_steps": -1}, ValueError, "skipped_steps: expected an integer >= 0, got -1"),
    ({"exp_avgs": np.zeros((2, 3))}, TypeError, "exp_avgs: expected a list of arrays, got ndarray"),
    ({"exp_avgs": [np.zeros(3)]}, ValueError, "exp_avgs: expected 2 arrays as in params, got 1"),
    ({"exp_avgs": [np.zeros(3), np.zeros(5)]}, ValueError, "exp_avgs[1]: expected shape (4,), got (5,)"),
    ({"exp_avg_sqs": [np.zeros(3), np.zeros(4, np.float32)]}, TypeError,
     "exp_avg_sqs[1]: expected dtype float64, got float32"),
    ({"exp_avg_sqs": [[0, 0, 0], np.zeros(4)]}, TypeError, "exp_avg_sqs[0]: expected a numpy.ndarray, got list"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_STATES, ids=[row[2][-40:] for row in BAD_STATES])
def test_a_bad_state_changes_nothing(change, error, message):
    def new():
        optimizer = optim.Adam([np.ones(3), np.ones(4)], lr=0.25)
        optimizer.step([np.ones(3), np.ones(4)])
        return optimizer

    optimizer, source = new(), new()
    source.step([np.ones(3), np.ones(4)])
    state = {key: value for key, value in source.state_dict().items() if key != change}
    if isinstance(change, dict):
        state |= change
    with pytest.raises(error) as caught:
        optimizer.load_state_dict(state)
    assert message in str(caught.value)
    np.testing.assert_equal(optimizer.state_dict(), new().state_dict())


def test_a_state_that_is_no_dict_is_refused():
    with pytest.raises(TypeError, match="state: expected a dict, got list"):
        optim.Adam(np.ones(3)).load_state_dict([1, 2])


# -- what they refuse --------------------------------------------------------------------------------------------------


def read_only():
    a = np.ones(3)
    a.flags.writeable = False
    return a


SAME = np.ones(3)
# class, arguments, exception, part of the message
REFUSED = [
    ("Adam", {"params": {"w": np.ones(3)}}, TypeError, "params: expected an array or a list of arrays, got dict"),
    ("Adam", {"params": (w for w in [np.ones(3)])}, TypeError,
     "params: expected an array or a list of arrays, got generator"),
    ("Adam", {"params": [np.ones(3, np.int32)]}, TypeError, "params[0]: expected dtype float32 or float64, got int32"),
    ("Adam", {"params": [SAME, SAME]}, ValueError, "params[1]: expected an array that does not overlap params[0]"),
    ("Adam", {"params": [np.ones(2), read_only()]}, ValueError, "params[1]: expected a writeable array"),
    ("Adam", {"lr": -1}, ValueError, "lr: expected a finite number >= 0, got -1"),
    ("Adam", {"lr": None}, TypeError, "lr: expected a real number, got NoneType"),
    ("Adam", {"betas": (0.9, 1.5)}, ValueError, "betas[1]: expected a number in [0, 1), got 1.5"),
    ("AdamW", {"eps": -1.0}, ValueError, "eps: expected a finite number >= 0, got -1"),
    ("AdamW", {"weight_decay": np.nan}, ValueError, "weight_decay: expected a finite number >= 0, got nan"),
    ("Adam", {"nonfinite": "ignore"}, ValueError,
     "nonfinite: expected one of 'propagate', 'skip', 'raise', got 'ignore'"),
    ("SGD", {"nonfinite": None}, ValueError, "nonfinite: expected one of 'propagate', 'skip', 'raise', got None"),
    ("AdamW", {"nonfinite": True}, TypeError, "nonfinite: expected one of 'propagate', 'skip', 'raise', got bool"),
    ("Adam", {"amsgrad": 1}, TypeError, "amsgrad: expected True or False, got int"),
    ("RMSProp", {"alpha": 2.0}, ValueError, "alpha: expected a number in [0, 1], got 2"),
    ("RMSProp", {"centered": "yes"}, TypeError, "centered: expected True or False, got str"),
    ("RMSProp", {"momentum": "a"}, TypeError, "momentum: expected a real number, got str"),
    ("Adagrad", {"initial_accumulator_value": -1.0}, ValueError, "initial_accumulator_value: expected a finite number"),
    ("SGD", {"dampening": -1.0}, ValueError, "dampening: expected a finite number >= 0, got -1"),
    ("SGD", {"momentum": np.inf}, ValueError, "momentum: expected a finite number >= 0, got inf"),
    ("SGD", {"nesterov": True}, ValueError,
     "nesterov: expected momentum > 0 and no dampening beside it, got momentum 0 and dampening 0"),
    ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ValueError,
     "nesterov: expected momentum > 0 and no dampening beside it, got momentum 0.9 and dampening 0.1"),
]


@pytest.mark.parametrize(("name", "arguments", "error", "message"), REFUSED,
                         ids=[f"{row[0]}-{row[3][-40:]}" for row in REFUSED])
def test_refused_at_construction(name, arguments, error, message):
    with pytest.raises(error) as caught:
        getattr(optim, name)(**{"params": [np.ones(3)], **arguments})
    assert message in str(caught.value)


def test_a_bad_gradient_changes_neither_parameters_nor_state():
    w = np.ones(3)
    optimizer = optim.Adam(w)
    before = optimizer.state_dict()
    for bad, error, message in ((np.ones(4), ValueError, r"grads: expected shape \(3,\), got \(4,\)"),
                                ([np.ones(3)], TypeError, "grads: expected a numpy.ndarray, got list"),
                                (np.ones(3, np.float32), TypeError, "grads: expected dtype float64, got float32")):
        with pytest.raises(error, match=message):
            optimizer.step(bad)
    with pytest.raises(ValueError, match="grads: expected 2 arrays as in params, got 1"):
        optim.Adam([np.ones(3), np.ones(2)]).step([np.ones(3)])
    np.testing.assert_equal(optimizer.state_dict(), before)
    np.testing.assert_array_equal(w, 1)


def test_an_interrupt_during_the_update_finds_it_done_and_counted():
    """Python runs the handler of Ctrl-C when the kernel has returned, before the next line."""
    class Interrupted:
        @staticmethod
        def adam_step(*arrays, **options):
            fn.adam_step(*arrays, **options)
            raise KeyboardInterrupt

        all_finite = staticmethod(fn.all_finite)

    interrupted, whole = optim.Adam(np.ones(3), backend=Interrupted), optim.Adam(np.ones(3))
    with pytest.raises(KeyboardInterrupt):
        interrupted.step(np.ones(3))
    whole.step(np.ones(3))
    np.testing.assert_equal(interrupted.state_dict(), whole.state_dict())
    np.testing.assert_array_equal(interrupted.params[0], whole.params[0])


def test_the_learning_rate_is_checked_when_it_is_set():
    optimizer = optim.SGD(np.ones(3), lr=0.5)
    for bad, error in ((-1.0, ValueError), (np.nan, ValueError), ("fast", TypeError)):
        with pytest.raises(error, match="lr: expected"):
            optimizer.lr = bad
    assert optimizer.lr == 0.5
    optimizer.lr = 1
    assert optimizer.lr == 1.0


def test_adding_to_the_list_of_parameters_later_does_not_matter():
    params = [np.ones(3)]
    optimizer = optim.SGD(params, lr=0.5)
    params.append(np.ones(2))
    optimizer.step([np.ones(3)])
    np.testing.assert_array_equal(params[0], 0.5)


def test_every_level_runs(level, dtype):
    w = [np.ones(70, dtype), np.ones((), dtype)]
    for setting in ONE_EACH:
        make(setting, w, lr=0.1).step([np.ones(70, dtype), np.ones((), dtype)])
    assert np.all(w[0] == w[1])
    assert w[0][0] < 1
