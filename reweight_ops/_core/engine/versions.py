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

#: Tensors and numbers by the names of their arguments.
_Named = tuple[tuple[str, Any], ...]


class Versions:
    """Tensors by name, and their version counters as they are now."""

    __slots__ = ("_seen",)

    def __init__(self, tensors: Iterable[tuple[str, Any]] = ()) -> None:
        # a loop, as every call comes here, and a comprehension is one more Python call
        self._seen: list[tuple[str, Tensor, int]] = []
        inside = None
        for name, t in tensors:
            if not isinstance(t, Tensor):
                continue
            if inside is None:
                inside = in_transform()  # outside of one, nothing is wrapped
            if not (inside and is_wrapped(t)) and not t.is_inference():
                self._seen.append((name, t, t._version))

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


def arguments_of(call: LossCall) -> tuple[_Named, _Named]:
    """Return the tensors per row of a call, and its numbers, which may be tensors, by
    name.
    """
    divisors = call.divisors
    return (
        ("advantages", call.adv),
        ("old_per_token_logps", call.old_logp),
        ("ref_per_token_logps", call.ref_logp),
        ("sampling_per_token_logps", call.sampling_logp),
        ("token_weights or importance_sampling_ratio", call.factor),
        *call.spec.tensors.items(),
    ), (
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
    rows, numbers = arguments_of(call)
    read = (
        *rows,
        ("per_token_logps", leaves["logp"]),
        ("entropies", leaves.get("entropy")),
        ("per_token_loss", per_token_loss),
    )
    return Versions(read), Versions(numbers)
