"""Tells whether a call runs inside the transforms of ``torch.func`` (``grad``, ``jvp``,
``vmap``, ``hessian``, ...) or forward-mode automatic differentiation.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .compiler import constant_result


@constant_result
def in_transform() -> bool:
    """Return whether a transform is active.

    It is a constant of a compiled graph. Dynamo enters the transforms that it traces,
    and guards on those around it.
    """
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def is_wrapped(t: Tensor) -> bool:
    """Return whether a transform holds the tensor.

    It may then be ``vmap``, which has several tensors in it, and no Python number can
    be read from those.
    """
    return torch._C._functorch.is_functorch_wrapped_tensor(t)
