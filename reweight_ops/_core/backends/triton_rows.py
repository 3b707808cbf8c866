"""Rows in Triton: masks, weights, statistics, sequence ratios, and a loss program on
stored rows, one launch each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...triton_kernels import along as along_kernels
from ...triton_kernels import batch as batch_kernels
from ...triton_kernels import metrics as metric_kernels
from ...triton_kernels import rows as kernels
from ...triton_kernels.row_config import row_config
from ..formula.loss_program import ONE_PASS, Program
from ..formula.monitor import Monitor
from ..rows.constants import parameter_vector
from ..rows.primitives import (
    METRICS,
    Averaged,
    Masked,
    RowPrimitives,
    Runs,
    Statistic,
    Weighing,
)
from . import triton_launch
from .triton_cache import monitor_function, program_function


def _launch(
    kernel: Any, grid: int, device: torch.device, *args: Any, BLOCK: int, **meta: Any
) -> None:
    shape, wave = row_config().launch(BLOCK), triton_launch.wave(device)
    triton_launch.launch(kernel, grid, *args, BLOCK=BLOCK, **meta, shape=shape, wave=wave)


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
            BLOCK=row_config().block(runs.length),
        )
        return Masked(out, keep, counted, lengths, runs)
    offsets = None if runs.offsets is None else runs.offsets.contiguous()
    where = runs.owner if offsets is None else offsets
    assert where is not None
    owner = torch.empty(n, dtype=torch.int64, device=device)
    trust, block = torch.empty((), dtype=torch.float32, device=device), row_config().packed
    _launch(
        kernels.pack_kernel,
        runs.sequences + -(-n // block) + 1,
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
        BLOCK=block,
    )
    found = runs._replace(offsets=offsets, owner=owner)
    return Masked(out, keep, counted, lengths, found, trust=trust)


def _way(runs: Runs) -> Any:
    """Return how the rows are cut into sequences, as the kernels receive it."""
    if runs.length:
        return kernels.EQUAL
    return kernels.BY_INDEX if runs.offsets is None else kernels.BY_OFFSETS


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
    runs, trust, block = masked.runs, masked.trust, row_config().weighed
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
        -(-n // block),
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
        BLOCK=block,
    )
    return w


def regroup(masked: Masked, ids: Tensor, count: int) -> tuple[Masked, Tensor]:
    runs, trust, device = masked.runs, masked.trust, masked.keep.device
    n, sequences = runs.rows, runs.sequences
    index = torch.empty(sequences, dtype=torch.int64, device=device)
    owner = torch.empty(n, dtype=torch.int64, device=device)
    lengths = torch.empty((2, count), dtype=torch.int32, device=device)
    found, block = torch.empty((), dtype=torch.float32, device=device), row_config().packed
    _launch(
        kernels.regroup_kernel,
        count + -(-n // block) + 1,
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
        BLOCK=block,
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
        BLOCK=row_config().block(runs.length),
    )
    return masked._replace(lengths=lengths, weight=weight)


def spread(masked: Masked, values: Tensor) -> Tensor:
    runs, trust, block = masked.runs, masked.trust, row_config().packed
    assert runs.owner is not None
    out = torch.empty(runs.rows, dtype=torch.float32, device=values.device)
    _launch(
        kernels.spread_kernel,
        -(-runs.rows // block),
        values.device,
        values,
        runs.owner,
        out if trust is None else trust,
        out,
        runs.rows,
        runs.sequences,
        values.stride(0),
        HAS_TRUST=trust is not None,
        BLOCK=block,
    )
    return out


def ratio(masked: Masked, averaged: Averaged) -> tuple[Tensor, Tensor]:
    if averaged.along:
        return _prefix(masked, averaged)
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
        BLOCK=row_config().block(runs.length),
    )
    return found, means


def adjoint(
    masked: Masked, averaged: Averaged, means: Tensor, d_ratio: Tensor, d_logp: Tensor
) -> None:
    runs = masked.runs
    if averaged.along:
        block = row_config().part
        _launch(
            along_kernels.prefix_adjoint_kernel,
            -(-runs.rows // block),
            d_logp.device,
            averaged.logp,
            d_ratio,
            d_logp,
            masked.keep,
            averaged.params,
            means,
            runs.rows,
            BLOCK=block,
        )
        return
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
        BLOCK=row_config().block(runs.length),
    )


def _drifts(averaged: Averaged) -> list[Tensor]:
    """Return the log-probs and advantages, or any other tensor for one that is not
    read.
    """
    logp = averaged.logp
    return [logp, *(logp if t is None else t for t in (averaged.old_logp, averaged.adv))]


def _prefix(masked: Masked, averaged: Averaged) -> tuple[Tensor, Tensor]:
    runs, logp = masked.runs, averaged.logp
    found, sums = torch.empty_like(logp), torch.empty_like(logp)
    _launch(
        along_kernels.prefix_kernel,
        _all_sequences(runs),
        logp.device,
        logp,
        logp if averaged.old_logp is None else averaged.old_logp,
        masked.keep,
        *_places(runs, masked.keep),
        averaged.params,
        found,
        sums,
        runs.length,
        runs.rows,
        runs.sequences,
        RUNS=_way(runs).value,
        HAS_OLD=averaged.old_logp is not None,
        BLOCK=_scanned(runs),
    )
    return found, sums


def _scanned(runs: Runs) -> int:
    """Return how many rows a sum along a sequence takes at a time."""
    sizes = row_config()
    block: int = min(sizes.scanned, sizes.block(runs.length))
    return block


def _all_sequences(runs: Runs) -> int:
    """Return the number of sequences. Packed rows of none are one more."""
    return runs.sequences + (not runs.length)


def _values(
    masked: Masked, values: Tensor | float, into: Tensor | None
) -> tuple[Tensor, float, Tensor]:
    """Return values as a kernel receives them, a tensor and a number of which one is
    read, and the memory of its result.
    """
    if into is None:
        into = torch.empty(masked.runs.rows, dtype=torch.float32, device=masked.keep.device)
    return (values, 0.0, into) if isinstance(values, Tensor) else (into, float(values), into)


_STATISTICS = {
    "sum": batch_kernels.SUM,
    "mean": batch_kernels.MEAN,
    "max": batch_kernels.LARGEST,
    "min": batch_kernels.LEAST,
}


def total(
    masked: Masked,
    values: Tensor | float,
    statistic: Statistic,
    per_sequence: bool,
    into: Tensor | None = None,
) -> Tensor:
    runs, kind = masked.runs, _STATISTICS[statistic].value
    given, number, out = _values(masked, values, into)
    if per_sequence:
        _launch(
            batch_kernels.sequence_total_kernel,
            _all_sequences(runs),
            out.device,
            given,
            masked.keep,
            *_places(runs, masked.keep),
            out,
            number,
            runs.length,
            runs.rows,
            runs.sequences,
            RUNS=_way(runs).value,
            STATISTIC=kind,
            GIVEN=isinstance(values, Tensor),
            BLOCK=row_config().block(runs.length),
        )
        return out
    block = row_config().part
    blocks = -(-runs.rows // block)
    parts = torch.empty((2, blocks), dtype=torch.float64, device=out.device)
    _launch(
        batch_kernels.parts_kernel,
        blocks,
        out.device,
        given,
        masked.keep,
        parts,
        number,
        runs.rows,
        STATISTIC=kind,
        GIVEN=isinstance(values, Tensor),
        BLOCK=block,
    )
    _launch(
        batch_kernels.total_kernel,
        blocks,
        out.device,
        parts,
        out,
        runs.rows,
        blocks,
        STATISTIC=kind,
        BLOCK=block,
    )
    return out


def quantile(
    masked: Masked, ordered: Tensor, q: float, nearest: bool, into: Tensor | None = None
) -> Tensor:
    runs, block = masked.runs, row_config().part
    out = torch.empty_like(ordered) if into is None else into
    _launch(
        batch_kernels.quantile_kernel,
        -(-runs.rows // block),
        out.device,
        ordered,
        masked.lengths,
        out,
        q,
        runs.rows,
        runs.sequences,
        NEAREST=nearest,
        BLOCK=block,
    )
    return out


def along(
    masked: Masked,
    values: Tensor | float,
    decay: float | Tensor,
    reverse: bool,
    into: Tensor | None = None,
) -> Tensor:
    runs, decays = masked.runs, isinstance(decay, Tensor) or decay != 1
    given, number, out = _values(masked, values, into)
    if not isinstance(decay, Tensor):
        # in fp64, because its error grows with every power
        decay = parameter_vector((decay,), torch.float64, out.device) if decays else out
    _launch(
        along_kernels.along_kernel,
        _all_sequences(runs),
        out.device,
        given,
        decay,
        masked.keep,
        *_places(runs, masked.keep),
        out,
        number,
        runs.length,
        runs.rows,
        runs.sequences,
        RUNS=_way(runs).value,
        GIVEN=isinstance(values, Tensor),
        DECAYS=decays,
        REVERSE=reverse,
        BLOCK=_scanned(runs),
    )
    return out


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
    into: Tensor | None = None,
) -> Tensor:
    n, given, block = row_weights.size(-1), "log_ratio" in leaves, row_config().evaluated
    out = (
        torch.empty((len(outputs), n), dtype=torch.float32, device=params.device)
        if into is None
        else into
    )
    if not n:
        return out
    shared = row_weights.size(0) == 1 or row_weights.stride(0) == 0
    weights = row_weights[0].contiguous() if shared else row_weights.contiguous()
    stored = [leaves[name].contiguous() if name in leaves else weights for name in _ORDER]
    _launch(
        kernels.evaluate_kernel,
        -(-n // block),
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
        BLOCK=block,
    )
    return out


def metrics(
    masked: Masked,
    monitor: Monitor,
    params: Tensor,
    leaves: dict[str, Tensor],
    names: tuple[str, ...],
) -> tuple[Tensor, Tensor]:
    runs, trust, like, sizes = masked.runs, masked.trust, leaves["logp"], row_config()
    n, sequences = runs.rows, runs.sequences
    parts = torch.empty(
        (metric_kernels.SUMS.value, sequences), dtype=torch.float32, device=like.device
    )
    names_in_order = (*_ORDER, "d_logp", "d_entropy", "factor", "table")
    stored = [leaves.get(name, like).contiguous() for name in names_in_order]
    _launch(
        metric_kernels.sums_kernel,
        sequences,
        like.device,
        *stored,
        n,
        masked.keep,
        *_places(runs, masked.keep),
        params,
        parts,
        runs.length,
        n,
        RUNS=_way(runs).value,
        PROGRAM=monitor_function(monitor),
        GIVEN="log_ratio" in leaves,
        BLOCK=min(sizes.evaluated, sizes.block(runs.length)),
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
        BLOCK=sizes.evaluated,
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
    evaluate=evaluate_rows,
    total=total,
    along=along,
    quantile=quantile,
)
