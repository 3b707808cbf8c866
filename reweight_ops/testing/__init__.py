"""The common tools of tests, benchmarks and ``reweight-ops check``: meaningful batches,
fp64 truth, and the accuracy criterion.
"""

from .batches import double_batch, double_spec, make_batch
from .criterion import ERROR_FLOOR, ERROR_RATIO, Comparison, compare, gradient_errors, value_error
from .eager import eager_policy_loss
from .gradcheck import gradcheck

__all__ = [
    "ERROR_FLOOR",
    "ERROR_RATIO",
    "Comparison",
    "compare",
    "double_batch",
    "double_spec",
    "eager_policy_loss",
    "gradcheck",
    "gradient_errors",
    "make_batch",
    "value_error",
]
