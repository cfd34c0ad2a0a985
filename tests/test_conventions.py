"""Every row of `docs/conventions.md`: the other library and fastnorm compute the same numbers.

Each library is optional: `pip install torch==2.13.0 keras optax onnx scikit-learn` runs all of it.
"""

from __future__ import annotations

import inspect
import os

import numpy as np
import pytest

import fastnorm as fn

os.environ.setdefault("KERAS_BACKEND", "numpy")  # the formulas are the same on all backends

STEPS = 6
SIZE = 40


@pytest.fixture
def problem(rng):
    """Start, and the gradient of each step, of 0.0001 to 1: the eps under test lies between."""
    start = rng.standard_normal(SIZE)
    gradients = rng.standard_normal((STEPS, SIZE)) * 10.0 ** rng.integers(-4, 1, SIZE)
    return start, list(gradients)


# Keras, Optax and ONNX keep options in float32: these are exact in it, and so are six powers of 0.75 and of 0.9375.
LR, EPS = 0.125, 2.0**-10  # eps is large so that its place shows


def ours(optimizer_class, problem, **options):
    start, gradients = problem
    p = start.copy()
    optimizer = optimizer_class(p, **options)
    for gradient in gradients:
        optimizer.step(gradient)
    return p


def assert_same(actual, expected, rtol=1e-12, atol=1e-14):
    # float64: some tens of roundings of 1.1e-16 in each of a few steps
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


# -- PyTorch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.2}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("RMSprop", {"lr": 0.1, "alpha": 0.8, "eps": EPS, "weight_decay": 0.2, "momentum": 0.5, "centered": True}),
    ("Adam", {"lr": 0.1, "betas": (0.8, 0.95), "eps": EPS, "weight_decay": 0.2}),
    ("Adam", {"lr": 0.1, "eps": EPS, "amsgrad": True}),
    ("AdamW", {"lr": 0.1, "eps": EPS, "weight_decay": 0.2}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.3, "weight_decay": 0.2, "initial_accumulator_value": 0.5, "eps": EPS}),
], ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_pytorch_optimizers(name, options, problem):
    torch = pytest.importorskip("torch")
    start, gradients = problem
    p = torch.tensor(start, requires_grad=True)
    optimizer = getattr(torch.optim, name)([p], **options)
    for gradient in gradients:
        p.grad = torch.tensor(gradient)
        optimizer.step()
    assert_same(ours(getattr(fn.optim, "RMSProp" if name == "RMSprop" else name), problem, **options),
                p.detach().numpy())


def test_pytorch_defaults(problem):
    torch = pytest.importorskip("torch")
    for name in ("SGD", "RMSProp", "Adam", "AdamW", "Adagrad"):
        theirs = getattr(torch.optim, "RMSprop" if name == "RMSProp" else name)([torch.zeros(1)]).defaults
        state = getattr(fn.optim, name)(np.zeros(1)).state_dict()
        for key in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "alpha", "eps", "centered", "betas",
                    "amsgrad", "lr_decay"):
            assert state.get(key) == theirs.get(key), (name, key)


def test_pytorch_batch_norm(rng):
    torch = pytest.importorskip("torch")
    x, gamma, beta = rng.standard_normal((4, 3, 5, 5)), rng.standard_normal(3), rng.standard_normal(3)
    mean, var = rng.standard_normal(3), rng.random(3)
    their_mean, their_var = torch.tensor(mean), torch.tensor(var)
    expected = torch.nn.functional.batch_norm(
        torch.tensor(x), their_mean, their_var, torch.tensor(gamma), torch.tensor(beta), True, 0.3, EPS)
    y, _ = fn.batch_norm_forward(x, gamma, beta, mean, var, momentum=0.3, eps=EPS)
    assert_same(y, expected.numpy())
    assert_same(mean, their_mean.numpy())
    assert_same(var, their_var.numpy())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_pytorch_cross_entropy(reduction, rng):
    torch = pytest.importorskip("torch")
    x, weight, targets = rng.standard_normal((6, 4, 3)), rng.random(4), rng.integers(0, 4, (6, 3))
    targets[0, 1] = 2
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(x), torch.tensor(targets), torch.tensor(weight), ignore_index=2, reduction=reduction,
        label_smoothing=0.1)
    loss, _ = fn.softmax_cross_entropy(x, targets, axis=1, weight=weight, ignore_index=2, reduction=reduction,
                                       label_smoothing=0.1)
    assert_same(loss, expected.numpy())


def test_pytorch_clipping(rng):
    torch = pytest.importorskip("torch")
    gradient = rng.standard_normal(SIZE)
    p = torch.zeros(SIZE, dtype=torch.float64)
    p.grad = torch.tensor(gradient)
    torch.nn.utils.clip_grad_norm_([p], 0.5)
    fn.clip_grad_norm(gradient, 0.5)
    assert_same(gradient, p.grad.numpy())


def test_pytorch_average_of_all_batches_is_the_mean_of_moments(rng):
    torch = pytest.importorskip("torch")
    layer, moments = torch.nn.BatchNorm1d(3, momentum=None, dtype=torch.float64), fn.Moments()
    batches = rng.standard_normal((4, 20, 3))
    for batch in batches:
        layer(torch.tensor(batch))
        moments.update(batch)
    assert_same(moments.mean, layer.running_mean.numpy())
    assert_same(layer.running_var.numpy(), batches.var(axis=1, ddof=1).mean(axis=0))
    assert_same(moments.var(ddof=1), batches.reshape(-1, 3).var(axis=0, ddof=1))


# -- Keras -------------------------------------------------------------------------------------------------------------


def keras_module():
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "numpy":
        pytest.skip("KERAS_BACKEND is not numpy")
    return keras


@pytest.mark.parametrize(("name", "theirs", "class_name", "options"), [
    ("RMSprop", {"learning_rate": LR, "rho": 0.75, "momentum": 0.5, "epsilon": EPS, "centered": True}, "RMSProp",
     {"lr": LR, "alpha": 0.75, "momentum": 0.5, "eps": EPS, "centered": True, "eps_inside_sqrt": True}),
    ("Adam", {"learning_rate": LR, "beta_1": 0.75, "beta_2": 0.9375, "epsilon": EPS, "amsgrad": True}, "Adam",
     {"lr": LR, "betas": (0.75, 0.9375), "eps": EPS, "epsilon_hat": True, "amsgrad": True}),
    ("Adam", {"learning_rate": LR, "beta_1": 0.75, "beta_2": 0.9375, "epsilon": EPS,
              "weight_decay": 0.25}, "AdamW",
     {"lr": LR, "betas": (0.75, 0.9375), "eps": EPS, "epsilon_hat": True, "weight_decay": 0.25}),
    ("Adagrad", {"learning_rate": LR, "initial_accumulator_value": 0.25, "epsilon": EPS}, "Adagrad",
     {"lr": LR, "initial_accumulator_value": 0.25 + EPS, "eps": 0.0}),
    ("SGD", {"learning_rate": LR, "momentum": 0.875, "nesterov": True}, "SGD",
     {"lr": LR, "momentum": 0.875, "nesterov": True}),
], ids=["RMSprop", "Adam", "Adam with decay", "Adagrad", "SGD"])
def test_keras_optimizers(name, theirs, class_name, options, problem):
    keras = keras_module()
    start, gradients = problem
    p = keras.Variable(start, dtype="float64")
    optimizer = getattr(keras.optimizers, name)(**theirs)
    optimizer.build([p])
    for gradient in gradients:
        optimizer.apply([gradient])
    # Keras computes in float32 whatever the variables are: six steps, each a value up to 3 rounded, and an update up to
    # LR / (1 - 0.875) = 1 after some twenty roundings of 6e-8.
    assert_same(ours(getattr(fn.optim, class_name), problem, **options), p.value, rtol=0, atol=6 * (3 + 20) * 6e-8)


def test_keras_batch_norm(rng):
    keras = keras_module()
    x = rng.standard_normal((4, 5, 5, 3)).astype(np.float32)
    layer = keras.layers.BatchNormalization(momentum=0.7, epsilon=EPS)
    expected = layer(x, training=True)
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    y, _ = fn.batch_norm_forward(x, None, None, mean, var, axis=-1, momentum=1 - 0.7, eps=EPS,
                                 unbiased_running_var=False)
    # float32: sums of 100 values, values up to 4; 100 roundings of 6e-8
    assert_same(y, expected, rtol=0, atol=2.4e-5)
    assert_same(mean, layer.moving_mean.value, rtol=0, atol=6e-6)
    assert_same(var, layer.moving_variance.value, rtol=0, atol=6e-6)


def test_keras_cross_entropy(rng):
    keras = keras_module()
    x, labels = rng.standard_normal((8, 5)), rng.integers(0, 5, 8)
    sparse = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64")
    assert_same(fn.softmax_cross_entropy(x, labels)[0], sparse(labels, x), rtol=1e-7)
    t = np.eye(5)[labels]
    smooth = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.2, dtype="float64")
    assert_same(fn.softmax_cross_entropy(x, t, label_smoothing=0.2)[0], smooth(t, x),
                rtol=1e-7)


def test_keras_defaults():
    keras = keras_module()
    layer = keras.layers.BatchNormalization()
    assert (layer.momentum, layer.epsilon, layer.axis) == (0.99, 1e-3, -1)
    optimizers = keras.optimizers
    assert (optimizers.RMSprop().rho, optimizers.RMSprop().epsilon) == (0.9, 1e-7)
    assert (optimizers.Adam().epsilon, optimizers.AdamW().weight_decay) == (1e-7, 4e-3)
    assert (optimizers.Adagrad().initial_accumulator_value, optimizers.Adagrad().epsilon) == (0.1, 1e-7)


def test_keras_velocity_moves_at_the_old_rate(problem):
    keras = keras_module()
    start, gradients = problem
    p, ours_p, velocity = keras.Variable(start, dtype="float64"), start.copy(), np.zeros(SIZE)
    optimizer = keras.optimizers.SGD(LR, momentum=0.875)
    optimizer.build([p])
    for lr, gradient in zip((LR, LR, LR / 4, LR / 4, LR / 16, LR), gradients, strict=True):
        optimizer.learning_rate = lr
        optimizer.apply([gradient])
        fn.momentum_step(ours_p, lr * gradient, velocity, lr=1.0, momentum=0.875)
    assert_same(ours_p, p.value, rtol=0, atol=6 * (3 + 20) * 6e-8)  # as in test_keras_optimizers


def test_keras_decays_decoupled_in_every_optimizer(problem):
    keras = keras_module()
    start, gradients = problem
    p, ours_p, velocity = keras.Variable(start, dtype="float64"), start.copy(), np.zeros(SIZE)
    optimizer = keras.optimizers.SGD(LR, momentum=0.875, weight_decay=0.25)
    optimizer.build([p])
    for gradient in gradients:
        optimizer.apply([gradient])
        ours_p *= 1 - LR * 0.25
        fn.momentum_step(ours_p, gradient, velocity, lr=LR, momentum=0.875)
    assert_same(ours_p, p.value, rtol=0, atol=6 * (3 + 20) * 6e-8)  # as in test_keras_optimizers


def test_keras_weighted_mean_divides_by_the_rows(rng):
    keras = keras_module()
    x, labels, weight = rng.standard_normal((8, 5)), rng.integers(0, 5, 8), rng.random(5)
    theirs = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64")(labels, x, weight[labels])
    total, _ = fn.softmax_cross_entropy(x, labels, weight=weight, reduction="sum")
    assert_same(total / len(x), theirs, rtol=1e-6)  # it keeps the weights in float32: a rounding of 6e-8 each


def test_keras_clipping(rng):
    keras = keras_module()
    gradient = rng.standard_normal(SIZE)
    p = keras.Variable(np.zeros(SIZE), dtype="float64")
    optimizer = keras.optimizers.SGD(1.0, global_clipnorm=0.5)
    optimizer.build([p])
    optimizer.apply([gradient.copy()])
    norm = fn.clip_grad_norm(gradient, 0.5)
    assert_same(-gradient * (norm + 1e-6) / norm, p.value, rtol=1e-6)  # in float32: some ten roundings of 6e-8


# -- Optax -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def optax():
    module = pytest.importorskip("optax")
    import jax

    with jax.enable_x64(True):
        yield module


@pytest.mark.parametrize(("name", "theirs", "class_name", "options"), [
    ("sgd", {"momentum": 0.875, "nesterov": True}, "SGD", {"momentum": 0.875, "nesterov": True}),
    ("rmsprop", {"decay": 0.75, "eps": EPS, "centered": True, "momentum": 0.5}, "RMSProp",
     {"alpha": 0.75, "eps": EPS, "centered": True, "momentum": 0.5, "eps_inside_sqrt": True}),
    ("rmsprop", {"decay": 0.75, "eps": EPS, "eps_in_sqrt": False}, "RMSProp", {"alpha": 0.75, "eps": EPS}),
    ("adam", {"b1": 0.75, "b2": 0.9375, "eps": EPS}, "Adam", {"betas": (0.75, 0.9375), "eps": EPS}),
    ("adamw", {"b1": 0.75, "b2": 0.9375, "eps": EPS, "weight_decay": 0.25}, "AdamW",
     {"betas": (0.75, 0.9375), "eps": EPS, "weight_decay": 0.25}),
    ("adagrad", {"initial_accumulator_value": 0.25, "eps": EPS}, "Adagrad",
     {"initial_accumulator_value": 0.25 + EPS, "eps": 0.0}),
], ids=["sgd", "rmsprop", "rmsprop, eps outside", "adam", "adamw", "adagrad"])
def test_optax_optimizers(name, theirs, class_name, options, problem, optax):
    start, gradients = problem
    p = optax.apply_updates(start, np.zeros(SIZE))  # an array of JAX
    transformation = getattr(optax, name)(LR, **theirs)
    state = transformation.init(p)
    for gradient in gradients:
        updates, state = transformation.update(gradient, state, p)
        p = optax.apply_updates(p, updates)
    assert_same(ours(getattr(fn.optim, class_name), problem, lr=LR, **options), np.asarray(p))


def test_optax_cross_entropy(rng, optax):
    x, labels = rng.standard_normal((8, 5)), rng.integers(0, 5, 8)
    loss, _ = fn.softmax_cross_entropy(x, labels, reduction="none")
    assert_same(loss, np.asarray(optax.softmax_cross_entropy_with_integer_labels(x, labels)))
    t = np.eye(5)[labels]
    loss, _ = fn.softmax_cross_entropy(x, t, label_smoothing=0.2, reduction="none")
    assert_same(loss, np.asarray(optax.softmax_cross_entropy(x, optax.smooth_labels(t, 0.2))))


def test_optax_clipping(rng, optax):
    gradient = rng.standard_normal(SIZE)
    expected, _ = optax.clip_by_global_norm(0.5).update(gradient, optax.EmptyState())
    norm = fn.clip_grad_norm(gradient, 0.5)
    assert_same(gradient * (norm + 1e-6) / norm, np.asarray(expected))


def test_optax_defaults(optax):
    def defaults(function, *names):
        return tuple(inspect.signature(function).parameters[name].default for name in names)

    assert defaults(optax.rmsprop, "decay", "eps", "initial_scale", "eps_in_sqrt") == (0.9, 1e-8, 0.0, True)
    assert defaults(optax.adam, "eps") == (1e-8,)
    assert defaults(optax.adamw, "eps", "weight_decay") == (1e-8, 1e-4)
    assert defaults(optax.adagrad, "initial_accumulator_value", "eps") == (0.1, 1e-7)


# -- scikit-learn ------------------------------------------------------------------------------------------------------


def sklearn_steps(optimizer, start, gradients):
    for gradient in gradients:
        optimizer.update_params([start], [gradient])
    return start


@pytest.mark.parametrize("nesterov", [False, True])
def test_sklearn_sgd(nesterov, problem):
    module = pytest.importorskip("sklearn.neural_network._stochastic_optimizers")
    p = problem[0].copy()
    theirs = module.SGDOptimizer([p], learning_rate_init=0.1, momentum=0.9, nesterov=nesterov)
    assert_same(ours(fn.optim.SGD, problem, lr=0.1, momentum=0.9, nesterov=nesterov),
                sklearn_steps(theirs, p, problem[1]))


def test_sklearn_velocity_moves_at_the_old_rate(problem):
    module = pytest.importorskip("sklearn.neural_network._stochastic_optimizers")
    start, gradients = problem
    p, ours_p, velocity = start.copy(), start.copy(), np.zeros(SIZE)
    theirs = module.SGDOptimizer([p], nesterov=False)
    for lr, gradient in zip((0.1, 0.1, 0.02, 0.02, 0.004, 0.1), gradients, strict=True):
        theirs.learning_rate = lr
        theirs.update_params([p], [gradient])
        fn.momentum_step(ours_p, lr * gradient, velocity, lr=1.0, momentum=0.9)
    assert_same(ours_p, p)


def test_sklearn_defaults():
    module = pytest.importorskip("sklearn.neural_network._stochastic_optimizers")
    assert (module.SGDOptimizer([]).momentum, module.SGDOptimizer([]).nesterov) == (0.9, True)
    assert module.AdamOptimizer([]).epsilon == 1e-8


def test_sklearn_adam(problem):
    module = pytest.importorskip("sklearn.neural_network._stochastic_optimizers")
    p = problem[0].copy()
    theirs = module.AdamOptimizer([p], learning_rate_init=0.1, beta_1=0.8, beta_2=0.95, epsilon=EPS)
    assert_same(ours(fn.optim.Adam, problem, lr=0.1, betas=(0.8, 0.95), eps=EPS, epsilon_hat=True),
                sklearn_steps(theirs, p, problem[1]))


def test_sklearn_weight_decay_is_alpha_over_the_batch_size(rng):
    network = pytest.importorskip("sklearn.neural_network")
    n, alpha, lr = 30, 3.0, 0.1
    x, labels = rng.standard_normal((n, 4)), np.arange(n) % 3
    model = network.MLPClassifier([], alpha=alpha, learning_rate_init=lr, solver="sgd", momentum=0.0, batch_size=n,
                                  shuffle=False, random_state=0)
    model.partial_fit(x, labels, classes=range(3))
    weight, bias = model.coefs_[0].copy(), model.intercepts_[0].copy()
    model.partial_fit(x, labels)
    _, dlogits = fn.softmax_cross_entropy(x @ weight + bias, labels)
    fn.momentum_step(weight, x.T @ dlogits, None, lr=lr, momentum=0.0, weight_decay=alpha / n)
    fn.momentum_step(bias, dlogits.sum(axis=0), None, lr=lr, momentum=0.0)
    assert_same(weight, model.coefs_[0])
    assert_same(bias, model.intercepts_[0])


def test_sklearn_log_loss(rng):
    metrics = pytest.importorskip("sklearn.metrics")
    x, labels, weight = rng.standard_normal((8, 3)), np.array([0, 1, 2, 0, 1, 2, 0, 1]), rng.random(3)
    p = fn.softmax(x)
    assert_same(fn.softmax_cross_entropy(x, labels)[0], metrics.log_loss(labels, p))
    assert_same(fn.softmax_cross_entropy(x, labels, weight=weight)[0],
                metrics.log_loss(labels, p, sample_weight=weight[labels]))


# -- ONNX --------------------------------------------------------------------------------------------------------------


def run_onnx(domain, operator, inputs, outputs, opset, **attributes):
    """Evaluate one operator by ONNX's reference implementation."""
    helper = pytest.importorskip("onnx.helper")
    from onnx.reference import ReferenceEvaluator

    names = [f"in{i}" for i in range(len(inputs))]
    node = helper.make_node(operator, names, [f"out{i}" for i in range(outputs)], domain=domain, **attributes)
    kinds = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.asarray(a).dtype), None)
             for name, a in zip(names, inputs, strict=True)]
    results = [helper.make_tensor_value_info(name, 0, None) for name in node.output]
    model = helper.make_model(helper.make_graph([node], "graph", kinds, results),
                              opset_imports=[helper.make_opsetid(domain, opset)])
    return ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=True)))


TRAINING = "ai.onnx.preview.training"


@pytest.mark.parametrize(("operator", "first", "buffers", "attributes", "class_name", "options"), [
    ("Adam", 1, 2, {"alpha": 0.75, "beta": 0.9375, "epsilon": EPS, "norm_coefficient": 0.25}, "Adam",
     {"betas": (0.75, 0.9375), "eps": EPS, "weight_decay": 0.25, "epsilon_hat": True}),
    ("Adagrad", 0, 1, {"decay_factor": 0.25, "epsilon": EPS, "norm_coefficient": 0.25}, "Adagrad",
     {"lr_decay": 0.25, "eps": EPS, "weight_decay": 0.25}),
    ("Momentum", 0, 1, {"alpha": 0.75, "beta": 0.5, "norm_coefficient": 0.25, "mode": "standard"}, "SGD",
     {"momentum": 0.75, "dampening": 0.5, "weight_decay": 0.25}),
    ("Momentum", 0, 1, {"alpha": 0.75, "beta": 1.0, "norm_coefficient": 0.0, "mode": "nesterov"}, "SGD",
     {"momentum": 0.75, "nesterov": True}),
], ids=["Adam", "Adagrad", "Momentum", "Nesterov"])
def test_onnx_optimizers(operator, first, buffers, attributes, class_name, options, problem):
    start, gradients = problem
    state = [start, *(np.zeros(SIZE) for _ in range(buffers))]
    for t, gradient in enumerate(gradients, first):
        inputs = [np.array(LR), np.array(t, np.int64), state[0], gradient, *state[1:]]
        state = run_onnx(TRAINING, operator, inputs, 1 + buffers, 1, **attributes)
    assert_same(ours(getattr(fn.optim, class_name), problem, lr=LR, **options), state[0])


def test_onnx_batch_norm(rng):
    x, gamma, beta = rng.standard_normal((4, 3, 5)), rng.standard_normal(3), rng.standard_normal(3)
    mean, var = rng.standard_normal(3), rng.random(3)
    expected = run_onnx("", "BatchNormalization", [x, gamma, beta, mean, var], 3, 15, momentum=0.75, epsilon=EPS,
                        training_mode=1)
    y, _ = fn.batch_norm_forward(x, gamma, beta, mean, var, momentum=1 - 0.75, eps=EPS,
                                 unbiased_running_var=False)
    for actual, theirs in zip((y, mean, var), expected, strict=True):
        assert_same(actual, theirs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_onnx_cross_entropy(reduction, rng):
    x, labels, weight = rng.standard_normal((6, 4, 3)), rng.integers(0, 4, (6, 3)), rng.random(4)
    (expected,) = run_onnx("", "SoftmaxCrossEntropyLoss", [x, labels, weight], 1, 13, ignore_index=2,
                           reduction=reduction)
    loss, _ = fn.softmax_cross_entropy(x, labels, axis=1, weight=weight, ignore_index=2, reduction=reduction)
    assert_same(loss, expected)


def test_onnx_nesterov_with_beta_is_momentum_step(problem):
    start, gradients = problem
    state, p, velocity = [start, np.zeros(SIZE)], start.copy(), np.zeros(SIZE)
    for t, gradient in enumerate(gradients):
        inputs = [np.array(LR), np.array(t, np.int64), state[0], gradient, state[1]]
        state = run_onnx(TRAINING, "Momentum", inputs, 2, 1, alpha=0.75, beta=0.5, norm_coefficient=0.0,
                         mode="nesterov")
        fn.momentum_step(p, gradient, velocity, lr=LR, momentum=0.75, dampening=0.5 if t else 0.0, nesterov=True)
    assert_same(p, state[0])


def test_onnx_defaults():
    defs = pytest.importorskip("onnx.defs")

    def default(operator, attribute, domain=TRAINING):
        value = defs.get_schema(operator, domain=domain).attributes[attribute].default_value.f
        return float(f"{value:.6g}")  # it is a float32

    assert default("Adam", "epsilon") == default("Adagrad", "epsilon") == 1e-6
    assert (default("BatchNormalization", "momentum", ""), default("BatchNormalization", "epsilon", "")) == (0.9, 1e-5)


# -- initialization ----------------------------------------------------------------------------------------------------


def initial_weights(library, name, shape):
    """Weights of one of the other libraries, of shape (inputs, outputs)."""
    if library == "torch":
        torch = pytest.importorskip("torch")
        weight = torch.empty(shape[::-1], dtype=torch.float64)  # as nn.Linear stores it
        return getattr(torch.nn.init, name)(weight, **({"nonlinearity": "relu"} if "kaiming" in name else {})).numpy().T
    if library == "keras":
        return np.asarray(getattr(keras_module().initializers, name)(seed=0)(shape))
    jax = pytest.importorskip("jax")
    return np.asarray(getattr(jax.nn.initializers, name)()(jax.random.key(0), shape))


@pytest.mark.parametrize(("name", "library", "theirs", "cut"), [
    ("he_normal", "torch", "kaiming_normal_", None), ("he_normal", "keras", "HeNormal", 2.27),
    ("he_normal", "jax", "he_normal", 2.27), ("xavier_uniform", "torch", "xavier_uniform_", 3**0.5),
    ("xavier_uniform", "keras", "GlorotUniform", 3**0.5), ("xavier_uniform", "jax", "glorot_uniform", 3**0.5),
    ("lecun_normal", "keras", "LecunNormal", 2.27), ("lecun_normal", "jax", "lecun_normal", 2.27),
])
def test_initial_weights_have_the_same_variance(name, library, theirs, cut):
    """And the same shape (inputs, outputs); ``cut``: the largest value, in deviations."""
    shape = 300, 700
    weight, ours_weight = initial_weights(library, theirs, shape), getattr(fn.init, name)(shape, rng=0)
    # The variance of 210,000 values has a relative deviation of at most sqrt(2 / 210,000) = 0.3 %: five of both.
    assert_same(np.var(weight), np.var(ours_weight), rtol=5 * 2**0.5 * 0.0031)
    if cut is not None:
        assert_same(np.abs(weight).max() / np.std(weight), cut, rtol=0.01)  # the deviation's 0.15 %; a gap
