"""The ids that a sampler keeps of a row of logits: top-k, top-p and min-p, as vLLM
orders them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidCall
from ..rows.structure import is_readable

#: The number of elements that are sorted at once.
_BLOCK = {"cpu": 1 << 22, "cuda": 1 << 26}


def kept_by_sampler(logits: Tensor, settings: dict[str, Any]) -> Iterator[Tensor]:
    """Yield bool ``[n, V]`` for a few rows of ``R + (V,)`` logits at a time: which ids
    may be sampled.

    ``settings`` has top_k, top_p, min_p and temperature.
    """
    shape, columns = tuple(logits.shape[:-1]), logits.size(-1)
    rows = logits.reshape(-1, columns)
    per_row = {name: _per_row(name, value, shape, rows) for name, value in settings.items()}
    step = max(_BLOCK.get(logits.device.type, _BLOCK["cuda"]) // columns, 1)
    for first in range(0, rows.size(0), step):
        part = {
            name: value if not isinstance(value, Tensor) else value[first : first + step, None]
            for name, value in per_row.items()
        }
        yield _kept(rows[first : first + step].float(), **part)


def _kept(z: Tensor, top_k: Any, top_p: Any, min_p: Any, temperature: Any) -> Tensor:
    z = z / temperature
    if min_p is not None:
        p = z.softmax(-1)
        z = z.masked_fill(p < p.amax(-1, keepdim=True) * min_p, -math.inf)
    if top_k is None and top_p is None:
        return z > -math.inf
    ascending, ids = z.sort(stable=True, dim=-1)
    if top_k is not None:
        ascending = ascending.masked_fill(
            ascending < ascending.gather(-1, z.size(-1) - top_k), -math.inf
        )
    if top_p is not None:
        gone = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        gone[:, -1] = False  # at least one
        ascending = ascending.masked_fill(gone, -math.inf)
    return torch.zeros_like(z, dtype=torch.bool).scatter(-1, ids, ascending > -math.inf)


#: For each setting: its least and largest value, whether the least is allowed, and the
#: words for the allowed values.
_RANGES = {
    "top_k": (-1, math.inf, True, "a count, or 0 or -1 for all"),
    "top_p": (0, 1, False, "above 0 and at most 1"),
    "min_p": (0, 1, True, "from 0 to 1"),
    "temperature": (0, sys.float_info.max, False, "a positive number"),
}
#: The value with which a setting has no effect.
_WITHOUT = {"top_p": 1.0, "min_p": 0.0}


def _per_row(name: str, value: Any, shape: tuple[int, ...], rows: Tensor) -> Any:
    """Return a setting as ``[N]``, or None if it has no effect."""
    if value is None or (not isinstance(value, Tensor) and value == _WITHOUT.get(name)):
        return None
    _check(name, value, shape, rows.device)
    dtype = torch.int64 if name == "top_k" else torch.float32
    found = (
        value.to(dtype)
        if isinstance(value, Tensor)
        else torch.full((), value, dtype=dtype, device=rows.device)
    )
    if name == "top_k":
        found = torch.where(found <= 0, rows.size(1), found).clamp(max=rows.size(1))
    return found.expand(shape).reshape(-1)


def _check(name: str, value: Any, shape: tuple[int, ...], device: torch.device) -> None:
    least, most, closed, words = _RANGES[name]
    op = "SamplingMask.from_logits"
    if isinstance(value, Tensor):
        if (
            tuple(value.shape) not in ((), shape)
            or value.device != device
            or (name == "top_k" and value.is_floating_point())
        ):
            got = f"{tuple(value.shape)} {value.dtype} on {value.device}"
            raise InvalidCall(
                f"{op}: {name} is {got}, expected {words}: one number, or one per row, {shape} "
                f"on {device}."
            )
        if is_readable(value) and not bool(
            ((value >= least if closed else value > least) & (value <= most)).all()
        ):
            raise InvalidCall(f"{op}: {name} has a value that is not {words}.")
        return
    numbers = int if name == "top_k" else (int, float)
    ok = (
        isinstance(value, numbers)
        and not isinstance(value, bool)
        and (least < value <= most or (closed and value == least))
    )
    if not ok:
        raise InvalidCall(f"{op}: {name} is {value!r}, expected {words}.")
