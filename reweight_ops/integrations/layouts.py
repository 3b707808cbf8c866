"""Where a trainer's tokens are: which position predicts which token, padded or packed. The ops never shift; every shift is made here."""

from __future__ import annotations

from torch import Tensor


def predicting(x: Tensor, keep: int) -> Tensor:
    """``[B, S, ...] -> [B, keep, ...]``: the positions that predict the last ``keep`` tokens."""
    return x[:, -(keep + 1) : -1]
