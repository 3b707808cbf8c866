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
from ..rows.primitives import METRICS, Averaged, Masked, RowPrimitives, Runs, Weighing
from . import triton_launch
from .triton_cache import monitor_function, program_function

_LARGEST = 4096
_EVALUATED = 256
_WEIGHED = 1024
#: Rows of packed sequences that are taken at a time. It does not depend on their
#: lengths, which differ from batch to batch.
_PACKED = 1024

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


def mask(
    ids: Tensor | None,
    mask: Tensor | None,
    denominator: Tensor | None,
    runs: Runs,
    device: torch.device,
) -> Masked:
    n = runs.rows
    keep = torch.empty(n, dtype=torch.bool, device=device)
    out = None if ids is None else torch.empty(n, dtype=torch.int64, device=device)
    counted = keep if denominator is None else torch.empty(n, dtype=torch.bool, device=device)
    lengths = torch.empty((2, runs.sequences), dtype=torch.int32, device=device)
    given = [keep if t is None else t for t in (ids, mask, denominator)]
    results = [keep if out is None else out, keep, counted]
    kinds = {
        "HAS_IDS": ids is not None,
        "HAS_MASK": mask is not None,
        "HAS_DENOMINATOR": denominator is not None,
    }
    if runs.length:
        strides = [x for t in (ids, mask, denominator) for x in _strides(t, runs.length)]
        block = _block(runs.length)
        _launch(
            kernels.mask_kernel,
            runs.sequences,
            device,
            *given,
            *results,
            lengths,
            runs.length,
            n,
            *strides,
            **kinds,
            BLOCK=block,
        )
        return Masked(out, keep, counted, lengths, runs)
    offsets = None if runs.offsets is None else runs.offsets.contiguous()
    where = runs.owner if offsets is None else offsets
    assert where is not None
    owner = torch.empty(n, dtype=torch.int64, device=device)
    trust = torch.empty((), dtype=torch.float32, device=device)
    _launch(
        kernels.pack_kernel,
        runs.sequences + -(-n // _PACKED) + 1,
        device,
        *given,
        where.contiguous(),
        *results,
        owner,
        lengths,
        trust,
        n,
        runs.sequences,
        *[_strides(t, n)[1] for t in (ids, mask, denominator)],
        runs.sequences.bit_length(),
        RUNS=_way(runs).value,
        **kinds,
        BLOCK=_PACKED,
    )
    found = runs._replace(offsets=offsets, owner=owner)
    return Masked(out, keep, counted, lengths, found, trust=trust)


def _way(runs: Runs) -> Any:
    """Return how the rows are cut into sequences, as the kernels receive it."""
    if runs.length:
        return kernels.EQUAL
    return kernels.BY_INDEX if runs.offsets is None else kernels.BY_OFFSETS


def _block_of(runs: Runs) -> int:
    return _block(runs.length) if runs.length else _PACKED


def _places(runs: Runs, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return the offsets and the owners, or any other tensor for one that is not
    read.
    """
    return (
        other if runs.offsets is None else runs.offsets,
        other if runs.owner is None else runs.owner,
    )


def _number(value: Any) -> tuple[float, bool]:
    """Return a number as the kernel receives it, and whether it is a tensor."""
    return (1.0, True) if isinstance(value, Tensor) else (float(value), False)


def weigh(
    masked: Masked,
    weighing: Weighing,
    scale: Any,
    factor: Tensor | None,
    terms: int,
    into: Tensor | None = None,
) -> Tensor:
    runs, trust = masked.runs, masked.trust
    n, sequences = runs.rows, runs.sequences
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
    pointers = [t if isinstance(t, Tensor) else w for t in (masked.weight, divisor, scale, factor)]
    _launch(
        kernels.weigh_kernel,
        -(-n // _WEIGHED),
        w.device,
        masked.keep,
        masked.lengths,
        _places(runs, masked.keep)[1],
        w if trust is None else trust,
        *pointers,
        w,
        runs.length,
        n,
        sequences,
        by,
        1.0 if horizon is None else float(horizon),
        times,
        DIVIDE=divide.value,
        PER_LENGTH=weighing.per_length,
        HORIZON=horizon is not None,
        SCALE_BY=scaled.value,
        PACKED=not runs.length,
        HAS_TRUST=trust is not None,
        HAS_WEIGHT=masked.weight is not None,
        HAS_FACTOR=factor is not None,
        TERMS=terms,
        BLOCK=_WEIGHED,
    )
    return w


def regroup(masked: Masked, ids: Tensor, count: int) -> tuple[Masked, Tensor]:
    runs, trust, device = masked.runs, masked.trust, masked.keep.device
    n, sequences = runs.rows, runs.sequences
    index = torch.empty(sequences, dtype=torch.int64, device=device)
    owner = torch.empty(n, dtype=torch.int64, device=device)
    lengths = torch.empty((2, count), dtype=torch.int32, device=device)
    found = torch.empty((), dtype=torch.float32, device=device)
    _launch(
        kernels.regroup_kernel,
        count + -(-n // _PACKED) + 1,
        device,
        ids,
        _places(runs, masked.keep)[1],
        masked.lengths,
        found if trust is None else trust,
        index,
        owner,
        lengths,
        found,
        runs.length,
        n,
        sequences,
        count,
        ids.stride(0),
        PACKED=not runs.length,
        HAS_TRUST=trust is not None,
        BLOCK=_PACKED,
    )
    by_prompt = Runs(n, count, owner=owner)
    return masked._replace(lengths=lengths, runs=by_prompt, trust=found), index


def measure(masked: Masked, weight: Tensor) -> Masked:
    runs = masked.runs
    weight = weight.float().expand(runs.rows).contiguous()
    lengths = torch.empty((2, runs.sequences), dtype=torch.float32, device=weight.device)
    _launch(
        kernels.measure_kernel,
        runs.sequences,
        weight.device,
        weight,
        masked.keep,
        *_places(runs, masked.keep),
        lengths,
        runs.length,
        runs.rows,
        RUNS=_way(runs).value,
        BLOCK=_block_of(runs),
    )
    return masked._replace(lengths=lengths, weight=weight)


def spread(masked: Masked, values: Tensor) -> Tensor:
    runs, trust = masked.runs, masked.trust
    assert runs.owner is not None
    out = torch.empty(runs.rows, dtype=torch.float32, device=values.device)
    _launch(
        kernels.spread_kernel,
        -(-runs.rows // _PACKED),
        values.device,
        values,
        runs.owner,
        out if trust is None else trust,
        out,
        runs.rows,
        runs.sequences,
        values.stride(0),
        HAS_TRUST=trust is not None,
        BLOCK=_PACKED,
    )
    return out


def ratio(masked: Masked, averaged: Averaged) -> tuple[Tensor, Tensor]:
    runs, logp = masked.runs, averaged.logp
    found, means = (
        torch.empty_like(logp),
        torch.empty(runs.sequences, dtype=torch.float32, device=logp.device),
    )
    _launch(
        kernels.ratio_kernel,
        runs.sequences,
        logp.device,
        *_drifts(averaged),
        masked.keep,
        masked.lengths,
        *_places(runs, masked.keep),
        averaged.params,
        found,
        means,
        runs.length,
        runs.rows,
        RUNS=_way(runs).value,
        HAS_OLD=averaged.old_logp is not None,
        CLIPPED=averaged.adv is not None,
        NORMALIZE=averaged.normalize,
        BLOCK=_block_of(runs),
    )
    return found, means


def adjoint(
    masked: Masked, averaged: Averaged, means: Tensor, d_ratio: Tensor, d_logp: Tensor
) -> None:
    runs = masked.runs
    _launch(
        kernels.adjoint_kernel,
        runs.sequences,
        d_logp.device,
        *_drifts(averaged),
        d_ratio,
        d_logp,
        masked.keep,
        masked.lengths,
        *_places(runs, masked.keep),
        averaged.params,
        means,
        runs.length,
        runs.rows,
        RUNS=_way(runs).value,
        HAS_OLD=averaged.old_logp is not None,
        CLIPPED=averaged.adv is not None,
        NORMALIZE=averaged.normalize,
        SHARED=averaged.shared,
        BLOCK=_block_of(runs),
    )


def _drifts(averaged: Averaged) -> list[Tensor]:
    """Return the log-probs and advantages, or any other tensor for one that is not
    read.
    """
    logp = averaged.logp
    return [logp, *(logp if t is None else t for t in (averaged.old_logp, averaged.adv))]


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
    monitor: Monitor,
    params: Tensor,
    leaves: dict[str, Tensor],
    names: tuple[str, ...],
) -> tuple[Tensor, Tensor]:
    runs, trust, like = masked.runs, masked.trust, leaves["logp"]
    n, sequences = runs.rows, runs.sequences
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
        *_places(runs, masked.keep),
        params,
        parts,
        runs.length,
        n,
        RUNS=_way(runs).value,
        PROGRAM=monitor_function(monitor),
        GIVEN="log_ratio" in leaves,
        BLOCK=min(_EVALUATED, _block_of(runs)),
    )
    sums = torch.empty((len(names), 2), dtype=torch.float32, device=like.device)
    values = torch.empty(len(names), dtype=torch.float32, device=like.device)
    _launch(
        metric_kernels.metrics_kernel,
        1,
        like.device,
        parts,
        masked.lengths,
        parts if trust is None else trust,
        sums,
        values,
        sequences,
        len(names),
        HAS_TRUST=trust is not None,
        AT=tuple(names.index(name) if name in names else -1 for name in METRICS),
        BLOCK=_EVALUATED,
    )
    return sums, values


PRIMITIVES = RowPrimitives(
    name="triton",
    mask=mask,
    weigh=weigh,
    regroup=regroup,
    measure=measure,
    spread=spread,
    ratio=ratio,
    adjoint=adjoint,
    metrics=metrics,
)
