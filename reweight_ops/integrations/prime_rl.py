"""prime-rl on our ops: any token-mean method as its custom loss, and the fused head
with entropies that have gradients.

::

    [trainer.loss]
    type = "custom"
    import_path = "reweight_ops.integrations.prime_rl.loss"
    [trainer.loss.kwargs]
    method = "advantage_reweighting"
    options = { alpha = 0.3 }

Your own module, named by ``import_path`` in the same way, may hold ``loss_fn(spec)``
and call ``patch_head()``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor

from .._core.calls.specs import method as method_named
from .._core.calls.specs import named_spec
from .._core.catalogue.search import entry_of
from .._core.losses.linear import linear_token_logps
from .._core.losses.policy import policy_loss_from_logps
from .._core.spec.policy import PolicyLossSpec
from .._core.spec.reduction import FromFunction, TokenSum
from ..errors import BackendUnavailable, UnsupportedRequest
from .hosted import Host, agg_mode, level_unsupported_reason
from .patching import Counts, Patch, Replacement
from .sharding import is_sharded
from .trainers import check_version

try:
    from prime_rl.trainer.models.layers import lm_head, lm_head_gemma
    from prime_rl.trainer.rl.loss import LossInputs, LossOutputs
except ImportError as error:
    raise BackendUnavailable(
        f"reweight_ops.integrations.prime_rl needs prime-rl ({error})"
    ) from error

#: The installed version, for messages.
LIBRARY = check_version("prime-rl")
_HOST = Host("prime-rl", frozenset({"adv", "logp", "log_ratio", "old_logp", "ref_logp"}))
#: Metrics that are not a mean over a sequence. prime-rl averages over sequences.
_COUNTS = ("tokens", "sequences", "rows_skipped")

__all__ = ["loss", "loss_fn", "patch_head"]


def _unsupported_reason(spec: PolicyLossSpec) -> str | None:
    if "sampling_logp" in spec.requires:
        return (
            "it reads sampling_logp beside old_logp, and prime-rl has one policy before the "
            "update: the sampler's, which the ratio is against"
        )
    if {agg_mode(r) for r in spec.reductions} != {"token-mean"}:
        return (
            "its reduction is not a token mean, and prime-rl divides by the tokens of the "
            "global batch"
        )
    return _HOST.unsupported_reason(spec)


def loss_fn(spec: PolicyLossSpec | str) -> Callable[[LossInputs], LossOutputs]:
    """A spec, or the name of a method, as prime-rl's custom loss of one sample: the sum
    over its tokens, which prime-rl divides.

    The ratio is against ``inference_logprobs``. ``ref_logprobs`` are the reference's,
    if the algorithm provides them. ``loss_weights`` multiply the tokens' loss,
    penalties included. The only penalties are those of the spec, because prime-rl adds
    none. Statistics of a batch are those of one sample.

    Raises:
        UnsupportedRequest: prime-rl cannot train the spec; the reason is named.
    """
    spec = named_spec("prime_rl.loss_fn", spec)
    name = spec.name or "the spec"
    reason = _unsupported_reason(spec)
    if reason is not None:
        raise UnsupportedRequest(f"prime-rl cannot train {name}: {reason}.")
    bare = tuple(dataclasses.replace(p, reduction=None) for p in spec.penalties)
    summed = dataclasses.replace(spec, penalties=bare, reduction=TokenSum())

    def sample_loss(inputs: LossInputs) -> LossOutputs:
        if "ref_logp" in spec.requires and inputs.ref_logprobs is None:
            raise UnsupportedRequest(
                f"{name} reads the reference's log-probs, but the algorithm provides none "
                "(ref_logprobs is None)."
            )
        weights, resolved = inputs.loss_weights, summed
        if weights is not None:
            resolved = dataclasses.replace(
                summed,
                reduction=FromFunction(lambda token_loss, mask: (token_loss * weights).sum()),
            )
        out = policy_loss_from_logps(
            inputs.trainer_logprobs[None],
            inputs.advantages[None],
            spec=resolved,
            old_per_token_logps=inputs.inference_logprobs[None],
            ref_per_token_logps=inputs.ref_logprobs[None] if "ref_logp" in spec.requires else None,
            completion_mask=inputs.loss_mask[None],
            unused="ignore",  # prime-rl always passes the sampler's log-probs
        )
        return LossOutputs(
            loss=out.loss, metrics={n: v for n, v in out.metrics.items() if n not in _COUNTS}
        )

    return sample_loss


@lru_cache(maxsize=64)
def _named_loss(method: str, options: str) -> Callable[[LossInputs], LossOutputs]:
    reason = level_unsupported_reason(entry_of(method, "policy_loss"), "one sample")
    if reason is not None:
        raise UnsupportedRequest(
            f"prime-rl cannot train {method}: {reason}: name a loss_fn(spec) if that will do."
        )
    return loss_fn(method_named(method, **json.loads(options)))


def loss(inputs: LossInputs, method: str, options: dict[str, Any] | None = None) -> LossOutputs:
    """Evaluate :func:`loss_fn` of the method of that name with these hyper-parameters,
    as ``trainer.loss.import_path`` names it.
    """
    return _named_loss(method, json.dumps(options or {}, sort_keys=True))(inputs)


def patch_head(*, backend: str = "auto", memory_budget: int | None = None) -> Patch:
    """Replace the forwards of prime-rl's fused heads, ``FusedOutputLinear`` and
    Gemma's, which has a soft cap.

    Log-probs and entropies are fp32 and have gradients; prime-rl's entropies have none.
    ``memory_budget`` is the number of bytes of logits at a time. It replaces prime-rl's
    token chunk. Returns a patch with ``undo()``, ``fused_calls`` and
    ``delegated_calls``, also a context manager.

    Raises:
        BackendUnavailable: prime-rl's heads are not the ones that are replaced here.
    """
    counts = Counts("prime-rl")
    parameters = ("self", "hidden_states", "labels", "temperature")

    def replaced(head: Any, capped: bool) -> Replacement:
        original = head.forward

        def forward(
            self: Any,
            hidden_states: Tensor,
            labels: Tensor | None = None,
            temperature: Tensor | None = None,
        ) -> Any:
            if labels is None or temperature is None:
                # its error says what is missing
                return original(self, hidden_states, labels, temperature)
            if is_sharded(self.weight):
                counts.left("a head that is a DTensor")
                return original(self, hidden_states, labels, temperature)
            counts.ran("linear_token_logps")
            logprobs, entropy = linear_token_logps(
                hidden_states,
                self.weight,
                labels,
                temperature=temperature,
                softcap=self.softcap if capped else None,
                return_entropy=True,
                backend=backend,
                memory_budget=memory_budget,
            )
            return lm_head.PrimeLmOutput(logprobs=logprobs, entropy=entropy)

        return Replacement(head, "forward", forward, parameters)

    heads = [
        replaced(lm_head.FusedOutputLinear, False),
        replaced(lm_head_gemma.GemmaFusedOutputLinear, True),
    ]
    return Patch(LIBRARY, heads, counts)
