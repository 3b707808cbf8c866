"""TRL's DPOTrainer losses by TRL's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from torch import Tensor

from .._core.calls.unused_options import forbid_unused
from .._core.catalogue.registry import TRAINERS_NAMES
from .._core.ranges import Interval, Number, Positive, Real, Unit, ranged
from .._core.spec.pair_parts import PairLoss
from .._core.spec.pairs import PairSpec, PairTerm
from ..errors import InvalidCall
from .losses import (
    Aot,
    ApoDown,
    ApoZero,
    BcoPair,
    ChosenNll,
    Discopop,
    ExoPair,
    Hinge,
    Ipo,
    NcaPair,
    Robust,
    Sigmoid,
    SppoHard,
)
from .scores import LogRatio
from .weights import SampledAlignment

#: Maps TRL 1.16's ``loss_type`` to the term. The second value tells whether
#: ``label_smoothing`` is part of it.
LOSS_TYPES: dict[str, tuple[Any, bool]] = {
    "sigmoid": (lambda e: Sigmoid(), False),
    "hinge": (lambda e: Hinge(), False),
    "ipo": (lambda e: Ipo(), False),
    "exo_pair": (lambda e: ExoPair(label_smoothing=e), True),
    "nca_pair": (lambda e: NcaPair(), False),
    "robust": (lambda e: Robust(label_smoothing=e), True),
    "bco_pair": (lambda e: BcoPair(), False),
    "sppo_hard": (lambda e: SppoHard(), False),
    "aot": (lambda e: Aot(label_smoothing=e), True),
    "aot_unpaired": (lambda e: Aot(label_smoothing=e, paired=False), True),
    "apo_zero": (lambda e: ApoZero(), False),
    "apo_down": (lambda e: ApoDown(), False),
    "discopop": (lambda e: None, False),
    "sft": (lambda e: ChosenNll(), False),
    "sigmoid_norm": (lambda e: Sigmoid(average=True), False),
}
TRAINERS_NAMES["pair_loss"] |= {name: f"rw.preference.trl({name!r})" for name in LOSS_TYPES}
TRAINERS_NAMES["pair_loss"]["trl"] = "rw.preference.trl(...)"
_ANY_DIVERGENCE = {
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "robust",
    "discopop",
    "sft",
}


@ranged
def trl(
    loss_type: str | Sequence[str] = "sigmoid",
    *,
    loss_weights: Sequence[float] | Tensor | None = None,
    beta: Positive[Number] = 0.1,
    label_smoothing: Annotated[float, Interval("[0, 1)")] = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: Real[float] = 0.5,
    discopop_tau: Positive[float] = 0.05,
    use_weighting: bool = False,
    ld_alpha: Unit[float] | None = None,
) -> PairSpec:
    """The loss of TRL 1.16's ``DPOTrainer`` with the names and defaults of
    ``DPOConfig``.

    Several loss types are summed with ``loss_weights``.

    >>> from reweight_ops import preference
    >>> preference.trl(["sigmoid", "sft"], loss_weights=[1.0, 0.005]).requires
    frozenset({'ref'})
    """
    types: list[Any] = list(loss_type) if isinstance(loss_type, (list, tuple)) else [loss_type]
    unknown = [t for t in types if not isinstance(t, str) or t not in LOSS_TYPES]
    if unknown or not types:
        raise InvalidCall(
            f"preference.trl: loss_type is {loss_type!r}, expected some of {', '.join(LOSS_TYPES)}."
        )
    if not (
        isinstance(loss_weights, (list, tuple, type(None)))
        or (isinstance(loss_weights, Tensor) and loss_weights.dim() == 1)
    ):
        raise InvalidCall(
            f"preference.trl: loss_weights is {loss_weights!r}, expected a number for every loss "
            "type, in a list."
        )
    coefficients = [1.0] * len(types) if loss_weights is None else list(loss_weights)
    if len(coefficients) != len(types):
        raise InvalidCall(
            f"preference.trl: {len(coefficients)} loss_weights for {len(types)} loss types."
        )
    if label_smoothing and not any(LOSS_TYPES[t][1] for t in types):
        smooth = [name for name, (_, reads) in LOSS_TYPES.items() if reads]
        raise InvalidCall(
            f"preference.trl: label_smoothing has no effect on {types}; it has on "
            f"{', '.join(smooth)} (preference.cdpo smooths the sigmoid)."
        )
    is_alpha = f_divergence_type == "alpha_divergence"
    forbid_unused(
        "preference.trl",
        trl,
        {"discopop_tau": discopop_tau},
        f"loss_type={loss_type!r}",
        {"discopop_tau": "discopop" in types},
    )
    given = {"f_alpha_divergence_coef": f_alpha_divergence_coef}
    forbid_unused(
        "preference.trl",
        trl,
        given,
        f"f_divergence_type={f_divergence_type!r}",
        {"f_alpha_divergence_coef": is_alpha},
    )
    if f_divergence_type != "reverse_kl" and not set(types) <= _ANY_DIVERGENCE:
        raise InvalidCall(
            f"preference.trl: f_divergence_type={f_divergence_type!r} is defined for "
            f"{', '.join(sorted(_ANY_DIVERGENCE))} only."
        )
    if use_weighting and {"aot", "aot_unpaired"} & set(types):
        raise InvalidCall(
            "preference.trl: use_weighting weighs pairs, but 'aot' sorts their sides separately."
        )

    def term(name: str) -> PairLoss:
        found: PairLoss = (
            Discopop(tau=discopop_tau)
            if name == "discopop"
            else LOSS_TYPES[name][0](label_smoothing)
        )
        return found

    alpha = f_alpha_divergence_coef if is_alpha else 1.0
    return PairSpec(
        terms=tuple(
            PairTerm(loss=term(t), coef=c) for t, c in zip(types, coefficients, strict=True)
        ),
        beta=beta,
        score=LogRatio(ld_alpha=ld_alpha, divergence=f_divergence_type, alpha=alpha),
        weights=(SampledAlignment(clamp=False),) if use_weighting else (),
        name="trl_" + "_".join(types),
    )
