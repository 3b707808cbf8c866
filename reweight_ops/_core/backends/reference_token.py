"""The reference's token primitives in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..formula.loss_program import STATISTICS, Program
from ..formula.program import evaluate_rows
from ..rows.groups import IGNORE_INDEX
from .base import DERIVATIVES, RowInputs, SoftmaxParams

#: Up to ``LARGEST_LSE``, ``lse`` and ``lse_low``, both fp32, give probabilities to the
#: precision of fp32 at any temperature. Beyond it, a log-prob of the target above
#: ``LEAST_LOGP`` does.
LARGEST_LSE, LEAST_LOGP = 2.0**24, -50.0


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Distribution:
    """``x`` of every row and the values that the primitives need of it, in the
    accumulation dtype.
    """

    def __init__(
        self, logits: Tensor, ids: Tensor, temperature: Tensor, softmax: SoftmaxParams
    ) -> None:
        n = ids.numel()
        z = (
            logits[..., : softmax.vocab_size]
            .reshape(n, softmax.vocab_size)
            .to(accumulation_dtype(logits.dtype))
        )
        self.inside = ids != IGNORE_INDEX
        z = torch.where(self.inside[:, None], z, 0)  # an ignored row may hold anything
        self.temperature = temperature.to(z.dtype).view(-1, 1)
        self.slope: Tensor | float = 1.0
        if math.isfinite(softmax.softcap):
            capped = softmax.softcap * torch.tanh(z / softmax.softcap)
            self.slope = 1 - (capped / softmax.softcap) ** 2
            z = torch.where(z == -math.inf, z, torch.where(z == math.inf, math.nan, capped))
        # Everything is relative to the largest logit. An offset that all logits share
        # costs no digits.
        largest, self.where = z.max(-1, keepdim=True)
        self.top = largest[:, 0].double() / self.temperature[:, 0].double()
        self.below = (z - largest) / self.temperature
        # This also masks a logit that a temperature or the distance takes below the
        # smallest number. A mask of finfo.min acts as one of -inf.
        self.masked = (z == -math.inf) | ((self.below == -math.inf) & self.top.isfinite()[:, None])
        self.bad = self.inside & ((ids < 0) | (ids >= softmax.total()))
        local = ids - softmax.vocab_start
        self.has_target = (local >= 0) & (local < softmax.vocab_size) & self.inside & ~self.bad
        self.target = torch.where(self.has_target, local, 0)[:, None]

    def sum_of_others(self, values: Tensor) -> Tensor:
        """Sum over all columns but the largest.

        Its 1 would swallow the values of the others in a row with a sure token.
        """
        return values.scatter(-1, self.where, 0).sum(-1)

    def log_total(self) -> Tensor:
        """Return the log-sum-exp relative to the largest logit."""
        return torch.where(
            self.top.isfinite(), torch.log1p(self.sum_of_others(self.below.exp())), math.nan
        )


def token_stats(
    logits: Tensor, ids: Tensor, temperature: Tensor, softmax: SoftmaxParams, stats: tuple[str, ...]
) -> Tensor:
    d = Distribution(logits, ids, temperature, softmax)
    log_total, rest = d.log_total(), d.sum_of_others(d.below.exp())
    lse = (d.top + log_total).to(log_total.dtype)
    lse_low = torch.where(d.top == -math.inf, -math.inf, (d.top - lse) + log_total)
    out = {"lse": lse, "lse_low": lse_low, "max_logp": 0 - log_total}
    target = d.below.gather(-1, d.target)[:, 0] - log_total
    out["logp"] = torch.where(d.has_target | target.isnan(), target, -math.inf)
    out["entropy"] = log_total - torch.where(d.masked, 0, d.below.exp() * d.below).sum(-1) / (
        1 + rest
    )
    out["log_sum_p_sq"] = torch.log1p(d.sum_of_others((2 * d.below).exp())) - 2 * log_total
    rows = torch.stack([out[name].to(lse.dtype) for name in stats])
    rows = torch.where(d.bad, math.nan, rows)
    return torch.where(d.inside, rows, 0)


def token_grad(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    softmax: SoftmaxParams,
    stats: dict[str, Tensor],
    derivatives: dict[str, Tensor | None],
    out: Tensor,
) -> None:
    d = Distribution(logits, ids, temperature, softmax)
    zero = torch.zeros_like(stats["logp"])
    c, e, z, q = (
        zero if derivatives.get(name) is None else derivatives[name] for name in DERIVATIVES
    )
    assert c is not None and e is not None and z is not None and q is not None
    has_gradient = d.inside & ~d.bad & ((c != 0) | (e != 0) | (z != 0) | (q != 0))
    entropy, p_sq = stats.get("entropy", zero), stats.get("log_sum_p_sq", zero).exp()

    def terms(p: Tensor, logp: Tensor, column: tuple[slice, None] | slice) -> Tensor:
        d_entropy = -e[column] * p * (logp + entropy[column])
        return d_entropy + z[column] * p + 2 * q[column] * p * (p / p_sq[column] - 1)

    every = (slice(None), None)
    log_total = (stats["lse"] - d.top) + stats.get("lse_low", zero)
    # There the quotient top/T has no fraction. The target tells more about the other
    # columns than the log-sum-exp does.
    by_target = d.has_target & (stats["lse"].abs() > LARGEST_LSE) & (stats["logp"] > LEAST_LOGP)
    log_total = torch.where(
        by_target, d.below.gather(-1, d.target)[:, 0] - stats["logp"], log_total
    )
    logp = d.below - log_total[:, None].to(d.below.dtype)
    p = logp.exp()
    grad = terms(p, torch.where(d.masked, 0, logp), every) - c[:, None] * p
    # The target's own element comes from its log-prob. The difference p - 1 with a
    # rounded p loses all digits as p goes to 1.
    y, everything = stats["logp"], slice(None)
    p_y = y.exp()
    at_target = terms(p_y, torch.where(p_y > 0, y, 0), everything) - c * torch.expm1(y)
    grad = torch.where(d.has_target[:, None], grad.scatter(-1, d.target, at_target[:, None]), grad)
    grad = grad * d.slope / d.temperature
    grad = torch.where(d.masked & ~stats["lse"].isnan()[:, None], 0, grad)
    grad = torch.where(has_gradient[:, None], grad, 0)
    out[..., : softmax.vocab_size].copy_(grad.view(out[..., : softmax.vocab_size].shape))
    if out.size(-1) > softmax.vocab_size:
        out[..., softmax.vocab_size :].zero_()


def token_loss_grad(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    softmax: SoftmaxParams,
    inputs: RowInputs,
    program: Program,
    params: Tensor,
    out: Tensor,
) -> Tensor:
    names = ("logp", "entropy", "lse", "lse_low", "log_sum_p_sq")
    stats = dict(zip(names, token_stats(logits, ids, temperature, softmax, names), strict=True))
    leaves = (
        {"old_logp": stats["logp"]} | {name: stats[name] for name in STATISTICS} | inputs.stored()
    )
    weighted, loss, *by = evaluate_rows(
        program, params, leaves, inputs.row_weights, keep=ids != IGNORE_INDEX
    )
    token_grad(
        logits, ids, temperature, softmax, stats, dict(zip(STATISTICS, by, strict=True)), out
    )
    bad = (ids != IGNORE_INDEX) & ((ids < 0) | (ids >= softmax.total()))
    rows = torch.stack([stats["logp"], stats["entropy"], weighted, loss, *by[:2]])
    return torch.where(bad, math.nan, rows)
