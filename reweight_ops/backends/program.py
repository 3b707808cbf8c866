"""A one-pass program in torch: what a kernel does once per row, from the same traced formulas and derivatives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..codegen.derive import derive, value
from ..codegen.evaluate import evaluate
from ..codegen.trace import trace_rule, trace_weight
from ..rules.base import RULES, WEIGHTS, Formula
from ..terms import safe_where
from .base import Program, RowInputs


class ProgramResult(NamedTuple):
    """``[N]`` each; ``coefs`` are the derivatives of the weighted loss by logp (through the ratio too), entropy and log_sum_p_sq."""

    weighted_loss: Tensor
    loss: Tensor
    coefs: dict[str, Tensor]


class _Parameters:
    """Reads a program's parameter vector front to back."""

    def __init__(self, params: Tensor) -> None:
        self.params = params
        self.at = 0

    def number(self) -> Tensor:
        self.at += 1
        return self.params[self.at - 1]

    def fields(self, cls: type[Formula]) -> dict[str, Tensor]:
        return {name: self.number() for name in cls.parameter_names()}


def run_program(program: Program, params: Tensor, stats: dict[str, Tensor], inputs: RowInputs, keep: Tensor) -> ProgramResult:
    """See :class:`~reweight_ops.backends.base.Program`."""
    logp = stats["logp"]
    old = logp if inputs.old_logp is None else inputs.old_logp
    read = _Parameters(params)
    low, high = read.number(), read.number()
    free = (logp - old >= low) & (logp - old <= high)
    leaves = {name: stats[name] for name in ("logp", "entropy", "log_sum_p_sq")}
    leaves |= {"old_logp": old, "log_ratio": (logp - old).clamp(low, high)}
    stored = {"adv": inputs.adv, "ref_logp": inputs.ref_logp, "sampling_logp": inputs.sampling_logp}
    leaves |= {name: value for name, value in stored.items() if value is not None}

    terms = [(RULES[name], read.number(), read.fields(RULES[name])) for name in program.terms]
    inside, one = safe_where(keep, leaves), torch.ones_like(logp)
    factors = {"surrogate": one, "all": one}
    for name, scope in program.weights:
        (u,) = evaluate([trace_weight(WEIGHTS[name]).result], inside, read.fields(WEIGHTS[name]))
        factors[scope] = factors[scope] * u

    zero = torch.zeros_like(logp)
    weighted, loss, by_logp, by_entropy, by_p_sq = zero, zero, zero, zero, zero
    chosen = torch.zeros_like(keep)
    for k, (cls, coef, fields) in enumerate(terms):
        factor = coef * factors["all"] * (factors["surrogate"] if k == 0 else 1)
        selected = keep & (inputs.weights[k] * factor != 0)
        traced = trace_rule(cls)
        partials = derive(traced)
        roots = [value(traced), partials["logp"], partials["log_ratio"], partials["entropy"], partials["log_sum_p_sq"]]
        term, d_logp, d_log_ratio, d_entropy, d_p_sq = (
            torch.where(selected, factor * x, 0) for x in evaluate(roots, safe_where(selected, leaves), fields)
        )
        w = inputs.weights[k]
        loss, weighted = loss + term, weighted + torch.where(selected, w * term, 0)
        by_logp = by_logp + torch.where(selected, w * (d_logp + torch.where(free, d_log_ratio, 0)), 0)
        by_entropy = by_entropy + torch.where(selected, w * d_entropy, 0)
        by_p_sq = by_p_sq + torch.where(selected, w * d_p_sq, 0)
        chosen = chosen | selected
    by_logp = torch.where(chosen & logp.isnan(), logp, by_logp)  # whatever the rules' comparisons make of a NaN
    return ProgramResult(weighted, loss, {"logp": by_logp, "entropy": by_entropy, "log_sum_p_sq": by_p_sq})
