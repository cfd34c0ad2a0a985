"""How large an error may be, and by how much more than PyTorch's."""

from __future__ import annotations

import math

from .cases import ACTIVATIONS, FLOAT64, UPDATES, Case

# Half an ulp a rounding of a term as large as the scale, counted along the formula that the kernel computes; where the
# scale lies just below a power of two, a term that rounds beyond it costs twice that.
ULPS = {
    # The issue's own limit; polynomial, reduction and scaling take 1.2.
    ("exp", "exp"): 2.0,
    # x less two numbers, a product, a sum, the rounded scale: 6 roundings; and the statistics: float sums of 64 squares
    # err by up to 64/2 ulp in theory and sqrt(64) in fact, of which the root takes half.
    ("batch norm forward", "y"): 8.0, ("batch norm forward", "mean"): 2.0, ("batch norm forward", "variance"): 16.0,
    ("batch norm inference", "y"): 4.0,
    ("batch norm backward", "dx"): 8.0, ("batch norm backward", "dgamma"): 4.0, ("batch norm backward", "dbeta"): 2.0,
    ("Moments", "mean"): 2.0, ("Moments", "variance"): 16.0,
    # exp 1.3, the sum of such terms the same, its additions, inverse and product: 4; and twice that just above a power
    # of two, where an ulp is half as much of the value.
    ("softmax", "p"): 8.0, ("cross-entropy", "gradient"): 8.0,
    # A difference, a logarithm added up in double, a sum.
    ("log-softmax", "log p"): 4.0, ("cross-entropy", "losses"): 4.0, ("cross-entropy", "mean loss"): 4.0,
    ("clip by norm", "norm"): 2.0, ("clip by norm", "grads"): 2.0,
    **{(f"{name} {direction}", output): 3.0 for name in ACTIVATIONS
       for direction, output in (("forward", "y"), ("backward", "dx"))},
    # The last sum 0.5; the quotient in it errs most just above 3/4: its own rounding 0.25, that of 1 + e 0.3, e's 1.2
    # ulp 0.4.
    ("tanh forward", "y"): 1.5,
}
# A step of an optimizer: two products and their sum, and constants rounded to the dtype; parameters add a quotient and
# a root, of a step smaller than themselves. In the worst case all steps err to the same side.
STEP_ULPS = 2.5
# In float64, sums are float64's too: up to 16 exponentials are added one by one, sqrt(16)/2 ulp in fact, which counts
# twice as above; a norm has a bound of its own, which the factor made of it adds to; and where one term is nearly all
# of dgamma, up to 64 others and 64 sums of so many are rounded to its size, sqrt(128)/2.
FLOAT64_ULPS = {("softmax", "p"): 4.0, ("cross-entropy", "gradient"): 4.0, ("clip by norm", "grads"): 2.0,
                ("batch norm backward", "dgamma"): 5.7}


def bound(case: Case, output: str) -> float:
    """The largest error, in ulp, that an output of a case may have."""
    if (case.kernel, output, case.data, case.dtype) == ("clip by norm", "norm", "denormals", FLOAT64):
        return math.inf  # their squares are 0 in float64, in which the norm is added up
    if case.kernel in UPDATES:
        return STEP_ULPS * case.steps
    key = case.kernel, output
    return ULPS[key] + (FLOAT64_ULPS.get(key, 0.0) if case.dtype == FLOAT64 else 0.0)


# -- beside PyTorch ----------------------------------------------------------------------------------------------------

# The largest of many rounding errors is a matter of chance: of two sequences of as many roundings, one is ahead by an
# ulp on some numbers, by half of the error where steps add up, and the other is on others.
SAME, FACTOR = 1.0, 1.5
# Mean errors that differ by less, in ulp or by this share, are the same.
MEAN_SAME, MEAN_SHARE = 0.002, 0.02
