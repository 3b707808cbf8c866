"""Reductions that couple tokens in Triton: contributions of rows, and slopes."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton_kernels import coupled as kernels
from ...triton_kernels.row_config import row_config
from ..rows.primitives import CoupledTerms, Coupling, Masked
from .triton_row_launch import launch, places, way

_KINDS = {
    "hinge": kernels.HINGE,
    "contrast": kernels.CONTRAST,
    "classification": kernels.CLASSIFICATION,
}
_PREFERS = {None: kernels.NOTHING, "length": kernels.SHORT, "advantages": kernels.ADVANTAGES}


def couple(masked: Masked, terms: CoupledTerms, into: Tensor) -> tuple[Tensor, Tensor]:
    runs, sizes, device = masked.runs, row_config(), into.device
    count, rows, sequences = len(terms.couplings), len(terms.weights), runs.sequences
    kinds = tuple(
        [kernels.LINEAR.value if c is None else _KINDS[c.kind].value for c in terms.couplings]
    )
    # the coupling that compares sequences, if any
    found = [(k, c) for k, c in enumerate(terms.couplings) if c is not None and c.prompts]
    at, coupling = found[0] if found else (-1, Coupling("hinge", (0, 0)))
    prompts = coupling.prompts
    index = None if prompts is None else prompts.index
    of_prompts = 0 if prompts is None else prompts.count
    size = 0 if prompts is None or index is not None else prompts.length

    sums = torch.empty((1 + count, sequences), dtype=torch.float64, device=device)
    shares = torch.empty((2, sequences), dtype=torch.float64, device=device)
    factors = torch.empty(count, dtype=torch.float64, device=device)
    present = torch.empty(of_prompts, dtype=torch.int32, device=device)
    weights = torch.empty((rows, runs.rows), dtype=torch.float32, device=device)
    unknown = torch.empty(runs.rows, dtype=torch.bool, device=device)
    first = 0 if found else 1
    launch(
        kernels.sequence_sums_kernel,
        sequences * (1 + count - first),
        device,
        terms.evaluated,
        terms.evaluated if terms.adv is None else terms.adv,
        masked.keep,
        *places(runs, masked.keep),
        sums,
        runs.length,
        runs.rows,
        sequences,
        first,
        RUNS=way(runs).value,
        BLOCK=sizes.block(runs.length),
    )
    launch(
        kernels.join_kernel,
        of_prompts + (index is not None) + count,
        device,
        sums,
        masked.lengths,
        masked.lengths if index is None else index,
        terms.numbers,
        shares,
        present,
        factors,
        size,
        sequences,
        of_prompts,
        KINDS=kinds,
        AT=at,
        PREFERS=_PREFERS[coupling.prefers].value,
        HARD=coupling.hard,
        BY_INDEX=index is not None,
        BLOCK=min(sizes.evaluated, sizes.block(size)),
    )
    launch(
        kernels.contributions_kernel,
        -(-runs.rows // sizes.evaluated),
        device,
        terms.evaluated,
        terms.weights,
        terms.weights.stride(0),
        masked.keep,
        places(runs, masked.keep)[1],
        into if terms.logp is None else terms.logp,
        into if masked.trust is None else masked.trust,
        terms.numbers,
        shares,
        present,
        factors,
        weights,
        into,
        unknown,
        runs.length,
        runs.rows,
        sequences,
        of_prompts,
        KINDS=kinds,
        ROWS=rows,
        PACKED=runs.owner is not None,
        HAS_LOGP=terms.logp is not None,
        HAS_TRUST=masked.trust is not None,
        BLOCK=sizes.evaluated,
    )
    return weights, unknown
