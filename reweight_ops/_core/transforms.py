"""Whether a call runs inside ``torch.func``'s transforms (``grad``, ``jvp``, ``vmap``, ``hessian``, ...) or forward-mode automatic differentiation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


@torch.compiler.assume_constant_result
def in_transform() -> bool:
    """A constant of a compiled graph: Dynamo enters the transforms that it traces, and guards on those around it."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def is_wrapped(t: Tensor) -> bool:
    """Whether a transform holds it: then perhaps ``vmap``, which has several tensors in it, and no Python number is read from those."""
    return torch._C._functorch.is_functorch_wrapped_tensor(t)
