"""The loss that a TRL trainer asks for, and TRL's arithmetic of gradient accumulation,
which exists only here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from ... import methods
from ..._core.calls.specs import method
from ..._core.formula.base import TokenWeight
from ..._core.spec.policy import Penalty, PolicyLossSpec
from ..._core.spec.reduction import Reduction, TokenMean
from ...errors import InvalidCall
from ...rules.penalties import EntropyBonus

#: GRPOConfig fields that describe TRL's own loss; they mean nothing to a spec given by
#: the user. ``beta`` is checked apart.
LOSS_FIELDS = (
    "loss_type",
    "epsilon",
    "epsilon_high",
    "delta",
    "importance_sampling_level",
    "use_bias_correction_kl",
    "top_entropy_quantile",
    "entropy_coef",
    "use_adaptive_entropy",
    "sapo_temperature_pos",
    "sapo_temperature_neg",
    "off_policy_mask_threshold",
)


class Normalized(NamedTuple):
    """A spec ready for one micro-batch: with the keywords of
    :func:`~reweight_ops.policy_loss` that normalize it.
    """

    spec: PolicyLossSpec
    keywords: dict[str, Any]


def spec_of_trainer(trainer: Any) -> PolicyLossSpec:
    """Return TRL's own loss by the trainer's current attributes. A callback may change
    them, so they are read at every call.
    """
    return _trl_spec(
        trainer.loss_type,
        epsilon=trainer.epsilon_low,
        epsilon_high=trainer.epsilon_high,
        delta=trainer.args.delta,
        beta=trainer.beta,
        importance_sampling_level=trainer.importance_sampling_level,
        use_bias_correction_kl=trainer.args.use_bias_correction_kl,
        max_completion_length=trainer.max_completion_length,
        top_entropy_quantile=trainer.top_entropy_quantile,
        entropy_coef=trainer.entropy_coef,
        sapo_temperature_pos=trainer.args.sapo_temperature_pos,
        sapo_temperature_neg=trainer.args.sapo_temperature_neg,
    )


@lru_cache(maxsize=32)
def _trl_spec(loss_type: str, **options: Any) -> PolicyLossSpec:
    return methods.trl(loss_type, unused="ignore", **options)


@lru_cache(maxsize=32)
def with_weights(spec: PolicyLossSpec, weights: tuple[TokenWeight, ...]) -> PolicyLossSpec:
    """Return the spec with more token weights."""
    return dataclasses.replace(spec, weights=(*spec.weights, *weights))


@lru_cache(maxsize=32)
def without_bonus(spec: PolicyLossSpec) -> PolicyLossSpec:
    """Return the spec without its entropy bonus, which TRL logs as ``policy_loss``."""
    return dataclasses.replace(
        spec, penalties=tuple(p for p in spec.penalties if not isinstance(p.rule, EntropyBonus))
    )


def resolve_passes(spec: Any, args: Any) -> tuple[PolicyLossSpec, ...]:
    """The user's ``spec=``: one for every update, or one for each of the
    ``num_iterations`` passes over a rollout.

    Raises:
        InvalidCall: the count of passes is wrong, or GRPOConfig sets options of TRL's
            loss that the spec would ignore.
    """
    given: Sequence[Any] = spec if isinstance(spec, (tuple, list)) else (spec,)
    passes = tuple(method(s) if isinstance(s, str) else s for s in given)
    if not all(isinstance(s, PolicyLossSpec) for s in passes):
        raise InvalidCall(
            f"spec is {spec!r}, expected a PolicyLossSpec, the name of a method, or one of them "
            "for each pass over a rollout."
        )
    check_updates(passes, args)
    return passes


def check_updates(passes: Sequence[PolicyLossSpec], args: Any) -> None:
    """Raise unless GRPOConfig fits the specs of the updates over a rollout.

    Raises:
        InvalidCall: see :func:`resolve_passes`.
    """
    if len(passes) not in (1, args.num_iterations):
        raise InvalidCall(
            f"spec has {len(passes)} passes over each rollout, GRPOConfig.num_iterations is "
            f"{args.num_iterations}; make them equal."
        )
    if len(passes) > 1 and args.steps_per_generation % args.gradient_accumulation_steps:
        raise InvalidCall(
            f"each of the {len(passes)} passes is to end with an optimizer step: "
            f"GRPOConfig.steps_per_generation={args.steps_per_generation} "
            f"must be a multiple of gradient_accumulation_steps={args.gradient_accumulation_steps}."
        )
    defaults = {f.name: f.default for f in dataclasses.fields(args)}
    ignored = [
        f"{name}={getattr(args, name)!r}"
        for name in LOSS_FIELDS
        if getattr(args, name) != defaults[name]
    ]
    if ignored:
        raise InvalidCall(
            f"a spec of your own replaces TRL's loss, so GRPOConfig's {', '.join(ignored)} "
            "would have no effect: put it into the spec."
        )
    for s in passes:
        _check_beta(s, args.beta)


def _check_beta(spec: PolicyLossSpec, beta: float) -> None:
    coefficients = [p.coef for p in spec.penalties if not isinstance(p.rule, EntropyBonus)]
    if "ref_logp" in spec.requires and beta == 0:
        raise InvalidCall(
            f"the spec {spec.name!r} reads reference log-probs, which TRL computes only with "
            f"beta != 0: give GRPOConfig the spec's {coefficients}."
        )
    if beta != 0 and not any(isinstance(c, Tensor) or c == beta for c in coefficients):
        raise InvalidCall(
            f"GRPOConfig.beta={beta} would have no effect: the spec {spec.name!r} has penalty "
            f"coefficients {coefficients}."
        )


def normalize(
    spec: PolicyLossSpec,
    *,
    accumulation_steps: int,
    num_items: Tensor,
    num_processes: int,
    steps_per_generation: int,
) -> Normalized:
    """TRL's normalization of one micro-batch (``accumulation_steps``: of the current
    window; in evaluation all counts are 1).

    A mean over ``num_items_in_batch`` (dapo, cispo) divides by the tokens of one
    accumulation window on one process; what each micro-batch normalizes by itself (all
    other loss types, and the entropy bonus of every type) is averaged over the window.
    """
    window = [_over_window(r) for r in spec.reductions]
    keywords: dict[str, Any] = {}
    if any(window):
        keywords["num_items_in_batch"] = (
            num_items.clamp(min=1.0) / num_processes * accumulation_steps / steps_per_generation
        )
    if not window[0]:
        keywords["loss_scale"] = 1 / accumulation_steps
    alike = accumulation_steps == 1 or not spec.penalties
    return Normalized(spec if alike else _rescaled(spec, accumulation_steps), keywords)


def _over_window(reduction: Reduction) -> bool:
    return isinstance(reduction, TokenMean) and not reduction.per_call and reduction.weight is None


@lru_cache(maxsize=32)
def _rescaled(spec: PolicyLossSpec, steps: int) -> PolicyLossSpec:
    """Penalties whose normalization differs in kind from the surrogate's, relative to
    the surrogate's ``loss_scale``.
    """
    surrogate = _over_window(spec.reduction)
    factor = 1 / steps if surrogate else steps

    def rescale(p: Penalty) -> Penalty:
        same = p.reduction is None or _over_window(p.reduction) == surrogate
        return p if same else dataclasses.replace(p, coef=p.coef * factor)

    return dataclasses.replace(spec, penalties=tuple(map(rescale, spec.penalties)))
