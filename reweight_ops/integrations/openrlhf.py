"""OpenRLHF (0.11) on our ops: its log-probs and entropies, and any of our losses in
place of its own.

::

    from reweight_ops.integrations.openrlhf import patch
    # log-probs and entropies, OpenRLHF's own loss
    patch()
    # another loss besides, in the process of the actor
    patch(spec=rw.methods.gspo_token())
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .._core.calls.specs import METHODS, named_spec
from .._core.losses.policy import policy_loss_from_logps
from .._core.losses.statistics import token_logps, token_stats
from .._core.spec.policy import PolicyLossSpec
from .._core.spec.ratio import GeometricMeanRatio
from ..errors import BackendUnavailable, InvalidCall, UnsupportedRequest
from .hosted import Host, agg_mode, divisors, level_unsupported_reason, per_sequence
from .patching import Counts, Patch, Replacement
from .trainers import check_version

try:
    from openrlhf.models import actor
    from openrlhf.models.loss import PolicyLoss as Theirs
except ImportError as error:
    raise BackendUnavailable(
        f"reweight_ops.integrations.openrlhf needs OpenRLHF: pip install 'openrlhf>=0.11' ({error})"
    ) from error

#: The installed version, for messages.
LIBRARY = check_version("OpenRLHF")
_HOST = Host(
    "OpenRLHF",
    frozenset({"adv", "logp", "log_ratio", "old_logp", "sampling_logp"}),
    "algo.kl.use_loss and algo.kl.init_coef, or actor.entropy_coef",
)

__all__ = ["PolicyLoss", "patch"]


class PolicyLoss(torch.nn.Module):
    """A spec, or the name of a method, in place of OpenRLHF's ``PolicyLoss``: the same
    call, the same five results.

    The loss is a token mean over ``batch_num_tokens`` or a mean over
    ``global_batch_size`` samples, times ``dp_size``, by the spec's reduction. The
    sampler's log-probs are ``sampling_logp`` of the spec's weights
    (``rw.weights.TruncatedImportance``, ...), which replace ``is_correction_...``. The
    last two results, statistics of OpenRLHF's own correction, are None.

    Raises:
        UnsupportedRequest: OpenRLHF cannot train the spec; the reason is named.
    """

    def __init__(self, spec: PolicyLossSpec | str) -> None:
        super().__init__()
        reason = (
            level_unsupported_reason(METHODS[spec], "a micro-batch")
            if isinstance(spec, str) and spec in METHODS
            else None
        )
        self.spec = named_spec("openrlhf.PolicyLoss", spec)
        self.name = self.spec.name or "the spec"
        reason = reason or _HOST.unsupported_reason(self.spec)
        if reason is None and agg_mode(self.spec.reduction) not in (
            "token-mean",
            "seq-mean-token-mean",
        ):
            reason = (
                f"its reduction, {self.spec.reduction!r}, is neither a token mean nor a "
                "mean of the samples' token means, as OpenRLHF's KL is"
            )
        if reason is not None:
            raise UnsupportedRequest(f"OpenRLHF cannot train {self.name}: {reason}.")

    @property
    def token_level_loss(self) -> bool:
        """Return whether the loss is a mean over tokens. OpenRLHF's KL and entropy must
        be reduced in the same way.
        """
        return agg_mode(self.spec.reduction) == "token-mean"

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: Any = None,
        global_batch_size: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return ``(loss, share of clipped tokens, mean of old_log_probs - log_probs,
        None, None)``. All tensors are ``[B, T]``.
        """
        if isinstance(self.spec.ratio, GeometricMeanRatio):
            advantages = per_sequence(
                advantages, torch.ones_like(advantages) if action_mask is None else action_mask
            )
        out = policy_loss_from_logps(
            log_probs,
            advantages,
            spec=self.spec,
            old_per_token_logps=old_log_probs,
            sampling_per_token_logps=rollout_log_probs,
            completion_mask=action_mask,
            unused="ignore",  # OpenRLHF passes what it has
            **divisors(self.spec.reduction, dp_size, batch_num_tokens, global_batch_size),
        )
        clipped = next(
            (
                out.metrics[n]
                for n in ("clip_ratio/region_mean", "cispo_clip_ratio")
                if n in out.metrics
            ),
            torch.zeros_like(out.loss),
        )
        moved = old_log_probs - log_probs.detach()
        keep = torch.ones_like(moved) if action_mask is None else action_mask.to(moved.dtype)
        return (
            out.loss,
            clipped.detach(),
            torch.where(keep != 0, moved, 0).sum() / keep.sum(),
            None,
            None,
        )


def _in_place_of(spec: PolicyLossSpec | str) -> Any:
    """Return what ``ActorPPOTrainer`` calls as ``PolicyLoss(...)`` with its options.
    They must be those that the spec leaves open.
    """
    ours = PolicyLoss(spec)
    parameters = inspect.signature(Theirs.__init__).parameters

    def build(**options: Any) -> PolicyLoss:
        if options.pop("token_level_loss", True) != ours.token_level_loss:
            wanted = agg_mode(ours.spec.reduction)
            raise InvalidCall(
                f"{ours.name} reduces by {wanted}: set actor.loss_agg_mode={wanted} (OpenRLHF's "
                "KL and entropy follow it)."
            )
        # read only with a level other than off
        defaults = {"is_correction_threshold": options.get("is_correction_threshold")}
        if "sampling_logp" in ours.spec.requires:
            # Only the switch of the correction is read. OpenRLHF asks the sampler for
            # its log-probs if it is on.
            if options.get("is_correction_level", "off") == "off":
                raise InvalidCall(
                    f"{ours.name} reads the sampler's log-probs: set "
                    "algo.advantage.is_correction_level=token, or OpenRLHF asks for none."
                )
            defaults["is_correction_level"] = "token"
        ignored = [
            f"{n}={v!r}" for n, v in options.items() if v != defaults.get(n, parameters[n].default)
        ]
        if ignored:
            raise InvalidCall(
                f"{ours.name} replaces OpenRLHF's loss, so {', '.join(ignored)} would have no "
                "effect: put it into the spec."
            )
        return ours

    return build


def patch(
    *, spec: PolicyLossSpec | str | None = None, backend: str = "auto", ppo_actor: Any = None
) -> Patch:
    """Replace ``log_probs_from_logits`` and ``compute_entropy`` of
    ``openrlhf.models.actor``; with ``spec``, the loss of ``ppo_actor`` too.

    ``ppo_actor`` is the module ``openrlhf.trainer.ray.ppo_actor``, needed with ``spec``
    (importing it starts ray and vLLM, so this function does not).
    Entropies have gradients. Logits of any dtype are served. ``Actor.forward`` casts
    them to fp32 first.

    Raises:
        InvalidCall: ``spec`` without ``ppo_actor`` or the reverse; when the trainer is
            built, an option of OpenRLHF's loss that would have no effect.
        UnsupportedRequest: OpenRLHF cannot train the spec.
        BackendUnavailable: OpenRLHF's functions are not the ones that are replaced
            here.
    """
    if (spec is None) != (ppo_actor is None):
        raise InvalidCall(
            "patch: pass spec and ppo_actor (import openrlhf.trainer.ray.ppo_actor) together, "
            "or neither."
        )
    counts = Counts("OpenRLHF")

    def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        counts.ran("token_logps")
        result: Tensor = token_logps(logits, labels, temperature=temperature, backend=backend)
        return result

    def compute_entropy(logits: Tensor) -> Tensor:
        counts.ran("token_stats")
        ids = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        found = token_stats(logits, ids, stats=("entropies",), backend=backend).entropies
        assert found is not None
        return found

    replacements = [
        Replacement(
            actor,
            "log_probs_from_logits",
            log_probs_from_logits,
            ("logits", "labels", "temperature"),
        ),
        Replacement(actor, "compute_entropy", compute_entropy, ("logits",)),
    ]
    if spec is not None:
        parameters = tuple(inspect.signature(Theirs.__init__).parameters)[1:]
        replacements.append(Replacement(ppo_actor, "PolicyLoss", _in_place_of(spec), parameters))
    return Patch(LIBRARY, replacements, counts)
