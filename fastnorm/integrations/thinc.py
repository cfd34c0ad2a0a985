"""fastnorm under thinc and spaCy: optimizers that their registry finds as ``fastnorm.Adam.v1`` and ``fastnorm.SGD.v1``.

`Optimizer` is thinc's own class with another update: hyper-parameters, schedules and state (``mom1``, ``mom2``,
``averages``, ``nr_update``) are inherited, so that one can go on where the other has stopped. It works with thinc 8.3,
on which spaCy 3.8 stands, and with thinc 9.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import thinc.optimizers

from .._arrays import Array, check_number
from .._runtime import kernels
from ..updates import Argument, Lists, _run, check_lists

# No `from __future__ import annotations`: the registry of thinc 9 cannot read annotations that are strings.

__all__ = ["SGD", "Adam", "Optimizer"]

Key = tuple[int, str]  # the node of a model and the name of its parameter
Rate = Any  # a number or a schedule; thinc 8 and thinc 9 have different kinds of these

WEIGHTS, GRADIENT, MOM1, MOM2, AVERAGE = 0, 1, 2, 3, -1  # where an array is in the lists of an update
LARGEST_DECAY = 0.9999  # of the averages, as in thinc


class _Values(NamedTuple):
    """The hyper-parameters of one update."""

    rate: float
    beta1: float
    beta2: float
    eps: float
    L2: float
    grad_clip: float


@lru_cache(maxsize=64)  # they are the same for every parameter of a step: six checks cost as much as a small update
def _checked(rate: float, beta1: float, beta2: float, eps: float, L2: float, grad_clip: float) -> _Values:
    return _Values(
        check_number("learn_rate * lr_scale", rate), check_number("beta1", beta1, 0.0, 1.0, open_high=True),
        check_number("beta2", beta2, 0.0, 1.0, open_high=True), check_number("eps", eps), check_number("L2", L2),
        check_number("grad_clip", grad_clip))


class Optimizer(thinc.optimizers.Optimizer):
    """`thinc.optimizers.Optimizer` with the updates of `fastnorm.adam_step` and `fastnorm.momentum_step`.

    Made by `Adam` and `SGD`. Arrays that are not NumPy's, as those on a GPU are not, go to thinc's own update.

    Results are thinc's but for roundings, of which one is systematic: thinc computes ``1 - beta2`` in float32, where
    0.999 leaves 1.3e-5 too little, and its steps are longer by half of that.

    Examples
    --------
    >>> import numpy as np
    >>> from fastnorm.integrations.thinc import Adam
    >>> optimizer = Adam(0.1)
    >>> weights, gradient = np.array([4.0], np.float32), np.array([0.5], np.float32)
    >>> optimizer((0, "W"), weights, gradient)
    (array([3.9], dtype=float32), array([0.], dtype=float32))
    """

    __slots__ = ()

    def __call__(self, key: Key, weights: Any, gradient: Any, *, lr_scale: float = 1.0) -> tuple[Any, Any]:
        """Update one parameter in its own memory, and set its gradient to 0.

        ::

            gradient = gradient + L2 * weights                                  unless L2_is_weight_decay
            gradient = gradient * min(1, grad_clip / norm(gradient))            unless grad_clip is 0
            weights = weights - the update of Adam, or of gradient descent where beta2 is 0
            weights = weights - learn_rate * lr_scale * L2 * weights            with L2_is_weight_decay
            average = average - (1 - decay) * (average - weights)               with use_averages

        where ``decay = min(0.9999, (1 + t) / (10 + t))`` in the parameter's t-th update.

        Parameters
        ----------
        key : tuple of int and str
            Names the parameter, under which its state is kept.
        weights, gradient : ndarray
            float32 or float64, of one shape and dtype and any memory layout; both are written. thinc's state of a
            float64 parameter would be float32; here it is float64.
        lr_scale : float
            Multiplies the learning rate.

        Returns
        -------
        weights, gradient
            The same two arrays. Nothing happens where the gradient has no elements.

        Raises
        ------
        TypeError
            If a dtype is not supported or does not match.
        ValueError
            If a shape does not match, a hyper-parameter is out of its range, or an array is read-only or overlaps
            another one. Nothing has changed then.
        """
        if not isinstance(weights, np.ndarray):
            return super().__call__(key, weights, gradient, lr_scale=lr_scale)  # type: ignore[no-any-return]  # thinc has no types
        if len(gradient) < 1:
            return weights, gradient
        rate, beta1, beta2, eps, L2, grad_clip = self._values(key, lr_scale)
        lists = self._lists(key, weights, gradient, beta2 > 0)
        step = self.nr_update.get(key, 0) + 1

        if L2 and not self.L2_is_weight_decay:
            _descend(lists, GRADIENT, WEIGHTS, L2, maximize=True)
        if grad_clip:
            _clip(lists, grad_clip)
        if beta2 > 0:
            _run(kernels.optimizer.adam, lists, (WEIGHTS, GRADIENT, MOM1, MOM2, None), float(step), rate, beta1, beta2,
                 eps, 0.0, False, True, False)  # no decay, eps added to the uncorrected root, descent
        else:
            _descend(lists, WEIGHTS, GRADIENT, rate)
        gradient.fill(0)
        if L2 and self.L2_is_weight_decay:
            _descend(lists, WEIGHTS, GRADIENT, rate, weight_decay=L2)  # only the gradient of the penalty is left
        if self.averages is not None:
            decay = min(LARGEST_DECAY, (1 + step) / (10 + step))
            _descend(lists, AVERAGE, WEIGHTS, 1 - decay, weight_decay=1.0, maximize=True)

        self.nr_update[key] = step
        return weights, gradient

    def _values(self, key: Key, lr_scale: float) -> _Values:
        """The hyper-parameters of this update: numbers in thinc 8, schedules in thinc 9."""
        values = [self.learn_rate, self.b1, self.b2, self.eps, self.L2, self.grad_clip]
        if callable(self.learn_rate):
            values = [schedule(self.step, key=key, last_score=self.last_score) for schedule in values]
        rate, *others = map(float, values)
        return _checked(rate * lr_scale, *others)

    def _lists(self, key: Key, weights: Array, gradient: Array, has_moments: bool) -> Lists:
        """All that an update writes, checked: weights, gradient and state, which begins as zeros."""
        kept = [("mom1", self.mom1), ("mom2", self.mom2)] if has_moments else []
        if self.averages is not None:
            kept.append(("averages", self.averages))
        arguments: list[Argument] = [("weights", weights, True), ("gradient", gradient, True)]
        arguments += [(name, _shaped(name, arrays.get(key), weights), True) for name, arrays in kept]
        lists = check_lists(*arguments)
        for (name, arrays), (array,) in zip(kept, lists.arrays[MOM1:], strict=True):
            if key not in arrays:
                arrays[key] = array if name == "averages" else array.reshape(-1)  # thinc keeps moments as vectors
        return lists


def _shaped(name: str, kept: Array | None, weights: Array) -> Array:
    """What is kept for a parameter, in its shape."""
    if kept is None:
        return np.zeros(weights.shape, weights.dtype)
    if kept.size != weights.size:
        raise ValueError(f"{name}: expected {weights.size} values, as many as weights has, got {kept.size}")
    return kept.reshape(weights.shape)


def _descend(lists: Lists, array: int, along: int, rate: float, *, weight_decay: float = 0.0,
             maximize: bool = False) -> None:
    """``array -= rate * (along + weight_decay * array)``, or ``-along`` with ``maximize``: descent without momentum."""
    _run(kernels.optimizer.momentum, lists, (array, along, None), rate, 0.0, 0.0, False, weight_decay, maximize)


def _clip(lists: Lists, threshold: float) -> None:
    """Scale the gradient to this norm at most. thinc adds nothing to the norm; `clip_grad_norm`, like PyTorch, 1e-6."""
    norm = _run(kernels.optimizer.clip_grad_norm, lists, (GRADIENT,), np.inf, True)
    if norm >= threshold:
        (gradient,) = lists.arrays[GRADIENT]
        with np.errstate(invalid="ignore"):  # NaN is what infinity becomes
            gradient *= threshold / norm


def Adam(learn_rate: Rate = 0.001, *, L2: Rate = 0.0, beta1: Rate = 0.9, beta2: Rate = 0.999, eps: Rate = 1e-8,
         grad_clip: Rate = 1.0, L2_is_weight_decay: bool = True, use_averages: bool = True) -> Optimizer:
    """Adam with thinc's hyper-parameters, in a configuration ``@optimizers = "fastnorm.Adam.v1"``.

    Parameters
    ----------
    learn_rate, L2, beta1, beta2, eps, grad_clip : float, or schedule
        As in thinc's ``Adam.v1``. A schedule is what the installed thinc takes for one: a list or a generator, and in
        thinc 9 a ``Schedule``. eps is added to the uncorrected root. With ``beta2=0``, as in thinc, it is gradient
        descent. ``beta1=0`` alone, which thinc refuses, is Adam without an average of the gradient.
    L2_is_weight_decay : bool
        Shrink the weights in place of adding the penalty to the gradient.
    use_averages : bool
        Keep moving averages of the weights in ``averages``.

    Returns
    -------
    Optimizer

    Raises
    ------
    ValueError
        If a schedule is of no such kind. Numbers are checked in the updates, which schedules give anew.

    References
    ----------
    Kingma and Ba, "Adam: a method for stochastic optimization", 2015, end of section 2 for the place of eps.

    Examples
    --------
    >>> import numpy as np
    >>> from thinc.api import Linear
    >>> from fastnorm.integrations.thinc import Adam
    >>> model, x = Linear(1, 2).initialize(), np.ones((3, 2), np.float32)
    >>> optimizer = Adam(0.1)
    >>> for _ in range(100):
    ...     y, backpropagate = model.begin_update(x)
    ...     dx = backpropagate(y - 5)
    ...     model.finish_update(optimizer)
    >>> model.predict(x).round(1)
    array([[5.], [5.], [5.]], dtype=float32)
    """
    return Optimizer(learn_rate, L2=L2, beta1=beta1, beta2=beta2, eps=eps, grad_clip=grad_clip,
                     L2_is_weight_decay=L2_is_weight_decay, use_averages=use_averages)


def SGD(learn_rate: Rate, *, L2: Rate = 0.0, grad_clip: Rate = 1.0, L2_is_weight_decay: bool = True,
        use_averages: bool = True) -> Optimizer:
    """Gradient descent with thinc's hyper-parameters, in a configuration ``@optimizers = "fastnorm.SGD.v1"``.

    Parameters
    ----------
    learn_rate, L2, grad_clip : float, or schedule
        As in thinc's ``SGD.v1``.
    L2_is_weight_decay : bool
        Shrink the weights in place of adding the penalty to the gradient.
    use_averages : bool
        Keep moving averages of the weights in ``averages``.

    Returns
    -------
    Optimizer

    Raises
    ------
    ValueError
        If a schedule is of no kind that thinc takes.

    Examples
    --------
    >>> import numpy as np
    >>> from fastnorm.integrations.thinc import SGD
    >>> weights, gradient = np.array([4.0], np.float32), np.array([0.5], np.float32)
    >>> SGD(0.1)((0, "W"), weights, gradient)
    (array([3.95], dtype=float32), array([0.], dtype=float32))
    """
    return Optimizer(learn_rate, L2=L2, beta1=0.0, beta2=0.0, grad_clip=grad_clip,
                     L2_is_weight_decay=L2_is_weight_decay, use_averages=use_averages)
