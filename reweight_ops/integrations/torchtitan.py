"""torchtitan's RL trainer on our op: a ``BaseLoss`` whose configuration names a method.

::

    from reweight_ops.integrations.torchtitan import PolicyLoss
    options = {"alpha": 0.3}
    loss = ChunkedLossWrapper.Config(
        num_chunks=8,
        loss_fn=PolicyLoss.Config(method="advantage_reweighting", options=options),
    )

The logits that the trainer, or its ``ChunkedLossWrapper``, passes are read once, and
their gradient is written once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._core.calls.dtensors import has_dtensors
from .._core.calls.specs import method
from .._core.engine.output import PolicyLossOutput
from .._core.losses.policy import policy_loss
from .._core.spec.policy import Penalty, PolicyLossSpec
from ..errors import BackendUnavailable, UnsupportedRequest
from ..rules.penalties import EntropyBonus
from .hosted import agg_mode

try:
    from torchtitan.components.loss import BaseLoss
except ImportError as error:
    raise BackendUnavailable(
        f"reweight_ops.integrations.torchtitan needs torchtitan ({error})"
    ) from error
try:
    from torchtitan.distributed.spmd_types import spmd_mesh_size
except ImportError:  # a torchtitan whose only sharded logits are DTensors

    def spmd_mesh_size(axis_name: str) -> int:
        return 1


__all__ = ["PolicyLoss"]


def _unsupported_reason(spec: PolicyLossSpec) -> str | None:
    missing = sorted(spec.requires & {"ref_logp", "sampling_logp"})
    if missing:
        return (
            f"it reads {', '.join(missing)}, which torchtitan does not pass to a loss: it "
            "has the generator's log-probs, which the ratio is against"
        )
    if "adv" not in spec.requires:
        return "it does not read advantages, so the reward would have no effect"
    if spec.couples_rows:
        return (
            "it couples tokens, and torchtitan passes chunks of packed tokens without their "
            "sequences"
        )
    if {agg_mode(r) for r in spec.reductions} != {"token-mean"}:
        return "its reduction is not a token mean, and torchtitan divides by global_valid_tokens"
    return None


class PolicyLoss(BaseLoss):  # type: ignore[misc]  # torchtitan has no types here
    """A token-level method with the call of torchtitan's ``DAPOLoss``.

    ``Config(method=, options=)``: a name of ``docs/methods.md`` and its
    hyper-parameters. Entropy bonuses are allowed.

    Raises:
        UnsupportedRequest: torchtitan cannot train the method; the reason is named.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):  # type: ignore[misc]
        method: str = "dapo"
        options: dict[str, Any] = field(default_factory=dict)

    def __init__(self, config: Any, *, compile_config: Any = None) -> None:
        spec = method(config.method, **config.options)
        reason = _unsupported_reason(spec)
        if reason is not None:
            raise UnsupportedRequest(f"torchtitan cannot train {config.method}: {reason}.")
        # A coefficient of 0 still computes the entropies, which torchtitan logs.
        logged = () if "entropy" in spec.requires else (Penalty(EntropyBonus(), 0.0),)
        self.spec = dataclasses.replace(spec, penalties=(*spec.penalties, *logged))

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        global_valid_tokens: Any = None,
        *,
        generator_logprobs: Tensor,
        advantages: Tensor,
        loss_mask: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``(loss, metrics)`` of ``[T, V]`` logits and ``[T]`` labels, already
        shifted. The loss is the sum over the tokens, divided by
        ``global_valid_tokens``.

        A token is ignored if its generator's log-prob is not finite, as in torchtitan.
        """
        if has_dtensors([logits]):
            raise UnsupportedRequest(
                "the logits are a DTensor: a call's rows are whole; use torchtitan's own loss "
                "with tensor parallelism."
            )
        ranks = spmd_mesh_size("tp")
        # the default backend passes plain tensors with a rank's part of the vocabulary
        if ranks > 1:
            raise UnsupportedRequest(
                f"tensor parallelism of {ranks}: the logits are a rank's part of the "
                "vocabulary, and a call's rows are whole; use torchtitan's own loss."
            )
        keep = loss_mask.bool() & torch.isfinite(generator_logprobs)
        divisor = 1 if global_valid_tokens is None else max(global_valid_tokens, 1)
        out = policy_loss(
            logits,
            labels,
            advantages,
            spec=self.spec,
            old_per_token_logps=generator_logprobs,
            completion_mask=keep,
            num_items_in_batch=divisor,
            unused="ignore",  # torchtitan always passes the generator's log-probs
        )
        return out.loss, _metrics(out, generator_logprobs, keep, divisor)


@torch.no_grad()
def _metrics(
    out: PolicyLossOutput, generator_logprobs: Tensor, keep: Tensor, divisor: Any
) -> dict[str, Tensor]:
    """Return torchtitan's metrics, to be summed over ranks except the maximum."""
    drift = torch.where(keep, out.per_token_logps - generator_logprobs, 0)
    assert out.entropies is not None
    return {
        "loss/mean": out.loss.detach(),
        "loss/ratio_mean": out.ratio.sum() / divisor,
        "loss/ratio_clipped_frac": out.is_clipped.sum() / divisor,
        "bit_wise/logprob_diff/mean": drift.sum() / divisor,
        "bit_wise/ratio_tokens_different/mean": (drift.abs() > 1e-6).sum() / divisor,
        "bit_wise/logprob_diff/max": drift.abs().max() if drift.numel() else drift.new_zeros(()),
        "trainer/entropy/mean": out.entropies.sum() / divisor,
    }
