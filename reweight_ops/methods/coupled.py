"""Methods in which the coefficients of a sequence depend on the other sequences of its
prompt, or on the whole batch.

All take two passes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from .._core.calls.softmax import refuse_process_group
from .._core.catalogue.registry import published
from .._core.formula.base import Rule
from .._core.ranges import (
    Count,
    Interval,
    NonNegative,
    NonNegativeOrInf,
    Number,
    Positive,
    PositiveOrInf,
    Real,
)
from .._core.spec.coupled import GroupClassification, GroupContrast, HingeConstraint
from .._core.spec.policy import Penalty, PolicyLossSpec
from .._core.spec.ratio import CenteredRatio, SequenceRatio, TokenRatio
from .._core.spec.reduction import TokenMean
from ..errors import InvalidCall
from ..rules.likelihood import NLL, DriftK1, DriftK3, LikelihoodRatio
from ..rules.surrogates import Clip
from .penalties import is_zero, kl

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _constraint(strength: Number, bound: Number, estimator: str) -> tuple[Penalty, ...]:
    estimators: dict[str, Rule] = {"k1": DriftK1(), "k3": DriftK3()}
    if estimator not in estimators:
        raise InvalidCall(f"kl_estimator is {estimator!r}, expected 'k1' or 'k3'.")
    return (
        ()
        if is_zero(strength)
        else (Penalty(estimators[estimator], 1.0, HingeConstraint(strength=strength, bound=bound)),)
    )


_NOT_GATHERED = (
    "sequence scores are not gathered over ranks: keep all responses to a prompt on one rank, "
    "which needs no process_group. "
    "The prompts' mean is then this rank's, as DDP averages it, and so is the mean of the KL "
    "constraint."
)


@published(
    "Discriminative Constrained Optimization (DisCO)",
    paper="DisCO: Reinforcing Large Reasoning Models with Discriminative Constrained Optimization",
    arxiv="2505.12366",
    level="group",
)
def disco(
    score: str = "log_likelihood",
    tau: PositiveOrInf[Number] | None = None,
    kl_strength: NonNegative[Number] = 1000.0,
    kl_bound: Real[Number] = 1e-4,
    kl_estimator: str = "k1",
    group_size: Count[int] | None = None,
    process_group: ProcessGroup | None = None,
) -> PolicyLossSpec:
    """``-1/Q Σ_q { mean_{i in q+} s_i - τ·log mean_{j in q-} exp(s_j/τ) } + sg(β·max(KL
    - δ, 0))·KL``; see :class:`~reweight_ops._core.spec.coupled.GroupContrast`.

    ``score``: ``"log_likelihood"``, ``s_i`` the mean of logp over the response, τ = 10;
    ``"likelihood_ratio"``, the mean of r, τ = 1; ``tau=inf`` is the basic variant
    without the log-sum-exp. ``advantages``: the rewards, one a sequence; positive where
    above 0. β = ``kl_strength``, δ = ``kl_bound``; KL is the token mean of
    ``old_logp - logp`` (``"k1"``, as the authors' scripts) or of k3.

    ``group_size`` consecutive sequences share a prompt, or the call's ``group_ids``.
    ``process_group`` is refused: the authors gather scores over all ranks, here every
    response to a prompt is in the call. Differs from the authors' code: it replaces the
    log-sum-exp by a term of the same gradient, so that its loss value is offset; here
    it is the objective's.
    """
    refuse_process_group("disco", process_group, _NOT_GATHERED)
    scores: dict[str, tuple[Rule, float]] = {
        "log_likelihood": (NLL(), 10.0),
        "likelihood_ratio": (LikelihoodRatio(), 1.0),
    }
    if score not in scores:
        raise InvalidCall(
            f"disco: score is {score!r}, expected 'log_likelihood' or 'likelihood_ratio'."
        )
    rule, default = scores[score]
    contrast = GroupContrast(temperature=default if tau is None else tau, group_size=group_size)
    penalties = _constraint(kl_strength, kl_bound, kl_estimator)
    return PolicyLossSpec(surrogate=rule, penalties=penalties, reduction=contrast)


@published(
    "Decoupled Reward Policy Optimization (DRPO)",
    paper="DRPO: Efficient Reasoning via Decoupled Reward Policy Optimization",
    arxiv="2510.04474",
    level="group",
)
def drpo(
    length_temperature: PositiveOrInf[Number] = 0.1,
    tau: PositiveOrInf[Number] = 10.0,
    preference: str = "length",
    kl_strength: NonNegative[Number] = 1000.0,
    kl_bound: Real[Number] = 1e-4,
    kl_estimator: str = "k1",
    max_length: Positive[float] | None = None,
    group_size: Count[int] | None = None,
    process_group: ProcessGroup | None = None,
) -> PolicyLossSpec:
    """:func:`disco` with positives weighted by ``ω_i = exp((1 - L_i/L_max)/λ)`` among
    those of their prompt: short correct responses count more.

    λ = ``length_temperature`` (``inf``: DisCO), ``L_max`` = ``max_length``, by default
    the padded length as in the authors' code. The decoupling: a long correct response
    gets less weight, but never a negative one.

    ``preference="advantages"``: any other preference among correct responses,
    ``ω_i = exp(A_i/λ)``, with ``advantages`` the preference rewards of the correct ones
    (a constant that makes them positive cancels in ω) and 0 or less for the wrong ones;
    the authors' code has the length only. Differs from the authors' code: as
    :func:`disco`.
    """
    refuse_process_group("drpo", process_group, _NOT_GATHERED)
    contrast = GroupContrast(
        temperature=tau,
        length_temperature=length_temperature,
        max_length=max_length,
        group_size=group_size,
        preference=preference,
    )
    return PolicyLossSpec(
        surrogate=NLL(),
        penalties=_constraint(kl_strength, kl_bound, kl_estimator),
        reduction=contrast,
    )


@published(
    "REAL: rewards as labels",
    paper="Rewards as Labels: Revisiting RLVR from a Classification Perspective",
    arxiv="2602.05630",
    level="group",
)
def real(
    tau: Positive[Number] = 0.5,
    beta: NonNegative[Number] = 0.0,
    group_size: Count[int] | None = None,
) -> PolicyLossSpec:
    """``1/Q Σ_q { log(1 + Σ_{j in q-} e^(s_j/τ)) + log(1 + Σ_{i in q+} e^(-s_i/τ)) }``,
    ``s`` the mean of ``log r`` over a response; see
    :class:`~reweight_ops._core.spec.coupled.GroupClassification`.

    ``advantages``: labels, rewards or group advantages, one a sequence; positive where
    above 0. Prompts all of whose responses have one label add 0. The authors' code
    (``compute_policy_loss_real``) reads rewards of 1 and 0. ``beta``: of k3 to the
    reference, the mean over the call's tokens, as ms-swift's ``loss_type="real"`` has
    it.
    """
    reduction = GroupClassification(temperature=tau, group_size=group_size)
    penalties = kl(beta, reduction=TokenMean(per_call=True))
    return PolicyLossSpec(
        surrogate=DriftK1(),
        penalties=penalties,
        ratio=TokenRatio(clamp=math.inf),
        reduction=reduction,
    )


@published(
    "GRPO-Guard, on tokens",
    paper="GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated "
    "Clipping",
    arxiv="2510.22319",
    certainty="derived",
    level="batch",
    example={"epsilon": 0.2},
)
def grpo_guard(
    epsilon: NonNegativeOrInf[Number],
    scale: Annotated[Number, Interval("(0, inf)", words=("std",))] = 1.0,
) -> PolicyLossSpec:
    """Clip of a regulated ratio, ``exp(scale·(log r - sg(mean log r)))``, token mean:
    centred so that clipping acts on both sides alike.

    Derived: from the paper's ratio for Gaussian steps of flow models, whose log is
    centred by its analytic mean and scaled by the step's standard deviation. A token
    has no such variance; here the mean is that over the call's tokens, and ``scale`` a
    number, or ``"std"`` to divide by their deviation. The other reading, the exact
    KL(old, current) of each token added with its gradient, needs the old logits and is
    not offered. The paper's ε (about 2e-6 or 1e-4, of flow steps) means nothing here,
    so ``epsilon`` has no default.
    """
    clip = Clip(epsilon_low=epsilon, epsilon_high=epsilon)
    return PolicyLossSpec(surrogate=clip, ratio=CenteredRatio(scale=scale))


@published(
    "Advantage Weighted Matching, on tokens",
    paper="Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models",
    arxiv="2509.25050",
    certainty="derived",
)
def awm(level: str = "token", epsilon: NonNegativeOrInf[Number] = math.inf) -> PolicyLossSpec:
    """``-A·r``, token mean: on-policy the advantage-weighted log-likelihood.
    ``level="sequence"``: r is the geometric mean over the sequence's tokens.

    Derived: the paper weights a diffusion model's denoising error by the advantage; a
    token's log-prob stands for minus that error. Both readings of its code: a ratio for
    each step (``exp_first``), or one of the mean over steps (``sum_first``), which is
    GSPO's. ``epsilon`` clips the ratio to ``1±ε`` (1 in its configurations for large
    runs). Its advantages are clipped to ±5 and divided by 5 beforehand.
    """
    if level not in ("token", "sequence"):
        raise InvalidCall(f"awm: level is {level!r}, expected 'token' or 'sequence'.")
    clip = Clip(epsilon_low=epsilon, epsilon_high=epsilon)
    return PolicyLossSpec(
        surrogate=clip, ratio=TokenRatio() if level == "token" else SequenceRatio()
    )
