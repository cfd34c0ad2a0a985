"""PyTorch's results, under the names that `references.exact` gives them: the functions that its users call.

Optimizers run in their default form on CPU, the loop over parameters. Tensors share the memory of the inputs, or of
copies where a call writes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._bench.rivals import need
from .cases import ACTIVATIONS, EPS, MAX_NORM, UPDATES, Inputs, Update

Tensors = dict[str, Any]

# The names of PyTorch's state tensors.
STATES = {"velocities": "momentum_buffer", "square_avgs": "square_avg", "grad_avgs": "grad_avg",
          "momentum_buffers": "momentum_buffer", "exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq",
          "max_exp_avg_sqs": "max_exp_avg_sq", "state_sums": "sum"}


class PyTorch:
    """The library, or `rivals.AbsentError` with the reason why it cannot run here."""

    def __init__(self) -> None:
        self.torch = need("torch")
        self.version: str = self.torch.__version__
        self._kernels: dict[str, Callable[[Tensors], Tensors]] = {
            "exp": lambda t: {"exp": self.torch.exp(t["x"])},
            "batch norm forward": self._batch_norm_forward, "batch norm backward": self._batch_norm_backward,
            "batch norm inference": self._batch_norm_inference, "Moments": self._moments,
            "softmax": lambda t: {"p": self.torch.softmax(t["x"], 1)},
            "log-softmax": lambda t: {"log p": self.torch.log_softmax(t["x"], 1)},
            "cross-entropy": self._cross_entropy, "clip by norm": self._clip_by_norm,
        }

    def results(self, kernel: str, inputs: Inputs) -> dict[str, Any]:
        """What PyTorch gives for the same, as arrays."""
        tensors = {name: self.torch.from_numpy(a) for name, a in inputs.items()}
        if kernel in self._kernels:
            found = self._kernels[kernel](tensors)
        elif kernel in UPDATES:
            found = self._update(UPDATES[kernel], tensors)
        else:
            found = self._activation(kernel, tensors)
        return {name: tensor.detach().numpy() for name, tensor in found.items()}

    def _batch_norm(self, x: Any, gamma: Any, beta: Any, mean: Any, var: Any, training: bool) -> Any:
        return self.torch.nn.functional.batch_norm(x, mean, var, gamma, beta, training, 1.0, EPS)

    def _batch_norm_forward(self, t: Tensors) -> Tensors:
        mean, var = self.torch.zeros_like(t["gamma"]), self.torch.ones_like(t["gamma"])
        y = self._batch_norm(t["x"], t["gamma"], t["beta"], mean, var, True)
        return {"y": y, "mean": mean, "variance": var}

    def _batch_norm_inference(self, t: Tensors) -> Tensors:
        return {"y": self._batch_norm(t["x"], t["gamma"], t["beta"], t["running_mean"], t["running_var"], False)}

    def _batch_norm_backward(self, t: Tensors) -> Tensors:
        x, gamma, beta = (t[name].detach().requires_grad_() for name in ("x", "gamma", "beta"))
        self._batch_norm(x, gamma, beta, None, None, True).backward(t["dy"])
        return {"dx": x.grad, "dgamma": gamma.grad, "dbeta": beta.grad}

    def _moments(self, t: Tensors) -> Tensors:
        others = [i for i in range(t["x"].dim()) if i != 1]
        var, mean = self.torch.var_mean(t["x"], others, correction=0)
        return {"mean": mean, "variance": var}

    def _cross_entropy(self, t: Tensors) -> Tensors:
        leaf = t["x"].detach().requires_grad_()
        losses = self.torch.nn.functional.cross_entropy(leaf, t["labels"], reduction="none")
        losses.backward(self.torch.ones_like(losses))
        mean = self.torch.nn.functional.cross_entropy(t["x"], t["labels"])
        return {"losses": losses, "mean loss": mean[None], "gradient": leaf.grad}

    def _update(self, update: Update, t: Tensors) -> Tensors:
        p = t["params"].clone().requires_grad_()
        options = dict(update.options)
        decoupled = options.pop("decoupled_weight_decay", False)
        optimizers = {"momentum": "SGD", "rmsprop": "RMSprop", "adam": "AdamW" if decoupled else "Adam",
                      "adagrad": "Adagrad"}
        optimizer = getattr(self.torch.optim, optimizers[update.rule])([p], **options)
        for g in t["grads"]:
            p.grad = g
            optimizer.step()
        return {"params": p, **{name: optimizer.state[p][STATES[name]] for name in update.states}}

    def _clip_by_norm(self, t: Tensors) -> Tensors:
        p = self.torch.zeros_like(t["grads"], requires_grad=True)
        p.grad = t["grads"].clone()
        norm = self.torch.nn.utils.clip_grad_norm_([p], MAX_NORM)
        return {"norm": norm[None], "grads": p.grad}

    def _activation(self, kernel: str, t: Tensors) -> Tensors:
        name, direction = kernel.split()
        aten, options = self.torch.ops.aten, ACTIVATIONS[name]
        if direction == "forward":
            return {"y": getattr(aten, name)(t["x"], *options.values())}
        saved, dy, alpha = t["saved"], t["dy"], options.get("alpha", 1.0)
        calls: dict[str, Callable[[], Any]] = {
            "relu": lambda: aten.threshold_backward(dy, saved, 0),
            "leaky_relu": lambda: aten.leaky_relu_backward(dy, saved, options["negative_slope"], False),
            "elu": lambda: aten.elu_backward(dy, alpha, 1.0, 1.0, False, saved),
            "celu": lambda: aten.elu_backward(dy, alpha, 1.0, 1 / alpha, False, saved),
            "sigmoid": lambda: aten.sigmoid_backward(dy, saved), "tanh": lambda: aten.tanh_backward(dy, saved)}
        return {"dx": calls[name]()}
