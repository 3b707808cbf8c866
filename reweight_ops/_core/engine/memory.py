"""New memory for results as large as logits.

A CPU tensor of that size is memory that the system has never handed out. Every page of
it is cleared at its first write. With pages of 4 KiB that costs several times the loss
itself. Therefore Linux is asked for huge pages (``madvise``, where
``transparent_hugepage`` allows it; PyTorch does the same for every tensor under
``THP_MEM_ALLOC_ENABLE=1``). Only whole pages inside the tensor are asked for, so it
does not take more memory.

This is not done in a virtual machine that returns free memory to its host while it
runs. There the host has taken the free huge pages and must find them again first. That
takes longer than to clear small pages that were in use a moment ago.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_MADV_HUGEPAGE = 14


_HUGE_PAGE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
#: The smallest free block, as a power of two of pages, that is reported to the host, or
#: -1 if none is.
_REPORTED = Path("/sys/module/page_reporting/parameters/page_reporting_order")


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


@functools.cache
def _huge_page() -> int:
    """Return the bytes of a huge page.

    It is 0 if there are none, or if they cost more than they save.
    """
    reported = _number(_REPORTED)
    # the kernel prints its -1 without a sign
    taken_back = reported is not None and 0 <= reported < 2**31
    return 0 if taken_back else _number(_HUGE_PAGE) or 0


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``torch.empty``, on huge pages if possible. If the request fails, only
    time is lost.
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and not torch.compiler.is_compiling() and (page := _huge_page()):
        begin = -(-out.data_ptr() // page) * page
        end = (out.data_ptr() + out.nbytes) // page * page
        if end > begin:
            _libc().madvise(begin, end - begin, _MADV_HUGEPAGE)
    return out
