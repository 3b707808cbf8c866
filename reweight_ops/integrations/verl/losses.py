"""A spec under the signature of verl's registered losses, with verl's normalization.
This module does not import verl.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor

from ..._core.calls.specs import named_spec
from ..._core.catalogue.registry import Entry
from ..._core.losses.policy import policy_loss_from_logps
from ..._core.spec.policy import PolicyLossSpec
from ..._core.spec.ratio import GeometricMeanRatio
from ..._core.spec.reduction import SequenceMean
from ...errors import InvalidCall, UnsupportedRequest
from ..hosted import Host, agg_mode, divisors, level_unsupported_reason, per_sequence

_VERL = Host(
    "verl",
    frozenset({"adv", "logp", "log_ratio", "old_logp"}),
    "actor.use_kl_loss and actor.kl_loss_coef, or actor.entropy_coeff",
)
#: ActorConfig fields that verl's own losses read, with the defaults of its
#: configuration.
_LOSS_FIELDS = {
    "clip_ratio": 0.2,
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.2,
    "clip_ratio_c": 3.0,
    "tau_pos": 1.0,
    "tau_neg": 1.05,
}
#: Metric of ours to verl's name. verl averages metrics over micro-batches, so only
#: means are handed over.
_METRICS = {
    "clip_ratio/region_mean": "actor/pg_clipfrac",
    "cispo_clip_ratio": "actor/pg_clipfrac",
    "approx_kl": "actor/ppo_kl",
    "weight/mean": "actor/weight_mean",
}


def unsupported_reason(spec: PolicyLossSpec) -> str | None:
    """Return why verl cannot train a spec, or None if it can."""
    if agg_mode(spec.reduction) is None:
        return (
            f"its reduction, {spec.reduction!r}, is none of verl's: sequences of one prompt "
            "may be in different micro-batches"
        )
    return _VERL.unsupported_reason(spec)


def method_unsupported_reason(entry: Entry) -> str | None:
    """Return why a method of the catalogue has no name in verl, or None
    if it has one."""
    if entry.example:
        return f"it has no default for {', '.join(entry.example)}: register a spec of it"
    reason = level_unsupported_reason(entry, "a micro-batch")
    return (
        unsupported_reason(entry.build())
        if reason is None
        else f"{reason}: register a spec of it if that will do"
    )


@lru_cache(maxsize=64)
def _with_horizon(spec: PolicyLossSpec, horizon: float) -> PolicyLossSpec:
    assert isinstance(spec.reduction, SequenceMean)
    return dataclasses.replace(
        spec, reduction=SequenceMean(per="constant", horizon=horizon, count=spec.reduction.count)
    )


def _resolved(spec: PolicyLossSpec, name: str, loss_agg_mode: str, config: Any) -> PolicyLossSpec:
    """The spec under a configuration, all of whose options that a loss reads are seen
    to.
    """
    own = agg_mode(spec.reduction)
    if loss_agg_mode != own:
        raise InvalidCall(
            f"{name} reduces by {own!r}: set actor.loss_agg_mode={own} (verl's entropy and KL "
            "follow it), "
            f"or register a spec whose reduction is {loss_agg_mode!r}."
        )
    ignored = [
        f"{field}={value!r}"
        for field, default in _LOSS_FIELDS.items()
        if (value := getattr(config, field, default)) not in (default, None)
    ]
    if ignored:
        raise InvalidCall(
            f"{name} replaces verl's loss, so {', '.join(ignored)} would have no effect: "
            "register a spec with these bounds."
        )
    horizon = config.global_batch_info.get("loss_scale_factor")
    if horizon is None or own != "seq-mean-token-sum-norm":
        return spec
    assert isinstance(spec.reduction, SequenceMean)
    if spec.reduction.horizon not in (None, horizon):
        raise InvalidCall(
            f"{name} divides by {spec.reduction.horizon}, actor.loss_scale_factor is {horizon}: "
            "give one of them."
        )
    return _with_horizon(spec, float(horizon))


def loss_fn(spec: PolicyLossSpec | str) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """A spec, or the name of a method, as a function of the signature that verl's
    registry has.

    Tensors are ``[B, T]``; the loss is scaled as verl scales its own (times
    ``dp_size``, over the counts of the global batch). With a
    :class:`~reweight_ops._core.spec.ratio.GeometricMeanRatio` the sequence's advantage
    is the mean of its tokens' and its weight their geometric mean, as in verl's
    ``geo_mean``.

    Raises:
        UnsupportedRequest: verl cannot train the spec; the reason is named.
    """
    spec = named_spec("verl.loss_fn", spec)
    reason = unsupported_reason(spec)
    name = spec.name or "the registered spec"
    if reason is not None:
        raise UnsupportedRequest(f"verl cannot train {name}: {reason}.")

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        if config is None:
            raise InvalidCall(f"{name}: verl's loss needs the actor's config.")
        resolved = _resolved(spec, name, loss_agg_mode, config)
        if isinstance(spec.ratio, GeometricMeanRatio):
            advantages = per_sequence(advantages, response_mask)
            if rollout_is_weights is not None:
                rollout_is_weights = per_sequence(
                    (rollout_is_weights + 1e-10).log(), response_mask
                ).exp()[:, None]
        info = config.global_batch_info
        counts = (
            info.get("dp_size") or 1,
            info.get("batch_num_tokens"),
            info.get("global_batch_size"),
        )
        out = policy_loss_from_logps(
            log_prob,
            advantages,
            spec=resolved,
            old_per_token_logps=old_log_prob,
            completion_mask=response_mask,
            importance_sampling_ratio=rollout_is_weights,
            unused="ignore",  # verl always passes the old log-probs
            **divisors(spec.reduction, *counts),
        )
        values = out.metrics.as_floats()
        return out.loss, {
            theirs: values[ours] for ours, theirs in _METRICS.items() if ours in values
        }

    return policy_loss
