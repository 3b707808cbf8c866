"""Diagnostics of a policy loss: which tokens its gradient comes from, how far off the
sampler is, and how the update changes the entropy.

They are computed at their first read, on the device and without a synchronisation, from
``[N]`` vectors that the call has anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..calls.policy import LossCall
from ..rows.batch import BatchStatistics
from ..rows.constants import number_like
from .metrics import Metrics, _extremum


@torch.no_grad()
def policy_diagnostics(
    call: LossCall, leaves: dict[str, Tensor], by: tuple[Tensor, Tensor]
) -> Metrics:
    """Compute the diagnostics from the row statistics and the loss's derivatives by
    logp and entropy.

    A name exists only where it applies.
    """
    rows, t = call.rows, call.safe_leaves(leaves)
    keep = rows.keep.to(rows.dtype)
    count = keep.sum()
    found: dict[str, tuple[Tensor, Tensor | int]] = {}

    d_logp = torch.where(rows.keep, by[0], 0)
    p = t.logp.exp()
    found |= _gradient_share(call, d_logp.abs() * -torch.expm1(t.logp), p)
    if call.adv is not None:
        found["frac_advantage_zero"] = (((t.adv == 0) & rows.keep).sum(), count)
    if "entropy" in leaves:
        change = d_logp * p * -torch.expm1(t.logp) * (t.logp + t.entropy)
        found["entropy_change"] = (torch.where(rows.keep, change, 0).sum(), 1)
    if "log_ratio" in call.spec.requires:
        found["ratio/eff_sample_size"] = _effective(t.log_ratio.exp(), keep)
    if call.sampling_logp is not None:
        found |= _against_sampler(rows.keep & ~t.sampling_logp.isnan(), t.old_logp, t.sampling_logp)
    flat = [number_like(x, keep) for pair in found.values() for x in pair]
    return Metrics(tuple(found), torch.stack(flat).view(-1, 2))


def _gradient_share(
    call: LossCall, size: Tensor, p: Tensor
) -> dict[str, tuple[Tensor, Tensor | int]]:
    """Return how much of ``Σ |∂loss/∂logp|·(1 - p)`` comes from each quarter of the
    tokens, the unlikeliest first.
    """
    rank = BatchStatistics(call.rows).rank(p)
    quarter = (4 * rank / call.rows.keep.sum().clamp(min=1)).floor()
    size = torch.where(call.rows.keep, size, 0)
    return {
        f"grad_share/q{k + 1}": (torch.where(quarter == k, size, 0).sum(), size.sum())
        for k in range(4)
    }


def _against_sampler(
    known: Tensor, old_logp: Tensor, sampling_logp: Tensor
) -> dict[str, tuple[Tensor, Tensor | int]]:
    """Return statistics of ``old_logp - sampling_logp`` and of the probabilities'
    difference where the sampler's log-prob is not NaN, as TRL counts them.
    """
    d = torch.where(known, old_logp - sampling_logp, 0)
    moved = torch.where(known, (old_logp.exp() - sampling_logp.exp()).abs(), 0)
    ratio, count = d.exp(), known.sum()
    return {
        "sampling/sampling_logp_difference/mean": (d.abs().sum(), count),
        "sampling/sampling_logp_difference/max": (_extremum(d.abs(), known, "max"), 1),
        "sampling/sampling_prob_difference/mean": (moved.sum(), count),
        "sampling/sampling_prob_difference/max": (_extremum(moved, known, "max"), 1),
        "sampling/kl": (-d.sum(), count),
        "sampling/k3_kl": ((torch.expm1(d) - d).sum(), count),
        "sampling/importance_sampling_ratio/min": (_extremum(ratio, known, "min"), 1),
        "sampling/importance_sampling_ratio/mean": (torch.where(known, ratio, 0).sum(), count),
        "sampling/importance_sampling_ratio/max": (_extremum(ratio, known, "max"), 1),
        "sampling/eff_sample_size": _effective(ratio, known.to(d.dtype)),
    }


def _effective(w: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(Σw)²/(n·Σw²)``, the effective sample size as a fraction.

    That fraction of n tokens with equal weight has the same variance.
    """
    w = torch.where(keep > 0, w, 0)
    return w.sum() ** 2 / w.square().sum().clamp(min=torch.finfo(w.dtype).tiny), keep.sum()
