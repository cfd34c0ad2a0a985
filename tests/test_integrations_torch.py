"""fastnorm under PyTorch: every class and function beside PyTorch's own."""

from __future__ import annotations

import copy
import inspect
import io
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_close

pytest.importorskip("torch", reason="PyTorch is not installed")
import torch
from torch import nn
from torch.nn import functional

from fastnorm.integrations import torch as fast

EXAMPLE = Path(__file__).parents[1] / "examples" / "torch_resnet.py"
STEPS = 6
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# Every option that changes an update.
OPTIMIZERS = {
    "SGD": [{}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
            {"momentum": 0.9, "nesterov": True, "maximize": True}],
    "RMSprop": [{}, {"momentum": 0.5, "weight_decay": 0.1}, {"centered": True, "maximize": True, "alpha": 0.9}],
    "Adam": [{}, {"amsgrad": True, "weight_decay": 0.1}, {"maximize": True, "betas": (0.5, 0.9), "eps": 1e-3},
             {"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "AdamW": [{}, {"amsgrad": True, "maximize": True}],
    "Adagrad": [{}, {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5}, {"maximize": True}],
}
CASES = [(name, options) for name, every in OPTIMIZERS.items() for options in every]


@pytest.fixture(autouse=True)
def _one_thread():
    """PyTorch's threads spin where others want to run; these tests are too small to need them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def parameters():
    """A function that gives equal parameters each time: several shapes, a channels-last one, one without elements."""
    def make(dtype=torch.float64):
        generator = torch.Generator().manual_seed(1)
        made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
                for shape in ((3, 4), (5,), (), (0, 2), (2, 3, 4, 5))]
        made[-1] = made[-1].contiguous(memory_format=torch.channels_last)
        return [nn.Parameter(a) for a in made]
    return make


def set_gradients(params, step):
    """Gradients that depend on the step alone, so that roundings do not feed back."""
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        values = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.grad = torch.empty_like(param, requires_grad=False).copy_(values)  # laid out as autograd does


def assert_same_parameters(ours, theirs, steps=STEPS):
    # A step adds at most 16 roundings of the parameter and of an update; with lr 0.1 every update here is below 1.
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.detach().numpy(), b.detach().numpy()
        assert_close(a, b, ulps=16 * steps, scale=np.abs(b) + 1)


# -- optimizers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_optimizer_follows_pytorch(name, options, dtype, parameters):
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer = getattr(fast, name)(ours, lr=0.1, **options)
    expected = getattr(torch.optim, name)(theirs, lr=0.1, **options)
    for step in range(STEPS):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        if step == 2:  # parameters count their steps by themselves
            ours[0].grad = theirs[0].grad = None
        optimizer.step()
        expected.step()
    assert_same_parameters(ours, theirs)
    assert all(a.stride() == b.stride() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("into_ours", [True, False], ids=["into_ours", "into_pytorch"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_state_dicts_go_both_ways(name, options, into_ours, parameters):
    ours, theirs = parameters(), parameters()
    optimizer = getattr(fast, name)(ours, lr=0.1, **options)
    expected = getattr(torch.optim, name)(theirs, lr=0.1, **options)
    for step in range(2):
        for params, each in ((ours, optimizer), (theirs, expected)):
            set_gradients(params, step)
            each.step()
    source, target = (expected, optimizer) if into_ours else (optimizer, expected)
    state, other = source.state_dict(), target.state_dict()
    assert state["param_groups"] == other["param_groups"]
    assert state["state"].keys() == other["state"].keys()
    for key, entry in state["state"].items():
        assert list(entry) == list(other["state"][key])
        for kind, tensor in entry.items():
            assert (tensor.dtype, tensor.shape, tensor.stride()) == (
                other["state"][key][kind].dtype, other["state"][key][kind].shape, other["state"][key][kind].stride())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    fresh = getattr(fast if into_ours else torch.optim, name)(
        [{"params": target.param_groups[0]["params"]}], lr=0.7)  # what is loaded wins
    fresh.load_state_dict(torch.load(file))
    for step in range(2, 4):
        for params, each in ((ours, fresh if into_ours else optimizer), (theirs, expected if into_ours else fresh)):
            set_gradients(params, step)
            each.step()
    assert_same_parameters(ours, theirs, 4)


def test_state_of_pytorchs_fused_optimizer_is_taken(parameters):
    ours, theirs = parameters(torch.float32)[:2], parameters(torch.float32)[:2]
    expected = torch.optim.AdamW(theirs, lr=0.1, fused=True)
    set_gradients(theirs, 0)
    expected.step()
    optimizer = fast.AdamW(ours)
    optimizer.load_state_dict(copy.deepcopy(expected.state_dict()))
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            a.copy_(b)
    for params, each in ((ours, optimizer), (theirs, expected)):
        set_gradients(params, 1)
        each.step()
    assert_same_parameters(ours, theirs, 2)


def test_groups_scheduler_closure_and_copies(parameters):
    def run(module):
        params = parameters()
        optimizer = module.SGD([{"params": params[:2], "lr": 0.05}], lr=0.1, momentum=0.9, foreach=True)
        optimizer.add_param_group({"params": params[2:], "momentum": 0.5})
        schedulers = [torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2], total_steps=10),
                      torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]
        losses = []

        def closure():
            optimizer.zero_grad()
            loss = sum((param ** 2).sum() for param in params)
            loss.backward()
            return loss

        for _ in range(STEPS):
            losses.append(optimizer.step(closure).item())
            for scheduler in schedulers:
                scheduler.step()
        return params, losses, optimizer

    ours, losses, optimizer = run(fast)
    theirs, expected, _ = run(torch.optim)
    assert_same_parameters(ours, theirs)
    np.testing.assert_allclose(losses, expected, rtol=1e-13)
    twin = copy.deepcopy(optimizer)
    assert twin.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_numbers_may_be_tensors_and_state_may_begin_late(parameters):
    ours, theirs = parameters(), parameters()
    optimizer, expected = fast.SGD(ours, lr=torch.tensor(0.1)), torch.optim.SGD(theirs, lr=torch.tensor(0.1))
    for step in range(STEPS):
        for params, each in ((ours, optimizer), (theirs, expected)):
            each.param_groups[0]["momentum"] = 0.9 if step > 2 else 0.0
            set_gradients(params, step)
            each.step()
    assert_same_parameters(ours, theirs)


def test_dampening_is_of_the_momentum_that_a_schedule_takes_away_and_betas_may_be_tensors(parameters):
    betas = torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.99, dtype=torch.float64)
    for make in (lambda module, params: module.SGD(params, lr=0.1, momentum=0.9, dampening=0.5),
                 lambda module, params: module.Adam(params, lr=0.1, betas=betas)):
        ours, theirs = parameters(), parameters()
        optimizer, expected = make(fast, ours), make(torch.optim, theirs)
        for step, momentum in enumerate((0.9, 0.9, 0.0, 0.9)):
            for params, each in ((ours, optimizer), (theirs, expected)):
                if "momentum" in each.param_groups[0]:
                    each.param_groups[0]["momentum"] = momentum
                set_gradients(params, step)
                each.step()
        assert_same_parameters(ours, theirs)


def test_step_writes_the_tensors_own_memory_and_tells_autograd(parameters):
    params = parameters()
    addresses = [param.data_ptr() for param in params]
    optimizer = fast.Adam(params)
    set_gradients(params, 0)
    loss = (params[0] * params[0]).sum()
    optimizer.step()
    assert addresses == [param.data_ptr() for param in params]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradient_scaler():
    def run(module, **options):
        param = nn.Parameter(torch.ones(3))
        optimizer, scaler = module.SGD([param], lr=0.1, **options), torch.amp.GradScaler("cpu")
        for factor in (1.0, float("inf"), 2.0):
            optimizer.zero_grad()
            scaler.scale((param * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        return param.detach().numpy()

    np.testing.assert_array_equal(run(fast), run(torch.optim))
    with pytest.raises(RuntimeError, match="use fused=False"):
        run(fast, fused=True)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: torch.zeros(2, dtype=torch.bfloat16), "float32 or torch.float64, got torch.bfloat16"),
    (lambda: torch.zeros(2, dtype=torch.complex64), "got torch.complex64"),
    (lambda: torch.zeros(2, device="meta"), "CPU memory, got one on device meta"),
])
def test_unsupported_parameters_are_refused_at_once(make, message):
    optimizer = fast.Adam([nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match=message):
        fast.Adam([torch.ones(2), make()])
    with pytest.raises(TypeError, match=r"param_groups\[1\]\['params'\]\[0\]: .*" + message):
        optimizer.add_param_group({"params": make()})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_raises_has_changed_nothing(name):
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3, 2))
    optimizer = getattr(fast, name)([{"params": first}, {"params": second}])
    first.grad, second.grad = torch.ones(2), torch.sparse_coo_tensor([[0], [1]], [1.0], (3, 2), check_invariants=True)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(TypeError, match=r"gradient of param_groups\[1\]\['params'\]\[0\]: expected a dense tensor"):
        optimizer.step()
    assert first.detach().tolist() == [1.0, 1.0]
    assert str(optimizer.state_dict()["state"]) == str(before)


@pytest.mark.parametrize("wrong", ["lr", "state"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_group_that_is_wrong_leaves_the_ones_before_it_alone(name, wrong):
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(fast, name)([{"params": first}, {"params": second}], lr=0.1, **options)
    first.grad, second.grad = torch.ones(2), torch.ones(3)
    optimizer.step()
    before = copy.deepcopy([first, optimizer.state_dict()["state"]])
    if wrong == "lr":
        optimizer.param_groups[1]["lr"] = -1.0
    else:  # which stays float32
        second.data, second.grad = second.data.double(), second.grad.double()
    error, message = (ValueError, "lr: expected") if wrong == "lr" else (TypeError, "float64")
    with pytest.raises(error, match=message):
        optimizer.step()
    assert str([first, optimizer.state_dict()["state"]]) == str(before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_and_its_check_take_the_same_arguments(name):
    kind = getattr(fast, name)
    assert list(inspect.signature(kind._update).parameters) == list(inspect.signature(kind._check).parameters)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
@pytest.mark.parametrize("option", ["capturable", "differentiable"])
def test_what_records_the_update_is_refused(name, option):
    with pytest.raises(ValueError, match=f"{option}: expected False"):
        getattr(fast, name)([nn.Parameter(torch.ones(2))], **{option: True})


# -- batch norm --------------------------------------------------------------------------------------------------------


def batch(shape, memory_format="contiguous", dtype=torch.float64):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    return x.contiguous(memory_format=FORMATS[memory_format]) if len(shape) == 4 else x


def vectors(channels, dtype=torch.float64):
    return [torch.rand(channels, generator=torch.Generator().manual_seed(3 + i), dtype=dtype) + 0.5 for i in range(4)]


@pytest.fixture(params=["eager", "operator"])
def way(request, monkeypatch):
    """Both ways to the kernels: the one of eager calls, and the operator that compilers and transforms see."""
    if request.param == "operator":
        monkeypatch.setattr(sys.modules["fastnorm.integrations.torch.functional"], "is_eager", lambda: False)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("shape", "memory_format"), [
    ((6, 3), "contiguous"), ((4, 3, 5), "contiguous"), ((4, 3, 5, 2), "contiguous"), ((4, 3, 5, 2), "channels_last"),
    ((2, 3, 2, 2, 2), "contiguous")])
def test_batch_norm_follows_pytorch(training, activation, with_residual, shape, memory_format):
    results = []
    for ours in (True, False):
        x, residual = batch(shape, memory_format).requires_grad_(), batch(shape, memory_format).neg().requires_grad_()
        mean, var, weight, bias = vectors(3)
        weight.requires_grad_()
        bias.requires_grad_()
        if ours:
            y = fast.batch_norm(x, mean, var, weight, bias, training, 0.3, 1e-3, activation=activation,
                                residual=residual if with_residual else None)
        else:
            y = functional.batch_norm(x, mean, var, weight, bias, training, 0.3, 1e-3)
            y = y + residual if with_residual else y
            y = {None: lambda a: a, "relu": torch.relu, "leaky_relu": functional.leaky_relu}[activation](y)
        (y * torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
        assert not ours or y.stride() == x.stride() == x.grad.stride()
        results.append([y, mean, var, x.grad, weight.grad, bias.grad, *([residual.grad] if with_residual else [])])
    for a, b in zip(*results, strict=True):
        # Sums of at most 100 terms, rounded as often; each value here is a sum of terms below 1,000.
        assert_close(a.detach().numpy(), b.detach().numpy(), ulps=100, scale=1000)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
def test_batch_norm_gradients_by_finite_differences(training, activation):
    mean, var, weight, bias = vectors(2)
    tensors = [batch((4, 2, 3)).requires_grad_(), weight.requires_grad_(), bias.requires_grad_(),
               batch((4, 2, 3)).flip(0).clone().requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda x, weight, bias, residual: fast.batch_norm(
            x, mean.clone(), var.clone(), weight, bias, training, activation=activation, residual=residual), tensors)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_batch_norm_reads_the_tensors_own_memory(memory_format, monkeypatch):
    module = sys.modules["fastnorm.integrations.torch.functional"]
    seen = []
    forward = module.batch_norm_forward
    monkeypatch.setattr(module, "batch_norm_forward", lambda x, *args, **options: (
        seen.append((x, options["out"])), forward(x, *args, **options))[1])
    x = batch((4, 3, 5, 2), memory_format)
    y = fast.batch_norm(x, None, None, training=True)
    ((read, written),) = seen
    assert (read.ctypes.data, written.ctypes.data) == (x.data_ptr(), y.data_ptr())


def test_batch_norm_strided_input_and_few_gradients():
    x = batch((8, 6, 5, 2))[::2, ::2]
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    y = fast.batch_norm(x, None, None, weight, training=True)
    y.sum().backward()  # an incoming gradient with strides of 0
    expected = functional.batch_norm(x, None, None, weight, training=True)
    assert_close(y.detach().numpy(), expected.detach().numpy(), ulps=100, scale=10)
    assert x.grad is None
    assert_close(weight.grad.numpy(), np.zeros(3), ulps=100, scale=100)  # normalized values add up to 0


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("change", "error", "message"), [
    ({"input": torch.zeros(4, 3, dtype=torch.bfloat16)}, TypeError, "input: .*got torch.bfloat16"),
    ({"input": torch.zeros(4, 3, device="meta")}, TypeError, "input: .*device meta"),
    ({"input": torch.zeros(4, 3).to_sparse()}, TypeError, "input: .*layout torch.sparse_coo"),
    ({"input": np.zeros((4, 3))}, TypeError, "input: expected a torch.Tensor, got ndarray"),
    ({"input": torch.zeros(3)}, ValueError, "input: expected at least 2 dimensions"),
    ({"weight": torch.ones(4)}, ValueError, r"weight: expected shape \(3,\), got \(4,\)"),
    ({"bias": torch.ones(3, dtype=torch.float64)}, TypeError, "bias: expected dtype torch.float32"),
    ({"running_var": None}, ValueError, "running_var: expected an array beside running_mean"),
    ({"residual": torch.ones(4, 2)}, ValueError, "residual: expected shape"),
    ({"activation": "gelu"}, ValueError, "activation: expected one of"),
    ({"momentum": 2.0}, ValueError, "momentum"),
    ({"input": torch.ones(1, 3)}, ValueError, "input: expected more than one value per channel"),
])
def test_batch_norm_errors_change_nothing(change, error, message):
    arguments = {"input": torch.ones(4, 3), "running_mean": torch.ones(3), "running_var": torch.ones(3),
                 "training": True, **change}
    with pytest.raises(error, match=message):
        fast.batch_norm(**arguments)
    for name in ("running_mean", "running_var"):
        assert arguments[name] is None or arguments[name].tolist() == [1, 1, 1]


# -- cross-entropy -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@pytest.mark.parametrize(("shape", "memory_format"), [((7, 5), "contiguous"), ((2, 5, 3, 4), "contiguous"),
                                                      ((2, 5, 3, 4), "channels_last"), ((5,), "contiguous")])
def test_cross_entropy_follows_pytorch(reduction, kind, shape, memory_format):
    axis = min(1, len(shape) - 1)
    rows = shape[:axis] + shape[axis + 1:]
    weight = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    target = (torch.arange(int(np.prod(rows))).reshape(rows) % 5 if kind == "classes"
              else batch(shape, memory_format).softmax(axis))
    if kind == "classes" and rows:
        target[0] = -100
    results = []
    for function in (fast.cross_entropy, functional.cross_entropy):
        logits = batch(shape, memory_format).requires_grad_()
        loss = function(logits, target, weight, reduction=reduction, label_smoothing=0.1)
        (loss.sum() * 3).backward()
        results.append([loss, logits.grad])
    for a, b in zip(*results, strict=True):
        assert_close(a.detach().numpy(), b.detach().numpy(), ulps=100, scale=100)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy_gradient_by_finite_differences(reduction):
    target = torch.tensor([1, 0, 4])
    logits = batch((3, 5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: fast.cross_entropy(a, target, reduction=reduction), logits)


def test_cross_entropy_gradient_can_be_asked_for_twice():
    logits = batch((3, 5)).requires_grad_()
    loss = fast.cross_entropy(logits, torch.tensor([1, 0, 4]))
    loss.backward(retain_graph=True)
    once = logits.grad.clone()
    loss.backward()
    np.testing.assert_array_equal(logits.grad.numpy(), (2 * once).numpy())


def test_cross_entropy_gradient_is_the_callers_own_where_the_graph_is_kept():
    logits = batch((3, 5)).requires_grad_()
    loss = fast.cross_entropy(logits, torch.tensor([1, 0, 4]))
    first, = torch.autograd.grad(loss, logits, retain_graph=True)
    before = first.clone()
    first.zero_()
    assert torch.equal(torch.autograd.grad(loss, logits)[0], before)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("change", "error", "message"), [
    ({"input": torch.zeros(2, 3, dtype=torch.float16)}, TypeError, "input: .*got torch.float16"),
    ({"target": torch.zeros(2, device="meta", dtype=torch.int64)}, TypeError, "target: .*device meta"),
    ({"target": torch.tensor([0, 3])}, ValueError, "target: .*got 3 at position 1"),
    ({"target": torch.zeros(2, 3, requires_grad=True)}, ValueError, "target: expected a tensor that requires no"),
    ({"weight": torch.ones(3, dtype=torch.float64)}, TypeError, "weight: expected dtype torch.float32"),
    ({"reduction": "all"}, ValueError, "reduction: expected one of"),
    ({"size_average": True}, ValueError, "size_average: expected None"),
])
def test_cross_entropy_errors(change, error, message):
    with pytest.raises(error, match=message):
        fast.cross_entropy(**{"input": torch.zeros(2, 3), "target": torch.tensor([0, 1]), **change})


@pytest.mark.parametrize("function", [
    lambda x: fast.batch_norm(x, None, None, training=True), lambda x: fast.cross_entropy(x, torch.tensor([0, 1, 2]))])
def test_second_derivatives_are_refused(function):
    x = batch((3, 4)).requires_grad_()
    with pytest.raises(NotImplementedError, match="create_graph=False"):
        torch.autograd.grad((function(x) ** 2).sum(), x, create_graph=True)


# -- operators and compilers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_batch_norm_is_a_well_behaved_operator(memory_format, with_residual):
    x = batch((4, 3, 5, 2), memory_format).requires_grad_()
    residual = batch((4, 3, 5, 2), memory_format).neg().requires_grad_() if with_residual else None
    mean, var, weight, bias = vectors(3)
    torch.library.opcheck(torch.ops.fastnorm.batch_norm.default, (
        x, mean, var, weight.requires_grad_(), bias, residual, True, 0.1, 1e-5, "relu", 0.01))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy_is_a_well_behaved_operator(reduction):
    torch.library.opcheck(torch.ops.fastnorm.cross_entropy.default, (
        batch((2, 5, 3, 4), "channels_last").requires_grad_(), torch.zeros((2, 3, 4), dtype=torch.int64), None, -100,
        reduction, 0.0))


TARGET = torch.tensor([1, 0, 4])
WEIGHT, BIAS = torch.linspace(0.5, 2, 5, dtype=torch.float64), torch.linspace(-1, 1, 5, dtype=torch.float64)


def transformed(module, reduction="mean"):
    """Functions of x, and for batch norm of its parameters, that `torch.func` transforms."""
    def loss(x):
        return module.cross_entropy(x, TARGET, reduction=reduction)

    def norm(x, weight=WEIGHT, bias=BIAS):
        return (module.batch_norm(x, None, None, weight, bias, training=True) ** 3).sum()

    return loss, norm


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap, which runs an operator row by row
def test_reverse_mode_of_torch_func():
    x, several = batch((3, 5)), batch((2, 3, 5))
    results = []
    for module in (fast, functional):
        loss, norm = transformed(module)
        rows, _ = transformed(module, "none")
        mean, var = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)

        def with_statistics(x, module=module, mean=mean, var=var):
            return (module.batch_norm(x, mean, var, WEIGHT, BIAS, training=True) ** 3).sum()

        results.append([
            torch.func.grad(loss)(x), torch.func.jacrev(loss)(x), torch.func.jacrev(rows)(x),
            torch.func.vjp(loss, x)[1](torch.tensor(2.0, dtype=torch.float64))[0],
            torch.func.vmap(loss)(several), torch.func.vmap(torch.func.grad(loss))(several),
            *torch.func.grad(norm, argnums=(0, 1, 2))(x, WEIGHT, BIAS),
            torch.func.grad(norm, argnums=1)(x, WEIGHT, BIAS),
            # PyTorch has no rule for this one
            torch.func.vmap(torch.func.grad(norm))(several) if module is fast else torch.stack(
                [torch.func.grad(norm)(each) for each in several]),
            torch.func.grad(with_statistics)(x), mean, var])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours.numpy(), theirs.numpy(), ulps=1000, scale=100)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own, in forward mode
@pytest.mark.parametrize("at", [0, 1], ids=["cross_entropy", "batch_norm"])
def test_what_torch_func_cannot_have_is_refused(at):
    """Not a gradient of 0, which is what PyTorch takes the unknown for."""
    function, x = transformed(fast)[at], batch((3, 5))
    for transform in (lambda: torch.func.jvp(function, (x,), (x,)), lambda: torch.func.jacfwd(function)(x)):
        with pytest.raises(NotImplementedError, match="expected reverse-mode"):
            transform()
    with pytest.raises(NotImplementedError, match="gradients of the gradient"):
        torch.func.grad(lambda x: torch.func.grad(function)(x).pow(2).sum())(x)


def test_gradient_of_batch_norms_gradient_by_its_weight_is_refused():
    """Nothing that autograd sees in the gradient depends on the weight: dy is constant."""
    x = batch((3, 5))

    def gradient_of_a_linear_loss(weight):
        return torch.func.grad(
            lambda a: (fast.batch_norm(a, None, None, weight, None, training=True) * x).sum())(x).pow(2).sum()

    with pytest.raises(NotImplementedError, match="gradients of the gradient"):
        torch.func.grad(gradient_of_a_linear_loss)(WEIGHT)


def test_compilers_trace_a_training_step():
    torch._dynamo.reset()
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = fast.accelerate(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 5))).double()

        def evaluate(x, target, model=model):
            return fast.cross_entropy(model(x), target)

        if compiled:
            evaluate = torch.compile(evaluate, backend="aot_eager", fullgraph=True)
        optimizer = fast.AdamW(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = evaluate(batch((6, 3)), torch.arange(6) % 5)
            loss.backward()
            optimizer.step()
        losses.append([loss.item(), model[1].running_mean.tolist(), int(model[1].num_batches_tracked)])
    assert losses[0] == losses[1]


# -- whole models ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Batch norms of every rank, with and without a ReLU behind them, and one that occurs twice."""

    def __init__(self):
        super().__init__()
        self.flat = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True))
        shared = nn.BatchNorm2d(3, momentum=None)
        self.image = nn.Sequential(shared, nn.ReLU(), shared, nn.Sigmoid(), nn.BatchNorm2d(3, affine=False))
        self.volume = nn.BatchNorm3d(3, track_running_stats=False)

    def forward(self, x):
        image = self.image(self.flat(x).reshape(-1, 3, 2, 1))
        return self.volume(image.unsqueeze(-1)).sum((0, 2, 3, 4))


def test_accelerated_model_computes_the_same_and_restores():
    torch.manual_seed(0)
    plain = Net().double()
    model = fast.accelerate(copy.deepcopy(plain))
    kinds = [type(each).__name__ for each in plain.modules()]
    assert [type(each).__name__ for each in model.modules()] == [
        "FusedReLU" if at == 4 else kind for at, kind in enumerate(kinds)]
    assert "activation='relu'" in repr(model)
    for training in (True, True, False):
        results = []
        for each in (plain, model):
            each.train(training).zero_grad()
            x = batch((5, 4)).requires_grad_()
            out = each(x)
            (out * torch.arange(3.0)).sum().backward()
            results.append([out, x.grad, *each.state_dict().values(), *(p.grad for p in each.parameters())])
        for a, b in zip(*results, strict=True):
            # Gradients of sums that are 0 by construction: everything cancels but the roundings of terms below 100.
            assert_close(a.detach().numpy().astype(float), b.detach().numpy().astype(float), ulps=1000, scale=100)
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    fast.restore(copy.deepcopy(model))(batch((5, 4)))
    before = list(model.parameters())
    fast.restore(model)
    assert [type(each) for each in model.modules()] == [type(each) for each in plain.modules()]
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert repr(model) == repr(plain)


@pytest.mark.parametrize("at", [1, 2], ids=["batch norm", "ReLU"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook",
                                      "register_full_backward_hook", "register_full_backward_pre_hook"])
def test_modules_with_hooks_keep_their_relu(at, register):
    """A hook is heard, and sees what it saw before."""
    torch.manual_seed(0)
    plain, seen = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU()).double(), []
    getattr(plain[at], register)(lambda _, *values: seen.extend(values))
    results = []
    for model in (plain, fast.accelerate(copy.deepcopy(plain))):
        seen.clear()
        model(batch((5, 4)).requires_grad_()).pow(2).sum().backward()
        results.append([tensor.detach() for value in seen
                        for tensor in (value if isinstance(value, tuple) else (value,))])
    assert type(model[2]) is nn.ReLU
    assert results[0]
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours.numpy(), theirs.numpy(), ulps=1000, scale=100)


def test_accelerate_takes_one_module_and_refuses_others():
    norm = nn.BatchNorm1d(3)
    assert fast.accelerate(norm) is norm
    assert isinstance(norm, nn.BatchNorm1d)
    assert type(fast.restore(norm)) is nn.BatchNorm1d
    model = fast.accelerate(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), fuse_relu=False)
    assert type(model[1]) is nn.ReLU
    for function in (fast.accelerate, fast.restore):
        with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Module, got list"):
            function([norm])
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        fast.accelerate(nn.BatchNorm1d(3))(torch.zeros(2, 3, 4, 5))


@pytest.mark.skipif(not EXAMPLE.exists(), reason="tests run outside a checkout")
def test_example_trains_to_the_same_losses(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--steps", "5", "--batch", "32", "--width", "4",
                                      "--dtype", "float64", "--data", "digits"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    out = capsys.readouterr().out
    apart = float(out.split("losses differ by ")[1].split()[0])
    assert apart < 1e-9  # float64 roundings, 1e-16 each, after five steps
