"""Statistics of each sequence or of the call, and sums along sequences, in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton_kernels import along as along_kernels
from ...triton_kernels import batch as batch_kernels
from ...triton_kernels.row_config import row_config
from ..rows.constants import parameter_vector
from ..rows.primitives import Masked, Statistic
from .triton_row_launch import all_sequences, launch, places, scanned, way

_STATISTICS = {
    "sum": batch_kernels.SUM,
    "mean": batch_kernels.MEAN,
    "max": batch_kernels.LARGEST,
    "min": batch_kernels.LEAST,
}


def _values(
    masked: Masked, values: Tensor | float, into: Tensor | None
) -> tuple[Tensor, float, Tensor]:
    """Return values as a kernel receives them, a tensor and a number of which one is
    read, and the memory of its result.
    """
    if into is None:
        into = torch.empty(masked.runs.rows, dtype=torch.float32, device=masked.keep.device)
    return (values, 0.0, into) if isinstance(values, Tensor) else (into, float(values), into)


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
        launch(
            batch_kernels.sequence_total_kernel,
            all_sequences(runs),
            out.device,
            given,
            masked.keep,
            *places(runs, masked.keep),
            out,
            number,
            runs.length,
            runs.rows,
            runs.sequences,
            RUNS=way(runs).value,
            STATISTIC=kind,
            GIVEN=isinstance(values, Tensor),
            BLOCK=row_config().block(runs.length),
        )
        return out
    block = row_config().part
    blocks = -(-runs.rows // block)
    parts = torch.empty((2, blocks), dtype=torch.float64, device=out.device)
    launch(
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
    launch(
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
    launch(
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
    launch(
        along_kernels.along_kernel,
        all_sequences(runs),
        out.device,
        given,
        decay,
        masked.keep,
        *places(runs, masked.keep),
        out,
        number,
        runs.length,
        runs.rows,
        runs.sequences,
        RUNS=way(runs).value,
        GIVEN=isinstance(values, Tensor),
        DECAYS=decays,
        REVERSE=reverse,
        BLOCK=scanned(runs),
    )
    return out
