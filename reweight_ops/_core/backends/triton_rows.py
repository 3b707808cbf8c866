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
    values: Tensor | None = None,
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
        rows = None if values is None else torch.empty(n, dtype=torch.float32, device=device)
        strides = [x for t in (ids, mask, denominator, values) for x in strides_of(t, runs.length)]
        launch(
            kernels.mask_kernel,
            runs.sequences,
            device,
            *given,
            keep if values is None else values,
            *results,
            keep if rows is None else rows,
            lengths,
            runs.length,
            n,
            *strides,
            **kinds,
            HAS_VALUES=values is not None,
            BLOCK=row_config().block(runs.length),
        )
        return Masked(out, keep, counted, lengths, runs, values=rows)
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


#: The divisors that are a count of the call.
_COUNTS = {
    None: kernels.UNDIVIDED,
    "rows": kernels.BY_ROWS,
    "sequences": kernels.BY_SEQUENCES,
}


def _divisor(divisor: Any) -> tuple[Any, float]:
    """Return how a kernel divides, and by which number."""
    if divisor is None or isinstance(divisor, str):
        return _COUNTS[divisor], 1.0
    if isinstance(divisor, Tensor):
        return kernels.BY_TENSOR, 1.0
    return kernels.BY_VALUE, float(divisor)


def weigh(
    masked: Masked,
    weighings: tuple[Weighing | None, ...],
    scale: Any,
    factor: Tensor | None,
    into: Tensor | None = None,
) -> Tensor:
    runs, trust, block = masked.runs, masked.trust, row_config().weighed
    n, keep = runs.rows, masked.keep
    w = (
        torch.empty((len(weighings), n), dtype=torch.float32, device=keep.device)
        if into is None
        else into
    )
    unlike = list({id(x): x for x in weighings if x is not None}.values())
    tensors = {id(x.divisor): x.divisor for x in unlike if isinstance(x.divisor, Tensor)}
    if len(tensors) > 1:  # a launch reads one
        for k, weighing in enumerate(weighings):
            if weighing is not None:
                weigh(masked, (weighing,), scale, None if k else factor, w[k : k + 1])
        return w
    divisors = [_divisor(x.divisor) for x in unlike]
    stored = isinstance(scale, Tensor)
    scaled = kernels.BY_TENSOR if stored else kernels.UNDIVIDED if scale == 1 else kernels.BY_VALUE
    of = [next((j for j, y in enumerate(unlike) if x is y), -1) for x in weighings]
    pointers = [trust, masked.weights, masked.sums, *tensors.values(), *[None] * (not tensors)]
    pointers += [scale if stored else None, factor]
    launch(
        kernels.weigh_kernel,
        -(-n // block),
        w.device,
        keep,
        masked.lengths,
        places(runs, keep)[1],
        *[w if t is None else t for t in pointers],
        w,
        runs.length,
        n,
        runs.sequences,
        tuple([number for _, number in divisors]),
        tuple([1.0 if x.horizon is None else float(x.horizon) for x in unlike]),
        1.0 if stored else float(scale),
        DIVIDE=tuple([by.value for by, _ in divisors]),
        PER_LENGTH=tuple([x.per_length for x in unlike]),
        HORIZON=tuple([x.horizon is not None for x in unlike]),
        WEIGHT=tuple([-1 if x.weight is None else x.weight for x in unlike]),
        OF=tuple(of),
        SCALE_BY=scaled.value,
        PACKED=not runs.length,
        HAS_TRUST=trust is not None,
        HAS_FACTOR=factor is not None,
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


def measure(masked: Masked, weights: Tensor) -> Masked:
    runs, count = masked.runs, len(weights)
    sums = torch.empty((count, runs.sequences), dtype=torch.float32, device=weights.device)
    launch(
        kernels.measure_kernel,
        sums.numel(),
        weights.device,
        weights,
        masked.keep,
        *places(runs, masked.keep),
        sums,
        runs.length,
        runs.rows,
        runs.sequences,
        RUNS=way(runs).value,
        BLOCK=row_config().block(runs.length),
    )
    return masked._replace(weights=weights, sums=sums)


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
    copies=True,
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
