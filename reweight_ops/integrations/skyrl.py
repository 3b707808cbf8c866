"""SkyRL on our ops: methods as its policy losses, ``policy_loss_type=rw_<method>``.

::

    from reweight_ops.integrations.skyrl import register
    # before validate_cfg, in the script that starts training
    register()
    stale = PolicyLoss("dppo_tv", anchor="rollout")
    register({"mine": rw.methods.dapo(epsilon_high=0.3), "stale": stale})

SkyRL puts the reduction into the advantages. Its losses are plain sums, and a token's
share of the mean is a factor of its advantage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._core.calls.specs import METHODS, named_spec
from .._core.catalogue.registry import Entry
from .._core.losses.policy import policy_loss_from_logps
from .._core.spec.policy import PolicyLossSpec
from .._core.spec.reduction import NoReduction, SequenceMean
from ..errors import BackendUnavailable, InvalidCall, UnsupportedRequest
from .hosted import Host, agg_mode, level_unsupported_reason
from .trainers import check_version

try:
    from skyrl.backends.skyrl_train.utils.off_policy_correction_utils import (
        apply_off_policy_correction,
    )
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry
except ImportError as error:
    raise BackendUnavailable(f"reweight_ops.integrations.skyrl needs SkyRL ({error})") from error

check_version("SkyRL")

__all__ = ["PolicyLoss", "left_out", "register"]

_HOST = Host(
    "SkyRL",
    frozenset({"adv", "logp", "log_ratio", "old_logp", "sampling_logp"}),
    "algorithm.use_kl_loss and kl_loss_coef, or use_entropy_loss and entropy_loss_coef",
)
#: The reductions by our names and SkyRL's. A sum has no factor of its own, so it takes
#: any that SkyRL applies.
_REDUCTIONS = {
    "token-mean": ("token_mean", "token_mean_legacy"),
    "seq-mean-token-mean": ("sequence_mean",),
    "seq-mean-token-sum-norm": ("seq_mean_token_sum_norm",),
    "token-sum": (
        "token_mean",
        "token_mean_legacy",
        "sequence_mean",
        "seq_mean_token_sum_norm",
        "prompt_mean",
    ),
}
#: AlgorithmConfig fields that SkyRL's own losses read, with their defaults.
_LOSS_FIELDS = {"eps_clip_low": 0.2, "eps_clip_high": 0.2, "clip_ratio_c": 3.0}
_METRICS = {
    "clip_ratio/region_mean": "clip_ratio",
    "cispo_clip_ratio": "clip_ratio",
    "approx_kl": "ppo_kl",
}


def _unsupported_reason(spec: PolicyLossSpec) -> str | None:
    reason = _HOST.unsupported_reason(spec)
    if reason is not None:
        return reason
    if agg_mode(spec.reduction) not in _REDUCTIONS:
        return f"its reduction, {spec.reduction!r}, is not one of SkyRL's"
    if spec.ratio.one_advantage:
        return "its ratio has one advantage per sequence, and SkyRL's are one per token"
    if not _follows_advantages(spec):
        return (
            "its loss is not proportional to the advantage's size, which SkyRL scales by the "
            "reduction"
        )
    return None


def _follows_advantages(spec: PolicyLossSpec) -> bool:
    """Whether a factor of a sequence's advantages is one of its loss and gradient: of
    many tokens at hand, in fp64.
    """
    draw = torch.Generator().manual_seed(0)
    shape = (16, 24)
    advantages, moved, sampled = torch.randn((3, *shape), generator=draw, dtype=torch.float64)
    old = -4 * torch.rand(shape, generator=draw, dtype=torch.float64)
    logps = (old + 0.4 * moved).clamp(max=-1e-3).requires_grad_()
    data: dict[str, Any] = {
        "old_per_token_logps": old,
        "sampling_per_token_logps": old + 0.2 * sampled,
        "unused": "ignore",
    }
    factors = torch.logspace(-4, 2, shape[0], dtype=torch.float64)[:, None]
    rows = dataclasses.replace(spec, reduction=NoReduction())
    found = []
    for adv in (advantages, advantages * factors):
        loss = policy_loss_from_logps(logps, adv, spec=rows, **data).loss
        found += [loss.detach(), torch.autograd.grad(loss.sum(), logps)[0]]
    return all(
        torch.allclose(scaled, factors * x, rtol=1e-9, atol=1e-13)
        for x, scaled in zip(found[:2], found[2:], strict=True)
    )


def _method_unsupported_reason(entry: Entry) -> str | None:
    if entry.example:
        return f"it has no default for {', '.join(entry.example)}: register a spec of it"
    return level_unsupported_reason(entry, "a micro-batch") or _unsupported_reason(entry.build())


class PolicyLoss:
    """A spec, or the name of a method, as a policy loss of SkyRL: the same call, the
    same two results.

    The sum over the tokens, whose advantages carry the reduction. SkyRL's
    ``off_policy_correction`` is applied to it, as to SkyRL's own losses. ``anchor``
    selects the log-probs that the ratio is against, ``"old"`` or ``"rollout"`` (the
    sampler's: fully asynchronous training, as in SkyRL's ``dppo``).

    Raises:
        UnsupportedRequest: SkyRL cannot train the spec; the reason is named.
    """

    def __init__(self, spec: PolicyLossSpec | str, *, anchor: str = "old") -> None:
        if anchor not in ("old", "rollout"):
            raise InvalidCall(
                f"skyrl.PolicyLoss: anchor is {anchor!r}, expected 'old' or 'rollout'."
            )
        self.anchor = anchor
        self.spec = named_spec("skyrl.PolicyLoss", spec)
        self.name = self.spec.name or "the spec"
        reason = _unsupported_reason(self.spec)
        if reason is not None:
            raise UnsupportedRequest(f"SkyRL cannot train {self.name}: {reason}.")
        if anchor == "rollout" and "sampling_logp" in self.spec.requires:
            raise InvalidCall(
                f"{self.name} corrects for the sampler, which anchor='rollout' has for the old "
                "policy: leave one of them out."
            )
        self._rows = dataclasses.replace(self.spec, reduction=NoReduction())

    def _check(self, config: Any) -> None:
        own = agg_mode(self.spec.reduction)
        assert own is not None
        if config.loss_reduction not in _REDUCTIONS[own]:
            raise InvalidCall(
                f"{self.name} reduces by {own}: set "
                f"algorithm.loss_reduction={_REDUCTIONS[own][0]}, "
                "or register a spec with reduction=TokenSum(), which takes any."
            )
        horizon = (
            self.spec.reduction.horizon if isinstance(self.spec.reduction, SequenceMean) else None
        )
        if horizon not in (None, config.max_seq_len):
            raise InvalidCall(
                f"{self.name} divides by {horizon}, algorithm.max_seq_len is "
                f"{config.max_seq_len}: give one of them."
            )
        ignored = [
            f"{n}={getattr(config, n)!r}"
            for n, default in _LOSS_FIELDS.items()
            if getattr(config, n) != default
        ]
        if ignored:
            raise InvalidCall(
                f"{self.name} replaces SkyRL's loss, so {', '.join(ignored)} would have no "
                "effect: register a spec with these bounds."
            )
        if (
            "sampling_logp" in self.spec.requires or self.anchor == "rollout"
        ) and config.off_policy_correction.tis_ratio_type is not None:
            raise InvalidCall(
                f"{self.name} corrects for the sampler itself, so "
                "off_policy_correction.tis_ratio_type="
                f"{config.off_policy_correction.tis_ratio_type!r} "
                "would do it twice: leave one of them out."
            )

    def __call__(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Return ``(loss, metrics)``. All tensors are ``[B, T]``."""
        self._check(config)
        if self.anchor == "rollout" and rollout_logprobs is None:
            raise InvalidCall(
                f"{self.name}: anchor='rollout' needs the sampler's log-probs "
                "(generator.sampling_params.logprobs)."
            )
        out = policy_loss_from_logps(
            log_probs.float(),
            advantages,
            spec=self._rows,
            old_per_token_logps=old_log_probs if self.anchor == "old" else rollout_logprobs,
            sampling_per_token_logps=rollout_logprobs,
            completion_mask=loss_mask,
            unused="ignore",  # SkyRL passes what it has
        )
        values = out.metrics.as_floats()
        metrics = {"clip_ratio": 0.0} | {
            theirs: values[ours] for ours, theirs in _METRICS.items() if ours in values
        }
        mask = torch.ones_like(advantages) if loss_mask is None else loss_mask
        loss, mask, corrections = apply_off_policy_correction(
            out.loss, old_log_probs, rollout_logprobs, mask, config.off_policy_correction
        )
        return torch.where(mask != 0, loss * mask, 0).sum(), metrics | corrections


def register(specs: Mapping[str, PolicyLossSpec | PolicyLoss] | None = None) -> tuple[str, ...]:
    """Put losses into SkyRL's registry and return their names.

    ``specs`` are registered by their names. Without it every method that SkyRL can
    train is registered as ``rw_<method>``.

    Raises:
        UnsupportedRequest: SkyRL cannot train one of ``specs``; the reason is named.
    """
    if specs is None:
        specs = {
            f"rw_{name}": entry.build()
            for name, entry in METHODS.items()
            if _method_unsupported_reason(entry) is None
        }
    losses = {
        name: spec if isinstance(spec, PolicyLoss) else PolicyLoss(spec)
        for name, spec in specs.items()
    }  # all of them, before the first is registered
    for name, loss in losses.items():
        PolicyLossRegistry.register(name, loss)
    return tuple(losses)


def left_out() -> dict[str, str]:
    """Return the methods that :func:`register` leaves out, each with the reason."""
    reasons = {name: _method_unsupported_reason(entry) for name, entry in METHODS.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}
