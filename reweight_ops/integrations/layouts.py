"""Where a trainer's tokens are: which position predicts which token, padded or packed. The ops never shift; every shift is made here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidCall


def predicting(x: Tensor, keep: int) -> Tensor:
    """``[B, S, ...] -> [B, keep, ...]``: the positions that predict the last ``keep`` tokens."""
    return x[:, -(keep + 1) : -1]


def predicted(x: Tensor) -> Tensor:
    """``[B, S, ...] -> [B, S - 1, ...]``: of the tokens that another one stands before, by the positions that predict them."""
    return x[:, 1:]


@dataclass(frozen=True)
class Packed:
    """Sequences one behind the other in ``[T]`` positions, prompts first; what is left of T is padding.

    ``targets``: ``[T]`` int64, the next token of the same sequence, ``-100`` where there is none. ``sequence_ids``: ``[T]`` int64, ``num_sequences`` for
    padding. ``rows``: ``[R]`` int64, the positions that predict the responses' tokens, in order.
    """

    targets: Tensor
    sequence_ids: Tensor
    num_sequences: int
    rows: Tensor

    def spread(self, values: Sequence[Tensor]) -> Tensor:
        """One number a response token, in a tensor a sequence, as ``[T]``; 0 elsewhere."""
        flat = torch.cat(list(values))
        return flat.new_zeros(self.targets.numel()).index_put((self.rows,), flat)

    def gather(self, x: Tensor) -> Tensor:
        """``[T] -> [R]``: of the responses' tokens."""
        return x[self.rows]


def packed(tokens: Sequence[Tensor], response_lengths: Sequence[int], length: int) -> Packed:
    """The layout of ``length`` positions that hold ``tokens``, ``[L]`` each, of which the last ``response_lengths`` are the response.

    Raises:
        InvalidCall: the sequences do not fit, or a response has no token before it.
    """
    lengths = [t.numel() for t in tokens]
    if sum(lengths) > length or any(not 0 <= r < n for r, n in zip(response_lengths, lengths, strict=True)):
        raise InvalidCall(f"sequences of {lengths} tokens with responses of {list(response_lengths)} do not fit {length} packed positions.")
    device = tokens[0].device
    targets, owner = torch.full((length,), -100, device=device), torch.full((length,), len(lengths), device=device)
    rows, start = [], 0
    for i, (ids, response) in enumerate(zip(tokens, response_lengths, strict=True)):
        end = start + ids.numel()
        targets[start : end - 1] = ids[1:]
        owner[start:end] = i
        rows.append(torch.arange(end - 1 - response, end - 1, device=device))
        start = end
    return Packed(targets, owner, len(lengths), torch.cat(rows))
