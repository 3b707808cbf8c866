"""Counts the GPU work of a call without a GPU: the call runs on meta tensors with the
Triton backend.

A meta tensor has no elements: code that would wait for one raises. Kernels are counted
where they would be launched, and PyTorch's own operations where they are dispatched.
"""

import dataclasses
from collections import Counter
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from reweight_ops._core.backends import triton_launch
from reweight_ops._core.backends.select import door
from reweight_ops._core.backends.triton import BACKEND
from reweight_ops._core.engine.ops import BODIES

#: Kernels whose work is of the size of the vocabulary.
VOCABULARY = (
    "partial_kernel",
    "stats_kernel",
    "loss_grad_kernel",
    "target_kernel",
    "gradient_kernel",
    "divergence_kernel",
)

#: Operations that allocate, or describe the same elements again, and are not views by
#: their schema.
_FREE = {
    "aten::empty",
    "aten::empty_like",
    "aten::new_empty",
    "aten::empty_strided",
    "aten::_unsafe_view",
    "aten::lift_fresh",
}


def costs_nothing(op) -> bool:
    return op.is_view or op._schema.name in _FREE


class Counted(TorchDispatchMode):
    """``operations`` of PyTorch and ``kernels`` of the package, by name, with the
    number of times that a device would run them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self._launchers = []  # entered again inside of an op

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        body = BODIES.get(func)
        if body is not None:
            with self:
                return body(*args, **(kwargs or {}))
        if not costs_nothing(func):
            self.operations[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self._launchers.append(triton_launch.launch)
        triton_launch.launch = self._count
        return super().__enter__()

    def __exit__(self, *error):
        triton_launch.launch = self._launchers.pop()
        return super().__exit__(*error)

    def _count(self, kernel, grid, *args, **meta) -> None:
        self.kernels[kernel.fn.__name__] += 1

    @property
    def beside(self) -> int:
        """All counts without the vocabulary-sized kernels."""
        return self.operations.total() + sum(
            n for name, n in self.kernels.items() if name not in VOCABULARY
        )

    def __str__(self) -> str:
        return f"{self.beside}: {dict(self.operations)} {dict(self.kernels)}"


class HostCopy(Exception):
    """Numbers of the host became a tensor of the device, or a tensor moved between the
    two.
    """


class NoHostCopies(TorchFunctionMode):
    """Raises where elements would move between host and device."""

    _CONSTRUCTORS = (
        torch.tensor,
        torch.as_tensor,
        torch.asarray,
        torch.from_numpy,
        torch.scalar_tensor,
        torch.Tensor.new_tensor,
    )
    #: They copy a number of the host too, which arithmetic takes as a launch argument.
    _COPIES = (torch.Tensor.to, torch.Tensor.copy_, torch.Tensor.type_as)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        values = args[1] if func is torch.Tensor.new_tensor else args[0] if args else None
        if func in self._CONSTRUCTORS and not isinstance(values, torch.Tensor):
            raise HostCopy(f"{func.__name__}{args}")
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            for t in args:
                if (
                    isinstance(t, torch.Tensor)
                    and t.device.type != result.device.type
                    and (t.dim() or func in self._COPIES)
                ):
                    raise HostCopy(
                        f"{getattr(func, '__name__', func)} from {t.device} to {result.device}"
                    )
        return result


@contextmanager
def on_meta():
    """The Triton backend serves meta tensors; its kernels are only counted."""
    backend = dataclasses.replace(BACKEND, unsupported_reason=_reason)
    with door("meta", backend):
        yield


def _reason(request):
    for dtype in (request.dtype, request.other_dtype):
        if dtype == torch.float64:
            return "logits are fp64"
    return None if request.device.type == "meta" else "only meta tensors come through the door"


def moved(value):
    """The same call on meta tensors."""

    def move(t):
        return (
            torch.empty_like(t, device="meta").requires_grad_(t.requires_grad)
            if isinstance(t, torch.Tensor)
            else t
        )

    return torch.utils._pytree.tree_map(move, value)
