"""Packed rows in Triton: one launch per primitive, one program per row.

The lengths of the rows are not known here, so one launch shape serves all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton_kernels import packed
from ...triton_kernels.config import Config, Launch, config_for
from . import triton_launch
from .base import DERIVATIVES, STATS, PackedRows

#: Threads and registers of a program. A row at any address takes more registers than
#: one that begins at a multiple of 16 bytes.
_LAUNCH = Launch(128, 128)


class _Call:
    """The common arguments of the two launches."""

    def __init__(self, rows: PackedRows) -> None:
        capped, size = rows.softcap != float("inf"), rows.values.element_size()
        self.config: Config = config_for(1, size, capped)
        self.softcap = rows.softcap if capped else 1.0
        self.tile = {"CAP": capped, "E": self.config.vector, "ALIGN": size}
        self.t_stride = 0 if rows.temperature.numel() == 1 else 1
        self.wave = triton_launch.wave(rows.values.device)


def packed_stats(rows: PackedRows, stats: tuple[str, ...]) -> Tensor:
    n = rows.ids.numel()
    out = torch.empty((len(stats), n), dtype=torch.float32, device=rows.values.device)
    if not n:
        return out
    call = _Call(rows)
    triton_launch.launch(
        packed.packed_stats_kernel,
        n,
        rows.values,
        rows.bounds,
        rows.ids,
        rows.temperature,
        out,
        n,
        call.t_stride,
        call.softcap,
        STATS=tuple(stats.index(name) if name in stats else -1 for name in STATS),
        SEGMENT=call.config.segment,
        SLOTS=call.config.slots,
        VECTORS=call.config.vectors,
        **call.tile,
        AHEAD=_LAUNCH.ahead,
        shape=_LAUNCH,
        wave=call.wave,
    )
    return out


def packed_grad(
    rows: PackedRows, stats: dict[str, Tensor], derivatives: dict[str, Tensor | None], out: Tensor
) -> None:
    n = rows.ids.numel()
    if not n:
        return
    # The kernel's constants exclude what is absent; its address is then never read.
    call, by, nothing = (
        _Call(rows),
        [derivatives.get(name) for name in DERIVATIVES],
        stats["logp"],
    )
    triton_launch.launch(
        packed.packed_gradient_kernel,
        n,
        rows.values,
        out,
        rows.bounds,
        rows.ids,
        rows.temperature,
        stats["logp"],
        stats["lse"],
        stats.get("lse_low", nothing),
        stats.get("entropy", nothing),
        stats.get("log_sum_p_sq", nothing),
        *(nothing if c is None else c for c in by),
        n,
        call.t_stride,
        call.softcap,
        GIVEN=tuple(c is not None for c in by),
        LOW="lse_low" in stats,
        SLOTS=_LAUNCH.threads,
        VECTORS=call.config.vectors,
        **call.tile,
        GRAD_ALIGN=16
        if triton_launch.begin_alike(rows.values, out)
        else rows.values.element_size(),
        EMULATE=triton_launch.interpreted() and rows.values.dtype == torch.bfloat16,
        shape=_LAUNCH,
        wave=call.wave,
    )
