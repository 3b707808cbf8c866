"""The one head function that TRL's GRPO, RLOO, DPO, KTO, SFT and AsyncGRPO trainers
share (``add_fused_lm_head``), on our ops.

It is ``trl.trainer.utils._ChunkedLogProbFunction``: hidden states and the head's weight
to log-probs and what else the trainer asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import trl.trainer.utils
from torch import Tensor

from ..._core.calls.dtensors import has_dtensors
from ..._core.losses.linear import linear_token_stats
from ..patching import Counts, Replacement

_PARAMETERS = (
    "ctx",
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
#: TRL's name of a result to ours, in the order in which TRL's function returns them.
_STATS = {
    "log_probs": "logps",
    "entropy": "entropies",
    "log_sum_sq_probs": "log_sum_p_sq",
    "mean_logits": "mean_logits",
    "is_top1": "is_top1",
}


class ChunkedLogProb:
    """Stands in for TRL's autograd function: ``apply`` of the same arguments and
    results, counted.
    """

    def __init__(self, backend: str, counts: Counts, original: Any) -> None:
        self.backend = backend
        self.counts = counts
        self.original = original

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """``(log-probs, entropy, log Σp², mean of the scaled logits, is top-1)``,
        ``[N]`` each, None where not asked for.

        If several tokens are the likeliest, each of them is top-1; in TRL only the
        first is.
        ``chunk_size``, TRL's width of a tile, is not read: the op bounds its own
        chunks.
        """
        reason = _unsupported_reason(hidden, weight, outputs)
        if reason is not None:
            self.counts.left(reason)
            result: tuple[Tensor | None, ...] = self.original.apply(
                hidden,
                weight,
                bias,
                targets,
                temperature,
                chunk_size,
                final_logit_softcapping,
                logit_scale,
                outputs,
            )
            return result
        self.counts.ran("linear_token_stats")
        if not torch.is_autocast_enabled(hidden.device.type):
            # TRL's function computes in hidden's dtype too, whatever the head's is.
            weight, bias = (None if x is None else x.to(hidden.dtype) for x in (weight, bias))  # type: ignore[assignment]
        options: dict[str, Any] = {
            "lm_head_bias": bias,
            "temperature": temperature,
            "softcap": final_logit_softcapping,
            "logit_scale": logit_scale,
        }
        asked = {"log_probs", *outputs}
        stats = [ours for theirs, ours in _STATS.items() if theirs in asked]
        found = linear_token_stats(
            hidden, weight, targets, stats=stats, backend=self.backend, **options
        )
        return tuple(getattr(found, name) for name in _STATS.values())


def _unsupported_reason(hidden: Tensor, weight: Tensor, outputs: Sequence[str]) -> str | None:
    """Return why TRL has to compute this, or None."""
    others = [name for name in outputs if name not in _STATS]
    if others:
        return f"outputs {', '.join(others)}"
    if hasattr(weight, "ds_id"):
        return "DeepSpeed ZeRO-3, which frees the head's weight before backward"
    if has_dtensors((hidden, weight)):
        return "hidden states or a head that are DTensors"
    return None


def head_replacements(backend: str, counts: Counts) -> list[Replacement]:
    """Return the replacements: the head function, and the devices that drop positions
    without a label before it.

    TRL 1.16 drops them on Triton's devices; here CPUs do too.
    """
    utils: Any = trl.trainer.utils
    head = ChunkedLogProb(backend, counts, utils._ChunkedLogProbFunction)
    replacements = [
        Replacement(utils, "_ChunkedLogProbFunction", head, _PARAMETERS, read_from="forward")
    ]
    on_triton = getattr(utils, "_use_triton", None)
    if on_triton is not None:  # TRL 1.15 drops them on every device

        def compacts(device: torch.device) -> bool:
            return device.type == "cpu" or on_triton(device)

        replacements.append(Replacement(utils, "_use_triton", compacts, ("device",)))
    return replacements
