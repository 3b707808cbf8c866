"""Rows in Triton: masks, weights, and a loss program on stored rows, a launch each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...triton_kernels import metrics as metric_kernels
from ...triton_kernels import rows as kernels
from ...triton_kernels.row_config import row_config
from ..formula.loss_program import ONE_PASS, Program
from ..formula.monitor import Monitor
from ..rows.primitives import METRICS, Masked, RowPrimitives, Runs, Weighing
from .triton_cache import monitor_function, program_function
from .triton_coupled import couple
from .triton_ratios import adjoint, ratio
from .triton_row_launch import launch, places, strides_of, way
from .triton_statistics import along, quantile, total


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
        strides = [x for t in (ids, mask, denominator) for x in strides_of(t, runs.length)]
        launch(
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
    launch(
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
        *[strides_of(t, n)[1] for t in (ids, mask, denominator)],
        runs.sequences.bit_length(),
        RUNS=way(runs).value,
        **kinds,
        BLOCK=block,
    )
    found = runs._replace(offsets=offsets, owner=owner)
    return Masked(out, keep, counted, lengths, found, trust=trust)


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
    launch(
        kernels.weigh_kernel,
        -(-n // block),
        w.device,
        masked.keep,
        masked.lengths,
        places(runs, masked.keep)[1],
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
    launch(
        kernels.regroup_kernel,
        count + -(-n // block) + 1,
        device,
        ids,
        places(runs, masked.keep)[1],
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
    launch(
        kernels.measure_kernel,
        runs.sequences,
        weight.device,
        weight,
        masked.keep,
        *places(runs, masked.keep),
        lengths,
        runs.length,
        runs.rows,
        RUNS=way(runs).value,
        BLOCK=row_config().block(runs.length),
    )
    return masked._replace(lengths=lengths, weight=weight)


def spread(masked: Masked, values: Tensor) -> Tensor:
    runs, trust, block = masked.runs, masked.trust, row_config().packed
    assert runs.owner is not None
    out = torch.empty(runs.rows, dtype=torch.float32, device=values.device)
    launch(
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
    launch(
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
    launch(
        metric_kernels.sums_kernel,
        sequences,
        like.device,
        *stored,
        n,
        masked.keep,
        *places(runs, masked.keep),
        params,
        parts,
        runs.length,
        n,
        RUNS=way(runs).value,
        PROGRAM=monitor_function(monitor),
        GIVEN="log_ratio" in leaves,
        BLOCK=min(sizes.evaluated, sizes.block(runs.length)),
    )
    sums = torch.empty((len(names), 2), dtype=torch.float32, device=like.device)
    values = torch.empty(len(names), dtype=torch.float32, device=like.device)
    launch(
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
    couple=couple,
)
