"""The launch of Triton kernels: the machine, the options, and the known alignment of
tensors.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from ...triton_kernels import kernels, triton
from ...triton_kernels.config import Launch

#: The oldest and the newest Triton that the tests ran with. ``make triton-versions``
#: runs them with each.
TESTED = ((3, 6), (3, 9))


def warn_if_untested(version: str) -> None:
    """Warn once, when the backend is loaded, about an older Triton. It may work, and it
    may miscompile.

    There is no warning about a newer one, which comes with a newer PyTorch.
    """
    numbers = tuple(int(x) for x in version.split(".")[:2])
    if numbers < TESTED[0]:
        oldest, newest = (".".join(map(str, v)) for v in TESTED)
        warnings.warn(
            f"reweight_ops: Triton {version} is older than the versions that its kernels were "
            f"tested with ({oldest} to {newest}); "
            "`reweight-ops check --backend triton` tells whether it computes right here.",
            RuntimeWarning,
            stacklevel=2,
        )


warn_if_untested(triton.__version__)


def interpreted() -> bool:
    """Return whether the kernels were decorated for Triton's interpreter
    (``TRITON_INTERPRET=1`` at their import).
    """
    return not isinstance(kernels.stats_kernel, triton.runtime.JITFunction)


#: Up to this many rows per multiprocessor, a row is split over programs. With fewer
#: programs a device idles.
_ROWS_PER_PROCESSOR = 2


@functools.lru_cache
def properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def wave(device: torch.device) -> int:
    return (
        32
        if device.type != "cuda" or torch.version.hip is None
        else int(properties(device).warp_size)
    )


def processors(device: torch.device) -> int:
    return int(properties(device).multi_processor_count) if device.type == "cuda" else 1


def is_split(rows: int, segments: int, device: torch.device) -> bool:
    """Return whether there are too few rows for one program each."""
    return segments > 1 and rows < _ROWS_PER_PROCESSOR * processors(device)


def launch(kernel: Any, grid: int, *args: Any, shape: Launch, wave: int = 32, **meta: Any) -> None:
    """Launch a kernel. Every launch goes through here."""
    if interpreted():
        import numpy

        # it warns about every 0 * inf in a branch that a select drops
        with numpy.errstate(all="ignore"):
            kernel[(grid,)](*args, **meta)
    else:
        kernel[(grid,)](*args, **meta, **options(shape, wave, torch.version.hip is not None))


def options(shape: Launch, wave: int, hip: bool) -> dict[str, Any]:
    # Contraction is off, because kernels that share a sweep must round alike. Registers
    # are bounded, because ptxas would otherwise spill for an occupancy that is not
    # needed.
    return {"num_warps": shape.threads // wave, "enable_fp_fusion": False} | (
        {} if hip else {"maxnreg": shape.registers}
    )


def _row_strides(t: Tensor) -> list[int]:
    """Return the bytes from row to row in each leading dimension. One of size one
    addresses nothing, whatever its stride.
    """
    size = t.element_size()
    return [s * size for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True) if n > 1]


def begin_alike(a: Tensor, b: Tensor) -> bool:
    """Return whether a row of ``a`` begins as far from a multiple of 16 bytes as that
    of ``b``, which has the same shape and dtype.
    """
    apart = [x - y for x, y in zip(_row_strides(a), _row_strides(b), strict=True)]
    return all(x % 16 == 0 for x in (a.data_ptr() - b.data_ptr(), *apart))


def alignment(*tensors: Tensor) -> int:
    """Return the bytes to which every row of every tensor is aligned: 16, 4, or the
    size of an element.
    """
    addresses = [a for t in tensors for a in (t.data_ptr(), *_row_strides(t))]
    return next(
        n
        for n in (16, 4, 2)
        if n <= tensors[0].element_size() or all(a % n == 0 for a in addresses)
    )
