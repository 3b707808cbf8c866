"""A one-pass program in torch: what a kernel does once per row, from the same traced formulas and derivatives."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .base import RULES, WEIGHTS, Formula
from .derive import derive, value
from .interpret import evaluate
from .leaves import safe_where
from .trace import trace_rule, trace_weight


class Program(NamedTuple):
    """What ``token_loss_grad`` evaluates per row, by registry names; hashable, so backends cache what they compile for it.

    With ``log_ratio = clip(logp - old_logp, clamp_low, clamp_high)`` (zero gradient outside) and the leaves of
    :data:`~reweight_ops._core.formula.base.LEAVES`::

        loss          = sum_k coef_k * u_k * rule_k(leaves)            u_0 = product of all weights, u_k = product of scope "all"
        weighted_loss = sum_k w_k * coef_k * u_k * rule_k(leaves)      w_k: the row weight of term k, an input

    A term whose ``w_k * coef_k * u_k`` is 0 contributes exactly 0 (never ``0 * inf``) to each of them and to the coefficients. ``params`` is one
    fp32 vector: ``[clamp_low, clamp_high, (coef_k, fields of rule k)..., (fields of weight j)...]``. Term 0 is the surrogate.
    """

    terms: tuple[str, ...]
    weights: tuple[tuple[str, str], ...] = ()  # (name, scope)

    def encode(self) -> str:
        """As one string, which is what crosses the boundary of a custom op: ``clip,k3|advantage_reweighting:surrogate``."""
        return f"{','.join(self.terms)}|{','.join(':'.join(pair) for pair in self.weights)}"

    @staticmethod
    @functools.lru_cache(maxsize=512)
    def decode(text: str) -> Program:
        terms, weights = text.split("|")
        pairs = (pair.split(":") for pair in weights.split(",") if pair)
        return Program(tuple(terms.split(",")), tuple((name, scope) for name, scope in pairs))


class RowInputs(NamedTuple):
    """Per-row inputs of ``token_loss_grad``. ``old_logp=None``: on-policy, ``old_logp = logp`` without gradient."""

    weights: Tensor  # [K, N]: row weight of each term; dimension 0 may be expanded (stride 0)
    old_logp: Tensor | None = None
    adv: Tensor | None = None
    ref_logp: Tensor | None = None
    sampling_logp: Tensor | None = None


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
    """See :class:`~reweight_ops._core.backends.base.Program`."""
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
