"""AReaL (1.0) on our ops: its log-probs and entropies, and any of our token-mean losses
in place of its PPO loss.

::

    from areal.engine import fsdp_engine
    from areal.trainer.ppo import actor
    from reweight_ops.integrations.areal import patch_logprobs, patch_loss

    # or megatron_engine, archon_engine
    patch_logprobs(fsdp_engine)
    # in the process of the actor
    patch_loss(rw.methods.advantage_reweighting(alpha=0.3), actor=actor)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core.calls.specs import METHODS, named_spec
from .._core.losses.policy import policy_loss_from_logps
from .._core.losses.statistics import token_logps
from .._core.spec.policy import PolicyLossSpec
from ..errors import BackendUnavailable, InvalidCall, UnsupportedRequest
from .hosted import Host, agg_mode, level_unsupported_reason
from .patching import Counts, Patch, Replacement
from .trainers import check_version

try:
    from areal.utils.functional.functional import apply_rejection_sampling
except ImportError as error:
    raise BackendUnavailable(f"reweight_ops.integrations.areal needs AReaL ({error})") from error

#: The installed version, for messages.
LIBRARY = check_version("AReaL")
_HOST = Host("AReaL", frozenset({"adv", "logp", "log_ratio", "old_logp", "sampling_logp"}))
_GATHER = ("logits", "labels", "temperature", "tp_group", "chunk_size")
_LOSS = (
    "logprobs",
    "proximal_logprobs",
    "old_logprobs",
    "advantages",
    "eps_clip",
    "loss_mask",
    "eps_clip_higher",
    "c_clip",
    "rejection_sampling",
    "importance_sampling_level",
    "cu_seqlens",
)
#: Options of AReaL's loss, with the values at which they have no effect.
_OPTIONS = {
    "eps_clip": 0.2,
    "eps_clip_higher": None,
    "c_clip": None,
    "importance_sampling_level": "token",
}

__all__ = ["loss_fn", "patch_logprobs", "patch_loss"]


def _unsupported_reason(spec: PolicyLossSpec) -> str | None:
    if {agg_mode(r) for r in spec.reductions} != {"token-mean"}:
        return "its reduction is not a token mean, and AReaL weighs micro-batches by their tokens"
    return _HOST.unsupported_reason(spec)


def loss_fn(spec: PolicyLossSpec | str) -> Any:
    """A spec, or the name of a method, with the call and the two results of AReaL's
    ``ppo_actor_loss_fn``.

    ``proximal_logprobs`` are ``old_logp`` of the spec. ``old_logprobs``, those of the
    policy that wrote the tokens, are ``sampling_logp``. AReaL's rejection sampling
    stays: the tokens that it drops are ignored but still count in the mean, and its
    weight multiplies the surrogate. With a sequence ratio the tokens keep their own
    advantages, which AReaL replaces by their mean.

    Raises:
        UnsupportedRequest: AReaL cannot train the spec; the reason is named.
    """
    reason = (
        level_unsupported_reason(METHODS[spec], "a micro-batch")
        if isinstance(spec, str) and spec in METHODS
        else None
    )
    spec = named_spec("areal.loss_fn", spec)
    name = spec.name or "the spec"
    reason = reason or _unsupported_reason(spec)
    if reason is not None:
        raise UnsupportedRequest(f"AReaL cannot train {name}: {reason}.")

    def ppo_actor_loss_fn(
        logprobs: Tensor,
        proximal_logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        eps_clip: float,
        loss_mask: Tensor,
        eps_clip_higher: float | None = None,
        c_clip: float | None = None,
        rejection_sampling: Any = None,
        importance_sampling_level: str = "token",
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        given = {
            "eps_clip": eps_clip,
            "eps_clip_higher": eps_clip_higher,
            "c_clip": c_clip,
            "importance_sampling_level": importance_sampling_level,
        }
        ignored = [f"{n}={v!r}" for n, v in given.items() if v != _OPTIONS[n]]
        if ignored:
            raise InvalidCall(
                f"{name} replaces AReaL's loss, so actor.{', actor.'.join(ignored)} would have "
                "no effect: put it into the spec."
            )
        kept, weight, fraction = loss_mask, None, 0.0
        if rejection_sampling is not None:
            if "sampling_logp" in spec.requires:
                raise InvalidCall(
                    f"{name} corrects for the sampler itself, so actor.rejection_sampling would "
                    "do it twice: leave one of them out."
                )
            filtered = apply_rejection_sampling(
                proximal_logprobs=proximal_logprobs,
                old_logprobs=old_logprobs,
                loss_mask=loss_mask,
                cu_seqlens=cu_seqlens,
                config=rejection_sampling,
            )
            kept, weight, fraction = (
                filtered.loss_mask,
                filtered.behave_imp_weight,
                filtered.filtered_fraction,
            )
        out = policy_loss_from_logps(
            logprobs,
            advantages,
            spec=spec,
            old_per_token_logps=proximal_logprobs,
            sampling_per_token_logps=old_logprobs,
            completion_mask=kept,
            num_items_in_batch=loss_mask.count_nonzero().clamp(min=1),
            importance_sampling_ratio=weight,
            cu_seqlens=cu_seqlens if logprobs.dim() == 1 else None,
            unused="ignore",  # AReaL passes what it has
        )
        stat = {
            "loss": out.per_token_loss if weight is None else out.per_token_loss * weight,
            "importance_weight": out.ratio,
            "approx_kl": (logprobs - proximal_logprobs).detach(),
            "clip_mask": out.is_clipped & kept.bool(),
            "dual_clip_mask": torch.zeros_like(out.is_clipped),
        }
        if weight is not None:
            inside = (weight > 0) & kept.bool()
            drift = torch.where(inside, proximal_logprobs.detach() - old_logprobs.detach(), 0.0)
            stat |= {
                "behave_approx_kl": drift,
                "behave_imp_weight": weight,
                "behave_mask": inside,
                "filtered_fraction": fraction,
            }
        return out.loss, stat

    return ppo_actor_loss_fn


def patch_logprobs(*engines: Any, backend: str = "auto") -> Patch:
    """Replace ``gather_logprobs`` and ``gather_logprobs_entropy`` in engine modules:
    ``fsdp_engine``, ``megatron_engine``, ``archon_engine``.

    Both results have gradients, and logits of any dtype are read without an fp32 copy.
    With a tensor-parallel group of several ranks a call is left to AReaL. Returns a
    patch with ``undo()``, ``fused_calls`` and ``delegated_calls``, also a context
    manager.

    Raises:
        InvalidCall: no engine.
        BackendUnavailable: an engine's functions are not the ones that are replaced
            here.
    """
    if not engines:
        raise InvalidCall(
            "patch_logprobs: pass the engine modules that are in use, such as "
            "areal.engine.fsdp_engine."
        )
    counts = Counts("AReaL")

    def replaced(engine: Any, name: str, entropy: bool) -> Replacement:
        original = getattr(engine, name, None)

        def gather(
            logits: Tensor,
            labels: Tensor,
            temperature: float = 1.0,
            tp_group: Any = None,
            chunk_size: int = 1024,
        ) -> Any:
            if tp_group is not None and torch.distributed.get_world_size(tp_group) > 1:
                counts.left("tensor parallelism: a call's rows are whole")
                assert original is not None
                return original(logits, labels, temperature, tp_group, chunk_size)
            counts.ran("token_logps")
            return token_logps(
                logits,
                labels.long(),
                temperature=temperature,
                return_entropy=entropy,
                backend=backend,
            )

        return Replacement(engine, name, gather, _GATHER)

    names = (("gather_logprobs", False), ("gather_logprobs_entropy", True))
    return Patch(
        LIBRARY,
        [replaced(engine, name, entropy) for engine in engines for name, entropy in names],
        counts,
    )


def patch_loss(spec: PolicyLossSpec | str, *, actor: Any) -> Patch:
    """Replace ``ppo_actor_loss_fn`` in ``actor``, the module
    ``areal.trainer.ppo.actor``; ``use_sapo_loss`` is an error then.

    M2PO's mask, approximations of the proximal policy, distillation and statistics stay
    AReaL's (``grpo_loss_fn``).

    Raises:
        UnsupportedRequest: AReaL cannot train the spec; the reason is named.
        BackendUnavailable: AReaL's functions are not the ones that are replaced here.
    """
    counts = Counts("AReaL")
    ours = loss_fn(spec)

    def counted(**given: Any) -> tuple[Tensor, dict[str, Any]]:
        counts.ran("policy_loss_from_logps")
        result: tuple[Tensor, dict[str, Any]] = ours(**given)
        return result

    def sapo_loss_fn(**given: Any) -> None:
        raise InvalidCall(
            "actor.use_sapo_loss=True bypasses the loss that patch_loss has installed: set it "
            "to False (methods.sapo is SAPO)."
        )

    sapo = (
        "logprobs",
        "old_logprobs",
        "advantages",
        "tau_pos",
        "tau_neg",
        "loss_mask",
        "importance_sampling_level",
        "cu_seqlens",
    )
    replacements = [
        Replacement(actor, "ppo_actor_loss_fn", counted, _LOSS),
        Replacement(actor, "sapo_loss_fn", sapo_loss_fn, sapo),
    ]
    return Patch(LIBRARY, replacements, counts)
