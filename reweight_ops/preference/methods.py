"""The published losses of pairs: each is a function that returns its
:class:`PairSpec`."""

from __future__ import annotations

import math
from typing import Annotated

from .._core.catalogue.registry import published
from .._core.ranges import Interval, NonNegative, Number, OpenUnit, Positive, Real, Unit
from .._core.spec.pair_parts import PairLoss
from .._core.spec.pairs import PairSpec, PairTerm
from ..errors import InvalidCall
from .losses import (
    ApoDown,
    ApoZero,
    BcoPair,
    ChosenNll,
    Discopop,
    Ensemble,
    ExoPair,
    Hinge,
    Inconsistency,
    Ipo,
    ListLikelihood,
    MaskNorm,
    NcaPair,
    OddsRatio,
    Robust,
    SearchConfidence,
    Sigmoid,
    Skips,
    SoftLabel,
    SppoHard,
    SquaredNash,
)
from .scores import Likelihood, LikelihoodAgainstUnlikelihood, LogRatio, MaskedLogRatio
from .weights import Agreement, MarginAdaptive, SampledAlignment


def _terms(*losses: PairLoss | tuple[PairLoss, Number]) -> tuple[PairTerm, ...]:
    return tuple(
        PairTerm(loss=x[0], coef=x[1]) if isinstance(x, tuple) else PairTerm(loss=x) for x in losses
    )


@published(
    "Direct Preference Optimization",
    level="pair",
    plan="two passes",
    arxiv="2305.18290",
    paper="Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
)
def dpo(
    beta: Positive[Number] = 0.1,
    ld_alpha: Unit[Number] | None = None,
    divergence: str = "reverse_kl",
    alpha: Real[float] = 1.0,
) -> PairSpec:
    """``-log σ(β·m)``, ``m = (log π - log π_ref)(y_w) - (log π - log π_ref)(y_l)`` (eq.
    7).

    ``ld_alpha`` is LD-DPO's weight of the tokens beyond the shorter sequence's length.
    ``divergence`` and ``alpha`` are f-DPO's; see :class:`LogRatio`.
    """
    score = LogRatio(ld_alpha=ld_alpha, divergence=divergence, alpha=alpha)
    return PairSpec(terms=_terms(Sigmoid()), beta=beta, score=score)


@published(
    "Conservative DPO",
    level="pair",
    plan="two passes",
    arxiv="unknown",
    certainty="secondary",
    paper="A note on DPO with noisy preferences & relationship to IPO",
)
def cdpo(
    beta: Positive[Number] = 0.1, label_smoothing: Annotated[Number, Interval("[0, 1)")] = 0.1
) -> PairSpec:
    """``-(1-ε)·log σ(β·m) - ε·log σ(-β·m)``, for labels of which a share ε is wrong.
    The default of ε is ours.
    """
    return PairSpec(terms=_terms(Sigmoid(label_smoothing=label_smoothing)), beta=beta)


@published(
    "Robust DPO (rDPO)",
    level="pair",
    plan="two passes",
    arxiv="2403.00409",
    paper="Provably Robust DPO: Aligning Language Models with Noisy Feedback",
    certainty="secondary",
)
def robust_dpo(
    beta: Positive[Number] = 0.1, label_smoothing: Annotated[Number, Interval("[0, 0.5)")] = 0.1
) -> PairSpec:
    """``(-(1-ε)·log σ(β·m) + ε·log σ(-β·m)) / (1-2ε)``: unbiased if a share ε of the
    labels is flipped (TRL's ``robust``).
    """
    return PairSpec(terms=_terms(Robust(label_smoothing=label_smoothing)), beta=beta)


@published(
    "SLiC-HF's hinge on DPO's margin",
    level="pair",
    plan="two passes",
    arxiv="2305.10425",
    certainty="secondary",
    paper="SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
)
def hinge(beta: Positive[Number] = 0.1) -> PairSpec:
    """``max(0, 1 - β·m)`` (TRL's ``hinge``). Differs from the paper: the margin is
    between log-ratios to the reference, not log-probs.
    """
    return PairSpec(terms=_terms(Hinge()), beta=beta)


@published(
    "Identity Preference Optimization",
    level="pair",
    plan="two passes",
    arxiv="2310.12036",
    certainty="secondary",
    paper="A General Theoretical Paradigm to Understand Learning from Human Preferences",
)
def ipo(beta: Positive[Number] = 0.1, average: bool = True) -> PairSpec:
    """``(m - 1/(2β))²`` (eq. 17, β is the paper's τ). With ``average=True``, as in TRL,
    ``m`` is the margin of log-ratios per token.

    Differs from the paper: the paper's formula has sums (``average=False``) instead of
    averages.
    """
    return PairSpec(terms=_terms(Ipo(average=average)), beta=beta)


@published(
    "Efficient Exact Optimization (pairs)",
    level="pair",
    plan="two passes",
    arxiv="2402.00856",
    certainty="secondary",
    paper="Towards Efficient Exact Optimization of Language Model Alignment",
)
def exo(
    beta: Positive[Number] = 0.1, label_smoothing: Annotated[float, Interval("(0, 1)")] = 1e-3
) -> PairSpec:
    """``KL((σ(β·m), σ(-β·m)) ‖ (1-ε, ε))`` (eq. 16; TRL's ``exo_pair``)."""
    return PairSpec(terms=_terms(ExoPair(label_smoothing=label_smoothing)), beta=beta)


@published(
    "Noise Contrastive Alignment (pairs)",
    level="pair",
    plan="two passes",
    arxiv="2402.05369",
    certainty="secondary",
    paper="Noise Contrastive Alignment of Language Models with Explicit Rewards",
)
def nca(beta: Positive[Number] = 0.1) -> PairSpec:
    """``-log σ(r_w) - ½·log σ(-r_w) - ½·log σ(-r_l)``, ``r = β·(log π - log π_ref)``
    (TRL's ``nca_pair``).
    """
    return PairSpec(terms=_terms(NcaPair()), beta=beta)


@published(
    "Binary Classifier Optimization (pairs)",
    level="pair",
    plan="two passes",
    arxiv="2404.04656",
    certainty="secondary",
    paper="Binary Classifier Optimization for Large Language Model Alignment",
)
def bco(beta: Positive[Number] = 0.1) -> PairSpec:
    """``-log σ(r_w) - log σ(-r_l)``, ``r = β·(log π - log π_ref)`` (TRL's
    ``bco_pair``). Differs from the paper: no reward shift δ.
    """
    return PairSpec(terms=_terms(BcoPair()), beta=beta)


@published(
    "Self-Play Preference Optimization (hard labels)",
    level="pair",
    plan="two passes",
    arxiv="2405.00675",
    paper="Self-Play Preference Optimization for Language Model Alignment",
    certainty="secondary",
)
def sppo(beta: Positive[Number] = 0.1) -> PairSpec:
    """``(u_w - 1/(2β))² + (u_l + 1/(2β))²``, u the log-ratio (eq. 4.7 with P = 1 and 0;
    TRL's ``sppo_hard``).
    """
    return PairSpec(terms=_terms(SppoHard()), beta=beta)


@published(
    "Anchored Preference Optimization",
    level="pair",
    plan="two passes",
    arxiv="2408.06266",
    certainty="secondary",
    paper="Anchored Preference Optimization and Contrastive Revisions: Addressing "
    "Underspecification in Alignment",
)
def apo(beta: Positive[Number] = 0.1, anchor: str = "zero") -> PairSpec:
    """``anchor="zero"``: ``1 - σ(r_w) + σ(r_l)`` (eq. 7). ``"down"``:
    ``σ(r_w) + 1 - σ(r_w - r_l)`` (eq. 8). ``r = β·(log π - log π_ref)``.
    """
    kinds = {"zero": ApoZero, "down": ApoDown}
    if anchor not in kinds:
        raise InvalidCall(f"apo: anchor is {anchor!r}, expected 'zero' or 'down'.")
    return PairSpec(terms=_terms(kinds[anchor]()), beta=beta)


@published(
    "Discovered Preference Optimization (DiscoPOP)",
    level="pair",
    plan="two passes",
    arxiv="2406.08414",
    paper="Discovering Preference Optimization Algorithms with and for Large Language Models",
    certainty="secondary",
)
def discopop(beta: Positive[Number] = 0.1, tau: Positive[Number] = 0.05) -> PairSpec:
    """``-(1-g)·log σ(x) + g·exp(-x)``, ``x = β·m``, ``g = σ(x/τ)`` (eq. 5)."""
    return PairSpec(terms=_terms(Discopop(tau=tau)), beta=beta)


@published(
    "Simple Preference Optimization",
    level="pair",
    plan="two passes",
    arxiv="2405.14734",
    certainty="secondary",
    paper="SimPO: Simple Preference Optimization with a Reference-Free Reward",
)
def simpo(beta: Positive[Number] = 2.0, gamma: NonNegative[Number] = 1.0) -> PairSpec:
    """``-log σ(β·(mean log π(y_w) - mean log π(y_l)) - γ)``: means over tokens, no
    reference. β and γ are tuned per model in the paper.
    """
    return PairSpec(terms=_terms(Sigmoid(target=gamma)), beta=beta, score=Likelihood(average=True))


@published(
    "Contrastive Preference Optimization",
    level="pair",
    plan="two passes",
    arxiv="2401.08417",
    certainty="secondary",
    paper="Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in "
    "Machine Translation",
)
def cpo(beta: Positive[Number] = 0.1, cpo_alpha: NonNegative[Number] = 1.0) -> PairSpec:
    """``-log σ(β·(log π(y_w) - log π(y_l))) + α·NLL(y_w)``: no reference; the NLL is
    the mean over all chosen tokens of the batch.
    """
    terms = _terms(Sigmoid(), (ChosenNll(per="batch"), cpo_alpha))
    return PairSpec(terms=terms, beta=beta, score=Likelihood())


@published(
    "Odds Ratio Preference Optimization",
    level="pair",
    plan="two passes",
    arxiv="2403.07691",
    certainty="secondary",
    paper="ORPO: Monolithic Preference Optimization without Reference Model",
)
def orpo(beta: Positive[Number] = 0.1) -> PairSpec:
    """``NLL(y_w) - β·log σ(log odds(y_w) - log odds(y_l))``, odds of the mean token
    log-prob (eq. 6 and 7, β is the paper's λ).

    The NLL is the mean over all chosen tokens of the batch.
    """
    terms = _terms(ChosenNll(per="batch"), (OddsRatio(), beta))
    return PairSpec(terms=terms, beta=beta, score=Likelihood(average=True))


@published(
    "DPO^γ",
    level="pair",
    plan="two passes",
    arxiv="2405.19534",
    example={"gamma": 0.5},
)
def dpo_gamma(gamma: NonNegative[Number], beta: Positive[Number] = 0.1) -> PairSpec:
    """``-log σ(β·(Δ log π - γ·Δ log π_ref))``, Δ chosen less rejected; γ = 1 is DPO, γ
    = 0 has no reference. The paper sweeps γ from 0 to 2.
    """
    return PairSpec(terms=_terms(Sigmoid()), beta=beta, score=LogRatio(gamma=gamma))


@published(
    "Unlikelihood on the rejected sequence",
    level="pair",
    plan="two passes",
    arxiv="2405.19534",
)
def unlikelihood(beta: Positive[Number] = 0.1) -> PairSpec:
    """``-log σ(β·(log π(y_w) - log π_ref(y_w) + Σ_t log(1 - π(y_l,t)) - log
    π_ref(y_l)))``, the authors' loss of that name.

    Finite and without gradient where a token's p is 1 in fp32. Without the reference it
    is :func:`no_sft_ratio_w_unlikelihood`.
    """
    score = LikelihoodAgainstUnlikelihood(reference=True)
    return PairSpec(terms=_terms(Sigmoid()), beta=beta, score=score)


@published(
    "Unlikelihood on the rejected sequence, without a reference",
    level="pair",
    plan="two passes",
    arxiv="2405.19534",
)
def no_sft_ratio_w_unlikelihood(beta: Positive[Number] = 0.1) -> PairSpec:
    """``-log σ(β·(log π(y_w) + Σ_t log(1 - π(y_l,t))))``: :func:`unlikelihood` without
    a reference, by the authors' name.
    """
    return PairSpec(terms=_terms(Sigmoid()), beta=beta, score=LikelihoodAgainstUnlikelihood())


@published(
    "Weighted Preference Optimization",
    level="token to pair",
    plan="two passes",
    arxiv="2406.11827",
    paper="WPO: Enhancing RLHF with Weighted Preference Optimization",
)
def wpo(
    beta: Positive[Number] = 0.01,
    clamp: bool = True,
    label_smoothing: Annotated[Number, Interval("[0, 1)")] = 0.0,
) -> PairSpec:
    """``sg[w(y_w)·w(y_l)]`` times DPO's loss,
    ``w = exp(mean_t(log π(y_t) - log Σ_v π(v)²))`` (eq. 2, sampled alignment).

    With ``clamp=True``, as in the authors' code, a pair's weight is at most 1.
    ``clamp=False`` is TRL's form. It needs log Σπ², which the statistics pass computes.
    """
    terms = _terms(Sigmoid(label_smoothing=label_smoothing))
    return PairSpec(terms=terms, beta=beta, weights=(SampledAlignment(clamp=clamp),))


@published(
    "Margin-Adaptive DPO",
    level="pair",
    plan="two passes",
    arxiv="2510.05342",
    paper="Margin Adaptive DPO: Leveraging Reward Model for Granular Control in Preference "
    "Optimization",
)
def madpo(
    beta: Positive[Number] = 0.1,
    c_max: Annotated[Number, Interval("(1, inf)")] = 2.0,
    c_min: OpenUnit[Number] | None = None,
    lambda_: NonNegative[Number] = 1.0,
    tau: Positive[Number] | None = None,
) -> PairSpec:
    """``w·(-log σ(β·m))``; ``h`` = ``reward_margins`` of a reward model,
    ``w = σ(c·h)/σ(h)`` where ``h > -τ``, else 1.

    ``c = c_min + (c_max - c_min)/(1 + (c_max-1)/(1-c_min)·exp(λ(|h| - τ)))``. Defaults:
    ``c_min = 1/c_max`` and ``τ = ln(0.999/0.001)``, as the paper; the authors' class
    has 0.5 and 2. The weight jumps at ``h = -τ``, as in theirs.
    """
    tau = math.log(0.999 / 0.001) if tau is None else tau
    weight = MarginAdaptive(
        c_min=1 / c_max if c_min is None else c_min, c_max=c_max, lambda_=lambda_, tau=tau
    )
    return PairSpec(terms=_terms(Sigmoid()), beta=beta, weights=(weight,))


@published(
    "Regularized Preference Optimization",
    level="pair",
    plan="two passes",
    arxiv="2405.16436",
    paper="Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an "
    "Adversarial Regularizer",
)
def rpo(
    form: str = "cumulative", beta: Positive[Number] | None = None, eta: Positive[Number] = 0.005
) -> PairSpec:
    """DPO and a likelihood term of the chosen answer, in one of the authors' two forms.

    ``"cumulative"``: ``-log σ(β·m) - η·β·Σ_t log π(y_w,t)``, η 0.005, β 0.01 (their
    recipes use 0.01 and 0.05). ``"average"``: ``-log σ(β·m) + 0.2·mean-NLL(y_w)`` of
    each sequence, β 0.5 (their OpenRLHF script); ``eta`` is not part of it. TRL's
    recipe (``sigmoid`` and ``sft``) is neither: see :func:`trl`.
    """
    if form == "cumulative":
        b = 0.01 if beta is None else beta
        return PairSpec(terms=_terms(Sigmoid(), (ChosenNll(per="sum"), eta * b)), beta=b)
    if form == "average":
        if not isinstance(eta, (int, float)) or eta != 0.005:
            raise InvalidCall(
                "rpo: eta belongs to form='cumulative'; the average form's coefficient is 0.2 "
                "(spec.replace for another)."
            )
        return PairSpec(
            terms=_terms(Sigmoid(), (ChosenNll(per="sequence"), 0.2)),
            beta=0.5 if beta is None else beta,
        )
    raise InvalidCall(f"rpo: form is {form!r}, expected 'cumulative' or 'average'.")


@published(
    "Iterative Nash Policy Optimization",
    level="pair",
    plan="two passes",
    arxiv="2407.00617",
    certainty="secondary",
    paper="Iterative Nash Policy Optimization: Aligning LLMs with General Preferences via "
    "No-Regret Learning",
)
def inpo(eta: Positive[float] = 7.5e-3, tau: Positive[float] = 2.5e-3) -> PairSpec:
    """``(D - (τ/η)·D_ref - ((η-τ)/η)·D_old - 1/(2η))²``,
    ``D = log π(y_w) - log π(y_l)`` in sums; ``old_*_logps`` are of the policy that
    sampled the pairs.

    The defaults are those of a port of the method (τ = η/3). The implicit rewards of
    the metrics are ``η·(log π - log π_ref)``.
    """
    return PairSpec(terms=_terms(SquaredNash(eta=eta, tau=tau)), beta=eta)


@published(
    "Consistency Regularized Self-Rewarding",
    level="pair",
    plan="two passes",
    arxiv="2410.12735",
    paper="CREAM: Consistency Regularized Self-Rewarding Language Models",
)
def cream(beta: Positive[Number] = 0.1) -> PairSpec:
    """``-c·log σ(β·m) - (1-c)·log σ(-β·m)``, ``consistency`` c of each pair's prompt:
    :func:`rank_consistency` of the rankings by two successive models.

    One c per prompt is the authors' ``dyn``. Their ``avg`` uses the data set's mean c
    for every pair.
    """
    return PairSpec(terms=_terms(SoftLabel()), beta=beta)


@published(
    "MCTS-enhanced iterative preference learning",
    level="step",
    plan="two passes",
    arxiv="2405.00451",
    paper="Monte Carlo Tree Search Boosts Reasoning via Iterative Preference Learning",
)
def mcts_dpo(beta: Positive[Number] = 0.1, loss: str = "conservative") -> PairSpec:
    """DPO on the tokens from a pair's first difference on. ``loss="conservative"``:
    labels smoothed by ``ε = min(1 - c, ½)``, ``c = 1/(1 + q_l/max(1, q_w))``.

    ``chosen_values`` and ``rejected_values`` are the search's q. ``"sigmoid"`` has no
    smoothing. ``"ipo"`` is ``(m - 1/(2β))²`` with scores divided by the number of these
    tokens, as in the released code (``norm_prob``). β is 0.1 in the authors' scripts.
    """
    kinds: dict[str, PairLoss] = {
        "conservative": SearchConfidence(),
        "sigmoid": Sigmoid(),
        "ipo": Ipo(),
    }
    if loss not in kinds:
        raise InvalidCall(f"mcts_dpo: loss is {loss!r}, expected one of {', '.join(kinds)}.")
    return PairSpec(terms=_terms(kinds[loss]), beta=beta, tokens="from_first_difference")


@published(
    "SparsePO and MaPO (token masks)",
    level="token",
    plan="two passes",
    arxiv="2410.05102",
    paper="SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks",
)
def sparse_po(
    beta: Positive[Number] = 0.1,
    reward_norm_coef: NonNegative[Number] = 0.0,
    kl_norm_coef: NonNegative[Number] = 0.0,
) -> PairSpec:
    """``-log σ(β·(u - d)) + c_u·‖m_u‖₁ + c_d·‖m_d‖₁``, norms over both sequences of a
    pair.

    ``u = Δ Σ_t m_u(t)·(log π - log π_ref)(y_t)``, and
    ``d = -Δ Σ_t m_d(t)·KL_t(π_ref‖π)`` over the whole vocabulary, with its gradient
    (TDPO's term). The masks are arguments of the call: ``reward_mask`` is m_u and
    ``kl_mask`` is m_d. Learned masks get exact gradients. Activation masks come from
    :func:`mapo_masks`, detached. In the authors' runs β is 0.8 (IMDB, TL;DR) and 0.1
    (HH), and the norms' coefficients are 0 by default, 0.001 in some.
    """
    off = [isinstance(c, (int, float)) and c == 0 for c in (reward_norm_coef, kl_norm_coef)]
    norms = [
        (MaskNorm(mask=m), c)
        for m, c, o in zip(
            ("reward_mask", "kl_mask"), (reward_norm_coef, kl_norm_coef), off, strict=True
        )
        if not o
    ]
    return PairSpec(terms=_terms(Sigmoid(), *norms), beta=beta, score=MaskedLogRatio())


@published(
    "EnsLoss on DPO's margin",
    level="pair",
    plan="two passes",
    arxiv="2409.00908",
    certainty="derived",
    paper="EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in "
    "Classification",
)
def ens_loss(beta: Positive[Number] = 0.1, box_cox: Real[float] = 0.0) -> PairSpec:
    """``sg[g_i]·s_i``, ``s = β·m``, where ``g`` are the slopes of a convex, calibrated
    loss that is drawn again at every step.

    Derived: from the paper's binary classifier, with DPO's margin as the classifier's
    margin and label +1. ``noise`` ``[P+1]`` are standard normal draws. ``-T(noise)``,
    with ``T`` the inverse Box-Cox transform (``box_cox=0``: exp), is cut at -1 from
    below, sorted, and assigned by increasing margin; the extra draw belongs to a margin
    of 0. It is divided by ``s`` where ``s > 1``, and 1e-6 is subtracted.
    """
    return PairSpec(terms=_terms(Ensemble(box_cox=box_cox)), beta=beta)


@published(
    "RankList on implicit rewards",
    level="list",
    plan="two passes",
    arxiv="2508.09826",
    certainty="derived",
    paper="RankList - A Listwise Preference Learning Framework for Predicting Subjective "
    "Preferences",
    example={"group_size": 4},
)
def rank_list(
    group_size: Annotated[int, Interval("[2, inf)", whole=True)],
    beta: Positive[Number] = 0.1,
    skips: Skips = (1, 2),
) -> PairSpec:
    """``Σ_{k in skips} Σ_i softplus(-β(s_i - s_{i+k}))`` over a list of ``group_size``
    answers, best first; ``s`` are log-ratios to the reference.

    Derived: from the abstract (RankNet probabilities of local and skip-wise pairs; a
    log-sum-exp surrogate). ``skips="all"`` is that surrogate,
    ``Σ_i log(1 + Σ_{j>i} e^(β(s_j - s_i)))``. With ``pairs="interleaved"`` the lists
    follow one another. With ``"halves"`` all best answers come first, then all second
    ones, ...
    """
    if skips != "all" and (not skips or any(not 1 <= k < group_size for k in skips)):
        raise InvalidCall(
            f"rank_list: skips is {skips!r}, expected distances from 1 to {group_size - 1}, or "
            "'all'."
        )
    return PairSpec(terms=_terms(ListLikelihood(skips=skips)), beta=beta, group_size=group_size)


@published(
    "Self-Consistency of Internal Rewards",
    level="pair",
    plan="two passes",
    arxiv="2502.08922",
    certainty="derived",
    paper="Self-Consistency of the Internal Reward Models Improves Self-Rewarding Language Models",
    example={"coef": 0.1},
)
def scir(coef: NonNegative[Number], beta: Positive[Number] = 0.1) -> PairSpec:
    """``1[the two rewards agree]·(-log σ(β·m) + coef·(σ(β·m) - σ(h))²)``, ``h`` =
    ``judge_margins`` of the model as a judge.

    Derived: from the abstract (DPO on the pairs on which the judge and the implicit
    reward agree, with a penalty on their inconsistency). The paper's formulas and its
    confidence term were not found.
    """
    return PairSpec(
        terms=_terms(Sigmoid(), (Inconsistency(), coef)), beta=beta, weights=(Agreement(),)
    )
