"""DeepSpeed's CPU Adam, made for optimizers off-loaded from an accelerator. It compiles itself at first use."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from ..cases import IN_PLACE, STEP, Case, Inputs, Update
from ..measure import Call
from . import AbsentError, need


def load(threads: int) -> DeepSpeed:
    """DeepSpeed with its operator built, on PyTorch's threads."""
    torch = need("torch")
    parameter = torch.nn.Parameter(torch.zeros(8))
    parameter.grad = torch.zeros(8)
    try:
        with _silence():
            need("deepspeed")
            kind = need("deepspeed.ops.adam").DeepSpeedCPUAdam
            kind([parameter]).step()
    except AbsentError:
        raise
    except Exception as error:  # a compiler that is missing or refuses: whatever it is, it cannot run here
        raise AbsentError(f"its CPU Adam cannot be built: {type(error).__name__}: {error}") from None
    return DeepSpeed(torch, kind, need("deepspeed").__version__, threads)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Discard what its compilation prints and logs."""
    sys.stdout.flush()
    logging.disable(logging.WARNING)
    saved, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        logging.disable(logging.NOTSET)
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nothing)


class DeepSpeed:
    """`DeepSpeedCPUAdam.step()`."""

    name = "DeepSpeed"

    def __init__(self, torch: Any, kind: Any, version: str, threads: int) -> None:
        self.torch, self.kind, self.version, self.threads = torch, kind, version, threads

    def calls(self, case: Case, inputs: Inputs) -> Iterator[Call]:
        """As `Rival.calls`."""
        if not isinstance(case, Update) or case.rule != "adam" or case.dtype != "float32":
            return
        torch, threads = self.torch, self.threads
        params = [torch.from_numpy(a).detach().requires_grad_() for a in inputs["params"]]
        with _silence():
            made = self.kind(params, lr=1e-3, adamw_mode=False)
        for at, param in enumerate(params):
            param.grad = torch.from_numpy(inputs["grads"][at])
            made.state[param] = {"step": STEP - 1, "exp_avg": torch.from_numpy(inputs["exp_avgs"][at]),
                                 "exp_avg_sq": torch.from_numpy(inputs["exp_avg_sqs"][at])}
        yield Call(self.name, IN_PLACE, made.step, "CPU Adam step()", threads,
                   prepare=lambda: torch.set_num_threads(threads))
