"""fastnorm under thinc and spaCy: every hyper-parameter beside thinc's own optimizer, and whole trainings of both."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import pickle
import re
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from conftest import LAYOUTS, assert_close, assert_unchanged, python, snapshot

pytest.importorskip("thinc", reason="thinc is not installed")
import thinc.optimizers
from thinc.api import PyTorchWrapper, Relu, Softmax, chain, fix_random_seed, registry

import fastnorm as fn
from fastnorm.integrations import thinc as fast

EXAMPLE = Path(__file__).parents[1] / "examples" / "spacy_textcat.py"
KEY = (7, "W")
STEPS = 6
EPS = float(np.finfo(np.float32).eps)
# Whose complements float32 holds exactly: thinc rounds 1 - beta in float32, off by 1.3e-5 for 0.999; fastnorm does not.
EXACT_BETAS = {"beta1": 0.875, "beta2": 0.9375}

# Every hyper-parameter that changes an update.
OPTIONS = {
    "Adam": [
        {}, EXACT_BETAS, {"grad_clip": 0.0, **EXACT_BETAS}, {"grad_clip": 1e3, **EXACT_BETAS},
        {"L2": 0.1, **EXACT_BETAS}, {"L2": 0.1, "L2_is_weight_decay": False, **EXACT_BETAS}, {"L2": 0.1, "eps": 0.1},
        {"use_averages": False, **EXACT_BETAS}, {"beta1": 0.5, "beta2": 0.75, "eps": 1e-3},
        {"beta1": 0.0, "beta2": 0.0}, {"beta2": 0.0, "L2": 0.1},
        {"L2": [0.1, 0.0, 0.2], "grad_clip": [0.0, 1.0], "eps": [1e-8, 1e-2], "beta1": [0.5, 0.75], "beta2": [0.75]},
    ],
    "SGD": [{}, {"grad_clip": 0.0}, {"L2": 0.1}, {"L2": 0.1, "L2_is_weight_decay": False, "use_averages": False}],
}
CASES = [(name, options) for name, every in OPTIONS.items() for options in every]


def parameters(dtype=np.float32):
    rng = np.random.default_rng(1)
    return {(3, "W"): rng.standard_normal((4, 6)).astype(dtype), (3, "b"): rng.standard_normal(6).astype(dtype),
            (5, "E"): rng.standard_normal((2, 3, 4)).astype(dtype)}


def gradients(step, dtype=np.float32):
    """Gradients that depend on the step alone, so that roundings do not feed back; every second time small ones."""
    rng = np.random.default_rng(100 + step)
    return {key: (rng.standard_normal(weights.shape) * (0.1 if step % 2 else 1.0)).astype(dtype)
            for key, weights in parameters().items()}


def train(optimizer, params, steps=range(STEPS)):
    """Update every parameter in each step; the rate is scaled in one of them."""
    for step in steps:
        for key, gradient in gradients(step).items():
            weights, left = optimizer(key, params[key], gradient, lr_scale=0.5 if step == 3 else 1.0)
            assert np.shares_memory(weights, params[key])
            assert np.shares_memory(left, gradient)
            assert not gradient.any()
        optimizer.step_schedules()
    return params


def assert_same(ours, theirs, optimizer, expected, betas=(0.9, 0.999)):
    """Equal weights and state, up to 40 roundings a step: 24 of a norm, 16 of the update.

    Gradients are below 5, and so is what a step of the rate 0.1 multiplies.
    """
    constants = sum(float(abs((np.float32(1) - np.float32(beta)) / (1 - beta) - 1)) for beta in betas)
    ulps, path = 40 * STEPS + constants / EPS, 0.1 * STEPS * 5
    assert dict(optimizer.nr_update) == dict(expected.nr_update)
    for name, scale in (("mom1", 5), ("mom2", 25), ("averages", path + 5)):
        kept, wanted = getattr(optimizer, name), getattr(expected, name)
        assert (kept is None) == (wanted is None)
        assert list(kept or ()) == list(wanted or ())
        for key in wanted or ():
            assert kept[key].dtype == wanted[key].dtype
            assert_close(kept[key], wanted[key], ulps=ulps, scale=scale)
    for key in theirs:
        assert_close(ours[key], theirs[key], ulps=ulps, scale=np.abs(theirs[key]) + path)


# -- one update after the other ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, [0.1, 0.05, 0.0, 0.1]], ids=["constant", "schedule"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_optimizer_follows_thinc(name, options, rate):
    optimizer = getattr(fast, name)(rate, **copy.deepcopy(options))
    expected = getattr(thinc.optimizers, name)(rate, **copy.deepcopy(options))
    betas = (0.5,) if options.keys() & {"beta1", "beta2"} else (0.9, 0.999)  # 0.5: exact, as all that are named here
    assert_same(train(optimizer, parameters()), train(expected, parameters()), optimizer, expected, betas)


@pytest.mark.parametrize("into_ours", [True, False], ids=["into_ours", "into_thinc"])
def test_one_goes_on_with_the_others_state(into_ours):
    first, second = (thinc.optimizers.Adam, fast.Adam) if into_ours else (fast.Adam, thinc.optimizers.Adam)
    begun, other, whole = first(0.1, **EXACT_BETAS), second(0.1, **EXACT_BETAS), thinc.optimizers.Adam(
        0.1, **EXACT_BETAS)
    params = train(begun, parameters(), range(3))
    for name in ("mom1", "mom2", "averages", "nr_update"):
        getattr(other, name).update(getattr(begun, name))
    train(other, params, range(3, STEPS))
    assert_same(params, train(whole, parameters()), other, whole, (0.5,))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))],
                         ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_alike_by_itself(again):
    optimizer = fast.Adam(0.1)
    params = train(optimizer, parameters(), range(3))
    twin, twin_params = again(optimizer), copy.deepcopy(params)
    train(optimizer, params, range(3, STEPS))
    assert list(twin.nr_update.values()) == [3, 3, 3]
    train(twin, twin_params, range(3, STEPS))
    for key in params:
        np.testing.assert_array_equal(params[key], twin_params[key])


def test_memory_may_be_another_one_in_each_call():
    """Only the key names a parameter: its weights move, another parameter comes where they were."""
    optimizer, expected = fast.Adam(0.1), fast.Adam(0.1)
    wanted = train(expected, parameters())
    params, buffer = parameters(), np.empty(100, np.float32)
    for step in range(STEPS):
        for at, (key, gradient) in enumerate(gradients(step).items()):
            begin = 1 + (7 * step + at) % 50
            view = buffer[begin:begin + params[key].size].reshape(params[key].shape)
            view[...] = params[key]
            optimizer(key, view, gradient, lr_scale=0.5 if step == 3 else 1.0)
            params[key] = view.copy()
    for key in params:
        np.testing.assert_array_equal(params[key], wanted[key])


@pytest.mark.parametrize("of_gradient", list(LAYOUTS))
def test_any_layout_is_updated_in_place(layout, of_gradient, rng):
    options = {"L2": 0.1, "grad_clip": 0.5}
    values = rng.standard_normal((2, 4, 3)).astype(np.float32)
    weights, plain = layout(values), values.copy()
    optimizer, expected = fast.Adam(0.1, **options), fast.Adam(0.1, **options)
    for step in range(3):
        gradient = LAYOUTS[of_gradient](gradients(step)[5, "E"].reshape(2, 4, 3))
        expected(KEY, plain, gradient.copy())
        assert optimizer(KEY, weights, gradient)[0] is weights
        assert not gradient.any()
    # The norm of the gradient alone depends on the order of its elements, by float64 roundings.
    assert_close(weights, plain, ulps=4, scale=np.abs(plain) + 1)


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_float64_is_computed_in_float64(name):
    """thinc keeps float32 state only, and its Adam takes nothing else: against the formula instead."""
    def step_of(params, gradient, state, step):
        gradient = gradient * min(1.0, 1 / np.linalg.norm(gradient))
        if name == "Adam":
            fn.reference.adam_step(params, gradient, *state[:2], step=step, lr=0.1, epsilon_hat=True)
        else:
            params -= 0.1 * gradient
        params -= 0.1 * 0.2 * params
        state[2] += (1 - (1 + step) / (10 + step)) * (params - state[2])

    optimizer, params = getattr(fast, name)(0.1, L2=0.2), parameters(np.float64)[3, "W"]
    expected, state = params.copy(), [np.zeros_like(params) for _ in range(3)]
    for step in range(STEPS):
        gradient = gradients(step, np.float64)[3, "W"]
        step_of(expected, gradient, state, step + 1)
        optimizer(KEY, params, gradient)
    for actual, wanted in ((params, expected), (optimizer.averages[KEY], state[2])):
        assert actual.dtype == np.float64
        assert_close(actual, wanted, ulps=40 * STEPS, scale=np.abs(wanted) + 3)


def test_beta1_of_0_is_adam_without_an_average():
    weights, expected, v = np.ones(3), np.ones(3), np.zeros(3)
    gradient = np.array([0.5, -0.1, 0.0])
    optimizer = fast.Adam(0.1, beta1=0.0, use_averages=False)
    for step in range(1, 4):
        fn.reference.adam_step(expected, gradient, np.zeros(3), v, step=step, lr=0.1, betas=(0.0, 0.999),
                               epsilon_hat=True)
        optimizer(KEY, weights, gradient.copy())
    assert_close(weights, expected, ulps=40)


def test_a_gradient_whose_squares_overflow_is_clipped():
    gradient = np.array([3e25, 4e25], np.float32)  # thinc's norm is infinite, its gradient 0
    weights, _ = fast.SGD(1.0, use_averages=False)(KEY, np.zeros(2, np.float32), gradient)
    assert_close(weights, np.array([-0.6, -0.8], np.float32), ulps=3)


def test_gradients_that_are_not_finite_are_0_afterwards():
    for make, value in itertools.product((fast.Adam, fast.SGD), (np.nan, np.inf)):
        gradient = np.array([1.0, value], np.float32)
        weights, _ = make(0.1)(KEY, np.ones(2, np.float32), gradient)
        assert np.isnan(weights).any()
        assert not gradient.any()


def test_a_gradient_without_elements_is_left_alone():
    optimizer, weights, gradient = fast.Adam(0.1), np.ones((1, 2)), np.zeros(0)
    assert optimizer(KEY, weights, gradient) == (weights, gradient)
    assert not optimizer.nr_update


def test_arrays_of_another_library_go_to_thinc(monkeypatch):
    class OnDevice:
        pass

    monkeypatch.setattr(thinc.optimizers.Optimizer, "__call__", lambda *call, **options: (*call, options))
    optimizer, weights, gradient = fast.Adam(0.1), OnDevice(), OnDevice()
    assert optimizer(KEY, weights, gradient, lr_scale=2) == (optimizer, KEY, weights, gradient, {"lr_scale": 2})


# -- errors ------------------------------------------------------------------------------------------------------------


def read_only():
    weights = np.ones(3, np.float32)
    weights.flags.writeable = False
    return weights


def shared():
    return dict(zip(("weights", "gradient"), np.lib.stride_tricks.sliding_window_view(
        np.ones(4, np.float32), 3, writeable=True), strict=True))


@pytest.mark.parametrize(("change", "options", "error", "message"), [
    ({"weights": np.ones(3, np.float16)}, {}, TypeError, "weights: expected dtype float32 or float64, got float16"),
    ({"gradient": np.ones(3)}, {}, TypeError, "gradient: expected dtype float32, got float64"),
    ({"gradient": [1.0, 2.0, 3.0]}, {}, TypeError, "gradient: expected"),
    ({"gradient": np.ones((3, 1), np.float32)}, {}, ValueError, r"gradient: expected shape \(3,\), got \(3, 1\)"),
    ({"weights": read_only()}, {}, ValueError, "weights: expected a writeable array"),
    ({"gradient": read_only()}, {}, ValueError, "gradient: expected a writeable array"),
    (shared(), {}, ValueError, "gradient.*weights"),
    ({"weights": np.ones(4, np.float32), "gradient": np.ones(4, np.float32)}, {}, ValueError,
     "mom1: expected 4 values, as many as weights has, got 3"),
    ({"lr_scale": -1.0}, {}, ValueError, r"learn_rate \* lr_scale: expected a finite number >= 0, got -0.1"),
    ({}, {"learn_rate": np.nan}, ValueError, r"learn_rate \* lr_scale"),
    ({}, {"beta1": 1.0}, ValueError, r"beta1: expected a number in \[0, 1\), got 1"),
    ({}, {"beta2": -0.5}, ValueError, "beta2"), ({}, {"eps": -1e-8}, ValueError, "eps"),
    ({}, {"L2": np.inf}, ValueError, "L2"), ({}, {"grad_clip": -1.0}, ValueError, "grad_clip"),
])
def test_an_update_that_raises_has_changed_nothing(change, options, error, message):
    optimizer = fast.Adam(0.1)
    optimizer(KEY, np.ones(3, np.float32), np.ones(3, np.float32))
    for name, value in options.items():
        optimizer._set_attr_or_schedule({"beta1": "b1", "beta2": "b2"}.get(name, name), value)
    call = {"weights": np.ones(3, np.float32), "gradient": np.ones(3, np.float32), **change}
    state = [optimizer.mom1[KEY], optimizer.mom2[KEY], optimizer.averages[KEY]]
    arrays = [array for array in (call["weights"], call["gradient"], *state) if isinstance(array, np.ndarray)]
    before = snapshot(*arrays)
    with pytest.raises(error, match=message):
        optimizer(KEY, **call)
    assert_unchanged(before, *arrays)
    assert dict(optimizer.nr_update) == {KEY: 1}


# -- the registry ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_factory_has_thincs_hyper_parameters(name):
    ours, theirs = (inspect.signature(getattr(module, name)).parameters.values() for module in (fast, thinc.optimizers))
    assert ({(each.name, each.kind, each.default) for each in ours}
            == {(each.name, each.kind, each.default) for each in theirs})


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_registry_finds_the_entry_point(name):
    (found,) = metadata.entry_points(group="thinc_optimizers", name=f"fastnorm.{name}.v1")  # of an installed fastnorm
    assert found.load() is getattr(fast, name)
    warm_up = {"@schedules": "warmup_linear.v1", "initial_rate": 0.1, "warmup_steps": 2, "total_steps": 10}
    config = {"optimizer": {"@optimizers": f"fastnorm.{name}.v1", "learn_rate": warm_up, "use_averages": False}}
    optimizer = registry.resolve(config)["optimizer"]
    assert type(optimizer) is fast.Optimizer
    optimizer.step_schedules()
    weights, gradient = np.ones(2, np.float32), np.array([1.0, 0.0], np.float32)
    optimizer(KEY, weights, gradient)
    assert_close(weights, np.array([0.95, 1.0], np.float32), ulps=4)  # half of the rate


def test_schedules_of_thinc_9_are_told_what_thinc_tells_them():
    if not hasattr(thinc.optimizers, "Schedule"):
        pytest.skip("thinc 8 has generators for schedules")
    told = []

    def rate(schedule, step, **more):
        told.append((step, more))
        return 0.1

    for module in (fast, thinc.optimizers):
        optimizer = module.SGD(thinc.optimizers.Schedule("rate", rate), L2=0.0, use_averages=False)
        optimizer.step_schedules()
        optimizer.last_score = 0.5
        optimizer(KEY, np.ones(2, np.float32), np.ones(2, np.float32))
    assert told == 2 * [(1, {"key": KEY, "last_score": (1, 0.5)})]


def test_neither_package_imports_the_other():
    for package, other in (("fastnorm", "thinc"), ("thinc", "fastnorm")):
        found = python(f"import sys, {package}; print('{other}' in sys.modules)")
        assert found.stdout == "False\n", found.stderr


# -- whole trainings ---------------------------------------------------------------------------------------------------


def losses_of(make, steps, nudge=1.0):
    """Of a thinc model in training, whose initial weights are multiplied by ``nudge``."""
    fix_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 16), dtype=np.float32)
    y = np.eye(2, dtype=np.float32)[(x[:, 0] * x[:, 1] > 0).astype(int)]
    model = chain(Relu(32), Softmax())
    model.initialize(x, y)
    for node in model.walk():
        for name in node.param_names:
            node.set_param(name, node.get_param(name) * np.float32(nudge))
    optimizer, losses = make(0.01, L2=0.01, **EXACT_BETAS), []
    for _ in range(steps):
        probabilities, backpropagate = model.begin_update(x)
        losses.append(float(((probabilities - y) ** 2).sum()))
        backpropagate((probabilities - y) / len(x))
        model.finish_update(optimizer)
        optimizer.step_schedules()
    return np.array(losses)


def test_model_trains_to_the_same_losses():
    """Not further apart than a rounding of all weights in each step takes thinc's own training from itself."""
    steps = 40
    ours, theirs = losses_of(fast.Adam, steps), losses_of(thinc.optimizers.Adam, steps)
    one_rounding = np.abs(losses_of(thinc.optimizers.Adam, steps, 1 + EPS) - theirs).max()
    assert theirs[-1] < theirs[0] / 2
    assert np.abs(ours - theirs).max() < steps * one_rounding


@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast:FutureWarning")  # thinc's own
def test_tensors_of_pytorch_inside_thinc_are_updated():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    x = np.random.default_rng(0).standard_normal((8, 4), dtype=np.float32)
    trained = []
    for module in (fast, thinc.optimizers):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        model, optimizer = PyTorchWrapper(layer).initialize(x), module.Adam(0.1, **EXACT_BETAS)
        for _ in range(STEPS):
            y, backpropagate = model.begin_update(x)
            backpropagate(y - 1)
            model.finish_update(optimizer)
        trained.append([layer.weight.detach().numpy(), layer.bias.detach().numpy()])
    for ours, theirs in zip(*trained, strict=True):
        # The outputs enter the gradients here, which roundings change: by 1e-3 of their size if all of these added up.
        assert_close(ours, theirs, ulps=1000 * STEPS, scale=1)


WORDS = {"GOOD": "great lovely superb warm kind", "BAD": "awful broken rude cold late"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with texts of two classes, written by spaCy."""
    spacy = pytest.importorskip("spacy", reason="spaCy is not installed")
    folder, rng, nlp = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0), spacy.blank("en")
    for name, count in (("train", 80), ("dev", 20)):
        documents = spacy.tokens.DocBin()
        for at in range(count):
            label = list(WORDS)[at % 2]
            document = nlp(" ".join(rng.choice(f"the service was very {WORDS[label]}".split(), 12)))
            document.cats = {each: float(each == label) for each in WORDS}
            documents.add(document)
        documents.to_disk(folder / f"{name}.spacy")
    return folder


def test_spacy_trains_from_a_configuration(corpus):
    """The command is told the optimizer, and writes it into the pipeline's configuration."""
    from spacy.cli.init_config import init_config
    init_config(lang="en", pipeline=["textcat"], optimize="efficiency", gpu=False).to_disk(corpus / "config.cfg")
    options = {"paths.train": "train.spacy", "paths.dev": "dev.spacy", "training.max_steps": 20,
               "training.eval_frequency": 10, "training.optimizer.@optimizers": "fastnorm.Adam.v1",
               "training.optimizer.use_averages": "true"}
    command = ["train", "config.cfg", "--output", "out", *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run([sys.executable, "-m", "spacy", *command], cwd=corpus, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    meta = json.loads((corpus / "out" / "model-best" / "meta.json").read_text(encoding="utf-8"))
    assert meta["performance"]["cats_score"] > 0.9, done.stdout
    assert "fastnorm.Adam.v1" in (corpus / "out" / "model-best" / "config.cfg").read_text(encoding="utf-8")


@pytest.mark.skipif(not EXAMPLE.exists(), reason="tests run outside a checkout")
def test_example_trains_to_the_same_losses(monkeypatch, capsys):
    pytest.importorskip("spacy", reason="spaCy is not installed")
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--steps", "5", "--batch", "8"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    apart = float(re.search(r"losses differ by (\S+)", capsys.readouterr().out)[1])
    # thinc's 1 - beta2 makes steps 6.5e-6 longer. Five of them move a logit by less than 1, and a logit's change enters
    # the squared error at most twice, relatively; the rest are roundings.
    assert apart < 2e-5
