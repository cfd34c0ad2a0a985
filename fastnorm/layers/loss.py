"""Softmax cross-entropy as the end of a network."""

from __future__ import annotations

from typing import Any

from .._arrays import AnyArray, Array, check_array, check_choice, check_integer, check_number
from .._backend import Backend
from .base import Stateful


class SoftmaxCrossEntropy(Stateful):
    """Cross-entropy of the softmax of logits: `fastnorm.softmax_cross_entropy` as the end of a network.

    Parameters
    ----------
    axis : int, default -1
        The class axis.
    weight : ndarray (C,), optional
        A weight for each class, of the logits' dtype.
    ignore_index : int, default -100
        Rows with this target count for nothing.
    label_smoothing : float, default 0.0
        Share of the uniform distribution in the targets, in [0, 1].
    reduction : {"mean", "sum", "none"}
        How the rows' losses are put together.
    backend : module, optional
        Where ``softmax_cross_entropy`` is looked up: `fastnorm` by default.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If a number is out of its range or ``reduction`` is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> from fastnorm.layers import SoftmaxCrossEntropy
    >>> criterion = SoftmaxCrossEntropy()
    >>> loss = criterion.forward(np.zeros((2, 4)), np.array([0, 3]))
    >>> bool(np.isclose(loss, np.log(4)))
    True
    >>> criterion.backward()
    array([[-0.375,  0.125,  0.125,  0.125],
           [ 0.125,  0.125,  0.125, -0.375]])
    """

    def __init__(self, *, axis: int = -1, weight: AnyArray | None = None, ignore_index: int = -100,
                 label_smoothing: float = 0.0, reduction: str = "mean", backend: Backend = None) -> None:
        super().__init__(backend)
        self.axis = check_integer("axis", axis)
        self.weight = None if weight is None else check_array("weight", weight)
        self.ignore_index = check_integer("ignore_index", ignore_index)
        self.label_smoothing = check_number("label_smoothing", label_smoothing, 0.0, 1.0)
        self.reduction = check_choice("reduction", reduction, ("mean", "sum", "none"))
        self._dlogits: Array | None = None

    def forward(self, logits: AnyArray, targets: AnyArray) -> Any:
        """Return the loss; targets are class indices or probabilities."""
        self._dlogits = None
        loss, self._dlogits = self._functions.softmax_cross_entropy(
            logits, targets, axis=self.axis, weight=self.weight, ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing, reduction=self.reduction)
        return loss

    def backward(self) -> Array:
        """Return the gradient of the loss for the logits."""
        if self._dlogits is None:
            raise RuntimeError("SoftmaxCrossEntropy.backward: expected a call of forward before it")
        return self._dlogits
