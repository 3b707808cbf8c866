"""Batches for the three primitives of the Triton backend, and the conditions that
they are judged under.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from triton_oracle import Batch, default_params

from reweight_ops._core.backends.base import RowInputs, SoftmaxParams
from reweight_ops._core.formula.loss_program import Program
from reweight_ops._core.rows.groups import IGNORE_INDEX

ROWS = 12
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RICH = Program.of(
    ("clip", "k3", "entropy_bonus"),
    (("current_advantage_reweighting", "surrogate"), ("probability_band", "all")),
)


def make(dtype=torch.float32, n=ROWS, v=400, program=RICH, seed=0, **change) -> Batch:
    """Logits with outliers, targets with real mass, both sides of the clip, and both
    sides of the clamp.
    """
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, v, generator=g) * 2.5).to(dtype)
    ids = torch.randint(0, v, (n,), generator=g)
    ids[::2] = logits[::2].float().argmax(-1)
    logits[0, ids[0]] = 40.0  # p = 1 to fp32
    logits[1] *= 4
    batch = Batch(
        logits, ids, torch.tensor([0.8]), SoftmaxParams(v), None, program, default_params(program)
    )
    batch = dataclasses.replace(batch, **change)
    n = batch.ids.numel()
    logp = torch.nan_to_num(batch.statistics(torch.float32)["logp"], neginf=-30.0)
    drift = 0.3 * torch.randn(n, generator=g)
    drift[-2:] = torch.tensor([100.0, -100.0])
    if batch.inputs is None:
        adv = torch.randn(n, generator=g)
        adv[2] = 0.0
        weights = torch.rand(len(batch.program.terms), n, generator=g) / n
        weights[0, 3] = 0.0
        others = (logp + 0.3 * torch.randn(n, generator=g) for _ in range(2))
        batch.inputs = RowInputs(weights, logp - drift, adv, *others)
    return batch


def strided(dtype) -> Batch:
    """Two leading dimensions, sliced out of a larger tensor full of NaN, with padding
    columns, so that every stride matters.
    """
    batch = make(dtype)
    big = torch.full((3, ROWS // 2 + 1, 500), math.nan, dtype=dtype)
    view = big[1:, : ROWS // 2, 4:444]
    view[..., :400] = batch.logits.view(2, ROWS // 2, 400)
    return dataclasses.replace(batch, logits=view)


def masked(dtype) -> Batch:
    batch = make(dtype)
    batch.ids[[1, 4]] = IGNORE_INDEX
    batch.ids[5], batch.ids[6] = 400, -7
    batch.logits[1] = math.nan
    batch.inputs.adv[1] = math.nan
    return batch


def minus_infinity(dtype) -> Batch:
    """Whole tiles and the first tile of -inf, single columns, and all but one."""
    batch = make(dtype)
    keep = torch.zeros(ROWS, 400, dtype=torch.bool)
    keep[torch.arange(ROWS), batch.ids] = True
    masked = torch.rand(ROWS, 400, generator=torch.Generator().manual_seed(3)) < 0.3
    masked[0, :300] = masked[3, 100:] = masked[7] = True
    logits = torch.where(masked & ~keep, -math.inf, batch.logits.float()).to(dtype)
    return make(dtype, logits=logits, ids=batch.ids)


CONDITIONS = {
    "plain": lambda dtype: make(dtype),
    "strides, padding and poison": strided,
    "ignored rows": masked,
    "-inf": minus_infinity,
    "softcap": lambda dtype: make(dtype, softmax=SoftmaxParams(400, softcap=5.0)),
    "softcap and -inf": lambda dtype: make(
        dtype,
        logits=minus_infinity(dtype).logits,
        ids=minus_infinity(dtype).ids,
        softmax=SoftmaxParams(400, softcap=30.0),
    ),
    "a temperature each row": lambda dtype: make(dtype, temperature=torch.linspace(0.3, 2.5, ROWS)),
    "a large common shift": lambda dtype: make(dtype, logits=make(dtype).logits + 300),
    "a very large common shift": lambda dtype: make(dtype, logits=make(dtype).logits + 3e4),
    "padded vocabulary": lambda dtype: make(
        dtype, softmax=SoftmaxParams(350), ids=make(dtype).ids % 350
    ),
    "an odd vocabulary": lambda dtype: make(dtype, v=397),
    "a tiny vocabulary": lambda dtype: make(dtype, v=3),
}
