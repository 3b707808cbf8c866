"""Rows in Triton: masks, weights, sequence ratios, and a loss program on stored rows,
one launch each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...triton_kernels import metrics as metric_kernels
from ...triton_kernels import rows as kernels
from ...triton_kernels.config import Launch
from ..formula.loss_program import ONE_PASS, Program
from ..formula.monitor import Monitor
from ..rows.primitives import METRICS, Masked, RowPrimitives, Weighing
from . import triton_launch
from .triton_cache import monitor_function, program_function

_LARGEST = 4096
_EVALUATED = 256

#: There are few rows, and a thread holds many numbers of each. It needs more registers
#: than a sweep may have, or they spill.
_REGISTERS = 128


def _block(run: int) -> int:
    """Return how many rows of a sequence are taken at a time."""
    return min(_LARGEST, max(64, 1 << (run - 1).bit_length()))


def _launch(
    kernel: Any, grid: int, device: torch.device, *args: Any, BLOCK: int, **meta: Any
) -> None:
    shape = Launch(min(256, max(64, BLOCK // 8)), _REGISTERS)
    triton_launch.launch(
        kernel, grid, *args, BLOCK=BLOCK, **meta, shape=shape, wave=triton_launch.wave(device)
    )


def _strides(t: Tensor | None, run: int) -> tuple[int, int]:
    """Return the stride between the first rows of two sequences, and the stride between
    two rows of one.
    """
    if t is None:
        return 0, 0
    return (t.stride(0) * run, t.stride(0)) if t.dim() == 1 else (t.stride(0), t.stride(1))


def mask(ids: Tensor, mask: Tensor | None, denominator: Tensor | None, run: int) -> Masked:
    n, device = ids.numel(), ids.device
    sequences = -(-n // run)
    out, keep = (
        torch.empty(n, dtype=torch.int64, device=device),
        torch.empty(n, dtype=torch.bool, device=device),
    )
    counted = keep if denominator is None else torch.empty(n, dtype=torch.bool, device=device)
    lengths = torch.empty((2, sequences), dtype=torch.int32, device=device)
    given = [ids if t is None else t for t in (ids, mask, denominator)]
    _launch(
        kernels.mask_kernel,
        sequences,
        device,
        *given,
        out,
        keep,
        counted,
        lengths,
        run,
        n,
        *_strides(ids, run),
        *_strides(mask, run),
        *_strides(denominator, run),
        HAS_MASK=mask is not None,
        HAS_DENOMINATOR=denominator is not None,
        BLOCK=_block(run),
    )
    return Masked(out, keep, counted, lengths)


def _number(value: Any) -> tuple[float, bool]:
    """Return a number as the kernel receives it, and whether it is a tensor."""
    return (1.0, True) if isinstance(value, Tensor) else (float(value), False)


def weigh(
    masked: Masked,
    run: int,
    weighing: Weighing,
    scale: Any,
    factor: Tensor | None,
    terms: int,
    into: Tensor | None = None,
) -> Tensor:
    n, sequences = masked.keep.numel(), masked.lengths.size(1)
    w = (
        torch.empty((terms, n), dtype=torch.float32, device=masked.keep.device)
        if into is None
        else into
    )
    divisor, horizon = weighing.divisor, weighing.horizon
    counts = {None: kernels.UNDIVIDED, "rows": kernels.BY_ROWS, "sequences": kernels.BY_SEQUENCES}
    if divisor is None or isinstance(divisor, str):
        by, divide = 1.0, counts[divisor]
    else:
        by, stored = _number(divisor)
        divide = kernels.BY_TENSOR if stored else kernels.BY_VALUE
    times, stored = _number(scale)
    scaled = kernels.BY_TENSOR if stored else kernels.UNDIVIDED if times == 1 else kernels.BY_VALUE
    pointers = [t if isinstance(t, Tensor) else w for t in (divisor, scale, factor)]
    _launch(
        kernels.weigh_kernel,
        sequences,
        w.device,
        masked.keep,
        masked.lengths,
        *pointers,
        w,
        run,
        n,
        sequences,
        by,
        1.0 if horizon is None else float(horizon),
        times,
        DIVIDE=divide.value,
        PER_LENGTH=weighing.per_length,
        HORIZON=horizon is not None,
        SCALE_BY=scaled.value,
        HAS_FACTOR=factor is not None,
        TERMS=terms,
        BLOCK=_block(run),
    )
    return w


def ratio(
    masked: Masked, run: int, logp: Tensor, old: Tensor | None, params: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    sequences = masked.lengths.size(1)
    found, means = (
        torch.empty_like(logp),
        torch.empty(sequences, dtype=torch.float32, device=logp.device),
    )
    _launch(
        kernels.ratio_kernel,
        sequences,
        logp.device,
        logp,
        logp if old is None else old,
        masked.keep,
        masked.lengths,
        params,
        found,
        means,
        run,
        HAS_OLD=old is not None,
        NORMALIZE=normalize,
        BLOCK=_block(run),
    )
    return found, means


def adjoint(
    masked: Masked,
    run: int,
    d_ratio: Tensor,
    d_logp: Tensor,
    params: Tensor,
    means: Tensor,
    normalize: bool,
    shared: bool,
) -> None:
    _launch(
        kernels.adjoint_kernel,
        masked.lengths.size(1),
        d_logp.device,
        d_ratio,
        d_logp,
        masked.keep,
        masked.lengths,
        params,
        means,
        run,
        NORMALIZE=normalize,
        SHARED=shared,
        BLOCK=_block(run),
    )


#: The leaves of a formula in the order in which the kernels take them.
_ORDER = (
    "logp",
    "old_logp",
    "ref_logp",
    "sampling_logp",
    "adv",
    "entropy",
    "log_sum_p_sq",
    "log_ratio",
)


def evaluate_rows(
    program: Program,
    params: Tensor,
    leaves: dict[str, Tensor],
    row_weights: Tensor,
    outputs: tuple[str, ...] = ONE_PASS,
    keep: Tensor | None = None,
) -> Tensor:
    n, given = row_weights.size(-1), "log_ratio" in leaves
    out = torch.empty((len(outputs), n), dtype=torch.float32, device=params.device)
    if not n:
        return out
    shared = row_weights.size(0) == 1 or row_weights.stride(0) == 0
    weights = row_weights[0].contiguous() if shared else row_weights.contiguous()
    stored = [leaves[name].contiguous() if name in leaves else weights for name in _ORDER]
    _launch(
        kernels.evaluate_kernel,
        -(-n // _EVALUATED),
        out.device,
        *stored,
        weights,
        0 if shared else n,
        params,
        weights if keep is None else keep,
        out,
        n,
        PROGRAM=program_function(program, given, outputs),
        GIVEN=given,
        HAS_KEEP=keep is not None,
        OUTPUTS=len(outputs),
        BLOCK=_EVALUATED,
    )
    return out


def metrics(
    masked: Masked,
    run: int,
    monitor: Monitor,
    params: Tensor,
    leaves: dict[str, Tensor],
    names: tuple[str, ...],
) -> tuple[Tensor, Tensor]:
    n, sequences, like = masked.keep.numel(), masked.lengths.size(1), leaves["logp"]
    parts = torch.empty(
        (metric_kernels.SUMS.value, sequences), dtype=torch.float32, device=like.device
    )
    stored = [leaves.get(name, like) for name in (*_ORDER, "d_logp", "d_entropy", "factor")]
    _launch(
        metric_kernels.sums_kernel,
        sequences,
        like.device,
        *stored,
        masked.keep,
        params,
        parts,
        run,
        n,
        PROGRAM=monitor_function(monitor),
        GIVEN="log_ratio" in leaves,
        BLOCK=min(_EVALUATED, _block(run)),
    )
    sums = torch.empty((len(names), 2), dtype=torch.float32, device=like.device)
    values = torch.empty(len(names), dtype=torch.float32, device=like.device)
    _launch(
        metric_kernels.metrics_kernel,
        1,
        like.device,
        parts,
        masked.lengths,
        sums,
        values,
        sequences,
        len(names),
        AT=tuple(names.index(name) if name in names else -1 for name in METRICS),
        BLOCK=_EVALUATED,
    )
    return sums, values


PRIMITIVES = RowPrimitives(mask=mask, weigh=weigh, ratio=ratio, adjoint=adjoint, metrics=metrics)
