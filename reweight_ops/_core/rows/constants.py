"""Numbers as vectors on a device, uploaded once and kept."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor


class _Constants:
    """Uploaded vectors, each an attribute: torch.compile looks attributes up when it needs them, but reads a dictionary once and for all."""


_constants = _Constants()


#: What a vector holds, its dtype and device, to its attribute.
_names: dict[tuple[tuple[float, ...], torch.dtype, torch.device], str] = {}


_serial = itertools.count()  # and not len(_names): two threads may upload at once


@torch.compiler.assume_constant_result
def _upload(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> str:
    # Uploaded once and kept: an upload inside a call would synchronise, and is illegal under CUDA-graph capture. Returns a name and no
    # tensor, so that torch.compile finds the finished tensor in the global above.
    what = (values, dtype, device)
    if what not in _names:
        name = f"vector{next(_serial)}"
        with torch.inference_mode(False), torch._C._DisableFuncTorch():  # what is kept outlives any of torch.func's transforms
            setattr(_constants, name, torch.tensor(values, dtype=dtype, device=device))
        _names[what] = name
    return _names[what]


def parameter_vector(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers and 0-d tensors as one vector. Numbers are cached per device; tensors must live on the device already."""
    if not any(isinstance(v, Tensor) for v in values):
        vector: Tensor = getattr(_constants, _upload(tuple([float(v) for v in values]), dtype, device))
        return vector
    fixed = getattr(_constants, _upload(tuple([0.0 if isinstance(v, Tensor) else float(v) for v in values]), dtype, device))
    return torch.stack([v.detach().to(dtype) if isinstance(v, Tensor) else fixed[i] for i, v in enumerate(values)])
