"""thinc's Adam, the optimizer under spaCy: one float32 vector, one thread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..cases import IN_PLACE, STEP, Case, Inputs, Update
from ..measure import Call
from . import need


def load(threads: int) -> Thinc:
    """Thinc; it uses one thread, however many there are."""
    return Thinc(need("thinc.api"), need("thinc"))


class Thinc:
    """`NumpyOps.adam`, called once an array, as thinc's optimizer does."""

    name = "thinc"

    def __init__(self, api: Any, package: Any) -> None:
        self.ops, self.version = api.NumpyOps(), package.about.__version__

    def calls(self, case: Case, inputs: Inputs) -> Iterator[Call]:
        """As `Rival.calls`."""
        if not isinstance(case, Update) or case.rule != "adam" or case.dtype != "float32":
            return
        lists = [[a.reshape(-1) for a in inputs[name]] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")]
        grads = lists[1]
        lists[1] = [np.empty_like(g) for g in grads]
        corrected = 1e-3 * (1 - 0.999**STEP) ** 0.5 / (1 - 0.9**STEP)

        def reset() -> None:
            for own, grad in zip(lists[1], grads, strict=True):  # it leaves zeros there, and averages would fade away
                own[...] = grad

        def run() -> Any:
            for p, g, m, v in zip(*lists, strict=True):
                self.ops.adam(p, g, m, v, 0.9, 0.999, 1e-8, corrected)
            return inputs["params"]

        yield Call(self.name, IN_PLACE, run, "", 1, reset=reset)
