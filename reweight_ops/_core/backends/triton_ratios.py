"""Ratios of sequences, of their beginnings and of the call in Triton, and their
adjoints.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton_kernels import along as along_kernels
from ...triton_kernels import centred as centred_kernels
from ...triton_kernels import ratios as kernels
from ...triton_kernels.row_config import row_config
from ..rows.primitives import Averaged, Masked
from .triton_row_launch import all_sequences, launch, places, scanned, way


def ratio(masked: Masked, averaged: Averaged) -> tuple[Tensor, Tensor]:
    if averaged.over != "sequence":
        return (_prefix if averaged.over == "prefix" else _centred)(masked, averaged)
    runs, logp = masked.runs, averaged.logp
    found, means = (
        torch.empty_like(logp),
        torch.empty(runs.sequences, dtype=torch.float32, device=logp.device),
    )
    launch(
        kernels.ratio_kernel,
        runs.sequences,
        logp.device,
        *_drifts(averaged),
        masked.keep,
        masked.lengths,
        *places(runs, masked.keep),
        averaged.params,
        found,
        means,
        runs.length,
        runs.rows,
        RUNS=way(runs).value,
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
    block = row_config().part
    if averaged.over == "call":
        launch(
            centred_kernels.centre_adjoint_kernel,
            -(-runs.rows // block),
            d_logp.device,
            *_drifts(averaged)[:2],
            d_ratio,
            d_logp,
            masked.keep,
            averaged.params,
            means,
            runs.rows,
            HAS_OLD=averaged.old_logp is not None,
            BLOCK=block,
        )
        return
    if averaged.over == "prefix":
        launch(
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
    launch(
        kernels.adjoint_kernel,
        runs.sequences,
        d_logp.device,
        *_drifts(averaged),
        d_ratio,
        d_logp,
        masked.keep,
        masked.lengths,
        *places(runs, masked.keep),
        averaged.params,
        means,
        runs.length,
        runs.rows,
        RUNS=way(runs).value,
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
    launch(
        along_kernels.prefix_kernel,
        all_sequences(runs),
        logp.device,
        logp,
        logp if averaged.old_logp is None else averaged.old_logp,
        masked.keep,
        *places(runs, masked.keep),
        averaged.params,
        found,
        sums,
        runs.length,
        runs.rows,
        runs.sequences,
        RUNS=way(runs).value,
        HAS_OLD=averaged.old_logp is not None,
        BLOCK=scanned(runs),
    )
    return found, sums


def _centred(masked: Masked, averaged: Averaged) -> tuple[Tensor, Tensor]:
    rows, logp = masked.runs.rows, averaged.logp
    block, drifts = row_config().part, _drifts(averaged)[:2]
    blocks = -(-rows // block)
    parts = torch.empty((3, blocks), dtype=torch.float64, device=logp.device)
    found, centre = torch.empty_like(logp), logp.new_empty(2)
    kinds = {"HAS_OLD": averaged.old_logp is not None, "BLOCK": block}
    launch(
        centred_kernels.moments_kernel,
        blocks,
        logp.device,
        *drifts,
        masked.keep,
        parts,
        rows,
        **kinds,
    )
    launch(
        centred_kernels.centre_kernel,
        blocks,
        logp.device,
        *drifts,
        masked.keep,
        parts,
        averaged.params,
        found,
        centre,
        rows,
        blocks,
        BY_DEVIATION=averaged.normalize,
        **kinds,
    )
    return found, centre
