"""Losses of pairs that combine others: sums of terms, other scores, a
third sequence."""

from __future__ import annotations

from typing import Annotated

from .._core.calls.unused_options import forbid_unused
from .._core.catalogue.registry import published
from .._core.ranges import Interval, NonNegative, Number, Positive, Real, Unit
from .._core.spec.pair_parts import PairLoss
from .._core.spec.pairs import PairSpec, PairTerm
from ..errors import InvalidCall
from .losses import Aot, BcoPair, ChosenNll, Hinge, Ipo, Sigmoid
from .methods import dpo
from .scores import AlphaLikelihood, Likelihood


@published(
    "f-DPO: DPO with another divergence",
    level="pair",
    plan="two passes",
    arxiv="2309.16240",
    certainty="secondary",
    paper="Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse "
    "Divergence Constraints",
)
def f_dpo(
    beta: Positive[Number] = 0.1, divergence: str = "js_divergence", alpha: Real[float] = 1.0
) -> PairSpec:
    """``-log σ(β·(f'(t_w) - f'(t_l)))``, ``t = π(y)/π_ref(y)``:
    ``dpo(divergence=...)``, with TRL's names; ``alpha`` belongs to
    ``"alpha_divergence"``.

    ``"js_divergence"`` ``log(2t/(t+1))``, ``"forward_kl"`` ``1 - 1/t``,
    ``"alpha_divergence"`` ``(t^(α-1) - 1)/(α-1)``, ``"reverse_kl"`` ``log t``, which is
    DPO. The default is ours.
    """
    return dpo(beta, divergence=divergence, alpha=alpha)


@published(
    "Length-Desensitization DPO (LD-DPO)",
    level="pair",
    plan="two passes",
    arxiv="2409.06411",
    certainty="secondary",
    paper="Length Desensitization in Direct Preference Optimization",
    example={"ld_alpha": 0.5},
)
def ld_dpo(ld_alpha: Unit[float], beta: Positive[Number] = 0.1) -> PairSpec:
    """``dpo(ld_alpha=...)``: tokens beyond the shorter sequence's length have weight
    ``ld_alpha`` in both log-probs. 1 is DPO. This is TRL's ``ld_alpha``.
    """
    return dpo(beta, ld_alpha=ld_alpha)


@published(
    "Alignment via Optimal Transport (AOT)",
    level="batch",
    plan="two passes",
    arxiv="2406.05882",
    certainty="secondary",
    paper="Distributional Preference Alignment of LLMs via Optimal Transport",
)
def aot(
    beta: Positive[Number] = 0.1,
    label_smoothing: Annotated[Number, Interval("[0, 1)")] = 0.0,
    paired: bool = True,
) -> PairSpec:
    """The sigmoid loss of the k-th smallest against the k-th smallest; see
    :class:`Aot`.

    It is TRL's ``aot``, and with ``paired=False`` its ``aot_unpaired``.
    """
    return PairSpec(
        terms=(PairTerm(loss=Aot(label_smoothing=label_smoothing, paired=paired)),), beta=beta
    )


@published(
    "Iterative Reasoning Preference Optimization (IRPO)",
    level="pair",
    plan="two passes",
    arxiv="2404.19733",
    certainty="secondary",
    paper="Iterative Reasoning Preference Optimization",
)
def irpo(beta: Positive[Number] = 0.1, alpha: NonNegative[Number] = 1.0) -> PairSpec:
    """``-log σ(β·m) - α·log π(y_w)/|y_w|``: DPO and the chosen sequence's NLL per token
    (eq. 1 and 2).

    TRL's ``["sigmoid", "sft"]`` uses the mean NLL over all chosen tokens of the batch
    instead: ``preference.trl``.
    """
    terms = (PairTerm(loss=Sigmoid()), PairTerm(loss=ChosenNll(per="sequence"), coef=alpha))
    return PairSpec(terms=terms, beta=beta)


@published(
    "Mixed Preference Optimization (MPO)",
    level="pair",
    plan="two passes",
    arxiv="2411.10442",
    certainty="secondary",
    paper="Enhancing the Reasoning Ability of Multimodal Large Language Models via Mixed "
    "Preference Optimization",
)
def mpo(
    beta: Positive[Number] = 0.1,
    preference_weight: NonNegative[Number] = 0.8,
    quality_weight: NonNegative[Number] = 0.2,
    generation_weight: NonNegative[Number] = 1.0,
) -> PairSpec:
    """``w_p·DPO + w_q·BCO + w_g·NLL(y_w)``, the NLL the mean over all chosen tokens:
    TRL's ``["sigmoid", "bco_pair", "sft"]``.

    Differs from the paper: its BCO shifts the rewards by their running mean, as
    :func:`bco` says.
    """
    parts = (
        (Sigmoid(), preference_weight),
        (BcoPair(), quality_weight),
        (ChosenNll(per="batch"), generation_weight),
    )
    return PairSpec(terms=tuple(PairTerm(loss=loss, coef=coef) for loss, coef in parts), beta=beta)


@published(
    "AlphaPO: a reward of another shape",
    level="pair",
    plan="two passes",
    arxiv="2501.03884",
    certainty="secondary",
    paper="AlphaPO: Reward Shape Matters for LLM Alignment",
    example={"alpha": 0.25},
)
def alpha_po(
    alpha: Real[float], beta: Positive[Number] = 2.0, gamma: NonNegative[Number] = 1.0
) -> PairSpec:
    """``-log σ(β·(r(y_w) - r(y_l)) - γ)``, ``r = (1 - p^-α)/α`` of the geometric mean
    ``p`` of the tokens' probabilities; ``α → 0`` is SimPO.

    It is TRL's ``CPOTrainer`` with ``loss_type="simpo"`` and ``cpo_alpha=0``. β and γ
    are tuned per model in the paper; the defaults are SimPO's.
    """
    return PairSpec(
        terms=(PairTerm(loss=Sigmoid(target=gamma)),), beta=beta, score=AlphaLikelihood(alpha=alpha)
    )


@published(
    "Triple Preference Optimization (TPO)",
    level="pair",
    plan="two passes",
    arxiv="2405.16681",
    certainty="secondary",
    paper="Triple Preference Optimization: Achieving Better Alignment using a Single Step "
    "Optimization",
)
def tpo(
    loss_type: str = "sigmoid",
    beta: Positive[Number] = 0.01,
    alpha: NonNegative[Number] = 1.0,
    gamma: NonNegative[Number] = 0.5,
    label_smoothing: Annotated[Number, Interval("[0, 1)")] = 0.0,
) -> PairSpec:
    """``-log σ(β·(log π(y_w) - log π(y_l))) + α·NLL(y_gold)``: no reference; triples of
    chosen, rejected and gold responses, ``[3·P, T]``.

    ``loss_type="tpo-l"`` has means over tokens and a target margin, ``β·m - γ``.
    ``"hinge"`` and ``"ipo"`` are as in TRL's ``TPOTrainer``. The NLL is the mean over
    all gold tokens. ``"tpo-l"`` reads ``gamma``; ``"sigmoid"`` and ``"tpo-l"`` read
    ``label_smoothing``. With another loss they are errors.
    """
    sums, means = Likelihood(), Likelihood(average=True)
    kinds: dict[str, tuple[PairLoss, Likelihood]] = {
        "sigmoid": (Sigmoid(label_smoothing=label_smoothing), sums),
        "hinge": (Hinge(), sums),
        "ipo": (Ipo(average=False), means),
        "tpo-l": (Sigmoid(label_smoothing=label_smoothing, target=gamma), means),
    }
    if loss_type not in kinds:
        raise InvalidCall(f"tpo: loss_type is {loss_type!r}, expected one of {', '.join(kinds)}.")
    smooth = loss_type in ("sigmoid", "tpo-l")
    given = {"gamma": gamma, "label_smoothing": label_smoothing}
    forbid_unused(
        "tpo",
        tpo,
        given,
        f"loss_type={loss_type!r}",
        {"gamma": loss_type == "tpo-l", "label_smoothing": smooth},
    )
    loss, score = kinds[loss_type]
    terms = (PairTerm(loss=loss), PairTerm(loss=ChosenNll(per="batch", side=2), coef=alpha))
    return PairSpec(terms=terms, beta=beta, score=score, group_size=3)
