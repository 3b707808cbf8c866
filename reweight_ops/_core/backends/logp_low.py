"""The rounding error of a log-prob in a shard of a vocabulary.

The shard's log-prob is a part of the row's, and the sum must be rounded only once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import SoftmaxParams
from .mean_logit import capped

#: Its name among the statistics of an op.
LOGP_LOW = "logp_low"
#: A log-prob above this is rounded finely enough. Its digits beside a log-sum-exp would
#: be fewer.
_FINE = -1.0


def logp_low(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    softmax: SoftmaxParams,
    rows: dict[str, Tensor],
) -> Tensor:
    """Return ``x[id] - lse - lse_low - logp`` in the precision of ``rows``, which hold
    these statistics.

    It is 0 where the id is not in this shard.
    """
    local = ids - softmax.vocab_start
    inside = (local >= 0) & (local < softmax.vocab_size)
    where = torch.where(inside, local, 0).view(*logits.shape[:-1], 1)
    return lost_of(logits.gather(-1, where).reshape(-1), inside, temperature, softmax.softcap, rows)


def lost_of(
    z: Tensor, inside: Tensor, temperature: Tensor, softcap: float, rows: dict[str, Tensor]
) -> Tensor:
    """The same of the ids' own logits ``[N]``, where they are ``inside``
    of the shard."""
    x = capped(z.double(), softcap) / temperature.double()
    logp = rows["logp"].double()
    lost = ((x - rows["lse"].double()) - rows["lse_low"].double()) - logp
    return torch.where(inside & (logp < _FINE) & lost.isfinite(), lost, 0).to(rows["logp"].dtype)
