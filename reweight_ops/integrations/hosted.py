"""A spec inside another trainer's loss: whether the trainer passes the inputs that the
spec reads, and the spec's divisors from the trainer's counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .._core.catalogue.registry import Entry
from .._core.catalogue.table import level
from .._core.spec.policy import PolicyLossSpec
from .._core.spec.reduction import Reduction, SequenceMean, TokenMean, TokenSum
from ..errors import InvalidCall


@dataclass(frozen=True)
class Host:
    """A trainer, as its loss sees it.

    ``leaves`` are the inputs that it passes, by what formulas read. ``penalties`` are
    the options of its own KL and entropy terms, None if it adds none.
    """

    name: str
    leaves: frozenset[str]
    penalties: str | None = None

    def unsupported_reason(self, spec: PolicyLossSpec) -> str | None:
        """Return why the trainer cannot train a spec, or None if it can. Reductions are
        checked elsewhere.
        """
        if spec.penalties and self.penalties is not None:
            return (
                f"it has penalties, and {self.name} adds its own: leave them out and set "
                f"{self.penalties}"
            )
        missing = sorted(spec.requires - self.leaves)
        if missing:
            return f"it reads {', '.join(missing)}, which {self.name} does not pass to a loss"
        if "adv" not in spec.requires:
            return f"it does not read advantages, so {self.name}'s reward would have no effect"
        if spec.ratio.level == "segment":
            return f"its ratio is of segments, which {self.name} does not know"
        return None


def level_unsupported_reason(entry: Entry, part: str) -> str | None:
    """Return why a method of the catalogue changes if a call is only ``part`` of a
    batch, or None if it is the same.
    """
    return (
        None
        if level(entry) in ("token", "sequence")
        else f"it is of level {level(entry)}, and {part} is not the batch"
    )


def per_sequence(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the valid tokens, ``[B, T] -> [B]``. It is 0 without any."""
    kept = mask.to(x.dtype)
    return (x * kept).sum(-1) / kept.sum(-1).clamp(min=1)


def agg_mode(reduction: Reduction) -> str | None:
    """Return verl's name of a reduction (``loss_agg_mode``), or None if trainers have
    none.
    """
    if isinstance(reduction, TokenMean):
        return "token-mean" if reduction.weight is None and not reduction.per_call else None
    if isinstance(reduction, TokenSum):
        return "token-sum"
    per = {
        "token_sum": "seq-mean-token-sum",
        "constant": "seq-mean-token-sum-norm",
        "token_mean": "seq-mean-token-mean",
    }
    return per[reduction.per] if isinstance(reduction, SequenceMean) else None


def divisors(reduction: Reduction, ranks: int, tokens: Any, sequences: Any) -> dict[str, Any]:
    """Return the keywords of :func:`~reweight_ops.policy_loss_from_logps` for a loss
    that ``ranks`` ranks average, from the counts of the global batch.

    ``tokens`` and ``sequences`` are those counts, None if only this call's are known.

    Raises:
        InvalidCall: there are several ranks and the count that the reduction needs is
            missing.
    """
    if isinstance(reduction, TokenSum):
        return {} if ranks == 1 else {"loss_scale": float(ranks)}
    of_tokens = isinstance(reduction, TokenMean)
    count = tokens if of_tokens else sequences
    if count is None:
        if ranks > 1:
            raise InvalidCall(
                f"the count of {'tokens' if of_tokens else 'sequences'} over all {ranks} ranks "
                "is missing, which the loss divides by."
            )
        return {}
    return {"num_items_in_batch" if of_tokens else "num_sequences_in_batch": count / ranks}
