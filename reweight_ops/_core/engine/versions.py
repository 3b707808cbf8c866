"""Version counters of the caller's tensors.

A result that is computed at its first read needs its tensors as they were in the call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...errors import ReweightOpsError
from ..calls.policy import LossCall
from ..transforms import in_transform, is_wrapped


class Versions:
    """Tensors by name, and their version counters as they are now."""

    __slots__ = ("_seen",)

    def __init__(self, tensors: Iterable[tuple[str, Any]] = ()) -> None:
        outside = not in_transform()  # where nothing is wrapped
        self._seen = [
            (name, t, t._version)
            for name, t in tensors
            if isinstance(t, Tensor) and (outside or not is_wrapped(t)) and not t.is_inference()
        ]

    def __reduce__(self) -> Any:
        return Versions, ()  # a copy has tensors of its own

    def check(self, what: str) -> None:
        """Raise if a tensor has been written since the call."""
        if (name := self._written()) is not None:
            raise ReweightOpsError(
                f"{what} is computed when it is first read, and {name} has been written in "
                "place since the call: "
                f"read out.{what} before that, or pass a copy to the call "
                f"({name.partition(' ')[0]}.clone())."
            )

    def check_graph(self) -> None:
        """Raise if a gradient that has a graph itself would read a tensor that has been
        written since the call.
        """
        if (name := self._written()) is not None:
            raise ReweightOpsError(
                f"create_graph=True computes the loss again, and {name} has been written in "
                f"place since the call: pass a copy to the call ({name.partition(' ')[0]}.clone())."
            )

    def _written(self) -> str | None:
        return next((name for name, t, version in self._seen if t._version != version), None)


def arguments_of(call: LossCall) -> tuple[tuple[str, Any], ...]:
    """Return the tensors per row of a call, by the names of its arguments."""
    return (
        *call.by_argument().items(),
        ("token_weights or importance_sampling_ratio", call.factor),
        *call.spec.tensors.items(),
    )


def numbers_of(call: LossCall) -> tuple[tuple[str, Any], ...]:
    """Return the numbers of a call, which may be tensors, by their names."""
    divisors = call.divisors
    return (
        ("num_items_in_batch", divisors.num_items_in_batch),
        ("num_sequences_in_batch", divisors.num_sequences_in_batch),
        ("loss_scale", call.loss_scale),
    )


def versions_of(
    call: LossCall, leaves: dict[str, Tensor], per_token_loss: Tensor
) -> tuple[Versions, Versions] | None:
    """Return the versions of the tensors that every later result reads, and of those
    that only the loss's derivatives read.

    It is None in a graph, where everything is read at once.
    """
    if torch.compiler.is_compiling():
        return None
    read = (
        *arguments_of(call),
        ("per_token_logps", leaves["logp"]),
        ("entropies", leaves.get("entropy")),
        ("per_token_loss", per_token_loss),
    )
    return Versions(read), Versions(numbers_of(call))
