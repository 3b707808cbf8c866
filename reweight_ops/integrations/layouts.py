"""The layout of a trainer's tokens, padded or packed: which position predicts which
token.

The ops never shift. Every shift is made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidCall


def predicting(x: Tensor, keep: int) -> Tensor:
    """Return the positions that predict the last ``keep`` tokens:
    ``[B, S, ...] -> [B, keep, ...]``.
    """
    return x[:, -(keep + 1) : -1]


def predicted(x: Tensor) -> Tensor:
    """``[B, S, ...] -> [B, S - 1, ...]``: of the tokens that another one stands before,
    by the positions that predict them.
    """
    return x[:, 1:]


@dataclass(frozen=True)
class Packed:
    """Consecutive sequences in ``[T]`` positions, prompts first. The rest of T is
    padding.

    ``targets`` is ``[T]`` int64, the next token of the same sequence, ``-100`` if there
    is none. ``sequence_ids`` is ``[T]`` int64, ``num_sequences`` for padding. ``rows``
    is ``[R]`` int64, the positions that predict the responses' tokens, in order.
    """

    targets: Tensor
    sequence_ids: Tensor
    num_sequences: int
    rows: Tensor

    def spread(self, values: Sequence[Tensor]) -> Tensor:
        """Spread one number per response token, given as one tensor per sequence, to
        ``[T]``, 0 elsewhere.
        """
        flat = torch.cat(list(values))
        return flat.new_zeros(self.targets.numel()).index_put((self.rows,), flat)

    def gather(self, x: Tensor) -> Tensor:
        """Gather the values of the responses' tokens, ``[T] -> [R]``."""
        return x[self.rows]


def packed(tokens: Sequence[Tensor], response_lengths: Sequence[int], length: int) -> Packed:
    """Return the layout of ``length`` positions that hold ``tokens``, ``[L]`` each. The
    last ``response_lengths`` of them are the response.

    Raises:
        InvalidCall: the sequences do not fit, or a response has no token before it.
    """
    lengths = [t.numel() for t in tokens]
    if sum(lengths) > length or any(
        not 0 <= r < n for r, n in zip(response_lengths, lengths, strict=True)
    ):
        raise InvalidCall(
            f"sequences of {lengths} tokens with responses of {list(response_lengths)} do not "
            f"fit {length} packed positions."
        )
    device = tokens[0].device
    targets, owner = (
        torch.full((length,), -100, device=device),
        torch.full((length,), len(lengths), device=device),
    )
    rows, start = [], 0
    for i, (ids, response) in enumerate(zip(tokens, response_lengths, strict=True)):
        end = start + ids.numel()
        targets[start : end - 1] = ids[1:]
        owner[start:end] = i
        rows.append(torch.arange(end - 1 - response, end - 1, device=device))
        start = end
    return Packed(targets, owner, len(lengths), torch.cat(rows))
